"""Scores of single units against explicit Jacobians and measured risks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import (
    bridge,
    examples,
    exclusive_or,
    exclusive_or_inputs,
    fisher,
    fresh,
    inputs,
    jacobian,
    linear,
    random_values,
    softened,
    unchanged,
    units_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify import constants, score
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import kl, log_odds
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads, mlps, neurons
from tl_sparsify.search.scores import Scores

CHOICES = (1, 4, 7, 8)
SEEDS = st.integers(0, 2**31)


def made_up(numbers: list[float]) -> Scores:
    units = units_of(bridge())
    scores = torch.tensor(numbers + [0.0] * (len(units) - len(numbers)), dtype=torch.float64)
    return Scores(units, scores, torch.zeros(len(units), dtype=torch.float64), "mine", "nats", 1, 0)


def test_scores_are_one_number_for_each_unit():
    units, number = heads(bridge()), torch.zeros(4)
    for scores, stderr, name in ((torch.ones(3), number, "scores"), (number, torch.ones(4, 1), "stderr")):
        with pytest.raises(
            ValueError, match=rf"{name} has shape \({len(scores if name == 'scores' else stderr)},.*holds 4"
        ):
            Scores(units, scores, stderr, "mine", "nats", 1, 0)


# Second-order risk


@given(SEEDS, st.sampled_from([1.0, 2.0, 5.0]))
@settings(max_examples=6)
def test_risk_is_half_the_jacobian_under_the_fisher_matrix(seed: int, temperature: float):
    model, data = bridge(), examples(5, seed, choices=CHOICES)
    values = random_values(units_of(model), seed)
    reduction = Reduction(Circuit.full(values.units), values)
    found = score.risk(model, data, values.units, values=values, temperature=temperature)
    with torch.no_grad():
        f = fisher(answer_logits(model, data), temperature)
    j = jacobian(model, data, reduction)
    each = torch.einsum("nau,nab,nbu->nu", j, f, j) / 2
    torch.testing.assert_close(found.scores, each.mean(0), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.stderr, each.std(0) / 5**0.5, rtol=1e-9, atol=1e-14)


def test_risk_of_every_kind_of_unit_is_the_small_step_risk():
    model, data, step = bridge(act_fn="gelu"), examples(6, choices=CHOICES), 1e-4
    units = heads(model) + neurons(model) + mlps(model)
    found = score.risk(model, data, units)
    values = constants.mean(model, data, units)
    reduction = Reduction(Circuit.full(units), values)
    with torch.no_grad():
        z = answer_logits(model, data)
        for unit in range(len(units)):
            keep = torch.ones(len(units), dtype=torch.float64)
            keep[unit] -= step
            measured = kl(z, softened(model, data, reduction, keep, None)).mean() / step**2
            assert float(measured) == pytest.approx(float(found.scores[unit]), rel=0.01, abs=1e-7)


def test_sampled_probes_agree_with_exact_ones_on_average():
    model, data = bridge(), examples(60)
    units = units_of(model)
    exact = score.risk(model, data, units, probes=10)
    sampled = [score.risk(model, data, units, probes=6, seed=seed) for seed in range(12)]
    assert (exact.backward_passes, sampled[0].backward_passes) == (10, 6)
    found = torch.stack([s.scores for s in sampled])
    assert not torch.equal(found[0], found[1])
    error = (found.mean(0) - exact.scores).abs() / (found.std(0) / 12**0.5)
    assert error.max() < 6 and (found.std(0) < exact.scores).all()


def test_risk_of_a_metric_is_half_its_squared_change():
    model, data = bridge(), examples(6, choices=CHOICES)
    values = constants.mean(model, data, units_of(model))
    found = score.risk(model, data, values.units, metric=log_odds)
    with torch.no_grad():
        z = answer_logits(model, data)
    gradient = torch.autograd.functional.jacobian(lambda logits: log_odds(logits, data).sum(), z)
    j = jacobian(model, data, Reduction(Circuit.full(values.units), values))
    torch.testing.assert_close(found.scores, torch.einsum("na,nau->nu", gradient, j).square().mean(0) / 2)
    assert (found.measured_in, found.backward_passes) == ("squared units", 1)


def test_units_that_nothing_reads_have_no_risk():
    model = exclusive_or()
    found = score.risk(model, exclusive_or_inputs(), model.units)
    assert found.scores[[2, 3, 7]].abs().max() <= 1e-25  # not read, constant, dead
    assert found.scores[[0, 1, 4, 5, 6]].min() > 0.01


def test_a_risk_says_what_it_cost_and_in_what_it_is_measured():
    model, data = bridge(), examples(3, choices=CHOICES)
    units = units_of(model)
    passes: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: passes.append(len(value)))]):
        found = score.risk(model, data, units, probes=2)
        assert (len(passes), found.backward_passes) == (found.forward_passes, 2)
        given = score.risk(model, data, units, values=constants.mean(model, data, units))
    assert (found.forward_passes, given.forward_passes, given.backward_passes) == (1, 1, 3)
    assert (given.name, given.measured_in) == ("risk", "nats")
    assert score.risk(model, data, units, temperature=3.0).measured_in == "3^2 nats"


# Variance


def test_variance_is_summed_over_the_width():
    model, data = bridge(), examples(6)
    found = score.variance(model, data, units_of(model))
    with torch.no_grad():
        _, cache = model.run_with_cache(data.tokens)
    expected = [cache[site.hook].flatten(0, 1).reshape(30, site.size, -1) for site in found.units.sites]
    torch.testing.assert_close(found.scores, torch.cat([v.var(0, correction=0).sum(-1) for v in expected]))
    assert found.backward_passes == 0


# The value


@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=14), st.floats(0.001, 1))
def test_the_top_of_scores_holds_the_largest(numbers: list[float], fraction: float):
    scores = made_up(numbers)
    kept = scores.top(fraction)
    assert len(kept) == max(1, round(14 * fraction))
    assert scores.scores[kept.mask].min() >= scores.scores[~kept.mask].max() if len(kept) < 14 else True
    assert kept <= scores.top(1.0) and scores.scores[scores.order].diff().min() >= 0


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, float("nan")])
def test_a_fraction_outside_nought_and_one_is_refused(fraction: float):
    with pytest.raises(ValueError, match=rf"fraction is {fraction}; it must lie in \(0, 1\]"):
        made_up([1.0]).top(fraction)


def test_a_score_that_is_no_number_has_no_place():
    scores = made_up([3.0, float("nan"), 1.0, float("nan")])
    with pytest.raises(ValueError, match=rf"{scores.units.names[1]} \(and of 1 other units\) is NaN"):
        scores.top(0.5)


def test_the_frame_has_a_row_a_unit():
    model, data = bridge(), examples(3)
    found = score.risk(model, data, units_of(model))
    frame = found.to_frame()
    assert list(frame.columns) == ["unit", "kind", "layer", "index", "score", "stderr"]
    assert frame["unit"].tolist() == list(found.units.names) and frame["score"].tolist() == found.scores.tolist()
    row = frame[frame["unit"] == "L1N3"].iloc[0]
    assert (row["kind"], row["layer"], row["index"]) == ("neuron", 1, 3)


def test_the_repr_is_one_line():
    assert repr(made_up([0.0, 3.0, 1.0])) == "Scores(mine, nats: 14 units, largest L0H1)"


# What is refused, and what is left behind


@pytest.mark.parametrize("settings", [{"probes": 0}, {"temperature": 0.0}, {"temperature": -2.0}, {"batch_size": 0}])
def test_wrong_settings_are_refused(settings: dict[str, Any]):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        score.risk(bridge(), examples(3), units_of(bridge()), **settings)


def test_values_of_other_units_are_refused():
    model = bridge()
    with pytest.raises(ValueError, match="values are for"):
        score.risk(model, examples(3), heads(model), values=random_values(neurons(model)))


def test_the_model_leaves_as_it_came_in():
    model, data = fresh(), examples(4)
    model.blocks[0].requires_grad_(False)
    with unchanged(model):
        score.risk(model, data, units_of(model), batch_size=3)
        score.variance(model, data, units_of(model))
    other = linear()
    with unchanged(other):
        score.risk(other, inputs(), other.units)


def test_one_example_says_nothing_of_the_error():
    found = score.variance(bridge(), examples(1), units_of(bridge()))
    assert bool(found.stderr.isinf().all()) and bool(found.scores.isfinite().all())
