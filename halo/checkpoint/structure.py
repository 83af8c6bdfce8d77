"""The pre-tokenizer of a tokenizer.json, by the regular expressions it is made of.

Each entry pairs what Hugging Face writes with the llama.cpp name whose expressions (src/llama-vocab.cpp,
llm_tokenizer_bpe) split every text alike. llama.cpp ties the switch ``ignore_merges`` to the name too, so it is part of
the choice.

Where the converter's hash says otherwise, the expressions are right: a vocabulary without tokens of several digits
hashes alike with and without a step that splits digits (SmolLM's does), and then splits other scripts' digits wrongly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halo.errors import SourceError, UnsupportedError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}{_TAIL}"
_QWEN2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{_TAIL}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}{_CASED_TAIL}"
_GPT4O = rf"{_CASED[0]}{_ENGLISH}?|{_CASED[1]}{_ENGLISH}?|\p{{N}}{{1,3}}{_CASED_TAIL}"
_SEED = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_MINICPM5 = rf"{_ENGLISH}|{_WORD}|\p{{N}}+{_TAIL}"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_GPT2 = "GPT-2"  # ByteLevel's own expression
_DIGITS = "each digit"

# Steps -> names for ignore_merges false and true; None where llama.cpp has no such name.
_KNOWN: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (_LLAMA3,): ("smaug-bpe", "llama-bpe"),
    (_QWEN2,): ("qwen2", None),
    (_QWEN35,): ("qwen35", None),
    (_DIGITS, _GPT2): ("smollm", None),
    (_GPT2,): ("gpt-2", None),
    (_TEKKEN,): (None, "tekken"),
    (_GPT4O,): ("gpt-4o", None),
    (_SEED,): ("seed-coder", None),
    (_BAILING,): ("bailingmoe", None),
    (r"\p{N}{1,3}", _MINICPM5): (None, "minicpm5"),
    (rf"{_WORD}|\p{{N}}{_TAIL}",): ("ufakzeka", None),
    (r"\p{N}{1,3}", _CJK, _DEEPSEEK3): ("deepseek-v3", None),
}


# Names of the same expressions, so that a name found by hash is kept.
_ALIKE: dict[tuple[str, ...], str] = {
    (_LLAMA3,): "falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx chatglm-bpe glm4",
    (_QWEN2,): "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    (_DIGITS, _GPT2): "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    (_GPT2,): (
        "phi-2 gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais trillion granite-docling"
    ),
    (_GPT4O,): "llama4 kanana2 talkie minimax-m2",
}


def choose_name(path: Path, data: dict[str, Any], by_hash: str | None) -> str:
    """llama.cpp's name of a tokenizer.json's pre-tokenizer.

    Args:
        path: of tokenizer.json, for messages.
        data: its contents.
        by_hash: what the converter's hash table says, or None.

    Raises:
        UnsupportedError: no pre-tokenizer of llama.cpp splits text the same way.
    """
    try:
        steps = _steps(path, data.get("pre_tokenizer"))
    except UnsupportedError:
        if by_hash is None:
            raise
        return by_hash
    if by_hash is not None and (steps not in _KNOWN or by_hash in _names(steps)):
        return by_hash
    if steps not in _KNOWN:
        raise _unknown(path, f"splits text by {' then '.join(steps) or 'nothing'}")
    ignore = bool(data["model"].get("ignore_merges", False))
    name = _KNOWN[steps][ignore]
    if name is not None:
        return name
    # Where merges lead to every token, taking a whole word for its token changes nothing.
    if not merges_reach_all(path, data):
        raise _unknown(path, f"has ignore_merges {str(ignore).lower()}, for which llama.cpp has no such pre-tokenizer")
    return next(other for other in _KNOWN[steps] if other)


def _names(steps: tuple[str, ...]) -> list[str]:
    return [*_ALIKE.get(steps, "").split(), *(name for name in _KNOWN[steps] if name)]


def _unknown(path: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the tokenizer is none that llama.cpp knows: neither its hash nor its structure is ({what})"
    )


def flatten(part: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a ``Sequence`` (or of a single step, or of null), nested ones in place."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    return [step for child in part.get(inner) or [] for step in flatten(child, inner)]


def _steps(path: Path, pre_tokenizer: Any) -> tuple[str, ...]:
    steps: list[str] = []
    for step in flatten(pre_tokenizer, "pretokenizers"):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise _unknown(path, "puts a space before every text, which llama.cpp does not do for byte-level BPE")
            steps += [_GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits":
            steps.append(_DIGITS if step.get("individual_digits") else "runs of digits")
        elif kind == "Split":
            steps.append(_split(path, step))
        else:
            raise _unknown(path, f"uses {kind}")
    return tuple(steps)


def _split(path: Path, step: dict[str, Any]) -> str:
    pattern = step.get("pattern") or {}
    # Keeping the matches and dropping the rest is the same for expressions that leave no rest, as all known ones do.
    isolated = step.get("behavior") == "Isolated" or (step.get("behavior") == "Removed" and step.get("invert"))
    if not isolated or "Regex" not in pattern:
        raise _unknown(path, f"splits at {pattern} ({step.get('behavior')})")
    return pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")


def merge_pairs(path: Path, merges: Any) -> list[tuple[str, str]]:
    """Merges of either of tokenizer.json's spellings, as pairs.

    Raises:
        SourceError: anything else.
    """
    pairs: list[tuple[str, str]] = []
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise SourceError(f"{path}: {merge!r} is no merge of two tokens; download it again")
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise SourceError(f"{path}: has no merges; download it again")
    return pairs


def merges_reach_all(path: Path, data: dict[str, Any]) -> bool:
    """Whether BPE turns the text of each token of the vocabulary into that token."""
    from tokenizers.models import BPE

    vocab = data["model"]["vocab"]
    model = BPE(vocab=vocab, merges=merge_pairs(path, data["model"].get("merges")))
    added = {token["content"] for token in data.get("added_tokens") or []}
    return all(len(model.tokenize(token)) == 1 for token in vocab if token not in added)
