"""What is in a GGUF file or bundle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halo.bundle import find_model
from halo.errors import SourceError
from halo.gguf_file import read_header
from halo.heatmap import HeatMap, heat_map
from halo.manifest import FILE_NAME, Manifest, read_manifest


@dataclass(frozen=True)
class TensorView:
    """A tensor as the file has it; damage from the manifest, None where there is none."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    damage: float | None


@dataclass(frozen=True)
class Inspection:
    """A file's tensors and, of a bundle, its manifest."""

    path: Path
    architecture: str
    name: str
    file_bytes: int
    n_params: int
    tensors: list[TensorView]
    manifest: Manifest | None

    @property
    def bpw(self) -> float:
        return self.file_bytes * 8 / max(1, self.n_params)

    def heat_map(self) -> HeatMap:
        return heat_map({t.name: t.type for t in self.tensors})

    def to_record(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "architecture": self.architecture,
            "name": self.name,
            "file_bytes": self.file_bytes,
            "n_params": self.n_params,
            "bpw": self.bpw,
            "tensors": [asdict(t) for t in self.tensors],
        }


def inspect_file(path: Path) -> Inspection:
    """Read a bundle's folder or any GGUF file.

    Raises:
        SourceError: neither, or a damaged file.
    """
    model = find_model(path)
    if model.is_dir():
        raise SourceError(f"{path}: neither a bundle (no model.gguf in it) nor a GGUF file; give one of both")
    header = read_header(model)
    manifest_path = model.parent / FILE_NAME
    manifest = read_manifest(manifest_path) if path.is_dir() and manifest_path.is_file() else None
    records = manifest.tensors if manifest else {}
    views = [
        TensorView(t.name, t.shape, t.type.name, t.nbytes, records[t.name].damage if t.name in records else None)
        for t in header.tensors.values()
    ]
    n_params = 0
    for tensor in header.tensors.values():
        count = 1
        for n in tensor.shape:
            count *= n
        n_params += count

    def text(key: str) -> str:
        found = header.metadata.get(key)
        return str(found.value) if found is not None else ""

    return Inspection(
        model,
        text("general.architecture"),
        text("general.name") or model.stem,
        model.stat().st_size,
        n_params,
        views,
        manifest,
    )
