"""llama.cpp's own tools as commands: the converter, llama-imatrix, llama-quantize and llama-perplexity."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from halo.bench.measure_command import measure

WINDOW = 512
_DEFAULT = Path.home() / ".cache" / "halo-llama-tools"
_VARIABLE = "HALO_LLAMA_TOOLS"
_NAMES = ("llama-quantize", "llama-imatrix", "llama-perplexity")
_CONVERTER = Path("src/vendor/llama.cpp/convert_hf_to_gguf.py")

Command = list[str | Path]


@dataclass(frozen=True)
class Tools:
    """A folder that ``llama-tools.sh`` built, and the threads its tools run with."""

    folder: Path
    threads: int

    @property
    def version(self) -> str:
        """The source package they were built from."""
        packages = sorted((self.folder / "sdist").glob("*.tar.gz"))
        return packages[-1].name.removesuffix(".tar.gz") if packages else "unknown"

    def convert(self, model: Path, out: Path) -> Command:
        return [sys.executable, self.folder / _CONVERTER, model, "--outtype", "f16", "--outfile", out]

    def imatrix(self, model: Path, text: Path, n_tokens: int, out: Path, perplexity: bool) -> Command:
        """Over ``n_tokens``, rounded up to whole windows as HALO does it."""
        return [
            self.folder / "bin" / "llama-imatrix", "-m", model, "-f", text, "-o", out, "--output-format", "gguf",
            "-c", str(WINDOW), "--chunks", str(math.ceil(n_tokens / WINDOW)), "-ngl", "0", "-t", str(self.threads),
            *([] if perplexity else ["--no-ppl"]),
        ]  # fmt: skip

    def quantize(self, model: Path, imatrix: Path, out: Path, preset: str) -> Command:
        return [self.folder / "bin" / "llama-quantize", "--imatrix", imatrix, model, out, preset, str(self.threads)]

    def perplexity(self, model: Path, text: Path, chunks: int, base: Path) -> Command:
        """With ``--kl-divergence`` added it compares with ``base``; as it is it writes ``base``."""
        return [
            self.folder / "bin" / "llama-perplexity", "-m", model, "-f", text, "--kl-divergence-base", base,
            "-c", str(WINDOW), "--chunks", str(chunks), "-ngl", "0", "-t", str(self.threads),
        ]  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """The converter has no option for threads."""
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads)}


def add_tools_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tools", type=Path, metavar="DIR",
        help=f"what llama-tools.sh built; default: ${_VARIABLE}, or {_DEFAULT}",
    )  # fmt: skip


def find_tools(given: Path | None, threads: int) -> Tools:
    """The tools of ``--tools``, of HALO_LLAMA_TOOLS or of the default folder; ends the program when one is missing."""
    folder = given or Path(os.environ.get(_VARIABLE) or _DEFAULT)
    missing = [p for p in (*(Path("bin") / n for n in _NAMES), _CONVERTER) if not (folder / p).is_file()]
    if missing:
        sys.exit(f"{folder}: has no {missing[0]}; build it with llama-tools.sh and name the folder with --tools")
    return Tools(folder.resolve(), threads)


@dataclass(frozen=True)
class Divergence:
    """What llama-perplexity says of one quantised model; pairs are mean and standard error.

    Attributes:
        chunks: mean KL divergence of each chunk, from the running means (so to about 1e-4).
    """

    kld: tuple[float, float]
    perplexity: tuple[float, float]
    base_perplexity: tuple[float, float]
    same_top: tuple[float, float]
    chunks: tuple[float, ...]


_NUMBER = r"\s*(-?[\d.]+|-?nan|-?inf)"
_CHUNK = re.compile(rf"^\s*(\d+)(?:{_NUMBER} ±{_NUMBER}){{2}}{_NUMBER} ±{_NUMBER}", re.M)


def _pair(output: str, label: str) -> tuple[float, float]:
    found = re.search(rf"{label}\s*:{_NUMBER} ±{_NUMBER}", output)
    if found is None:
        sys.exit(f"llama-perplexity printed no '{label}'")
    return float(found[1]), float(found[2])


def _chunk_means(output: str) -> tuple[float, ...]:
    running = [(int(found[1]), float(found[4])) for found in _CHUNK.finditer(output)]
    totals = [0.0, *(count * mean for count, mean in running)]
    return tuple(after - before for before, after in pairwise(totals))


def parse_divergence(output: str) -> Divergence:
    """From everything that ``llama-perplexity --kl-divergence`` printed."""
    return Divergence(
        kld=_pair(output, "Mean    KLD"),
        perplexity=_pair(output, r"Mean PPL\(Q\)"),
        base_perplexity=_pair(output, r"Mean PPL\(base\)"),
        same_top=_pair(output, "Same top p"),
        chunks=_chunk_means(output),
    )


def divergence(tools: Tools, model: Path, text: Path, chunks: int, base: Path) -> Divergence:
    """Mean KL divergence of a model's next-token distribution from ``base``'s."""
    return parse_divergence(measure([*tools.perplexity(model, text, chunks, base), "--kl-divergence"]).output)
