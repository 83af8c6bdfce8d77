"""Resident memory of this process, from the kernel."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from halo.runtime.records import Memory


def own_memory() -> Memory:
    """Peak and present resident memory; None where the system does not tell."""
    try:
        return _from_status(Path("/proc/self/status").read_text())
    except OSError:
        return _from_rusage()


def _from_status(text: str) -> Memory:
    kibibytes = {name: int(value) for name, value in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text, re.M)}
    found = {name: value * 1024 for name, value in kibibytes.items()}
    return Memory(found.get("VmHWM"), found.get("VmRSS"), found.get("RssAnon"), "measured: /proc/self/status")


def _from_rusage() -> Memory:
    try:
        import resource
    except ImportError:
        return Memory(None, None, None, "unavailable: no resource module on this system")
    # Kilobytes everywhere but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Memory(peak, None, None, "measured: getrusage")
