"""The solver against brute force, and the budgets as users write them."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from halo.allocation import Option, _hull, pinned_types, smallest_bytes, solve
from halo.budget import bpw_bytes, check, device_bytes, human, parse_size
from halo.checkpoint import Tensor
from halo.damage import TensorDamage
from halo.decide import Budget, by_worth, nbytes
from halo.errors import BudgetError
from halo.gguf_types import TYPES, type_set

Instance = dict[str, list[Option]]
KINDS = [TYPES[n] for n in ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")]


def instance(seed: int, tensors: int = 4, lawful: bool = False) -> Instance:
    """Random options: anything at all, or (``lawful``) damage that falls fourfold a bit, as real types' does."""
    random = np.random.default_rng(seed)
    out: Instance = {}
    for i in range(tensors):
        size, weight = int(random.integers(1, 9)) * 256, float(np.exp(random.normal(0, 2)))
        out[f"t{i}"] = [
            Option(k, k.nbytes(size), weight * 4.0**-k.bpw * float(np.exp(random.normal(0, 0.1))))
            if lawful
            else Option(k, int(random.integers(1, 400)), float(random.random()))
            for k in KINDS[: int(random.integers(1, len(KINDS) + 1))]
        ]
    return out


def total(options: list[Option] | tuple[Option, ...]) -> tuple[int, float]:
    return sum(o.nbytes for o in options), sum(o.damage for o in options)


def best_of_all(options: Instance, budget: int) -> float:
    """The least damage of all combinations that fit."""
    sums = (total(choice) for choice in product(*options.values()))
    return min(damage for size, damage in sums if size <= budget)


def hull_budgets(options: Instance) -> list[tuple[int, float]]:
    """(bytes of all points on the way from the smallest options up the hulls, damage the next step would save)."""
    steps = sorted(
        ((a.damage - b.damage) / (b.nbytes - a.nbytes), b.nbytes - a.nbytes)
        for choices in options.values()
        for a, b in pairwise(_hull(choices))
    )[::-1]
    out, at = [], smallest_bytes(options)
    for slope, extra in steps:
        out.append((at, slope * extra))
        at += extra
    return [*out, (at, 0.0)]


