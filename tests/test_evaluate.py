"""Evaluation against a slow direct computation: one example at a time, hooks and sums written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.evaluation import KEPT, N, data, means, native, random_values, reduction_of, units_of

from tl_sparsify import Circuit, Reduction, Site, Units, Values, evaluate, risk
from tl_sparsify.core.metrics import log_probability


@pytest.mark.parametrize("choices", [True, False])
def test_every_measure_is_that_of_the_slow_computation(choices: bool):
    examples, reduction = data(choices), reduction_of(KEPT)
    found = evaluate(native(), reduction, examples)
    here = means(KEPT, reduction.values, examples)
    assert here["risk"] > 0.01
    assert found.risk.mean == pytest.approx(here["risk"], rel=1e-6)
    assert found.risk.n == N and found.risk.unit == "nats"
    assert found.accuracy == pytest.approx(here["accuracy"])
    assert found.agreement == pytest.approx(here["agreement"])
    assert found.original_accuracy == pytest.approx(means(None, reduction.values, examples)["accuracy"])
    assert (found.kept, found.fraction, found.kind) == (7, 7 / 24, "given")


def test_faithfulness_and_completeness_are_those_of_the_slow_computation():
    examples, reduction = data(), reduction_of(KEPT)
    complement = [name for name in reduction.units.names if name not in KEPT]
    full, empty, here, there = (
        means(kept, reduction.values, examples)["log odds"] for kept in (None, [], KEPT, complement)
    )
    found = evaluate(native(), reduction, examples)
    assert found.faithfulness == pytest.approx((here - empty) / (full - empty), rel=1e-6)
    assert found.completeness == pytest.approx((there - empty) / (full - empty), rel=1e-6)


def test_empty_circuit_and_complement_have_the_baselines_constants():
    examples, baseline = data(), random_values(5)
    reduction = reduction_of(KEPT, kind="refit", reference=baseline)
    complement = [name for name in reduction.units.names if name not in KEPT]
    full, empty = (means(kept, baseline, examples)["log odds"] for kept in (None, []))
    found = evaluate(native(), reduction, examples)
    here = means(KEPT, reduction.values, examples)
    assert found.risk.mean == pytest.approx(here["risk"], rel=1e-6) and found.kind == "refit"
    assert found.faithfulness == pytest.approx((here["log odds"] - empty) / (full - empty), rel=1e-6)
    there = means(complement, baseline, examples)["log odds"]
    assert found.completeness == pytest.approx((there - empty) / (full - empty), rel=1e-6)


def test_minimality_is_the_least_drop_from_removing_one_unit_more():
    examples, reduction = data(), reduction_of(KEPT)
    whole = evaluate(native(), reduction, examples, minimality=True)
    drops = []
    for unit in KEPT:
        less = reduction_of([name for name in KEPT if name != unit])
        drops.append(whole.faithfulness - evaluate(native(), less, examples).faithfulness)
    assert whole.minimality == min(drops) < max(drops)
    assert evaluate(native(), reduction, examples).minimality is None


def test_the_full_circuit_has_exact_values():
    full = reduction_of(units_of(native()).names)
    found = evaluate(native(), full, data(), probability=1.0)
    assert (found.risk.mean, found.risk.stderr, found.faithfulness, found.completeness) == (0, 0, 1, 0)
    assert (found.agreement, found.accuracy, found.fraction) == (1, found.original_accuracy, 1)
    assert (found.interchange_risk.mean, found.interchange_agreement) == (0, 1)


def test_the_empty_circuit_has_exact_values():
    found = evaluate(native(), reduction_of([]), data(), minimality=True)
    assert (found.kept, found.faithfulness, found.completeness) == (0, 0, 1)
    assert found.risk.mean > 0 and found.minimality is not None and math.isnan(found.minimality)
    assert found.interchange_risk == found.risk


def test_risk_is_the_measured_risk():
    reduction = reduction_of(KEPT)
    found, direct = evaluate(native(), reduction, data()).risk, risk(native(), reduction, data())
    assert (found.mean, found.stderr) == pytest.approx((direct.mean, direct.stderr), rel=1e-10)
    assert (found.n, found.unit) == (direct.n, direct.unit)


def test_without_interchange_the_interchange_measures_are_the_plain_ones():
    found = evaluate(native(), reduction_of(KEPT), data(), probability=0.0)
    assert (found.interchange_risk, found.interchange_agreement) == (found.risk, found.agreement)
    assert found.probability == 0


def test_interchange_depends_on_the_seed_and_nothing_else_does():
    runs = [evaluate(native(), reduction_of(KEPT), data(), probability=0.5, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].interchange_risk != runs[2].interchange_risk
    assert runs[0].intervals != runs[2].intervals
    same = replace(
        runs[2],
        interchange_risk=runs[0].interchange_risk,
        interchange_agreement=runs[0].interchange_agreement,
        intervals=runs[0].intervals,
    )
    assert same == runs[0]


def test_interchange_measures_are_those_of_the_slow_computation():
    two, reduction = data()[:2], reduction_of(KEPT)  # each one's only partner is the other
    found = evaluate(native(), reduction, two, probability=1.0)
    slow = means(KEPT, reduction.values, two, sources=two.tokens.flip(0))
    assert slow["risk"] != pytest.approx(means(KEPT, reduction.values, two)["risk"], rel=0.01)
    assert found.interchange_risk.mean == pytest.approx(slow["risk"], rel=1e-6)
    assert found.interchange_agreement == pytest.approx(slow["agreement"])


@pytest.mark.parametrize("size", [1, 5])
def test_batches_do_not_matter(size: int):
    whole, parts = (
        evaluate(native(), reduction_of(KEPT), data(), probability=0.4, batch_size=batch, seed=3).to_dict()
        for batch in (None, size)
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-10, abs=1e-12))


def test_another_metric_changes_the_shares_and_not_the_risk():
    examples, reduction = data(), reduction_of(KEPT)
    odds, probability = (
        evaluate(native(), reduction, examples, **settings) for settings in ({}, {"metric": log_probability})
    )
    assert odds.risk == probability.risk and odds.accuracy == probability.accuracy
    assert odds.faithfulness != probability.faithfulness
    full = evaluate(native(), reduction_of(reduction.units.names), examples, metric=log_probability)
    assert full.faithfulness == 1


def test_units_that_do_nothing_have_no_faithfulness():
    before = Units((Site("neuron", 0, "blocks.0.mlp.hook_post", 10),))
    values = Values(before, (torch.zeros(10, 1, dtype=torch.float64),))
    model = native()
    weight = model.blocks[0].mlp.out.original_component.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        found = evaluate(model, Reduction(Circuit.of(before, ["L0N3"]), values), data())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert math.isnan(found.faithfulness) and math.isnan(found.completeness)
    assert (found.risk.mean, found.agreement) == (0, 1)
