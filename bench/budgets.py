"""Budget: ten budgets, evenly spaced from the smallest possible file to 8.5 bits per weight, asked for by --bpw, by
--size and by a device's memory in turn.

Proves that the file is never above its budget and never below 99.5 % of it, and that a byte less than the smallest
possible is refused with exit code 2 and the smallest size. The budget is computed here from what was asked for, not
taken from HALO's manifest. The model is calibrated once.

    python -m halo.bench.budgets /root/w/realigned --count 10

A device's budget ends at 6.5625 bits per weight (halo.budget.WELL_BPW); beyond that its turn goes to --bpw.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from halo.bench.halo_command import Halo, add_halo_options, halo_of, read_bundle
from halo.bench.machine import machine_record
from halo.bench.measure_command import measure
from halo.bench.results import markdown_table, parser, write_result

from halo.budget import WELL_BPW
from halo.checkpoint import open_checkpoint

LARGEST_BPW = 8.5
LEAST_USED = 0.995
_WAYS = ("--bpw", "--size", "--device")
_SMALLEST = re.compile(r"below the smallest possible file of .*?\((\d+) bytes")


@dataclass(frozen=True)
class Outcome:
    """One budget and the file made for it."""

    way: str
    asked: str
    budget_bytes: int
    bpw: float
    file_bytes: int
    used: float
    seconds: float
    met: bool


@dataclass(frozen=True)
class Refusal:
    """What HALO said to a budget that is too small; ``smallest`` is the size it named."""

    exit_code: int
    message: str
    smallest: int | None
    met: bool


@dataclass(frozen=True)
class Bench:
    """The model, calibrated; ``beside`` are the bytes that a device needs beside the file."""

    halo: Halo
    model: Path
    work: Path
    imatrix: Path
    n_params: int
    beside: int

    def options(self, way: str, target: int) -> tuple[list[str], int, str]:
        """Options that ask for about ``target`` bytes, the bytes they stand for, and how they read."""
        if way == "--bpw":
            bpw = target * 8 / self.n_params
            # Rounded up at a digit that no file could show, so that the smallest possible stays possible.
            text = f"{bpw + 5e-8:.7f}"
            return [way, text], int(float(text) * self.n_params / 8), text
        if way == "--size":
            return [way, str(target)], target, str(target)
        profile = self.work / "device.toml"
        memory = target + self.beside
        profile.write_text(f'name = "bench"\nbackend = "cpu"\nmemory_bytes = {memory}\n', encoding="utf-8")
        return [way, str(profile)], target, f"{memory} bytes of memory"

    def try_budget(self, way: str, target: int) -> Outcome:
        options, budget, asked = self.options(way, target)
        out = self.work / "out"
        run = measure(self.halo.command("apply", self.model, "--imatrix", self.imatrix, *options, "-o", out))
        size = (out / "model.gguf").stat().st_size
        if size != read_bundle(out)["file"]["bytes"]:
            sys.exit(f"{out}: the manifest tells another size than the {size} bytes of the file")
        shutil.rmtree(out)
        used = size / budget
        met = size <= budget and used >= LEAST_USED
        return Outcome(way, asked, budget, budget * 8 / self.n_params, size, used, run.seconds, met)

    def refusal(self, size: int) -> Refusal:
        out = self.work / "refused"
        command = self.halo.command("apply", self.model, "--imatrix", self.imatrix, "--size", str(size), "-o", out)
        run = measure(command, check=False)
        message = run.stderr[-1].text if run.stderr else ""
        named = _SMALLEST.search(message)
        least = int(named[1]) if named else None
        return Refusal(run.exit_code, message, least, run.exit_code == 2 and least is not None and not out.exists())


def calibrate(halo: Halo, model: Path, work: Path, tokens: int) -> Bench:
    """Calibrate once, and learn what HALO expects a device to need beside the file."""
    imatrix = work / "imatrix.gguf"
    command = halo.command(
        "plan", model, "--bpw", str(LARGEST_BPW), "--json", "--save-imatrix", imatrix, "--calibration-tokens",
        str(tokens),
    )  # fmt: skip
    plan = json.loads(measure(command).stdout)
    beside = plan["expected_memory"] - plan["file_bytes"]
    return Bench(halo, model, work, imatrix, open_checkpoint(model).n_params, beside)


def smallest(bench: Bench) -> int:
    """The smallest possible file, as the refusal of one byte names it."""
    refused = bench.refusal(1)
    if refused.smallest is None:
        sys.exit(f"one byte was not refused with the smallest size but with: {refused.message}")
    return refused.smallest


def targets(least: int, most: int, count: int) -> list[int]:
    """Evenly spaced, both ends included."""
    return [least + (most - least) * i // max(count - 1, 1) for i in range(count)]


def way_of(index: int, bpw: float) -> str:
    way = _WAYS[index % len(_WAYS)]
    return "--bpw" if way == "--device" and bpw > WELL_BPW else way


def run_all(bench: Bench, count: int) -> tuple[list[Outcome], Refusal]:
    least = smallest(bench)
    most = int(LARGEST_BPW * bench.n_params / 8)
    outcomes = [
        bench.try_budget(way_of(i, target * 8 / bench.n_params), target)
        for i, target in enumerate(targets(least, most, count))
    ]
    refused = bench.refusal(least - 1)
    return outcomes, replace(refused, met=refused.met and refused.smallest == least)


def _row(number: int, found: Outcome) -> list[object]:
    return [
        number, found.way, f"{found.bpw:.4f}", found.budget_bytes, found.file_bytes, f"{found.used:.3%}",
        f"{found.seconds:.1f}", "yes" if found.met else "NO",
    ]  # fmt: skip


_HEADERS = ("budget", "asked by", "bits per weight", "budget, bytes", "file, bytes", "used", "seconds", "met")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("model", type=Path, help="Hugging Face folder or GGUF file")
    made.add_argument("--count", type=int, default=10, help="budgets; default: 10")
    made.add_argument("--tokens", type=int, default=16384, help="calibration tokens; default: 16384")
    made.add_argument("--work", type=Path, help="where to put the bundles; default: the system's temp folder")
    add_halo_options(made)
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when a budget is not met or the refusal is not as it should be."""
    args, machine = _arguments(argv), machine_record()
    with tempfile.TemporaryDirectory(prefix="halo-bench-", dir=args.work) as work:
        bench = calibrate(halo_of(args), args.model, Path(work), args.tokens)
        outcomes, refusal = run_all(bench, args.count)
    print(markdown_table(_HEADERS, [_row(i, found) for i, found in enumerate(outcomes, 1)]))
    print(f"\na byte below the smallest: exit code {refusal.exit_code}, {refusal.message}")
    all_met = refusal.met and all(found.met for found in outcomes)
    print("all met" if all_met else "NOT all met")
    record = {"all_met": all_met, "budgets": [asdict(o) for o in outcomes], "refusal": asdict(refusal)}
    print(f"written: {write_result(args.results, 'budgets', machine, record)}")
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
