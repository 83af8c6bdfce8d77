"""Run a command and measure it: wall time, processor time and the memory of its whole process tree.

Memory is sampled from /proc (Linux). Anonymous memory (heap) and file-mapped memory (a model that is mapped, shared
libraries) are told apart, because the kernel can drop the second at will. Pages that two processes of the tree share
are counted in both. VmHWM is the kernel's own high-water mark of one process and misses nothing but growth after the
last sample; getrusage's ru_maxrss is not used, for it begins with the size of the process that forked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

_INTERVAL = 0.05
_FIELD = re.compile(r"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", re.M)


class CommandFailed(SystemExit):
    """A measured command ended with another exit code than zero; ends the benchmark with its last words."""


@dataclass
class ProcessPeak:
    """The highest values of one process, in bytes."""

    command: str
    hwm: int = 0
    anon: int = 0
    file: int = 0


@dataclass(frozen=True)
class Sample:
    """The whole tree at one moment."""

    seconds: float
    anon: int
    file: int

    @property
    def rss(self) -> int:
        return self.anon + self.file


@dataclass(frozen=True)
class Line:
    """A line of stderr and when it came."""

    seconds: float
    text: str


@dataclass(frozen=True)
class Measurement:
    """One run of one command."""

    command: tuple[str, ...]
    exit_code: int
    seconds: float
    cpu_seconds: float
    stdout: str
    stderr: tuple[Line, ...]
    samples: tuple[Sample, ...]
    processes: tuple[ProcessPeak, ...]

    @property
    def output(self) -> str:
        """Everything it printed."""
        return "\n".join([self.stdout, *(line.text for line in self.stderr)])

    @property
    def peak_rss(self) -> int:
        """Of the tree: the largest sum that a sample saw, or one process's high-water mark when that is more."""
        return max([self.largest_hwm, *(s.rss for s in self.samples)])

    @property
    def peak_anon(self) -> int:
        return max((s.anon for s in self.samples), default=0)

    @property
    def peak_file(self) -> int:
        return max((s.file for s in self.samples), default=0)

    @property
    def largest_hwm(self) -> int:
        return max((p.hwm for p in self.processes), default=0)

    def to_record(self) -> dict[str, Any]:
        """Plain values for JSON, without the samples and the output."""
        return {
            "command": shlex.join(self.command),
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "peak_rss": self.peak_rss,
            "peak_anon": self.peak_anon,
            "peak_file": self.peak_file,
            "largest_hwm": self.largest_hwm,
            "processes": [asdict(p) for p in self.processes],
        }


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in _listed(Path(f"/proc/{pid}/task")):
            try:
                waiting += map(int, (task / "children").read_text().split())
            except OSError:
                continue
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


@dataclass
class _Sampler:
    """Watches a process tree from a thread of its own until ``stop``."""

    root: int
    began: float
    samples: list[Sample] = field(default_factory=list)
    peaks: dict[int, ProcessPeak] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_INTERVAL):
            sizes = [self._look_at(pid) for pid in _tree(self.root)]
            seconds = time.perf_counter() - self.began
            self.samples.append(Sample(seconds, sum(a for a, _ in sizes), sum(f for _, f in sizes)))

    def _look_at(self, pid: int) -> tuple[int, int]:
        """Anonymous and file-mapped bytes; zeros of a process that has just ended."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            return 0, 0
        sizes = {name: int(kib) * 1024 for name, kib in _FIELD.findall(status)}
        if not sizes:
            return 0, 0
        anon, mapped = sizes["RssAnon"], sizes["RssFile"] + sizes["RssShmem"]
        peak = self.peaks.setdefault(pid, ProcessPeak(command))
        # Between fork and exec a child still has its parent's name and size.
        if command != peak.command:
            peak = self.peaks[pid] = ProcessPeak(command)
        peak.hwm = max(peak.hwm, sizes["VmHWM"])
        peak.anon, peak.file = max(peak.anon, anon), max(peak.file, mapped)
        return anon, mapped


def _read_lines(stream: IO[str], began: float, lines: list[Line], echo: bool) -> None:
    for text in stream:
        lines.append(Line(time.perf_counter() - began, text.rstrip("\n")))
        if echo:
            print(f"{lines[-1].seconds:8.1f} s  {lines[-1].text}", file=sys.stderr, flush=True)


def _ended_processor_seconds() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def measure(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None, check: bool = True, echo: bool = False
) -> Measurement:
    """Run a command to its end.

    Args:
        env: the whole environment of the command; None for ours.
        check: whether another exit code than zero is an error.
        echo: whether to pass on what it says on stderr, with the time.

    Raises:
        CommandFailed: it failed, with its last words.
    """
    words = tuple(map(str, command))
    print(f"$ {shlex.join(words)}", file=sys.stderr, flush=True)
    used, began = _ended_processor_seconds(), time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    sampler = _Sampler(process.pid, began)
    printed: list[Line] = []
    said: list[Line] = []
    readers = [_reader(process.stdout, began, printed, False), _reader(process.stderr, began, said, echo)]
    try:
        exit_code = process.wait()
        seconds = time.perf_counter() - began
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        sampler.stop()
        for reader in readers:
            reader.join()
    done = Measurement(
        words, exit_code, seconds, _ended_processor_seconds() - used, "\n".join(line.text for line in printed),
        tuple(said), tuple(sampler.samples), tuple(sampler.peaks.values()),
    )  # fmt: skip
    if check and exit_code != 0:
        last = "\n".join(done.output.splitlines()[-15:])
        raise CommandFailed(f"exit code {exit_code} of {shlex.join(words)}\n{last}")
    return done


def _reader(stream: IO[str] | None, began: float, lines: list[Line], echo: bool) -> threading.Thread:
    assert stream is not None
    thread = threading.Thread(target=_read_lines, args=(stream, began, lines, echo), daemon=True)
    thread.start()
    return thread
