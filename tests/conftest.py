"""What all tests share: a HALO home of their own, tiny checkpoints, and one bundle that is made once."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.command import Result, run_halo
from tests.tiny import make_hf

# Few types and few words: the shortest apply that still goes through every stage. One in which every K-quant fits.
FEW_TYPES = ("--type-set", "q3_k,q4_k,q6_k,q8_0")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CALIBRATION = (
    "The keeper of the lighthouse counted 128 steps, lit the lamp and wrote: all is well. def f(x): return x + 1\n"
    "Water boils at 100 degrees; the quick brown fox jumps over the lazy dog, don't they? {'a': [1, 2.5, null]}\n"
)


@pytest.fixture(autouse=True)
def halo_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test may read or write what HALO remembers of this machine."""
    monkeypatch.setenv("HALO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HALO_TEST_CRASH", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder whose rows fit every type."""
    return make_hf(tmp_path_factory.mktemp("wide") / "tiny-llama", "llama", **WIDE)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short calibration text."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(CALIBRATION, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Made:
    """An applied checkpoint: the bundle, the imatrix saved on the way, and what the command said."""

    path: Path
    source: Path
    imatrix: Path
    result: Result

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "halo.json").read_text(encoding="utf-8"))

    @property
    def model(self) -> Path:
        return self.path / "model.gguf"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, wide: Path, words: Path) -> Made:
    """A bundle of ``wide`` at 5 bits a weight."""
    folder = tmp_path_factory.mktemp("made")
    out, imatrix = folder / "out", folder / "saved.imatrix.gguf"
    result = run_halo(
        "apply", wide, "--bpw", 5, *FEW_TYPES, "--calibration", words, "--save-imatrix", imatrix, "-o", out,
        env={"HALO_HOME": str(folder / "home")},
    )  # fmt: skip
    assert result.code == 0, result.err
    return Made(out, wide, imatrix, result)


@pytest.fixture
def halo(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """The command's entry point within this process, which has torch loaded already (2 s a run otherwise). What native
    code writes is caught as well. The working directory is the test's own."""
    from halo import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cores, terminated = os.sched_getaffinity(0), signal.getsignal(signal.SIGTERM)
    os.sched_setaffinity(0, {max(cores)})  # as ``command.one_core``, for the worker processes

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["halo", *map(str, args)])
        capfd.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return Result(code, out, err)

    yield run
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, terminated)
