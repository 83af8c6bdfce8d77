"""From source to final GGUF, tensor by tensor: read, fold, quantise on all cores, write. No file in between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from halo import ggml
from halo.checkpoint.base import Checkpoint, Tensor
from halo.damage import importance_of
from halo.events import Listener, Progress
from halo.folding import Folding
from halo.gguf_file import Entry, Metadata, header_bytes, pad_to, write_tensor
from halo.gguf_types import TYPES, GGUFType
from halo.statistics import Statistics

_ALIGNMENT = 32


class HashingFile:
    """Writes on and keeps the SHA-256 of all that went through."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)


@dataclass(frozen=True)
class Written:
    """A finished GGUF: its size in bytes and its SHA-256."""

    nbytes: int
    sha256: str


def unquantised_type(tensor: Tensor) -> GGUFType:
    """The type of a tensor that is not quantised: vectors as float32, as llama.cpp keeps them; matrices as the source
    has them, or as float16."""
    if len(tensor.shape) == 1 or tensor.source_type == "F32":
        return TYPES["F32"]
    return TYPES[tensor.source_type] if tensor.source_type in ("F16", "BF16") else TYPES["F16"]


def entries(checkpoint: Checkpoint, chosen: Mapping[str, GGUFType]) -> list[Entry]:
    return [Entry(t.name, t.shape, chosen.get(t.name, unquantised_type(t)).id) for t in checkpoint.tensors.values()]


def file_bytes(metadata: Metadata, checkpoint: Checkpoint, chosen: Mapping[str, GGUFType]) -> int:
    """Size of the whole file, to the byte, before any of it is written."""
    listed = entries(checkpoint, chosen)
    return len(header_bytes(metadata, listed, _ALIGNMENT)) + sum(pad_to(e.nbytes, _ALIGNMENT) for e in listed)


def _encode_float(rows: np.ndarray, kind: GGUFType) -> np.ndarray:
    if kind.name == "F32":
        return rows
    if kind.name == "F16":
        return rows.astype(np.float16)
    bits = np.ascontiguousarray(rows).view(np.uint32)
    # Round to nearest, ties to even (ggml-impl.h: ggml_compute_fp32_to_bf16).
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _encoded(
    checkpoint: Checkpoint,
    tensor: Tensor,
    kind: GGUFType,
    importance: np.ndarray | None,
    folding: Folding,
    pool: ThreadPoolExecutor,
) -> Iterator[np.ndarray]:
    for start, rows in tensor.chunks():
        if not np.isfinite(rows).all():
            raise checkpoint.non_finite(tensor.name)
        rows = folding.apply(tensor.name, rows, slice(start, start + len(rows)))
        if kind.family == "float":
            yield _encode_float(rows, kind)
        else:
            yield ggml.quantize(rows.reshape(-1, tensor.row_len), kind.id, importance, pool)


def write_gguf(
    file: BinaryIO,
    checkpoint: Checkpoint,
    metadata: Metadata,
    chosen: Mapping[str, GGUFType],
    statistics: Statistics,
    folding: Folding,
    pool: ThreadPoolExecutor,
    listen: Listener,
) -> Written:
    """Write the whole file.

    Args:
        chosen: type by name of the quantised tensors; all others as ``unquantised_type`` says.

    Raises:
        SourceError: NaN or Inf in a tensor.
    """
    out = HashingFile(file)
    listed = entries(checkpoint, chosen)
    out.write(header_bytes(metadata, listed, _ALIGNMENT))
    total, done = sum(t.n_elements for t in checkpoint.tensors.values()), 0
    for entry, tensor in zip(listed, checkpoint.tensors.values(), strict=True):
        kind = chosen.get(tensor.name, unquantised_type(tensor))
        listen(Progress("quantise", done, total, "weights", f"{tensor.name} {kind.name}"))
        importance = folding.importance(tensor.name, importance_of(tensor.name, statistics))
        write_tensor(out, _encoded(checkpoint, tensor, kind, importance, folding, pool), entry.nbytes, _ALIGNMENT)  # type: ignore[arg-type]
        done += tensor.n_elements
    listen(Progress("quantise", total, total, "weights"))
    return Written(out.size, out.hash.hexdigest())
