"""``halo`` as a command to be measured, and what it tells on the way."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo.bench.measure_command import Measurement, ProcessPeak

from halo.threads import default_threads

_WORKER = "halo.runtime.worker"


@dataclass(frozen=True)
class Halo:
    """The options that all runs of ``halo apply`` and ``halo plan`` in a benchmark share."""

    policy: str
    threads: int
    extra: tuple[str, ...]

    def command(self, verb: str, model: Path, *options: str | Path) -> list[str | Path]:
        return [
            sys.executable, "-m", "halo.cli", verb, model, "--policy", self.policy, "--threads", str(self.threads),
            *options, *self.extra,
        ]  # fmt: skip


def add_halo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", default="llama-arch", help="default: llama-arch")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of everything; default: all cores")
    parser.add_argument("--extra", default="", metavar="'OPTIONS'", help="more options for halo, in one string")


def halo_of(args: argparse.Namespace) -> Halo:
    return Halo(args.policy, args.threads, tuple(shlex.split(args.extra)))


def read_bundle(folder: Path) -> dict[str, Any]:
    """A bundle's ``halo.json``."""
    data: dict[str, Any] = json.loads((folder / "halo.json").read_text(encoding="utf-8"))
    return data


@dataclass(frozen=True)
class Stage:
    """A stretch between two of halo's progress lines. ``damage`` comes twice when folding changed something.

    Attributes:
        rss: peak of the whole process tree in it; ``anon`` without file-mapped pages.
    """

    name: str
    start: float
    seconds: float
    rss: int
    anon: int


def stages(run: Measurement) -> list[Stage]:
    """The stages of a run that was not quiet: plain progress lines end in `` ...``."""
    starts = [(0.0, "starting")]
    starts += [(line.seconds, line.text.removesuffix(" ...")) for line in run.stderr if line.text.endswith(" ...")]
    ends = [*(start for start, _ in starts[1:]), run.seconds]
    return [_stage(run, name, start, end) for (start, name), end in zip(starts, ends, strict=True)]


def _stage(run: Measurement, name: str, start: float, end: float) -> Stage:
    within = [s for s in run.samples if start <= s.seconds <= end]
    return Stage(
        name, round(start, 3), round(end - start, 3), max((s.rss for s in within), default=0),
        max((s.anon for s in within), default=0),
    )  # fmt: skip


def halo_and_worker(run: Measurement) -> tuple[ProcessPeak, ProcessPeak]:
    """The peaks of halo itself and of the process that owns llama.cpp (the largest, should there be more)."""
    workers = [p for p in run.processes if _WORKER in p.command]
    others = [p for p in run.processes if _WORKER not in p.command]
    return max(others, key=lambda p: p.hwm), max(workers, key=lambda p: p.hwm, default=ProcessPeak("none"))
