"""Which machines cannot run llama.cpp's extra CPU buffer types, remembered between runs.

One JSON file in the user's state folder. An entry holds for one CPU and one build of llama.cpp: another of either
starts afresh. Deleting the file forgets everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_VERSION = 1


@dataclass(frozen=True)
class CrashRecord:
    """One crash with the extra buffers on that did not happen with them off.

    Attributes:
        signal_name: what the process died of.
        model: name of the file that was being run.
        cpu: the CPU's model name.
        day: when, as YYYY-MM-DD.
    """

    signal_name: str
    model: str
    cpu: str
    day: str


class CrashMemory:
    """The file. A missing or damaged one counts as empty; only ``remember`` raises, OSError when it cannot write."""

    def __init__(self, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / "native_crashes.json"

    def recall(self) -> CrashRecord | None:
        """The crash known for this machine and llama.cpp build."""
        entries = self._entries()
        # The key reads a few megabytes of libraries: not worth it on the many machines that never crashed.
        entry = entries.get(machine_key()) if entries else None
        try:
            return CrashRecord(**entry) if entry else None
        except TypeError:
            return None

    def remember(self, signal_name: str, model: str) -> None:
        """Note a crash for this machine and llama.cpp build."""
        record = CrashRecord(signal_name, Path(model).name, _cpu()[0], date.today().isoformat())
        entries = {**self._entries(), machine_key(): asdict(record)}
        text = json.dumps({"version": _VERSION, "entries": entries}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".native_crashes.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink()
            raise

    def _entries(self) -> dict[str, Any]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        entries = data.get("entries") if isinstance(data, dict) and data.get("version") == _VERSION else None
        return entries if isinstance(entries, dict) else {}


def state_folder() -> Path:
    """``$HALO_HOME``, else ``halo`` in ``$XDG_STATE_HOME`` or ``~/.local/state``."""
    if home := os.environ.get("HALO_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "halo"


def machine_key() -> str:
    """Hash of the CPU's name and flags and of the llama.cpp libraries; equal means the same native code runs."""
    digest = hashlib.sha256("\n".join(_cpu()).encode())
    for library in _libraries():
        digest.update(library.read_bytes())
    return digest.hexdigest()[:32]


def _cpu() -> tuple[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), platform.machine()
    # ARM kernels write "Features" and no model name.
    name = re.search(r"^(?:model name|CPU part)\s*:\s*(.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return (name[1] if name else platform.machine(), " ".join(sorted(flags[1].split())) if flags else "")


def _libraries() -> list[Path]:
    """The files whose code may crash. Found without importing llama_cpp, which would load them."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = find_spec("llama_cpp")
    if override:
        folder = Path(override)
    elif spec and spec.origin:
        folder = Path(spec.origin).parent / "lib"
    else:
        return []
    # A wheel holds each library three times over, under its versioned names.
    found = [*folder.glob("*ggml-cpu*"), *folder.glob("*llama.*")]
    return sorted({path.name.split(".")[0]: path for path in sorted(found) if path.is_file()}.values())
