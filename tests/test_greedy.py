"""Greedy selection from samples against brute force, at sizes where every choice can be tried."""

from __future__ import annotations

import torch
from helpers.models import seeded
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify.expansion.linearisation import Linearisation
from tl_sparsify.expansion.selection import greedy

SEEDS = st.integers(0, 2**31)


def made_up(rows: int, units: int, seed: int) -> Linearisation:
    generator = seeded(seed)
    matrix = torch.randn(rows, units, generator=generator, dtype=torch.float64)
    made = torch.randn(rows, generator=generator, dtype=torch.float64)  # by the removals so far
    return Linearisation(float(made.square().sum()) / 2, made @ matrix, matrix, False)


def by_brute_force(sketch: Linearisation, candidates: torch.Tensor, count: int) -> list[int]:
    """Each time the candidate after whose removal the predicted risk is least."""
    picked: list[int] = []
    gone = torch.zeros(len(candidates), dtype=torch.bool)
    for _ in range(count):
        left = [unit for unit in candidates.nonzero().flatten().tolist() if unit not in picked]
        costs = [sketch.predicted(gone | (torch.arange(len(gone)) == unit)) for unit in left]
        picked.append(left[costs.index(min(costs))])
        gone[picked[-1]] = True
    return picked


@given(st.integers(1, 6), st.integers(2, 9), SEEDS, st.data())
def test_greedy_removes_what_brute_force_removes(rows: int, units: int, seed: int, data: st.DataObject):
    sketch, candidates = made_up(rows, units, seed), torch.rand(units, generator=seeded(seed)) < 0.8
    count = data.draw(st.integers(0, int(candidates.sum())))
    picks = greedy(sketch, candidates, count)
    assert picks.tolist() == by_brute_force(sketch, candidates, count)


@given(SEEDS)
def test_a_pool_that_gives_one_pick_at_a_time_changes_nothing(seed: int):
    sketch, candidates = made_up(5, 12, seed), torch.ones(12, dtype=torch.bool)
    assert torch.equal(greedy(sketch, candidates, 9, pool=4), greedy(sketch, candidates, 9))


def test_blocks_remove_nearly_what_one_at_a_time_removes():
    for seed in range(10):
        sketch, candidates = made_up(40, 60, seed), torch.ones(60, dtype=torch.bool)
        exact, blocks = (greedy(sketch, candidates, 30, pool=pool) for pool in (60, 24))
        assert len(set(blocks.tolist())) == 30
        first, second = (
            sketch.predicted(torch.zeros(60, dtype=torch.bool).index_fill(0, picks, True)) for picks in (exact, blocks)
        )
        assert second - first < 0.1 * (sketch.predicted(candidates) - first)


def test_greedy_leaves_those_that_are_no_candidates():
    sketch, candidates = made_up(3, 8, 0), torch.arange(8) % 2 == 0
    assert sorted(greedy(sketch, candidates, 4).tolist()) == [0, 2, 4, 6]


@given(SEEDS)
def test_greedy_by_cost_takes_the_least_rise_for_what_is_saved(seed: int):
    sketch = made_up(4, 7, seed)
    sketch = Linearisation(sketch.offset, sketch.linear.abs() * 9, sketch.matrix, False)
    costs = torch.rand(7, generator=seeded(seed + 1), dtype=torch.float64) + 0.1
    picks = greedy(sketch, torch.ones(7, dtype=torch.bool), float(costs.sum()) / 2, costs=costs).tolist()
    assert costs[picks].sum() >= costs.sum() / 2 > costs[picks[:-1]].sum()
    gone = torch.zeros(7, dtype=torch.bool)
    for pick in picks:
        rise = torch.tensor([sketch.predicted(gone | (torch.arange(7) == unit)) for unit in range(7)])
        rise -= sketch.predicted(gone)
        rank = torch.where(rise > 0, rise / costs, rise * costs).masked_fill(gone, float("inf"))
        assert pick == int(rank.argmin())
        gone[pick] = True
