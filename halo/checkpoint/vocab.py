"""The tokenizer of a Hugging Face folder as llama.cpp's metadata. Nothing here runs foreign code or asks the network.

tokenizer.json decides which kind of tokenizer it is, as in transformers; a ``tokenizer.model`` beside it then only
gives the scores. Two limits are llama.cpp's: it does not normalise text (Qwen composes characters, NFC), and it keeps
the spaces beside a special token that asks for them to be stripped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from halo.checkpoint.config import read_optional_json
from halo.checkpoint.special import Added, added_tokens, looks_special, special_metadata
from halo.checkpoint.structure import flatten
from halo.errors import SourceError, UnsupportedError
from halo.gguf_file import Field, Metadata

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_SPACE = "\u2581"  # sentencepiece's stand-in for a space


@dataclass
class Pieces:
    """A vocabulary before it is written.

    Attributes:
        model: ``gpt2`` or ``llama`` (``tokenizer.ggml.model``).
        pre: ``tokenizer.ggml.pre``.
        texts: by token id.
        types: gguf.TokenType by token id.
        scores: by token id, of SentencePiece vocabularies only.
        merges: of byte-level BPE only.
        space_prefix: whether text gets a space before it, of SentencePiece only.
    """

    model: str
    pre: str
    texts: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Vocab:
    """Tokenizer metadata, and what the user should know about it."""

    metadata: Metadata
    notes: list[str]


def read_vocab(folder: Path, config: dict[str, Any], n_rows: int) -> Vocab:
    """The ``tokenizer.*`` keys, for an embedding of ``n_rows`` rows.

    Raises:
        SourceError: no tokenizer, a damaged one, or one larger than the embedding.
        UnsupportedError: a tokenizer that llama.cpp does not have.
    """
    try:
        return _read_vocab(folder, config, n_rows)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # JSON of another shape than any tokenizer's; each place it may show is not worth a check of its own.
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise SourceError(f"{folder}: the tokenizer's files are malformed ({what}); download them again") from None


def _read_vocab(folder: Path, config: dict[str, Any], n_rows: int) -> Vocab:
    settings = read_optional_json(folder / "tokenizer_config.json")
    data = read_optional_json(folder / "tokenizer.json")
    added = added_tokens(folder, data, settings)
    pieces = _pieces(folder, data, settings, added)
    _add(pieces, added)
    _fit(folder, pieces, added, n_rows)
    metadata, special_notes = special_metadata(folder, data, settings, config, pieces.texts, added)
    notes = [*pieces.notes, *special_notes]
    stripping = [token.text for token in added if token.strips]
    if stripping:
        notes.append(
            f"llama.cpp keeps the spaces beside {', '.join(stripping[:4])}, which the original tokenizer strips."
        )
    return Vocab(_metadata(folder, pieces, n_rows) | metadata, notes)


def _pieces(folder: Path, data: dict[str, Any], settings: dict[str, Any], added: list[Added]) -> Pieces:
    from halo.checkpoint.bpe import byte_level_pieces
    from halo.checkpoint.spm import pieces_from_json, pieces_from_model

    path = folder / "tokenizer.json"
    if not data:
        if (folder / "tokenizer.model").is_file():
            return pieces_from_model(folder / "tokenizer.model", settings)
        raise SourceError(
            f"{folder}: no tokenizer.json and no tokenizer.model; download the tokenizer, or save it with AutoTokenizer"
        )
    model = data.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise SourceError(f"{path}: has no model with a vocab; download it again")
    steps = {step.get("type") for step in flatten(data.get("pre_tokenizer"), "pretokenizers")}
    if model.get("type", "BPE") != "BPE" or not isinstance(model["vocab"], dict):
        raise UnsupportedError(
            f"{path}: a {model.get('type')} tokenizer; HALO converts byte-level BPE and SentencePiece BPE"
        )
    _check_bpe(path, model)
    if "ByteLevel" in steps:
        return byte_level_pieces(path, data)
    if model.get("byte_fallback"):
        return pieces_from_json(path, data, folder / "tokenizer.model", added)
    raise UnsupportedError(f"{path}: a BPE tokenizer of neither bytes nor SentencePiece; HALO converts those two")


def _check_bpe(path: Path, model: dict[str, Any]) -> None:
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedError(
                f"{path}: {key} {model[key]!r} is not in llama.cpp's tokenizer; HALO cannot convert it exactly"
            )
    ids = model["vocab"].values()
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise SourceError(f"{path}: its vocab does not give each token a number of its own; download it again")


def _add(pieces: Pieces, added: list[Added]) -> None:
    """Added tokens over the base vocabulary (conversion/base.py, get_vocab_base and _create_vocab_sentencepiece)."""
    for token in added:
        control = token.special or looks_special(token.text)
        pieces.types[token.id] = TokenType.CONTROL if control else TokenType.USER_DEFINED
        # llama.cpp looks for these in raw text, where a space is a space.
        pieces.texts[token.id] = token.text if control else token.text.replace(_SPACE, " ")
        if pieces.scores is not None:
            pieces.scores[token.id] = -1000.0


def _fit(folder: Path, pieces: Pieces, added: list[Added], n_rows: int) -> None:
    """Make one token a row of the embedding: drop added ones beyond it, pad up to it."""
    beyond = sorted(i for i in pieces.texts if i >= n_rows)
    if beyond and not {token.id for token in added}.issuperset(beyond):
        raise SourceError(
            f"{folder}: the tokenizer has {max(beyond) + 1} tokens, the embedding {n_rows} rows: not of one model"
        )
    if beyond:
        pieces.notes.append(
            f"{len(beyond)} tokens without a row in the embedding are left out ({pieces.texts[beyond[0]]} ...)."
        )
    for i in beyond:
        del pieces.texts[i]
    taken = set(pieces.texts.values())
    if len(taken) != len(pieces.texts):
        twice = Counter(pieces.texts.values()).most_common(1)[0][0]
        raise SourceError(
            f"{folder}: two tokens of the tokenizer have the same text {twice!r}, which llama.cpp cannot load; mend it"
        )
    for i in range(n_rows):
        if i not in pieces.texts:
            name = f"[PAD{i}]"
            while name in taken:
                name = f"[{name}]"
            pieces.texts[i] = name
            pieces.types[i] = TokenType.UNUSED
            if pieces.scores is not None:
                pieces.scores[i] = -10000.0


def _metadata(folder: Path, pieces: Pieces, n_rows: int) -> Metadata:
    ids = range(n_rows)
    out: Metadata = {
        "tokenizer.ggml.model": Field.string(pieces.model),
        "tokenizer.ggml.pre": Field.string(pieces.pre),
    }
    try:
        out["tokenizer.ggml.tokens"] = Field.strings([pieces.texts[i] for i in ids])
        if pieces.merges is not None:
            out["tokenizer.ggml.merges"] = Field.strings(pieces.merges)
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{folder}: a token is no valid Unicode ({error.reason}); download the tokenizer again"
        ) from None
    if pieces.scores is not None:
        out["tokenizer.ggml.scores"] = Field.array([pieces.scores[i] for i in ids], GGUFValueType.FLOAT32)
    out["tokenizer.ggml.token_type"] = Field.array([int(pieces.types[i]) for i in ids], GGUFValueType.INT32)
    if pieces.space_prefix is not None:
        out["tokenizer.ggml.add_space_prefix"] = Field.boolean(pieces.space_prefix)
    return out
