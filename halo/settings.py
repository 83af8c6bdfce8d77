"""What a user asks of ``halo plan`` and ``halo apply``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_CALIBRATION_TOKENS = 16384
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Settings:
    """Everything a plan depends on.

    Attributes:
        source: Hugging Face folder or GGUF file.
        policy: shipped name or path.
        bpw, size: the budget as bits a weight or as bytes of the whole file; with neither, what fits the device well.
        device: TOML file of a device; None for this machine.
        type_set: name of a set or types separated by commas; None for the device's.
        pins: ``REGEX=TYPE`` each.
        fold: search scale folding.
        calibration_file: text; None for the packaged one.
        imatrix: an imatrix to use in place of a calibration.
        save_imatrix: where to write the calibration's imatrix.
        context: tokens the expected memory is told for; None for the model's own, at most 4096.
        threads: None for all cores.
    """

    source: Path
    policy: str = "llama-arch"
    bpw: float | None = None
    size: int | None = None
    device: str | None = None
    type_set: str | None = None
    pins: tuple[str, ...] = ()
    fold: bool = True
    calibration_file: Path | None = None
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    context: int | None = None
    threads: int | None = None
