"""What a path holds, and the checkpoint in it."""

from __future__ import annotations

from pathlib import Path

from halo.checkpoint.base import Checkpoint
from halo.errors import SourceError

EXPECTED = (
    "HALO reads a Hugging Face folder (config.json, *.safetensors and a tokenizer) of Llama, SmolLM, TinyLlama, "
    "Mistral, Qwen2/2.5, Qwen3 or Gemma 3, or any GGUF file"
)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file, or a folder with one GGUF (such as a HALO bundle).

    Reads headers and the tokenizer only; tensors are read when asked for.

    Raises:
        SourceError: nothing there that HALO reads, or it is damaged.
        UnsupportedError: a model that HALO cannot convert exactly.
    """
    path = Path(path)
    try:
        return _open(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        if (path / "config.json").is_file():
            from halo.checkpoint.huggingface import open_huggingface

            return open_huggingface(path)
        return _open_gguf(_only_gguf(path))
    if not path.exists():
        raise SourceError(f"{path}: does not exist; {EXPECTED}")
    if path.suffix.lower() != ".gguf":
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SourceError(f"{path}: neither a folder nor a GGUF file; {EXPECTED}")
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    from halo.checkpoint.gguf_source import open_gguf

    return open_gguf(path)


def _only_gguf(folder: Path) -> Path:
    bundle = folder / "model.gguf"
    found = [bundle] if bundle.is_file() else sorted(folder.glob("*.gguf"))
    heads = [file for file in found if "-of-" not in file.stem or "-00001-of-" in file.name]
    if len(heads) == 1:
        return heads[0]
    what = f"{len(found)} GGUF files: name one of them" if found else "no config.json and no GGUF file in it"
    raise SourceError(f"{folder}: {what}; {EXPECTED}")
