"""From what the user asked for (bits per weight, a size, or nothing but a device) to bytes of the whole file."""

from __future__ import annotations

import re

from halo.errors import BudgetError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
}
# Q6_K: beyond it the KL divergence falls below 0.006 (llama.cpp's table for Llama-3-8B, facts C1), and every further
# byte only slows decoding down.
WELL_BPW = 6.5625
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes of a size such as ``90MB``, ``3.5GiB`` or ``94371840``.

    Raises:
        BudgetError: not a size.
    """
    found = _SIZE.fullmatch(text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise BudgetError(f"--size '{text}': not a size; write it like 90MB, 3.5GiB or 94371840")
    return int(float(found[1]) * unit)


def check(bpw: float | None) -> None:
    """BudgetError for bits a weight that are none; for use before long work."""
    if bpw is not None and not 0 < bpw < 64:
        raise BudgetError(f"--bpw {bpw:g}: give a number of bits per weight such as 4.5")


def bpw_bytes(bpw: float, n_params: int) -> int:
    """Bytes of a whole file with so many bits a weight.

    Raises:
        BudgetError: not a positive number.
    """
    check(bpw)
    return int(bpw * n_params / 8)


def device_bytes(memory: int, beside_weights: int, n_params: int) -> int:
    """What a device leaves for the file, at most ``WELL_BPW``."""
    return min(memory - beside_weights, bpw_bytes(WELL_BPW, n_params))


def human(nbytes: float) -> str:
    """Bytes as people read them, decimal: ``106.9 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.4g} {unit}" if unit == "GB" else f"{nbytes / size:.1f} {unit}"
    return f"{int(nbytes)} B"
