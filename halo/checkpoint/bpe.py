"""Byte-level BPE vocabularies (GPT-2's alphabet: each byte is a printable character)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from halo.checkpoint.pretokenizer import name_by_hash, tokenizer_hash
from halo.checkpoint.structure import choose_name, flatten
from halo.checkpoint.vocab import Pieces
from halo.errors import SourceError, UnsupportedError


def byte_level_pieces(path: Path, data: dict[str, Any]) -> Pieces:
    """Tokens, merges and the pre-tokenizer's name of a tokenizer.json.

    Raises:
        SourceError: the file is damaged.
        UnsupportedError: a normaliser or pre-tokenizer that llama.cpp does not have.
    """
    for step in flatten(data.get("normalizer"), "normalizers"):
        # Qwen's NFC is the exception: llama.cpp leaves it out, and text is composed but for rare cases.
        if step.get("type") != "NFC":
            raise UnsupportedError(
                f"{path}: the tokenizer normalises text ({step.get('type')}), which llama.cpp does not do"
            )
    vocab: dict[str, int] = data["model"]["vocab"]
    return Pieces(
        model="gpt2",
        pre=_pre(path, data),
        texts={i: text for text, i in vocab.items()},
        types=dict.fromkeys(vocab.values(), TokenType.NORMAL),
        merges=merge_lines(path, data["model"].get("merges")),
    )


def _pre(path: Path, data: dict[str, Any]) -> str:
    from tokenizers import Tokenizer

    try:
        known = name_by_hash(tokenizer_hash(Tokenizer.from_file(str(path))))
    except Exception as error:  # tokenizers raises bare Exception
        raise SourceError(f"{path}: the tokenizers library cannot load it ({error}); download it again") from None
    return choose_name(path, data, known)


def merge_pairs(path: Path, merges: Any) -> list[tuple[str, str]]:
    """Merges of either of tokenizer.json's spellings, as pairs.

    Raises:
        SourceError: anything else.
    """
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges or []]
    if not pairs or not all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise SourceError(f"{path}: has no usable merges; download it again")
    return pairs


def merge_lines(path: Path, merges: Any) -> list[str]:
    """Merges as llama.cpp's ``a b`` lines; a space inside a part becomes GPT-2's character for it."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merge_pairs(path, merges)]
