"""Hugging Face tensors under their GGUF names: which must be there, shapes, order, and how rows are rearranged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import numpy as np

from halo.checkpoint.base import Tensor
from halo.checkpoint.families import unsupported
from halo.checkpoint.model import Model
from halo.checkpoint.rope import llama3_factors
from halo.checkpoint.safetensors_file import StoredTensor, Weights
from halo.errors import SourceError

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# Buffers of old checkpoints, which hold no weights.
_BUFFERS = re.compile(
    r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias))$|^rotary_emb\.inv_freq$"
)
_VISION = ("vision_tower.", "multi_modal_projector.", "vision_model.")
_MODEL_ARCH = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3": "GEMMA3"}

Reader = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class _Shifted:
    """Rows plus a constant (Gemma's norms are stored as weight - 1)."""

    inner: Reader
    shift: float

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return self.inner(start, stop) + np.float32(self.shift)


@dataclass(frozen=True)
class _Permuted:
    """Rows of q or k in the order of llama.cpp's rotary embedding, which turns neighbours.

    Hugging Face turns row j of a head with row j + head_dim / 2; llama.cpp's NORM type turns 2i with 2i + 1
    (conversion/llama.py, permute). Row 2i + s of a head is row s * head_dim / 2 + i of the source's head.
    """

    inner: Reader
    head_dim: int

    def __call__(self, start: int, stop: int) -> np.ndarray:
        first = start // self.head_dim * self.head_dim
        last = -(-stop // self.head_dim) * self.head_dim
        heads = self.inner(first, last)
        within = np.arange(start, stop) % self.head_dim
        source = np.arange(start, stop) - within + (within % 2) * (self.head_dim // 2) + within // 2
        return heads[source - first]


@dataclass(frozen=True)
class _Constant:
    """A small tensor made here."""

    values: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop].copy()


def gguf_tensors(model: Model, weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of the output in its order, and notes on what was left out.

    Raises:
        SourceError: a tensor missing, unexpected, or of a shape that contradicts config.json.
        UnsupportedError: a tensor that is already quantised.
    """
    stored, notes = _named(model, weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[_MODEL_ARCH[model.family.architecture]], model.n_blocks)
    out: dict[str, Tensor] = {}
    for name, shape in _expected(model):
        found = stored.pop(name, None)
        if found is None:
            raise SourceError(
                f"{weights.files[0]}: no tensor {name} (expected shape {list(shape)}); "
                "the checkpoint is incomplete: download it again"
            )
        if found.shape != shape:
            raise SourceError(
                f"{found.path}: {found.name} has shape {list(found.shape)}, config.json wants {list(shape)}; "
                "they do not belong together: download both again"
            )
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        out[new_name] = Tensor(new_name, shape, found.kind, _reader(model, name, found))
    if model.tied and stored.pop(_HEAD, None) is not None:
        notes.append("lm_head.weight is left out: config.json ties it to the embedding, which transformers then uses.")
    _refuse_extra(stored)
    if model.rope.kind == "llama3":
        factors = llama3_factors(model.rope, model.head_dim)
        out["rope_freqs.weight"] = Tensor("rope_freqs.weight", factors.shape, "F32", _Constant(factors))
    return out, notes


def _named(model: Model, weights: Weights) -> tuple[dict[str, StoredTensor], list[str]]:
    """Tensors by the names of a text-only model; buffers and Gemma's vision part dropped."""
    kept: dict[str, StoredTensor] = {}
    vision = 0
    for name, tensor in weights.tensors.items():
        if _BUFFERS.search(name):
            continue
        if model.family.is_gemma and name.removeprefix("model.").startswith(_VISION):
            vision += 1
            continue
        plain = name.replace("language_model.", "", 1) if model.family.is_gemma else name
        if plain in kept:
            raise SourceError(
                f"{tensor.path}: {name} and {kept[plain].name} are the same tensor; download the checkpoint again"
            )
        kept[plain] = tensor
    notes = [f"{vision} tensors of the vision part are left out: the result reads text only."] if vision else []
    return kept, notes


def _refuse_extra(left: dict[str, StoredTensor]) -> None:
    if not left:
        return
    first = next(iter(left.values()))
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    raise unsupported(
        first.path,
        f"unexpected tensor {first.name} of shape {list(first.shape)}{more}: config.json describes no such "
        "part, so HALO cannot convert it exactly",
    )


def _reader(model: Model, name: str, found: StoredTensor) -> Reader:
    rows = found.rows()
    if model.family.permuted and re.search(r"\.self_attn\.[qk]_proj\.", name):
        return _Permuted(rows, model.head_dim)
    if model.family.norm_shift and name.endswith("norm.weight"):
        return _Shifted(rows, model.family.norm_shift)
    return rows


def _expected(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) in the order of the output."""
    yield _EMBEDDING, (model.n_vocab, model.n_embd)
    for i in range(model.n_blocks):
        for suffix, shape in _block(model):
            yield f"model.layers.{i}.{suffix}", shape
    yield _NORM, (model.n_embd,)
    if not model.tied:
        yield _HEAD, (model.n_vocab, model.n_embd)


def _block(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A block's tensors, in the order in which it computes with them."""
    embd, ff, head = model.n_embd, model.n_ff, model.head_dim
    q, kv = model.n_heads * head, model.n_kv_heads * head
    yield "input_layernorm.weight", (embd,)
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"self_attn.{letter}_proj.weight", (rows, embd)
        if model.attention_bias:
            yield f"self_attn.{letter}_proj.bias", (rows,)
        if model.family.qk_norm and letter != "v":
            yield f"self_attn.{letter}_norm.weight", (head,)
    yield "self_attn.o_proj.weight", (embd, q)
    if model.attention_bias and model.family.output_bias:
        yield "self_attn.o_proj.bias", (embd,)
    yield "post_attention_layernorm.weight", (embd,)
    if model.family.is_gemma:
        yield "pre_feedforward_layernorm.weight", (embd,)
    for part, shape in (("gate", (ff, embd)), ("up", (ff, embd)), ("down", (embd, ff))):
        yield f"mlp.{part}_proj.weight", shape
        if model.mlp_bias:
            yield f"mlp.{part}_proj.bias", (shape[0],)
    if model.family.is_gemma:
        yield "post_feedforward_layernorm.weight", (embd,)
