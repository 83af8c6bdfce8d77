"""The policy's view of a tensor.

``ramp11`` is RAMP's embedding (Table 24, Appendix A). Taken as printed, its two activation features are 1.0 for every
layer: per-channel maxima run from 4 to 157 (section 2.4) and are multiplied by 100 and 1000 before the clip at 1. HALO
divides act_scales by 10000 times the square root of the layer's width first (eq. 12 divides by that root; the 10000
undoes feature 9's factor and leaves room: 157 at a width of 576 gives 0.65), which leaves the printed formulas as they
are and their values inside (0, 1).

``halo1`` is free of scale: nothing in it changes when weights or activations are multiplied by a constant, so a
function-preserving rewrite of a checkpoint hardly changes the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from halo.checkpoint.base import Tensor
from halo.damage import TensorDamage
from halo.roles import ROLES, block_of, role_of
from halo.statistics import ActivationStatistics

_LAYER_TYPE = {
    "attn_q": 0.0, "attn_k": 0.0, "attn_v": 0.0, "attn_output": 0.25, "ffn_gate": 0.5, "ffn_up": 0.6, "ffn_down": 0.75,
}  # fmt: skip
_OTHER_TYPE = 1.0
PREVIOUS_BITS, RUNNING_AVERAGE = 9, 10  # columns of ramp11 that the sequential head fills in


@dataclass(frozen=True)
class Layer:
    """All that features are computed from.

    Attributes:
        damage, statistics: before folding, so that a fold does not change what the policy sees. Statistics are None
        where
            the tensor is looked up and not multiplied.
    """

    tensor: Tensor
    damage: TensorDamage
    statistics: ActivationStatistics | None


def ramp11(layers: Sequence[Layer], n_blocks: int) -> np.ndarray:
    """RAMP's features, float32 of shape (layers, 11). Feature 1 counts blocks (the paper leaves open whether layers),
    with the embedding before the first and the output after the last; 10 and 11 are zero until the head fills them
    in."""
    out = np.zeros((len(layers), 11), np.float32)
    for row, layer in zip(out, layers, strict=True):
        rows, width = layer.tensor.n_elements // layer.tensor.row_len, layer.tensor.row_len
        depth = _depth(layer.tensor.name, n_blocks)
        row[0] = depth
        row[1], row[2] = math.log2(width / 16), math.log2(rows / 16)
        row[3] = min(layer.damage.weight_std * 10, 1)
        row[4] = min(layer.damage.weight_mean_abs * 10, 1)
        row[5] = _LAYER_TYPE.get(role_of(layer.tensor.name), _OTHER_TYPE)
        row[6] = 0.0 if depth < 0.1 else 1.0 if depth > 0.9 else 0.5
        if layer.statistics is not None:
            act_scales = layer.statistics.max_abs / (10_000 * math.sqrt(width))
            row[7] = min(float(act_scales.mean()) * 100, 1)
            row[8] = min(float(act_scales.max()) * 1000, 1)
    return out


def _depth(name: str, n_blocks: int) -> float:
    block = block_of(name)
    if block is None:
        return 0.0 if role_of(name) == "token_embd" else 1.0
    return block / max(1, n_blocks - 1)


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(max(numerator, 1e-12) / max(denominator, 1e-12))


def halo1(layers: Sequence[Layer], n_blocks: int) -> np.ndarray:
    """HALO's scale-free features, float32 of shape (layers, 17).

    0-8 the role, one-hot (``roles.ROLES``), where a tied embedding counts as the output layer it is; 9 depth; 10
    nearness to the first block and 11 to the last, falling off over blocks and not over fractions; 12 log row length
    over rows; 13 how unevenly the input's energy lies on its channels; 14 log peak over root mean square of the input;
    15 share of the input's energy in its mean; 16 log of weight standard deviation over mean magnitude (heavy tails).
    """
    out = np.zeros((len(layers), 17), np.float32)
    tied = all(role_of(layer.tensor.name) != "output" for layer in layers)
    for row, layer in zip(out, layers, strict=True):
        role, block = role_of(layer.tensor.name), block_of(layer.tensor.name)
        if tied and role == "token_embd":
            role = "output"
        if role in ROLES:
            row[ROLES.index(role)] = 1
        row[9] = _depth(layer.tensor.name, n_blocks)
        if block is not None:
            row[10], row[11] = 2.0**-block, 2.0 ** -(n_blocks - 1 - block)
        row[12] = _log_ratio(layer.tensor.row_len**2, layer.tensor.n_elements)
        if layer.statistics is not None:
            square = layer.statistics.mean_square.astype(np.float64)
            row[13] = _log_ratio(float(np.square(square).mean()), float(square.mean()) ** 2)
            row[14] = _log_ratio(float(layer.statistics.max_abs.max()), math.sqrt(float(square.mean())))
            row[15] = float(np.square(layer.statistics.mean.astype(np.float64)).sum() / max(float(square.sum()), 1e-30))
        row[16] = _log_ratio(layer.damage.weight_std, layer.damage.weight_mean_abs)
    return out


@dataclass(frozen=True)
class FeatureSet:
    """A named, fixed list of features: a policy is trained for one and refused with another."""

    name: str
    width: int
    compute: Callable[[Sequence[Layer], int], np.ndarray]


FEATURE_SETS = {s.name: s for s in (FeatureSet("ramp11", 11, ramp11), FeatureSet("halo1", 17, halo1))}
