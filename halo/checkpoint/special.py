"""Added and special tokens, what is put before and after a text, and the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from halo.checkpoint.config import read_json, read_optional_json
from halo.checkpoint.structure import flatten
from halo.errors import SourceError
from halo.gguf_file import Field, Metadata

# The key of each special token's id (llama.cpp spells "separator" with an e).
_ID_KEYS = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
    "pad": "padding_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Added:
    """A token that is looked for in raw text before anything else."""

    id: int
    text: str
    special: bool
    strips: bool


def looks_special(text: str) -> bool:
    """Whether the converter calls a token a control token whatever the files say (does_token_look_special)."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_tokens(folder: Path, data: dict[str, Any], settings: dict[str, Any]) -> list[Added]:
    """Added tokens by id: of tokenizer.json, then of tokenizer_config.json, then of added_tokens.json.

    Raises:
        SourceError: an entry without a number or a text.
    """
    found: dict[int, Added] = {}
    decoder = settings.get("added_tokens_decoder")
    listed = [*(data.get("added_tokens") or [])]
    listed += (
        [{**(v if isinstance(v, dict) else {}), "id": k} for k, v in decoder.items()]
        if isinstance(decoder, dict)
        else []
    )
    listed += [{"content": k, "id": v} for k, v in read_optional_json(folder / "added_tokens.json").items()]
    for entry in listed:
        try:
            number, text = int(entry["id"]), entry["content"]
        except (KeyError, TypeError, ValueError):
            number, text = -1, None
        if number < 0 or not isinstance(text, str):
            raise SourceError(
                f"{folder}: an added token of the tokenizer has no id or no text; download the tokenizer again"
            )
        strips = any(entry.get(key) for key in ("lstrip", "rstrip", "single_word"))
        found.setdefault(number, Added(number, text, bool(entry.get("special")), strips))
    return [found[i] for i in sorted(found)]


def special_metadata(
    folder: Path,
    data: dict[str, Any],
    settings: dict[str, Any],
    config: dict[str, Any],
    texts: dict[int, str],
    added: list[Added],
) -> tuple[Metadata, list[str]]:
    """Ids of special tokens, whether they are put around a text, and the chat template.

    Follows gguf's SpecialVocab, with one addition: a token that tokenizer.json's template puts first is the BOS,
    whatever it is called elsewhere, since that is what transformers writes.
    """
    names = {
        **read_optional_json(folder / "special_tokens_map.json"),
        **{k: v for k, v in settings.items() if v is not None},
    }
    by_text = {text: i for i, text in texts.items()} | {token.text: token.id for token in added if token.id in texts}
    ids = {kind: i for kind in _ID_KEYS if (i := _special_id(kind, names, config, by_text, len(texts))) is not None}
    first, last, notes = _around(data, settings)
    if isinstance(first, str) and first in by_text:
        ids["bos"] = by_text[first]
    if isinstance(last, str) and by_text.get(last) != ids.get("eos"):
        notes.append(
            f"The original tokenizer ends texts with {last}, not its end-of-sequence token; llama.cpp does not."
        )
        last = False
    out: Metadata = {f"tokenizer.ggml.{_ID_KEYS[kind]}": Field.uint32(i) for kind, i in ids.items()}
    out["tokenizer.ggml.add_bos_token"] = Field.boolean(bool(first) and "bos" in ids)
    out["tokenizer.ggml.add_eos_token"] = Field.boolean(bool(last) and "eos" in ids)
    return out | _chat_template(folder, settings), notes


def _special_id(
    kind: str, names: dict[str, Any], config: dict[str, Any], by_text: dict[str, int], n: int
) -> int | None:
    entry = names.get(f"{kind}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    if isinstance(text, str) and text in by_text:
        return by_text[text]
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        number = holder.get(f"{kind}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and 0 <= number < n:
            return number
    return None


def _around(data: dict[str, Any], settings: dict[str, Any]) -> tuple[str | bool, str | bool, list[str]]:
    """What stands before and after a text: a token's text, or whether the BOS and EOS do; and notes."""
    wanted = [settings.get(f"add_{kind}_token") for kind in ("bos", "eos")]
    if not data:  # a tokenizer.model: transformers' defaults for Llama and Gemma
        return wanted[0] is not False, wanted[1] is True, []
    steps = flatten(data.get("post_processor"), "processors")
    if not steps:
        return wanted[0] is True, wanted[1] is True, []
    before: list[str] = []
    after: list[str] = []
    for step in steps:
        if step.get("type") in ("RobertaProcessing", "BertProcessing"):
            before, after = [step["cls"][0]], [step["sep"][0]]
        elif step.get("type") == "TemplateProcessing":
            before, after = _template(step.get("single") or [])
    notes = []
    if len(before) > 1 or len(after) > 1:
        notes.append(
            f"The original tokenizer puts {' '.join(before + after)} around a text; llama.cpp puts one token on a side."
        )
    return before[-1] if before else False, after[0] if after else False, notes


def _template(single: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    before: list[str] = []
    after: list[str] = []
    side = before
    for item in single:
        if "Sequence" in item:
            side = after
        elif "SpecialToken" in item:
            side.append(item["SpecialToken"]["id"])
    return before, after


def _chat_template(folder: Path, settings: dict[str, Any]) -> Metadata:
    """The template, from the first file that has one in transformers' order of search."""
    jinja, as_json = folder / "chat_template.jinja", folder / "chat_template.json"
    template = settings.get("chat_template")
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8", errors="replace")
    elif template is None and as_json.is_file():
        template = read_json(as_json).get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": Field.string(template)}
    return _named_templates(template) if isinstance(template, list) else {}


def _named_templates(templates: list[Any]) -> Metadata:
    out: Metadata = {}
    names: list[str] = []
    for entry in templates:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            continue
        if name == "default":
            out["tokenizer.chat_template"] = Field.string(text)
            continue
        name = "".join(c if c in ascii_letters + digits else "_" for c in name)
        out[f"tokenizer.chat_template.{name}"] = Field.string(text)
        names.append(name)
    if names:
        out["tokenizer.chat_templates"] = Field.strings(names)
    return out
