"""GGUF files, strictly: every count, length and offset is checked against the file before it is believed.

Reading gives metadata fields as raw bytes (decoded on demand), so a source's metadata can be copied as it is. Writing
streams tensor by tensor; the size of the whole file is known before the first byte (``ggml/docs/gguf.md``).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from halo.errors import SourceError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_NAME = 127  # GGML_MAX_NAME - 1 (ggml.h)

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_NUMPY = {"B": "u1", "b": "i1", "H": "<u2", "h": "<i2", "I": "<u4", "i": "<i4", "f": "<f4", "?": "?", "Q": "<u8", "q":
"<i8", "d": "<f8"}  # fmt: skip


def pad_to(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def _pack_string(text: str | bytes) -> bytes:
    raw = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


@dataclass(frozen=True)
class Field:
    """A metadata value in its file encoding: the type and the bytes that follow it."""

    type: GGUFValueType
    raw: bytes

    @classmethod
    def string(cls, text: str) -> Field:
        return cls(GGUFValueType.STRING, _pack_string(text))

    @classmethod
    def uint32(cls, number: int) -> Field:
        return cls(GGUFValueType.UINT32, struct.pack("<I", number))

    @classmethod
    def uint64(cls, number: int) -> Field:
        return cls(GGUFValueType.UINT64, struct.pack("<Q", number))

    @classmethod
    def float32(cls, number: float) -> Field:
        return cls(GGUFValueType.FLOAT32, struct.pack("<f", number))

    @classmethod
    def boolean(cls, flag: bool) -> Field:
        return cls(GGUFValueType.BOOL, struct.pack("<?", flag))

    @classmethod
    def strings(cls, items: Sequence[str | bytes]) -> Field:
        head = struct.pack("<IQ", GGUFValueType.STRING, len(items))
        return cls(GGUFValueType.ARRAY, head + b"".join(map(_pack_string, items)))

    @classmethod
    def array(cls, items: Sequence[int | float | bool], of: GGUFValueType) -> Field:
        data = np.asarray(items, dtype=_NUMPY[_SCALARS[of]]).tobytes()
        return cls(GGUFValueType.ARRAY, struct.pack("<IQ", of, len(items)) + data)

    @property
    def value(self) -> Any:
        """The decoded value: int, float, bool, str, or a list (strings) or numpy array (numbers)."""
        if self.type in _SCALARS:
            return struct.unpack("<" + _SCALARS[self.type], self.raw)[0]
        if self.type == GGUFValueType.STRING:
            return self.raw[8:].decode("utf-8", errors="replace")
        item_type, count = struct.unpack_from("<IQ", self.raw)
        if item_type in _SCALARS:
            return np.frombuffer(self.raw, _NUMPY[_SCALARS[GGUFValueType(item_type)]], count, 12)
        return [raw.decode("utf-8", errors="replace") for raw in self.byte_strings()]

    def byte_strings(self) -> list[bytes]:
        """The items of an array of strings, undecoded (a token may be half a UTF-8 character)."""
        _, count = struct.unpack_from("<IQ", self.raw)
        items, at = [], 12
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", self.raw, at)
            items.append(self.raw[at + 8 : at + 8 + length])
            at += 8 + length
        return items


Metadata = dict[str, Field]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
        shape: outermost first, as numpy has it (rows, row length); the file stores the reverse.
        offset: of the data, from the start of the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its tensor data."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    alignment: int


def tensor_nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor's data.

    Raises:
        ValueError: the row length is no multiple of the type's block.
    """
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} do not fit {kind.name}'s blocks of {block}")
    # Python's integers: a forged shape must not wrap around.
    return math.prod(shape) // block * size


