"""``halo inspect`` and ``halo policies``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halo.gguf_file import read_header
from halo.heatmap import heat_map, warmth
from halo.policy_file import shipped
from tests.conftest import Made


def test_a_bundle(halo, made: Made) -> None:
    done = halo("inspect", made.path, "--json")
    record = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert record["path"] == str(made.model)
    assert record["file_bytes"] == made.model.stat().st_size
    assert record["bpw"] == pytest.approx(made.manifest["file"]["bpw"])
    assert (record["architecture"], record["name"]) == ("llama", made.manifest["model"])
    header, tensors = read_header(made.model), {t["name"]: t for t in record["tensors"]}
    assert {n: (tuple(t["shape"]), t["type"], t["nbytes"]) for n, t in tensors.items()} == {
        n: (t.shape, t.type.name, t.nbytes) for n, t in header.tensors.items()
    }
    for name, entry in made.manifest["tensors"].items():
        assert (tensors[name]["type"], tensors[name]["damage"]) == (entry["type"], entry["damage"])
    assert tensors["blk.0.attn_norm.weight"]["damage"] is None


def test_a_bare_file_has_no_damage(halo, made: Made) -> None:
    record = json.loads(halo("inspect", made.model, "--json").out)
    assert {t["damage"] for t in record["tensors"]} == {None}


def test_for_people(halo, made: Made) -> None:
    done = halo("inspect", made.path)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    for word in ("attn_q", "ffn_down", "output.weight", "mean damage", "bits per weight"):
        assert word in done.out
    rows = [line.split() for line in done.out.splitlines()]
    blocks = [row for row in rows if row and row[0] in ("0", "1")]
    kinds = [made.manifest["tensors"][f"blk.1.{r}.weight"]["type"] for r in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]  # fmt: skip
    assert len(blocks) == 2 and blocks[1][1:] == kinds
    assert "blk.1.attn_norm.weight" in halo("inspect", made.path, "--tensors").out
    assert "blk.1.attn_norm.weight" not in done.out


def test_a_hugging_face_folder_is_neither(halo, made: Made) -> None:
    assert "neither a bundle" in halo("inspect", made.source).error()


def test_the_heat_map_has_a_place_for_every_role() -> None:
    found = heat_map({
        "token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_K", "blk.2.ffn_down.weight": "Q6_K",
        "blk.2.attn_norm.weight": "F32", "blk.2.ffn_down_exps.weight": "Q3_K",
    })  # fmt: skip
    assert found.roles == ("attn_q", "ffn_down")
    assert [block for block, _ in found.rows] == [0, 2]
    assert found.outside == {"token_embd.weight": "Q8_0"}
    assert 0 <= warmth("Q2_K") < warmth("Q4_K") < warmth("Q8_0") == warmth("F16") == 1


def test_policies(halo) -> None:
    done = halo("policies")
    assert (done.code, done.err) == (0, "")
    records = json.loads(halo("policies", "--json").out)
    assert [r["name"] for r in records] == [p.stem for p in shipped()]
    assert all(r["name"] in done.out and r["card"]["summary"] for r in records)


def test_a_card_in_full(halo) -> None:
    done = halo("policies", "llama-arch")
    (record,) = json.loads(halo("policies", "llama-arch", "--json").out)
    assert done.code == 0
    for key in ("name", "head", "family", *record["card"]):
        assert any(line.startswith(key) for line in done.out.splitlines()), key


def test_a_policy_by_path(halo, tmp_path: Path) -> None:
    copied = tmp_path / "mine.pt"
    copied.write_bytes(shipped()[0].read_bytes())
    (record,) = json.loads(halo("policies", copied, "--json").out)
    assert record["name"] == "mine"
