"""Policy files, the two action heads, and what a policy sees of a tensor."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halo.checkpoint import Tensor
from halo.damage import TensorDamage
from halo.decide import Budget, by_bits, by_worth, nbytes
from halo.errors import BudgetError, PolicyError
from halo.features import FEATURE_SETS, Layer, halo1, ramp11
from halo.gguf_types import TYPES, type_set
from halo.policy_file import find, from_dict, load, shipped
from halo.statistics import ActivationStatistics

ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
N_BLOCKS = 32  # with seven layers a block, Llama-2-7B's 224


def layer(
    name: str, shape: tuple[int, int] = (512, 256), seed: int = 0, peak: float = 20.0, scale: float = 1.0
) -> Layer:
    """A layer with normal weights and inputs whose largest channel reaches ``peak``."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((400, shape[1])) * np.exp(random.normal(0, 0.7, shape[1]))
    inputs *= peak / np.abs(inputs).max()
    weights = random.standard_normal(shape) * 0.02 * scale
    statistics = ActivationStatistics(
        *(x.astype(np.float32) for x in (np.square(inputs).mean(0), inputs.mean(0), np.abs(inputs).mean(0))),
        np.abs(inputs).max(0).astype(np.float32),
        400,
    )
    damage = TensorDamage({"Q3_K": 0.02, "Q4_K": 0.005}, float(weights.std()), float(np.abs(weights).mean()))
    return Layer(Tensor(name, shape, "F16", lambda start, stop: weights[start:stop]), damage, statistics)


def model_layers() -> list[Layer]:
    """224 layers of unequal inputs."""
    base = {role: layer(f"blk.0.{role}.weight", seed=i) for i, role in enumerate(ROLES)}
    return [
        replace(base[role], tensor=replace(base[role].tensor, name=f"blk.{block}.{role}.weight"))
        for block in range(N_BLOCKS)
        for role in ROLES
    ]


