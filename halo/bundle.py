"""A bundle: ``model.gguf``, ``halo.json``, a card and a Modelfile, run once before it gets its name."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from halo import __version__
from halo.budget import human
from halo.card import card, modelfile
from halo.decide import nbytes
from halo.errors import OutputError, RuntimeFailure
from halo.events import Listener, Notice, Progress
from halo.manifest import FILE_NAME, Manifest, TensorRecord
from halo.plan import Plan
from halo.quantise import Written, write_gguf
from halo.runtime import LoadOptions, SmokeResult, finite_check, first_words, open_model
from halo.staging import staged_folder

MODEL = "model.gguf"


@dataclass(frozen=True)
class Applied:
    """A finished bundle: its folder, its manifest and what the model said in its first run."""

    path: Path
    manifest: Manifest
    smoke: SmokeResult


def find_model(path: Path) -> Path:
    """The GGUF of a bundle's folder, or the file itself."""
    return path / MODEL if (path / MODEL).is_file() else path


def write_bundle(plan: Plan, output: Path, force: bool, pool: ThreadPoolExecutor, listen: Listener) -> Applied:
    """Quantise, run once through llama.cpp, and rename into place.

    Raises:
        OutputError: the output exists (without ``force``), the disk is full or cannot be written.
        SourceError: NaN or Inf in a tensor.
        NativeCrash, RuntimeFailure: llama.cpp cannot run the result; nothing is left behind then.
    """
    with staged_folder(output, force) as folder:
        free = shutil.disk_usage(folder).free
        if free < plan.file_bytes:
            raise OutputError(
                f"{output.parent}: {human(plan.file_bytes)} are needed, {human(free)} are free; give another -o"
            )
        with open(folder / MODEL, "wb") as file:
            written = write_gguf(
                file, plan.checkpoint, plan.metadata, plan.chosen, plan.statistics, plan.folding, pool, listen
            )
        if written.nbytes != plan.file_bytes:
            raise AssertionError(f"{written.nbytes} bytes written, {plan.file_bytes} planned")
        smoke, measured, notes = verify(folder / MODEL, plan.context, listen)
        manifest = _manifest(plan, written, measured, notes)
        listen(Progress("bundle", 0, 1, "files", FILE_NAME))
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
        (folder / "README.md").write_text(card(manifest), encoding="utf-8")
        (folder / "Modelfile").write_text(modelfile(manifest, MODEL), encoding="utf-8")
    listen(Progress("bundle", 1, 1, "files", str(output)))
    return Applied(output, manifest, smoke)


def verify(model: Path, context: int, listen: Listener) -> tuple[SmokeResult, dict[str, object], list[str]]:
    """Load a file in the worker, check that its logits are finite and let it write a few words.

    Returns:
        what it said; measurements for the manifest; what the user was told (a crash that was survived).
    """
    notes: list[str] = []

    def notice(text: str) -> None:
        text = text.replace(str(model), model.name)  # the folder's name is not the final one yet
        notes.append(text)
        listen(Notice(text))

    listen(Progress("verify", 0, 1, "runs", model.name))
    try:
        with open_model(model, LoadOptions(n_ctx=context), on_notice=notice) as worker:
            finite_check(worker)
            smoke = first_words(worker)
            info, memory = worker.info, worker.memory()
    except RuntimeFailure as failure:
        failure.args = (str(failure).replace(str(model), f"the new {model.name} (not kept)"),)
        raise
    listen(Progress("verify", 1, 1, "runs", model.name))
    buffers = asdict(info.buffers)
    buffers.pop("detail")
    measured: dict[str, object] = {
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "llama_cpp": info.system_info,
        },
        "context": info.n_ctx,
        "buffers": buffers | {"source": "measured: llama.cpp's own log"},
        "peak_rss": memory.peak_rss,
        "peak_rss_source": memory.source,
        "use_extra_bufts": info.use_extra_bufts,
        "text": smoke.text,
    }
    return smoke, measured, notes


def _versions() -> dict[str, str]:
    out = {"halo": __version__, "python": platform.python_version()}
    for name in ("llama-cpp-python", "gguf", "numpy", "torch"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def _records(plan: Plan) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    for name, kind in plan.chosen.items():
        found = plan.damage.get(name)
        records[name] = TensorRecord(
            type=kind.name,
            nbytes=nbytes(plan.checkpoint.tensors[name], kind),
            damage=found.by_type.get(kind.name) if found else None,
            worth=plan.worth.get(name),
            substitution=plan.substitutions.get(name),
        )
    return records


def _manifest(plan: Plan, written: Written, measured: Mapping[str, object], notes: list[str]) -> Manifest:
    source = plan.checkpoint
    return Manifest(
        model=str(plan.metadata["general.name"].value),
        architecture=source.architecture,
        source={
            "name": source.path.name,
            "kind": source.kind,
            "sha256": plan.source_sha256,
            "n_params": source.n_params,
        },
        policy=dict(plan.policy_record),
        device=asdict(plan.device),
        budget=dict(plan.budget) | {"context": plan.context, "expected_memory": plan.expected_memory},
        calibration=plan.calibration,
        fold_exponents=plan.fold_exponents,
        tensors=_records(plan),
        file={
            "name": MODEL,
            "bytes": written.nbytes,
            "sha256": written.sha256,
            "bpw": written.nbytes * 8 / source.n_params,
        },
        notes=plan.notes + notes,
        versions=_versions(),
        measured=dict(measured),
    )
