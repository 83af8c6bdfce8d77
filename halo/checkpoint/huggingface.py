"""Hugging Face folders as sources: config.json, safetensors and a tokenizer, seen as the GGUF they will become."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halo.checkpoint.base import Checkpoint
from halo.checkpoint.config import read_json
from halo.checkpoint.layout import gguf_tensors
from halo.checkpoint.model import model_metadata, read_model
from halo.checkpoint.safetensors_file import read_weights
from halo.checkpoint.vocab import TOKENIZER_FILES, read_vocab
from halo.gguf_file import Field, Metadata


def open_huggingface(folder: Path) -> Checkpoint:
    """A folder with config.json, safetensors and a tokenizer.

    Raises:
        SourceError: a file missing or damaged, or tensors that contradict config.json.
        UnsupportedError: a model or tokenizer that llama.cpp does not compute exactly.
    """
    raw = read_json(folder / "config.json")
    model = read_model(folder / "config.json", raw)
    weights = read_weights(folder)
    tensors, tensor_notes = gguf_tensors(model, weights)
    vocab = read_vocab(folder, raw, model.n_vocab)
    architecture = model.family.architecture
    metadata: Metadata = {
        "general.architecture": Field.string(architecture),
        "general.type": Field.string("model"),
        "general.name": Field.string(_name(folder, raw)),
    }
    if license_name := _license(folder):
        metadata["general.license"] = Field.string(license_name)
    metadata |= model_metadata(model) | vocab.metadata
    files = [folder / "config.json", *(f for n in TOKENIZER_FILES if (f := folder / n).is_file()), *weights.files]
    notes = [*model.notes, *tensor_notes, *vocab.notes]
    return Checkpoint(folder, "huggingface", architecture, metadata, tensors, files, notes)


def _name(folder: Path, raw: dict[str, Any]) -> str:
    given = raw.get("_name_or_path")
    last = re.split(r"[/\\]", given.rstrip("/\\"))[-1] if isinstance(given, str) else ""
    return last or folder.resolve().name


def _license(folder: Path) -> str | None:
    """``license:`` of the README's front matter (a YAML block between two lines of dashes)."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
