"""Scorers in rounds: each removes the lowest in the model ablated so far."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kinds import EACH, N, data
from helpers.models import (
    TwoLayers,
    bridge,
    fresh,
    reduction_of,
    unchanged,
    unchecked,
    units_of,
)

from tl_sparsify import Examples, Units, baselines, constants, score
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads

# In rounds


def by_rounds(
    model: Any, batch: Examples, units: Units, values: Any, counts: list[int], seed: int, **settings: Any
) -> list[int]:
    """The order of removal by exact effects: after each round so many units are left."""
    order: list[int] = []
    for number, count in enumerate(counts):
        mask = torch.ones(len(units), dtype=torch.bool)
        mask[order] = False
        with intervened(model, ablate(Reduction(Circuit(units, mask), values))):
            scores = score.exact(model, batch, units, values=values, seed=seed + number, **settings).scores.tolist()
        alive = sorted((i for i in range(len(units)) if mask[i]), key=lambda i: scores[i])
        order += alive[: len(alive) - count]
        rest = alive[len(alive) - count :]
    return order + rest


def test_rounds_remove_the_lowest_in_the_ablated_model():
    model, batch = bridge(), data()
    units = units_of(model)
    values = reduction_of(model).values
    found = baselines.in_rounds(score.exact, model, batch, units, rounds=4, smallest=0.1, values=values, seed=5)
    counts = [round(14 * (1 / 14) ** (i / 4)) for i in range(1, 5)]
    assert counts == [7, 4, 2, 1]
    assert found.order.tolist() == by_rounds(model, batch, units, values, counts, 5)
    assert sorted(found.scores.tolist()) == list(range(14))
    assert (found.name, found.measured_in) == ("exact, 4 rounds", "place in the order of removal")
    assert (found.forward_passes, found.backward_passes) == (4 * 15, 0)
    once = score.exact(model, batch, units, values=values)
    assert found.order.tolist() != once.order.tolist()


def test_units_at_another_position_of_each_example_are_removed_there():
    model, batch = bridge(), data()
    values, at_each, at_span = reduction_of(model).values, units_of(model).at(EACH), units_of(model).at("S")
    placed = replace(values, units=at_each)
    expected = by_rounds(model, batch, at_each, placed, [7, 4, 2, 1], 5, batch_size=N)
    named = replace(batch, spans={"S": torch.stack([EACH, EACH + 1], 1)})
    settings: dict[str, Any] = {"rounds": 4, "smallest": 0.1, "seed": 5}
    for size in (None, 4):
        settings["batch_size"] = size
        found = baselines.in_rounds(score.exact, model, batch, at_each, values=placed, **settings)
        assert found.order.tolist() == expected and found.forward_passes == 4 * 15
        span = replace(values, units=at_span)
        same = baselines.in_rounds(score.exact, model, named, at_span, values=span, **settings)
        assert same.order.tolist() == expected
        own = baselines.in_rounds(baselines.exact_mean, model, named, at_span, **settings)
        means = constants.mean(model, batch, at_each)
        assert own.order.tolist() == by_rounds(model, batch, at_each, means, [7, 4, 2, 1], 5, batch_size=N)
        assert baselines.in_rounds(score.variance, model, named, at_span, **settings).scores.unique().numel() == 14


def test_one_round_removes_by_the_score_itself():
    model, batch = bridge(), data()
    units = units_of(model)
    for absolute in (False, True):
        scores = score.gradient(model, batch, units)
        found = baselines.in_rounds(score.gradient, model, batch, units, rounds=1, absolute=absolute)
        assert found.order.tolist() == (scores.absolute if absolute else scores).order.tolist()
    assert found.name == "gradient (absolute), 1 rounds"


def test_rounds_count_the_passes_of_all_of_them():
    model, batch = fresh(), data()
    units = units_of(model)
    values = constants.mean(model, batch, units)
    rows: list[int] = []
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: rows.append(len(tensor)))
    for scorer, settings in [
        (score.risk, {"values": values}),
        (score.risk, {}),
        (score.variance, {}),
        (partial(score.gradient, source="counterfactual"), {}),
        (baselines.eap, {}),
        (baselines.activation_patching, {"direction": "denoising", "values": values}),
    ]:
        rows.clear()
        found = baselines.in_rounds(scorer, model, batch, units, rounds=3, **settings)
        assert sum(rows) == found.forward_passes * N
    assert found.backward_passes == 0 and found.forward_passes == 3 * 16


def test_rounds_with_small_steps_skip_those_that_remove_nothing():
    model, batch = bridge(), data()
    units = heads(model)
    found = baselines.in_rounds(score.variance, model, batch, units, rounds=50, smallest=0.5)
    assert found.forward_passes == 1 + 2 * 2  # two of four heads leave, one at a time
    assert sorted(found.scores.tolist()) == [0, 1, 2, 3]


def test_rounds_see_the_redundancy_that_one_look_misses():
    """Units 0 and 1 both say which answer is right, and either is enough; unit 2 says little, where they are silent."""
    w_in = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    said = torch.tensor([5.0, 5, 0.5], dtype=torch.float64)
    model = TwoLayers(w_in, torch.stack([said, -said], 1) / 2)
    x = torch.cartesian_prod(torch.tensor([-1.0, 0, 1]), torch.tensor([0.0, 1])).double()
    batch = Examples(x, (x[:, :1] < 0).long())
    values = constants.zero(model, batch, model.units)
    once = score.risk(model, batch, model.units, values=values)
    assert once.top(1 / 3).names == ("L0N2",)
    found = baselines.in_rounds(score.risk, model, batch, model.units, rounds=3, smallest=1 / 3, values=values)
    assert found.top(1 / 3).names in (("L0N0",), ("L0N1",)) and found.top(2 / 3).names != ("L0N0", "L0N1")


def test_rounds_leave_the_model_as_it_came_in():
    model, batch = fresh(), data()
    with unchanged(model):
        baselines.in_rounds(baselines.eap, model, batch, units_of(model), rounds=2, progress=False)
    with unchanged(model), pytest.raises(ValueError, match="reduce is 'mean'"), unchecked():
        baselines.in_rounds(baselines.eap, model, batch, units_of(model), rounds=2, reduce="mean")
    for settings, message in [
        ({"rounds": 0}, "rounds is 0; at least one is needed"),
        ({"smallest": 0.0}, r"smallest is 0.0; it must lie in \(0, 1\]"),
        ({"smallest": 1.0}, "smallest=1.0 removes none of the 14 units"),
    ]:
        with pytest.raises(ValueError, match=message):
            baselines.in_rounds(score.risk, model, batch, units_of(model), **settings)
