"""A policy: what a tensor's error is worth, or how many bits a layer gets, learned once and applied zero-shot.

Two action heads, as ``design.md`` has them:

* ``worth``: a log-weight on each tensor's measured damage; the solver does the rest for any budget and type set.
* ``bits`` (RAMP as published): one bit-width a layer, in order, given the previous ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from halo.errors import PolicyError
from halo.features import PREVIOUS_BITS, RUNNING_AVERAGE, FeatureSet

HEADS = ("worth", "bits")
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}
# e^8 = 3000: a weight beyond that says the policy is outside what it was trained on.
_LARGEST_LOG_WORTH = 8.0
_EPSILON = 1e-5  # torch.nn.LayerNorm's default


@dataclass(frozen=True)
class Layer:
    """y = activation(norm(x W^T + b)); ``scale`` and ``shift`` of the layer norm, or None."""

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None
    shift: np.ndarray | None
    activation: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T + self.bias
        if self.scale is not None and self.shift is not None:
            mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
            y = (y - mean) / np.sqrt(variance + _EPSILON) * self.scale + self.shift
        return ACTIVATIONS[self.activation](y)


@dataclass(frozen=True)
class Policy:
    """A loaded policy.

    Attributes:
        name: the file's stem.
        bits: the bit-widths of a ``bits`` head, ascending; empty for ``worth``.
        mean, std: feature normalisation, shape (features,).
        card: plain values for people: what it was trained on, how, its score.
    """

    name: str
    head: str
    family: str
    features: FeatureSet
    bits: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    layers: tuple[Layer, ...]
    sha256: str
    card: dict[str, Any]

    def _forward(self, features: np.ndarray) -> np.ndarray:
        x = (features.astype(np.float64) - self.mean) / self.std
        for layer in self.layers:
            x = layer(x)
        return x

    def check_features(self, features: np.ndarray) -> None:
        """PolicyError when the features are not the policy's, or not finite."""
        if features.ndim != 2 or features.shape[1] != self.features.width:
            raise PolicyError(
                f"policy {self.name} takes {self.features.width} features a tensor, {features.shape} were given"
            )
        if not np.isfinite(features).all():
            row = int(np.argwhere(~np.isfinite(features))[0][0])
            raise PolicyError(
                f"policy {self.name}: features of tensor {row} are not finite; the calibration statistics are damaged"
            )

    def worth(self, features: np.ndarray) -> np.ndarray:
        """Weights on damage, shape (tensors,), positive, with a geometric mean of about one."""
        self.check_features(features)
        return np.exp(np.clip(self._forward(features)[:, 0], -_LARGEST_LOG_WORTH, _LARGEST_LOG_WORTH))

    def choose_bits(self, features: np.ndarray, shift: float) -> list[int]:
        """Bit-width a layer, in order; each sees the previous one and the running average (Table 24, features 10 and
        11).

        The action is sigmoid(mean + shift), spread over the bit-widths and rounded to the nearest (section 3.3.1; the
        paper does not print the formula). ``shift`` moves all layers alike; a budget is met by bisection on it.
        """
        self.check_features(features)
        features = features.copy()
        out: list[int] = []
        for row in features:
            row[PREVIOUS_BITS] = out[-1] / 8 if out else 0.0
            row[RUNNING_AVERAGE] = np.mean(out) / 8 if out else 0.0
            action = 1 / (1 + np.exp(-(self._forward(row[None])[0, 0] + shift)))
            out.append(self.bits[int(np.clip(round(action * (len(self.bits) - 1)), 0, len(self.bits) - 1))])
        return out
