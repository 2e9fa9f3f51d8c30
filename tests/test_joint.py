"""Search against brute force on networks small enough for it, and what a path promises."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import (
    EXCLUSIVE_OR,
    bridge,
    examples,
    exclusive_or,
    exclusive_or_inputs,
    fisher,
    fresh,
    jacobian,
    reduction_of,
    unchanged,
    unchecked,
    units_of,
)
from hypothesis import strategies as st

from tl_sparsify import baselines, constants
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import remembering, risk
from tl_sparsify.core.metrics import kl, log_odds
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.expansion.selection import NO_SHRINKAGE, Shrinkage
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.settings import Constraints, Probing, Refitting

CHOICES = (1, 4, 7, 8)
SEEDS = st.integers(0, 2**31)


@cache
def usual() -> CircuitPath:
    """A path on the small transformer."""
    return found()


def found(**changes: Any) -> CircuitPath:
    """The same search with other arguments."""
    data = examples(10, choices=CHOICES)
    given: dict[str, Any] = {"rounds": 4, "smallest": 0.2, "predict": True, "progress": False}
    return sparsify(bridge(), data, units_of(bridge()), **given | changes)


# Rounds


def test_one_unit_a_round_is_brute_force_with_explicit_jacobians():
    model, data = bridge(), examples(6, choices=CHOICES)
    units = units_of(model)
    path = sparsify(model, data, units, rounds=60, smallest=0.5, probing=Probing(temperature=2.0), progress=False)
    assert [len(r.reduction.circuit) for r in path.rounds] == list(range(13, 6, -1))
    with torch.no_grad():
        z = answer_logits(model, data) / 2
    current = Reduction(Circuit.full(units), constants.mean(model, data, units))
    for step in path.rounds[:4]:
        with torch.no_grad(), intervened(model, ablate(current)):
            here = answer_logits(model, data) / 2
        j = jacobian(model, data, current, current) / 2
        linear = ((here.softmax(1) - z.softmax(1))[:, None] @ j)[:, 0].mean(0)
        cost = linear + torch.einsum("nau,nab,nbu->nu", j, fisher(here), j).mean(0) / 2
        cost[~current.circuit.mask] = float("inf")
        [gone] = (current.circuit - step.reduction.circuit).names
        assert gone == units.names[int(cost.argmin())]
        current = current.with_circuit(step.reduction.circuit)


def test_a_round_predicts_the_joint_risk_of_what_it_removes():
    model, train, held_out = bridge(), examples(10, choices=CHOICES), examples(6, 1, choices=CHOICES)
    path = found(held_out=held_out, refitting=Refitting(0), exchanges=0)
    z = answer_logits(model, held_out).detach()
    current = Reduction(Circuit.full(path.units), constants.mean(model, train, path.units))
    for step in path.rounds:
        with torch.no_grad(), intervened(model, ablate(current)):
            here = answer_logits(model, held_out)
        gone = (current.circuit - step.reduction.circuit).mask
        move = jacobian(model, held_out, current, current)[..., gone].sum(2)
        slope = ((here.softmax(1) - z.softmax(1)) * move).sum(1)
        expected = kl(z, here) + slope + torch.einsum("na,nab,nb->n", move, fisher(here), move) / 2
        assert step.predicted.mean == pytest.approx(float(expected.mean()), rel=1e-8)
        assert step.predicted.stderr == pytest.approx(float(expected.std()) / 6**0.5, rel=1e-6)
        assert step.measured == risk(model, step.reduction, held_out)
        current = step.reduction


def test_the_best_of_all_circuits_is_found():
    model, data = exclusive_or(), exclusive_or_inputs(64)
    values = constants.mean(model, data, model.units)
    measured = {}
    for kept in itertools.combinations(model.units.names, 2):
        measured[kept] = risk(model, Reduction(Circuit.of(model.units, kept), values), data).mean
    best = min(measured, key=lambda kept: measured[kept])
    others = [value for kept, value in measured.items() if kept != best]
    assert best == EXCLUSIVE_OR and min(others) > 0.05  # the answer is unique
    path = sparsify(model, data, model.units, rounds=4, smallest=0.25, progress=False)
    assert path.rounds[-1].reduction.circuit.names == best


def test_one_expansion_orders_all_units_wherever_its_round_ends():
    orders = [found(sizes=[size], shrinkage=NO_SHRINKAGE).order.tolist() for size in (0.7, 0.4, 0.01)]
    assert orders[0] == orders[1] == orders[2]


# Paths


def test_a_path_is_nested_and_every_size_is_on_it():
    path = usual()
    assert sorted(path.order.tolist()) == list(range(len(path.units)))
    sizes = [len(r.reduction.circuit) for r in path.rounds]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[-1] == 3
    larger = Circuit.full(path.units)
    for count in range(len(path.units), 0, -1):
        circuit = path.at(count / len(path.units)).circuit
        assert len(circuit) == count and circuit <= larger
        larger = circuit
    for step in path.rounds:
        assert path.at(step.reduction.circuit.fraction) == step.reduction


def test_at_rounds_to_the_nearest_size_and_keeps_at_least_one():
    path = usual()
    assert [len(path.at(f).circuit) for f in (1.0, 0.5, 0.25, 0.001)] == [14, 7, 4, 1]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, float("nan")])
def test_fractions_outside_nought_and_one_are_refused(fraction: float):
    path = usual()
    with pytest.raises(ValueError, match=rf"fraction is {fraction}; it must lie in \(0, 1\]"):
        path.at(fraction)
    with pytest.raises(ValueError, match=rf"smallest is {fraction}; it must lie in \(0, 1\]"):
        found(smallest=fraction)


def test_within_is_the_smallest_round_that_is_good_enough():
    path, model, data = usual(), bridge(), examples(20, 4, choices=CHOICES)
    risks = [risk(model, step.reduction, data).mean for step in path.rounds]
    for nats in sorted(risks):
        allowed = [step for step, value in zip(path.rounds, risks, strict=True) if value <= nats]
        assert path.within(model, data, nats) == allowed[-1].reduction
    with pytest.raises(ValueError, match=r"within -1.0 nats; the lowest risk is 0\.\d+"), counted(model) as passes:
        path.within(model, data, -1.0)
    assert passes["forward"] == 20 * (len(path.rounds) + 1)


def test_the_frame_has_a_row_a_round():
    path = usual()
    frame = path.to_frame()
    assert list(frame["kept"]) == [len(r.reduction.circuit) for r in path.rounds]
    assert list(frame["measured"]) == [r.measured.mean for r in path.rounds]
    assert list(frame["predicted"]) == [r.predicted.mean for r in path.rounds]
    assert {"fraction", "predicted_stderr", "measured_stderr", "additivity"} <= set(frame.columns)
    assert repr(path).startswith(f"CircuitPath({len(path.rounds)} rounds, 14 to 3 units")


def test_predicting_changes_nothing_but_the_prediction():
    plain, predicted = found(predict=False), usual()
    assert torch.equal(plain.order, predicted.order)
    assert [r.measured for r in plain.rounds] == [r.measured for r in predicted.rounds]
    assert all(math.isnan(r.predicted.mean) and math.isnan(r.additivity) for r in plain.rounds)
    assert not any(math.isnan(r.predicted.mean) for r in [*predicted.rounds, *found(metric=log_odds).rounds])
    data = examples(10, choices=CHOICES)
    plain = sparsify(bridge(), data, units_of(bridge()), rounds=2, progress=False)
    assert all(math.isnan(r.predicted.mean) for r in plain.rounds)


@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("apart", [False, True], ids=["on train", "on held-out examples"])
def test_the_measured_risk_is_that_of_the_rounds_circuit(predict: bool, temperature: float, apart: bool):
    train, other = examples(10, choices=CHOICES), examples(6, 1, choices=CHOICES)
    path = found(
        probing=Probing(temperature=temperature),
        held_out=other if apart else None,
        refitting=Refitting(0),
        predict=predict,
    )
    for step in path.rounds:
        again = risk(bridge(), step.reduction, other if apart else train)
        assert (step.measured.mean, step.measured.stderr) == pytest.approx((again.mean, again.stderr), rel=1e-10)
        assert step.measured.n == again.n


@pytest.mark.parametrize("size", [10, 3])
def test_a_search_takes_the_passes_that_it_says(size: int):
    model, data = bridge(), examples(10, choices=CHOICES)
    settings: dict[str, Any] = {"rounds": 4, "smallest": 0.2, "batch_size": size, "progress": False, "exchanges": 0}
    with counted(model) as passes:
        sparsify(model, data, units_of(model), **settings)
    # means, a forward pass a round, the original, the last measured risk; three exact probes, which hold the slope
    assert passes == {"forward": (1 + 4 + 1 + 1) * 10, "backward": 4 * 3 * 10}
    with counted(model) as passes:
        sparsify(model, data, units_of(model), held_out=data, refitting=Refitting(0), **settings)
    assert passes == {"forward": (1 + 4 + 1 + 4 + 1 + 1) * 10, "backward": 2 * 4 * 3 * 10}
    other = examples(5, 2, choices=CHOICES)
    with counted(model) as passes:
        sparsify(model, data, units_of(model), held_out=other, predict=False, refitting=Refitting(0), **settings)
    # on the held-out examples the original once, and every round's risk
    assert passes == {"forward": (1 + 4 + 1) * 10 + (1 + 4) * 5, "backward": 4 * 3 * 10}


def test_what_is_remembered_is_bounded():
    calls: list[int] = []

    def compute(start: int) -> torch.Tensor:
        calls.append(start)
        return torch.full((2, 3), float(start))

    recall = remembering(12)
    for start in (0, 2, 4, 0, 2, 4):
        assert torch.equal(
            recall(torch.tensor([start]), lambda start=start: compute(start)), torch.full((2, 3), float(start))
        )
    assert calls == [0, 2, 4, 4]


def test_units_that_are_always_kept_stay():
    units = units_of(bridge())
    least = usual().rounds[0].reduction.circuit  # two of what a free search removes first
    kept = Circuit.of(units, (~least).names[:2])
    path = found(constraints=Constraints(always_keep=kept))
    assert all(kept <= step.reduction.circuit for step in path.rounds)
    assert kept <= path.at(0.15).circuit
    with pytest.raises(ValueError, match="always_keep"):
        found(constraints=Constraints(always_keep=Circuit.full(units)))
    with pytest.raises(ValueError, match="always_keep"):
        found(constraints=Constraints(always_keep=Circuit.full(units.at(1))))


def test_a_refit_in_the_rounds_lowers_the_risk():
    held_out = examples(12, 3, choices=CHOICES)
    plain, refitted = found(held_out=held_out, refitting=Refitting(0)), found(held_out=held_out, refitting=Refitting(5))
    assert refitted.rounds[0].measured.mean < plain.rounds[0].measured.mean
    assert all(step.reduction.kind == "refit" for step in refitted.rounds)
    assert refitted.rounds[-1].reduction.baseline == plain.rounds[-1].reduction.values
    with pytest.raises(ValueError, match=r"refitting\.steps needs held_out"):
        found(refitting=Refitting(10))


def test_no_pass_is_larger_than_what_is_given_and_a_step_of_a_refit_may_be():
    model, data = bridge(), examples(12, 3, choices=CHOICES)
    settings: dict[str, Any] = {"rounds": 2, "smallest": 0.3, "held_out": data, "progress": False}
    sizes: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: sizes.append(len(value)))]):
        path = sparsify(model, data, units_of(model), refitting=Refitting(2, per_step=10), batch_size=4, **settings)
        path.within(model, data, float("inf"), batch_size=4)
    assert max(sizes) == 4
    for per_step, other in ((10, 12), (None, 12)):
        one, another = (
            sparsify(model, data, units_of(model), refitting=Refitting(2, per_step=n), **settings).rounds[0].reduction
            for n in (per_step, other)
        )
        assert (one == another) == (per_step is None)


@pytest.mark.parametrize("kind", ["mean", "zero", "curvature", "given"])
def test_a_path_says_how_its_values_were_made(kind: str):
    model, data, units = bridge(), examples(10), units_of(bridge())
    zeros = constants.zero(model, data, units)
    made = {
        "mean": lambda: None,
        "zero": lambda: zeros,
        "curvature": lambda: constants.curvature_weighted(model, data, units),
        "given": lambda: Values(units, tuple(tensor + 1 for tensor in zeros.tensors)),
    }
    path = found(values=made[kind]())
    assert path.at(0.5).kind == kind == path.rounds[-1].reduction.values.kind
    assert found(start=path.at(0.5), values=zeros).at(0.2).kind == "zero"


def test_given_values_are_what_removed_units_are_set_to():
    zeros = constants.zero(bridge(), examples(), units_of(bridge()))
    path = found(values=zeros)
    assert path.at(0.3).values == zeros and path.order.tolist() != usual().order.tolist()


def test_a_search_by_a_metric_is_measured_in_its_units():
    path = found(metric=log_odds)
    last = path.rounds[-1]
    assert last.measured == risk(bridge(), last.reduction, examples(10, choices=CHOICES), metric=log_odds)
    assert last.measured.unit == last.predicted.unit == "squared units"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    model, data = bridge(), examples(10, answers=2)  # eleven answers and four probes: sampled
    contents = []
    for number, seed in enumerate([5, 5, 6]):
        path = sparsify(
            model,
            data,
            units_of(model),
            held_out=data,
            refitting=Refitting(1),
            rounds=3,
            smallest=0.2,
            seed=seed,
            progress=False,
        )
        path.at(0.3).save(tmp_path / str(number))
        contents.append((tmp_path / str(number)).read_bytes())
    assert contents[0] == contents[1] != contents[2]


# Schedules, costs and beginnings of one's own


def test_sizes_of_ones_own_are_the_rounds():
    path = found(sizes=[0.9, 0.5, 0.25])
    assert [len(step.reduction.circuit) for step in path.rounds] == [13, 7, 4]
    for sizes in ([0.5, 0.9], []):
        with pytest.raises(ValueError, match=r"sizes is \["):
            found(sizes=sizes)
    with pytest.raises(ValueError, match=r"sizes is 1\.5; it must lie"):
        found(sizes=[1.5, 0.5])


def test_a_budget_is_kept():
    costs = torch.tensor([9.0] * 4 + [1.0] * 10)  # heads are larger than neurons
    path = found(constraints=Constraints(costs=costs))
    for step in path.rounds:
        assert path.within_budget(float(costs[step.reduction.circuit.mask].sum())) == step.reduction
    for budget in (46.0, 20.5, 9.0):
        kept = path.within_budget(budget).circuit
        assert costs[kept.mask].sum() <= budget
        following = path.order[len(path.units) - len(kept) - 1]
        assert len(kept) == len(path.units) or costs[kept.mask].sum() + costs[following] > budget
    with pytest.raises(ValueError, match=r"budget is 0\.5; the smallest circuit of the path costs"):
        path.within_budget(0.5)
    assert len(usual().within_budget(5.0).circuit) == 5
    with unchecked(), pytest.raises(ValueError, match="costs must hold a positive number for each of the 14 units"):
        found(constraints=Constraints(costs=torch.ones(3)))
    with pytest.raises(ValueError, match="costs must hold a positive number for each of the 14 units"):
        found(constraints=Constraints(costs=torch.ones(14).index_fill(0, torch.tensor([3]), float("inf"))))


def test_costs_that_are_all_one_are_counts():
    model, data = fresh(d_mlp=48), examples(24)
    units = units_of(model)
    settings: dict[str, Any] = {"sizes": (0.57,), "exchanges": 0, "progress": False}
    count = sparsify(model, data, units, **settings)
    by_cost = sparsify(model, data, units, constraints=Constraints(costs=torch.ones(100)), **settings)
    assert [len(step.reduction.circuit) for step in by_cost.rounds] == [57]
    assert by_cost.rounds[0].reduction.circuit == count.rounds[0].reduction.circuit
    assert len(by_cost.within_budget(0.57 * 100).circuit) == 57
    held = count.rounds[0].reduction.circuit
    kept = sparsify(model, data, units, constraints=Constraints(costs=torch.ones(100), always_keep=held), **settings)
    assert kept.rounds[0].reduction.circuit == held


@pytest.mark.parametrize("slope", (0.0, 0.5, 1.0))
def test_the_order_does_not_depend_on_where_a_single_round_ends(slope: float):
    short, long = (
        found(sizes=(size,), shrinkage=Shrinkage(0.5, slope), exchanges=0).order.tolist() for size in (0.6, 0.1)
    )
    assert short == long


def test_sizes_that_remove_nothing_are_named():
    with pytest.raises(ValueError, match=r"sizes=\[1\.0\] removes none of the 14 units"):
        found(sizes=(1.0,))


def test_a_search_goes_on_where_another_ended():
    first = found(sizes=[0.8, 0.6])
    on = found(sizes=[0.8, 0.6, 0.4], start=first.rounds[0].reduction)
    assert [len(step.reduction.circuit) for step in on.rounds] == [8, 6]
    assert all(step.reduction.circuit <= first.rounds[0].reduction.circuit for step in on.rounds)
    assert sorted(on.order.tolist()) == list(range(14))
    assert on.at(0.8).circuit == first.rounds[0].reduction.circuit
    with pytest.raises(ValueError, match="start is a reduction over"):
        found(start=reduction_of(bridge(), units=units_of(bridge()).at(1)))


def test_what_a_search_cannot_go_on_from_is_refused_before_a_round():
    model, data = bridge(), examples(10, choices=CHOICES)
    here = found(sizes=[0.6]).at(0.6)
    missing = ~here.circuit
    with counted(model) as passes:
        with pytest.raises(ValueError, match="made for the model"):
            found(start=replace(here, fingerprint="0" * 64))
        with pytest.raises(ValueError, match=f"always_keep has {missing.names[0]}, which start has removed already"):
            found(start=here, constraints=Constraints(always_keep=missing))
        assert passes["forward"] == 0
    mapped = constants.neighbours(model, here, data)
    with pytest.raises(ValueError, match="start has affine replacements"):
        found(start=mapped)


def test_units_that_always_stay_and_fill_the_smallest_size_are_exchanged_for_none():
    model, data = bridge(), examples(10, choices=CHOICES)
    kept = Circuit.of(units_of(model), units_of(model).names[:6])
    with counted(model) as passes:
        path = found(sizes=[0.8, 0.6, 6 / 14], constraints=Constraints(always_keep=kept))
    assert [len(step.reduction.circuit) for step in path.rounds] == [11, 8, 6]
    assert path.rounds[-1].reduction.circuit == kept
    assert passes["forward"] < 30 * len(data)  # 23 rounds were made before


def test_places_of_other_examples_are_refused():
    model, data = bridge(), examples(12, choices=CHOICES)
    units = units_of(model).at(torch.arange(12) % 5)
    reduction = reduction_of(model, units=units)
    for call in (
        lambda: risk(model, reduction, data[6:]),
        lambda: sparsify(model, data, units, sizes=(0.5,), held_out=data[6:], progress=False),
        lambda: constants.mean(model, data[:4], units),
    ):
        with pytest.raises(ValueError, match=r"are places of 12 examples, and there are \d+: take those of a part"):
            call()
    for call in (
        lambda: sparsify(model, data[:6], units.for_examples(torch.arange(6)), held_out=data[6:], progress=False),
        lambda: baselines.hard_concrete(model, data, units, held_out=data[torch.arange(12)], steps=2),
    ):
        with pytest.raises(ValueError, match=r"positions of blocks\.0\.\S+ are a tensor of places.*: name a span"):
            call()
    assert sparsify(model, data, units, sizes=(0.5,), held_out=data, rounds=1, progress=False).at(0.5).units == units
    part = reduction.for_examples(torch.arange(6, 12))
    assert risk(model, part, data[6:]).n == 6
    short = units_of(model).at(torch.zeros(12, dtype=torch.int16))
    assert constants.mean(model, data, short).units.sites[0].positions.dtype == torch.int64  # type: ignore[union-attr]


def test_one_possible_answer_is_refused():
    with pytest.raises(ValueError, match="choices has one answer, 3, which is certain"):
        sparsify(bridge(), examples(6, choices=(3,)), units_of(bridge()), sizes=(0.5,), progress=False)


# What is refused, and what is left behind


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        found(rounds=0)
    with pytest.raises(ValueError, match=r"smallest.*1\.0"):
        found(smallest=1.0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        found(batch_size=0)
    other = reduction_of(bridge(), units=units_of(bridge()).at(1))
    with pytest.raises(ValueError, match="values are for"):
        found(values=other.values)


def test_the_model_leaves_as_it_came_in():
    model, data = fresh(), examples(6)
    model.unembed.requires_grad_(False)
    units = units_of(model)
    with unchanged(model):
        sparsify(model, data, units, held_out=data, refitting=Refitting(2), rounds=3, smallest=0.3, progress=False)

    calls = []

    def broken(logits: Any, batch: Any) -> Any:
        calls.append(len(logits))
        if len(calls) > 12:
            raise RuntimeError("no more")
        return log_odds(logits, batch)

    with unchanged(model), pytest.raises(RuntimeError, match="no more"):
        sparsify(model, data, units, metric=broken, held_out=data, refitting=Refitting(2), rounds=3, progress=False)


def test_the_reductions_of_a_path_belong_to_its_model():
    path, data = usual(), examples(3)
    assert all(step.reduction.fingerprint == fingerprint(bridge()) for step in path.rounds)
    other = fresh(seed=2)
    with pytest.raises(
        ValueError, match=f"made for the model {fingerprint(bridge())}, this one is {fingerprint(other)}"
    ):
        path.within(other, data, 1.0)


@pytest.mark.parametrize(("n", "some"), [(8, None), (30, None), (30, 10)])
def test_no_larger_circuit_of_a_path_does_worse_than_a_smaller_one(n: int, some: int | None):
    """Beyond the error of measuring it, where all are measured on the same examples; all stay nested, at the sizes that
    were asked for."""
    model = bridge()
    for seed in range(12):
        probing = Probing(1, examples=some)
        asked: dict[str, Any] = {"rounds": 6, "smallest": 0.1, "probing": probing, "seed": seed, "progress": False}
        path = sparsify(model, examples(n, seed=seed), units_of(model), **asked)
        assert [len(step.reduction.circuit) for step in path.rounds] == [9, 6, 4, 2, 1]
        for step in path.rounds:
            assert path.at(step.reduction.circuit.fraction).circuit == step.reduction.circuit
        for larger, smaller in itertools.pairwise(path.rounds):
            rise = larger.measured.mean - smaller.measured.mean
            assert smaller.reduction.circuit <= larger.reduction.circuit
            assert some is not None or rise <= max(1e-3, larger.measured.stderr)
