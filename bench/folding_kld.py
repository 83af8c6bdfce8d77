"""Folding: the folded and the unfolded file at equal bytes, by KL divergence from the float16 model.

Proves (or refutes) that scale folding lowers the divergence of the quantised model. Both files are made from one
imatrix, so their statistics are the same; both get the same budget. Mean KL divergence with its standard error and
perplexity are llama-perplexity's on WikiText-2's test text. The difference (folded minus unfolded) is paired chunk by
chunk: what both files share drops out, and that tokens of one chunk depend on each other is counted, which
llama-perplexity's standard errors do not do.

    python -m halo.bench.folding_kld /root/w/realigned --bpw 3.0 3.4375 3.65 4.5 \\
        --text /work/shared/data/wikitext-2-raw/wiki.test.raw

The base model's logits take some 25 MB a chunk in the work folder (for a vocabulary of 49152).
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halo.bench.halo_command import Halo, add_halo_options, halo_of, read_bundle
from halo.bench.machine import machine_record
from halo.bench.measure_command import measure
from halo.bench.peers import Divergence, Tools, add_tools_option, divergence, find_tools
from halo.bench.results import markdown_table, parser, write_result

_WIKITEXT = Path("/work/shared/data/wikitext-2-raw/wiki.test.raw")
_FEWEST_CHUNKS = 8


@dataclass(frozen=True)
class Variant:
    """One file and how far it is from the float model."""

    file_bytes: int
    places: int
    found: Divergence


@dataclass(frozen=True)
class Pair:
    """Both files of a budget; ``difference`` is folded minus unfolded, with its standard error."""

    bpw: float
    folded: Variant
    unfolded: Variant
    difference: tuple[float, float]


@dataclass(frozen=True)
class Bench:
    """What stays the same from budget to budget."""

    halo: Halo
    tools: Tools
    model: Path
    text: Path
    chunks: int
    work: Path

    @property
    def imatrix(self) -> Path:
        return self.work / "imatrix.gguf"

    @property
    def base(self) -> Path:
        return self.work / "base-logits.bin"

    def prepare(self, tokens: int) -> None:
        """The imatrix, the float16 GGUF and its logits, once."""
        command = self.halo.command(
            "plan", self.model, "--bpw", "8.5", "--no-fold", "--save-imatrix", self.imatrix, "--calibration-tokens",
            str(tokens),
        )  # fmt: skip
        measure(command)
        f16 = self.model
        if self.model.is_dir():
            f16 = self.work / "f16.gguf"
            measure(self.tools.convert(self.model, f16), self.tools.environment)
        measure(self.tools.perplexity(f16, self.text, self.chunks, self.base))

    def try_variant(self, bpw: float, fold: str) -> Variant:
        out = self.work / "out"
        measure(self.halo.command("apply", self.model, "--imatrix", self.imatrix, "--bpw", f"{bpw:g}", fold, "-o", out))
        manifest = read_bundle(out)
        found = divergence(self.tools, out / "model.gguf", self.text, self.chunks, self.base)
        shutil.rmtree(out)
        return Variant(int(manifest["file"]["bytes"]), len(manifest["fold_exponents"]), found)

    def try_budget(self, bpw: float) -> Pair:
        unfolded, folded = self.try_variant(bpw, "--no-fold"), self.try_variant(bpw, "--fold")
        return Pair(bpw, folded, unfolded, paired_difference(folded.found.chunks, unfolded.found.chunks))


def paired_difference(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the differences chunk by chunk."""
    gaps = [a - b for a, b in zip(ours, others, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return statistics.fmean(gaps), error


def _rows(pair: Pair) -> list[list[object]]:
    def row(name: str, variant: Variant, difference: str) -> list[object]:
        found = variant.found
        return [
            f"{pair.bpw:g}", name, variant.file_bytes, variant.places, "{:.6f} ± {:.6f}".format(*found.kld),
            "{:.4f} ± {:.4f}".format(*found.perplexity), difference,
        ]  # fmt: skip

    relative = pair.difference[0] / pair.unfolded.found.kld[0]
    told = "{:+.6f} ± {:.6f}".format(*pair.difference) + f" ({relative:+.1%})"
    return [row("unfolded", pair.unfolded, ""), row("folded", pair.folded, told)]


_HEADERS = ("bits per weight", "file", "bytes", "places folded", "mean KLD", "perplexity", "folded − unfolded, paired")


def _verdict(pair: Pair) -> str:
    """By two standard errors, which mean little with a handful of chunks."""
    mean, error = pair.difference
    if len(pair.folded.found.chunks) < _FEWEST_CHUNKS:
        return "not told apart"
    return "lower" if mean < -2 * error else "higher" if mean > 2 * error else "not told apart"


def _record(pair: Pair) -> dict[str, Any]:
    return asdict(pair) | {"folded_is": _verdict(pair)}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="Hugging Face folder, or a float GGUF file")
    made.add_argument("--bpw", type=float, nargs="+", default=[3.0, 3.4375, 3.65, 4.5], help="budgets")
    made.add_argument("--text", type=Path, default=_WIKITEXT, help=f"default: {_WIKITEXT}")
    made.add_argument("--chunks", type=int, default=32, help="of 512 tokens; default: 32")
    made.add_argument("--tokens", type=int, default=16384, help="calibration tokens; default: 16384")
    made.add_argument("--work", type=Path, help="where to put the files; default: the system's temp folder")
    add_halo_options(made)
    add_tools_option(made)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: which of both is better is the finding, not a failure."""
    args, machine = _arguments(argv), machine_record()
    tools = find_tools(args.tools, args.threads)
    with tempfile.TemporaryDirectory(prefix="halo-bench-", dir=args.work) as work:
        bench = Bench(halo_of(args), tools, args.model, args.text, args.chunks, Path(work))
        bench.prepare(args.tokens)
        pairs = [bench.try_budget(bpw) for bpw in args.bpw]
    base = pairs[0].folded.found.base_perplexity
    print(markdown_table(_HEADERS, [row for pair in pairs for row in _rows(pair)]))
    print("\nperplexity of the float16 model: {:.4f} ± {:.4f}".format(*base))
    print("the folded file's divergence, by two standard errors of the paired difference:")
    for pair in pairs:
        print(f"- {pair.bpw:g} bits per weight: {_verdict(pair)}")
    record = {
        "llama_cpp_tools": tools.version,
        "text": str(args.text),
        "chunks": args.chunks,
        "base_perplexity": base,
        "budgets": [_record(pair) for pair in pairs],
    }
    print(f"written: {write_result(args.results, 'folding_kld', machine, record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