def network(width: int, hidden: int = 32, outputs: int = 1) -> torch.nn.Sequential:
    """An actor like the paper's (Table 27), small."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(width, hidden), torch.nn.LayerNorm(hidden), torch.nn.ReLU(),
        torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs),
    ).double()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def policy_dict(head: str = "worth", hidden: int = 32) -> dict[str, Any]:
    width = FEATURE_SETS["ramp11"].width
    model = network(width, hidden)
    layers = [
        {
            "weight": model[i].weight.detach(), "bias": model[i].bias.detach(), "scale": model[i + 1].weight.detach(),
            "shift": model[i + 1].bias.detach(), "activation": activation,
        }
        for i, activation in ((0, "relu"), (3, "tanh"))
    ]  # fmt: skip
    layers.append({"weight": model[6].weight.detach(), "bias": model[6].bias.detach(), "activation": "none"})
    return {
        "format": 1, "head": head, "feature_set": "ramp11", "family": "llama",
        "bits": [3, 4, 5, 6] if head == "bits" else [], "mean": torch.linspace(-1, 1, width),
        "std": torch.linspace(0.5, 2, width), "layers": layers, "card": {"summary": "for tests"},
    }  # fmt: skip


def saved(folder: Path, data: Any) -> Path:
    path = folder / "policy.pt"
    torch.save(data, path)
    return path


def normalised(data: dict[str, Any], features: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(features).double() - data["mean"].double()) / data["std"].double()


@pytest.mark.parametrize("path", shipped(), ids=lambda p: p.stem)
def test_shipped_policies_load(path: Path) -> None:
    policy = load(path.stem)
    assert policy.sha256 == load(f"{path.stem}.pt").sha256 == load(str(path)).sha256
    assert find(path.stem) == path
    assert str(policy.card["summary"])
    layers = [layer(f"blk.{b}.{r}.weight", seed=b) for b in range(3) for r in ROLES]
    features = policy.features.compute(layers, 3)
    if policy.head == "worth":
        worth = policy.worth(features)
        assert (worth > 0).all() and len(set(worth.tolist())) > 3, "it tells no layers apart"
    else:
        assert set(policy.choose_bits(features, 0.0)) <= set(policy.bits)


def test_worth_is_torchs_forward(tmp_path: Path) -> None:
    data = policy_dict()
    features = np.random.default_rng(0).normal(0, 2, (50, 11)).astype(np.float32)
    with torch.no_grad():
        expected = network(11)(normalised(data, features))[:, 0].clamp(-8, 8).exp().numpy()
    found = load(str(saved(tmp_path, data))).worth(features)
    assert np.allclose(found, expected, rtol=1e-6)
    assert found.max() / found.min() > 2


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.7, 20.0])
def test_bits_are_chosen_in_order(shift: float, tmp_path: Path) -> None:
    """Each layer sees the one before it and the running average (Table 24, features 10 and 11)."""
    data = policy_dict("bits")
    features = np.random.default_rng(0).normal(0, 2, (60, 11)).astype(np.float32)
    features[:, 9:] = 99  # whatever stands there is overwritten
    model, expected = network(11), []
    for row in features.copy():
        row[9] = expected[-1] / 8 if expected else 0
        row[10] = sum(expected) / len(expected) / 8 if expected else 0
        with torch.no_grad():
            action = torch.sigmoid(model(normalised(data, row[None]))[0, 0] + shift)
        expected.append([3, 4, 5, 6][int((action * 3).round())])
    found = load(str(saved(tmp_path, data))).choose_bits(features, shift)
    assert found == expected
    assert shift == 20.0 or len(set(found)) > 1


def test_the_previous_layers_bits_matter(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(0, 2, (60, 11)).astype(np.float32)
    data = policy_dict("bits")
    data["layers"][0]["weight"][:, 9:] *= 8
    sequential = load(str(saved(tmp_path, data))).choose_bits(features, 0.0)
    data["layers"][0]["weight"][:, 9:] = 0
    assert load(str(saved(tmp_path, data))).choose_bits(features, 0.0) != sequential


@pytest.mark.parametrize("head", ["worth", "bits"])
def test_a_7b_model_is_decided_within_a_second(head: str, tmp_path: Path) -> None:
    data = policy_dict(head, hidden=512)  # as wide as the paper's
    policy, layers = load(str(saved(tmp_path, data))), model_layers()
    tensors, kinds = [x.tensor for x in layers], type_set("cpu")
    table = {t.name: TensorDamage({k.name: 4.0**-k.bpw for k in kinds}, 1.0, 0.8) for t in tensors}
    n_params = sum(t.n_elements for t in tensors)
    budget = Budget(int(4.25 * n_params / 8), 0, "--bpw 4.25")
    times = []
    for _ in range(3):
        start = time.thread_time()  # other work on the machine is not ours
        features = policy.features.compute(layers, N_BLOCKS)
        if head == "worth":
            worth = dict(zip(table, policy.worth(features).tolist(), strict=True))
            chosen = by_worth(tensors, kinds, table, worth, {}, budget, n_params).chosen
        else:
            chosen = by_bits(tensors, policy, features, {}, budget, n_params).chosen
        times.append(time.thread_time() - start)
        if times[-1] < 1:
            break
    assert min(times) < 1, times
    size = sum(nbytes(t, chosen[t.name]) for t in tensors)
    assert size <= budget.file_bytes
    assert size >= 0.97 * budget.file_bytes


def test_the_bits_head_keeps_pins_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    policy, layers = load(str(saved(tmp_path, policy_dict("bits")))), model_layers()[:14]
    tensors = [x.tensor for x in layers]
    features, pins = ramp11(layers, 2), {tensors[3].name: TYPES["Q8_0"]}
    n_params = sum(t.n_elements for t in tensors)
    least = sum(nbytes(t, pins.get(t.name, TYPES["Q3_K"])) for t in tensors)
    chosen = by_bits(tensors, policy, features, pins, Budget(least, 0, "--size"), n_params).chosen
    assert [k.name for k in chosen.values()] == ["Q3_K"] * 3 + ["Q8_0"] + ["Q3_K"] * 10
    with pytest.raises(BudgetError, match=str(least)):
        by_bits(tensors, policy, features, pins, Budget(least - 1, 0, "--size"), n_params)
    narrow = [replace(t, shape=(512, 96)) for t in tensors]
    decision = by_bits(narrow, policy, features, {}, Budget(10**9, 0, "--size"), n_params)
    assert set(decision.substitutions) <= {t.name for t in narrow} and decision.substitutions
    assert all(k.fits(96) for k in decision.chosen.values())


class Malice:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_policy_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = saved(tmp_path, policy_dict() | {"card": Malice(mark)})
    with pytest.raises(PolicyError, match="could run code"):
        load(str(path))
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file is harmless: the test shows nothing"


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data | changes


def changed_layer(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data | {"layers": [data["layers"][0] | {key: value}, *data["layers"][1:]]}


NAN = torch.full((11,), math.nan)
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (changed(format=2), "policy format 2 is unknown"),
    "no version": (lambda d: {k: v for k, v in d.items() if k != "format"}, "policy format None"),
    "feature set": (changed(feature_set="ramp12"), "feature set 'ramp12' is unknown"),
    "head": (changed(head="oracle"), "action head 'oracle' is unknown"),
    "no bits": (changed(head="bits", bits=[]), "bit-widths"),
    "7 bits": (changed(head="bits", bits=[3, 7]), "bit-widths"),
    "bits are words": (changed(head="bits", bits=["three"]), "bit"),
    "bits are a number": (changed(head="bits", bits=4), "bit"),
    "mean's shape": (changed(mean=torch.zeros(10)), "'mean' has shape"),
    "mean missing": (changed(mean=None), "'mean' is missing"),
    "NaN in the mean": (changed(mean=NAN), "'mean' holds NaN"),
    "std of zero": (changed(std=torch.zeros(11)), "'std' holds zero"),
    "no layers": (changed(layers=[]), "no layers"),
    "layers are a number": (changed(layers=3), "layers"),
    "a layer is no dict": (changed(layers=[torch.zeros(3)]), "'weight' is missing"),
    "weight's shape": (changed_layer("weight", torch.zeros(32, 12)), "'weight' has shape"),
    "bias's shape": (changed_layer("bias", torch.zeros(31)), "'bias' has shape"),
    "scale without shift": (changed_layer("shift", None), "'shift' is missing"),
    "Inf in a layer": (changed_layer("bias", torch.full((32,), math.inf)), "'bias' holds NaN or Inf"),
    "activation": (changed_layer("activation", "swish"), "activation 'swish' is unknown"),
    "not a dict": (lambda d: [d], "it holds a list"),
    "a tensor": (lambda d: torch.zeros(3), "it holds a Tensor"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_policies_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    change, says = BAD[what]
    path = saved(tmp_path, change(policy_dict()))
    with pytest.raises(PolicyError) as refusal:
        load(str(path))
    text = str(refusal.value)
    assert says in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, 0.99, "text", "zeros"])
def test_what_is_no_policy_file_at_all(cut: int | float | str, tmp_path: Path) -> None:
    path = saved(tmp_path, policy_dict())
    raw = path.read_bytes()
    damaged = {"text": b"hello, world\n" * 9, "zeros": bytes(500)}
    path.write_bytes(
        damaged[cut] if isinstance(cut, str) else raw[: cut if isinstance(cut, int) else int(len(raw) * cut)]
    )
    with pytest.raises(PolicyError) as refusal:
        load(str(path))
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="llama-arch"):
        load("no-such-policy")
    with pytest.raises(PolicyError):
        load(str(tmp_path))


def test_features_that_are_not_the_policys(tmp_path: Path) -> None:
    policy = from_dict(policy_dict(), tmp_path / "p.pt", "")
    with pytest.raises(PolicyError, match="11 features"):
        policy.worth(np.zeros((3, 12), np.float32))
    broken = np.zeros((3, 11), np.float32)
    broken[1, 7] = np.nan
    with pytest.raises(PolicyError, match="tensor 1"):
        policy.worth(broken)


def test_ramp11_is_table_24() -> None:
    x = layer("blk.3.ffn_down.weight", (2048, 512))
    row = ramp11([x], 11)[0]
    act_scales = x.statistics.max_abs / (10_000 * math.sqrt(512))
    assert np.allclose(
        row,
        [
            3 / 10, math.log2(512 / 16), math.log2(2048 / 16), min(x.damage.weight_std * 10, 1),
            min(x.damage.weight_mean_abs * 10, 1), 0.75, 0.5, act_scales.mean() * 100, act_scales.max() * 1000, 0, 0,
        ],
    )  # fmt: skip
    types = {r: ramp11([layer(f"blk.3.{r}.weight")], 11)[0, 5] for r in (*ROLES, "attn_qkv")}
    assert {r: round(float(t), 4) for r, t in types.items()} == dict(
        zip((*ROLES, "attn_qkv"), (0, 0, 0, 0.25, 0.5, 0.6, 0.75, 1.0), strict=True)
    )
    depths = ramp11([layer(n) for n in ("token_embd.weight", "blk.0.attn_q.weight", "blk.10.attn_q.weight")], 11)
    assert depths[:, 0].tolist() == [0, 0, 1] and depths[:, 6].tolist() == [0, 0, 1]


@pytest.mark.parametrize("width", [576, 4096, 11008])
def test_ramp11_is_not_saturated(width: int) -> None:
    """Section 2.4's maxima run from 4.2 to 156.8: as printed, features 8 and 9 would be 1.0 for all of them."""
    peaks = (4.2, 20.0, 60.0, 127.3, 156.8)
    rows = ramp11([layer("blk.1.ffn_down.weight", (64, width), peak=p) for p in peaks], 4)
    for column in (7, 8):
        values = rows[:, column].tolist()
        assert values == sorted(values) and len(set(values)) == len(values)
        assert values[0] > 0 and values[-1] < 1


@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_halo1_is_free_of_scale(what: str) -> None:
    names = [f"blk.{b}.{r}.weight" for b in range(2) for r in ROLES]
    plain = halo1([layer(n, seed=i) for i, n in enumerate(names)], 2)
    factor = {"scale": 3.0} if what == "weights" else {"peak": 60.0}
    assert np.allclose(halo1([layer(n, seed=i, **factor) for i, n in enumerate(names)], 2), plain, atol=1e-4)
    assert np.isfinite(plain).all() and len(np.unique(plain, axis=0)) == len(plain)


@pytest.mark.parametrize("name", FEATURE_SETS)
def test_a_tensor_without_statistics_has_features(name: str) -> None:
    found = FEATURE_SETS[name].compute([replace(layer("token_embd.weight"), statistics=None)], 4)
    assert found.shape == (1, FEATURE_SETS[name].width) and found.dtype == np.float32
    assert np.isfinite(found).all()
