"""What a measurement was made on: machine, versions, commit, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from halo.threads import default_threads

_PACKAGES = ("halo-gguf", "llama-cpp-python", "gguf", "numpy", "torch", "transformers", "tokenizers")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str:
    """The commit of the source tree; ``+changes`` when tracked files differ from it."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def machine_record() -> dict[str, Any]:
    """Taken before the measuring: ``load_before`` above 0.3 or so means that somebody else used the cores."""
    return {
        "cpu": _cpu_model(),
        "cores": default_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"halo.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }
