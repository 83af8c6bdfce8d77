"""Scale folding changes the numbers of a file and not what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halo import damage, fold_search
from halo.checkpoint import Checkpoint, open_checkpoint
from halo.events import ignore
from halo.folding import Folding, Site, channel_magnitude, fold, sites
from halo.gguf_types import TYPES, type_set
from halo.planning import thread_pool
from halo.quantise import write_gguf
from halo.roles import quantisable
from halo.statistics import Statistics
from tests.test_exactness import PROMPT, llama_logits, load
from tests.test_network import random_windows, statistics_of
from tests.tiny import make_hf

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 8}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
}  # fmt: skip
PLACES = ("attn_norm", "attn_v", "ffn_norm", "ffn_up")


def exaggerate(folder: Path, name: str) -> None:
    """Give a stored vector's entries, or a matrix's rows, very different sizes, as trained models have them."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])[name]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    rows = np.frombuffer(raw[start:stop], np.float32).reshape(entry["shape"][0], -1)
    factors = np.exp(np.random.default_rng(3).normal(0, 1.2, (len(rows), 1)))
    raw[start:stop] = (rows * factors).astype(np.float32).tobytes()
    path.write_bytes(raw)


def prepared(folder: Path) -> tuple[Checkpoint, list[Site], Statistics]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, sites(checkpoint), statistics_of(folder, random_windows(500))


def logits(checkpoint: Checkpoint, folding: Folding, path: Path) -> np.ndarray:
    """llama.cpp's, of the checkpoint written in float32."""
    floats = {t.name: TYPES["F32"] for t in checkpoint.tensors.values()}
    with thread_pool(2) as (pool, _), path.open("wb") as file:
        write_gguf(file, checkpoint, checkpoint.metadata, floats, {}, folding, pool, ignore)
    llm = load(path)
    return llama_logits(llm, llm.tokenize(PROMPT.encode(), add_bos=True)[:48])


