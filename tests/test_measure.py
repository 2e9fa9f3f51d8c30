"""Measured risk against the same computed slowly, one example and one intervention at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import (
    bridge,
    examples,
    fresh,
    inputs,
    linear,
    random_mask,
    reduction_of,
    seeded,
    unchanged,
    unchecked,
    units_of,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import constants
from tl_sparsify._internal import random as _random
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, run_values
from tl_sparsify.core.intervene import Intervention, ablate, interchange, intervened
from tl_sparsify.core.measure import risk, risk_slopes
from tl_sparsify.core.metrics import by_example, correct, divergence, kl, log_odds, log_probability
from tl_sparsify.core.reduction import Reduction

CHOICES = (1, 4, 7, 8)
SEEDS = st.integers(0, 2**31)


def logits(rows: int, choices: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, choices, generator=seeded(seed), dtype=torch.float64) * scale


# Divergences


@example(seed=219, scale=22.0)  # rounding alone makes -1.4e-20 of it
@given(SEEDS, st.floats(0.1, 50))
def test_kl_is_that_of_two_categorical_distributions(seed: int, scale: float):
    z, w = logits(5, 7, seed, scale), logits(5, 7, seed + 1, scale)
    one, two = (torch.distributions.Categorical(logits=x) for x in (z, w))
    torch.testing.assert_close(kl(z, w), torch.distributions.kl_divergence(one, two))
    assert (kl(z, w) >= 0).all()
    assert kl(z, z).abs().max() <= 1e-15
    torch.testing.assert_close(kl(z + 5, w - 3), kl(z, w), rtol=1e-8, atol=1e-12)  # a constant changes nothing


def test_kl_of_confident_answers_is_not_lost_to_rounding():
    z = torch.tensor([[30.0, 0.0]])
    found = kl(z, z + torch.tensor([[0.0, 0.1]]))
    p = torch.tensor(-30.0, dtype=torch.float64).exp()
    assert found.dtype == torch.float64 and float(found) == pytest.approx(float(p) * 0.00517, rel=0.01)


def test_metrics_are_those_of_the_answer():
    batch = inputs(6, choices=4)
    z, right = logits(6, 4, 0), batch.labels[:, 0]
    p = z.softmax(1)[torch.arange(6), right]
    torch.testing.assert_close(log_probability(z, batch), p.log())
    torch.testing.assert_close(log_odds(z, batch), (p / (1 - p)).log())
    assert correct(z, batch).tolist() == [float(z[i].argmax() == right[i]) for i in range(6)]
    two = examples(5, choices=(3, 6))
    z = logits(5, 2, 1)
    sign = torch.where(two.labels[:, -1] == 3, 1.0, -1.0)
    torch.testing.assert_close(log_odds(z, two), sign * (z[:, 0] - z[:, 1]))


def test_an_example_is_the_mean_of_its_answers():
    labels = torch.tensor([[-100, 1, 2], [3, -100, -100], [1, 1, 1]])
    batch = Examples(torch.zeros(3, 3, dtype=torch.long), labels)
    found = by_example(torch.tensor([1.0, 3, 7, 1, 2, 6]), batch)
    assert found.tolist() == [2.0, 7.0, 3.0]


def test_divergence_of_a_metric_is_half_the_square():
    batch = examples(4, answers=2, choices=CHOICES)
    z, w = logits(8, 4, 0), logits(8, 4, 1)
    expected = ((log_odds(z, batch) - log_odds(w, batch)).square() / 2).reshape(4, 2).mean(1)
    torch.testing.assert_close(divergence(z, w, batch, log_odds), expected)
    torch.testing.assert_close(divergence(z, w, batch), kl(z, w).reshape(4, 2).mean(1))


# Risk


@pytest.mark.parametrize("metric", [None, log_odds], ids=["nats", "log odds"])
def test_risk_is_the_mean_divergence_from_the_original(metric: Any):
    model, data = bridge(), examples(6, answers=2, choices=CHOICES)
    reduction = reduction_of(model)
    with torch.no_grad():
        z = answer_logits(model, data)
        with intervened(model, ablate(reduction)):
            each = divergence(z, answer_logits(model, data), data, metric)
    found = risk(model, reduction, data, metric=metric)
    assert found.mean == pytest.approx(float(each.mean()), rel=1e-12) and found.n == 6
    assert found.stderr == pytest.approx(float(each.std()) / 6**0.5, rel=1e-10)
    assert found.unit == ("nats" if metric is None else "squared units") and found.mean > 0.01


def test_the_full_circuit_has_no_risk():
    model, data = bridge(), examples(4)
    full = Reduction(Circuit.full(units_of(model)), reduction_of(model).values)
    assert risk(model, full, data).mean == pytest.approx(0, abs=1e-15)
    for probability in (0.0, 0.5, 1.0):
        drawn = InterventionDistribution.interchange(probability)
        assert risk(model, full, data, interventions=drawn).mean == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("source", ["shuffled", "counterfactual"])
@pytest.mark.parametrize("of", ["kept", "all"])
def test_interchange_risk_is_that_of_one_example_at_a_time(source: Any, of: Any):
    model, data, seed = bridge(), examples(5, choices=CHOICES), 3
    reduction = reduction_of(model, random_mask(units_of(model), 1, 0.7))
    drawn = InterventionDistribution.interchange(0.4, source, of)
    found = risk(model, reduction, data, interventions=drawn, seed=seed)
    partner = _random.shifted_partner(5, seed, 17)
    each, numbers = [], []
    for i in range(5):
        base, other = data[i : i + 1], data[partner[i : i + 1]]
        if source == "counterfactual":
            assert data.counterfactual_tokens is not None
            other = Examples(data.counterfactual_tokens[i : i + 1], base.labels, choices=data.choices)
        chosen = _random.uniform(seed, 29, i, torch.arange(len(reduction.units))) < 0.4
        swapped = Circuit(reduction.units, chosen & (reduction.circuit.mask | (of == "all")))
        numbers.append(len(swapped))
        with torch.no_grad():
            with intervened(model, interchange(swapped, run_values(model, other, reduction.units))):
                z = answer_logits(model, base)
            with intervened(model, ablate(reduction)):
                theirs = run_values(model, other, reduction.units)
            with intervened(model, interchange(swapped, theirs), ablate(reduction)):  # what is removed stays so
                each.append(kl(z, answer_logits(model, base)))
    assert found.mean == pytest.approx(float(torch.cat(each).mean()), rel=1e-10)
    assert found.mean != pytest.approx(risk(model, reduction, data).mean, rel=0.01) and sum(numbers) > 5


def test_risk_is_a_function_of_the_seed():
    model, data = bridge(), examples(5)
    reduction, drawn = reduction_of(model), InterventionDistribution.interchange(0.5)
    found = [risk(model, reduction, data, interventions=drawn, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_interchange_with_nothing_chosen_is_plain_risk():
    model, data = bridge(), examples(5)
    reduction = reduction_of(model)
    never = InterventionDistribution.interchange(0.0)
    assert risk(model, reduction, data, interventions=never) == risk(model, reduction, data)


def test_models_without_positions_have_a_risk():
    model, data = linear(), inputs()
    reduction = reduction_of(model, units=model.units, mask=random_mask(model.units))
    hidden = data.tokens @ model.w_in.detach()
    gone = ~reduction.circuit.mask
    hidden[:, gone] = reduction.values.tensors[0][gone, 0]
    with torch.no_grad():
        expected = kl(model(data.tokens), hidden @ model.w_out).mean()
    assert risk(model, reduction, data).mean == pytest.approx(float(expected), rel=1e-12)


# What is refused, and what is left behind


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"kind": "zap"}, "kind is 'zap'; the known distributions are none, interchange"),
        ({"kind": "interchange", "probability": 1.5}, r"probability is 1\.5; it lies in \[0, 1\]"),
        ({"kind": "interchange", "probability": -0.1}, r"probability is -0\.1"),
        ({"kind": "interchange", "probability": float("nan")}, "probability is nan"),
    ],
)
def test_impossible_distributions_are_refused(settings: dict[str, Any], says: str):
    with unchecked(), pytest.raises(ValueError, match=says):
        InterventionDistribution(**settings)


def test_counterfactual_sources_need_counterfactuals():
    data = examples(4)
    plain = Examples(data.tokens, data.labels)
    with pytest.raises(ValueError, match="counterfactual_tokens"):
        source_batch(InterventionDistribution.interchange(0.5, "counterfactual"), plain, torch.arange(2), 0)


def test_the_model_leaves_as_it_came_in():
    model, data = fresh(), examples(4)
    model.unembed.requires_grad_(False)
    reduction, drawn = reduction_of(model), InterventionDistribution.interchange(0.5)
    with unchanged(model):
        risk(model, reduction, data, interventions=drawn, batch_size=3)

    def broken(z: Tensor, batch: Examples) -> Tensor:
        raise RuntimeError("no such metric")

    with unchanged(model), pytest.raises(RuntimeError, match="no such metric"):
        risk(model, reduction, data, interventions=drawn, metric=broken)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("batch_size", [None, 5])
def test_slopes_of_risk_are_those_of_finite_differences(paired: bool, batch_size: int | None):
    model, data = bridge(), examples(12).with_partners(torch.arange(12).roll(1))
    units, step = units_of(model), 1e-5
    values = (constants.counterfactual if paired else constants.mean)(model, data, units)
    given = run_values(model, data.counterfactuals, units) if paired else values
    mask = torch.rand(len(units), generator=seeded(3)) < 0.6
    original = answer_logits(model, data)

    def measured(keep: Tensor) -> float:
        with torch.no_grad(), intervened(model, Intervention(units, keep, given, first_token="bos")):
            return float(divergence(original, answer_logits(model, data), data).mean())

    with unchanged(model):
        found = risk_slopes(model, Reduction(Circuit(units, mask), values), data, batch_size=batch_size)
    away = step * torch.eye(len(units), dtype=torch.float64)
    expected = [(measured(mask.double() + one) - measured(mask.double() - one)) / (2 * step) for one in away]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_slopes_of_risk_are_as_precise_as_the_model():
    model, data = bridge(), examples(12)
    units = units_of(model)
    values, mask = constants.mean(model, data, units), random_mask(units, 3, 0.6)
    keep = mask.double().requires_grad_()
    with intervened(model, Intervention(units, keep, values, first_token="bos")):
        measured = divergence(answer_logits(fresh(), data).detach(), answer_logits(model, data), data).mean()
    (expected,) = torch.autograd.grad(measured, keep)
    found = risk_slopes(model, Reduction(Circuit(units, mask), values), data)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)
