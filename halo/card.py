"""The bundle's card (README.md) and its Ollama Modelfile."""

from __future__ import annotations

from collections import Counter

from halo.budget import human
from halo.manifest import Manifest


def _types(manifest: Manifest) -> list[str]:
    counts, sizes = Counter(), Counter()  # type: Counter[str], Counter[str]
    for record in manifest.tensors.values():
        counts[record.type] += 1
        sizes[record.type] += record.nbytes
    return [f"| {name} | {counts[name]} | {human(size)} |" for name, size in sizes.most_common()]


def card(manifest: Manifest) -> str:
    """Markdown for people: what this file is, how it was made, how to run it."""
    file, budget, calibration = manifest.file, manifest.budget, manifest.calibration
    folds = len(manifest.fold_exponents)
    lines = [
        f"# {manifest.model}, quantised by HALO",
        "",
        f"`{file['name']}`: {human(file['bytes'])} ({file['bpw']:.3f} bits per weight, whole file), architecture "
        f"`{manifest.architecture}`, {manifest.source['n_params'] / 1e6:.1f} M parameters.",
        "",
        "## How it was made",
        "",
        f"- policy `{manifest.policy['name']}` ({manifest.policy['head']} head), budget: {budget['asked']}",
        f"- device profile: {manifest.device['name']} ({manifest.device['backend']})",
        f"- calibration: {calibration.text}, {calibration.tokens} tokens"
        + (f", {calibration.dtype}" if calibration.dtype else ""),
        f"- scale folding at {folds} places" if folds else "- no scale folding",
        f"- source: `{manifest.source['name']}`, SHA-256 `{manifest.source['sha256']}`",
        f"- memory expected at {budget['context']} tokens of context: {human(budget['expected_memory'])} "
        "(estimated: file + KV cache + compute buffer)",
        "",
        "| type | tensors | size |",
        "|---|---|---|",
        *_types(manifest),
        "",
        *(f"- {note}" for note in manifest.notes),
        "" if manifest.notes else None,
        "## How to run it",
        "",
        f"    llama-cli -m {file['name']}",
        "    ollama create my-model -f Modelfile",
        "",
        "`halo.json` holds every decision; `halo apply --recipe halo.json SOURCE` repeats it.",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def modelfile(manifest: Manifest, model: str) -> str:
    """Ollama reads the chat template from the GGUF itself."""
    return f"FROM ./{model}\nPARAMETER num_ctx {manifest.budget['context']}\n"
