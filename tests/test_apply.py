"""The main job through the command line, from a checkpoint to a bundle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halo.checkpoint import open_checkpoint
from halo.gguf_file import Field, header_bytes, read_header
from halo.quantise import entries
from tests.command import PROGRESS, Result, run_halo
from tests.conftest import FEW_TYPES, Made
from tests.test_exactness import smollm2_gguf

Halo = Callable[..., Result]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def types(path: Path) -> dict[str, str]:
    return {t.name: t.type.name for t in read_header(path).tensors.values()}


def quick(made: Made, *options: object) -> tuple[object, ...]:
    """Arguments of an apply that needs no calibration."""
    return ("apply", made.source, *FEW_TYPES, "--imatrix", made.imatrix, *options)


def test_the_bundle(made: Made) -> None:
    assert {p.name for p in made.path.iterdir()} == {"model.gguf", "halo.json", "README.md", "Modelfile"}
    manifest, size = made.manifest, made.model.stat().st_size
    assert manifest["file"]["bytes"] == size
    assert manifest["file"]["sha256"] == sha256(made.model)
    assert manifest["file"]["bpw"] == pytest.approx(size * 8 / manifest["source"]["n_params"])
    assert manifest["budget"]["asked"] == "--bpw 5"
    assert 0.98 * manifest["budget"]["file_bytes"] <= size <= manifest["budget"]["file_bytes"]
    assert manifest["source"]["name"] == "tiny-llama" and manifest["source"]["kind"] == "huggingface"
    assert manifest["policy"]["name"] == "llama-arch" and len(manifest["policy"]["sha256"]) == 64
    assert manifest["calibration"]["tokens"] > 50 and len(manifest["calibration"]["sha256"]) == 64
    assert {"halo", "llama-cpp-python", "torch", "python"} <= set(manifest["versions"])
    assert manifest["device"]["source"] and manifest["measured"]["text"]
    assert manifest["measured"]["buffers"]["source"].startswith("measured")
    header, stored = read_header(made.model), types(made.model)
    for name, record in manifest["tensors"].items():
        assert stored[name] == record["type"]
        assert 0 < record["damage"] < 1 and record["worth"] > 0
        assert -32 < record["nbytes"] - header.tensors[name].nbytes < 32
    assert all(kind == "F32" for name, kind in stored.items() if name not in manifest["tensors"])
    assert header.metadata["general.name"].value == "tiny-llama"
    assert header.metadata["halo.source.sha256"].value == manifest["source"]["sha256"]
    assert (made.path / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    card = (made.path / "README.md").read_text()
    assert manifest["source"]["sha256"] in card and "estimated" in card
    assert oct(made.path.stat().st_mode & 0o777) == "0o755"


def test_what_it_says_when_piped(made: Made) -> None:
    """stderr has a line a stage, stdout the table; no escape codes in either."""
    assert "\x1b" not in made.result.out + made.result.err
    assert [line for line in made.result.err.splitlines() if not line.startswith("note: ")] == list(PROGRESS)
    for word in ("bundle", "size", "bits per weight", "memory", "substitutions", "it says"):
        assert word in made.result.out
    assert "\r" not in made.result.err


def on_a_terminal(*args: object, env: dict[str, str]) -> str:
    """All that the command writes to a terminal."""
    import pty
    import subprocess

    from tests.command import COMMAND, environment

    control, terminal = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, args)], env=environment({"TERM": "xterm-256color"} | env), stdin=terminal, stdout=terminal,
        stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    said = b""
    while True:
        try:
            piece = os.read(control, 65536)
        except OSError:  # Linux's end of file on a terminal
            break
        if not piece:
            break
        said += piece
    os.close(control)
    assert process.wait() == 0, said.decode()
    return said.decode()


def test_colours_on_a_terminal_unless_they_are_unwanted(made: Made) -> None:
    colour = ";48;5;"
    assert colour in on_a_terminal("inspect", made.path, env={})
    assert colour not in on_a_terminal("inspect", made.path, env={"NO_COLOR": "1"})


def test_json_and_quiet(halo: Halo, made: Made, tmp_path: Path) -> None:
    done = halo(*quick(made, "--bpw", 6, "--json", "-o", tmp_path / "a"))
    record = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert record.pop("path") == str(tmp_path / "a")
    assert record == json.loads((tmp_path / "a" / "halo.json").read_text())
    quiet = halo(*quick(made, "--bpw", 6, "--quiet", "-o", tmp_path / "b"))
    assert quiet == Result(0, "", "")
    assert sha256(tmp_path / "b" / "model.gguf") == record["file"]["sha256"]


def test_plan_writes_nothing_and_is_what_apply_does(halo: Halo, made: Made, tmp_path: Path) -> None:
    before = sorted(p for folder in (tmp_path, made.source) for p in folder.iterdir())
    same = quick(made, "--bpw", 5.5)[1:]
    planned = json.loads(halo("plan", *same, "--json").out)
    shown = halo("plan", *same, "--tensors")
    assert sorted(p for folder in (tmp_path, made.source) for p in folder.iterdir()) == before
    assert shown.code == 0 and "blk.1.ffn_down.weight" in shown.out and "\x1b" not in shown.out
    applied = json.loads(halo("apply", *same, "--json", "-o", tmp_path / "out").out)
    assert applied["file"]["bytes"] == planned["file_bytes"]
    assert {n: r["type"] for n, r in applied["tensors"].items()} == {
        n: r["type"] for n, r in planned["tensors"].items()
    }


def test_the_output_is_named_after_the_source(halo: Halo, made: Made, tmp_path: Path) -> None:
    assert halo(*quick(made, "--bpw", 6, "-q")).code == 0
    assert (tmp_path / "tiny-llama-halo" / "model.gguf").is_file()


def smallest_named(line: str) -> str:
    return line.split("--bpw ")[-1].split(")")[0]


def test_a_budget_too_small_names_one_that_works(halo: Halo, made: Made, tmp_path: Path) -> None:
    line = halo(*quick(made, "--bpw", 2, "-o", tmp_path / "out")).error()
    named, least = smallest_named(line), int(line.split(" bytes, ")[0].split("(")[1])
    assert not (tmp_path / "out").exists()
    assert halo(*quick(made, "--bpw", named, "-q", "-o", tmp_path / "out")).code == 0
    assert (tmp_path / "out" / "model.gguf").stat().st_size == least
    plan = ("plan", *quick(made)[1:], "--json")
    assert json.loads(halo(*plan, "--size", least).out)["file_bytes"] == least
    assert "below the smallest" in halo(*plan, "--size", least - 1).error()


def test_pins(halo: Halo, made: Made) -> None:
    plan = ("plan", *quick(made)[1:], "--json", "--bpw", 7)
    found = json.loads(halo(*plan, "--pin", r"blk\.0\..*=q8_0", "--pin", "output=bf16", "--pin", r".*attn_q=Q2_K").out)
    kinds = {name: record["type"] for name, record in found["tensors"].items()}
    assert kinds["output.weight"] == "BF16"
    for name, kind in kinds.items():
        if "attn_q" in name:
            assert kind == "Q2_K", name
        elif name.startswith("blk.0."):
            assert kind == "Q8_0", name
    assert found["bpw"] <= 7
    assert "matches no tensor" in halo(*plan, "--pin", "attn=q8_0").error()


def test_an_existing_output_is_kept(halo: Halo, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "--force" in halo(*quick(made, "--bpw", 6, "-o", out)).error()
    assert (out / "mine.txt").read_text() == "mine"
    assert halo(*quick(made, "--bpw", 6, "-q", "--force", "-o", out)).code == 0
    assert not (out / "mine.txt").exists() and (out / "model.gguf").is_file()


@pytest.fixture(scope="module")
def folded(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with folds in it, for the recipe to repeat: random tiny models rarely have one that is worth it."""
    data = made.manifest
    data["fold_exponents"] = {"blk.0.ffn_norm": 0.5, "blk.1.ffn_up": 0.25, "blk.1.attn_v": 0.375}
    folder = tmp_path_factory.mktemp("folded")
    (folder / "recipe.json").write_text(json.dumps(data))
    done = run_halo("apply", made.source, "--recipe", folder / "recipe.json", "-o", folder / "out")
    assert done.code == 0, done.err
    return folder / "out"


