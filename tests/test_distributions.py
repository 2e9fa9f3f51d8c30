"""Mixtures of intervention distributions, and everything that takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, random_mask, unchanged, units_of

from tl_sparsify import constants, score
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution, drawn_interventions
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import known_of, risk
from tl_sparsify.core.metrics import divergence
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.expansion.linearisation import joint_moments
from tl_sparsify.search.joint import sparsify

NONE = InterventionDistribution()
SHUFFLED = InterventionDistribution.interchange(0.4)
PAIRED = InterventionDistribution.interchange(0.4, "counterfactual")
MEAN = InterventionDistribution.mean(0.3)
ALL = InterventionDistribution.interchange(0.4, of="all")
MIXED = InterventionDistribution.mixture((1.0, NONE), (2.0, SHUFFLED), (1.0, MEAN))
EVERY = {"shuffled": SHUFFLED, "paired": PAIRED, "mean": MEAN, "all": ALL, "mixed": MIXED}


def half(model: Any, batch: Any) -> Reduction:
    units = units_of(model)
    return constants.reduced(model, Circuit(units, random_mask(units, 1)), constants.mean(model, batch, units))


@pytest.mark.parametrize("name", EVERY)
def test_risk_does_not_depend_on_batches_and_the_model_is_left_alone(name: str):
    model, batch = bridge(), examples(n=20)
    reduction = half(model, batch)
    with unchanged(model):
        whole = risk(model, reduction, batch, interventions=EVERY[name], seed=3)
    split = risk(model, reduction, batch, interventions=EVERY[name], seed=3, batch_size=7)
    assert split.mean == pytest.approx(whole.mean, rel=1e-10)
    assert whole.mean != pytest.approx(risk(model, reduction, batch).mean, rel=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_units_are_drawn_for_both_models(name: str):
    model, batch = bridge(), examples(n=200)
    reduction, index = half(model, batch), torch.arange(200)
    original = drawn_interventions(EVERY[name], model, reduction, batch, index, 5)
    with intervened(model, ablate(reduction)):
        reduced = drawn_interventions(EVERY[name], model, reduction, batch, index, 5)
    assert len(original) == len(reduced) == (2 if name == "mixed" else 1)
    for a, b in zip(original, reduced, strict=True):
        assert torch.equal(a.keep, b.keep)
        touched = (a.keep == 0).any(0)
        assert bool(touched[reduction.circuit.mask].all())
        assert bool(touched[~reduction.circuit.mask].any()) == (name == "all")


def test_each_example_of_a_mixture_draws_one_part_by_weight():
    model, batch = bridge(), examples(n=400)
    drawn = drawn_interventions(MIXED, model, half(model, batch), batch, torch.arange(400), 0)
    touched = torch.stack([(part.keep == 0).any(1) for part in drawn])
    assert int(touched.sum(0).max()) == 1
    assert touched[0].double().mean().item() == pytest.approx(0.5, abs=0.08)
    assert touched[1].double().mean().item() == pytest.approx(0.25, abs=0.08)


def test_an_intervention_on_a_removed_unit_is_none_on_the_reduced_model():
    model, batch = bridge(), examples(n=20)
    units = units_of(model)
    empty = constants.reduced(model, Circuit.empty(units), constants.mean(model, batch, units))
    everything = InterventionDistribution.interchange(1.0, "counterfactual", of="all")
    with torch.no_grad():
        with intervened(model, *drawn_interventions(everything, model, empty, batch, torch.arange(20), 0)):
            original = answer_logits(model, batch)
        with intervened(model, ablate(empty)):
            reduced = answer_logits(model, batch)
    expected = divergence(original, reduced, batch).mean().item()
    assert risk(model, empty, batch, interventions=everything).mean == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(risk(model, empty, batch).mean, rel=1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_the_expansion_around_the_ablated_model_is_the_measured_risk_where_nothing_more_is_removed(name: str):
    model, batch = bridge(), examples(n=20)
    reduction = half(model, batch)
    settings = {"interventions": EVERY[name], "seed": 3}
    nothing = torch.zeros(len(reduction.units), dtype=torch.bool)
    predicted = joint_moments(samples(model, batch, reduction, current=reduction, **settings), nothing)
    assert float(predicted.mean) == pytest.approx(risk(model, reduction, batch, **settings).mean, rel=1e-9)


def test_search_and_refit_take_a_distribution():
    model, batch = bridge(), examples(n=20)
    units = units_of(model)
    path = sparsify(model, batch, units, rounds=3, interventions=MIXED, progress=False)
    again = sparsify(model, batch, units, rounds=3, interventions=MIXED, batch_size=7, progress=False)
    assert torch.equal(path.order, again.order)
    given = path.at(0.5)
    fitted = constants.refit(model, given, batch, batch, steps=30, interventions=MIXED, progress=False)
    before = risk(model, given, batch, interventions=MIXED).mean
    assert risk(model, fitted, batch, interventions=MIXED).mean < before


def test_a_refit_does_not_take_what_is_known_of_the_original_alone():
    model, batch = bridge(), examples(n=20)
    units = units_of(model)
    given = sparsify(model, batch, units, sizes=(0.5,), progress=False).at(0.5)
    known = known_of(model, batch, units, clean=True, many=True, batch_size=None)
    settings: dict[str, Any] = {"steps": 5, "interventions": MIXED, "progress": False}
    fitted, expected = (constants.refit(model, given, batch, batch, known=one, **settings) for one in (known, None))
    assert fitted == expected


def test_bad_distributions_are_refused():
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        InterventionDistribution.interchange(1.5)
    with pytest.raises(ValueError, match="positive weights"):
        InterventionDistribution.mixture((0.0, NONE))
    with pytest.raises(ValueError, match="no mixtures"):
        InterventionDistribution.mixture((1.0, MIXED))
    with pytest.raises(ValueError, match="0 parts"):
        InterventionDistribution("mixture")
    model, batch = bridge(), examples(n=6)
    without = type(batch)(batch.tokens, batch.labels)
    with pytest.raises(ValueError, match="counterfactual_tokens"):
        risk(model, half(model, batch), without, interventions=PAIRED)


@pytest.mark.parametrize("name", EVERY)
def test_scores_under_interventions_are_those_of_small_and_of_whole_removals(name: str):
    model, batch = bridge(), examples(n=20)
    units, settings = units_of(model), {"interventions": EVERY[name], "seed": 3}
    values = constants.mean(model, batch, units)
    found = score.risk(model, batch, units, values=values, probes=16, **settings)
    plain = score.risk(model, batch, units, values=values, probes=16, seed=3)
    again = score.risk(model, batch, units, values=values, probes=16, batch_size=7, **settings)
    torch.testing.assert_close(found.scores, again.scores, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(found.scores, plain.scores, rtol=1e-2)
    exact = score.exact(model, batch, units, values=values, progress=False, **settings)
    again = score.exact(model, batch, units, values=values, progress=False, batch_size=7, **settings)
    torch.testing.assert_close(exact.scores, again.scores, rtol=1e-9, atol=1e-14)
    whole = constants.reduced(model, Circuit.full(units), values)
    for unit in (0, 7):  # by hand: the interventions that a circuit with all units draws, and then the removal
        with torch.no_grad():
            drawn = drawn_interventions(EVERY[name], model, whole, batch, torch.arange(20), 3)
            alone = torch.arange(len(units)) != unit
            with intervened(model, *drawn):
                original = answer_logits(model, batch)
            with intervened(model, *drawn, ablate(whole.with_circuit(Circuit(units, alone)))):
                removed = answer_logits(model, batch)
        expected = divergence(original, removed, batch).mean().item()
        assert float(exact.scores[unit]) == pytest.approx(expected, rel=1e-9)
