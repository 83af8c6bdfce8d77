"""Running a GGUF with llama.cpp, in a process of its own.

Native code can crash, so nothing here loads libllama: ``worker`` does, in a child. Names resolve on first use, which
keeps ``import halo.runtime`` free of numpy and of everything slower.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Worker": "client",
    "GuardedWorker": "guard",
    "open_model": "guard",
    "Runner": "records",
    "LoadOptions": "records",
    "ModelInfo": "records",
    "Buffers": "records",
    "Generation": "records",
    "Memory": "records",
    "SmokeResult": "smoke",
    "first_words": "smoke",
    "finite_check": "smoke",
    "CrashMemory": "crash_memory",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
