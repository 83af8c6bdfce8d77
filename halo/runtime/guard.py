"""A model that survives llama.cpp's crashes with the extra CPU buffer types.

llama.cpp repacks weights for special CPU kernels (AMX, for one). On some machines the first quantised batch through
them ends the process. The guard tries a batch, and on a crash goes on without those kernels, and remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from halo.errors import NativeCrash, RuntimeFailure
from halo.runtime.client import Worker
from halo.runtime.crash_memory import CrashMemory
from halo.runtime.records import Generation, LoadOptions, Memory, ModelInfo, OnPiece, Prompt

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
Notice = Callable[[str], None]

# Faults of the code itself. SIGKILL and SIGTERM come from outside (out of memory, an impatient user): turning kernels
# off for good would be the wrong lesson.
_FAULTS = {"SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP", "SIGSYS"}

_TEST_TEXT = "The old lighthouse keeper counted 128 steps, lit the lamp and wrote: all is well, wind north-west. "
_TEST_BATCH = 40


def open_model(
    path: str | Path,
    options: LoadOptions | None = None,
    *,
    on_notice: Notice | None = None,
    test_batch: bool = True,
    timeout: float | None = 600.0,
) -> GuardedWorker:
    """Load a GGUF and prove that it runs.

    With ``options.use_extra_bufts`` (the default) a death by a fault is told to ``on_notice``, tried once more with the
    extra buffers off, and, if that works, remembered for this machine and llama.cpp build.

    Args:
        on_notice: gets each line the user should see.
        test_batch: run a batch of 40 tokens and two single ones before returning.
        timeout: seconds, as in ``Worker``.

    Raises:
        RuntimeFailure: llama.cpp cannot load the file.
        NativeCrash: it died, and with the extra buffers off as well.
    """
    return GuardedWorker(path, options or LoadOptions(), on_notice or (lambda _line: None), test_batch, timeout)


class GuardedWorker:
    """A loaded model with the methods of ``Worker``; made by ``open_model``. Starts a new process when one has died."""

    def __init__(
        self, path: str | Path, options: LoadOptions, on_notice: Notice, test_batch: bool, timeout: float | None
    ) -> None:
        self._path = path
        self._options = options
        self._notice = on_notice
        self._test_batch = test_batch
        self._timeout = timeout
        self._memory = CrashMemory()
        self._worker: Worker | None = None
        self._closed = False
        if options.use_extra_bufts and (known := self._memory.recall()):
            self._options = replace(options, use_extra_bufts=False)
            self._notice(
                f"extra CPU buffers are off: llama.cpp died of {known.signal_name} with them on this machine on "
                f"{known.day}; delete {self._memory.path} to try them again"
            )
        self._guard(lambda worker: None)

    def __enter__(self) -> GuardedWorker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._guard(lambda worker: worker.info)

    @property
    def pid(self) -> int:
        """The present worker's process id."""
        return self._guard(lambda worker: worker.pid)

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """See ``Worker.tokenize``."""
        return self._guard(lambda worker: worker.tokenize(text, add_special=add_special, parse_special=parse_special))

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """See ``Worker.detokenize``."""
        return self._guard(lambda worker: worker.detokenize(ids, special=special))

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
        """See ``Worker.generate``. Not repeated after a crash once ``on_piece`` has been given text."""
        said: list[bool] = []

        def listen(piece: str) -> bool | None:
            said.append(True)
            return on_piece(piece) if on_piece else None

        def call(worker: Worker) -> Generation:
            return worker.generate(
                prompt,
                max_tokens,
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                ignore_end=ignore_end,
                parse_special=parse_special,
                on_piece=listen if on_piece else None,
            )

        return self._guard(call, lambda: bool(said))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """See ``Worker.logits``."""
        return self._guard(lambda worker: worker.logits(ids))

    def logits_chunks(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See ``Worker.logits_chunks``. Only the first chunk is repeated after a crash."""

        def start(worker: Worker) -> tuple[Iterator[np.ndarray], np.ndarray | None]:
            chunks = worker.logits_chunks(ids)
            return chunks, next(chunks, None)

        chunks, first = self._guard(start)
        if first is not None:
            yield first
            yield from chunks

    def memory(self) -> Memory:
        """See ``Worker.memory``."""
        return self._guard(lambda worker: worker.memory())

    def close(self) -> None:
        """End the worker; harmless when it has ended."""
        self._closed = True
        if self._worker is not None:
            self._worker.close()

    def _guard(self, call: Callable[[Worker], T], delivered: Callable[[], bool] = lambda: False) -> T:
        if self._closed:
            raise RuntimeFailure("the model is closed")
        try:
            return call(self._ready())
        except NativeCrash as crash:
            if not self._options.use_extra_bufts or crash.signal_name not in _FAULTS:
                raise
            if not delivered():
                return self._without_extras(crash, call)
            # Half of the answer is with the caller already: the next call works, this one cannot be taken back.
            self._without_extras(crash, lambda worker: None)
            raise

    def _ready(self) -> Worker:
        """The worker, started and proven; a dead one is replaced."""
        if self._worker is not None and self._worker.alive:
            return self._worker
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        worker = Worker(timeout=self._timeout)
        try:
            worker.load(self._path, self._options)
            if self._test_batch:
                _run_test_batch(worker)
        except BaseException:
            worker.close()
            raise
        self._worker = worker
        return worker

    def _without_extras(self, crash: NativeCrash, call: Callable[[Worker], T]) -> T:
        self._notice(
            f"llama.cpp died of {crash.signal_name} on {self._path} with the extra CPU buffers on; "
            "trying once more with them off"
        )
        with_extras = self._options
        self._options = replace(with_extras, use_extra_bufts=False)
        try:
            result = call(self._ready())
        except NativeCrash as again:
            # The buffers were not to blame: a later call may have them.
            self._options = with_extras
            raise NativeCrash(
                f"llama.cpp died of {crash.signal_name} on {self._path} with the extra CPU buffers on, and of "
                f"{again.signal_name} with them off",
                again.signal_name,
                str(self._path),
            ) from again
        self._remember(crash)
        return result

    def _remember(self, crash: NativeCrash) -> None:
        try:
            self._memory.remember(crash.signal_name, str(self._path))
        except OSError as error:
            self._notice(f"{self._path} runs with the extra CPU buffers off; {self._memory.path}: {error.strerror}")
            return
        self._notice(
            f"{self._path} runs with the extra CPU buffers off; remembered for this machine and llama.cpp build in "
            f"{self._memory.path} (delete it to try them again)"
        )


def _run_test_batch(worker: Worker) -> None:
    # A batch, because the repacked kernels differ for one row and for many; then two rows alone.
    ids = worker.tokenize(_TEST_TEXT * 4)[: min(_TEST_BATCH, worker.info.n_ctx - 3)]
    worker.generate(ids, 3, ignore_end=True)
