"""A few rows of a tensor that stand for all of them, always the same ones."""

from __future__ import annotations

import numpy as np

from halo.checkpoint.base import CHUNK_ELEMENTS, Tensor

# Types and exponents are compared on the same rows, so what few rows leave of noise is common to all of them. Four
# times as many rows took half of all of apply's time on a 135 M model (IQ4 and Q2_K quantise 2 to 5 M weights/s a
# core).
SAMPLE_ELEMENTS = 1 << 14
_FEWEST_ROWS = 16
_RUNS = 16  # n_outer is far above it where a tensor is read in runs


def sample_rows(tensor: Tensor, elements: int = SAMPLE_ELEMENTS) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, float32 rows) spread evenly over the tensor; of a three-dimensional tensor, over its outermost
    entries. Tensors too large to stand in memory are read in short runs of rows."""
    n_outer, per_outer = tensor.shape[0], tensor.n_elements // tensor.shape[0]
    wanted = min(n_outer, max(_FEWEST_ROWS, elements // per_outer)) if len(tensor.shape) == 2 else min(n_outer, 2)
    if tensor.n_elements <= CHUNK_ELEMENTS:
        index = np.arange(wanted) * n_outer // wanted
        rows = tensor.read()[index]
    else:
        run = max(1, wanted // _RUNS)
        starts = np.arange(_RUNS) * (n_outer // _RUNS)
        index = (starts[:, None] + np.arange(run)).reshape(-1)
        rows = np.concatenate([tensor.reader(int(s), int(s) + run) for s in starts])
    if len(tensor.shape) > 2:
        inner = tensor.shape[1]
        index = (index[:, None] * inner + np.arange(inner)).reshape(-1)
    return index, np.ascontiguousarray(rows.reshape(-1, tensor.row_len))
