"""Importance matrices in llama.cpp's GGUF format."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from halo import imatrix
from halo.errors import OutputError, SourceError
from halo.gguf_file import Entry, Field, header_bytes, read_header, write_tensor
from halo.statistics import ActivationStatistics, Statistics
from tests.conftest import FEW_TYPES, Made
from tests.tiny import make_hf


def statistics() -> Statistics:
    random = np.random.default_rng(0)
    return {
        f"blk.0.{role}.weight": ActivationStatistics.from_mean_square(
            np.exp(random.normal(0, 3, width)).astype(np.float32), 1024
        )
        for role, width in (("attn_q", 256), ("ffn_down", 512))
    }


def write(path: Path, arrays: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    """An imatrix file with these tensors, whatever they are."""
    entries = [Entry(name, a.shape, 0) for name, a in arrays.items()]
    with path.open("wb") as file:
        file.write(header_bytes({"general.type": Field.string(kind)}, entries))
        for entry, array in zip(entries, arrays.values(), strict=True):
            write_tensor(file, [array.astype(np.float32)], entry.nbytes)
    return path


def test_round_trip(tmp_path: Path) -> None:
    path, wanted = tmp_path / "im.gguf", statistics()
    imatrix.save(path, wanted, "words.txt", 512)
    found = imatrix.load(path)
    assert set(found) == set(wanted)
    for name, entry in wanted.items():
        assert found[name].count == 1024
        assert np.allclose(found[name].mean_square, entry.mean_square, rtol=1e-6)
        assert np.allclose(found[name].max_abs, entry.max_abs, rtol=1e-5)


def test_the_format_is_llama_imatrixs(tmp_path: Path) -> None:
    """Keys and tensors as tools/imatrix/imatrix.cpp (save_imatrix) names them, read by the gguf package."""
    from gguf import GGUFReader

    path, wanted = tmp_path / "im.gguf", statistics()
    imatrix.save(path, wanted, "words.txt", 512)
    reader = GGUFReader(path)
    values = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert values == {
        "general.type": "imatrix",
        "imatrix.datasets": ["words.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    tensors = {t.name: t.data for t in reader.tensors}
    assert set(tensors) == {name + end for name in wanted for end in (".in_sum2", ".counts")}
    sums, counts = (tensors["blk.0.attn_q.weight" + end] for end in (".in_sum2", ".counts"))
    assert sums.shape == (1, 256) and counts.shape == (1, 1)
    assert np.allclose(sums[0] / counts[0], wanted["blk.0.attn_q.weight"].mean_square, rtol=1e-6)


def test_experts_are_averaged(tmp_path: Path) -> None:
    """A row an expert; one that no token reached does not count."""
    sums = np.array([[2.0, 4.0], [30.0, 60.0], [0.0, 0.0]])
    path = write(tmp_path / "im.gguf", {"e.weight.in_sum2": sums, "e.weight.counts": np.array([[2.0], [10.0], [0.0]])})
    found = imatrix.load(path)["e.weight"]
    assert np.allclose(found.mean_square, [2.0, 4.0]) and found.count == 10


@pytest.mark.parametrize(
    ("sums", "count"), [(0.0, 0.0), (1.0, 0.0), (math.nan, 5.0), (math.inf, 5.0), (1.0, math.nan), (-1.0, 5.0)]
)
def test_unusable_entries_are_named(sums: float, count: float, tmp_path: Path) -> None:
    arrays = {
        "blk.0.attn_q.weight.in_sum2": np.full((1, 8), sums),
        "blk.0.attn_q.weight.counts": np.full((1, 1), count),
    }
    with pytest.raises(SourceError, match=r"blk\.0\.attn_q\.weight has no usable entry"):
        imatrix.load(write(tmp_path / "im.gguf", arrays))


@pytest.mark.parametrize("what", ["model", "text", "no entries", "no counts", "missing", "empty", "cut off"])
def test_wrong_files(what: str, made: Made, tmp_path: Path) -> None:
    path = tmp_path / "im.gguf"
    if what == "model":
        path = made.model
    elif what == "text":
        path.write_text("not an imatrix\n" * 10)
    elif what == "no entries":
        write(path, {})
    elif what == "no counts":
        write(path, {"blk.0.attn_q.weight.in_sum2": np.ones((1, 8))})
    elif what == "empty":
        path.touch()
    elif what == "cut off":
        path.write_bytes(made.imatrix.read_bytes()[:-1000])
    with pytest.raises(SourceError) as refusal:
        imatrix.load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "im.gguf"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        imatrix.save(path, statistics(), "text", 512)
    assert path.read_text() == "mine"
    imatrix.save(path, statistics(), "text", 512, force=True)
    assert imatrix.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_calibrations_imatrix_is_whole(made: Made) -> None:
    """Every quantised tensor has its entry but an untied embedding, which is looked up and not multiplied."""
    found = imatrix.load(made.imatrix)
    assert set(found) == set(made.manifest["tensors"]) - {"token_embd.weight"}
    header = read_header(made.imatrix)
    assert header.metadata["imatrix.datasets"].value[0].endswith("words.txt")


def test_another_models_imatrix_is_refused(halo, made: Made, tmp_path: Path) -> None:
    narrow = make_hf(tmp_path / "narrow", "llama")
    line = halo("apply", narrow, "--imatrix", made.imatrix, "--bpw", 9, "-o", tmp_path / "out").error()
    assert "belongs to another model" in line and "blk.0.attn_q.weight" in line
    arrays = {"h.0.weight.in_sum2": np.ones((1, 8)), "h.0.weight.counts": np.ones((1, 1))}
    strange = write(tmp_path / "strange.gguf", arrays)
    line = halo("apply", made.source, "--imatrix", strange, *FEW_TYPES, "--bpw", 6, "-o", tmp_path / "out").error()
    assert "belongs to another model" in line
    assert not (tmp_path / "out").exists()
