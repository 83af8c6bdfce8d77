"""Blocks against roles: which type each tensor has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from halo.gguf_types import TYPES
from halo.roles import OTHER, ROLES, block_of, role_of

_IN_BLOCK = tuple(r for r in ROLES if r not in ("token_embd", "output"))


@dataclass(frozen=True)
class HeatMap:
    """Type names by place.

    Attributes:
        roles: the columns.
        rows: a block's number and its types by role; None where the block has no such tensor.
        outside: tensors outside the blocks, by name.
    """

    roles: tuple[str, ...]
    rows: list[tuple[int, list[str | None]]]
    outside: dict[str, str]


def heat_map(types: Mapping[str, str]) -> HeatMap:
    """The map of quantisable tensors' types by name."""
    cells: dict[tuple[int, str], str] = {}
    outside: dict[str, str] = {}
    for name, kind in types.items():
        role, block = role_of(name), block_of(name)
        if role == OTHER or not name.endswith(".weight"):
            continue
        if block is None:
            outside[name] = kind
        else:
            cells[block, role] = kind
    present = tuple(r for r in _IN_BLOCK if any(role == r for _, role in cells))
    blocks = sorted({block for block, _ in cells})
    return HeatMap(present, [(b, [cells.get((b, r)) for r in present]) for b in blocks], outside)


def warmth(kind: str) -> float:
    """0 for the fewest bits a weight, 1 for Q8_0 and more."""
    bpw = TYPES[kind].bpw if kind in TYPES else 8.5
    return min(1.0, max(0.0, (bpw - 2.0) / (8.5 - 2.0)))
