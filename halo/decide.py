"""From damage and policy to a type for every tensor, within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halo.allocation import Option, smallest_bytes, solve
from halo.budget import human
from halo.checkpoint.base import Tensor
from halo.damage import DamageTable
from halo.errors import BudgetError
from halo.gguf_file import DEFAULT_ALIGNMENT, pad_to
from halo.gguf_types import GGUFType, type_for
from halo.policy import Policy

_SHIFT_LIMIT = 12.0  # sigmoid(12) is one to within 1e-5
_BISECTIONS = 18  # to a shift of 1e-4: two layers' thresholds hardly ever lie closer together
_WELL_USED = 0.998  # of the budget; a step of the search runs the whole policy


@dataclass(frozen=True)
class Budget:
    """Bytes of the whole file, what of it is not the tensors', and the words it was asked in."""

    file_bytes: int
    fixed_bytes: int
    asked: str

    @property
    def for_tensors(self) -> int:
        return self.file_bytes - self.fixed_bytes

    def too_small(self, tensors: int, n_params: int) -> BudgetError:
        """The refusal that names the smallest possible file."""
        least = self.fixed_bytes + tensors
        return BudgetError(
            f"{self.asked} is {human(self.file_bytes)}, below the smallest possible file of {human(least)} "
            f"({least} bytes, --bpw {np.ceil(least * 8 / n_params * 1000) / 1000:g}); "
            "raise it or allow smaller types with --type-set"
        )


@dataclass(frozen=True)
class Decision:
    """What was chosen.

    Attributes:
        chosen: type by tensor name.
        substitutions: by tensor name, why it is not the type the policy's bit-width stands for.
    """

    chosen: dict[str, GGUFType]
    substitutions: dict[str, str]


def nbytes(tensor: Tensor, kind: GGUFType) -> int:
    """Bytes in the file, alignment included."""
    return pad_to(kind.nbytes(tensor.n_elements), DEFAULT_ALIGNMENT)


def by_worth(
    tensors: Sequence[Tensor],
    kinds: Sequence[GGUFType],
    damage: DamageTable,
    worth: Mapping[str, float],
    pins: Mapping[str, GGUFType],
    budget: Budget,
    n_params: int,
) -> Decision:
    """The solver's answer for ``worth x damage``.

    Raises:
        BudgetError: the budget is below the smallest possible file.
    """
    options = {}
    for tensor in tensors:
        pinned = pins.get(tensor.name)
        allowed = [pinned] if pinned else [k for k in kinds if k.name in damage[tensor.name].by_type]
        options[tensor.name] = [
            Option(k, nbytes(tensor, k), worth[tensor.name] * damage[tensor.name].by_type.get(k.name, 0.0))
            for k in allowed
        ]
    least = smallest_bytes(options)
    if least > budget.for_tensors:
        raise budget.too_small(least, n_params)
    return Decision({name: option.type for name, option in solve(options, budget.for_tensors).items()}, {})


def by_bits(
    tensors: Sequence[Tensor],
    policy: Policy,
    features: np.ndarray,
    pins: Mapping[str, GGUFType],
    budget: Budget,
    n_params: int,
) -> Decision:
    """RAMP's sequential head, all layers shifted alike until the file fits.

    Raises:
        BudgetError: it does not fit even with all layers at the fewest bits.
    """

    def decide(widths: Sequence[int]) -> tuple[Decision, int]:
        chosen, substitutions, total = {}, {}, 0
        for tensor, bits in zip(tensors, widths, strict=True):
            kind, why = type_for(bits, tensor.row_len)
            if tensor.name in pins:
                kind, why = pins[tensor.name], None
            if why:
                substitutions[tensor.name] = why
            chosen[tensor.name] = kind
            total += nbytes(tensor, kind)
        return Decision(chosen, substitutions), total

    room = budget.for_tensors
    best, best_size = decide([policy.bits[0]] * len(tensors))
    if best_size > room:
        raise budget.too_small(best_size, n_params)
    most, size = decide([policy.bits[-1]] * len(tensors))
    if size <= room:
        return most
    low, high = -_SHIFT_LIMIT, _SHIFT_LIMIT
    for _ in range(_BISECTIONS):
        if best_size >= _WELL_USED * room:
            break
        middle = (low + high) / 2
        found, size = decide(policy.choose_bits(features, middle))
        if size <= room:
            low = middle
            if size > best_size:
                best, best_size = found, size
        else:
            high = middle
    return best


def describe_substitutions(tensors: Sequence[Tensor], kinds: Sequence[GGUFType], decision: Decision) -> list[str]:
    """Sentences for the user: which wanted types did not fit which rows."""
    out = []
    for length in sorted({t.row_len for t in tensors}):
        missing = [k.name for k in kinds if not k.fits(length)]
        if missing:
            count = sum(t.row_len == length for t in tensors)
            out.append(
                f"{count} tensors have rows of {length}, no multiple of 256: {', '.join(missing)} do not fit them"
            )
    for why in sorted(set(decision.substitutions.values())):
        count = sum(w == why for w in decision.substitutions.values())
        out.append(f"{count} tensors: {why}")
    return out
