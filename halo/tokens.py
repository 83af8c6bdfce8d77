"""Token ids of a text, by the tokenizer that will run: llama.cpp's, in the worker process, from the output's own
metadata."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo.checkpoint.base import Checkpoint
from halo.gguf_file import header_bytes
from halo.runtime import LoadOptions, Worker


@dataclass(frozen=True)
class Tokens:
    """A text's ids, int32 of shape (n,), and the id that opens every window (None where the model wants none)."""

    ids: np.ndarray
    bos: int | None


def tokenize(checkpoint: Checkpoint, text: str) -> Tokens:
    """Tokenise with a GGUF that holds the vocabulary and no tensors.

    Raises:
        RuntimeFailure: llama.cpp refuses the vocabulary.
    """
    with tempfile.TemporaryDirectory(prefix="halo-vocab-") as folder:
        path = Path(folder) / "vocab.gguf"
        path.write_bytes(header_bytes(checkpoint.metadata, []))
        with Worker() as worker:
            info = worker.load(path, LoadOptions(vocab_only=True))
            ids = worker.tokenize(text, add_special=False, parse_special=False)
    return Tokens(np.asarray(ids, np.int32), info.bos if info.add_bos and info.bos >= 0 else None)