class _Cursor:
    """A position in a mapped file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def fail(self, what: str) -> SourceError:
        return SourceError(
            f"{self.path}: {what} at byte {self.at} of {self.size}; the file is damaged or cut off: download it again"
        )

    def skip(self, count: int, what: str) -> int:
        if count > self.size - self.at:
            raise self.fail(f"{what} runs past the end of the file")
        start = self.at
        self.at += count
        return start

    def number(self, code: str, what: str) -> int:
        start = self.skip(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self, what: str) -> bytes:
        length = self.number("Q", what)
        start = self.skip(length, what)
        return self.data[start : start + length]

    def count(self, least_bytes: int, what: str) -> int:
        number = self.number("Q", what)
        if number * least_bytes > self.size - self.at:
            raise self.fail(f"impossible {what} {number}")
        return number

    def field(self, key: str) -> Field:
        code = self.number("I", f"the type of '{key}'")
        start = self.at
        if code in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[GGUFValueType(code)]), f"'{key}'")
        elif code == GGUFValueType.STRING:
            self.string(f"'{key}'")
        elif code == GGUFValueType.ARRAY:
            self._skip_array(key)
        else:
            raise self.fail(f"unknown value type {code} of '{key}'")
        return Field(GGUFValueType(code), self.data[start : self.at])

    def _skip_array(self, key: str) -> None:
        item = self.number("I", f"the type of '{key}'")
        if item in _SCALARS:
            width = struct.calcsize(_SCALARS[GGUFValueType(item)])
            self.skip(self.count(width, f"length of '{key}'") * width, f"'{key}'")
        elif item == GGUFValueType.STRING:
            for _ in range(self.count(8, f"length of '{key}'")):
                self.string(f"'{key}'")
        else:
            raise self.fail(f"unknown array type {item} of '{key}'")

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string("a tensor's name").decode("utf-8", errors="replace")
        n_dims = self.number("I", f"the dimensions of {name}")
        if not 1 <= n_dims <= _MAX_DIMS or len(name) > _MAX_NAME:
            raise self.fail(f"impossible number of dimensions {n_dims} of {name[:_MAX_NAME]}")
        shape = tuple(self.number("Q", f"the shape of {name}") for _ in range(n_dims))[::-1]
        code = self.number("I", f"the type of {name}")
        offset = self.number("Q", f"the offset of {name}")
        try:
            return name, shape, GGMLQuantizationType(code), offset
        except ValueError:
            raise self.fail(f"unknown tensor type {code} of {name}") from None


def read_header(path: Path) -> Header:
    """Read and check all of a GGUF file but the tensor data.

    Raises:
        SourceError: not a GGUF file, of an unknown version, cut off, or with impossible counts.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, path))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read as GGUF: {error}") from None


def _parse(cursor: _Cursor) -> Header:
    path = cursor.path
    if cursor.size < 24 or cursor.data[:4] != MAGIC:
        raise SourceError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    cursor.at = 4
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        raise SourceError(
            f"{path}: GGUF version {version} is not supported (2 and 3 are); convert it with a newer llama.cpp"
        )
    n_tensors = cursor.count(24, "number of tensors")
    n_fields = cursor.count(13, "number of metadata fields")
    metadata: Metadata = {}
    for _ in range(n_fields):
        key = cursor.string("a metadata key").decode("utf-8", errors="replace")
        metadata[key] = cursor.field(key)
    entries = [cursor.tensor() for _ in range(n_tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"impossible alignment {alignment}")
    base = pad_to(cursor.at, alignment)
    tensors = {entry[0]: _checked(cursor, base, *entry) for entry in entries}
    if len(tensors) != n_tensors:
        raise cursor.fail("two tensors have the same name")
    return Header(path, metadata, tensors, alignment)


def _checked(
    cursor: _Cursor, base: int, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> TensorInfo:
    if any(n < 1 for n in shape) or any(n > cursor.size * 64 for n in shape):
        raise cursor.fail(f"impossible shape {shape} of {name}")
    try:
        nbytes = tensor_nbytes(shape, kind)
    except ValueError as error:
        raise cursor.fail(f"{name}: {error}") from None
    if nbytes < 0 or base + offset + nbytes > cursor.size:
        raise SourceError(
            f"{cursor.path}: the data of {name} runs past the end of the file "
            f"(needs {base + offset + nbytes} bytes, has {cursor.size}); the file is cut off: download it again"
        )
    return TensorInfo(name, shape, kind, base + offset, nbytes)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    type_id: int

    @property
    def nbytes(self) -> int:
        return tensor_nbytes(self.shape, GGMLQuantizationType(self.type_id))


def header_bytes(metadata: Mapping[str, Field], entries: Sequence[Entry], alignment: int = DEFAULT_ALIGNMENT) -> bytes:
    """All that comes before the tensor data, padded. Its length does not depend on the tensors' types."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(entries), len(metadata))]
    for key, field in metadata.items():
        out += [_pack_string(key), struct.pack("<I", field.type), field.raw]
    offset = 0
    for entry in entries:
        dims = entry.shape[::-1]
        out += [_pack_string(entry.name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type_id, offset)]
        offset += pad_to(entry.nbytes, alignment)
    head = b"".join(out)
    return head + b"\0" * (pad_to(len(head), alignment) - len(head))


def write_tensor(
    file: BinaryIO, chunks: Iterable[np.ndarray], expected: int, alignment: int = DEFAULT_ALIGNMENT
) -> None:
    """Append one tensor's bytes and its padding.

    Raises:
        ValueError: the chunks do not add up to ``expected`` bytes.
    """
    written = 0
    for chunk in chunks:
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
        file.write(data.data)
        written += data.size
    if written != expected:
        raise ValueError(f"{written} bytes written, {expected} announced")
    file.write(b"\0" * (pad_to(written, alignment) - written))
