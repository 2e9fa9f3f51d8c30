"""Sharpening: masks that start from a path's order and from nothing, and the best path of all three orders."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import EXCLUSIVE_OR, bridge, examples, exclusive_or, exclusive_or_inputs, fresh, unchanged, units_of
from torch import Tensor

from tl_sparsify import baselines, constants, sharpen
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import risk
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.path import CircuitPath, Round, worse
from tl_sparsify.search.settings import Constraints, Refitting

NOTHING = Estimate(float("nan"), float("nan"), 0, "nats")


def path_of(
    model: Model, data: Examples, units: Units, order: Tensor, sizes: tuple[int, ...], values: Values | None = None
) -> CircuitPath:
    """The path of an order, at these sizes, with mean constants where there are no others."""
    values = constants.mean(model, data, units) if values is None else values
    rounds: list[Round] = []
    for size in sizes:
        mask = torch.zeros(len(units), dtype=torch.bool)
        mask[order[len(units) - size :]] = True
        rounds.append(Round(Reduction(Circuit(units, mask), values), NOTHING, NOTHING, 0.0))
    return CircuitPath(units, order, tuple(rounds))


def mean_log(path: CircuitPath) -> float:
    return sum(math.log(max(step.measured.mean, 1e-6)) for step in path.rounds)


def test_a_wrong_order_is_put_right():
    model, data = exclusive_or(), exclusive_or_inputs(64)
    wrong = path_of(model, data, model.units, torch.tensor([0, 1, 4, 5, 6, 7, 3, 2]), (4, 2))
    better = sharpen(model, wrong, data, steps=80, progress=False)
    assert set(better.rounds[-1].reduction.circuit.names) == set(EXCLUSIVE_OR)
    assert better.rounds[-1].measured.mean < 1e-6 < risk(model, wrong.rounds[-1].reduction, data).mean


def test_training_begins_at_the_order():
    model, data = bridge(), examples(12)
    units = units_of(model)
    for seed in range(3):
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
        path = path_of(model, data, units, order, (9, 5, 3))
        settings: dict[str, Any] = {"learning_rate": 1e-6, "exchanged": 0, "progress": False}
        assert sharpen(model, path, data, steps=1, **settings).order.tolist() == order.tolist()


@pytest.mark.parametrize("learning_rate", [0.05, 5.0])
def test_the_path_is_no_worse_where_it_is_measured_and_keeps_its_sizes(learning_rate: float):
    model, data, held_out = bridge(), examples(12), examples(20, seed=4)
    units = units_of(model)
    path = sparsify(
        model, data, units, rounds=4, smallest=0.2, held_out=held_out, refitting=Refitting(0), progress=False
    )
    settings: dict[str, Any] = {"steps": 6, "learning_rate": learning_rate, "progress": False}
    better = sharpen(model, path, data, held_out=held_out, **settings)
    before = [risk(model, step.reduction, held_out) for step in path.rounds]
    assert mean_log(better) <= sum(math.log(max(one.mean, 1e-6)) for one in before) + 1e-12
    larger = Circuit.full(units)
    for old, new in zip(path.rounds, better.rounds, strict=True):
        assert len(new.reduction.circuit) == len(old.reduction.circuit)
        assert new.reduction.circuit <= larger and better.at(new.reduction.circuit.fraction) == new.reduction
        assert new.measured == risk(model, new.reduction, held_out)
        larger = new.reduction.circuit


def test_three_orders_make_a_path_that_is_better_than_each():
    model, data = bridge(), examples(12)
    units, sizes, better_than_all = units_of(model), (9, 7, 4, 3, 2), 0
    for seed in range(4):
        good = sparsify(model, data, units, sizes=(0.8, 0.6), exchanges=0, progress=False).order
        path = path_of(model, data, units, torch.cat([good[:5], good[5:].flip(0)]), sizes)  # right down to 9 of 14
        settings: dict[str, Any] = {"learning_rate": 2.0, "seed": seed, "progress": False}
        better = sharpen(model, path, data, steps=8, **settings)
        mask = baselines.top_k_gate(model, data, units, steps=4, smallest=2 / 14, **settings)  # the one from nothing
        others = path, path_of(model, data, units, mask.scores.argsort(stable=True), sizes)
        lowest = min(sum(math.log(risk(model, step.reduction, data).mean) for step in other.rounds) for other in others)
        assert mean_log(better) <= lowest + 1e-9
        better_than_all += mean_log(better) < lowest - 0.1
    assert better_than_all == 4


def test_of_one_step_there_is_one_mask():
    model, data = fresh(), examples(12)
    units = units_of(model)
    path = path_of(model, data, units, torch.arange(len(units)), (9, 5))
    for steps in (1, 2, 3):
        with counted(model) as passes:
            sharpen(model, path, data, steps=steps, exchanged=0, progress=False)
        assert passes["backward"] == 12 * steps


def test_a_circuit_that_is_worse_than_the_next_smaller_one_is_grown_from_it():
    model = bridge()
    units = units_of(model)
    for seed in range(8):
        data = examples(12, seed)
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
        path = path_of(model, data, units, order, (10, 8, 6, 4, 2))
        better = sharpen(model, path, data, steps=6, learning_rate=1.0, seed=seed, progress=False)
        for before, larger, smaller in zip((None, *better.rounds), better.rounds, better.rounds[1:], strict=False):
            circuit = smaller.reduction.circuit
            assert circuit <= larger.reduction.circuit and better.order[-len(circuit) :].sort().values.tolist() == (
                circuit.mask.nonzero().flatten().tolist()
            )
            assert before is None or larger.reduction.circuit <= before.reduction.circuit
            assert not worse(larger.measured, smaller.measured)  # of 32 three were without growing
            assert larger.measured.mean == risk(model, larger.reduction, data).mean


def test_where_no_order_grows_a_circuit_well_slopes_do():
    model = bridge()
    units = units_of(model)
    settings: dict[str, Any] = {"steps": 2, "learning_rate": 1e-6, "exchanged": 0, "progress": False}
    for seed in (5, 19, 77):  # by orders alone one circuit of each does worse than the next smaller one
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
        path = path_of(model, examples(12, seed), units, order, (10, 8, 6, 4, 2))
        better = sharpen(model, path, examples(12, seed), seed=seed, **settings)
        assert not any(
            worse(*(step.measured for step in two)) for two in zip(better.rounds, better.rounds[1:], strict=False)
        )


def test_counterfactual_values_and_kept_units_go_through():
    model, data = bridge(), examples(10)
    units = units_of(model)
    kept = Circuit.of(units, units.names[:2])
    values = constants.counterfactual(model, data, units)
    path = sparsify(
        model, data, units, sizes=(0.5, 0.3), values=values, constraints=Constraints(always_keep=kept), progress=False
    )
    better = sharpen(model, path, data, steps=4, learning_rate=1.0, always_keep=kept, progress=False)
    assert all(kept <= step.reduction.circuit and step.reduction.values.paired for step in better.rounds)


def test_passes_are_what_the_docstring_says_and_the_model_is_left():
    model, data = fresh(), examples(20)
    path = path_of(model, data, units_of(model), torch.arange(len(units_of(model))), (9, 5, 3))
    with counted(model) as passes, unchanged(model):
        sharpen(model, path, data, per_step=10, progress=False)
    measured = passes["forward"] / 20 - 21 - 1
    slopes = passes["backward"] / 20 - 20
    assert 1 <= slopes <= 2 * 3 and 3 < measured <= (8 + 2 * (1 + 4 + 3)) * 3 + 1


def test_counterfactual_inputs_are_run_once_for_all_circuits_that_are_measured_together():
    model, data = fresh(), examples(20).with_partners(torch.arange(20).roll(1))
    units = units_of(model)
    path = path_of(
        model, data, units, torch.arange(len(units)), (9, 5, 3), constants.counterfactual(model, data, units)
    )
    with counted(model) as passes:
        sharpen(model, path, data, per_step=10, steps=4, progress=False)
    measured = passes["forward"] / 20 - (1 + 2 * 2) - 1
    slopes = passes["backward"] / 20 - 2
    assert 1 <= slopes <= 2 * 3 and 4 <= measured <= (8 + 2 * (1 + 4 + 3)) * 3 + 2 + 8 * 3


def test_an_exchange_mends_what_the_masks_left():
    """Masks that were hardly trained: the order is the search's, with a unit of the true circuit just outside."""
    model, data = exclusive_or(), exclusive_or_inputs(64)
    first, second = EXCLUSIVE_OR
    named = {name: index for index, name in enumerate(model.units.names)}
    others = [index for name, index in named.items() if name not in EXCLUSIVE_OR]
    order = torch.tensor([*others[:-1], named[first], others[-1], named[second]])
    path = path_of(model, data, model.units, order, (4, 2))
    settings: dict[str, Any] = {"steps": 1, "learning_rate": 1e-6, "progress": False}
    assert sharpen(model, path, data, exchanged=0, **settings).rounds[-1].measured.mean > 0.1
    found = sharpen(model, path, data, exchanged=1, **settings).rounds[-1]
    assert set(found.reduction.circuit.names) == set(EXCLUSIVE_OR)
    pinned = Circuit(model.units, torch.arange(len(model.units)) == others[-1])
    kept = sharpen(model, path, data, always_keep=pinned, **settings)
    assert all(pinned <= step.reduction.circuit for step in kept.rounds)


