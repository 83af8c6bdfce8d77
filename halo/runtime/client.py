"""HALO's side of the worker process: typed calls in, typed results out, and a death turned into one error line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from halo.errors import NativeCrash, RuntimeFailure
from halo.runtime.protocol import Allocate, Header, read_frame, widen_pipe, write_frame
from halo.runtime.records import Buffers, Generation, LoadOptions, Memory, ModelInfo, OnPiece, Prompt
from halo.threads import default_threads

# Windows reports a fault as an NTSTATUS exit code.
_NTSTATUS = {0xC000001D: "SIGILL", 0xC0000005: "SIGSEGV", 0xC0000094: "SIGFPE", 0xC0000409: "SIGABRT"}


class Worker:
    """A process that holds one model. One call at a time; a second one from another thread is refused.

    Every method raises RuntimeFailure when llama.cpp refuses (the worker stays usable), when no answer comes within
    ``timeout`` seconds, or when the worker is closed; and NativeCrash when the process dies. After a timeout, a death
    or a Ctrl-C the process is gone and ``alive`` is False.
    """

    def __init__(self, *, timeout: float | None = 600.0) -> None:
        """Start the process.

        Args:
            timeout: seconds to wait for the next sign of life: a reply, a piece of text, a batch of logits.
        """
        self._timeout = timeout
        self._model = "no model"
        self._info: ModelInfo | None = None
        self._busy = threading.Lock()
        # A file and not a pipe: nobody has to drain it, and the last words are still there after a crash.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "halo.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env=_environment(),
        )
        widen_pipe(_raw(self._process.stdout))
        self._finalizer = weakref.finalize(self, _end, self._process, self._stderr)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the process can still answer."""
        return self._finalizer.alive and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def info(self) -> ModelInfo:
        """The loaded model. Raises RuntimeFailure before ``load``."""
        if self._info is None:
            raise RuntimeFailure("no model is loaded")
        return self._info

    def load(self, path: str | Path, options: LoadOptions | None = None) -> ModelInfo:
        """Load a GGUF, in place of the one before it if there is one."""
        options = options or LoadOptions()
        if options.n_threads is None:
            options = replace(options, n_threads=usable_cores())
        self._info = None
        self._model = str(path)
        if not Path(path).is_file():
            raise RuntimeFailure(f"{path}: no such file")
        try:
            reply = self._call("load", path=str(Path(path).resolve()), options=asdict(options))
        except NativeCrash:
            raise
        except RuntimeFailure as failure:
            raise RuntimeFailure(f"{path}: llama.cpp cannot load it: {failure}") from failure
        info = reply["info"]
        self._info = ModelInfo(**{**info, "path": str(path), "buffers": Buffers(**info["buffers"])})
        return self._info

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text; ``add_special`` adds what the model wants around it, ``parse_special`` reads <|…|>."""
        return self._call("tokenize", text=text, add_special=add_special, parse_special=parse_special)["ids"]

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Text of token ids; ``special`` writes control tokens out."""
        return self._call("detokenize", ids=_plain(ids), special=special)["text"]

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 64,
        *,
        seed: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        ignore_end: bool = False,
        parse_special: bool = False,
        on_piece: OnPiece | None = None,
    ) -> Generation:
        """Continue a prompt from an empty context.

        Args:
            prompt: text (special tokens added as the model wants) or token ids, taken as they are.
            max_tokens: most new tokens.
            temperature: 0 takes the likeliest token and ignores ``seed``, ``top_k``, ``top_p`` and ``min_p``.
            top_k: 0 for no limit.
            ignore_end: go on after an end token.
            parse_special: read <|…|> in a text prompt as special tokens.
            on_piece: gets the text as it comes, in whole characters; returning False stops the generation.
        """
        request = {
            "op": "generate",
            "prompt": prompt if isinstance(prompt, str) else _plain(prompt),
            "parse_special": parse_special,
            "max_tokens": max_tokens,
            "ignore_end": ignore_end,
            "sampling": {"seed": seed, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        }
        stopped = False
        with closing(self._exchange(request)) as frames:
            for header, _ in frames:
                if "generation" in header:
                    return Generation(**header["generation"])
                if on_piece is not None and not stopped and on_piece(header["piece"]) is False:
                    stopped = True
                    self._send({"op": "cancel"})
        raise AssertionError("the worker ended a generation without a result")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Float32 logits of every position, shape (tokens, vocabulary), from an empty context."""
        out = np.empty((len(ids), self.info.n_vocab), np.float32)
        free = memoryview(out.reshape(-1).view(np.uint8).data)

        def next_rows(size: int) -> memoryview:
            nonlocal free
            rows, free = free[:size], free[size:]
            return rows

        with closing(self._exchange({"op": "logits", "ids": _plain(ids)}, next_rows)) as frames:
            for _ in frames:
                pass
        return out

    def logits_chunks(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """The rows of ``logits`` a batch at a time, for texts whose logits would not fit in memory."""
        n_vocab = self.info.n_vocab
        # Not bytearray: it would first write zeros over the hundreds of megabytes a batch can have.
        request = {"op": "logits", "ids": _plain(ids)}
        with closing(self._exchange(request, lambda size: np.empty(size // 4, np.float32))) as frames:
            for header, payload in frames:
                if "rows" in header:
                    yield payload.reshape(header["rows"], n_vocab)

    def memory(self) -> Memory:
        """Resident memory of the worker process."""
        return Memory(**self._call("memory")["memory"])

    def close(self) -> None:
        """Let the worker free the model and end; killed if it is not gone in 5 s. Harmless when it is gone already."""
        if not self._finalizer.alive:
            return
        if self._busy.acquire(blocking=False):
            try:
                self._send({"op": "close"})
                self._process.wait(5.0)
            except (NativeCrash, subprocess.TimeoutExpired):
                pass
            finally:
                self._busy.release()
        self._finalizer()

    def _call(self, op: str, **arguments: Any) -> Header:
        with closing(self._exchange({"op": op, **arguments})) as frames:
            return next(frames)[0]

    def _exchange(self, request: Header, allocate: Allocate = bytearray) -> Generator[tuple[Header, Any], None, None]:
        """Send a request and yield its frames. Closed early, it cancels the request and waits for its end."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeFailure("the worker is busy with another call")
        try:
            if not self._finalizer.alive:
                raise RuntimeFailure("the worker is closed")
            with _Watchdog(self._process, self._timeout) as watchdog:
                self._send(request)
                last = False
                while not last:
                    header, payload = self._receive(watchdog, allocate)
                    last = header.get("last", False)
                    if "error" in header:
                        raise RuntimeFailure(header["error"])
                    with watchdog.paused():
                        yield header, payload
        except GeneratorExit:
            if not last:
                self._drain()
            raise
        except (RuntimeFailure, AssertionError):
            raise
        except BaseException:
            # Ctrl-C or a torn frame: the pipes are out of step, and native code may be busy for long.
            self._finalizer()
            raise
        finally:
            self._busy.release()

    def _drain(self) -> None:
        try:
            with _Watchdog(self._process, self._timeout) as watchdog:
                self._send({"op": "cancel"})
                while not self._receive(watchdog)[0].get("last"):
                    pass
        except BaseException:
            self._finalizer()
            raise

    def _send(self, request: Header) -> None:
        try:
            write_frame(_raw(self._process.stdin), request)
        except OSError as error:
            raise self._death() from error

    def _receive(self, watchdog: _Watchdog, allocate: Allocate = bytearray) -> tuple[Header, Any]:
        try:
            return read_frame(_raw(self._process.stdout), allocate)
        except EOFError as error:
            if watchdog.expired:
                self._finalizer()
                raise RuntimeFailure(
                    f"llama.cpp gave no answer within {self._timeout:g} s on {self._model}; its process was ended"
                ) from error
            raise self._death() from error

    def _death(self) -> NativeCrash:
        try:
            code = self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        last_words = _last_line(self._stderr)
        self._finalizer()
        name = _signal_name(code)
        message = f"llama.cpp died of {name} while running {self._model}"
        if name == "SIGKILL":
            message += " (killed from outside, often for lack of memory)"
        elif last_words:
            message += f": {last_words}"
        return NativeCrash(message, name, self._model)


class _Watchdog:
    """Kills a process that gives no sign of life in time. A thread, because a pipe has no timed read on every system.

    Attributes:
        expired: whether it had to.
    """

    def __init__(self, process: subprocess.Popen[bytes], seconds: float | None) -> None:
        self._process = process
        self._seconds = seconds
        self._deadline = time.monotonic() + (seconds or 0.0)
        self._done = threading.Event()
        self._paused = False
        self.expired = False

    def __enter__(self) -> _Watchdog:
        if self._seconds is not None:
            threading.Thread(target=self._watch, args=(self._seconds,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._done.set()

    def paused(self) -> _Pause:
        """Context in which time does not count: the caller is at work, not the worker."""
        return _Pause(self)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._deadline = time.monotonic() + (self._seconds or 0.0)
        self._paused = False

    def _watch(self, seconds: float) -> None:
        while not self._done.wait(max(0.01, seconds if self._paused else self._deadline - time.monotonic())):
            if not self._paused and time.monotonic() >= self._deadline:
                self.expired = True
                self._process.kill()
                return


class _Pause:
    def __init__(self, watchdog: _Watchdog) -> None:
        self._watchdog = watchdog

    def __enter__(self) -> None:
        self._watchdog.pause()

    def __exit__(self, *_exc: object) -> None:
        self._watchdog.resume()


def usable_cores() -> int:
    """Physical cores this process may use; hyper-threads slow llama.cpp's matrix products down."""
    import psutil

    allowed = default_threads()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    # A function and not a method: weakref.finalize must not hold the worker it watches. Also runs at interpreter exit.
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, stderr):
        if stream is not None:
            stream.close()


def _environment() -> dict[str, str]:
    # The parent's own module path, in its order: HALO may run from a checkout, and a stray numpy.py in the working
    # folder must not become part of the worker.
    path = [str(Path(entry).absolute()) for entry in sys.path]
    source = str(Path(__file__).resolve().parents[2])
    path = path if source in path else [*path, source]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",
        # ggml would otherwise start a debugger on an assertion and take seconds to die.
        "GGML_NO_BACKTRACE": "1",
    }


def _raw(stream: IO[bytes] | None) -> FileIO:
    assert isinstance(stream, FileIO), "the worker's pipes are unbuffered"
    return stream


def _plain(ids: Sequence[int]) -> list[int]:
    # JSON knows no numpy integers.
    return [int(i) for i in ids]


def _last_line(stderr: IO[bytes]) -> str:
    try:
        size = stderr.seek(0, os.SEEK_END)
        stderr.seek(max(0, size - 4096))
        lines = stderr.read().decode("utf-8", "replace").split("\n")
    except (OSError, ValueError):
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _signal_name(code: int) -> str:
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return _NTSTATUS.get(code, f"exit code {code}")
