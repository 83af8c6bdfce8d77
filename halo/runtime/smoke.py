"""Proof that a file runs: what ``halo apply`` does to a bundle before it takes its final name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halo.errors import RuntimeFailure

if TYPE_CHECKING:
    from halo.runtime.records import Runner

_PROMPT = "The history of the lighthouse begins with a fire on a hill. Sailors who saw it at night knew that"
_CHECK_TEXT = "Water boils at 100 degrees. def add(a, b): return a + b. Guten Tag!"


@dataclass(frozen=True)
class SmokeResult:
    """A model's first words and how fast they came.

    Attributes:
        text: what it wrote after the prompt.
        prefill_tps: prompt tokens per second; short prompt, so a rough figure.
        decode_tps: new tokens per second.
        peak_rss: the worker's peak resident memory in bytes; None where the system hides it.
    """

    text: str
    prefill_tps: float
    decode_tps: float
    peak_rss: int | None


def first_words(worker: Runner, n: int = 12, prompt: str = _PROMPT) -> SmokeResult:
    """Let the model write ``n`` tokens, greedily. The text may be empty: an untrained model is free to choose control
    tokens only."""
    made = worker.generate(prompt, n, ignore_end=True)
    return SmokeResult(made.text, made.prefill_tps, made.decode_tps, worker.memory().peak_rss)


def finite_check(worker: Runner, text: str = _CHECK_TEXT) -> None:
    """Raise RuntimeFailure when a logit of a short text is not finite, or when all logits of a token are equal."""
    import numpy as np

    ids = worker.tokenize(text)
    for rows in worker.logits_chunks(ids):
        if not np.isfinite(rows).all():
            bad = int((~np.isfinite(rows)).sum())
            raise RuntimeFailure(f"{worker.info.path}: {bad} of {rows.size} logits are not finite; the file is damaged")
        if (rows.min(axis=1) == rows.max(axis=1)).any():
            raise RuntimeFailure(f"{worker.info.path}: all logits of a token are equal; the file is damaged")
