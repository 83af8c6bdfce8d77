"""A randomly initialised Llama checkpoint of any size on disk, written in pieces of a few megabytes.

The shape is real (names, shards, index, rope scaling, tokenizer), the weights are noise: for measuring time and memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from halo.corpus import packaged_text

_PIECE = 8 << 20  # weights drawn at once: 32 MB as float32
_DEVIATION = 0.02
_BOS, _EOS = "<|begin_of_text|>", "<|end_of_text|>"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_LLAMA3_SPLIT = _WORDS + r"|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Shape:
    """Sizes of an untied Llama with grouped heads."""

    vocab: int
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    ffn: int
    shards: int
    trained_vocab: int

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of a published checkpoint."""
        h, kv, ffn = self.hidden, self.kv_width, self.ffn
        yield "model.embed_tokens.weight", (self.vocab, h)
        for block in range(self.blocks):
            at = f"model.layers.{block}."
            yield f"{at}input_layernorm.weight", (h,)
            for letter, rows in (("q", h), ("k", kv), ("v", kv), ("o", h)):
                yield f"{at}self_attn.{letter}_proj.weight", (rows, h)
            yield f"{at}post_attention_layernorm.weight", (h,)
            yield f"{at}mlp.gate_proj.weight", (ffn, h)
            yield f"{at}mlp.up_proj.weight", (ffn, h)
            yield f"{at}mlp.down_proj.weight", (h, ffn)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocab, h)

    def config(self) -> dict[str, Any]:
        """config.json as Llama 3.1's."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


# `small` keeps what matters for a test of the command: grouped heads, shards, rows that K-quants fit.
SHAPES = {
    "8b": Shape(128256, 4096, 32, 32, 8, 14336, 4, 4096),
    "small": Shape(1024, 256, 2, 4, 2, 512, 4, 600),
}


def make_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint; its index comes last, so a folder with an index is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config() | _write_tokenizer(folder, shape.trained_vocab)
    _write_json(folder / "config.json", config)
    generator = np.random.default_rng(seed)
    places: dict[str, str] = {}
    for number, names in enumerate(_shards(shape), 1):
        file = f"model-{number:05d}-of-{shape.shards:05d}.safetensors"
        _write_shard(folder / file, names, generator)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * shape.n_params}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def is_whole(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").is_file()


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut into shards of about equal size."""
    out: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shape.shards)]
    total, done = shape.n_params, 0
    for name, dims in shape.tensors():
        out[min(done * shape.shards // total, shape.shards - 1)][name] = dims
        done += math.prod(dims)
    return out


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], generator: np.random.Generator) -> None:
    # By hand: safetensors' own writers want whole tensors in memory, and numpy has no bfloat16.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for dims in tensors.values():
            # Norm weights lie round one, as in a real model.
            _write_noise(file, math.prod(dims), 1.0 if len(dims) == 1 else 0.0, generator)


def _write_noise(file: BinaryIO, count: int, mean: float, generator: np.random.Generator) -> None:
    for start in range(0, count, _PIECE):
        values = generator.standard_normal(min(_PIECE, count - start), np.float32)
        values *= _DEVIATION
        values += mean
        file.write(_bfloat16(values).tobytes())


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def _write_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """A byte-level BPE like Llama 3's, trained on the packaged text; its special ids for config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BOS, _EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([packaged_text("calibration")], trainer)
    ids: dict[str, int] = tokenizer.get_vocab()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, ids[_BOS])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS, "eos_token": _EOS}
    _write_json(folder / "tokenizer_config.json", settings)
    return {"bos_token_id": ids[_BOS], "eos_token_id": ids[_EOS]}
