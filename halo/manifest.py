"""``halo.json``: what was done, with hashes; enough to do it again, byte for byte."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halo.errors import RecipeError

FORMAT = 1
FILE_NAME = "halo.json"


@dataclass(frozen=True)
class TensorRecord:
    """One quantised tensor: its type, bytes in the file, relative output error and the weight the policy gave it."""

    type: str
    nbytes: int
    damage: float | None
    worth: float | None
    substitution: str | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """Where the statistics came from.

    Attributes:
        text: ``packaged``, a file's path, or ``imatrix``.
        sha256: of the text or of the imatrix file.
        tokens: used, in whole windows of ``window``.
        dtype: of the matrix products; None with an imatrix.
    """

    text: str
    sha256: str
    tokens: int
    window: int
    dtype: str | None


@dataclass(frozen=True)
class Manifest:
    """The whole record. ``measured`` is what running the bundle here gave; it is no part of the recipe."""

    model: str
    architecture: str
    source: dict[str, Any]
    policy: dict[str, Any]
    device: dict[str, Any]
    budget: dict[str, Any]
    calibration: CalibrationRecord
    fold_exponents: dict[str, float]
    tensors: dict[str, TensorRecord]
    file: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """A manifest from ``halo.json`` or from a bundle's folder.

    Raises:
        RecipeError: unreadable, not JSON, of an unknown format, or without the entries a recipe needs.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not a halo.json: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise RecipeError(
            f"{path}: manifest format {found!r} is unknown (this HALO reads {FORMAT}); apply the policy anew"
        )
    try:
        calibration = CalibrationRecord(**data.pop("calibration"))
        tensors = {name: TensorRecord(**record) for name, record in data.pop("tensors").items()}
        manifest = Manifest(calibration=calibration, tensors=tensors, **data)
        _check_recipe(manifest)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise RecipeError(f"{path}: not a complete halo.json: {error}") from None
    return manifest


def _check_recipe(manifest: Manifest) -> None:
    """TypeError, KeyError or ValueError when something that a repetition reads is not what it must be."""
    int(manifest.budget["file_bytes"]), int(manifest.budget["context"]), manifest.budget["asked"]
    manifest.policy["name"], manifest.policy["sha256"]
    for key, exponent in manifest.fold_exponents.items():
        if not isinstance(exponent, int | float) or not 0 <= exponent <= 1:
            raise ValueError(f"fold exponent {exponent!r} of {key}")
    record = manifest.calibration
    if not (isinstance(record.text, str) and isinstance(record.tokens, int) and record.tokens >= 0):
        raise ValueError("calibration record")
    if record.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"calibration dtype {record.dtype!r}")
    if not all(isinstance(r.type, str) for r in manifest.tensors.values()):
        raise ValueError("a tensor's type is no name")
