"""Memory a model needs beside its weights, from its hyper-parameters alone."""

from __future__ import annotations

from halo.checkpoint.base import Hyperparameters

# llama.cpp computes at most this many tokens at once by default (n_ubatch).
_UBATCH = 512
_F16, _F32 = 2, 4


def kv_cache_bytes(hyper: Hyperparameters, context: int) -> int:
    """Keys and values of every block for ``context`` tokens in float16, llama.cpp's default (src/llama-kv-cache.cpp);
    sliding windows are not taken off, so this is the upper bound."""
    value_dim = int(hyper.get("attention.value_length", hyper.head_dim))
    return hyper.n_blocks * hyper.n_kv_heads * (hyper.head_dim + value_dim) * context * _F16


def compute_bytes(hyper: Hyperparameters, n_vocab: int) -> int:
    """The compute buffer's two largest tenants for one batch: logits, or a feed-forward layer's two float32 halves."""
    n_ff = hyper.get("feed_forward_length", 4 * hyper.n_embd)
    widest = int(max(n_ff)) if hasattr(n_ff, "__len__") else int(n_ff)
    return _UBATCH * _F32 * max(n_vocab + hyper.n_embd, 2 * widest + 2 * hyper.n_embd)


def expected_memory(hyper: Hyperparameters, n_vocab: int, file_bytes: int, context: int) -> int:
    """Bytes a loaded model takes: the file, the KV cache and the compute buffer."""
    return file_bytes + kv_cache_bytes(hyper, context) + compute_bytes(hyper, n_vocab)
