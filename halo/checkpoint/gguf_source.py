"""GGUF files as sources: metadata copied as it is, tensors dequantised row by row when they are asked for."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo.checkpoint.base import Checkpoint, Tensor
from halo.checkpoint.rawfile import FLOAT_TYPES, FloatRows, read_bytes
from halo.errors import SourceError, UnsupportedError
from halo.gguf_file import Header, Metadata, TensorInfo, read_header
from halo.gguf_types import TYPES

# What ggml turns into float32 beyond the types HALO writes (``to_float`` of its type traits).
_READABLE = {name for name, kind in TYPES.items() if kind.family != "float"} | {"TQ1_0", "TQ2_0", "MXFP4"}
_DROPPED = {"general.file_type", "general.quantization_version"}
_DROPPED_PREFIXES = ("split.", "quantize.imatrix.")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class _QuantisedRows:
    """A reader of rows of a quantised tensor, as ``Tensor.reader`` wants it."""

    path: Path
    info: TensorInfo

    def __call__(self, start: int, stop: int) -> np.ndarray:
        shape, info = self.info.shape, self.info
        if len(shape) == 1:
            return self._rows(0, 1)[0, start:stop]
        inner = math.prod(shape[1:-1])
        return self._rows(start * inner, stop * inner).reshape(stop - start, *info.shape[1:])

    def _rows(self, start: int, stop: int) -> np.ndarray:
        from halo import ggml

        info = self.info
        row_bytes = info.nbytes // math.prod(info.shape[:-1])
        data = read_bytes(self.path, info.offset + start * row_bytes, (stop - start) * row_bytes, info.name)
        return ggml.dequantize(data, int(info.type), stop - start, info.shape[-1])


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or all shards of a split one.

    Raises:
        SourceError: damaged, cut off, a shard missing, or without an architecture.
        UnsupportedError: a tensor of a type that cannot be turned into float32.
    """
    headers = _headers(path)
    metadata = _kept(headers[0].metadata)
    architecture = metadata.get("general.architecture")
    if architecture is None or not isinstance(architecture.value, str) or not architecture.value:
        raise SourceError(f"{path}: has no general.architecture, so it holds no model; give HALO a model's GGUF")
    tensors: dict[str, Tensor] = {}
    for header in headers:
        for info in header.tensors.values():
            if info.name in tensors:
                raise SourceError(f"{header.path}: {info.name} is also in another shard; download the shards again")
            tensors[info.name] = _tensor(header.path, info)
    if not tensors:
        raise SourceError(f"{path}: holds no tensors (a vocabulary only?); give HALO a model's GGUF")
    files = [header.path for header in headers]
    return Checkpoint(path, "gguf", architecture.value, metadata, tensors, files, _notes(tensors))


def _kept(metadata: Metadata) -> Metadata:
    return {
        key: field for key, field in metadata.items() if key not in _DROPPED and not key.startswith(_DROPPED_PREFIXES)
    }


def _tensor(path: Path, info: TensorInfo) -> Tensor:
    kind = info.type.name
    if not info.name.isprintable():
        raise SourceError(
            f"{path}: a tensor has the impossible name {info.name!r}; the file is damaged: download it again"
        )
    # The header's check multiplies 64-bit numbers, which a forged shape can wrap round.
    if math.prod(info.shape) > info.nbytes * 64:
        raise SourceError(
            f"{path}: impossible shape {list(info.shape)} of {info.name}; the file is damaged: download it again"
        )
    if kind in FLOAT_TYPES:
        return Tensor(info.name, info.shape, kind, FloatRows(path, info.name, kind, info.shape, info.offset))
    if kind not in _READABLE:
        raise UnsupportedError(
            f"{path}: {info.name} is stored as {kind}, which HALO cannot turn into numbers to quantise"
        )
    return Tensor(info.name, info.shape, kind, _QuantisedRows(path, info))


def _notes(tensors: dict[str, Tensor]) -> list[str]:
    counts = Counter(tensor.source_type for tensor in tensors.values() if tensor.source_type not in FLOAT_TYPES)
    if not counts:
        return []
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    return [
        f"The source is already quantised ({listed} of {len(tensors)} tensors): it is dequantised and quantised again, "
        "which cannot be better than starting from the float checkpoint."
    ]


def _headers(path: Path) -> list[Header]:
    first = read_header(path)
    count_field = first.metadata.get("split.count")
    count = count_field.value if count_field is not None else 1
    if not isinstance(count, int) or count <= 1:
        return [first]
    named = _SHARD.match(path.name)
    if named is None or int(named[3]) != count:
        raise SourceError(
            f"{path}: one of {count} shards, but not named NAME-00001-of-{count:05}.gguf; give it its name back"
        )
    shards = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise SourceError(f"{missing}: missing; the model is split into {count} shards: download them all")
    return [first if shard == path else read_header(shard) for shard in shards]
