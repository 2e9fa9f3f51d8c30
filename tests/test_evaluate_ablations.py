"""Evaluation under zero, mean and counterfactual ablation, against the same slow computation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_hand import constant, measures, run
from helpers.evaluation import slow
from helpers.models import bridge, examples, fresh, unchanged
from helpers.models import random_values as other_values
from helpers.models import reduction_of as bridged_reduction
from helpers.models import units_of as units_on

from tl_sparsify import Circuit, Reduction, evaluate
from tl_sparsify.search.affine import neighbours
from tl_sparsify.search.constants import mean, reduced, refit, zero


@pytest.mark.parametrize("kind", ["zero", "mean", "counterfactual"])
def test_ablations_replace_what_the_reduction_brings(kind: Any):
    model, batch = bridge(), examples(8, answers=2)
    reduction = bridged_reduction(model)
    given = other_values(reduction.units, 7)
    fills = [constant(given)] * 8
    if kind == "zero":
        fills = [{hook: torch.zeros_like(v) for hook, v in fills[0].items()}] * 8
    if kind == "counterfactual":
        assert batch.counterfactual_tokens is not None
        fills = [run(model, reduction.units, tokens)[1] for tokens in batch.counterfactual_tokens]
    with unchanged(model):
        found = evaluate(model, reduction, batch, ablation=kind, values=given if kind == "mean" else None)
    expected, faithfulness, completeness = slow(batch, reduction, fills)
    assert found.kind == kind and (found.kept, found.fraction) == (len(reduction.circuit), reduction.circuit.fraction)
    assert found.risk.mean == pytest.approx(expected["risk"], rel=1e-10) and found.risk.mean > 0.01
    assert (found.accuracy, found.agreement) == pytest.approx((expected["accuracy"], expected["agreement"]))
    assert (found.faithfulness, found.completeness) == pytest.approx((faithfulness, completeness), rel=1e-10)
    assert found.risk.mean != pytest.approx(evaluate(model, reduction, batch).risk.mean, rel=0.01)


def test_mean_ablation_without_values_is_to_the_baseline():
    model, batch = bridge(), examples(8)
    reduction, baseline = bridged_reduction(model), other_values(units_on(model), 8)
    refitted = replace(reduction, values=replace(reduction.values, kind="refit"), reference=baseline)
    found = evaluate(model, refitted, batch, ablation="mean")
    means = replace(baseline, kind="mean")
    assert found == evaluate(model, replace(reduction, values=means), batch) and found.kind == "mean"
    assert found == evaluate(model, reduction, batch, ablation="mean", values=baseline)
    own = evaluate(model, refitted, batch)
    assert own.risk == evaluate(model, reduction, batch).risk != found.risk and own.completeness == found.completeness


def test_zeros_are_not_taken_for_means(tmp_path: Path):
    model, batch = bridge(), examples(8)
    reduction = reduced(model, bridged_reduction(model).circuit, zero(model, batch, units_on(model)))
    refitted = refit(model, reduction, batch, batch, steps=1, progress=False)
    refitted.save(tmp_path / "refitted")
    for zeros in (reduction, refitted, Reduction.load(tmp_path / "refitted")):
        with pytest.raises(ValueError, match="ablation='mean' needs values"):
            evaluate(model, zeros, batch, ablation="mean")
    assert evaluate(model, reduction, batch).kind == "zero"


def test_zero_ablation_is_a_reduction_to_zeros():
    model, batch = bridge(), examples(8)
    reduction = bridged_reduction(model)
    zeros = reduced(model, reduction.circuit, zero(model, batch, reduction.units), "zero")
    assert evaluate(model, reduction, batch, ablation="zero") == evaluate(model, zeros, batch)


def test_affine_replacements_are_left_out_under_another_ablation():
    model, batch = bridge(), examples(24)
    plain = Reduction(Circuit(units_on(model), torch.arange(14) % 3 > 0), mean(model, batch, units_on(model)))
    affine = neighbours(model, plain, batch, nearest=None)
    assert evaluate(model, affine, batch).risk != evaluate(model, plain, batch).risk
    for kind in ("zero", "counterfactual"):
        assert evaluate(model, affine, batch, ablation=kind) == evaluate(model, plain, batch, ablation=kind)


def test_interchange_under_counterfactual_ablation_is_that_of_the_slow_computation():
    """The partner's run is ablated too, to the values of the partner's counterfactual."""
    model, two = bridge(), examples(2, answers=2)  # each one's only partner is the other
    reduction = bridged_reduction(model)
    units, kept = reduction.units, list(reduction.circuit.names)
    found = evaluate(model, reduction, two, ablation="counterfactual", probability=1.0)
    assert two.counterfactual_tokens is not None
    fills = [run(model, units, tokens)[1] for tokens in two.counterfactual_tokens]
    risks, agreements = [], []
    for i, j in ((0, 1), (1, 0)):
        clean = run(model, units, two.tokens[j])[1]
        ablated = run(model, units, two.tokens[j], kept, fills[j])[1]
        full = run(model, units, two.tokens[i], taken=kept, other=clean)[0]
        reduced = run(model, units, two.tokens[i], kept, fills[i], taken=kept, other=ablated)[0]
        here = measures(full, reduced, two.labels[i], list(range(11)))
        risks.append(here["risk"])
        agreements.append(here["agreement"])
    assert found.interchange_risk.mean == pytest.approx(sum(risks) / 2, rel=1e-10)
    assert found.interchange_agreement == pytest.approx(sum(agreements) / 2)
    assert found.interchange_risk.mean != pytest.approx(found.risk.mean, rel=0.01)


@pytest.mark.parametrize("kind", ["zero", "counterfactual", "shuffled"])
def test_batches_do_not_matter_under_any_ablation(kind: str):
    model, batch = bridge(), examples(11, answers=2)
    if kind == "shuffled":
        batch = replace(batch, counterfactual_tokens=None, counterfactual_labels=None)
    name: Any = "counterfactual" if kind == "shuffled" else kind
    settings: dict[str, Any] = {"ablation": name, "probability": 0.5, "minimality": True, "bootstrap": 30}
    whole, parts = (evaluate(model, bridged_reduction(model), batch, batch_size=b, **settings) for b in (None, 3))
    assert whole.kind == parts.kind == kind
    for key, value in whole.to_dict().items():
        found = parts.to_dict()[key]
        assert found == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-10, abs=1e-12))


@pytest.mark.parametrize("kind", ["zero", "counterfactual"])
def test_minimality_under_another_ablation(kind: Any):
    model, batch = bridge(), examples(6)
    whole = bridged_reduction(model)
    found = evaluate(model, whole, batch, ablation=kind, minimality=True, bootstrap=0)
    drops = []
    for unit in whole.circuit.names:
        less = replace(whole, circuit=whole.circuit - Circuit.of(whole.units, [unit]))
        drops.append(found.faithfulness - evaluate(model, less, batch, ablation=kind, bootstrap=0).faithfulness)
    assert len(drops) > 2 and found.minimality == pytest.approx(min(drops), rel=1e-10) and min(drops) < max(drops)


@pytest.mark.parametrize(("kind", "passes"), [(None, 8), ("mean", 8), ("counterfactual", 11)])
def test_each_pass_is_counted(kind: Any, passes: int):
    model, batch = fresh(), examples(6)
    reduction, calls = bridged_reduction(model), []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return forward(*args, **kwargs)

    model.forward = counted
    evaluate(model, reduction, batch, ablation=kind, batch_size=4)
    assert sum(calls) == passes * len(batch)
