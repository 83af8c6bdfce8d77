"""Frames on the pipes between HALO and its worker: a length-prefixed JSON header and an optional raw payload.

JSON and raw floats instead of pickle, so that a worker gone wrong can hand over wrong values but never code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from io import FileIO
from typing import Any

_PREFIX = struct.Struct("<IQ")

Header = dict[str, Any]
Allocate = Callable[[int], Any]


def write_frame(stream: FileIO, header: Header, payload: bytes | bytearray | memoryview = b"") -> None:
    """Write one frame to an unbuffered stream. Raises OSError when the other side is gone."""
    body = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
    _write_all(stream, memoryview(_PREFIX.pack(len(body), view.nbytes) + body))
    _write_all(stream, view)


def read_frame(stream: FileIO, allocate: Allocate = bytearray) -> tuple[Header, Any]:
    """Read one frame from an unbuffered stream; the payload goes into what ``allocate`` makes of its size in bytes.

    Raises EOFError when the other side is gone.
    """
    header_size, payload_size = _PREFIX.unpack(_fill(stream, bytearray(_PREFIX.size)))
    header = json.loads(_fill(stream, bytearray(header_size)).decode("utf-8", "surrogatepass"))
    return header, _fill(stream, allocate(payload_size)) if payload_size else b""


def widen_pipe(stream: FileIO) -> None:
    """Give a pipe 1 MiB instead of 64 KiB where the system can: a row of logits is 200 kB and more."""
    try:
        import fcntl

        fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 2**20)
    except (ImportError, AttributeError, OSError):
        pass


def _write_all(stream: FileIO, view: memoryview) -> None:
    # A raw pipe takes what fits and says how much that was.
    while view.nbytes:
        view = view[stream.write(view) :]


def _fill(stream: FileIO, data: Any) -> Any:
    view = memoryview(data).cast("B")
    done = 0
    while done < view.nbytes:
        got = stream.readinto(view[done:])
        if not got:
            raise EOFError("the pipe ended inside a frame" if done else "the pipe ended")
        done += got
    return data
