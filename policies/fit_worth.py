"""A first worth policy, without reinforcement learning: weights by role, from the diagonal Fisher of given checkpoints.

    python -m halo.policies.fit_worth MODEL [MODEL ...] --text FILE -o policies/llama-arch.pt

For every tensor and a few types the ratio of Fisher damage (``fisher.py``) to the local relative error
(``halo.damage``) is taken; a role's log-weight is the mean of the ratio's logarithm over blocks and types, less the
model's own mean over roles. Depth and statistics get no weight here: fits on them do not carry over to another family
(facts of issue 4).
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from halo.policies.card_file import write_card
from halo.policies.fisher import LOOKUP, fisher_damage, lookup_damage, output_gradients

from halo import ggml
from halo.calibration import WINDOW, calibrate, single_threaded_torch
from halo.checkpoint import Checkpoint, Tensor, open_checkpoint
from halo.corpus import read_text, windows
from halo.damage import relative_error
from halo.events import ignore
from halo.features import FEATURE_SETS
from halo.gguf_types import TYPES
from halo.policy_file import FORMAT
from halo.roles import ROLES, quantisable, role_of
from halo.sampling import sample_rows
from halo.staging import staged_file
from halo.threads import default_threads
from halo.tokens import tokenize

_TYPES = ("Q3_K", "Q4_K", "Q4_0")
_OUTSIDE = ("token_embd", "output")


def log_ratios(checkpoint: Checkpoint, ids: np.ndarray, seed: int) -> dict[str, list[float]]:
    """log(Fisher damage / local relative error) by role: one number a tensor, the mean over the types that fit."""
    threads = default_threads()
    with ThreadPoolExecutor(threads, initializer=single_threaded_torch) as pool:
        statistics = calibrate(checkpoint, ids, pool, threads, ignore, torch.float32)
    gradients = output_gradients(checkpoint, ids, seed)
    out: dict[str, list[float]] = {}

    def add(role: str, tensor: Tensor, square: np.ndarray | None, damage: Callable[..., float]) -> None:
        index, rows = sample_rows(tensor)
        ratios = []
        for kind in (TYPES[n] for n in _TYPES if TYPES[n].fits(tensor.row_len)):
            restored = ggml.dequantize(ggml.quantize(rows, kind.id, square), kind.id, *rows.shape)
            ratios.append(np.log(damage(rows, restored, index) / relative_error(rows, kind, square)))
        out.setdefault(role, []).append(float(np.mean(ratios)))

    tied = "output.weight" not in checkpoint.tensors
    for tensor in quantisable(checkpoint.tensors):
        role = role_of(tensor.name)
        if role == "token_embd":
            add(role, tensor, None, lambda rows, restored, index: lookup_damage(rows, restored, gradients[LOOKUP]))
            role = "output"
        if role != "output" or tied or tensor.name == "output.weight":
            square, found = statistics[tensor.name].mean_square, gradients[tensor.name]

            def damage(
                rows: np.ndarray, restored: np.ndarray, index: np.ndarray, g: np.ndarray = found, h: np.ndarray = square
            ) -> float:
                return fisher_damage(rows, restored, index, g, h)

            add(role, tensor, square, damage)
    return out


def role_weights(models: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Mean log-ratio a role over all models, each model centred on its blocks' tensors first."""
    centred: dict[str, list[float]] = {}
    for ratios in models.values():
        mean = float(np.mean([v for role, values in ratios.items() if role not in _OUTSIDE for v in values]))
        for role, values in ratios.items():
            centred.setdefault(role, []).extend(v - mean for v in values)
    return {role: float(np.mean(values)) for role, values in centred.items()}


def policy_dict(weights: dict[str, float], card: dict[str, object]) -> dict[str, object]:
    """The policy file's contents: one linear layer over the one-hot roles of ``halo1``. A role that no model had takes
    the weight of its nearest kin: an untied output that of the tied table, and a table that is only looked up none."""
    width = FEATURE_SETS["halo1"].width
    row = np.zeros(width)
    for at, role in enumerate(ROLES):
        row[at] = weights[role]
    return {
        "format": FORMAT,
        "head": "worth",
        "feature_set": "halo1",
        "family": "llama",
        "mean": torch.zeros(width),
        "std": torch.ones(width),
        "layers": [
            {"weight": torch.tensor(row, dtype=torch.float32)[None], "bias": torch.zeros(1), "activation": "none"}
        ],
        "card": card,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    models = {}
    for path in args.models:
        checkpoint = open_checkpoint(path)
        tokens = tokenize(checkpoint, read_text(args.text))
        models[path.name] = log_ratios(checkpoint, windows(tokens.ids, args.tokens, WINDOW, tokens.bos), args.seed)
    weights = role_weights(models)
    for role, value in sorted(weights.items(), key=lambda item: item[1]):
        print(f"{role:12} log-weight {value:+.3f}")
    card: dict[str, object] = {
        "summary": "weights by role alone, least squares on the diagonal Fisher of one model; not yet trained by RL",
        "method": "mean over blocks and types ("
        + ", ".join(_TYPES)
        + ") of log(diagonal Fisher damage / local relative error)",
        "trained_on": ", ".join(models),
        "text": f"{args.text.name}, {args.tokens} tokens, labels sampled from the model, seed {args.seed}",
        "command": "python -m halo.policies.fit_worth " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "log_weights": {role: round(value, 4) for role, value in weights.items()},
        "limits": "depth and statistics have no say; see the benchmark tables in the README",
    }
    with staged_file(args.output, force=True) as file:
        torch.save(policy_dict(weights, card), file)
    write_card(args.output.with_suffix(".md"), args.output.stem, card)


if __name__ == "__main__":
    main()
