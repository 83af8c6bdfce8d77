"""The table of GGUF tensor types: sizes, what row lengths they fit, and the named sets a device may use.

Sizes are read from the gguf package (``GGML_QUANT_SIZES``), which mirrors ggml's traits; a test compares both.
A bit-width maps to a *tensor* type, never to a file recipe such as Q4_K_M.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from halo.errors import BudgetError


@dataclass(frozen=True)
class GGUFType:
    """One tensor type.

    Attributes:
        name: as llama.cpp prints it, upper case, such as ``Q4_K``.
        id: ggml's number.
        block: weights a block; the row length must be a multiple.
        block_bytes: bytes a block.
        family: ``float``, ``legacy`` (32-weight blocks), ``k`` or ``iq``.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    family: str

    @property
    def bpw(self) -> float:
        """Bits a weight, scales included."""
        return self.block_bytes * 8 / self.block

    def fits(self, row_len: int) -> bool:
        return row_len % self.block == 0

    def nbytes(self, n_elements: int) -> int:
        return n_elements // self.block * self.block_bytes


def _family(name: str) -> str:
    if name in ("F32", "F16", "BF16"):
        return "float"
    return "k" if name.endswith("_K") else "iq" if name.startswith("IQ") and name != "IQ4_NL" else "legacy"


_NAMES = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "IQ3_XXS",
    "Q2_K",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ1_M",
    "IQ1_S",
]


def _entry(name: str) -> GGUFType:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return GGUFType(name, int(GGMLQuantizationType[name]), block, block_bytes, _family(name))


TYPES: dict[str, GGUFType] = {name: _entry(name) for name in _NAMES}
BY_ID = {t.id: t for t in TYPES.values()}

# RAMP's bits (eq. 23) as tensor types, and what takes their place when the row is no multiple of 256: the fallbacks of
# llama.cpp (src/llama-quant.cpp, tensor_type_fallback), where 3 bits have no 32-wide type and become 4.
BITS_TO_TYPE = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL", "IQ3_XXS": "IQ4_NL", "IQ2_S": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_XXS": "IQ4_NL",
    "IQ1_M": "IQ4_NL", "IQ1_S": "IQ4_NL",
}  # fmt: skip

_K = "Q2_K Q3_K Q4_K Q5_K Q6_K"
_LEGACY = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0"
# `cpu`: IQ4_XS and IQ4_NL run at Q4_0's speed on AVX2 and NEON (llama.cpp PR 5747); the smaller IQ types are table
# look-ups and slow there. `metal`: IQ4 kernels are slower than Q4_0's (same PR), so none.
TYPE_SETS: dict[str, tuple[str, ...]] = {
    "cpu": tuple(f"{_K} IQ4_XS IQ4_NL {_LEGACY}".split()),
    "cuda": tuple(f"{_K} IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS IQ4_NL {_LEGACY}".split()),
    "metal": tuple(f"{_K} {_LEGACY}".split()),
    "k": tuple(f"{_K} Q8_0".split()),
    "legacy": tuple(f"{_LEGACY} IQ4_NL".split()),
    "all": tuple(n for n in _NAMES if TYPES[n].family != "float"),
}


def parse_type(name: str) -> GGUFType:
    """The type of a user's spelling (case is ignored).

    Raises:
        BudgetError: no such type.
    """
    found = TYPES.get(name.strip().upper())
    if found is None:
        raise BudgetError(f"unknown type '{name}'; known are {', '.join(TYPES)}")
    return found


def type_set(spec: str) -> tuple[GGUFType, ...]:
    """Types of a set's name or of a comma-separated list, sorted by bits a weight.

    Raises:
        BudgetError: an unknown name.
    """
    names = TYPE_SETS.get(spec.strip().lower()) or tuple(n for n in spec.split(",") if n.strip())
    if not names:
        raise BudgetError(f"the type set is empty; name one of {', '.join(TYPE_SETS)} or types separated by commas")
    return tuple(sorted({parse_type(n) for n in names}, key=lambda t: (t.bpw, t.name)))


def type_for(bits: int, row_len: int) -> tuple[GGUFType, str | None]:
    """The type of a bit-width for rows of this length, and a sentence when it had to be another one.

    Raises:
        BudgetError: no quantised type fits rows of this length.
    """
    wanted = TYPES[BITS_TO_TYPE[bits]]
    if wanted.fits(row_len):
        return wanted, None
    other = TYPES[FALLBACK.get(wanted.name, "Q8_0")]
    if not other.fits(row_len):
        raise BudgetError(f"rows of {row_len} weights fit no quantised type (they come in blocks of 32 or 256)")
    return other, f"{wanted.name} needs rows of {wanted.block}, these have {row_len}: {other.name}"
