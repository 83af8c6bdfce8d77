"""llama.cpp's process really dies by a signal during an apply; HALO goes on, says so and remembers."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command import Result, run_halo
from tests.conftest import FEW_TYPES, Made


def apply(made: Made, out: Path, crash: str | None, home: Path) -> Result:
    env = {"HALO_HOME": str(home)} | ({"HALO_TEST_CRASH": crash} if crash else {})
    return run_halo("apply", made.source, "--bpw", 5, *FEW_TYPES, "--imatrix", made.imatrix, "-o", out, env=env)


def notes(result: Result) -> list[str]:
    return [line.removeprefix("note: ") for line in result.err.splitlines() if line.startswith("note: ")]


def test_a_crash_of_the_extra_buffers_is_survived_and_remembered(made: Made, tmp_path: Path) -> None:
    home = tmp_path / "state"
    first = apply(made, tmp_path / "first", "SIGILL:extra_bufts", home)
    assert first.code == 0, first.err
    manifest = json.loads((tmp_path / "first" / "halo.json").read_text())
    assert any("died of SIGILL" in n and "once more" in n for n in notes(first)), first.err
    assert any("remembered" in n for n in notes(first)), first.err
    assert set(notes(first)) >= {n for n in manifest["notes"] if "extra CPU buffers" in n}
    assert sum("extra CPU buffers" in n for n in manifest["notes"]) == 2
    assert manifest["measured"]["use_extra_bufts"] is False
    assert "died of SIGILL" in (tmp_path / "first" / "README.md").read_text()
    assert (home / "native_crashes.json").is_file()
    # The second run would die too if it tried: it starts without them, and says why.
    second = apply(made, tmp_path / "second", "SIGILL:extra_bufts", home)
    assert second.code == 0, second.err
    (told,) = [n for n in notes(second) if "extra CPU buffers" in n]
    assert "are off" in told and "SIGILL" in told and "native_crashes.json" in told
    assert json.loads((tmp_path / "second" / "halo.json").read_text())["measured"]["use_extra_bufts"] is False
    assert (tmp_path / "first" / "model.gguf").read_bytes() == (tmp_path / "second" / "model.gguf").read_bytes()


def test_a_crash_that_nothing_helps_against(made: Made, tmp_path: Path) -> None:
    home = tmp_path / "state"
    line = apply(made, tmp_path / "out", "SIGILL:always", home).error()
    assert "SIGILL" in line and "model.gguf" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".halo-*"))
    assert not (home / "native_crashes.json").exists(), "the buffers were not to blame"


def test_without_a_crash_nothing_is_said(made: Made) -> None:
    assert not any("extra CPU buffers" in note for note in made.manifest["notes"])
    assert made.manifest["measured"]["use_extra_bufts"] is True
