"""Certificates against a draw-by-draw implementation of the paper, by simulation and by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.models import seeded, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify.abstraction.certificates import confidence_sequence, decided, margin_bound

MEANS = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)
LEVELS = st.floats(0.001, 0.5)


def bernoulli(n: int, p: float, seed: int) -> Tensor:
    return (torch.rand(n, generator=seeded(seed), dtype=torch.float64) < p).double()


def three_valued(n: int, seed: int) -> Tensor:
    """0, 0.5 and 1 with probabilities 0.1, 0.2, 0.7: mean 0.8."""
    u = torch.rand(n, generator=seeded(seed), dtype=torch.float64)
    return torch.where(u < 0.1, 0.0, torch.where(u < 0.3, 0.5, 1.0)).double()


def beta(n: int, seed: int) -> Tensor:
    """Beta(2, 6): mean 0.25."""
    return torch.from_numpy(np.random.default_rng(seed).beta(2, 6, n))


DRAWS: dict[str, tuple[Callable[[int, int], Tensor], float]] = {
    **{f"p = {p}": (lambda n, seed, p=p: bernoulli(n, p, seed), p) for p in (0.02, 0.5, 0.9, 0.99)},
    "three values": (three_valued, 0.8),
    "beta": (beta, 0.25),
}


def by_hand(draws: list[float], level: float, grid: int) -> tuple[list[float], list[float]]:
    """The hedged capital process with the predictable plug-in (Waudby-Smith and Ramdas 2024, equations 23 to 26, with
    ``theta = c = 1/2``), for one candidate mean after the other; the running intersection of what is not ruled out,
    and one grid point further out on either side."""
    lower, upper = [0.0] * len(draws), [1.0] * len(draws)
    ruled_out: list[set[int]] = [set() for _ in draws]
    for k in range(grid + 1):
        m = k / grid
        positive = negative = 1.0
        total, squares = 0.5, 0.25
        for t, x in enumerate(draws, 1):
            variance = squares / t  # of the draws before: (1/4 + sum (x_i - mean_i)^2) / t
            bet = math.sqrt(2 * math.log(2 / level) / (variance * t * math.log(t + 1)))
            positive *= 1 + (min(bet, 0.5 / m) if m > 0 else bet) * (x - m)
            negative *= 1 - (min(bet, 0.5 / (1 - m)) if m < 1 else bet) * (x - m)
            total += x
            squares += (x - total / (t + 1)) ** 2
            if max(positive / 2, negative / 2) >= 1 / level:
                ruled_out[t - 1].add(k)
    low, high = 0, grid
    for t, out in enumerate(ruled_out):
        left = [k for k in range(grid + 1) if k not in out]
        low, high = max(low, left[0] - 1), min(high, left[-1] + 1)
        lower[t], upper[t] = low / grid, high / grid
    return lower, upper


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_the_bounds_are_those_of_the_capital_process_worked_out_draw_by_draw(name: str, level: float):
    draws = DRAWS[name][0](300, 5)
    lower, upper = confidence_sequence(draws, level=level, grid=50)
    expected = by_hand(draws.tolist(), level, 50)
    torch.testing.assert_close(lower, torch.tensor(expected[0], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, torch.tensor(expected[1], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DRAWS)
def test_the_mean_is_inside_at_every_look_with_the_probability_promised(name: str):
    draw, mean = DRAWS[name]
    left = 0
    for seed in range(200):
        lower, upper = confidence_sequence(draw(400, seed), level=0.1, grid=100)
        left += bool(((lower > mean) | (upper < mean)).any())
    assert left <= 28  # if each left it with probability 0.1, 20 of 200 would, and more than this with probability 0.03


def test_pairs_that_are_balanced_and_shuffled_are_covered_as_well():
    rng = np.random.default_rng(0)
    right = np.repeat([True, False, True, True], 100) | (np.arange(400) % 4 == 0)  # strata, each of another accuracy
    left = 0
    for _ in range(100):
        lower, upper = confidence_sequence(torch.from_numpy(rng.permutation(right).astype(float)), grid=100)
        left += bool(((lower > right.mean()) | (upper < right.mean())).any())
    assert left <= 10


@given(p=MEANS, n=st.integers(1, 600), seed=SEEDS, level=LEVELS, grid=st.integers(1, 300))
def test_bounds_lie_in_the_unit_interval_on_the_grid_and_only_tighten(
    p: float, n: int, seed: int, level: float, grid: int
):
    for draws in (bernoulli(n, p, seed), beta(n, seed)):
        lower, upper = confidence_sequence(draws, level=level, grid=grid)
        assert len(lower) == len(upper) == n
        assert bool((lower >= 0).all()) and bool((upper <= 1).all())
        assert bool((lower.diff() >= 0).all()) and bool((upper.diff() <= 0).all())
        for bound in (lower, upper):
            torch.testing.assert_close((bound * grid).round() / grid, bound, rtol=0, atol=1e-12)


@given(p=MEANS, seed=SEEDS, cut=st.integers(1, 599))
def test_a_bound_depends_on_the_draws_before_it_alone(p: float, seed: int, cut: int):
    draws = bernoulli(600, p, seed)
    whole, part = confidence_sequence(draws, grid=50), confidence_sequence(draws[:cut], grid=50)
    for all_of_them, first in zip(whole, part, strict=True):
        torch.testing.assert_close(all_of_them[:cut], first, rtol=0, atol=0)


@given(p=MEANS, seed=SEEDS)
def test_a_stricter_level_gives_wider_bounds(p: float, seed: int):
    draws = bernoulli(300, p, seed)
    loose, strict = (confidence_sequence(draws, level=level) for level in (0.2, 0.01))
    assert bool((strict[0] <= loose[0]).all()) and bool((strict[1] >= loose[1]).all())


@given(p=MEANS, seed=SEEDS)
def test_a_finer_grid_is_rounded_outwards_by_less(p: float, seed: int):
    draws = bernoulli(200, p, seed)
    (low, high), (lower, upper) = confidence_sequence(draws, grid=500), confidence_sequence(draws, grid=50)
    assert bool((lower <= low + 1e-12).all()) and bool((upper >= high - 1e-12).all())
    assert bool((low - lower <= 1 / 50 + 1e-12).all()) and bool((upper - high <= 1 / 50 + 1e-12).all())


@given(p=MEANS, seed=SEEDS)
def test_what_is_wrong_instead_of_right_has_the_mirrored_bounds(p: float, seed: int):
    draws = bernoulli(300, p, seed)
    lower, upper = confidence_sequence(draws, grid=100)
    below, above = confidence_sequence(1 - draws, grid=100)
    torch.testing.assert_close(below, 1 - upper, rtol=0, atol=0.0100001)  # where rounding decides, one step of the grid
    torch.testing.assert_close(above, 1 - lower, rtol=0, atol=0.0100001)


def test_bounds_close_in_on_the_mean():
    for p in (0.1, 0.5, 0.97):
        lower, upper = confidence_sequence(bernoulli(20_000, p, 2))
        assert lower[-1] <= p <= upper[-1] and upper[-1] - lower[-1] < 0.05


def test_draws_that_contradict_their_own_past_leave_bounds_that_do_not_move():
    lower, upper = confidence_sequence(torch.cat([torch.zeros(2000), torch.ones(6000)]).double(), grid=100)
    assert upper[1999] < 0.02 and upper[-1] <= upper[1999] and lower[-1] <= 1
    assert bool((lower.diff() >= 0).all()) and bool((upper.diff() <= 0).all())


def test_no_draws_no_bounds():
    lower, upper = confidence_sequence(torch.zeros(0))
    assert len(lower) == len(upper) == 0
    assert decided(torch.zeros(0), 0.9) == (None, 0)


def test_a_good_alignment_is_certified_after_a_few_hundred_draws():
    for seed in range(20):
        verdict, n = decided(bernoulli(2000, 0.99, seed), 0.95)
        assert verdict == "at least" and n < 600
    assert decided(torch.ones(1000), 0.95)[0] == "at least"
    assert decided(torch.ones(1000), 0.95)[1] < 200


def test_a_bad_alignment_is_turned_down_sooner():
    for seed in range(20):
        verdict, n = decided(bernoulli(2000, 0.5, seed), 0.95)
        assert verdict == "below" and n < 40


def test_what_is_as_good_as_the_goal_stays_undecided():
    verdicts = [decided(bernoulli(1000, 0.9, seed), 0.9) for seed in range(40)]
    assert sum(verdict is not None for verdict, _ in verdicts) <= 4
    assert verdicts[0] == (None, 1000)


@given(p=MEANS, seed=SEEDS, goal=st.floats(0.05, 1))
def test_the_first_draw_that_settles_it_is_named(p: float, seed: int, goal: float):
    draws = bernoulli(300, p, seed)
    lower, upper = confidence_sequence(draws)
    verdict, n = decided(draws, goal)
    before = slice(0, n if verdict is None else n - 1)
    assert bool((lower[before] < goal).all()) and bool((upper[before] >= goal).all())
    if verdict is None:
        assert n == 300
    else:
        assert lower[n - 1] >= goal if verdict == "at least" else upper[n - 1] < goal
        assert decided(draws[:n], goal) == (verdict, n)


@pytest.mark.parametrize("bad", [-0.001, 1.001, float("nan"), float("inf")])
def test_draws_outside_the_unit_interval_are_refused(bad: float):
    draws = torch.tensor([0.5, bad, 0.5])
    for call in (lambda: confidence_sequence(draws), lambda: decided(draws, 0.5)):
        with pytest.raises(ValueError, match=r"draws range from .* they must lie in \[0, 1\]"):
            call()


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_level_that_is_no_probability_is_refused(level: float):
    with pytest.raises(ValueError, match=f"level is {level}; it lies between 0 and 1"):
        confidence_sequence(torch.ones(3), level=level)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="grid is 0; it must be at least 1"):
        confidence_sequence(torch.ones(3), grid=0)


def least_over_a_fine_grid(margins: Tensor, squared_distance: float) -> float:
    e = torch.logspace(-4, 3, 20_001, dtype=torch.float64)
    at_most = (margins.double()[:, None] <= 2 * e).double().mean(0)
    return min(1.0, float((at_most + squared_distance / (2 * e**2)).min()))


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    seed=SEEDS,
    size=st.floats(0.01, 20),
    distance=st.floats(1e-6, 50),
    zeros=st.booleans(),
)
def test_the_margin_bound_is_the_least_over_e(n: int, seed: int, size: float, distance: float, zeros: bool):
    margins = torch.rand(n, generator=seeded(seed), dtype=torch.float64) * size
    if zeros:
        margins[: n // 3] = 0.0
        margins[n // 3 : n // 2] = size  # and ties among them
    bound, found = margin_bound(margins, distance), least_over_a_fine_grid(margins, distance)
    assert bound <= found + 1e-12
    assert found - bound <= 0.01 * found  # the grid misses the least value by a step


@settings(max_examples=100)
@given(n=st.integers(1, 60), tokens=st.integers(2, 6), seed=SEEDS, noise=st.floats(0, 2), spread=st.floats(0.01, 5))
def test_answers_differ_no_more_often_than_the_margin_bound(
    n: int, tokens: int, seed: int, noise: float, spread: float
):
    generator = seeded(seed)
    original = torch.randn(n, tokens, generator=generator, dtype=torch.float64) * spread
    reduced = original + noise * torch.randn(n, tokens, generator=generator, dtype=torch.float64)
    best = original.topk(2).values
    differ = float((original.argmax(1) != reduced.argmax(1)).double().mean())
    assert differ <= margin_bound(best[:, 0] - best[:, 1], float((original - reduced).square().sum(1).mean())) + 1e-12


def test_the_margin_bound_is_reached():
    """A logit that falls by half of the margin while the next one rises by it: the answers differ on a quarter of the
    draws, and no smaller bound would be right."""
    original = torch.tensor([[3.0, 1.0, 0.0]] * 8, dtype=torch.float64)
    reduced = original.clone()
    reduced[:2] += torch.tensor([-1.0, 1.0 + 1e-9, 0.0], dtype=torch.float64)
    assert float((original.argmax(1) != reduced.argmax(1)).double().mean()) == 0.25
    best, squared = original.topk(2).values, float((original - reduced).square().sum(1).mean())
    assert margin_bound(best[:, 0] - best[:, 1], squared) == pytest.approx(0.25, rel=1e-6)


def test_the_margin_bound_at_its_ends():
    assert margin_bound(torch.ones(5), 0.0) == 0
    assert margin_bound(torch.tensor([0.0, 1.0, 2.0, 3.0]), 0.0) == 0.25
    assert margin_bound(torch.zeros(5), 0.1) == margin_bound(torch.ones(5), 100.0) == 1
    assert margin_bound(torch.full((9,), 8.0), 0.16) == pytest.approx(0.005)  # e = 4
    assert margin_bound(torch.ones(3), float("inf")) == 1


@pytest.mark.parametrize("margins", [[], [1.0, float("nan")], [-1.0, 2.0]])
def test_margins_that_are_none_are_refused(margins: list[float]):
    with unchecked(), pytest.raises(ValueError, match="margins are empty, negative or NaN"):
        margin_bound(torch.tensor(margins), 1.0)


@pytest.mark.parametrize("distance", [-1.0, float("nan")])
def test_a_distance_that_is_none_is_refused(distance: float):
    with pytest.raises(ValueError, match=f"squared_distance is {distance}"):
        margin_bound(torch.ones(3), distance)
