"""Per-channel statistics of what goes into each linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ActivationStatistics:
    """Of one layer's input, each float32 of shape (row length,).

    Attributes:
        mean_square: E[x^2], the imatrix entry.
        mean: E[x].
        mean_abs: E[|x|].
        max_abs: max |x|, RAMP's act_scale (Appendix A).
        count: tokens seen.
    """

    mean_square: np.ndarray
    mean: np.ndarray
    mean_abs: np.ndarray
    max_abs: np.ndarray
    count: int

    @classmethod
    def from_mean_square(cls, mean_square: np.ndarray, count: int) -> ActivationStatistics:
        """Where only an imatrix is known: a centred normal's E|x| = sqrt(2/pi) rms, and for the maximum of ``count``
        draws sqrt(2 ln count) rms."""
        rms = np.sqrt(mean_square)
        return cls(
            mean_square,
            np.zeros_like(rms),
            rms * np.float32(math.sqrt(2 / math.pi)),
            rms * np.float32(math.sqrt(2 * math.log(max(2, count)))),
            count,
        )


Statistics = dict[str, ActivationStatistics]
