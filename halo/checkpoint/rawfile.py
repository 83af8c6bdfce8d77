"""Plain file reads of tensor bytes as float32: no mmap, so that pages of a 16 GB model never count as HALO's memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halo.errors import SourceError

# numpy's view of each stored type, and bytes an element.
FLOAT_TYPES = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


def read_bytes(path: Path, offset: int, nbytes: int, name: str) -> np.ndarray:
    """``nbytes`` of a file as uint8. Opens the file anew, so any number of threads may call it.

    Raises:
        SourceError: the file is shorter than that by now, or cannot be read.
    """
    try:
        data = np.fromfile(path, np.uint8, nbytes, offset=offset)
    except OSError as error:
        raise SourceError(f"{path}: {name} cannot be read: {error.strerror or error}") from None
    if data.size != nbytes:
        raise SourceError(f"{path}: the data of {name} ends early; the file is cut off: download it again")
    return data


def to_float32(data: np.ndarray, kind: str) -> np.ndarray:
    """Flat float32 from ``F64``, ``F32``, ``F16`` or ``BF16`` bytes (bfloat16 is float32's upper half)."""
    numbers = data.view(FLOAT_TYPES[kind][0])
    if kind == "BF16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32, copy=False)


@dataclass(frozen=True)
class FloatRows:
    """A reader of rows of a plain float tensor, as ``Tensor.reader`` wants it.

    Attributes:
        shape: outermost first; rows are slices along the first axis.
        kind: a key of ``FLOAT_TYPES``.
        offset: of the data, from the start of the file, in bytes.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def __call__(self, start: int, stop: int) -> np.ndarray:
        per_row = int(np.prod(self.shape[1:], dtype=np.int64)) * FLOAT_TYPES[self.kind][1]
        data = read_bytes(self.path, self.offset + start * per_row, (stop - start) * per_row, self.name)
        return to_float32(data, self.kind).reshape(stop - start, *self.shape[1:])