def test_the_slope_offers_a_unit_that_the_masks_would_take_last():
    model, data = exclusive_or(), exclusive_or_inputs(64)
    first, second = (model.units.names.index(name) for name in EXCLUSIVE_OR)
    others = [index for index in range(len(model.units)) if index not in (first, second)]
    path = path_of(model, data, model.units, torch.tensor([first, *others, second]), (4, 2))
    settings: dict[str, Any] = {"steps": 1, "learning_rate": 1e-6, "progress": False}
    assert sharpen(model, path, data, exchanged=0, **settings).rounds[-1].measured.mean > 0.1
    found = sharpen(model, path, data, exchanged=1, **settings)
    assert set(found.rounds[-1].reduction.circuit.names) == set(EXCLUSIVE_OR)
    assert found.rounds[-1].reduction.circuit <= found.rounds[0].reduction.circuit


def test_sizes_below_the_path_are_made_by_one_mask_inside_of_its_last_circuit():
    model, data = exclusive_or(), exclusive_or_inputs(64)
    first, second = (model.units.names.index(name) for name in EXCLUSIVE_OR)
    others = [index for index in range(len(model.units)) if index not in (first, second)]
    path = path_of(model, data, model.units, torch.tensor([*others[:2], first, second, *others[2:]]), (6,))
    settings: dict[str, Any] = {"steps": 60, "exchanged": 0, "progress": False}
    with counted(model) as passes:
        found = sharpen(model, path, data, sizes=(0.75, 0.5, 0.25), **settings)
    assert passes["backward"] == 60 * 32 + 64  # the mask's, and the slopes by which one circuit is grown
    assert [len(step.reduction.circuit) for step in found.rounds] == [6, 4, 2]
    assert found.rounds[0].reduction.circuit == path.rounds[0].reduction.circuit
    assert set(found.rounds[-1].reduction.circuit.names) == set(EXCLUSIVE_OR)
    assert found.rounds[-1].measured.mean < 1e-6 < risk(model, path.at(0.25), data).mean


