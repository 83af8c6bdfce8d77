"""The diagonal Fisher predicts the KL divergence that real errors cause."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from halo.policies.fisher import LOOKUP, fisher_damage, lookup_damage, output_gradients
from halo.policies.fit_worth import log_ratios, policy_dict, role_weights

from halo.calibration import calibrate, single_threaded_torch
from halo.checkpoint import Checkpoint, Tensor, open_checkpoint
from halo.events import ignore
from halo.network import Network
from halo.policy_file import from_dict
from halo.roles import ROLES
from tests.tiny import make_hf

WINDOWS = np.random.default_rng(1).integers(0, 300, (24, 48)).astype(np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = make_hf(tmp_path_factory.mktemp("fisher") / "tiny", "llama", hidden_size=256, intermediate_size=256)
    return open_checkpoint(folder)


def log_probabilities(checkpoint: Checkpoint) -> torch.Tensor:
    network = Network(checkpoint)
    with torch.inference_mode():
        hidden = network.embed(WINDOWS)
        for block in range(network.hyper.n_blocks):
            hidden = network.attention(block, network.attention_weights(block), hidden, lambda names, x: None)
            hidden = network.feed_forward(block, network.feed_forward_weights(block), hidden, lambda names, x: None)
        table = torch.from_numpy(checkpoint.tensors["output.weight"].read())
        return F.linear(network.output_norm(hidden), table).double().log_softmax(-1)


def with_noise(checkpoint: Checkpoint, name: str) -> tuple[Checkpoint, np.ndarray, np.ndarray]:
    """A copy in which one tensor has small independent errors; the rows before and after."""
    rows = checkpoint.tensors[name].read()
    noise = np.random.default_rng(0).normal(size=rows.shape) * rows.std() * 0.02
    spoiled = (rows + noise).astype(np.float32)

    def reader(start: int, stop: int) -> np.ndarray:
        return spoiled[start:stop]

    tensors = checkpoint.tensors | {name: Tensor(name, rows.shape, "F32", reader)}
    copy = Checkpoint(checkpoint.path, checkpoint.kind, checkpoint.architecture, checkpoint.metadata, tensors, [])
    return copy, rows, spoiled


def measured_kld(a: Checkpoint, b: Checkpoint) -> float:
    reference, changed = log_probabilities(a), log_probabilities(b)
    return float((reference.exp() * (reference - changed)).sum(-1).mean())


@pytest.fixture(scope="module")
def predict(checkpoint: Checkpoint) -> Callable[[str, np.ndarray, np.ndarray], float]:
    gradients = output_gradients(checkpoint, WINDOWS, seed=3)
    with ThreadPoolExecutor(2, initializer=single_threaded_torch) as pool:
        statistics = calibrate(checkpoint, WINDOWS, pool, 2, ignore, torch.float32)

    def damage(name: str, rows: np.ndarray, restored: np.ndarray) -> float:
        if name == "token_embd.weight":
            used = np.unique(WINDOWS)
            return lookup_damage(rows[used], restored[used], gradients[LOOKUP])
        return fisher_damage(rows, restored, np.arange(len(rows)), gradients[name], statistics[name].mean_square)

    return damage


NAMES = (
    "blk.0.attn_v.weight",
    "blk.0.ffn_down.weight",
    "blk.1.attn_q.weight",
    "blk.1.ffn_up.weight",
    "output.weight",
    "token_embd.weight",
)


@pytest.mark.parametrize("name", NAMES)
def test_predicts_the_kl_divergence_of_small_independent_errors(
    checkpoint: Checkpoint, predict: Callable[[str, np.ndarray, np.ndarray], float], name: str
) -> None:
    changed, rows, spoiled = with_noise(checkpoint, name)
    assert 0.6 < predict(name, rows, spoiled) / measured_kld(checkpoint, changed) < 1.6


def test_fit_makes_a_policy_that_loads(checkpoint: Checkpoint) -> None:
    weights = role_weights({"tiny": log_ratios(checkpoint, WINDOWS[:4], seed=0)})
    assert set(weights) == set(ROLES)
    policy = from_dict(policy_dict(weights, {"summary": "test"}), Path("test.pt"), "0")
    one_hot = np.zeros((len(ROLES), policy.features.width), np.float32)
    one_hot[range(len(ROLES)), range(len(ROLES))] = 1
    assert np.allclose(np.log(policy.worth(one_hot)), [weights[r] for r in ROLES], atol=1e-5)
