"""The exact solver: the least total damage whose whole file fits the byte budget.

Per tensor the lower convex hull over (bytes, damage); the steps of all hulls are taken in the order of damage saved a
byte, which is the Lagrangian optimum of every budget on the way (Everett 1963); what is left of the budget is spent on
the changes that lower damage most a byte. Pins are taken out first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from halo.errors import BudgetError
from halo.gguf_types import GGUFType, parse_type


@dataclass(frozen=True)
class Option:
    """A type a tensor may take.

    Attributes:
        nbytes: in the file, alignment included.
        damage: what choosing it costs, in the solver's one currency (worth times local damage).
    """

    type: GGUFType
    nbytes: int
    damage: float


def parse_pins(pins: Sequence[str]) -> list[tuple[re.Pattern[str], GGUFType]]:
    """Pins of the form ``REGEX=TYPE``; the regular expression must match a whole tensor name, with or without
    ``.weight``.

    Raises:
        BudgetError: no ``=``, a broken expression, an unknown type.
    """
    out = []
    for pin in pins:
        pattern, found, kind = pin.rpartition("=")
        if not found:
            raise BudgetError(f"--pin '{pin}': expected REGEX=TYPE, such as 'blk\\.0\\..*=q6_k'")
        try:
            out.append((re.compile(pattern), parse_type(kind)))
        except re.error as error:
            raise BudgetError(f"--pin '{pin}': not a regular expression: {error}") from None
    return out


def pinned_types(pins: Sequence[str], row_lengths: Mapping[str, int]) -> dict[str, GGUFType]:
    """Type by name for all tensors that a pin matches; the last matching pin wins.

    Raises:
        BudgetError: a pin that matches no tensor, or whose type does not fit a tensor's rows.
    """
    out: dict[str, GGUFType] = {}
    for (pattern, kind), text in zip(parse_pins(pins), pins, strict=True):
        names = [n for n in row_lengths if pattern.fullmatch(n) or pattern.fullmatch(n.removesuffix(".weight"))]
        if not names:
            raise BudgetError(f"--pin '{text}' matches no tensor; names are like {next(iter(row_lengths))}")
        for name in names:
            if not kind.fits(row_lengths[name]):
                raise BudgetError(
                    f"--pin '{text}': {name} has rows of {row_lengths[name]}, "
                    f"{kind.name} needs a multiple of {kind.block}"
                )
            out[name] = kind
    return out


def _hull(options: Sequence[Option]) -> list[Option]:
    """Lower convex hull, by rising bytes and falling damage."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.damage, o.type.name)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        if hull and hull[-1].nbytes == option.nbytes:
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Damage saved a byte going from a to b."""
    return (a.damage - b.damage) / max(1, b.nbytes - a.nbytes)


def smallest_bytes(options: Mapping[str, Sequence[Option]]) -> int:
    return sum(min(o.nbytes for o in choices) for choices in options.values())


def solve(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The option of each tensor.

    Args:
        options: by tensor name; a pinned tensor has one.
        budget: bytes for all tensors together (the file without its header).

    Raises:
        BudgetError: even the smallest options do not fit; the caller words the message with the whole file's size.
    """
    if smallest_bytes(options) > budget:
        raise BudgetError("the budget is below the smallest possible file")
    hulls = {name: _hull(choices) for name, choices in options.items()}
    steps = [(_slope(a, b), name, b) for name, hull in hulls.items() for a, b in pairwise(hull)]
    # Slopes fall along a hull, so in this order every prefix is the optimum for its own number of bytes: the point that
    # bisection on the multiplier would find. Ties are broken by name.
    steps.sort(key=lambda step: (-step[0], step[1]))
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - _total(chosen)
    for _, name, option in steps:
        extra = option.nbytes - chosen[name].nbytes
        if extra > left:
            break
        chosen[name], left = option, left - extra
    return _spend(options, chosen, left)


def _total(chosen: Mapping[str, Option]) -> int:
    return sum(o.nbytes for o in chosen.values())


def _spend(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Spend what is left, always on the change that lowers damage most a byte and still fits. Nothing is spent where it
    lowers no damage: a larger file that is no better is not made."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, current in chosen.items():
            for option in options[name]:
                extra = option.nbytes - current.nbytes
                if option.damage < current.damage and extra <= left:
                    gain = (current.damage - option.damage) / max(extra, 1)
                    if best is None or gain > best[0]:
                        best = (gain, name, option)
        if best is None:
            return chosen
        _, name, option = best
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option