def test_a_recipe_repeats_byte_for_byte(halo: Halo, made: Made, folded: Path, tmp_path: Path) -> None:
    assert sha256(folded / "model.gguf") != sha256(made.model), "nothing was folded"
    renamed = shutil.copytree(made.source, tmp_path / "another-name")
    for recipe, threads in ((made.path, 1), (folded / "halo.json", 2)):
        out = tmp_path / f"out{threads}"
        done = halo("apply", renamed, "--recipe", recipe, "-t", threads, "-o", out)
        assert done.code == 0, done.err
        assert "note: the source differs" not in done.err
        original = recipe if recipe.is_dir() else recipe.parent
        assert sha256(out / "model.gguf") == sha256(original / "model.gguf")


def test_a_recipe_of_another_source_says_so(halo: Halo, made: Made, tmp_path: Path) -> None:
    changed = shutil.copytree(made.source, tmp_path / "model")
    raw = bytearray((changed / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (changed / "model.safetensors").write_bytes(raw)
    done = halo("apply", changed, "--recipe", made.path, "-o", tmp_path / "out")
    assert done.code == 0 and "note: the source differs from the recipe's" in done.err


def test_a_recipe_with_an_imatrix_wants_it_again(halo: Halo, made: Made, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert halo(*quick(made, "--bpw", 5, "-q", "-o", first)).code == 0
    assert "--imatrix" in halo("apply", made.source, "--recipe", first, "-o", tmp_path / "out").error()
    again = ("apply", made.source, "--recipe", first, "--imatrix", made.imatrix, "-q", "-o", tmp_path / "out")
    assert halo(*again).code == 0
    assert sha256(tmp_path / "out" / "model.gguf") == sha256(first / "model.gguf")


def test_the_same_bytes_for_any_number_of_threads(halo: Halo, made: Made, words: Path, tmp_path: Path) -> None:
    for threads in (1, 2, 4):
        out = tmp_path / str(threads)
        options = (*FEW_TYPES, "--calibration", words, "--bpw", 5, "-q", "-t", threads, "-o", out)
        assert halo("apply", made.source, *options).code == 0
        assert sha256(out / "model.gguf") == made.manifest["file"]["sha256"], threads


def test_a_saved_imatrix_gives_the_calibrations_importance(halo: Halo, made: Made, tmp_path: Path) -> None:
    """The policy may see less of an imatrix, but the same types get the same bytes but for the header."""
    pins = [
        x
        for n, r in made.manifest["tensors"].items()
        for x in ("--pin", f"{n.replace('.', chr(92) + '.')}={r['type']}")
    ]
    assert halo(*quick(made, "--bpw", 9, "--no-fold", "-q", *pins, "-o", tmp_path / "out")).code == 0
    ours, theirs = read_header(tmp_path / "out" / "model.gguf"), read_header(made.model)
    assert not made.manifest["fold_exponents"]
    data = [Path(h.path).read_bytes() for h in (ours, theirs)]
    for name in made.manifest["tensors"]:
        a, b = ours.tensors[name], theirs.tensors[name]
        assert data[0][a.offset : a.offset + a.nbytes] == data[1][b.offset : b.offset + b.nbytes], name


def test_a_quantised_source_is_told(halo: Halo, made: Made, tmp_path: Path) -> None:
    done = halo("apply", made.model, *FEW_TYPES, "--imatrix", made.imatrix, "--bpw", 4.8, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    (note,) = [line for line in done.err.splitlines() if "already quantised" in line]
    assert note.startswith("note: ")
    assert any("already quantised" in n for n in json.loads((tmp_path / "out" / "halo.json").read_text())["notes"])


def test_an_unknown_architecture_goes_through_as_gguf(halo: Halo, made: Made, tmp_path: Path) -> None:
    """Orion is Llama with biases in its norms: llama.cpp runs it, HALO has no forward pass for it."""
    source = open_checkpoint(made.source)
    metadata = {k.replace("llama.", "orion."): v for k, v in source.metadata.items()}
    metadata |= {
        "general.architecture": Field.string("orion"),
        "orion.attention.layer_norm_epsilon": Field.float32(1e-5),
    }
    tensors: dict[str, Any] = dict(source.tensors)
    path = tmp_path / "orion.gguf"
    write_with_norm_biases(path, metadata, tensors)
    done = halo("apply", path, *FEW_TYPES, "--bpw", 5, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "note: HALO has no forward pass for the architecture 'orion'" in done.err
    assert "--imatrix" in done.err
    done = halo("apply", path, *FEW_TYPES, "--bpw", 5, "--imatrix", made.imatrix, "-q", "-o", tmp_path / "with")
    assert done == Result(0, "", "")
    manifest = json.loads((tmp_path / "with" / "halo.json").read_text())
    assert manifest["fold_exponents"] == {}, "its norms have biases, which a fold would leave behind"
    assert manifest["architecture"] == "orion"


def write_with_norm_biases(path: Path, metadata: dict[str, Field], tensors: dict[str, Any]) -> None:
    """A float GGUF of the tensors, each norm with a bias beside it."""
    from dataclasses import replace

    import numpy as np

    from halo.gguf_file import write_tensor

    for name in [n for n in tensors if n.endswith("norm.weight")]:
        bias = np.full(tensors[name].shape, 0.01, np.float32)
        tensors[name.replace(".weight", ".bias")] = replace(
            tensors[name], name=name.replace(".weight", ".bias"), reader=lambda start, stop, b=bias: b[start:stop]
        )
    holder = type("Holder", (), {"tensors": tensors})
    listed = entries(holder, {})  # type: ignore[arg-type]
    with path.open("wb") as file:
        file.write(header_bytes(metadata, listed))
        for entry, tensor in zip(listed, tensors.values(), strict=True):
            write_tensor(file, [tensor.read()], entry.nbytes)


def test_substitutions_are_told(halo: Halo, tmp_path: Path, words: Path) -> None:
    """Rows of 64: no K-quant fits, and it is said, not done in silence."""
    from tests.tiny import make_hf

    narrow = make_hf(tmp_path / "narrow", "qwen2")
    done = halo(
        "apply", narrow, "--calibration", words, "--type-set", "q4_k,q4_0,q8_0", "--bpw", 9, "-o", tmp_path / "out"
    )
    assert done.code == 0, done.err
    assert "rows of 64, no multiple of 256: Q4_K do not fit" in done.err
    assert {r["type"] for r in json.loads((tmp_path / "out" / "halo.json").read_text())["tensors"].values()} <= {
        "Q4_0",
        "Q8_0",
    }


REAL_TYPES = ("--type-set", "q3_k,q4_0,q4_k,q5_0,q8_0", "--no-fold")
DEVICE = 'name = "small board"\nbackend = "cpu"\nmemory_bytes = 250000000\n'


def test_budgets_on_the_real_model(halo: Halo, tmp_path: Path) -> None:
    """Met from below and used to 99.5 %, as bits, as a size and for a device."""
    source, saved = smollm2_gguf(), tmp_path / "real.imatrix.gguf"
    (tmp_path / "board.toml").write_text(DEVICE)
    first = ("--calibration-tokens", 512, "--save-imatrix", saved)
    for asked, statistics in (
        (("--bpw", 4.8), first),
        (("--size", "100MB"), ("--imatrix", saved)),
        (("--device", tmp_path / "board.toml", "--ctx", 2048), ("--imatrix", saved)),
    ):
        done = halo("plan", source, *REAL_TYPES, *asked, *statistics, "--json")
        assert done.code == 0, done.err
        record = json.loads(done.out)
        budget = record["budget"]["file_bytes"]
        assert 0.995 * budget <= record["file_bytes"] <= budget, asked
        if asked[0] == "--device":
            assert record["expected_memory"] <= 250_000_000 and "small board" in record["budget"]["asked"]
            assert budget < 6.5 * 134_515_008 / 8, "the device must be what limits it"
