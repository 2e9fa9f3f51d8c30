"""Exchanges within a search: a few units come back and as many leave, by the expansion; the path stays nested."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, seeded, units_of
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify.comparison.cost import cost_of
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import risk
from tl_sparsify.expansion.linearisation import Linearisation
from tl_sparsify.expansion.selection import NO_SHRINKAGE, after, exchange
from tl_sparsify.expansion.shrinkage import Trade, chosen, traded
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.settings import Probing

SEEDS = st.integers(0, 2**31)


def made_up(rows: int, units: int, seed: int) -> Linearisation:
    generator = seeded(seed)
    matrix = torch.randn(rows, units, generator=generator, dtype=torch.float64)
    made = torch.randn(rows, generator=generator, dtype=torch.float64)  # by the removals so far
    return Linearisation(float(made.square().sum()) / 2, made @ matrix, matrix, False)


def changed(sketch: Linearisation, removed: list[int], restored: list[int]) -> float:
    """The quadratic, written out."""
    step = torch.zeros(len(sketch.linear), dtype=torch.float64)
    step[removed], step[restored] = 1.0, -1.0
    return sketch.offset + float(sketch.linear @ step + (sketch.matrix @ step).square().sum() / 2)


@given(st.integers(2, 6), st.integers(4, 12), SEEDS, st.integers(0, 3), st.integers(0, 3))
def test_an_exchange_is_brute_force(rows: int, units: int, seed: int, back: int, count: int):
    sketch, kept = made_up(rows, units, seed), torch.rand(units, generator=seeded(seed)) < 0.6
    restored, removed = exchange(sketch, kept, ~kept, count, back)
    back = min(back, int((~kept).sum()))
    came: list[int] = []
    for _ in range(back):
        costs = {u: changed(sketch, [], [*came, u]) for u in (~kept).nonzero().flatten().tolist() if u not in came}
        came.append(min(costs, key=lambda u: costs[u]))
    assert restored.tolist() == came
    left: list[int] = []
    for _ in range(min(len(removed), int(kept.sum()))):
        costs = {u: changed(sketch, [*left, u], came) for u in kept.nonzero().flatten().tolist() if u not in left}
        left.append(min(costs, key=lambda u: costs[u]))
    assert removed.tolist() == left
    assert sketch.predicted(removed, restored) == pytest.approx(changed(sketch, left, came))


@given(st.integers(2, 40), st.integers(2, 12), SEEDS)
def test_what_samples_say_alike_is_believed_in_full(rows: int, units: int, seed: int):
    half, everything = made_up(rows, units, seed), torch.ones(units, dtype=torch.bool)
    believed, promise = chosen((half, half), everything, 1, near=NO_SHRINKAGE)
    assert believed == NO_SHRINKAGE
    assert promise == pytest.approx(max(0.0, min(changed(half, [unit], []) for unit in range(units))), abs=1e-9)


@given(SEEDS)
def test_an_expansion_goes_on_after_an_exchange(seed: int):
    sketch = made_up(6, 12, seed)
    removed, restored = torch.tensor([1, 4]), torch.tensor([7])
    moved = after(sketch, removed, NO_SHRINKAGE, restored)
    assert changed(moved, [2, 3], [8]) == pytest.approx(changed(sketch, [1, 4, 2, 3], [7, 8]))


def test_what_both_halves_say_should_come_back_is_promised():
    generator = seeded(5)
    useless = 0.01 * torch.randn(64, 30, generator=generator, dtype=torch.float64)
    needed = torch.randn(64, 1, generator=generator, dtype=torch.float64)  # its removal has made the deviation
    matrix = torch.cat([useless, needed], 1)
    made = matrix[:, 30]
    halves = tuple(
        Linearisation(
            float(made[rows].square().mean()) / 2,
            made[rows] @ matrix[rows] / 32,
            matrix[rows] / 32**0.5,
            False,
            matrix[rows] * made[rows].sign()[:, None] / 32**0.5,
            torch.zeros(31, dtype=torch.float64),
            32,
        )
        for rows in (slice(0, 32), slice(32, 64))
    )
    kept = torch.arange(31) < 30
    trade, promise = traded(halves, kept, ~kept, near=Trade())
    assert promise < 0.01 * sum(half.offset for half in halves) / 2
    restored, removed = exchange(halves[0], kept, ~kept, 0, trade.count(30), shrinkage=trade.shrinkage)
    assert restored.tolist() == [30] and len(removed) == 1


def found(**changes: Any) -> tuple[CircuitPath, Examples]:
    """A search in which units outnumber samples, with its examples."""
    data = examples(6, choices=(1, 4, 7, 8))
    given: dict[str, Any] = {"rounds": 6, "smallest": 0.2, "probing": Probing(1), "progress": False}
    return sparsify(bridge(), data, units_of(bridge()), **given | changes), data


@pytest.mark.parametrize("predict", [False, True])
def test_a_path_with_exchanges_is_nested_and_its_rounds_are_measured(predict: bool):
    paths = [found(seed=seed, predict=predict) for seed in range(6)]
    without = [found(seed=seed, predict=predict, exchanges=0) for seed in range(6)]
    assert any(not torch.equal(a.order, b.order) for (a, _), (b, _) in zip(paths, without, strict=True))
    for path, data in paths:
        assert sorted(path.order.tolist()) == list(range(len(path.units)))
        sizes = [len(step.reduction.circuit) for step in path.rounds]
        assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == 3
        larger = Circuit.full(path.units)
        for step in path.rounds:
            assert step.reduction.circuit <= larger and path.at(step.reduction.circuit.fraction) == step.reduction
            again = risk(bridge(), step.reduction, data)
            assert (step.measured.mean, step.measured.stderr) == pytest.approx((again.mean, again.stderr), rel=1e-10)
            assert math.isnan(step.predicted.mean) is not predict
            larger = step.reduction.circuit


def test_exchanges_cost_at_most_what_they_say():
    model, data = bridge(), examples(6, choices=(1, 4, 7, 8))
    settings: dict[str, Any] = {"rounds": 6, "smallest": 0.2, "probing": Probing(1), "progress": False}
    backward = [
        cost_of(model, 6, lambda n=n: sparsify(model, data, units_of(model), exchanges=n, **settings))[1].backward
        for n in (0, 2, 4)
    ]
    assert backward[0] == 1 + 2 * 5  # the first round has no slope
    assert backward[0] < backward[1] <= backward[0] + 2 * 3 and backward[2] <= backward[0] + 2 * 5


def test_fresh_examples_in_every_round():
    train = examples(40, choices=(1, 4, 7, 8))
    model, some = bridge(), Probing(1, examples=8)
    settings: dict[str, Any] = {"rounds": 5, "smallest": 0.2, "progress": False}
    path, cost = cost_of(model, 8, lambda: sparsify(model, train, units_of(model), probing=some, **settings))
    # passes over eight examples: at most two rounds made again, and four circuits grown from smaller ones
    assert 1 + 2 * 4 <= cost.backward <= 1 + 2 * (4 + 2 + 4)
    assert {step.measured.n for step in path.rounds} == {8}
    again = sparsify(model, train, units_of(model), probing=some, **settings)
    assert torch.equal(path.order, again.order)
    other = sparsify(model, train, units_of(model), probing=some, seed=1, **settings)
    assert not torch.equal(path.order, other.order)
    every = sparsify(model, train, units_of(model), probing=Probing(1, examples=40), **settings)
    assert torch.equal(every.order, sparsify(model, train, units_of(model), probing=Probing(1), **settings).order)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="exchanges is -1; it must not be negative"):
        found(exchanges=-1)
    with pytest.raises(ValueError, match=r"probing.examples is 1; a round needs at least two"):
        found(probing=Probing(1, examples=1))
