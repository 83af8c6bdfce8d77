"""A checkpoint's config.json, checked against its family, and the GGUF metadata it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from halo.checkpoint.config import Config
from halo.checkpoint.families import GEMMA3_PATTERN, Family, find_family, unsupported
from halo.checkpoint.rope import Rope, read_rope, rope_metadata
from halo.errors import SourceError
from halo.gguf_file import Field, Metadata

_MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS (llama-hparams.h)
_MEND = "mend or download it again"


@dataclass(frozen=True)
class Model:
    """The numbers of a model.

    Attributes:
        n_ctx: tokens up to which llama.cpp computes what transformers does.
        tied: the embedding is the output matrix too.
        window: attention window of the sliding layers, or None.
        sliding: which blocks slide.
        notes: sentences for the user.
    """

    family: Family
    config: Config
    n_blocks: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    eps: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope
    window: int | None
    sliding: tuple[bool, ...]
    notes: list[str]


def read_model(path: Path, raw: dict[str, Any]) -> Model:
    """config.json, checked.

    Raises:
        UnsupportedError: something llama.cpp does not compute for this family.
        SourceError: a number missing or impossible.
    """
    family = find_family(path, raw)
    config = Config(path, raw, family.defaults)
    _refuse(config, family)
    n_blocks, n_embd, n_heads, n_kv, head_dim = _sizes(config, family)
    if family.is_gemma:
        _check_gemma_scale(config, n_blocks, n_embd, n_heads, head_dim)
    window, sliding = _windows(config, family, n_blocks)
    rope = read_rope(config, family.ropes, nested=family.is_gemma)
    n_ctx, notes = _context(config, family, window, rope)
    return Model(
        family=family,
        config=config,
        n_blocks=n_blocks,
        n_embd=n_embd,
        n_ff=config.integer("intermediate_size"),
        n_heads=n_heads,
        n_kv_heads=n_kv,
        head_dim=head_dim,
        n_vocab=config.integer("vocab_size"),
        n_ctx=n_ctx,
        eps=config.number("rms_norm_eps"),
        tied=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias") if family.qkv_bias is None else family.qkv_bias,
        mlp_bias=config.flag("mlp_bias") if family.output_bias else False,
        rope=rope,
        window=window,
        sliding=sliding,
        notes=notes,
    )


def _refuse(config: Config, family: Family) -> None:
    """Refuse what the family's graph in llama.cpp leaves out."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise unsupported(config.path, f"a mixture of experts ({key} {config.get(key)}) is not supported")
    key = "hidden_activation" if family.is_gemma else "hidden_act"
    if str(config.get(key)) not in family.activation:
        what = f"{key} '{config.get(key)}' is not what llama.cpp computes ({family.activation[0]})"
        raise unsupported(config.path, what)
    absent = ["attn_logit_softcapping"] if family.is_gemma else ["attn_logit_softcapping", "final_logit_softcapping"]
    absent += ["attention_bias"] if family.qkv_bias is False else []
    absent += [] if family.output_bias else ["mlp_bias"]
    for key in absent:
        if config.get(key):
            what = f"{key} {config.get(key)} is not computed by llama.cpp for {family.architecture}"
            raise unsupported(config.path, what)
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise unsupported(config.path, "bidirectional attention (an embedding model) is not supported")


