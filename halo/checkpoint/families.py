"""The families HALO converts from Hugging Face, and what llama.cpp computes for each.

What may pass is decided by llama.cpp's graphs (src/models/llama.cpp, qwen2.cpp, qwen3.cpp, gemma3.cpp): what they leave
out is refused, even where the converter would go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halo.errors import UnsupportedError

SUPPORTED = (
    "HALO converts LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM and "
    "Gemma3ForConditionalGeneration (text part); other models come in as a GGUF made by llama.cpp"
)
GEMMA3_PATTERN = 6  # llama.cpp's own, when the file has no attention.sliding_window_pattern


@dataclass(frozen=True)
class Family:
    """An architecture of transformers and its namesake in llama.cpp.

    Attributes:
        architecture: GGUF's name.
        defaults: what transformers fills in where config.json is silent.
        activation: spellings of the one that llama.cpp's graph computes.
        ropes: scalings its graph computes.
        permuted: q and k rows are stored pairwise in the GGUF (llama.cpp's NORM rotary type).
        norm_shift: what is added to norm weights.
        qk_norm: a norm on every head of q and k.
        qkv_bias: True, False, or None for config.json's attention_bias.
        output_bias: whether the graph adds a bias after attention and in the feed-forward.
        window: transformers' default of sliding_window; None for no sliding windows at all.
        window_switch: config.json's flag that turns the window on; None where it is always on.
    """

    architecture: str
    defaults: dict[str, Any]
    activation: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear", "yarn", "dynamic")
    permuted: bool = False
    norm_shift: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool | None = False
    output_bias: bool = False
    window: int | None = None
    window_switch: str | None = None

    @property
    def is_gemma(self) -> bool:
        return self.architecture == "gemma3"


def _defaults(context: int, **more: Any) -> dict[str, Any]:
    usual = {"rms_norm_eps": 1e-6, "default_theta": 10000.0, "hidden_act": "silu"}
    return {"max_position_embeddings": context, **usual, **more}


# Defaults are those of transformers' configuration classes.
_LLAMA = Family(
    "llama",
    _defaults(2048),
    ropes=("default", "linear", "yarn", "llama3", "dynamic"),
    permuted=True,
    qkv_bias=None,
    output_bias=True,
)
_MISTRAL = Family(
    "llama",
    _defaults(131072, num_key_value_heads=8),
    ropes=("default", "linear", "yarn", "llama3", "dynamic"),
    permuted=True,
    window=4096,
)
_QWEN2 = Family("qwen2", _defaults(32768), qkv_bias=True, window=4096, window_switch="use_sliding_window")
_QWEN3 = Family("qwen3", _defaults(32768, head_dim=128), qk_norm=True, window=4096, window_switch="use_sliding_window")
_GEMMA3 = Family(
    "gemma3",
    _defaults(
        131072,
        default_theta=1_000_000.0,
        vocab_size=262208,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        sliding_window_pattern=GEMMA3_PATTERN,
        tie_word_embeddings=True,
    ),
    activation=("gelu_pytorch_tanh",),
    ropes=("default", "linear"),
    norm_shift=1.0,
    qk_norm=True,
    window=4096,
)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "MistralForCausalLM": _MISTRAL,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
}


def unsupported(path: Path, what: str) -> UnsupportedError:
    """The refusal of something that llama.cpp does not compute, with what HALO does convert."""
    return UnsupportedError(f"{path}: {what}; {SUPPORTED}")


def find_family(path: Path, raw: dict[str, Any]) -> Family:
    """The family that config.json's ``architectures`` names.

    Raises:
        UnsupportedError: none of those in ``FAMILIES``, or already quantised.
    """
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in FAMILIES:
        raise unsupported(path, f"{name or 'a model without architectures'} is not supported")
    for holder in (raw, raw.get("text_config")):
        quantised = holder.get("quantization_config") if isinstance(holder, dict) else None
        if quantised:
            method = quantised.get("quant_method", "?") if isinstance(quantised, dict) else "?"
            raise UnsupportedError(
                f"{path}: the checkpoint is already quantised ({method}); "
                "give HALO the float checkpoint it was made from"
            )
    return FAMILIES[name]
