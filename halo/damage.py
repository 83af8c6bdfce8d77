"""What a type does to a tensor: the local relative output error, measured with ggml's own quantisers on sampled rows.

    damage(T) = sum_ij h_j (w_ij - Q_T(w)_ij)^2 / sum_ij h_j w_ij^2,    h_j = E[x_j^2]

the expected squared error of the layer's output over its expected energy, with the inputs taken as uncorrelated. It is
free of scale; what an error in this tensor is *worth* against one in another is the policy's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from halo import ggml
from halo.checkpoint.base import Checkpoint, Tensor
from halo.errors import SourceError
from halo.events import Listener, Progress
from halo.folding import Folding
from halo.gguf_types import TYPES, GGUFType
from halo.roles import block_of
from halo.sampling import sample_rows
from halo.statistics import Statistics
from halo.threads import ordered_map


@dataclass(frozen=True)
class TensorDamage:
    """Measured on the sampled rows of one tensor.

    Attributes:
        by_type: relative output error by type name, for every type that fits the rows.
        weight_std, weight_mean_abs: of the sampled weights.
    """

    by_type: dict[str, float]
    weight_std: float
    weight_mean_abs: float


DamageTable = dict[str, TensorDamage]


def importance_of(name: str, statistics: Statistics) -> np.ndarray | None:
    """The imatrix entry of a tensor, or None where nothing is known (an untied embedding is looked up, not
    multiplied)."""
    found = statistics.get(name)
    return None if found is None else found.mean_square


def relative_error(rows: np.ndarray, kind: GGUFType, importance: np.ndarray | None) -> float:
    """Relative output error of quantising float32 rows of shape (n, row length); see the module's formula."""
    packed = ggml.quantize(rows, kind.id, importance)
    back = ggml.dequantize(packed, kind.id, *rows.shape)
    np.subtract(rows, back, out=back)
    weights = np.ones(rows.shape[1], np.float32) if importance is None else importance
    energy = float(np.einsum("ij,ij,j->", rows, rows, weights, dtype=np.float64))
    return float(np.einsum("ij,ij,j->", back, back, weights, dtype=np.float64)) / energy if energy > 0 else 0.0


def check_fits(checkpoint: Checkpoint, tensor: Tensor, kinds: Sequence[GGUFType]) -> list[GGUFType]:
    """The types whose blocks divide the tensor's rows.

    Raises:
        SourceError: there is none.
    """
    fitting = [k for k in kinds if k.fits(tensor.row_len)]
    if fitting:
        return fitting
    if any(t.fits(tensor.row_len) for t in TYPES.values() if t.family != "float"):
        names = ", ".join(k.name for k in kinds)
        raise SourceError(
            f"{checkpoint.path}: {tensor.name} has rows of {tensor.row_len}, which none of {names} fits; "
            "allow a 32-block type such as Q8_0 with --type-set"
        )
    raise SourceError(
        f"{checkpoint.path}: {tensor.name} has rows of {tensor.row_len}, "
        "which no quantised type fits (they come in blocks of 32 or 256)"
    )


def measure(
    checkpoint: Checkpoint,
    tensors: Sequence[Tensor],
    kinds: Sequence[GGUFType],
    statistics: Statistics,
    folding: Folding,
    pool: ThreadPoolExecutor,
    threads: int,
    listen: Listener,
) -> DamageTable:
    """Damage of every type that fits, for every tensor.

    Raises:
        SourceError: NaN or Inf in a tensor; rows that no type fits.
    """

    def one(tensor: Tensor) -> TensorDamage:
        fitting = check_fits(checkpoint, tensor, kinds)
        index, rows = sample_rows(tensor)
        if not np.isfinite(rows).all():
            raise checkpoint.non_finite(tensor.name)
        rows = folding.apply(tensor.name, rows, index)
        importance = folding.importance(tensor.name, importance_of(tensor.name, statistics))
        errors = {k.name: relative_error(rows, k, importance) for k in fitting}
        return TensorDamage(errors, float(rows.std()), float(np.abs(rows).mean()))

    table: DamageTable = {}
    for done, (tensor, found) in enumerate(
        zip(tensors, ordered_map(pool, one, tensors, ahead=2 * threads), strict=True)
    ):
        block = block_of(tensor.name)
        listen(Progress("damage", done + 1, len(tensors), "tensors", tensor.name if block is None else f"blk.{block}"))
        table[tensor.name] = found
    return table
