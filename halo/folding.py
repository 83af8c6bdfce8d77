"""Scale Folding: per-channel scales that move from a layer's input into its weights, leaving the function as it was.

RAMP's Algorithm 2 folds norm -> q/k/v and norm -> gate/up with s = sqrt(act_scale) / mean. HALO adds the two places
where the paper's worst outliers sit and which it skips, v -> o (grouped heads: one scale for all query heads that share
a value head) and up -> down, searches the exponent instead of fixing it at one half, and keeps a fold only where it
lowers the damage at the chosen types. Nothing is unfolded at run time: the producer in the file already compensates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from halo.checkpoint.base import Checkpoint
from halo.statistics import Statistics

# A channel that is never used would get a scale of zero; one used a million times more than others, one that float16
# scales of blocks cannot hold.
_LEAST, _MOST = 2.0**-6, 2.0**6
# Whose graphs are known to be linear between the tensors of a site. Elsewhere a norm may have other readers
# (command-r's feed-forward reads attn_norm), or up and down a non-linearity between them (starcoder2).
_KNOWN = ("llama", "qwen2", "qwen3", "gemma3")


@dataclass
class Folding:
    """Factors by tensor name, float32.

    Attributes:
        columns: of a reader: its column j is multiplied by s_j (and its input, by the producer, divided).
        rows: of a producer (matrix, norm or bias): its row i is multiplied.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def apply(self, name: str, values: np.ndarray, index: np.ndarray | slice) -> np.ndarray:
        """Folded values of some rows; ``index`` says which rows of the tensor they are. The input is not changed."""
        columns, rows = self.columns.get(name), self.rows.get(name)
        if columns is not None:
            values = values * columns
        if rows is not None:
            factors = rows[index]
            values = values * (factors[:, None] if values.ndim == 2 else factors)
        return values

    def importance(self, name: str, mean_square: np.ndarray | None) -> np.ndarray | None:
        """E[x^2] of the folded input."""
        columns = self.columns.get(name)
        return mean_square if mean_square is None or columns is None else mean_square / np.square(columns)

    def max_abs(self, name: str, max_abs: np.ndarray) -> np.ndarray:
        """max |x| of the folded input."""
        columns = self.columns.get(name)
        return max_abs if columns is None else max_abs / columns

    def add(self, other: Folding) -> None:
        """Take over the factors of folds of other tensors; a tensor that is producer in one and reader in another keeps
        both."""
        self.columns.update(other.columns)
        self.rows.update(other.rows)


@dataclass(frozen=True)
class Site:
    """One place of a block where a scale can be folded.

    Attributes:
        key: ``blk.3.attn_norm`` and the like; the manifest's name of it.
        producers: tensors whose rows are divided by the scale.
        readers: tensors whose columns are multiplied by it.
        groups: (value heads, query heads a value head, head dimension) of v -> o; None elsewhere.
    """

    key: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    groups: tuple[int, int, int] | None = None


def sites(checkpoint: Checkpoint) -> list[Site]:
    """The places of a checkpoint, block by block. A block that lacks one of a site's tensors, or has another reader of
    the same norm, is left alone: then nothing is folded there. So is any architecture but those of ``_KNOWN``."""
    hyper, tensors = checkpoint.hyper, checkpoint.tensors
    found: list[Site] = []
    if checkpoint.architecture not in _KNOWN:
        return found

    def add(
        key: str, producers: tuple[str, ...], readers: tuple[str, ...], groups: tuple[int, int, int] | None = None
    ) -> None:
        if all(n in tensors for n in (producers[0], *readers)):
            found.append(Site(key, tuple(p for p in producers if p in tensors), readers, groups))

    for block in range(hyper.n_blocks):
        at = f"blk.{block}."
        add(
            f"{at}attn_norm",
            (f"{at}attn_norm.weight",),
            (f"{at}attn_q.weight", f"{at}attn_k.weight", f"{at}attn_v.weight"),
        )
        heads = (hyper.n_kv_heads, hyper.n_heads // hyper.n_kv_heads, hyper.head_dim)
        add(f"{at}attn_v", (f"{at}attn_v.weight", f"{at}attn_v.bias"), (f"{at}attn_output.weight",), heads)
        add(f"{at}ffn_norm", (f"{at}ffn_norm.weight",), (f"{at}ffn_gate.weight", f"{at}ffn_up.weight"))
        if f"{at}ffn_gate.weight" in tensors:
            add(f"{at}ffn_up", (f"{at}ffn_up.weight", f"{at}ffn_up.bias"), (f"{at}ffn_down.weight",))
    return found


def channel_magnitude(site: Site, statistics: Statistics) -> np.ndarray | None:
    """How large the input of the site's readers is, a channel: the root mean square, pooled over the query heads that
    share a value head. None where no statistics are known."""
    found = statistics.get(site.readers[0])
    if found is None:
        return None
    square = found.mean_square.astype(np.float64)
    if site.groups:
        kv_heads, shared, head_dim = site.groups
        square = square.reshape(kv_heads, shared, head_dim).mean(axis=1).reshape(-1)
    return np.sqrt(square)


def fold(site: Site, magnitude: np.ndarray, exponent: float) -> Folding:
    """The factors of a site: s = magnitude^exponent over its geometric mean, held within 2^-6 .. 2^6 and rounded to a
    power of 2^(1/16), so that a manifest holds it in few digits and two machines agree on it.

    RAMP's Algorithm 2 is exponent 0.5 (there over the arithmetic mean: a constant that block scales absorb).
    """
    floor = magnitude.mean() * 1e-5 + 1e-30
    logs = exponent * np.log2(np.maximum(magnitude, floor))
    logs -= logs.mean()
    scale = np.exp2(np.clip(np.round(logs * 16) / 16, np.log2(_LEAST), np.log2(_MOST))).astype(np.float32)
    expanded = scale
    if site.groups:
        kv_heads, shared, head_dim = site.groups
        expanded = np.repeat(scale.reshape(kv_heads, 1, head_dim), shared, axis=1).reshape(-1)
    inverse = (1 / scale).astype(np.float32)
    return Folding(dict.fromkeys(site.readers, expanded), dict.fromkeys(site.producers, inverse))
