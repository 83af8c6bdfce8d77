"""safetensors, strictly: every length, offset, type and shape is checked against the file before it is believed.

The format: 8 bytes little-endian header length, a JSON object of ``{name: {dtype, shape, data_offsets}}``, the data
(https://github.com/huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from halo.checkpoint.rawfile import FLOAT_TYPES, FloatRows
from halo.errors import SourceError, UnsupportedError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER = 100_000_000  # safetensors' own limit
_OTHER_TYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
_AGAIN = "the file is damaged or cut off: download it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        kind: safetensors' type name, such as ``BF16``.
        offset: of the data, from the start of the file, in bytes.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def rows(self) -> FloatRows:
        """A float32 reader of row ranges.

        Raises:
            UnsupportedError: the tensor holds no floating-point numbers.
        """
        if self.kind not in FLOAT_TYPES:
            raise UnsupportedError(
                f"{self.path.name}: {self.name} is stored as {self.kind}: the checkpoint is already quantised; "
                "give HALO the float checkpoint it was made from"
            )
        return FloatRows(self.path, self.name, self.kind, self.shape, self.offset)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their data.

    Raises:
        SourceError: not a safetensors file, cut off, or with impossible lengths, offsets, types or shapes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(size - 8, _MAX_HEADER):
                raise SourceError(f"{path}: impossible header length {length} in a file of {size} bytes; {_AGAIN}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{path}: its header is no JSON; {_AGAIN}") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path}: its header is no JSON object; {_AGAIN}")
    header.pop("__metadata__", None)
    odd = next((name for name in header if not name.isprintable()), None)
    if odd is not None:
        raise SourceError(f"{path}: a tensor has the impossible name {odd!r}; {_AGAIN}")
    base = 8 + length
    found = [_entry(path, base, size, name, entry) for name, entry in header.items()]
    found.sort(key=lambda item: (item[0].offset, item[1]))
    _check_overlap(path, found)
    return {tensor.name: tensor for tensor, _ in found}


def _entry(path: Path, base: int, size: int, name: str, entry: Any) -> tuple[StoredTensor, int]:
    try:
        kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise SourceError(f"{path}: the header entry of {name} is malformed; {_AGAIN}") from None
    if not (isinstance(kind, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))):
        raise SourceError(f"{path}: the header entry of {name} is malformed; {_AGAIN}")
    width = FLOAT_TYPES[kind][1] if kind in FLOAT_TYPES else _OTHER_TYPES.get(kind)
    if width is None:
        raise UnsupportedError(
            f"{path}: {name} is stored as {kind}, which HALO does not read (F64, F32, F16 and BF16 it does)"
        )
    if stop - start != math.prod(shape) * width:
        raise SourceError(
            f"{path}: {name} of shape {list(shape)} and type {kind} does not fill its {stop - start} bytes; {_AGAIN}"
        )
    if base + stop > size:
        raise SourceError(
            f"{path}: the data of {name} runs past the end of the file (needs {base + stop} bytes, has {size}); "
            "the file is cut off: download it again"
        )
    return StoredTensor(path, name, kind, shape, base + start), base + stop


def _check_overlap(path: Path, found: list[tuple[StoredTensor, int]]) -> None:
    for (before, end), (after, _) in pairwise(found):
        if after.offset < end:
            raise SourceError(f"{path}: the data of {before.name} and {after.name} overlap; {_AGAIN}")


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint folder.

    Attributes:
        tensors: by Hugging Face name.
        files: what was read, the index first, then the shards by name.
    """

    tensors: dict[str, StoredTensor]
    files: list[Path]


def read_weights(folder: Path) -> Weights:
    """The tensors of a folder: one ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.

    Raises:
        SourceError: no safetensors, a missing shard, or a shard without a tensor that the index names.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _read_sharded(folder, index)
    single = folder / SINGLE_NAME
    if not single.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if len(others) != 1:
            raise _no_weights(folder, others)
        single = others[0]
    return Weights(read_safetensors(single), [single])


def _no_weights(folder: Path, others: list[Path]) -> SourceError:
    if others:
        return SourceError(f"{folder}: {len(others)} safetensors files but no {INDEX_NAME}; download that file too")
    for pattern in ("pytorch_model*.bin", "consolidated*.pth", "*.bin", "*.pt"):
        if any(folder.glob(pattern)):
            return SourceError(
                f"{folder}: the weights are PyTorch pickles ({next(folder.glob(pattern)).name}), which can run code "
                "when loaded; convert them to safetensors (AutoModelForCausalLM.from_pretrained, then save_pretrained)"
            )
    return SourceError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; download the weights into it")


def _read_sharded(folder: Path, index: Path) -> Weights:
    where = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    files = [index]
    for shard in sorted(set(where.values())):
        path = folder / shard
        wanted = [name for name, file in where.items() if file == shard]
        if not path.is_file():
            raise SourceError(
                f"{path}: missing, and {INDEX_NAME} says it holds {wanted[0]} and {len(wanted) - 1} more; download it"
            )
        stored = read_safetensors(path)
        lost = next((name for name in wanted if name not in stored), None)
        if lost is not None:
            raise SourceError(f"{path}: {INDEX_NAME} says it holds {lost}, but it does not; download both files again")
        twice = next((name for name in stored if name in tensors), None)
        if twice is not None:
            raise SourceError(f"{path}: {twice} is also in {tensors[twice].path.name}; download the checkpoint again")
        tensors |= stored
        files.append(path)
    return Weights(tensors, files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{index}: has no usable weight_map; download it again") from None
    outside = next((file for file in where.values() if Path(file).name != file), None)
    if outside is not None:
        raise SourceError(f"{index}: names {outside}, which is not a file of this folder; download it again")
    return where
