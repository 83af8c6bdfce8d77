"""The pipeline up to the plan: read, calibrate, measure damage, decide, fold, decide again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from halo import budget as budgets
from halo import damage as damages
from halo import fold_search, imatrix
from halo.allocation import pinned_types
from halo.budget import human
from halo.checkpoint import Checkpoint, open_checkpoint
from halo.checkpoint.hashing import source_hash
from halo.corpus import packaged_text, read_text, windows
from halo.decide import Budget, Decision, by_bits, by_worth, describe_substitutions
from halo.devices import Device, expected_memory, load_device
from halo.errors import BudgetError, RecipeError, SourceError
from halo.events import Listener, Notice, Progress
from halo.features import Layer
from halo.file_metadata import with_quantisation
from halo.folding import Folding, sites
from halo.gguf_file import Field
from halo.gguf_types import GGUFType, parse_type, type_set
from halo.manifest import CalibrationRecord, Manifest
from halo.plan import Plan
from halo.policy import Policy
from halo.policy_file import load
from halo.quantise import file_bytes
from halo.roles import is_quantisable, quantisable
from halo.settings import DEFAULT_CONTEXT, Settings
from halo.statistics import Statistics
from halo.threads import default_threads


@contextmanager
def thread_pool(threads: int | None) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """The pool that all stages share, and how many threads it has."""
    from halo.calibration import single_threaded_torch

    count = threads or default_threads()
    with ThreadPoolExecutor(count, thread_name_prefix="halo", initializer=single_threaded_torch) as pool:
        try:
            yield pool, count
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Planner:
    """One checkpoint on its way to a plan. Every stage reports to ``listen``."""

    def __init__(self, settings: Settings, pool: ThreadPoolExecutor, threads: int, listen: Listener):
        self.settings, self.pool, self.threads, self.listen = settings, pool, threads, listen
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.listen(Notice(text))

    def open(self) -> Checkpoint:
        self.listen(Progress("read", 0, 1, "files", str(self.settings.source)))
        checkpoint = open_checkpoint(self.settings.source)
        for text in checkpoint.notes:
            self.note(text)
        self.listen(Progress("read", 1, 1, "files", str(self.settings.source)))
        return checkpoint

    def calibrate(self, checkpoint: Checkpoint, dtype_name: str | None = None) -> tuple[Statistics, CalibrationRecord]:
        """Statistics and where they came from; ``dtype_name`` as a recipe recorded it, None for the processor's
        best."""
        if self.settings.imatrix is not None:
            return self._from_imatrix(checkpoint, self.settings.imatrix)
        import torch

        from halo.calibration import WINDOW, calibrate, fast_dtype
        from halo.network import can_run
        from halo.tokens import tokenize

        if not can_run(checkpoint):
            self.note(
                f"HALO has no forward pass for the architecture '{checkpoint.architecture}': no imatrix is used; "
                "make one with llama-imatrix and give it with --imatrix for a better file"
            )
            return {}, CalibrationRecord("none", hashlib.sha256(b"").hexdigest(), 0, WINDOW, None)
        file = self.settings.calibration_file
        text = packaged_text("calibration") if file is None else read_text(file)
        tokens = tokenize(checkpoint, text)
        cut = windows(tokens.ids, self.settings.calibration_tokens, WINDOW, tokens.bos)
        if cut.size < self.settings.calibration_tokens * 0.9:
            self.note(
                f"the calibration text has {cut.size} tokens in whole windows, "
                f"{self.settings.calibration_tokens} were asked for"
            )
        dtype = getattr(torch, dtype_name) if dtype_name else fast_dtype()
        found = calibrate(checkpoint, cut, self.pool, self.threads, self.listen, dtype)
        record = CalibrationRecord(
            "packaged" if file is None else str(file),
            hashlib.sha256(text.encode()).hexdigest(),
            int(cut.size),
            int(cut.shape[1]),
            str(dtype).removeprefix("torch."),
        )
        if self.settings.save_imatrix is not None:
            imatrix.save(self.settings.save_imatrix, found, record.text, record.window)
        return found, record

    def _from_imatrix(self, checkpoint: Checkpoint, path: Path) -> tuple[Statistics, CalibrationRecord]:
        found = imatrix.load(path)
        for tensor in quantisable(checkpoint.tensors):
            entry = found.get(tensor.name)
            if entry is not None and entry.mean_square.size != tensor.row_len:
                raise SourceError(
                    f"{path}: {tensor.name} has {entry.mean_square.size} entries, "
                    f"the model's rows have {tensor.row_len}; "
                    "the imatrix belongs to another model"
                )
        if not any(t.name in found for t in quantisable(checkpoint.tensors)):
            raise SourceError(
                f"{path}: no entry of the imatrix names a tensor of {checkpoint.path}; it belongs to another model"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return found, CalibrationRecord(f"imatrix {path.name}", digest, max(s.count for s in found.values()), 512, None)

    def plan(self) -> Plan:
        """Decide everything.

        Raises:
            HaloError: any bad input; nothing has been written then (but ``--save-imatrix``).
        """
        settings = self.settings
        device = load_device(settings.device)
        policy = load(settings.policy)
        kinds = type_set(settings.type_set or device.type_set)
        checkpoint = self.open()
        tensors = quantisable(checkpoint.tensors)
        for tensor in tensors:
            damages.check_fits(checkpoint, tensor, kinds)
        pins = pinned_types(settings.pins, {t.name: t.row_len for t in tensors})
        hashing = self.pool.submit(source_hash, checkpoint)
        budgets.check(settings.bpw)
        statistics, calibration = self.calibrate(checkpoint)
        damage = damages.measure(
            checkpoint, tensors, kinds, statistics, Folding(), self.pool, self.threads, self.listen
        )
        features = policy.features.compute(
            [Layer(t, damage[t.name], statistics.get(t.name)) for t in tensors], checkpoint.hyper.n_blocks
        )
        worth = (
            dict(zip((t.name for t in tensors), policy.worth(features).tolist(), strict=True))
            if policy.head == "worth"
            else {}
        )
        record: dict[str, object] = {
            "name": policy.name,
            "sha256": policy.sha256,
            "head": policy.head,
            "features": policy.features.name,
        }
        draft = _Draft(self, checkpoint, device, record, hashing, calibration, statistics)
        budget = draft.budget(settings)

        def decide(table: damages.DamageTable) -> Decision:
            if policy.head == "worth":
                return by_worth(tensors, kinds, table, worth, pins, budget, checkpoint.n_params)
            return by_bits(tensors, policy, features, pins, budget, checkpoint.n_params)

        exponents: dict[str, float] = {}
        decision, folding = decide(damage), Folding()
        if settings.fold and statistics:
            exponents, folding = self._fold(checkpoint, statistics, decision, worth)
            refolded = [t for t in tensors if t.name in folding.columns]
            if refolded:
                damage |= damages.measure(
                    checkpoint, refolded, kinds, statistics, folding, self.pool, self.threads, self.listen
                )
                decision = decide(damage)
        for text in describe_substitutions(tensors, kinds, decision):
            self.note(text)
        return draft.finish(policy, folding, exponents, decision, damage, worth, budget, self.notes)

    def _fold(
        self, checkpoint: Checkpoint, statistics: Statistics, decision: Decision, worth: dict[str, float]
    ) -> tuple[dict[str, float], Folding]:
        places = sites(checkpoint)
        weights = worth or dict.fromkeys(decision.chosen, 1.0)
        exponents = fold_search.search(
            checkpoint, places, statistics, decision.chosen, weights, self.pool, self.threads, self.listen
        )
        return exponents, fold_search.build(places, statistics, exponents)

    def repeat(self, recipe: Manifest) -> Plan:
        """The plan of a manifest: its decisions, the statistics computed again.

        Raises:
            RecipeError: a tensor of the recipe is missing here or its type does not fit.
        """
        checkpoint = self.open()
        chosen = _recorded_types(recipe, checkpoint)
        hashing = self.pool.submit(source_hash, checkpoint)
        statistics, calibration = self.calibrate(checkpoint, recipe.calibration.dtype)
        if calibration.sha256 != recipe.calibration.sha256:
            self.note("the calibration text differs from the recipe's: same decisions, other bytes")
        checkpoint.metadata["general.name"] = Field.string(recipe.model)
        folding = fold_search.build(sites(checkpoint), statistics, recipe.fold_exponents)
        record = dict(recipe.policy)
        draft = _Draft(
            self, checkpoint, load_device(self.settings.device), record, hashing, recipe.calibration, statistics
        )
        if hashing.result() != recipe.source.get("sha256"):
            self.note("the source differs from the recipe's: same decisions, other bytes")
        decision = Decision(chosen, {n: r.substitution for n, r in recipe.tensors.items() if r.substitution})
        budget = Budget(int(recipe.budget["file_bytes"]), 0, str(recipe.budget["asked"]))
        return draft.finish(None, folding, recipe.fold_exponents, decision, {}, {}, budget, self.notes)


def _recorded_types(recipe: Manifest, checkpoint: Checkpoint) -> dict[str, GGUFType]:
    chosen = {}
    for name, record in recipe.tensors.items():
        tensor, kind = checkpoint.tensors.get(name), parse_type(record.type)
        if tensor is None or not is_quantisable(tensor):
            raise RecipeError(
                f"the recipe names {name}, which {checkpoint.path} does not have; it was made for another model"
            )
        if not kind.fits(tensor.row_len):
            raise RecipeError(
                f"the recipe gives {name} the type {kind.name}, which its rows of {tensor.row_len} do not fit"
            )
        chosen[name] = kind
    missing = [t.name for t in quantisable(checkpoint.tensors) if t.name not in chosen]
    if missing:
        raise RecipeError(
            f"the recipe says nothing of {missing[0]} ({len(missing)} tensors); it was made for another model"
        )
    return chosen


class _Draft:
    """What is known of the output before its types are."""

    def __init__(
        self,
        planner: Planner,
        checkpoint: Checkpoint,
        device: Device,
        policy_record: dict[str, object],
        hashing: Future[str],
        calibration: CalibrationRecord,
        statistics: Statistics,
    ):
        self.planner, self.checkpoint, self.device = planner, checkpoint, device
        self.policy_record, self.hashing, self.calibration, self.statistics = (
            policy_record,
            hashing,
            calibration,
            statistics,
        )
        trained = checkpoint.hyper.context_length or DEFAULT_CONTEXT
        self.context = planner.settings.context or min(trained, DEFAULT_CONTEXT)

    def metadata(self, exponents: dict[str, float], chosen: dict[str, GGUFType]) -> dict[str, Field]:
        entries = sum(name in self.statistics for name in self.checkpoint.tensors)
        return with_quantisation(
            self.checkpoint, self.checkpoint.name, self.policy_record, self.hashing.result(), self.calibration, entries,
            sites(self.checkpoint), exponents, chosen,
        )  # fmt: skip

    def memory(self, nbytes: int) -> int:
        return expected_memory(self.checkpoint.hyper, self._n_vocab(), nbytes, self.context)

    def _n_vocab(self) -> int:
        table = self.checkpoint.tensors.get("token_embd.weight")
        return table.shape[0] if table is not None else 0

    def budget(self, settings: Settings) -> Budget:
        """The budget in bytes of the whole file."""
        tensors = quantisable(self.checkpoint.tensors)
        empty = {t.name: parse_type("F32") for t in tensors}
        floats = sum(-(-t.n_elements * 4 // 32) * 32 for t in tensors)
        fixed = file_bytes(self.metadata({}, empty), self.checkpoint, empty) - floats
        n_params = self.checkpoint.n_params
        if settings.size is not None:
            return Budget(settings.size, fixed, "--size")
        if settings.bpw is not None:
            return Budget(budgets.bpw_bytes(settings.bpw, n_params), fixed, f"--bpw {settings.bpw:g}")
        fits = budgets.device_bytes(self.device.memory, self.memory(0), n_params)
        asked = f"what fits {self.device.name} ({human(self.device.memory)} usable, context {self.context})"
        if fits <= 0:
            raise BudgetError(f"{asked}: the context alone needs {human(self.memory(0))}; take a smaller --ctx")
        return Budget(fits, fixed, asked)

    def finish(
        self,
        policy: Policy | None,
        folding: Folding,
        exponents: dict[str, float],
        decision: Decision,
        damage: damages.DamageTable,
        worth: dict[str, float],
        budget: Budget,
        notes: list[str],
    ) -> Plan:
        metadata = self.metadata(exponents, decision.chosen)
        size = file_bytes(metadata, self.checkpoint, decision.chosen)
        return Plan(
            checkpoint=self.checkpoint,
            source_sha256=self.hashing.result(),
            policy=policy,
            policy_record=self.policy_record,
            device=self.device,
            statistics=self.statistics,
            calibration=self.calibration,
            folding=folding,
            fold_exponents=exponents,
            metadata=metadata,
            chosen=decision.chosen,
            damage=damage,
            worth=worth,
            substitutions=decision.substitutions,
            budget={"asked": budget.asked, "file_bytes": budget.file_bytes},
            file_bytes=size,
            context=self.context,
            expected_memory=self.memory(size),
            notes=notes,
        )


def make_plan(settings: Settings, listen: Listener) -> Plan:
    """``halo plan``: decide and write nothing."""
    with thread_pool(settings.threads) as (pool, threads):
        return Planner(settings, pool, threads, listen).plan()
