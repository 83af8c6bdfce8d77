"""The child process that owns llama.cpp: ``python -m halo.runtime.worker``, started by ``client.Worker``.

It reads requests from its first stdin and writes replies to its first stdout. Anything that llama.cpp or a GPU driver
prints goes to stderr. When HALO goes away, so does this process, even in the middle of a batch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from io import FileIO
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from halo.errors import RuntimeFailure
from halo.runtime.process_memory import own_memory
from halo.runtime.protocol import Header, read_frame, write_frame
from halo.runtime.records import LoadOptions

if TYPE_CHECKING:
    from halo.runtime.engine import Engine


class Server:
    """Answers requests one by one. A second thread reads, so that a cancel and the end of HALO are seen at once."""

    def __init__(self, requests: FileIO, replies: FileIO) -> None:
        self._requests = requests
        self._replies = replies
        self._queue: SimpleQueue[Header] = SimpleQueue()
        self._cancel = threading.Event()
        self._engine_or_none: Engine | None = None

    def run(self) -> None:
        """Serve until ``close``."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            request = self._queue.get()
            self._cancel.clear()
            if request["op"] == "close":
                break
            self._answer(request)
        if self._engine_or_none is not None:
            self._engine_or_none.close()

    def _read(self) -> None:
        try:
            while True:
                request, _ = read_frame(self._requests)
                if request["op"] == "cancel":
                    self._cancel.set()
                else:
                    self._queue.put(request)
        except (EOFError, OSError):
            # HALO is gone. Native code may be busy for minutes; nobody is left to want the result.
            os._exit(0)

    def _answer(self, request: Header) -> None:
        try:
            reply = getattr(self, f"_op_{request.pop('op')}")(**request)
        except RuntimeFailure as failure:
            reply = {"error": str(failure)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        write_frame(self._replies, {**reply, "last": True})

    @property
    def _engine(self) -> Engine:
        # Imported late: a llama_cpp that is missing or broken then becomes a reply instead of a dead process.
        if self._engine_or_none is None:
            try:
                from halo.runtime.engine import Engine
            except (ImportError, OSError, RuntimeError) as error:
                raise RuntimeFailure(f"llama_cpp cannot be imported: {error}") from error
            self._engine_or_none = Engine(self._cancel.is_set)
        return self._engine_or_none

    def _op_load(self, path: str, options: dict[str, Any]) -> Header:
        return {"info": asdict(self._engine.load(path, LoadOptions(**options)))}

    def _op_tokenize(self, text: str, add_special: bool, parse_special: bool) -> Header:
        return {"ids": self._engine.tokenize(text, add_special, parse_special)}

    def _op_detokenize(self, ids: list[int], special: bool) -> Header:
        return {"text": self._engine.detokenize(ids, special)}

    def _op_generate(
        self,
        prompt: str | list[int],
        parse_special: bool,
        max_tokens: int,
        ignore_end: bool,
        sampling: dict[str, float],
    ) -> Header:
        ids = self._engine.tokenize(prompt, True, parse_special) if isinstance(prompt, str) else prompt
        made = self._engine.generate(ids, max_tokens, ignore_end, sampling, self._emit)
        return {"generation": asdict(made)}

    def _emit(self, piece: str) -> None:
        write_frame(self._replies, {"piece": piece})

    def _op_logits(self, ids: list[int]) -> Header:
        for rows in self._engine.logits(ids):
            write_frame(self._replies, {"rows": rows.shape[0]}, rows.data)
        return {}

    def _op_memory(self) -> Header:
        return {"memory": asdict(own_memory())}


def main() -> None:
    """Run the worker; never returns."""
    # Ctrl-C in a terminal reaches the whole process group; HALO decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _no_core_dump()
    requests, replies = _take_pipes()
    try:
        Server(requests, replies).run()
    except OSError:
        os._exit(0)
    # Not sys.exit: the reading thread still waits on its pipe, and llama.cpp's static destructors may log into Python.
    os._exit(0)


def _no_core_dump() -> None:
    # A crash here is expected and handled; a dump of a many-gigabyte model would fill the disk and take minutes.
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    except (ImportError, OSError, ValueError):
        pass


def _take_pipes() -> tuple[FileIO, FileIO]:
    """Keep the protocol's pipes to ourselves and point fd 0 at nothing and fd 1 at stderr."""
    requests, replies = FileIO(os.dup(0), "rb"), FileIO(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


if __name__ == "__main__":
    main()