@pytest.mark.parametrize("case", CASES)
def test_folding_is_free(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    folder = make_hf(tmp_path / "hf", family, **options)
    exaggerate(folder, "model.layers.0.self_attn.v_proj.weight")
    exaggerate(folder, "model.layers.1.mlp.up_proj.weight")
    checkpoint, places, statistics = prepared(folder)
    assert [p.key for p in places] == [f"blk.{b}.{p}" for b in range(checkpoint.hyper.n_blocks) for p in PLACES]
    folding = fold_search.build(places, statistics, {p.key: 0.5 for p in places})
    for place in places:
        for reader in place.readers:
            scale = folding.columns[reader]
            assert scale.max() > 1.2 * scale.min(), f"{reader}: the scales are too even to show anything"
    plain = logits(checkpoint, Folding(), tmp_path / "plain.gguf")
    folded = logits(checkpoint, folding, tmp_path / "folded.gguf")
    assert np.abs(plain).max() > 0.5
    assert not np.array_equal(plain, folded)
    assert np.abs(folded - plain).max() <= 1e-3 * np.abs(plain).max()


def test_one_side_of_a_fold_alone_is_not_free(tmp_path: Path) -> None:
    """The comparison above would see a site whose producer does not compensate."""
    folder = make_hf(tmp_path / "hf", "llama")
    exaggerate(folder, "model.layers.1.mlp.up_proj.weight")
    checkpoint, places, statistics = prepared(folder)
    plain = logits(checkpoint, Folding(), tmp_path / "plain.gguf")
    for place in places[-4:]:
        half = Folding(columns=fold_search.build([place], statistics, {place.key: 0.5}).columns)
        broken = logits(checkpoint, half, tmp_path / "half.gguf")
        assert np.abs(broken - plain).max() > 5e-3 * np.abs(plain).max(), place.key


def test_exponent_one_half_is_that_of_ramp() -> None:
    """Algorithm 2: s = sqrt(act_scale) / mean; HALO's differs by a constant and by its rounding."""
    site = Site("blk.0.attn_norm", ("norm",), ("q",))
    magnitude = np.exp(np.random.default_rng(0).normal(0, 1.5, 300))
    ramp = np.sqrt(magnitude) / np.sqrt(magnitude).mean()
    found = fold(site, magnitude, 0.5)
    ratio = found.columns["q"] / ramp
    assert ratio.max() / ratio.min() <= 2 ** (1 / 16) * 1.001
    assert np.allclose(found.columns["q"] * found.rows["norm"], 1, rtol=1e-6)
    steps = np.log2(found.columns["q"].astype(np.float64)) * 16
    assert np.abs(steps - steps.round()).max() < 1e-3


def test_scales_stay_within_bounds() -> None:
    magnitude = np.ones(64)
    magnitude[3], magnitude[5] = 0.0, 1e9
    scale = fold(Site("k", ("norm",), ("q",)), magnitude, 0.5).columns["q"]
    assert np.isfinite(scale).all() and scale.min() >= 2**-6 and scale.max() <= 2**6


def test_grouped_heads_share_their_value_heads_scale() -> None:
    kv_heads, shared, head_dim = 2, 3, 4
    site = Site("blk.0.attn_v", ("v",), ("o",), (kv_heads, shared, head_dim))
    magnitude = np.arange(1.0, 9.0)
    found = fold(site, magnitude, 0.5)
    heads = found.columns["o"].reshape(kv_heads, shared, head_dim)
    assert (heads == heads[:, :1]).all()
    assert np.allclose(heads[:, 0].reshape(-1) * found.rows["v"], 1)


def test_the_folded_importance_is_that_of_the_folded_input(tmp_path: Path) -> None:
    _, places, statistics = prepared(make_hf(tmp_path / "hf", "llama"))
    folding = fold_search.build(places, statistics, {p.key: 0.5 for p in places})
    name = "blk.0.ffn_down.weight"
    found = folding.importance(name, statistics[name].mean_square)
    assert np.allclose(found, statistics[name].mean_square / folding.columns[name] ** 2)
    assert np.allclose(
        folding.max_abs(name, statistics[name].max_abs), statistics[name].max_abs / folding.columns[name]
    )
    assert folding.importance(name, None) is None
    assert folding.importance("output.weight", statistics[name].mean_square) is statistics[name].mean_square


def test_the_search_never_raises_the_damage(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", "llama", hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    exaggerate(folder, "model.layers.0.post_attention_layernorm.weight")
    exaggerate(folder, "model.layers.1.mlp.up_proj.weight")
    checkpoint, places, statistics = prepared(folder)
    tensors = quantisable(checkpoint.tensors)
    kinds = type_set("q3_k,q4_0")
    with thread_pool(2) as (pool, threads):
        for kind in kinds:
            chosen = {t.name: kind for t in tensors}
            worth = {t.name: 1.0 + (i % 3) for i, t in enumerate(tensors)}
            exponents = fold_search.search(checkpoint, places, statistics, chosen, worth, pool, threads, ignore)
            assert exponents, f"{kind.name}: nothing was worth folding in a model full of outliers"
            assert set(exponents.values()) <= set(fold_search.EXPONENTS)
            folding = fold_search.build(places, statistics, exponents)
            before, after = (
                damage.measure(checkpoint, tensors, [kind], statistics, f, pool, threads, ignore)
                for f in (Folding(), folding)
            )
            for place in places:
                old, new = (
                    sum(worth[r] * table[r].by_type[kind.name] for r in place.readers) for table in (before, after)
                )
                # attn_v is a reader of attn_norm and a producer of attn_output: its rows are scaled by another site.
                assert new <= old * (0.995 if place.key in exponents else 1.005), (kind.name, place.key, old, new)


def test_floats_are_not_folded(tmp_path: Path) -> None:
    checkpoint, places, statistics = prepared(make_hf(tmp_path / "hf", "llama"))
    chosen = {t.name: TYPES["F16"] for t in quantisable(checkpoint.tensors)}
    with thread_pool(1) as (pool, threads):
        assert not fold_search.search(
            checkpoint, places, statistics, chosen, dict.fromkeys(chosen, 1.0), pool, threads, ignore
        )


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("attn_k.weight", {"attn_norm"}),  # q, k and v in one tensor
        ("ffn_gate.weight", {"ffn_norm", "ffn_up"}),  # an activation between up and down
        ("ffn_norm.weight", {"ffn_norm"}),
        ("attn_v.weight", {"attn_norm", "attn_v"}),
        ("attn_output.weight", {"attn_v"}),
        ("ffn_down.weight", {"ffn_up"}),
    ],
)
def test_a_site_without_all_its_tensors_is_left_alone(missing: str, gone: set[str], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_hf(tmp_path / "hf", "llama"))
    del checkpoint.tensors[f"blk.1.{missing}"]
    assert {s.key for s in sites(checkpoint) if s.key.startswith("blk.1.")} == {
        f"blk.1.{place}" for place in PLACES if place not in gone
    }
    assert sum(s.key.startswith("blk.0.") for s in sites(checkpoint)) == 4


def test_an_unknown_graph_is_left_alone(wide: Path) -> None:
    """command-r's feed-forward reads attn_norm too, and starcoder2's ffn_up is followed by GELU: same tensor names."""
    checkpoint = open_checkpoint(wide)
    checkpoint.metadata = {k.replace("llama.", "command-r."): v for k, v in checkpoint.metadata.items()}
    checkpoint.architecture = "command-r"
    assert sites(checkpoint) == []


def test_without_statistics_nothing_is_folded(wide: Path) -> None:
    checkpoint = open_checkpoint(wide)
    places = sites(checkpoint)
    assert channel_magnitude(places[0], {}) is None
    assert fold_search.build(places, {}, {places[0].key: 0.5}) == Folding()
