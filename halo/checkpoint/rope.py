"""Rotary embeddings: config.json's many spellings read into one, and written as llama.cpp wants them.

transformers 5 writes ``rope_parameters`` (flat, or one entry a layer type for Gemma 3); before that there were
``rope_theta``, ``rope_scaling`` and ``rope_local_base_freq`` (modeling_rope_utils.py, standardize_rope_params).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from halo.checkpoint.config import Config, positive
from halo.checkpoint.families import unsupported
from halo.gguf_file import Field, Metadata


@dataclass(frozen=True)
class Rope:
    """How positions turn into angles.

    Attributes:
        kind: ``default``, ``linear``, ``yarn``, ``llama3`` or ``dynamic``.
        theta: base of the (global) layers.
        local_theta: base of the sliding-window layers, or None.
        params: the scaling's own numbers, checked.
    """

    kind: str
    theta: float
    local_theta: float | None = None
    params: dict[str, float] = field(default_factory=dict)


_KEYS = ("rope_parameters", "rope_scaling")
_WANTED: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(config: Config, kinds: tuple[str, ...], nested: bool) -> Rope:
    """The rotary embedding of a config.

    Args:
        kinds: the scalings that llama.cpp computes exactly for this architecture.
        nested: Gemma 3's two sets of parameters.

    Raises:
        UnsupportedError: a scaling, or one of its options, that llama.cpp does not compute.
        SourceError: a number that is none.
    """
    full, sliding = _spellings(config, nested)
    kind = str(full.get("rope_type") or full.get("type") or "default").lower()
    if kind not in kinds:
        raise unsupported(config.path, f"rope type '{kind}' is not computed by llama.cpp for this model")
    partial = full.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise unsupported(config.path, f"partial_rotary_factor {partial} (partial rotary embeddings) is not supported")
    if "mrope_section" in full:
        raise unsupported(config.path, "multimodal rotary embeddings (mrope_section) are not supported")
    local = str(sliding.get("rope_type") or sliding.get("type") or "default").lower()
    if local != "default":
        raise unsupported(config.path, f"rope type '{local}' on sliding-window layers is not supported")
    params = _params(config, kind, full)
    theta = positive(config, "rope_theta", full.get("rope_theta"))
    local_theta = positive(config, "rope_local_base_freq", sliding["rope_theta"]) if nested else None
    return Rope(kind, theta, local_theta, params)


def _spellings(config: Config, nested: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the global and of the sliding layers, wherever config.json has them."""
    new, old = (_object(config.get(key)) for key in _KEYS)
    theta = config.get("rope_theta", config.get("default_theta"))
    by_layer = "full_attention" in new or "sliding_attention" in new
    if not nested:
        if by_layer:
            raise unsupported(config.path, "rope_parameters differ between layers, which llama.cpp does not compute")
        return {"rope_theta": theta, **(new or old)}, {}
    if new and not by_layer:
        raise unsupported(config.path, "rope_parameters without full_attention and sliding_attention")
    full = {"rope_theta": theta, **_object(new.get("full_attention")), **old}
    local = config.get("rope_local_base_freq", 10000.0)
    return full, {"rope_theta": local, **_object(new.get("sliding_attention"))}


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _params(config: Config, kind: str, full: dict[str, Any]) -> dict[str, float]:
    if kind in ("yarn", "llama3"):
        # A number beside rope_parameters wins over one inside (transformers, standardize_rope_params).
        original = config.get("original_max_position_embeddings", full.get("original_max_position_embeddings"))
        full["original_max_position_embeddings"] = original or config.integer("max_position_embeddings")
    if kind == "yarn":
        original = positive(config, "original_max_position_embeddings", full["original_max_position_embeddings"])
        full["factor"] = full.get("factor") or config.integer("max_position_embeddings") / original
    params = {key: positive(config, f"rope factor {key}", full.get(key)) for key in _WANTED[kind]}
    if kind == "yarn":
        for key, usual in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            if full.get(key) is not None and full[key] != usual:
                raise unsupported(config.path, f"YaRN with {key} {full[key]} (llama.cpp computes {usual} only)")
        params["attention_factor"] = _yarn_attention(config, full, params["factor"])
    return params


def _yarn_attention(config: Config, full: dict[str, Any], factor: float) -> float:
    """The factor on cos and sin (transformers modeling_rope_utils.py, _compute_yarn_parameters)."""
    given = full.get("attention_factor")
    if given is not None:
        return positive(config, "attention_factor", given)

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    mscale, all_dim = full.get("mscale"), full.get("mscale_all_dim")
    if mscale and all_dim:
        return scale(positive(config, "mscale", mscale)) / scale(positive(config, "mscale_all_dim", all_dim))
    return scale(1.0)


def rope_metadata(architecture: str, rope: Rope) -> Metadata:
    """The ``<architecture>.rope.*`` keys.

    llama.cpp itself multiplies cos and sin by 1 + 0.1 ln(factor) under YaRN and cancels its own attention factor
    (llama-context.cpp; ggml-cpu/ops.cpp, rope_yarn), so ``attn_factor`` carries only what the model wants beyond that.
    """
    prefix = f"{architecture}.rope"
    out = {f"{prefix}.freq_base": Field.float32(rope.theta)}
    if rope.local_theta is not None:
        out[f"{prefix}.freq_base_swa"] = Field.float32(rope.local_theta)
    if rope.kind in ("linear", "yarn"):
        out[f"{prefix}.scaling.type"] = Field.string(rope.kind)
        out[f"{prefix}.scaling.factor"] = Field.float32(rope.params["factor"])
    if rope.kind == "yarn":
        original = int(rope.params["original_max_position_embeddings"])
        out[f"{prefix}.scaling.original_context_length"] = Field.uint32(original)
        beyond = rope.params["attention_factor"] / (1.0 + 0.1 * math.log(rope.params["factor"]))
        if abs(beyond - 1.0) > 1e-7:
            out[f"{prefix}.scaling.attn_factor"] = Field.float32(beyond)
    return out


def llama3_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """What each frequency is divided by under Llama 3.1's scaling, shape (head_dim / 2,), float32.

    Formula: transformers modeling_rope_utils.py, _compute_llama3_parameters; llama.cpp divides the angle by these
    numbers (``rope_freqs.weight``).
    """
    factor, context = rope.params["factor"], rope.params["original_max_position_embeddings"]
    low, high = rope.params["low_freq_factor"], rope.params["high_freq_factor"]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = 2 * np.pi * np.float64(rope.theta) ** exponents.astype(np.float64)
    span = (high - low) or 1.0
    smooth = (context / wavelength - low) / span
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    out = np.where(wavelength < context / high, 1.0, np.where(wavelength > context / low, factor, between))
    return out.astype(np.float32)
