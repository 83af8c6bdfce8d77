"""The forward pass of the families HALO calibrates, block by block, from tensors under their GGUF names.

It computes what llama.cpp's graphs compute (``src/models/llama.cpp``, ``qwen2.cpp``, ``qwen3.cpp``, ``gemma3.cpp``) and
hands the input of every linear layer to an observer. Only one half of a block (attention or feed-forward) has its
weights in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from halo.checkpoint.base import Checkpoint, Hyperparameters
from halo.errors import SourceError

# observer(names of the tensors that read it, input of shape (tokens, row length))
Observer = Callable[[tuple[str, ...], torch.Tensor], None]
Weights = dict[str, torch.Tensor]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
# src/models/gemma3.cpp: every sixth layer attends globally, unless the file says otherwise; the 27B (62 layers) scales
# queries by its embedding width.
_GEMMA3_SWA_PATTERN = 6
_GEMMA3_27B_LAYERS = 62
_ATTENTION = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "post_attention_norm",
)
_FEED_FORWARD = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm")


class Rope:
    """Rotary embedding of one kind of layer.

    Args:
        inverse: radians a position, shape (rotated dimensions / 2,).
        magnitude: of the rotated vectors (YaRN).
        interleaved: pairs are neighbours (llama.cpp's NORM), else halves (NEOX).
    """

    def __init__(self, inverse: torch.Tensor, magnitude: float, interleaved: bool):
        self.inverse, self.magnitude, self.interleaved = inverse, magnitude, interleaved
        self._turns = torch.empty(0, inverse.numel(), dtype=torch.complex64)

    def turns(self, n_pos: int) -> torch.Tensor:
        """Complex factors of shape (positions, rotated dimensions / 2), kept for the next call."""
        if self._turns.shape[0] < n_pos:
            angle = torch.outer(torch.arange(n_pos, dtype=torch.float32), self.inverse)
            self._turns = torch.polar(torch.full_like(angle, self.magnitude), angle)
        return self._turns[:n_pos]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x of shape (sequences, heads, positions, head_dim)."""
        half = self.inverse.numel()
        turns = self.turns(x.shape[2])
        if self.interleaved:
            # As complex numbers: stacking and flattening the pairs costs forty times as much.
            pairs = x[..., : 2 * half].float().unflatten(-1, (half, 2)).contiguous()
            out = torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)
        else:
            a, b = x[..., :half].float(), x[..., half : 2 * half].float()
            cos, sin = turns.real, turns.imag
            out = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        out = out.to(x.dtype)
        return torch.cat((out, x[..., 2 * half :]), dim=-1) if x.shape[-1] > 2 * half else out


def _inverse_frequencies(
    hyper: Hyperparameters, base: float, scaled: bool, factors: np.ndarray | None
) -> tuple[torch.Tensor, float]:
    """Angles per position and magnitude (ggml-cpu/ops.cpp: rope_yarn, ggml_rope_yarn_corr_dims)."""
    n_rot = int(hyper.get("rope.dimension_count", hyper.head_dim))
    index = torch.arange(0, n_rot, 2, dtype=torch.float32)
    extrapolated = 1.0 / base ** (index / n_rot)
    if factors is not None:
        extrapolated = extrapolated / torch.from_numpy(factors)
    kind, factor = hyper.get("rope.scaling.type", "none"), float(hyper.get("rope.scaling.factor", 1.0))
    if not scaled or kind not in ("linear", "yarn") or factor <= 0:
        return extrapolated, 1.0
    interpolated = extrapolated / factor
    if kind == "linear":
        return interpolated, 1.0
    original = float(hyper.get("rope.scaling.original_context_length", hyper.context_length))

    def boundary(rotations: float) -> float:
        return n_rot * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(boundary(float(hyper.get("rope.scaling.yarn_beta_fast", 32.0)))))
    high = min(n_rot - 1, math.ceil(boundary(float(hyper.get("rope.scaling.yarn_beta_slow", 1.0)))))
    ramp = 1 - ((index / 2 - low) / max(0.001, high - low)).clamp(0, 1)
    return interpolated * (1 - ramp) + extrapolated * ramp, 1.0 + 0.1 * math.log(factor)


