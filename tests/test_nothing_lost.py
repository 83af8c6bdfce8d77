"""Whatever ends an apply, nothing half-made has the final name and the source is as it was."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.command import COMMAND, environment, one_core, run_halo
from tests.conftest import FEW_TYPES, Made
from tests.tiny import make_hf

MOMENTS = 10


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def arguments(made: Made, output: Path, source: Path | None = None) -> list[str]:
    """An apply of about three seconds, most of them after Python and torch are up. It gives ``made``'s bytes."""
    words = made.manifest["calibration"]["text"]
    given = ["apply", source or made.source, "--bpw", 5, *FEW_TYPES, "--calibration", words, "-o", output]
    return [str(a) for a in given]


def start(args: list[str], before=one_core) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, as a shell starts it."""

    def prepare() -> None:
        os.setsid()
        before()

    return subprocess.Popen(
        [*COMMAND, *args], env=environment(), preexec_fn=prepare, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".halo-"))


def no_worker_left(group: int) -> bool:
    """Whether the command's whole process group has ended (within five seconds: a worker notices its parent's end)."""
    for _ in range(50):
        alive = [p for p in psutil.process_iter() if _group(p.pid) == group and p.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def assert_complete(made: Made, output: Path) -> None:
    """The bundle ``made`` in another folder."""
    assert {p.name for p in output.iterdir()} == {"model.gguf", "halo.json", "README.md", "Modelfile"}
    assert contents(output)["model.gguf"] == made.manifest["file"]["sha256"]


def test_killed_at_any_moment(made: Made, tmp_path: Path) -> None:
    """Ten runs, each killed at a moment of its own between the start and the end of a whole run."""
    before, out = contents(made.source), tmp_path / "out"
    began = time.monotonic()
    assert start(arguments(made, out)).wait() == 0
    whole = time.monotonic() - began
    assert_complete(made, out)
    shutil.rmtree(out)
    moments = random.Random(20)
    killed = 0
    for part in range(MOMENTS):
        # The first part of a run imports Python's modules and touches nothing: look there once only.
        share = 0.3 if part == 0 else 0.4 + 0.6 * (part - 1 + moments.random()) / (MOMENTS - 1)
        process = start(arguments(made, out))
        time.sleep(whole * share)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert no_worker_left(process.pid)
        if out.exists():
            assert_complete(made, out)
            shutil.rmtree(out)
        assert contents(made.source) == before
    assert killed >= MOMENTS // 2, "most runs had ended before they were killed"
    # A clean run sweeps what the killed ones left, and spares what a living process is at.
    (tmp_path / f".halo-{os.getpid()}-mine").mkdir()
    (tmp_path / ".halo-99999999-dead").mkdir()
    (tmp_path / ".halo-99999999-dead" / "model.gguf").write_bytes(b"half")
    done = run_halo(*arguments(made, out))
    assert done.code == 0, done.err
    assert_complete(made, out)
    assert leftovers(tmp_path) == [f".halo-{os.getpid()}-mine"]


@pytest.mark.parametrize(
    ("sent", "stage"),
    [(signal.SIGINT, "quantising"), (signal.SIGINT, "running it once"), (signal.SIGTERM, "measuring damage")],
)
def test_interrupted(sent: signal.Signals, stage: str, made: Made, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group, a TERM the command alone."""
    out = tmp_path / "out"
    process = start(arguments(made, out))
    assert process.stderr and process.stdout
    said = b""
    while f"{stage} ...".encode() not in said:
        line = process.stderr.readline()
        assert line, f"it ended before {stage}: {said.decode()}"
        said += line
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)
    else:
        process.send_signal(sent)
    out_text, rest = process.communicate(timeout=30)
    assert process.returncode == 130, rest.decode()
    lines = rest.decode().splitlines()
    assert lines[-1] == "halo: interrupted; nothing was written", lines
    assert "Traceback" not in rest.decode() and out_text == b""
    assert not out.exists() and not leftovers(tmp_path)
    assert no_worker_left(process.pid)


def small_files(limit: int):
    """For the child of a fork: no file may grow beyond ``limit``, and writing on is an error and no signal."""

    def before() -> None:
        one_core()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return before


@pytest.mark.parametrize("share", [0.02, 0.999])
def test_no_room_for_the_file(share: float, made: Made, tmp_path: Path) -> None:
    out, before = tmp_path / "out", contents(made.source)
    done = run_halo(*arguments(made, out), before=small_files(int(made.model.stat().st_size * share)))
    line = done.error()
    assert "File too large" in line and "Traceback" not in done.err
    assert not out.exists() and not leftovers(tmp_path)
    assert contents(made.source) == before


@pytest.fixture
def tiny_disk(made: Made, tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half the bundle."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = made.model.stat().st_size // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_full(made: Made, tiny_disk: Path) -> None:
    line = run_halo(*arguments(made, tiny_disk / "out")).error()
    assert "are needed" in line and "are free" in line
    assert list(tiny_disk.iterdir()) == []


def test_disk_filled_by_another(made: Made, tiny_disk: Path) -> None:
    """It was large enough when it was looked at: a staged file meets the end while it grows."""
    from halo.errors import OutputError
    from halo.staging import staged_file, staged_folder

    with pytest.raises(OutputError, match="no space left"), staged_folder(tiny_disk / "out") as folder:
        (folder / "model.gguf").write_bytes(bytes(made.model.stat().st_size))
    with pytest.raises(OutputError, match="no space left"), staged_file(tiny_disk / "im.gguf") as file:
        file.write(bytes(made.model.stat().st_size))
    assert list(tiny_disk.iterdir()) == []


def test_a_place_that_cannot_be(halo, made: Made, tmp_path: Path) -> None:
    """Root may write anywhere but below a file."""
    (tmp_path / "file").write_text("not a folder")
    line = halo(*arguments(made, tmp_path / "file" / "out")).error()
    assert f"{tmp_path / 'file'} is no folder" in line
    assert (tmp_path / "file").read_text() == "not a folder"


def test_force_keeps_the_old_until_the_new_is_there(halo, made: Made, tmp_path: Path) -> None:
    """A source that turns out bad does not cost the bundle that was to be replaced."""
    out = shutil.copytree(made.path, tmp_path / "out")
    before = contents(out)
    bad = make_hf(tmp_path / "bad", "llama", hidden_size=48, intermediate_size=64, head_dim=16)
    halo(*arguments(made, out, bad), "--force").error()
    assert contents(out) == before
    assert halo(*arguments(made, out), "--force").code == 0
    assert_complete(made, out)
    assert not leftovers(tmp_path)


def test_an_existing_output_is_refused_at_once(halo, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    done = halo(*arguments(made, out))
    assert "exists already" in done.error() and "--force" in done.err
    assert done.err.count("\n") == 1, "it must refuse before the long work"
    assert (out / "mine.txt").read_text() == "mine" and list(tmp_path.iterdir()) == [out]
