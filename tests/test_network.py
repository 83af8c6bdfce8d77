"""HALO's own forward pass and its statistics, against transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from halo.calibration import calibrate
from halo.checkpoint import open_checkpoint
from halo.errors import SourceError
from halo.events import Progress, ignore
from halo.network import Network, can_run
from halo.planning import thread_pool
from halo.statistics import Statistics
from tests.test_exactness import FULL, GEMMA_ROPES, LLAMA3_ROPE, YARN, reference_logits
from tests.tiny import make_hf

LENGTH = 48  # beyond gemma3's window of 16
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "gemma3-ropes": ("gemma3", {"rope_parameters": GEMMA_ROPES}),
    "gemma3-pattern": ("gemma3", {"num_hidden_layers": 3, "layer_types": [FULL, "sliding_attention", FULL]}),
}  # fmt: skip


def random_windows(n_vocab: int, count: int = 3, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, n_vocab, (count, length)).astype(np.int32)


def own_logits(network: Network, windows: np.ndarray) -> np.ndarray:
    import torch

    def nothing(names: tuple[str, ...], x: torch.Tensor) -> None:
        pass

    tensors = network.checkpoint.tensors
    with torch.inference_mode():
        hidden = network.embed(windows)
        for block in range(network.hyper.n_blocks):
            hidden = network.attention(block, network.attention_weights(block), hidden, nothing)
            hidden = network.feed_forward(block, network.feed_forward_weights(block), hidden, nothing)
        head = tensors.get("output.weight", tensors["token_embd.weight"]).read()
        return (network.output_norm(hidden) @ torch.from_numpy(head).T).numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_forward_pass_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    folder = make_hf(tmp_path / "hf", family, **options)
    checkpoint = open_checkpoint(folder)
    network = Network(checkpoint)
    if family == "gemma3":
        assert network.window < LENGTH, "the sliding window must cut something off"
    windows = random_windows(checkpoint.tensors["token_embd.weight"].shape[0], count=2)
    found = own_logits(network, windows)
    for window, logits in zip(windows, found, strict=True):
        expected = reference_logits(folder, window.tolist())
        assert np.abs(expected).max() > 0.5
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


HOOKED = {
    "self_attn.q_proj": ("attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate", "ffn_up"),
    "mlp.down_proj": ("ffn_down",),
}


def hooked_inputs(folder: Path, windows: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of linear layers by GGUF name, shape (tokens, row length), seen by hooks on transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    seen: dict[str, list[np.ndarray]] = {}

    def watch(module: torch.nn.Module, names: list[str]) -> None:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for name in names:
                seen.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())

        module.register_forward_pre_hook(hook)

    for number, layer in enumerate(model.model.layers):
        for path, roles in HOOKED.items():
            watch(layer.get_submodule(path), [f"blk.{number}.{role}.weight" for role in roles])
    watch(model.lm_head, ["token_embd.weight" if model.config.tie_word_embeddings else "output.weight"])
    with torch.no_grad():
        for window in windows:
            model(torch.tensor(window[None].tolist()))
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in seen.items()}


def statistics_of(folder: Path, windows: np.ndarray, threads: int = 2, dtype: str = "float32") -> Statistics:
    import torch

    with thread_pool(threads) as (pool, count):
        return calibrate(open_checkpoint(folder), windows, pool, count, ignore, getattr(torch, dtype))


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True), ("gemma3", True)])
def test_the_statistics_are_those_of_hooks(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf", family, tie_word_embeddings=tied)
    windows = random_windows(500)
    expected = hooked_inputs(folder, windows)
    found = statistics_of(folder, windows)
    assert set(found) == set(expected)
    for name, x in expected.items():
        for values, wanted in (
            (found[name].mean_square, np.square(x).mean(0)),
            (found[name].mean, x.mean(0)),
            (found[name].mean_abs, np.abs(x).mean(0)),
            (found[name].max_abs, np.abs(x).max(0)),
        ):
            assert np.allclose(values, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max()), name
        assert found[name].count == windows.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_for_any_number_of_threads(dtype: str, wide: Path) -> None:
    windows = random_windows(500, count=7)
    alone = statistics_of(wide, windows, 1, dtype)
    for threads in (2, 4):
        shared = statistics_of(wide, windows, threads, dtype)
        assert set(shared) == set(alone)
        for name, found in shared.items():
            for field in ("mean_square", "mean", "mean_abs", "max_abs"):
                assert np.array_equal(getattr(found, field), getattr(alone[name], field)), (name, field)


def test_bfloat16_is_close_to_float32(wide: Path) -> None:
    windows = random_windows(500)
    exact, quick = (statistics_of(wide, windows, dtype=d) for d in ("float32", "bfloat16"))
    for name in exact:
        ratio = np.sqrt(quick[name].mean_square / exact[name].mean_square)
        assert abs(np.median(ratio) - 1) < 0.02, name


def test_progress_counts_tokens_up_to_the_end(wide: Path) -> None:
    import torch

    events: list[Progress] = []
    windows = random_windows(500)
    with ThreadPoolExecutor(1) as pool:
        calibrate(open_checkpoint(wide), windows, pool, 1, events.append, torch.float32)  # type: ignore[arg-type]
    assert [e.done for e in events] == [0, windows.size, 2 * windows.size]
    assert {e.total for e in events} == {2 * windows.size}


def test_what_it_cannot_run_it_refuses(wide: Path) -> None:
    checkpoint = open_checkpoint(wide)
    checkpoint.architecture = "mamba"
    assert not can_run(checkpoint)
    with pytest.raises(SourceError, match="mamba"):
        Network(checkpoint)