def _sizes(config: Config, family: Family) -> tuple[int, int, int, int, int]:
    """(blocks, width, heads, key-value heads, head size)."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    n_blocks, n_embd, n_heads = (config.integer(key) for key in keys)
    n_kv = config.integer("num_key_value_heads", n_heads)
    head_dim = config.integer("head_dim", n_embd // n_heads or 1)
    uneven = "head_dim" not in config.values and n_embd % n_heads
    if uneven or n_heads % n_kv or head_dim % 2 or n_blocks > _MAX_BLOCKS:
        raise SourceError(
            f"{config.path}: impossible sizes ({n_blocks} layers of width {n_embd}, {n_heads} heads of {head_dim}, "
            f"{n_kv} key-value heads); {_MEND}"
        )
    if family.architecture == "qwen2" and head_dim * n_heads != n_embd:
        what = f"{n_heads} heads of {head_dim} beside hidden_size {n_embd} are not computed by llama.cpp for qwen2"
        raise unsupported(config.path, what)
    return n_blocks, n_embd, n_heads, n_kv, head_dim


def _check_gemma_scale(config: Config, n_blocks: int, n_embd: int, n_heads: int, head_dim: int) -> None:
    # llama.cpp has no key for it: 62 blocks mean the 27B model, divided by hidden_size / heads (models/gemma3.cpp).
    wanted = n_embd // n_heads if n_blocks == 62 else head_dim
    if config.number("query_pre_attn_scalar") != wanted:
        given = config.get("query_pre_attn_scalar")
        raise unsupported(config.path, f"query_pre_attn_scalar {given} is not what llama.cpp computes ({wanted})")


def _windows(config: Config, family: Family, n_blocks: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which blocks have it, as transformers derives them (configuration_*.py, __post_init__)."""
    full = (False,) * n_blocks
    on = config.flag(family.window_switch) if family.window_switch else family.window is not None
    # null switches the window off; transformers' default holds only where the key is absent.
    if not on or config.explicit.get("sliding_window", family.window) is None:
        return None, full
    window = config.integer("sliding_window", family.window)
    types = config.get("layer_types")
    if types is not None and family.architecture != "llama":
        kinds = {"sliding_attention", "full_attention"}
        if not isinstance(types, list) or len(types) != n_blocks or not all(str(kind) in kinds for kind in types):
            raise SourceError(f"{config.path}: layer_types does not say {' or '.join(kinds)} of each layer; {_MEND}")
        sliding = tuple(kind == "sliding_attention" for kind in types)
    elif family.is_gemma:
        pattern = config.integer("sliding_window_pattern")
        sliding = tuple((i + 1) % pattern != 0 for i in range(n_blocks))
    elif family.window_switch:
        first = config.integer("max_window_layers", 28) if config.get("max_window_layers") != 0 else 0
        sliding = tuple(i >= first for i in range(n_blocks))
    else:
        sliding = (True,) * n_blocks
    return (window, sliding) if any(sliding) else (None, full)


def _context(config: Config, family: Family, window: int | None, rope: Rope) -> tuple[int, list[str]]:
    n_ctx, notes = config.integer("max_position_embeddings"), []
    if window is not None and not family.is_gemma and window < n_ctx:
        notes.append(
            f"llama.cpp has no sliding-window attention for {family.architecture} models: it computes the same as the "
            f"original up to the window of {window} tokens, so the context length is declared as {window}, not {n_ctx}."
        )
        n_ctx = window
    if rope.kind == "dynamic":
        notes.append(f"The dynamic rope scaling acts only beyond {n_ctx} tokens, which llama.cpp does not compute.")
    return n_ctx, notes


def model_metadata(model: Model) -> Metadata:
    """The ``<architecture>.*`` keys, named and typed as the converter does (conversion/base.py, llama.py, gemma.py)."""
    arch = model.family.architecture
    out: Metadata = {
        f"{arch}.block_count": Field.uint32(model.n_blocks),
        f"{arch}.context_length": Field.uint32(model.n_ctx),
        f"{arch}.embedding_length": Field.uint32(model.n_embd),
        f"{arch}.feed_forward_length": Field.uint32(model.n_ff),
        f"{arch}.attention.head_count": Field.uint32(model.n_heads),
        f"{arch}.attention.head_count_kv": Field.uint32(model.n_kv_heads),
        f"{arch}.attention.layer_norm_rms_epsilon": Field.float32(model.eps),
        f"{arch}.attention.key_length": Field.uint32(model.head_dim),
        f"{arch}.attention.value_length": Field.uint32(model.head_dim),
        f"{arch}.vocab_size": Field.uint32(model.n_vocab),
    }
    if arch == "llama":
        out[f"{arch}.rope.dimension_count"] = Field.uint32(model.head_dim)
    out |= rope_metadata(arch, model.rope)
    return out | _gemma_metadata(model) if model.family.is_gemma else out


def _gemma_metadata(model: Model) -> Metadata:
    out: Metadata = {}
    if model.config.get("final_logit_softcapping"):
        out["gemma3.final_logit_softcapping"] = Field.float32(model.config.number("final_logit_softcapping"))
    if model.window is not None:
        out["gemma3.attention.sliding_window"] = Field.uint32(model.window)
        if model.sliding != tuple((i + 1) % GEMMA3_PATTERN != 0 for i in range(model.n_blocks)):
            out["gemma3.attention.sliding_window_pattern"] = Field.array(model.sliding, GGUFValueType.BOOL)
    return out
