"""How sensitive a model's answers are to errors in each tensor: the diagonal Fisher information, one backward pass.

For a linear layer with input x and output y, and g the gradient of the log-likelihood of a label *drawn from the model
itself* with respect to y, the expected KL divergence that an error dW causes is, to second order and with inputs,
gradients and errors taken as uncorrelated,

    1/2 sum_ij E[g_i^2] E[x_j^2] dW_ij^2

(Amari 1998; the quadratic form behind Optimal Brain Damage). Everything in it is measured a channel at a time.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from halo.checkpoint import Checkpoint
from halo.network import Network, Weights

LOOKUP = "lookup"
_LARGE_TABLE = 100  # rows in the tensor for each one sampled


class _TracedNetwork(Network):
    """Keeps the sum of squared gradients of every linear layer's output."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint)
        self.squares: dict[str, np.ndarray] = {}

    def linear(self, block: int, role: str, w: Weights, x: torch.Tensor) -> torch.Tensor:
        y = super().linear(block, role, w, x)
        self.watch(f"blk.{block}.{role}.weight", y)
        return y

    def watch(self, name: str, y: torch.Tensor) -> None:
        def keep(gradient: torch.Tensor) -> None:
            found = gradient.flatten(0, -2).square().sum(0).double().numpy()
            self.squares[name] = self.squares.get(name, 0) + found

        y.register_hook(keep)


def output_gradients(checkpoint: Checkpoint, windows: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """E[g_i^2] a token of every linear layer's output channel.

    Args:
        windows: token ids, shape (windows, positions); one window at a time is held with its graph.

    Returns:
        by tensor name, float64 of shape (rows,). A tied embedding counts as the output layer it is; under ``LOOKUP``
        stands what an embedding that is only looked up answers for: E[g_j^2] of the hidden states before the first
        block, shape (row length,).
    """
    network = _TracedNetwork(checkpoint)
    blocks = range(network.hyper.n_blocks)
    weights = [network.attention_weights(b) | network.feed_forward_weights(b) for b in blocks]
    head = "output.weight" if "output.weight" in checkpoint.tensors else "token_embd.weight"
    table = torch.from_numpy(checkpoint.tensors[head].read())
    generator = torch.Generator().manual_seed(seed)
    lookup = np.zeros(network.hyper.n_embd)
    for ids in windows:
        hidden = hidden_in = network.embed(ids[None]).requires_grad_()
        for block, w in zip(blocks, weights, strict=True):
            hidden = network.attention(block, w, hidden, lambda names, x: None)
            hidden = network.feed_forward(block, w, hidden, lambda names, x: None)
        logits = F.linear(network.output_norm(hidden), table)[0]
        network.watch(head, logits)
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()
        assert hidden_in.grad is not None
        lookup += hidden_in.grad.flatten(0, -2).square().sum(0).double().numpy()
    network.squares[LOOKUP] = lookup
    return {name: total / windows.size for name, total in network.squares.items()}


def fisher_damage(
    rows: np.ndarray, restored: np.ndarray, index: np.ndarray, gradients: np.ndarray, mean_square: np.ndarray
) -> float:
    """The module's quadratic form for a whole tensor, from a sample of its rows.

    Where the sample is a large part of the rows, each row's error meets its own gradient. An output table has tens of
    thousands of rows and a few of them (frequent tokens) hold nearly all of the gradient: there the mean error of a row
    meets the sum of all gradients.

    Args:
        rows, restored: float32 of shape (n, row length), before and after quantisation.
        index: which rows of the tensor they are, shape (n,).
        gradients: E[g_i^2] of all rows, shape (all rows,).
        mean_square: E[x_j^2], shape (row length,).
    """
    error = np.square((rows - restored).astype(np.float64)) @ mean_square.astype(np.float64)
    if len(rows) * _LARGE_TABLE < len(gradients):
        return 0.5 * float(error.mean() * gradients.sum())
    return 0.5 * float(error @ gradients[index]) * len(gradients) / len(rows)


def lookup_damage(rows: np.ndarray, restored: np.ndarray, gradients: np.ndarray) -> float:
    """Expected KL divergence from errors in a table that is looked up: 1/2 sum_j E[g_j^2] E[dW_ij^2], rows taken as
    equally likely.

    Args:
        rows, restored: float32 of shape (n, row length).
        gradients: E[g_j^2] of the hidden states, shape (row length,).
    """
    return 0.5 * float(np.square((rows - restored).astype(np.float64)).mean(axis=0) @ gradients)
