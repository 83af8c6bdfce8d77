"""What a tensor does in the network, told from its GGUF name, and whether it is quantised at all."""

from __future__ import annotations

import re
from collections.abc import Mapping

from halo.checkpoint.base import Tensor

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd", "output")
OTHER = "other"
_NAME = re.compile(r"^(?:blk\.(\d+)\.)?(.+?)(?:\.weight)?$")
# What llama.cpp leaves alone (src/llama-quant.cpp: tensor_allows_quantization), by parts of names.
_NEVER = re.compile(
    r"_norm\.weight$|ffn_gate_inp|altup|laurel|per_layer_model_proj|pos(ition)?_embd|token_types|ssm_conv1d|shortconv"
    r"|time_mix_|attn_rel_b|patch_embd|rope_freqs|indexer\.proj"
)


def block_of(name: str) -> int | None:
    """The block's number, or None for tensors outside the blocks."""
    found = _NAME.match(name)
    return int(found[1]) if found and found[1] is not None else None


def role_of(name: str) -> str:
    """The role: one of ``ROLES``, a mixture's experts counted with their dense kin, or ``other``."""
    found = _NAME.match(name)
    plain = (found[2] if found else name).removesuffix("_exps").removesuffix("_shexp")
    return plain if plain in ROLES else OTHER


def is_quantisable(tensor: Tensor) -> bool:
    """Whether llama.cpp takes a quantised type for this tensor."""
    matrix = len(tensor.shape) >= 2 and tensor.shape[-2] > 1
    return matrix and tensor.name.endswith("weight") and not _NEVER.search(tensor.name)


def quantisable(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that share the budget, in file order."""
    return [t for t in tensors.values() if is_quantisable(t)]
