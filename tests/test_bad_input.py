"""Bad input ends in one clear line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Result, run_halo
from tests.conftest import FEW_TYPES, Made
from tests.test_policy import Malice, policy_dict, saved
from tests.tiny import make_hf

Halo = Callable[..., Result]
UNSAMPLED = 1  # a row of the output matrix that the damage's sample leaves out


@pytest.fixture
def folder(wide: Path, tmp_path: Path) -> Path:
    """A copy of the wide checkpoint, to be spoilt."""
    return shutil.copytree(wide, tmp_path / "model")


def refused(halo: Halo, source: Path, words: Path, *options: object) -> str:
    """The line with which ``apply`` refuses; no file may appear beside the source or under the output's name."""
    out, around = source.parent / "out", sorted(source.parent.iterdir())
    budget = () if any(str(o) in ("--bpw", "--size", "--device") for o in options) else ("--bpw", 6)
    types = () if "--type-set" in options else FEW_TYPES
    given = () if "--calibration" in options else ("--calibration", words)
    line = halo("apply", source, *budget, *types, *given, *options, "-o", out).error()
    assert sorted(source.parent.iterdir()) == around
    assert "Traceback" not in line
    return line


def spoil_weight(folder: Path, name: str, value: float, at: int = 7) -> None:
    """Overwrite one number of a stored float32 tensor."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    struct.pack_into("<f", raw, start + 4 * at, value)
    path.write_bytes(raw)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_shard(halo: Halo, tmp_path: Path, words: Path) -> None:
    folder = make_hf(tmp_path / "model", "llama", shard="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    line = refused(halo, folder, words)
    assert shard.name in line and "missing" in line


def test_no_weights(halo: Halo, folder: Path, words: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(halo, folder, words)


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.999])
def test_truncated_safetensors(kept: float, halo: Halo, folder: Path, words: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: kept if isinstance(kept, int) else int(len(raw) * kept)])
    assert "model.safetensors" in refused(halo, folder, words)


def test_wrong_shapes(halo: Halo, folder: Path, words: Path) -> None:
    edit_config(folder, intermediate_size=768)
    line = refused(halo, folder, words)
    assert "mlp" in line or "ffn" in line


# Calibration reads the blocks whole; the damage reads sampled rows of every matrix, quantising reads all.
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ],
)
def test_weights_that_are_no_numbers(
    stored: str, named: str, value: float, halo: Halo, folder: Path, words: Path
) -> None:
    spoil_weight(folder, stored, value)
    line = refused(halo, folder, words)
    assert named in line and "NaN or Inf" in line


def test_a_nan_that_only_quantising_sees(halo: Halo, folder: Path, words: Path) -> None:
    spoil_weight(folder, "lm_head.weight", float("nan"), at=256 * UNSAMPLED + 9)
    assert halo("plan", folder, "--bpw", 6, *FEW_TYPES, "--calibration", words).code == 0
    line = refused(halo, folder, words)
    assert "output.weight" in line and "NaN or Inf" in line


def test_unknown_architecture(halo: Halo, folder: Path, words: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"], model_type="mamba")
    line = refused(halo, folder, words)
    assert "amba" in line and "Llama" in line, "it must say what it can do"


def test_no_tokenizer(halo: Halo, folder: Path, words: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refused(halo, folder, words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"x", "fewer than two"),
        (b"caf\xe9 au lait", "UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_calibration_text(content: bytes | None, says: str, halo: Halo, folder: Path, words: Path) -> None:
    text = folder.parent / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert says in refused(halo, folder, words, "--calibration", text)


def test_gguf_cut_off(halo: Halo, made: Made, tmp_path: Path, words: Path) -> None:
    raw = made.model.read_bytes()
    for kept in (3, 20, 2000, len(raw) // 2, len(raw) - 40):
        path = tmp_path / "model.gguf"
        path.write_bytes(raw[:kept])
        assert str(path) in refused(halo, path, words)


@pytest.mark.parametrize("at", [8, 16, 24])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 10**12, 5000])
def test_gguf_with_impossible_counts(at: int, count: int, halo: Halo, made: Made, tmp_path: Path, words: Path) -> None:
    """The number of tensors, of metadata fields, and the length of the first key."""
    raw = bytearray(made.model.read_bytes())
    struct.pack_into("<Q", raw, at, count)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    assert str(path) in refused(halo, path, words)


def test_not_a_model(halo: Halo, tmp_path: Path, words: Path) -> None:
    text, empty = tmp_path / "notes.txt", tmp_path / "empty"
    text.write_text("hello")
    empty.mkdir()
    assert "neither" in refused(halo, text, words)
    assert "config.json" in refused(halo, empty, words)
    assert "does not exist" in refused(halo, tmp_path / "nowhere", words)


def test_policy_with_code(halo: Halo, folder: Path, words: Path) -> None:
    mark = folder.parent / "ran"
    path = saved(folder.parent, policy_dict() | {"card": Malice(mark)})
    assert "could run code" in refused(halo, folder, words, "--policy", path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 9}, "format 9"),
        ({"mean": None}, "'mean'"),
        ({"feature_set": "x"}, "feature set"),
        ({"layers": []}, "layers"),
    ],
)
def test_policy_of_another_kind(change: dict, says: str, halo: Halo, folder: Path, words: Path) -> None:
    assert says in refused(halo, folder, words, "--policy", saved(folder.parent, policy_dict() | change))


def test_unknown_policy(halo: Halo, folder: Path, words: Path) -> None:
    line = refused(halo, folder, words, "--policy", "nonsense")
    assert "nonsense" in line and "llama-arch" in line


@pytest.mark.parametrize("width", [48, 80])
def test_rows_that_no_type_fits(width: int, halo: Halo, tmp_path: Path, words: Path) -> None:
    folder = make_hf(tmp_path / "model", "llama", hidden_size=width, intermediate_size=64, head_dim=16)
    line = refused(halo, folder, words)
    assert f"rows of {width}" in line and "no quantised type fits" in line


def test_rows_that_none_of_the_allowed_types_fits(halo: Halo, tmp_path: Path, words: Path) -> None:
    folder = make_hf(tmp_path / "model", "llama")
    line = refused(halo, folder, words, "--type-set", "k", "--bpw", 8.6)
    assert "rows of" not in line or "--type-set" in line


DEVICE = 'backend = "cpu"\nmemory_bytes = 4000000000\n'


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "big"), "--size 'big'"),
        (("--size", "-5MB"), "--size '-5MB'"),
        (("--size", "10kB"), "below the smallest possible"),
        (("--bpw", "0"), "--bpw 0"),
        (("--bpw", "nan"), "--bpw nan"),
        (("--bpw", "-3"), "--bpw -3"),
        (("--bpw", "1"), "below the smallest possible"),
        (("--bpw", "6", "--size", "2MB"), "two budgets"),
        (("--type-set", "q9_k"), "unknown type 'q9_k'"),
        (("--type-set", ","), "type set is empty"),
        (("--pin", "output"), "REGEX=TYPE"),
        (("--pin", "(=q6_k"), "regular expression"),
        (("--pin", "nothing=q6_k"), "matches no tensor"),
        (("--device", "no-such-device"), "no-such-device"),
        (("--imatrix", "missing.gguf"), "missing.gguf"),
        (("--imatrix", "."), "."),
        (("--recipe", "missing.json"), "missing.json"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_options(options: tuple[str, ...], says: str, halo: Halo, folder: Path, words: Path) -> None:
    assert says in refused(halo, folder, words, *options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (DEVICE + "colour = 'red'\n", "unknown key 'colour'"),
        ('backend = "cpu"\n', "'memory_bytes' is missing"),
        (DEVICE.replace("cpu", "abacus"), "abacus"),
        (DEVICE.replace("4000000000", "-1"), "must be positive"),
        (DEVICE.replace("4000000000", "'4 GB'"), "must be a int"),
        ("not toml at all", "not TOML"),
        (DEVICE.replace("4000000000", "1000"), "the context alone needs"),
    ],
)
def test_bad_devices(text: str, says: str, halo: Halo, folder: Path, words: Path) -> None:
    path = folder.parent / "device.toml"
    path.write_text(text)
    assert says in refused(halo, folder, words, "--device", path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 2}', "\udcff"])
def test_bad_recipes(text: str, halo: Halo, folder: Path, words: Path) -> None:
    path = folder.parent / "halo.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(path) in refused(halo, folder, words, "--recipe", path)


@pytest.mark.parametrize(
    "what", ["type", "number", "missing tensor", "other tensor", "exponent", "budget", "policy", "dtype"]
)
def test_recipes_that_do_not_fit(what: str, halo: Halo, made: Made, folder: Path, words: Path) -> None:
    data = made.manifest
    if what == "type":
        data["tensors"]["blk.0.attn_q.weight"]["type"] = "Q9_K"
    elif what == "number":
        data["tensors"] = 7
    elif what == "missing tensor":
        del data["tensors"]["blk.0.attn_q.weight"]
    elif what == "other tensor":
        data["tensors"]["blk.9.attn_q.weight"] = data["tensors"]["blk.0.attn_q.weight"]
    elif what == "exponent":
        data["fold_exponents"] = {"blk.0.attn_norm": "half"}
    elif what == "dtype":
        data["calibration"]["dtype"] = "save"
    else:
        data[what] = {}
    path = folder.parent / "halo.json"
    path.write_text(json.dumps(data))
    refused(halo, folder, words, "--recipe", path)


def test_a_process_of_its_own_agrees(folder: Path, words: Path, tmp_path: Path) -> None:
    """The tests above run the entry point in this process; once from outside, with native output and all."""
    spoil_weight(folder, "lm_head.weight", float("nan"), at=256 * UNSAMPLED + 9)
    line = run_halo("apply", folder, "--bpw", 6, *FEW_TYPES, "--calibration", words, "-o", tmp_path / "out").error()
    assert "output.weight" in line
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".halo-*"))


def test_other_commands(halo: Halo, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(30))
    for args in (
        ("inspect", tmp_path / "bad.gguf"),
        ("inspect", tmp_path),
        ("inspect", tmp_path / "none"),
        ("policies", "x"),
    ):
        assert "halo: " in halo(*args).error()


def test_the_sample_leaves_the_spoilt_row_out(wide: Path) -> None:
    """What ``test_a_nan_that_only_quantising_sees`` stands on."""
    from halo.checkpoint import open_checkpoint
    from halo.sampling import sample_rows

    index, _ = sample_rows(open_checkpoint(wide).tensors["output.weight"])
    assert UNSAMPLED not in index
