"""ggml's quantisers as HALO calls them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from halo import ggml
from halo.errors import BudgetError
from halo.gguf_types import BITS_TO_TYPE, FALLBACK, TYPE_SETS, TYPES, type_for, type_set

# ggml builds the tables of these for 4 to 16 s each.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS")
QUANTISED = [t for t in TYPES.values() if t.family != "float" and t.name not in SLOW]
ROWS = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)


def error(name: str, rows: np.ndarray = ROWS, importance: np.ndarray | None = None) -> np.ndarray:
    """Squared error a column over the columns' mean energy."""
    kind = TYPES[name]
    back = ggml.dequantize(ggml.quantize(rows, kind.id, importance), kind.id, *rows.shape)
    return np.square(rows - back).mean(axis=0) / np.square(rows).mean()


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda t: t.name)
def test_the_table_is_that_of_ggml(kind) -> None:
    traits = ggml._library().ggml_get_type_traits(kind.id).contents
    assert traits.type_name.decode().upper() == kind.name
    assert (ggml.block_size(kind.id), ggml.type_size(kind.id)) == (kind.block, kind.block_bytes)
    assert (traits.blck_size, traits.type_size) == (kind.block, kind.block_bytes)
    assert traits.is_quantized == (kind.family != "float")
    assert kind.bpw == traits.type_size * 8 / traits.blck_size
    assert kind.nbytes(kind.block * 6) == 6 * kind.block_bytes


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda t: t.name)
def test_the_error_is_what_the_bits_allow(kind) -> None:
    """A normal source cannot be coded below 2^-2R (Shannon); ggml's types stay within ten times of it."""
    bound = 2.0 ** (-2 * kind.bpw)
    assert bound < error(kind.name).mean() < 10 * bound


@pytest.mark.parametrize(
    "order",
    [
        "Q2_K Q3_K Q4_K Q5_K Q6_K Q8_0",
        "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
        "IQ2_XXS IQ3_XXS IQ3_S IQ4_XS IQ4_NL Q8_0",
    ],
)
def test_more_bits_less_error(order: str) -> None:
    errors = [float(error(name).mean()) for name in order.split()]
    assert all(more < 0.99 * fewer for fewer, more in pairwise(errors)), errors


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "IQ3_S", "IQ4_XS", "Q4_0"])
def test_important_columns_are_kept_better(name: str) -> None:
    importance = np.ones(512, np.float32)
    importance[::8] = 100
    plain, weighted = error(name), error(name, importance=importance)
    assert weighted[::8].mean() < 0.9 * plain[::8].mean()
    assert (weighted * importance).sum() < (plain * importance).sum()


def test_a_type_that_needs_an_imatrix_goes_without() -> None:
    kind = TYPES["IQ2_XXS"]
    assert np.array_equal(
        ggml.quantize(ROWS, kind.id, None), ggml.quantize(ROWS, kind.id, np.ones(ROWS.shape[1], np.float32))
    )


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "Q8_0"])
def test_the_same_bytes_for_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_ELEMENTS_PER_CALL", 3 * 512)  # 22 calls, the last of them short
    kind, importance = TYPES[name], np.linspace(0.1, 3, 512, dtype=np.float32)
    alone = ggml.quantize(ROWS, kind.id, importance)
    floats = ggml.dequantize(alone, kind.id, *ROWS.shape)
    for threads in (1, 2, 4):
        with ThreadPoolExecutor(threads) as pool:
            shared = ggml.quantize(ROWS, kind.id, importance, pool)
            assert np.array_equal(shared, alone)
            assert np.array_equal(ggml.dequantize(shared, kind.id, *ROWS.shape, pool), floats)


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes given"):
        ggml.dequantize(np.zeros(143, np.uint8), TYPES["Q4_K"].id, 1, 256)


@pytest.mark.parametrize("bits", BITS_TO_TYPE)
def test_a_bit_width_is_a_tensor_type(bits: int) -> None:
    wide, nothing = type_for(bits, 512)
    assert nothing is None and wide.name == BITS_TO_TYPE[bits]
    narrow, why = type_for(bits, 96)
    assert narrow.fits(96) and narrow.bpw >= wide.bpw
    assert (why is None) == (wide.name == "Q8_0")
    if why:
        assert wide.name in why and narrow.name in why and "96" in why
    with pytest.raises(BudgetError, match="rows of 80"):
        type_for(bits, 80)


def test_type_sets() -> None:
    for name, members in TYPE_SETS.items():
        kinds = type_set(name)
        assert {k.name for k in kinds} == set(members)
        assert [k.bpw for k in kinds] == sorted(k.bpw for k in kinds)
    assert [k.name for k in type_set("q8_0, Q4_K")] == ["Q4_K", "Q8_0"]
    assert all(name in TYPES for pair in FALLBACK.items() for name in pair)
    for spec in ("", " , ", "q9_k"):
        with pytest.raises(BudgetError):
            type_set(spec)
