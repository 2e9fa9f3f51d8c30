"""Selection against one unit at a time, done the slow way, at sizes that no brute force reaches."""

from __future__ import annotations

import pytest
import torch
from helpers.models import seeded
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.expansion.linearisation import Linearisation
from tl_sparsify.expansion.selection import NO_SHRINKAGE, Shrinkage, after, greedy
from tl_sparsify.expansion.shrinkage import chosen

SEEDS = st.integers(0, 2**31)


def one_direction(units: int, seed: int = 0) -> Float[Tensor, "rows units"]:
    """Units of very different sizes that nearly all act along one direction of the samples."""
    generator = seeded(seed)
    size = (2 * torch.randn(units, generator=generator, dtype=torch.float64)).exp()
    first = torch.randn(192, 1, generator=generator, dtype=torch.float64)
    along = first @ torch.randn(1, units, generator=generator, dtype=torch.float64)
    return (along + 3e-4 * torch.randn(192, units, generator=generator, dtype=torch.float64)) * size


def one_at_a_time(sketch: Linearisation, count: int, shrinkage: Shrinkage = NO_SHRINKAGE) -> list[int]:
    """Each time the unit whose removal leaves the least of the stated quadratic, by a product with every other unit."""
    matrix, rise = sketch.matrix, sketch.matrix.square().sum(0) / 2
    interacting = shrinkage.interactions**0.5 * matrix
    if shrinkage != NO_SHRINKAGE and sketch.deviation is not None and sketch.spread is not None:
        rise = torch.maximum(rise + sketch.spread, sketch.deviation.square().sum(0) / 2)
        interacting = torch.cat([sketch.deviation, interacting])
    rise = rise + shrinkage.slope * sketch.linear
    picks: list[int] = []
    for _ in range(count):
        picks.append(int(rise.argmin()))
        rise = rise + interacting[:, picks[-1]] @ interacting
        rise[picks[-1]] = torch.inf
    return picks


def sketch_of(matrix: Float[Tensor, "rows units"]) -> Linearisation:
    return Linearisation(0.0, torch.zeros(matrix.shape[1], dtype=matrix.dtype), matrix, False)


def risk_of(sketch: Linearisation, picks: list[int]) -> float:
    return sketch.predicted(torch.zeros(len(sketch.linear), dtype=torch.bool).index_fill(0, torch.tensor(picks), True))


@pytest.mark.parametrize("units", [2048, 4096, pytest.param(36_000, marks=pytest.mark.slow)])
def test_units_along_one_direction_leave_as_one_at_a_time(units: int):
    sketch, count = sketch_of(one_direction(units)), min(units // 2, 2500)
    everybody = torch.ones(units, dtype=torch.bool)
    slowly, found = one_at_a_time(sketch, count), greedy(sketch, everybody, count).tolist()
    assert risk_of(sketch, found) == pytest.approx(risk_of(sketch, slowly), rel=1e-6)
    assert len(set(found) ^ set(slowly)) <= 2 and found[:200] == slowly[:200]
    by_own = sketch.matrix.square().sum(0).argsort()[:count].tolist()
    assert risk_of(sketch, found) <= risk_of(sketch, by_own) * (1 + 1e-9)


@given(SEEDS, st.sampled_from([4, 16, 64, 4096]), st.sampled_from([1.0, 0.5, 0.05]), st.sampled_from([1.0, 0.5, 0.0]))
def test_the_pool_never_matters(seed: int, pool: int, interactions: float, slope: float):
    generator = seeded(seed)
    made = torch.randn(12, 1, generator=generator, dtype=torch.float64)
    matrix = torch.randn(12, 90, generator=generator, dtype=torch.float64)
    matrix = matrix * (2 * torch.randn(90, generator=generator, dtype=torch.float64)).exp()
    along = (matrix.view(3, 4, 90) * made.view(3, 4, 1)).sum(1) / made.view(3, 4, 1).square().sum(1).sqrt()
    sketch = Linearisation(
        float(made.square().sum()) / 2, (made.T @ matrix)[0], matrix, False, along, matrix.square().std(0), 12
    )
    shrinkage = Shrinkage(interactions, slope)
    found = greedy(sketch, torch.ones(90, dtype=torch.bool), 70, shrinkage=shrinkage, pool=pool).tolist()
    assert found == one_at_a_time(sketch, 70, shrinkage)


@given(SEEDS)
def test_an_expansion_goes_on_where_the_last_one_ended(seed: int):
    generator = seeded(seed)
    made, matrix = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (1, 20))
    sketch = Linearisation(float(made.square().sum()) / 2, (made.T @ matrix)[0], matrix, False)
    first, rest = torch.tensor([3, 7]), torch.tensor([1, 12, 5])
    moved = after(sketch, first, NO_SHRINKAGE)
    assert risk_of(moved, rest.tolist()) == pytest.approx(risk_of(sketch, [3, 7, 1, 12, 5]))


def test_noise_is_not_believed_and_what_both_halves_say_is():
    generator = seeded(3)
    alone = torch.ones(400, dtype=torch.bool)
    noise = tuple(sketch_of(torch.randn(4, 400, generator=generator, dtype=torch.float64)) for _ in range(2))
    shrinkage, _ = chosen(noise, alone, 200, near=NO_SHRINKAGE)
    assert shrinkage.interactions < 1
    pairs = torch.randn(64, 200, generator=generator, dtype=torch.float64).repeat(1, 2)
    pairs[:, 200:] *= -1  # a unit and another one that undoes it
    same = (sketch_of(pairs[:32]), sketch_of(pairs[32:]))
    _, promise = chosen(same, alone, 200, near=Shrinkage(0.5, 0.5))
    assert promise == pytest.approx(0.0, abs=1e-9)


@given(SEEDS)
def test_settings_that_choose_the_same_units_leave_the_setting_as_it_was(seed: int):
    """Whatever order they choose them in: else round-off would choose the setting, and with it all that follows."""
    generator = seeded(seed)
    halves = tuple(sketch_of(torch.randn(6, 9, generator=generator, dtype=torch.float64)) for _ in range(2))
    for near in (NO_SHRINKAGE, Shrinkage(0.5, 0.5), Shrinkage(0.1, 0.25)):
        for slopes in (True, False):
            found, _ = chosen(halves, torch.ones(9, dtype=torch.bool), 9, near=near, slopes=slopes)
            assert found == near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost", [0.1, 0.7])
def test_costs_are_added_up_no_rougher_than_they_are_given(cost: float, dtype: torch.dtype):
    """A budget for whole units of one cost is spent on so many, whatever the model's precision."""
    sketch, everybody = sketch_of(torch.randn(4, 10, generator=seeded(0)).to(dtype)), torch.ones(10, dtype=torch.bool)
    costs = torch.full((10,), cost, dtype=torch.float64)
    found = [len(greedy(sketch, everybody, count * cost, costs=costs)) for count in range(11)]
    assert found == list(range(11))


@pytest.mark.parametrize("name, value", [("interactions", -0.1), ("slope", 1.1), ("slope", float("nan"))])
def test_shares_outside_nought_and_one_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Shrinkage(**{name: value})


def test_numbers_that_are_not_finite_are_refused():
    matrix = torch.ones(2, 5)
    matrix[0, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        greedy(sketch_of(matrix), torch.ones(5, dtype=torch.bool), 2)
