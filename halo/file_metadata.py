"""What quantisation adds to the metadata of a GGUF file. Its length depends on nothing that is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gguf import LlamaFileType

from halo import __version__
from halo.checkpoint.base import Checkpoint
from halo.folding import Site
from halo.gguf_file import Field, GGUFValueType, Metadata
from halo.gguf_types import GGUFType
from halo.manifest import CalibrationRecord

_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION (ggml.h)
# The file type is a label for people: that of the recipe whose main type holds most of the weights.
_FILE_TYPE = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K, "Q3_K": LlamaFileType.MOSTLY_Q3_K_M, "Q4_K": LlamaFileType.MOSTLY_Q4_K_M,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_M,
}  # fmt: skip


def _file_type(chosen: Mapping[str, GGUFType], checkpoint: Checkpoint) -> int:
    weights: Counter[str] = Counter()
    for name, kind in chosen.items():
        weights[kind.name] += checkpoint.tensors[name].n_elements
    main = max(sorted(weights), key=lambda name: weights[name], default="F32")
    found = _FILE_TYPE.get(main) or LlamaFileType.__members__.get(f"MOSTLY_{main}", LlamaFileType.GUESSED)
    return int(found)


def with_quantisation(
    checkpoint: Checkpoint,
    name: str,
    policy: Mapping[str, object],
    source_sha256: str,
    calibration: CalibrationRecord,
    n_entries: int,
    sites: Sequence[Site],
    exponents: Mapping[str, float],
    chosen: Mapping[str, GGUFType],
) -> Metadata:
    """The source's metadata and HALO's.

    Args:
        name: ``general.name`` of the output.
        n_entries: tensors with an imatrix entry.
        sites: the checkpoint's folding sites, in order; their exponents are recorded.
    """
    metadata = dict(checkpoint.metadata)
    metadata["general.name"] = Field.string(name)
    metadata["general.file_type"] = Field.uint32(_file_type(chosen, checkpoint))
    metadata["general.quantization_version"] = Field.uint32(_QUANTIZATION_VERSION)
    metadata["quantize.imatrix.dataset"] = Field.string(f"{calibration.text} sha256:{calibration.sha256[:16]}")
    metadata["quantize.imatrix.entries_count"] = Field.uint32(n_entries)
    metadata["quantize.imatrix.chunks_count"] = Field.uint32(-(-calibration.tokens // max(1, calibration.window)))
    metadata["halo.version"] = Field.string(__version__)
    metadata["halo.policy"] = Field.string(str(policy["name"]))
    metadata["halo.policy.sha256"] = Field.string(str(policy["sha256"]))
    metadata["halo.source.sha256"] = Field.string(source_sha256)
    values = [exponents.get(site.key, 0.0) for site in sites]
    metadata["halo.fold.exponents"] = Field.array(values, GGUFValueType.FLOAT32)
    return metadata