@pytest.mark.parametrize("lawful", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_against_brute_force(seed: int, lawful: bool) -> None:
    """At the hulls' own budgets nothing is better. Between them the loss is below one hull step (the step that no
    longer fits: the relaxed optimum lies on the line to it)."""
    options = instance(seed, lawful=lawful)
    points = hull_budgets(options)
    for budget, _ in points:
        size, damage = total(list(solve(options, budget).values()))
        assert size <= budget
        assert damage == pytest.approx(best_of_all(options, budget))
    random = np.random.default_rng(seed)
    for budget in random.integers(points[0][0], points[-1][0] + 50, 20).tolist():
        size, damage = total(list(solve(options, budget).values()))
        step = [saved for at, saved in points if at <= budget][-1]
        assert size <= budget
        assert damage <= best_of_all(options, budget) + step + 1e-12


@pytest.mark.parametrize("seed", range(25))
def test_more_bytes_are_no_worse(seed: int) -> None:
    options = instance(seed, tensors=12, lawful=True)
    low, high = smallest_bytes(options), sum(max(o.nbytes for o in c) for c in options.values())
    damages = [total(list(solve(options, b).values()))[1] for b in (p for p, _ in hull_budgets(options))]
    assert damages == sorted(damages, reverse=True)
    between = [total(list(solve(options, b).values()))[1] for b in np.linspace(low, high, 60).astype(int).tolist()]
    assert all(more <= fewer * (1 + 1e-9) for fewer, more in pairwise(between))


def test_the_whole_budget_is_used_where_that_helps() -> None:
    options = instance(0, tensors=200, lawful=True)
    low, high = smallest_bytes(options), sum(max(o.nbytes for o in c) for c in options.values())
    for budget in np.linspace(low * 1.05, high * 0.98, 20).astype(int).tolist():
        assert total(list(solve(options, budget).values()))[0] >= 0.995 * budget


def test_nothing_is_spent_in_vain() -> None:
    """A larger type that is no better is not taken, however large the budget."""
    worse = [Option(TYPES["Q4_K"], 100, 0.1), Option(TYPES["Q8_0"], 200, 0.1)]
    assert solve({"a": worse}, 10**6)["a"].nbytes == 100


def test_the_same_answer_whatever_the_order() -> None:
    options = instance(3, tensors=30, lawful=True)
    options |= {f"twin{i}": list(options["t0"]) for i in range(6)}
    budget = int(smallest_bytes(options) * 1.6)
    first = solve(options, budget)
    turned = {name: options[name][::-1] for name in reversed(options)}
    assert {n: o.type.name for n, o in solve(options, budget).items()} == {n: o.type.name for n, o in first.items()}
    again = solve(turned, budget)
    assert {n: o.type.name for n, o in again.items()} == {n: o.type.name for n, o in first.items()}


def test_a_budget_below_the_smallest_is_refused() -> None:
    options = instance(1)
    least = smallest_bytes(options)
    assert total(list(solve(options, least).values()))[0] == least
    with pytest.raises(BudgetError):
        solve(options, least - 1)


def tensors_of(count: int) -> list[Tensor]:
    def nothing(start: int, stop: int) -> np.ndarray:
        raise AssertionError("the solver needs no weights")

    return [Tensor(f"blk.{i}.ffn_up.weight", (64, 256), "F32", nothing) for i in range(count)]


def test_the_refusal_names_a_size_that_works() -> None:
    tensors, kinds = tensors_of(5), type_set("q3_k,q8_0")
    table = {t.name: TensorDamage({"Q3_K": 0.1, "Q8_0": 0.01}, 1.0, 1.0) for t in tensors}
    worth = dict.fromkeys(table, 1.0)
    pins = {tensors[0].name: TYPES["Q8_0"]}
    n_params, fixed = sum(t.n_elements for t in tensors), 1000
    least = fixed + nbytes(tensors[0], TYPES["Q8_0"]) + 4 * nbytes(tensors[1], TYPES["Q3_K"])
    with pytest.raises(BudgetError, match=rf"--size is .* \({least} bytes, --bpw ([0-9.]+)\)") as refusal:
        by_worth(tensors, kinds, table, worth, pins, Budget(least - 1, fixed, "--size"), n_params)
    named = float(str(refusal.value).split("--bpw ")[1].split(")")[0])
    budget = Budget(bpw_bytes(named, n_params), fixed, "--bpw")
    chosen = by_worth(tensors, kinds, table, worth, pins, budget, n_params).chosen
    assert chosen[tensors[0].name].name == "Q8_0"
    assert {chosen[t.name].name for t in tensors[1:]} == {"Q3_K"}


NAMES = {"blk.0.attn_q.weight": 256, "blk.0.attn_k.weight": 256, "blk.10.attn_q.weight": 256, "output.weight": 96}


def test_pins() -> None:
    assert pinned_types([r"blk\.0\..*=q6_k", "output=Q8_0"], NAMES) == {
        "blk.0.attn_q.weight": TYPES["Q6_K"],
        "blk.0.attn_k.weight": TYPES["Q6_K"],
        "output.weight": TYPES["Q8_0"],
    }
    last = pinned_types([r"blk\..*=q6_k", r"blk\.0\.attn_q=q3_k"], NAMES)
    assert (last["blk.0.attn_q.weight"].name, last["blk.10.attn_q.weight"].name) == ("Q3_K", "Q6_K")
    with_equals = pinned_types([r"(?=blk)blk\.10.*=f16"], NAMES)
    assert with_equals == {"blk.10.attn_q.weight": TYPES["F16"]}


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ("output", "REGEX=TYPE"),
        ("(=q6_k", "not a regular expression"),
        ("output=q9_k", "unknown type 'q9_k'"),
        ("nothing=q6_k", "matches no tensor"),
        ("attn_q=q6_k", "matches no tensor"),  # a part of a name is not a name
        ("output=q6_k", "rows of 96"),
    ],
)
def test_bad_pins(pin: str, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        pinned_types([pin], NAMES)


@pytest.mark.parametrize(
    ("text", "size"),
    [("90MB", 90_000_000), ("3.5GiB", 3_758_096_384), ("94371840", 94_371_840), (" 1 kb ", 1000), (".5k", 500)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "12 parsecs", "1e6", "1.2.3MB", "nan", "inf", "∞"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BudgetError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("bpw", [0.0, -1.0, 64.0, float("nan"), float("inf")])
def test_bad_bits(bpw: float) -> None:
    with pytest.raises(BudgetError):
        check(bpw)


def test_a_device_gets_what_fits_and_no_more_than_is_good() -> None:
    assert device_bytes(1000, 400, 10**6) == 600
    assert device_bytes(10**12, 400, 10**6) == int(6.5625 * 10**6 / 8)


def test_bytes_for_people() -> None:
    assert [human(n) for n in (999, 1500, 106_900_000, 3.5e9)] == ["999 B", "1.5 kB", "106.9 MB", "3.5 GB"]
