"""llama.cpp's own quantisers, called through ctypes (``ggml/include/ggml.h``: ``ggml_quantize_chunk``).

The shared library of the installed llama-cpp-python wheel is used, so the bits are those that ``llama-quantize`` of the
same build writes. ctypes frees the GIL during a call: threads over row ranges use all cores, and since every row is
quantised by itself the result does not depend on their number.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from halo.errors import RuntimeFailure

_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)

# 1 to 30 ms a call: long enough that thread hand-over costs nothing, short enough that all threads end together.
_ELEMENTS_PER_CALL = 1 << 16


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits``; its layout is checked in ``_library`` against the exported functions."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


def library_dir() -> Path:
    """Folder of the wheel's shared libraries.

    Raises:
        RuntimeFailure: llama-cpp-python is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeFailure("llama-cpp-python is not installed: pip install llama-cpp-python")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    folder = library_dir()
    pattern = {"darwin": "libggml-base*.dylib", "win32": "ggml-base*.dll"}.get(sys.platform, "libggml-base.so*")
    found = sorted(folder.glob(pattern))
    if not found:
        raise RuntimeFailure(f"{folder}: no {pattern} in it; reinstall llama-cpp-python")
    lib = ctypes.CDLL(str(found[0]))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    for name in ("ggml_blck_size", "ggml_type_size"):
        getattr(lib, name).restype = ctypes.c_int64
        getattr(lib, name).argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_init.restype = None
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    q4_k = lib.ggml_get_type_traits(12).contents
    if (q4_k.type_name, q4_k.blck_size, q4_k.type_size) != (b"q4_K", 256, 144):
        raise RuntimeFailure(
            f"{found[0]}: ggml_type_traits has an unknown layout; HALO supports llama-cpp-python 0.3.36"
        )
    return lib


def block_size(type_id: int) -> int:
    """Weights in a block of the ggml type."""
    return int(_library().ggml_blck_size(type_id))


def type_size(type_id: int) -> int:
    """Bytes of a block of the ggml type."""
    return int(_library().ggml_type_size(type_id))


@lru_cache(maxsize=64)
def _prepare(type_id: int) -> None:
    # The IQ tables are built once and not under a lock of ours: build them before threads start.
    _library().ggml_quantize_init(type_id)


def _row_spans(n_rows: int, row_len: int) -> list[tuple[int, int]]:
    step = max(1, _ELEMENTS_PER_CALL // row_len)
    return [(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


def _each(
    pool: ThreadPoolExecutor | None, work: Callable[[tuple[int, int]], None], spans: list[tuple[int, int]]
) -> None:
    for _ in pool.map(work, spans) if pool else map(work, spans):
        pass


def quantize(
    rows: np.ndarray, type_id: int, importance: np.ndarray | None, pool: ThreadPoolExecutor | None = None
) -> np.ndarray:
    """Quantise float32 rows.

    Args:
        rows: shape (n_rows, row_len), float32, C order; row_len a multiple of the type's block.
        type_id: ggml type number.
        importance: shape (row_len,), float32: the imatrix entry (mean squared input of each column), or None.
        pool: threads to share the rows; None for the calling thread.

    Returns:
        uint8 of shape (n_rows, row bytes).
    """
    n_rows, row_len = rows.shape
    lib = _library()
    row_bytes = row_len // block_size(type_id) * type_size(type_id)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if weights is None and lib.ggml_quantize_requires_imatrix(type_id):
        weights = np.ones(row_len, np.float32)
    out = np.empty((n_rows, row_bytes), np.uint8)
    _prepare(type_id)

    def one(span: tuple[int, int]) -> None:
        start, stop = span
        lib.ggml_quantize_chunk(
            type_id,
            rows.ctypes.data + start * row_len * 4,
            out.ctypes.data + start * row_bytes,
            0,
            stop - start,
            row_len,
            None if weights is None else weights.ctypes.data,
        )

    _each(pool, one, _row_spans(n_rows, row_len))
    return out


def dequantize(
    data: np.ndarray, type_id: int, n_rows: int, row_len: int, pool: ThreadPoolExecutor | None = None
) -> np.ndarray:
    """Float32 of shape (n_rows, row_len) from the bytes of a quantised tensor (``to_float`` of the type's traits)."""
    out = np.empty((n_rows, row_len), np.float32)
    to_float = _ToFloat(_library().ggml_get_type_traits(type_id).contents.to_float)
    row_bytes = row_len // block_size(type_id) * type_size(type_id)
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if flat.size != n_rows * row_bytes:
        raise ValueError(f"{flat.size} bytes given, {n_rows * row_bytes} expected")

    def one(span: tuple[int, int]) -> None:
        start, stop = span
        target = ctypes.cast(out.ctypes.data + start * row_len * 4, ctypes.POINTER(ctypes.c_float))
        to_float(flat.ctypes.data + start * row_bytes, target, (stop - start) * row_len)

    _prepare(type_id)
    _each(pool, one, _row_spans(n_rows, row_len))
    return out
