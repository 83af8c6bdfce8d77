"""Tiny checkpoints with random weights and real small tokenizers, made by the libraries that make the large ones."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

TEXT = [
    "The quick brown fox jumps over the lazy dog while 1234567 people watch it, don't they? We'll see: I'm sure.",
    "def forward(self, x):\n    for i in range(10):\n        x = x * 2 + i  # a comment\n    return x\n",
    '{"name": "halo", "values": [1, 2.5, -3e10, null, true], "text": "a\\tb\\nc"}\n\n\n',
    "Die Grüße aus Köln; où est l'été? ¿Dónde está? Привет, мир? 你好，世界！今天天气很好。 こんにちは世界。 مرحبا",
    "Mixed   spaces \t\t tabs   \n\n  and lines \r\n end. 3.14159 + 2,718 = 5.86 (roughly) #hash @user https://example.org/a?b=c&d=e",
    "Emoji 🙂🚀👩‍💻 and symbols €£¥ ½ ² ™ — “quotes” … ok. ALLCAPS CamelCase snake_case kebab-case 'RE 'Ve it'LL",
] * 20
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama3": _ENGLISH + r"|\p{N}{1,3}" + _TAIL, "qwen2": _ENGLISH + r"|\p{N}" + _TAIL}
BYTE_LEVEL = ("llama3", "qwen2", "smollm", "gpt2")
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def byte_level_tokenizer(style: str, vocab_size: int = 600) -> str:
    """tokenizer.json of a byte-level BPE trained on ``TEXT``; style is one of ``BYTE_LEVEL``."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    parts: list[Any] = []
    if style in _SPLITS:
        parts = [
            pre_tokenizers.Split(Regex(_SPLITS[style]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        parts = [pre_tokenizers.Digits(individual_digits=True)] if style == "smollm" else []
        parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if style == "llama3":
        bos = tokenizer.token_to_id("<|begin_of_text|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", bos)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str()


@lru_cache
def sentencepiece_model(dummy_prefix: bool, vocab_size: int = 700) -> bytes:
    """tokenizer.model of a SentencePiece BPE with byte fallback trained on ``TEXT``, as Llama 2's and Gemma's are."""
    import io

    import sentencepiece

    out = io.BytesIO()
    lines = (line for text in TEXT for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=out, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, minloglevel=2, num_threads=1,
        user_defined_symbols=["\n\n", "\u2581\u2581"] if not dummy_prefix else [], character_coverage=0.99,
    )  # fmt: skip
    return out.getvalue()


def sentencepiece_json(model: bytes, dummy_prefix: bool) -> str:
    """tokenizer.json as transformers converts a SentencePiece model: Llama 2's normaliser, or Gemma's."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    vocab = {processor.id_to_piece(i): i for i in ids}
    own = [] if dummy_prefix else ["\n\n", "\u2581\u2581"]
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in ids}
    skipped = {"<unk>", "<s>", "</s>"}
    merges = generate_merges(vocab, scores, skipped)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if dummy_prefix else replace
    if not dummy_prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])
    tokenizer.add_special_tokens(["<start_of_turn>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer.to_str()


def write_tokenizer(folder: Path, style: str, *, files: str = "both") -> int:
    """Write one of ``BYTE_LEVEL``, ``llama2`` or ``gemma`` (``files``: both, json or model); its number of tokens."""
    from tokenizers import Tokenizer

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}
    if style in BYTE_LEVEL:
        text = byte_level_tokenizer(style)
        settings |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        settings |= {"bos_token": "<|begin_of_text|>"} if style == "llama3" else {}
    else:
        model = sentencepiece_model(style == "llama2")
        text = sentencepiece_json(model, style == "llama2")
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if files != "json":
            (folder / "tokenizer.model").write_bytes(model)
    if files != "model":
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return Tokenizer.from_str(text).get_vocab_size()


_STYLES = {"llama": "llama3", "mistral": "llama2", "qwen2": "qwen2", "qwen3": "qwen2", "gemma3": "gemma"}


def _config(family: str, options: dict[str, Any]) -> Any:
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}[family]
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": family == "gemma3",
    }  # fmt: skip
    if family == "gemma3":
        sizes |= {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}
    if family == "qwen3":
        sizes |= {"head_dim": 32}
    if family == "mistral":
        sizes |= {"sliding_window": None, "head_dim": 32}
    return getattr(transformers, name + "Config")(**(sizes | options))


def _randomise(model: Any, family: str, seed: int) -> None:
    """Weights large enough that every tensor changes the logits: norms round one, biases not zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 0.2 * noise + (0.0 if family == "gemma3" else 1.0)
        else:
            values = noise * (0.3 if name.endswith("bias") else 0.15)
        parameter.data.copy_(values)


def make_hf(
    folder: Path, family: str, *, seed: int = 0, dtype: str = "float32", shard: str | None = None,
    tokenizer: str | None = None, tokenizer_files: str = "both", extra_rows: int = 0, **options: Any,
) -> Path:  # fmt: skip
    """A tiny checkpoint of ``llama``, ``mistral``, ``qwen2``, ``qwen3`` or ``gemma3``.

    Args:
        dtype: of the stored weights (a name of torch).
        shard: size of a shard, such as ``100KB``; one file when None.
        tokenizer: style for ``write_tokenizer``; the family's own when None.
        extra_rows: rows of the embedding beyond the tokenizer.
        options: for the family's configuration class of transformers.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, tokenizer or _STYLES[family], files=tokenizer_files)
    config = _config(family, {"vocab_size": size + extra_rows, **options})
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3"}[family]
    model = getattr(transformers, name + "ForCausalLM")(config)
    _randomise(model, family, seed)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return folder
