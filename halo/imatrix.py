"""llama.cpp's importance matrix, GGUF format (``tools/imatrix/imatrix.cpp``: save_imatrix, load_imatrix)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from halo.errors import SourceError
from halo.gguf_file import Entry, Field, header_bytes, read_header, write_tensor
from halo.staging import staged_file
from halo.statistics import ActivationStatistics, Statistics

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = int(GGMLQuantizationType.F32)


def save(path: Path, statistics: Statistics, dataset: str, window: int, force: bool = False) -> None:
    """Write the second moments so that ``llama-quantize --imatrix`` takes them. Written under another name, then
    renamed.

    Raises:
        OutputError: the file exists (without ``force``) or cannot be written.
    """
    names = sorted(statistics)
    count = max(s.count for s in statistics.values())
    metadata = {
        "general.type": Field.string("imatrix"),
        "imatrix.datasets": Field.strings([dataset]),
        "imatrix.chunk_count": Field.uint32(-(-count // window)),
        "imatrix.chunk_size": Field.uint32(window),
    }
    entries, arrays = [], []
    for name in names:
        found = statistics[name]
        for suffix, data in (
            (_SUMS, (found.mean_square.astype(np.float64) * found.count).astype(np.float32)[None, :]),
            (_COUNTS, np.full((1, 1), found.count, np.float32)),
        ):
            entries.append(Entry(name + suffix, data.shape, _F32))
            arrays.append(data)
    with staged_file(path, force) as file:
        file.write(header_bytes(metadata, entries))
        for entry, data in zip(entries, arrays, strict=True):
            write_tensor(file, [data], entry.nbytes)


def load(path: Path) -> Statistics:
    """Read an imatrix. Of each tensor it has the second moments only; the other statistics are estimated from them
    (``ActivationStatistics.from_mean_square``). The experts of a mixture are averaged.

    Raises:
        SourceError: not a GGUF imatrix, or with counts of zero, NaN or negative sums in it.
    """
    header = read_header(path)
    kind = header.metadata.get("general.type")
    if kind is None or kind.value != "imatrix":
        raise SourceError(f"{path}: not an imatrix in GGUF format; write one with llama-imatrix --output-format gguf")
    out: Statistics = {}
    with open(path, "rb") as file:

        def array(name: str) -> np.ndarray:
            info = header.tensors[name]
            file.seek(info.offset)
            return np.frombuffer(file.read(info.nbytes), np.float32).reshape(info.shape)

        for name in header.tensors:
            if not name.endswith(_SUMS) or name[: -len(_SUMS)] + _COUNTS not in header.tensors:
                continue
            base = name[: -len(_SUMS)]
            sums, counts = np.atleast_2d(array(name)), array(base + _COUNTS).reshape(-1)
            used = counts > 0
            with np.errstate(all="ignore"):
                mean_square = (sums[used] / counts[used, None]).mean(axis=0) if used.any() else np.full(1, np.nan)
            if not np.isfinite(mean_square).all() or (mean_square < 0).any():
                raise SourceError(f"{path}: {base} has no usable entry; make the imatrix again from more text")
            out[base] = ActivationStatistics.from_mean_square(mean_square.astype(np.float32), int(counts.max()))
    if not out:
        raise SourceError(f"{path}: the imatrix holds no entries")
    return out
