"""What a checkpoint is to the rest of HALO, whatever it was read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from halo.errors import SourceError
from halo.gguf_file import Metadata

# Rows are read in pieces of about this many weights, so that the largest tensor (the embedding) never stands in memory
# whole: 16 M weights are 64 MB as float32.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Tensor:
    """A tensor under its GGUF name, read lazily.

    Attributes:
        shape: outermost first: (rows, row length) of a matrix, (n,) of a vector.
        source_type: how the source stores it: ``F32``, ``F16``, ``BF16`` or a quantised type's name.
        reader: ``reader(start, stop)`` gives rows as float32, shape (stop - start, *shape[1:]); a vector counts as n
            rows of one number and comes as shape (stop - start,).
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    reader: Callable[[int, int], np.ndarray]

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def row_len(self) -> int:
        return self.shape[-1]

    def read(self) -> np.ndarray:
        """The whole tensor as float32, shape ``shape``."""
        return self.reader(0, self.shape[0])

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows) in order, each of about ``CHUNK_ELEMENTS`` weights."""
        step = max(1, CHUNK_ELEMENTS // max(1, self.n_elements // self.shape[0]))
        for start in range(0, self.shape[0], step):
            yield start, self.reader(start, min(start + step, self.shape[0]))


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of an architecture, read from GGUF metadata whatever the source was.

    ``get`` looks up ``<architecture>.<key>``.
    """

    architecture: str
    metadata: Metadata

    def get(self, key: str, default: Any = None) -> Any:
        found = self.metadata.get(f"{self.architecture}.{key}")
        return default if found is None else found.value

    def need(self, key: str) -> Any:
        """As ``get``; SourceError when the metadata has no such key."""
        value = self.get(key)
        if value is None:
            raise SourceError(f"the model's metadata has no {self.architecture}.{key}; the source is incomplete")
        return value

    @property
    def n_blocks(self) -> int:
        return int(self.need("block_count"))

    @property
    def n_embd(self) -> int:
        return int(self.need("embedding_length"))

    @property
    def n_heads(self) -> int:
        return int(np.max(self.need("attention.head_count")))

    @property
    def n_kv_heads(self) -> int:
        return int(np.max(self.get("attention.head_count_kv", self.n_heads)))

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length", self.n_embd // self.n_heads))

    @property
    def context_length(self) -> int:
        return int(self.get("context_length", 0))


@dataclass
class Checkpoint:
    """A model as HALO sees it.

    Attributes:
        path: the folder or file.
        kind: ``huggingface`` or ``gguf``.
        architecture: GGUF's name of it (``llama``, ``qwen2``, ``qwen3``, ``gemma3`` or any other of a GGUF source).
        metadata: all GGUF metadata of the output but what quantisation adds (file type, quantisation version).
        tensors: by GGUF name, in the order of the output file.
        notes: sentences the user should read (a quantised source, dropped tensors, ...).
        files: what the model was read from, for the source hash, in a fixed order.
    """

    path: Path
    kind: str
    architecture: str
    metadata: Metadata
    tensors: dict[str, Tensor]
    files: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def hyper(self) -> Hyperparameters:
        return Hyperparameters(self.architecture, self.metadata)

    @property
    def name(self) -> str:
        found = self.metadata.get("general.name")
        return found.value if found is not None else self.path.stem

    @property
    def n_params(self) -> int:
        return sum(t.n_elements for t in self.tensors.values())

    def non_finite(self, name: str) -> SourceError:
        """The error for a tensor with NaN or Inf in it."""
        return SourceError(f"{self.path}: {name} holds NaN or Inf; the checkpoint is damaged: get it again")
