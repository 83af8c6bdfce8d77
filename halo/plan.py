"""A plan: everything decided, nothing written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from halo.checkpoint.base import Checkpoint
from halo.damage import DamageTable
from halo.devices import Device
from halo.folding import Folding
from halo.gguf_file import Metadata
from halo.gguf_types import GGUFType
from halo.manifest import CalibrationRecord
from halo.policy import Policy
from halo.statistics import Statistics


@dataclass(frozen=True)
class Plan:
    """What ``apply`` would do.

    Attributes:
        metadata: of the output file.
        chosen: type by name of the quantised tensors.
        damage, worth: empty when a recipe is repeated.
        file_bytes: of ``model.gguf``, exact.
        expected_memory: bytes at ``context`` tokens: file, KV cache and compute buffer (an estimate).
    """

    checkpoint: Checkpoint
    source_sha256: str
    policy: Policy | None
    policy_record: dict[str, object]
    device: Device
    statistics: Statistics
    calibration: CalibrationRecord
    folding: Folding
    fold_exponents: dict[str, float]
    metadata: Metadata
    chosen: dict[str, GGUFType]
    damage: DamageTable
    worth: dict[str, float]
    substitutions: dict[str, str]
    budget: dict[str, object]
    file_bytes: int
    context: int
    expected_memory: int
    notes: list[str]

    @property
    def bpw(self) -> float:
        """Bits a weight of the whole file."""
        return self.file_bytes * 8 / self.checkpoint.n_params

    def type_counts(self) -> Counter[str]:
        return Counter(kind.name for kind in self.chosen.values())