class Network:
    """A checkpoint's layers as functions.

    Args:
        checkpoint: of one of ``ARCHITECTURES``, dense.
        dtype: of weights and activations; norms and statistics stay float32.

    Raises:
        SourceError: an architecture without a forward pass here (``can_run`` tells beforehand).
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        if not can_run(checkpoint):
            raise SourceError(
                f"{checkpoint.path}: HALO cannot calibrate '{checkpoint.architecture}' models; give --imatrix FILE"
            )
        self.checkpoint, self.dtype = checkpoint, dtype
        hyper = self.hyper = checkpoint.hyper
        self.gemma = hyper.architecture == "gemma3"
        self.epsilon = float(hyper.need("attention.layer_norm_rms_epsilon"))
        self.window = int(hyper.get("attention.sliding_window", 0)) if self.gemma else 0
        factors = checkpoint.tensors["rope_freqs.weight"].read() if "rope_freqs.weight" in checkpoint.tensors else None
        interleaved = hyper.architecture == "llama"
        base = float(hyper.get("rope.freq_base", 10000.0))
        self.rope_global = Rope(*_inverse_frequencies(hyper, base, True, factors), interleaved)
        local = float(hyper.get("rope.freq_base_swa", 10000.0 if self.gemma else base))
        self.rope_local = Rope(*_inverse_frequencies(hyper, local, False, None), interleaved)

    def _is_local(self, block: int) -> bool:
        """Whether a block attends within the window: as the file says a block, or every how many it does not."""
        pattern = self.hyper.get("attention.sliding_window_pattern", _GEMMA3_SWA_PATTERN)
        if np.ndim(pattern):
            return self.window > 0 and bool(pattern[block])
        return self.window > 0 and (block + 1) % int(pattern) != 0

    def _scale(self) -> float:
        if self.gemma and self.hyper.n_blocks == _GEMMA3_27B_LAYERS:
            return (self.hyper.n_embd / self.hyper.n_heads) ** -0.5
        return float(self.hyper.get("attention.scale", 0) or self.hyper.head_dim**-0.5)

    def _load(self, block: int, roles: tuple[str, ...]) -> Weights:
        out: Weights = {}
        for role in roles:
            for suffix in ("weight", "bias"):
                name = f"blk.{block}.{role}.{suffix}"
                if name in self.checkpoint.tensors:
                    out[f"{role}.{suffix}"] = self._tensor(name)
        return out

    def _tensor(self, name: str) -> torch.Tensor:
        value = torch.from_numpy(self.checkpoint.tensors[name].read())
        if not bool(torch.isfinite(value).all()):
            raise self.checkpoint.non_finite(name)
        return value.to(self.dtype) if value.ndim > 1 else value

    def attention_weights(self, block: int) -> Weights:
        return self._load(block, _ATTENTION)

    def feed_forward_weights(self, block: int) -> Weights:
        return self._load(block, _FEED_FORWARD)

    def embed(self, ids: np.ndarray) -> torch.Tensor:
        """Hidden states, float32, shape (*ids.shape, n_embd), of token ids of any shape."""
        table = self.checkpoint.tensors["token_embd.weight"]
        unique, place = np.unique(ids, return_inverse=True)
        rows = np.empty((len(unique), self.hyper.n_embd), np.float32)
        for start, piece in table.chunks():
            inside = (unique >= start) & (unique < start + len(piece))
            rows[inside] = piece[unique[inside] - start]
        if not np.isfinite(rows).all():
            raise self.checkpoint.non_finite(table.name)
        hidden = torch.from_numpy(rows[place.reshape(ids.shape)])
        return hidden * math.sqrt(self.hyper.n_embd) if self.gemma else hidden

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm in float32, result in the network's dtype."""
        x = x.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * weight).to(self.dtype)

    def linear(self, block: int, role: str, w: Weights, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b of one layer; the one place where weights are multiplied."""
        bias = w.get(f"{role}.bias")
        return F.linear(x, w[f"{role}.weight"], None if bias is None else bias.to(self.dtype))

    def attention(self, block: int, w: Weights, hidden: torch.Tensor, observe: Observer) -> torch.Tensor:
        """hidden + attention(hidden), shape (sequences, positions, n_embd)."""
        n_seq, n_pos, _ = hidden.shape
        hyper = self.hyper
        x = self.norm(hidden, w["attn_norm.weight"])
        at = f"blk.{block}."
        observe((f"{at}attn_q.weight", f"{at}attn_k.weight", f"{at}attn_v.weight"), x.flatten(0, 1))

        def heads(role: str, count: int) -> torch.Tensor:
            y = self.linear(block, role, w, x).view(n_seq, n_pos, count, -1)
            if f"{role}_norm.weight" in w:
                y = self.norm(y, w[f"{role}_norm.weight"])
            return y.transpose(1, 2)

        local = self._is_local(block)
        rope = self.rope_local if local else self.rope_global
        q, k, v = (
            rope(heads("attn_q", hyper.n_heads)),
            rope(heads("attn_k", hyper.n_kv_heads)),
            heads("attn_v", hyper.n_kv_heads),
        )
        mask = self._window_mask(n_pos) if local and n_pos > self.window else None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale(), enable_gqa=True
        )
        y = y.transpose(1, 2).reshape(n_seq, n_pos, -1)
        observe((f"{at}attn_output.weight",), y.flatten(0, 1))
        y = self.linear(block, "attn_output", w, y)
        if "post_attention_norm.weight" in w:
            y = self.norm(y, w["post_attention_norm.weight"])
        return hidden + y.float()

    def _window_mask(self, n_pos: int) -> torch.Tensor:
        position = torch.arange(n_pos)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < self.window)

    def feed_forward(self, block: int, w: Weights, hidden: torch.Tensor, observe: Observer) -> torch.Tensor:
        """hidden + feed_forward(hidden), shape (sequences, positions, n_embd)."""
        at = f"blk.{block}."
        x = self.norm(hidden, w["ffn_norm.weight"])
        observe((f"{at}ffn_gate.weight", f"{at}ffn_up.weight"), x.flatten(0, 1))
        gate = self.linear(block, "ffn_gate", w, x)
        gate = F.gelu(gate, approximate="tanh") if self.gemma else F.silu(gate)
        y = gate * self.linear(block, "ffn_up", w, x)
        observe((f"{at}ffn_down.weight",), y.flatten(0, 1))
        y = self.linear(block, "ffn_down", w, y)
        if "post_ffw_norm.weight" in w:
            y = self.norm(y, w["post_ffw_norm.weight"])
        return hidden + y.float()

    def output_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden, self._tensor("output_norm.weight"))


def can_run(checkpoint: Checkpoint) -> bool:
    """Whether ``Network`` has the forward pass of this checkpoint (a known family, dense feed-forward)."""
    return checkpoint.architecture in ARCHITECTURES and all(
        f"blk.0.{role}.weight" in checkpoint.tensors
        for role in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down")
    )