def test_what_a_path_left_out_stays_the_first_to_go_in_its_order():
    model, data = bridge(), examples(12)
    units = units_of(model)
    for seed in range(3):
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
        path = path_of(model, data, units, order, (9, 7))
        settings: dict[str, Any] = {"steps": 2, "learning_rate": 0.1, "exchanged": 0, "seed": seed, "progress": False}
        found = sharpen(model, path, data, sizes=(9 / len(units), 3 / len(units)), **settings)
        assert found.order[: len(units) - 7].tolist() == order[: len(units) - 7].tolist()


def test_sizes_of_the_path_are_the_default():
    model, data = bridge(), examples(12)
    units = units_of(model)
    path = path_of(model, data, units, torch.arange(len(units)), (9, 5))
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1.0, "progress": False}
    named = sharpen(model, path, data, sizes=(9 / len(units), 5 / len(units)), **settings)
    assert named.order.tolist() == sharpen(model, path, data, **settings).order.tolist()
    larger = sharpen(model, path, data, sizes=(0.9, 0.7, 0.5), **settings)
    assert [len(step.reduction.circuit) for step in larger.rounds] == [round(f * len(units)) for f in (0.9, 0.7, 0.5)]


def test_exchanges_are_screened_at_each_examples_own_position():
    """A position for each example, by its number and as a span of the example: the same units."""
    model = bridge()
    for seed in range(6):
        data = examples(24, seed)
        places = torch.randint(data.tokens.shape[1], (24,), generator=torch.Generator().manual_seed(seed))
        data = replace(data, spans={"here": torch.stack([places, places + 1], 1)})
        found: list[list[str]] = []
        for where in (places, "here"):
            units = units_of(model).at(where)
            order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
            path = path_of(model, data, units, order, (9, 5, 3))
            better = sharpen(model, path, data, steps=2, learning_rate=1e-3, progress=False)
            found.append([str(better.order.tolist()), *(str(step.measured.mean) for step in better.rounds)])
        assert found[0] == found[1]


