"""The ``halo`` command as a user runs it, in a process of its own, and what its answers must look like."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-m", "halo.cli"]
STAGES = (
    "reading",
    "calibrating",
    "measuring damage",
    "folding",
    "quantising",
    "running it once",
    "writing the bundle",
)
PROGRESS = tuple(f"{stage} ..." for stage in STAGES)


@dataclass(frozen=True)
class Result:
    """What a finished command left behind."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line of a refused command.

        Before it there may be progress lines and notes, after it nothing, and nothing on stdout.
        """
        lines = self.err.splitlines()
        assert self.code == 2, f"exit code {self.code}: {self.err}"
        assert self.out == ""
        assert lines and lines[-1].startswith("halo: "), self.err
        others = [line for line in lines[:-1] if not line.startswith("note: ") and line not in PROGRESS]
        assert not others, others
        return lines[-1]


def one_core() -> None:
    """For the child of a fork. ggml's threads spin while they wait for each other: on a machine that is busy with other
    work, a tiny model's first run takes 5 s on two cores and 0.4 s on one."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[os.getpid() % len(os.sched_getaffinity(0))]})


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what changes the output, and ``extra``."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "HALO_TEST_CRASH")}
    return kept | {"COLUMNS": "100", **(extra or {})}


def run_halo(
    *args: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    before: Callable[[], None] = one_core,
) -> Result:
    """``halo ARGS`` in a new process; ``before`` runs in it ahead of Python."""
    done = subprocess.run(
        [*COMMAND, *map(str, args)], env=environment(env), cwd=cwd, preexec_fn=before, timeout=120, check=False,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())
