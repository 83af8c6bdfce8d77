"""SentencePiece BPE vocabularies: from tokenizer.model, or from a tokenizer.json made from one.

llama.cpp merges the pair whose joint token has the highest score (src/llama-vocab.cpp, llm_tokenizer_spm_session). A
tokenizer.json has no scores but ranked merges; where it holds every way to put a token together, as those made from
SentencePiece do, minus the rank is such a score. (The converter writes -1000 for all, which splits words differently.)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import TokenType

from halo.checkpoint.special import Added
from halo.checkpoint.structure import flatten, merge_pairs
from halo.checkpoint.vocab import Pieces
from halo.errors import SourceError, UnsupportedError

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# sentencepiece_model.proto, ModelProto.SentencePiece.Type; the numbers are gguf's too.
_TYPES = {kind.value: kind for kind in TokenType}
_BPE = 2  # TrainerSpec.ModelType


def pieces_from_model(path: Path, settings: dict[str, Any]) -> Pieces:
    """The vocabulary of a tokenizer.model without a tokenizer.json beside it.

    Raises:
        SourceError: the file is damaged.
        UnsupportedError: not a BPE model, or one that normalises text.
    """
    model = SentencePieceModel(path)
    model.refuse_unlike_llama_cpp()
    prefix = settings.get("add_prefix_space")
    space_prefix = prefix if isinstance(prefix, bool) else model.dummy_prefix
    scores: dict[int, float] = {}
    pieces = Pieces("llama", "default", {}, {}, scores=scores, space_prefix=space_prefix)
    for i, (text, score, kind) in enumerate(model.pieces):
        pieces.types[i] = _TYPES.get(kind, TokenType.NORMAL)
        pieces.texts[i] = text.replace(_SPACE, " ") if kind == 4 else text
        scores[i] = score
    return pieces


def pieces_from_json(path: Path, data: dict[str, Any], model_path: Path, added: list[Added]) -> Pieces:
    """The vocabulary of a tokenizer.json with ``byte_fallback``; scores from tokenizer.model where that agrees.

    Raises:
        SourceError: a file is damaged.
        UnsupportedError: text is normalised or split as llama.cpp does not, or the merges are not SentencePiece's.
    """
    vocab: dict[str, int] = data["model"]["vocab"]
    space_prefix, notes = _space_prefix(path, data)
    scores = _model_scores(model_path, vocab)
    if scores is None:
        scores = _scores_of_merges(path, data, {token.text for token in added})
    unknown = data["model"].get("unk_token")
    types = {i: TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL for text, i in vocab.items()}
    if unknown in vocab:
        types[vocab[unknown]] = TokenType.UNKNOWN
    return Pieces(
        "llama",
        "default",
        {i: text for text, i in vocab.items()},
        types,
        scores,
        space_prefix=space_prefix,
        notes=notes,
    )


def _space_prefix(path: Path, data: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether text gets a space before it, and what llama.cpp does otherwise around that space."""
    prefix, escaped, notes = False, False, []
    for step in flatten(data.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == _SPACE:
            prefix = True
        elif step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == _SPACE:
            escaped = True
        else:
            raise UnsupportedError(
                f"{path}: the tokenizer normalises text ({step.get('type')}), which llama.cpp does not do"
            )
    for step in flatten(data.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement", _SPACE) == _SPACE:
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            if scheme != "never":
                prefix = True
                notes.append(
                    "llama.cpp puts a space before a text that begins with one, and before text after a special token; "
                    f"this tokenizer (prepend_scheme {scheme}) does not always."
                )
            escaped = True
        elif not (step.get("type") == "Split" and step.get("pattern") == {"String": " "} and escaped):
            raise UnsupportedError(
                f"{path}: the tokenizer splits text first ({step.get('type')}), which llama.cpp does not do"
            )
    if not escaped:
        raise UnsupportedError(f"{path}: the tokenizer does not write spaces as {_SPACE}, which llama.cpp does")
    return prefix, notes


def _model_scores(path: Path, vocab: dict[str, int]) -> dict[int, float] | None:
    """Scores of tokenizer.model by token id; None when it is absent or another vocabulary."""
    if not path.is_file():
        return None
    try:
        model = SentencePieceModel(path)
    except SourceError:
        return None  # Llama 3's tokenizer.model is no SentencePiece file
    scores = {vocab[text]: score for text, score, _ in model.pieces if text in vocab}
    return scores if len(scores) == len(vocab) and model.kind == _BPE else None


def _scores_of_merges(path: Path, data: dict[str, Any], added: set[str]) -> dict[int, float]:
    vocab: dict[str, int] = data["model"]["vocab"]
    pairs = merge_pairs(path, data["model"].get("merges"))
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    known = set(pairs)
    skipped = added | {text for text in vocab if _BYTE.fullmatch(text)}
    for text in vocab:
        if text in skipped:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in known and not {left, right} & skipped:
                raise UnsupportedError(
                    f"{path}: its merges are not SentencePiece's (no merge of {left!r} and {right!r}), and llama.cpp "
                    "would split words differently; add the tokenizer.model it was made from"
                )
    return {i: -float(ranks.get(text, len(pairs))) for text, i in vocab.items()}


class SentencePieceModel:
    """A tokenizer.model, read without protobuf (sentencepiece_model.proto).

    Attributes:
        pieces: (text, score, type) by token id.
        kind: TrainerSpec.model_type: 1 unigram, 2 BPE, 3 word, 4 char.
        dummy_prefix: whether text gets a space before it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.pieces: list[tuple[str, float, int]] = []
        self.kind, self.dummy_prefix, self.strips, self.charsmap = 1, True, True, b""
        try:
            self._parse(path.read_bytes())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, IndexError, struct.error):
            raise SourceError(f"{path}: is no SentencePiece model; download it again") from None
        if not self.pieces:
            raise SourceError(f"{path}: holds no pieces; download it again")

    def _parse(self, data: bytes) -> None:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                self.pieces.append((piece.get(1, b"").decode("utf-8"), score, piece.get(3, 1)))
            elif number == 2:
                self.kind = dict(_fields(value)).get(3, 1)
            elif number == 3:
                spec = dict(_fields(value))
                self.charsmap = spec.get(2, b"")
                self.dummy_prefix, self.strips = bool(spec.get(3, 1)), bool(spec.get(4, 1))

    def refuse_unlike_llama_cpp(self) -> None:
        """Refuse what llama.cpp's SentencePiece tokenizer leaves out.

        Raises:
            UnsupportedError: not a BPE model, or text is normalised.
        """
        if self.kind != _BPE:
            raise UnsupportedError(
                f"{self.path}: not a BPE model (type {self.kind}); llama.cpp's SentencePiece tokenizer is BPE only"
            )
        if self.charsmap or self.strips:
            raise UnsupportedError(f"{self.path}: normalises text or strips spaces, which llama.cpp does not do")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: ints and bytes. ValueError or IndexError if it is cut off."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}.get(wire, -1)
        if length < 0 or at + length > end:
            raise ValueError("cut off")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