def test_sizes_of_the_same_number_of_units_are_one_circuit():
    model, data = exclusive_or(), exclusive_or_inputs(64)
    first, second = (model.units.names.index(name) for name in EXCLUSIVE_OR)
    others = [index for index in range(len(model.units)) if index not in (first, second)]
    path = path_of(model, data, model.units, torch.tensor([first, *others, second]), (4,))
    settings: dict[str, Any] = {"steps": 2, "learning_rate": 1e-6, "exchanged": 1, "progress": False}
    once, twice = (
        sharpen(model, path, data, sizes=sizes, **settings) for sizes in ((0.75, 0.25), (0.75, 0.76 / 3, 0.25))
    )
    assert [len(step.reduction.circuit) for step in twice.rounds] == [6, 2]
    assert twice.at(0.25).circuit == once.at(0.25).circuit


def test_what_cannot_be_sharpened_is_refused_by_name():
    model, data = bridge(), examples(10)
    units = units_of(model)
    path = path_of(model, data, units, torch.arange(len(units)), (5,))
    costly = CircuitPath(units, path.order, path.rounds, torch.ones(len(units)))
    fitted = constants.refit(model, path.rounds[0].reduction, data, data, steps=1, progress=False)
    refitted = CircuitPath(units, path.order, (Round(fitted, NOTHING, NOTHING, 0.0),))
    for given, settings, message in [
        (path, {"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        (path, {"steps": 0}, "steps is 0; at least one is needed"),
        (path, {"exchanged": -1}, "exchanged is -1"),
        (path, {"always_keep": Circuit.full(units.at(1))}, "always_keep is a circuit over"),
        (path, {"sizes": (0.2, 0.5)}, "sizes is .0.2, 0.5.; it must name falling fractions"),
        (path, {"sizes": ()}, "sizes is ..; it must name falling fractions"),
        (path, {"sizes": (0.5, 0.1), "always_keep": Circuit.of(units, units.names[:3])}, "always_keep has 3 units"),
        (costly, {}, "path is ordered by costs"),
        (refitted, {}, r"path has refit values, fitted in its rounds: search with Refitting\(0\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            sharpen(model, given, data, progress=False, **settings)
