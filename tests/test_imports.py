"""What is loaded when: the command answers at once, and the library knows no terminal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halo import cli, settings
from tests.command import environment

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "llama_cpp", "textual", "numpy", "gguf", "tokenizers"}
TERMINAL = {"rich", "typer", "click", "textual"}
FRONT_ENDS = {"halo.cli", "halo.terminal"}
MODULES = sorted(
    "halo." + ".".join(path.relative_to(ROOT / "halo").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "halo").rglob("*.py")
    if path.name != "__init__.py" or path.parent != ROOT / "halo"
)
LIST = "import sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules} | set(sys.modules))))"


def loaded(code: str) -> set[str]:
    """The modules a fresh interpreter holds after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST}"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_halo_is_light() -> None:
    assert not loaded("import halo") & (HEAVY | TERMINAL)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["apply", "--help"], ["plan", "--bpw", "x"]])
def test_help_is_light(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['halo', *{arguments!r}]\nfrom halo.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass"
    )
    assert not loaded(code) & HEAVY


def test_help_takes_less_than_a_third_of_a_second() -> None:
    """The best of eight: other work on the machine is not ours."""
    command = Path(sys.executable).with_name("halo")
    times = []
    for _ in range(8):
        start = time.perf_counter()
        done = subprocess.run([command, "--help"], env=environment(), capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert all(word in done.stdout for word in ("apply", "plan", "inspect", "policies"))
        if times[-1] < 0.3:
            break
    assert min(times) < 0.3, times


# numpy, torch and gguf are imported ahead of the forks: they take 2 s a time and are not what is looked at.
ALONE = """
import json, os, sys, traceback
import gguf, numpy, torch
assert not any(name.split(".")[0] == "halo" for name in sys.modules)
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        code = 1
        try:
            __import__(name)
            print(json.dumps([name, sorted({m.split(".")[0] for m in sys.modules})]), flush=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_every_module_loads_alone() -> None:
    """In an interpreter that has no other module of HALO: no circular imports, and no terminal in the library."""
    assert {"halo.planning", "halo.checkpoint.open", "halo.runtime.client"} <= set(MODULES)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *MODULES], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(found) == set(MODULES)
    for name, modules in found.items():
        assert name in FRONT_ENDS or not TERMINAL & set(modules), name


def test_the_commands_default_is_the_librarys() -> None:
    assert cli.DEFAULT_TOKENS == settings.DEFAULT_CALIBRATION_TOKENS
