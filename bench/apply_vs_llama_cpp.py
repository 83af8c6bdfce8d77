"""Speed: one `halo apply` against converting, llama-imatrix and llama-quantize, from the same checkpoint, over the
same number of calibration tokens, to a file of the preset's size, with the same threads.

Proves (or refutes) that HALO takes at most half of the time and no more peak memory. Runs alternate and change their
order from pair to pair; each starts with clean disk buffers and the source in the page cache. HALO's time includes
its search, the hashes and the first run of the finished file; llama.cpp's includes writing the F16 GGUF. The peers'
imatrix is made without perplexity unless --ppl is given, which is in their favour: their default computes it.

    python -m halo.bench.apply_vs_llama_cpp /root/w/realigned --text /work/shared/data/calibration/wiki.utf8 \\
        --tokens 51200 --preset Q4_K_M --type-set k --runs 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halo.bench.halo_command import Halo, add_halo_options, halo_of, read_bundle, stages
from halo.bench.machine import machine_record
from halo.bench.measure_command import Measurement, measure
from halo.bench.peers import Tools, add_tools_option, find_tools
from halo.bench.results import markdown_table, megabytes, parser, write_result

TARGET = 0.5
PARTS = ("convert", "imatrix", "quantize")


@dataclass(frozen=True)
class Side:
    """One way from checkpoint to file, measured part by part."""

    parts: dict[str, Measurement]
    file_bytes: int

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.parts.values())

    @property
    def peak_rss(self) -> int:
        return max(m.peak_rss for m in self.parts.values())

    @property
    def peak_anon(self) -> int:
        return max(m.peak_anon for m in self.parts.values())

    def to_record(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 3),
            "peak_rss": self.peak_rss,
            "peak_anon": self.peak_anon,
            "file_bytes": self.file_bytes,
            "parts": {name: m.to_record() for name, m in self.parts.items()},
        }


@dataclass(frozen=True)
class Race:
    """Everything that stays the same from run to run."""

    args: argparse.Namespace
    halo: Halo
    tools: Tools
    work: Path

    def run_peers(self) -> Side:
        args, tools = self.args, self.tools
        f16, imatrix, out = (self.work / n for n in ("f16.gguf", "imatrix.gguf", "preset.gguf"))
        parts = {
            "convert": measure(tools.convert(args.model, f16), tools.environment),
            "imatrix": measure(tools.imatrix(f16, args.text, args.tokens, imatrix, args.ppl)),
            "quantize": measure(tools.quantize(f16, imatrix, out, args.preset)),
        }
        side = Side(parts, out.stat().st_size)
        for path in (f16, imatrix, out):
            path.unlink()
        return side

    def run_halo(self, size: int) -> Side:
        args, out = self.args, self.work / "halo"
        command = self.halo.command(
            "apply", args.model, "--size", str(size), "--calibration", args.text, "--calibration-tokens",
            str(args.tokens), "--type-set", args.type_set, "-o", out,
        )  # fmt: skip
        run = measure(command)
        side = Side({"apply": run}, int(read_bundle(out)["file"]["bytes"]))
        shutil.rmtree(out)
        return side


def _settle(model: Path) -> None:
    """The source in the page cache, nothing of the last run left to write."""
    for path in sorted(model.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass
    os.sync()


def run_pairs(race: Race) -> list[tuple[Side, Side]]:
    """(HALO, peers) of each pair. The first pair begins with the peers, who give the size."""
    pairs: list[tuple[Side, Side]] = []
    for index in range(race.args.runs):
        peers = None
        if index % 2 == 0:
            _settle(race.args.model)
            peers = race.run_peers()
        _settle(race.args.model)
        halo = race.run_halo((peers or pairs[0][1]).file_bytes)
        if peers is None:
            _settle(race.args.model)
            peers = race.run_peers()
        pairs.append((halo, peers))
    return pairs


def _row(number: int, halo: Side, peers: Side) -> list[object]:
    return [
        number, f"{halo.seconds:.1f}", *(f"{peers.parts[p].seconds:.1f}" for p in PARTS), f"{peers.seconds:.1f}",
        f"{halo.seconds / peers.seconds:.3f}", f"{megabytes(halo.peak_rss)} ({megabytes(halo.peak_anon)})",
        f"{megabytes(peers.peak_rss)} ({megabytes(peers.peak_anon)})", halo.file_bytes, peers.file_bytes,
    ]  # fmt: skip


_HEADERS = (
    "pair", "halo apply, s", "convert, s", "imatrix, s", "quantize, s", "peers' sum, s", "ratio",
    "halo peak RSS (anonymous), MB", "peers' peak RSS (anonymous), MB", "halo file, bytes", "preset file, bytes",
)  # fmt: skip


def summarise(pairs: list[tuple[Side, Side]]) -> dict[str, Any]:
    ratios = [halo.seconds / peers.seconds for halo, peers in pairs]
    ours, theirs = max(h.peak_rss for h, _ in pairs), max(p.peak_rss for _, p in pairs)
    return {
        "ratios": [round(r, 4) for r in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
        "target_ratio": TARGET,
        "time_met": statistics.median(ratios) <= TARGET,
        "halo_peak_rss": ours,
        "peers_peak_rss": theirs,
        "halo_peak_anon": max(h.peak_anon for h, _ in pairs),
        "peers_peak_anon": max(p.peak_anon for _, p in pairs),
        "memory_met": ours <= theirs,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="Hugging Face folder")
    made.add_argument("--text", type=Path, required=True, help="calibration text of both")
    made.add_argument("--tokens", type=int, default=51200, help="calibration tokens of both; default: 51200")
    made.add_argument("--preset", default="Q4_K_M", help="of llama-quantize; default: Q4_K_M")
    made.add_argument("--type-set", default="cpu", help="of halo; default: cpu")
    made.add_argument("--runs", type=int, default=3, help="pairs; default: 3")
    made.add_argument("--ppl", action="store_true", help="let llama-imatrix compute perplexity, its default")
    made.add_argument("--work", type=Path, help="where to put the files of the runs; default: the system's temp folder")
    add_halo_options(made)
    add_tools_option(made)
    args = made.parse_args(argv)
    if not args.model.is_dir():
        made.error(f"{args.model} is no folder; the converter takes Hugging Face folders")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when a target is missed."""
    args, machine = _arguments(argv), machine_record()
    tools = find_tools(args.tools, args.threads)
    with tempfile.TemporaryDirectory(prefix="halo-bench-", dir=args.work) as work:
        pairs = run_pairs(Race(args, halo_of(args), tools, Path(work)))
    summary = summarise(pairs)
    print(markdown_table(_HEADERS, [_row(i, *pair) for i, pair in enumerate(pairs, 1)]))
    print(
        f"\nmedian ratio {summary['median_ratio']:.3f}, target {TARGET}: {'met' if summary['time_met'] else 'MISSED'}; "
        f"peak RSS {megabytes(summary['halo_peak_rss'])} against {megabytes(summary['peers_peak_rss'])} MB: "
        f"{'met' if summary['memory_met'] else 'MISSED'}"
    )
    record = {
        "llama_cpp_tools": tools.version,
        "tokens": args.tokens,
        "preset": args.preset,
        "summary": summary,
        "halo_stages": [[asdict(s) for s in stages(halo.parts["apply"])] for halo, _ in pairs],
        "pairs": [{"halo": halo.to_record(), "peers": peers.to_record()} for halo, peers in pairs],
    }
    print(f"written: {write_result(args.results, 'apply_vs_llama_cpp', machine, record)}")
    return 0 if summary["time_met"] and summary["memory_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
