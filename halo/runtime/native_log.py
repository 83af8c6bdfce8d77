"""llama.cpp's log, kept in memory: its error lines explain a refusal, its buffer lines are the memory report."""

from __future__ import annotations

import ctypes
import re
from collections import deque
from typing import Any

# ggml.h of this build; the enum in llama-cpp-python's own comments is an older one.
_ERROR, _CONTINUED = 4, 5
_BUFFER = re.compile(r"^\S+:\s*(\S+)\s+(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")
_KIND = {"model": "model", "KV": "kv", "RS": "kv", "compute": "compute", "output": "output"}

# What llama.cpp adds after the line that says what is wrong.
_GENERIC = re.compile(r"failed to load model( from .*)?$|failed to initialize the context$")
_PREFIX = re.compile(r"^\w+: (error loading model: )?")


class NativeLog:
    """Collects log lines from any thread.

    Attributes:
        lines: the last 50 lines of any level.
        errors: error lines since ``clear``.
        buffers: bytes by ``(kind, buffer name)`` since ``clear``.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=50)
        self.errors: deque[str] = deque(maxlen=50)
        self.buffers: dict[tuple[str, str], int] = {}
        self._partial = ""
        self._level = 0
        self._callback: Any = None

    def install(self, llama: Any) -> None:
        """Make llama.cpp and ggml log here; call once, before anything else."""
        # llama.cpp keeps only the address: the callback object must live as long as this one.
        self._callback = llama.llama_log_callback(self._receive)
        llama.llama_log_set(self._callback, ctypes.c_void_p(0))

    def clear(self) -> None:
        """Forget errors and buffers before a new operation."""
        self.errors.clear()
        self.buffers.clear()

    def reason(self) -> str:
        """The last error line that is not merely 'failed to load', without C function names; empty if there is none."""
        telling = [line for line in self.errors if not _GENERIC.search(line)]
        return _PREFIX.sub("", (telling or list(self.errors) or [""])[-1])

    def _receive(self, level: int, text: bytes, _user: Any) -> None:
        self._level = self._level if level == _CONTINUED else level
        self._partial += text.decode("utf-8", "replace")
        *whole, self._partial = self._partial.split("\n")
        for line in filter(None, (part.strip() for part in whole)):
            self._keep(line)

    def _keep(self, line: str) -> None:
        self.lines.append(line)
        if self._level == _ERROR:
            self.errors.append(line)
        if match := _BUFFER.match(line):
            name, kind, mebibytes = match.groups()
            key = (_KIND[kind], name)
            self.buffers[key] = self.buffers.get(key, 0) + round(float(mebibytes) * 2**20)
