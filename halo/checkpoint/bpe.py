"""Byte-level BPE vocabularies (GPT-2's alphabet: each byte is a printable character)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import TokenType

from halo.checkpoint.pretokenizer import name_by_hash, tokenizer_hash
from halo.checkpoint.structure import choose_name, flatten, merge_pairs
from halo.checkpoint.vocab import Pieces
from halo.errors import SourceError, UnsupportedError

# llama.cpp writes these expressions without Unicode's letter cases and marks (src/llama-vocab.cpp, TEKKEN and GPT4O).
_APART_MARKS = {"tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"}
_MARKS = (
    "llama.cpp splits words at combining marks (Hindi, Tamil, Thai, vocalised Arabic and Hebrew), which this tokenizer "
    "does not: such text becomes other tokens than in the original."
)


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
    pre = _pre(path, data)
    return Pieces(
        model="gpt2",
        pre=pre,
        texts={i: text for text, i in vocab.items()},
        types=dict.fromkeys(vocab.values(), TokenType.NORMAL),
        merges=merge_lines(path, data["model"].get("merges")),
        notes=[_MARKS] if pre in _APART_MARKS else [],
    )


def _pre(path: Path, data: dict[str, Any]) -> str:
    from tokenizers import Tokenizer

    try:
        known = name_by_hash(tokenizer_hash(Tokenizer.from_file(str(path))))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and a Rust panic is not even that
        what = " ".join(str(error).split())
        raise SourceError(f"{path}: the tokenizers library cannot use it ({what}); download it again") from None
    return choose_name(path, data, known)


def merge_lines(path: Path, merges: Any) -> list[str]:
    """Merges as llama.cpp's ``a b`` lines; a space inside a part becomes GPT-2's character for it."""
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merge_pairs(path, merges)]
