"""A device profile, and the one of this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass

# What a model may take of the memory that is free now: the rest is for the system and for what the user opens next.
_USABLE = 0.8


@dataclass(frozen=True)
class Device:
    """Where a bundle is to run.

    Attributes:
        backend: ``cpu``, ``cuda`` or ``metal``.
        memory: bytes that weights, KV cache and compute buffers may take together.
        type_set: name of the types it runs well (``gguf_types.TYPE_SETS``).
        source: where the figures come from.
    """

    name: str
    backend: str
    memory: int
    type_set: str
    source: str


def this_machine() -> Device:
    """This machine's processor and the memory that is free now (psutil)."""
    import psutil

    available = psutil.virtual_memory().available
    return Device(
        name=platform.node() or "this machine",
        backend="cpu",
        memory=int(available * _USABLE),
        type_set="cpu",
        source=f"{_USABLE:.0%} of the memory free now (psutil)",
    )
