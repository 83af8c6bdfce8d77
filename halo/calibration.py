"""Activation statistics of a checkpoint, streamed: half a block's weights and the running hidden states in memory.

The work is shared out by windows, each computed by one thread with torch's own threading off, and their sums are added
in the order of the windows: the result is the same, bit for bit, for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from halo.checkpoint.base import Checkpoint
from halo.events import Listener, Progress
from halo.network import Network, Weights
from halo.statistics import ActivationStatistics, Statistics
from halo.threads import ordered_map

WINDOW = 512  # llama-imatrix's default context

# A window's sums of one layer input: count, sum of squares, sum, sum of magnitudes, largest magnitude.
_Sums = tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_Step = Callable[[Network, int, Weights, torch.Tensor, Callable[[tuple[str, ...], torch.Tensor], None]], torch.Tensor]


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware (AVX512-BF16, AMX), else float32. Decided by the
    processor's features and not by timing, so that two runs agree."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, c, lambda: False)() for c in checks) else torch.float32


def _sums(x: torch.Tensor) -> _Sums:
    x = x.float()
    magnitude = x.abs()
    return (
        x.shape[0],
        x.square().sum(0).numpy(),
        x.sum(0).numpy(),
        magnitude.sum(0).numpy(),
        magnitude.amax(0).numpy(),
    )


class _Total:
    """Running sums of one layer input, float64."""

    def __init__(self, width: int):
        self.count = 0
        self.sums = np.zeros((3, width), np.float64)
        self.largest = np.zeros(width, np.float32)

    def add(self, sums: _Sums) -> None:
        count, squares, plain, magnitudes, largest = sums
        self.count += count
        for total, array in zip(self.sums, (squares, plain, magnitudes), strict=True):
            total += array
        np.maximum(self.largest, largest, out=self.largest)

    def finish(self) -> ActivationStatistics:
        mean_square, mean, mean_abs = (self.sums / self.count).astype(np.float32)
        return ActivationStatistics(mean_square, mean, mean_abs, self.largest, self.count)


class _Accumulator:
    def __init__(self) -> None:
        self.totals: dict[tuple[str, ...], _Total] = {}

    def add(self, names: tuple[str, ...], sums: _Sums) -> None:
        self.totals.setdefault(names, _Total(len(sums[1]))).add(sums)

    def finish(self) -> Statistics:
        out: Statistics = {}
        for names, total in self.totals.items():
            out.update(dict.fromkeys(names, total.finish()))
        return out


def calibrate(
    checkpoint: Checkpoint,
    windows: np.ndarray,
    pool: ThreadPoolExecutor,
    threads: int,
    listen: Listener,
    dtype: torch.dtype,
) -> Statistics:
    """Statistics of every linear layer's input, by tensor name.

    Args:
        windows: token ids, int32, shape (windows, positions).
        pool: its threads must have been started with ``single_threaded_torch``.
        dtype: of the matrix products.

    Raises:
        SourceError: an architecture without a forward pass, NaN or Inf in a tensor.
    """
    network = Network(checkpoint, dtype)
    totals = _Accumulator()
    n_blocks, tokens = network.hyper.n_blocks, windows.size
    steps: tuple[tuple[_Step, Callable[[int], Weights]], ...] = (
        (Network.attention, network.attention_weights),
        (Network.feed_forward, network.feed_forward_weights),
    )
    with torch.inference_mode():
        hidden = network.embed(windows)
        for block in range(n_blocks):
            listen(Progress("calibrate", block * tokens, n_blocks * tokens, "tokens", f"blk.{block}"))
            for step, load in steps:
                weights = load(block)

                def one(index: int, step: _Step = step, weights: Weights = weights, block: int = block) -> list:
                    seen: list[tuple[tuple[str, ...], _Sums]] = []
                    with torch.inference_mode():
                        piece = hidden[index : index + 1]
                        hidden[index : index + 1] = step(
                            network, block, weights, piece, lambda n, x: seen.append((n, _sums(x)))
                        )
                    return seen

                for seen in ordered_map(pool, one, range(len(windows)), ahead=2 * threads):
                    for names, sums in seen:
                        totals.add(names, sums)
                del weights
        head = "output.weight" if "output.weight" in checkpoint.tensors else "token_embd.weight"

        def last(index: int) -> _Sums:
            with torch.inference_mode():
                return _sums(network.output_norm(hidden[index]))

        for sums in ordered_map(pool, last, range(len(windows)), ahead=2 * threads):
            totals.add((head,), sums)
    listen(Progress("calibrate", n_blocks * tokens, n_blocks * tokens, "tokens"))
    return totals.finish()


def single_threaded_torch() -> None:
    """Initialiser of the pool's threads: torch's thread count is a setting of each thread."""
    torch.set_num_threads(1)
