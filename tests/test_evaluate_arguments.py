"""Evaluation's intervals, numbers as a dictionary, refusals, and the areas under curves of true units."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.evaluation import KEPT, N, data, means, native, random_values, reduction_of
from helpers.models import bridge, examples, unchanged, unchecked
from helpers.models import random_values as other_values
from helpers.models import reduction_of as bridged_reduction
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from tl_sparsify import Circuit, Reduction, Site, Units, evaluate, fingerprint
from tl_sparsify.comparison.evaluate import auroc, average_precision
from tl_sparsify.comparison.resampling import weights


def test_to_dict_is_flat_numbers():
    found = evaluate(native(), reduction_of(KEPT), data())
    flat = found.to_dict()
    assert list(flat) == [
        "kept", "fraction", "kind", "risk", "risk_stderr", "accuracy", "original_accuracy", "agreement",
        "faithfulness", "completeness", "minimality", "interchange_risk", "interchange_risk_stderr",
        "interchange_agreement", "probability", "risk_low", "risk_high", "accuracy_low", "accuracy_high",
        "agreement_low", "agreement_high", "faithfulness_low", "faithfulness_high", "completeness_low",
        "completeness_high",
    ]  # fmt: skip
    assert (flat["faithfulness_low"], flat["faithfulness_high"]) == found.intervals["faithfulness"]
    assert (flat["risk"], flat["risk_stderr"]) == (found.risk.mean, found.risk.stderr)
    assert all(isinstance(value, float | int | str | None) for value in flat.values())


def test_the_repr_is_one_line():
    text = repr(evaluate(native(), reduction_of(KEPT), data()))
    assert text.startswith("Evaluation(7 units, given: risk ") and "\n" not in text


def test_a_model_in_training_mode_is_refused():
    model = native()
    try:
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            evaluate(model, reduction_of(KEPT), data())
    finally:
        model.eval()


def test_a_reduction_of_another_model_is_refused():
    with pytest.raises(ValueError, match="reduction was made for the model 0123"):
        evaluate(native(), replace(reduction_of(KEPT), fingerprint="0123"), data())


def test_a_probability_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        evaluate(native(), reduction_of(KEPT), data(), probability=1.5)


def test_constants_that_are_not_finite_are_named():
    values = random_values(0)
    values.tensors[-1][3] = float("nan")
    with pytest.raises(ValueError, match=r"values of removed units at blocks\.1\.mlp\.hook_post are NaN or infinite"):
        evaluate(native(), Reduction(Circuit.of(values.units, KEPT), values), data())


def test_the_model_is_left_as_it_was():
    model = native()
    state, before = torch.get_rng_state(), fingerprint(model)
    evaluate(model, reduction_of(KEPT), data())
    with pytest.raises(ValueError, match="labels or choices hold id 50"):
        evaluate(model, reduction_of(KEPT), replace(data(), choices=torch.tensor([*range(8), 50])))
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state)
    assert not [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# Intervals


def test_intervals_are_those_of_a_loop_over_replicates():
    examples, reduction = data(), reduction_of(KEPT)
    found = evaluate(native(), reduction, examples, bootstrap=20, level=0.9, seed=6)
    complement = [name for name in reduction.units.names if name not in KEPT]
    each = [
        [means(kept, reduction.values, examples[i : i + 1]) for kept in (None, [], KEPT, complement)] for i in range(N)
    ]
    replicates: dict[str, list[float]] = {name: [] for name in found.intervals}
    for row in weights(torch.arange(N), 20, 6).T.tolist():
        full, empty, here, there = (
            {name: sum(w * each[i][k][name] for i, w in enumerate(row)) / sum(row) for name in each[0][k]}
            for k in range(4)
        )
        for name in ("risk", "accuracy", "agreement"):
            replicates[name].append(here[name])
        for name, part in (("faithfulness", here), ("completeness", there)):
            share = (part["log odds"] - empty["log odds"]) / (full["log odds"] - empty["log odds"])
            replicates[name].append(share)
    for name, drawn in replicates.items():
        assert found.intervals[name] == pytest.approx(tuple(np.percentile(drawn, [5, 95])), rel=1e-6, abs=1e-12)
    assert found.intervals["risk"][0] < found.risk.mean < found.intervals["risk"][1]


def test_without_replicates_intervals_are_nan_and_the_rest_is_the_same():
    some, none = (evaluate(native(), reduction_of(KEPT), data(), bootstrap=n) for n in (10, 0))
    assert all(math.isnan(end) for ends in none.intervals.values() for end in ends)
    assert replace(none, intervals=some.intervals) == some


def refused(reduction: Reduction, match: str, **settings: Any) -> None:
    model = bridge()
    with unchanged(model), unchecked(), pytest.raises(ValueError, match=match):
        evaluate(model, reduction, examples(), **settings)


def test_arguments_that_do_not_belong_are_refused():
    reduction = bridged_reduction(bridge())
    values = other_values(reduction.units, 1)
    refused(reduction, "values are given, and no ablation", values=values)
    refused(reduction, "values are given, and ablation is 'counterfactual'", values=values, ablation="counterfactual")
    refused(reduction, "ablation is 'refit'; it is mean, zero or counterfactual", ablation="refit")
    refused(reduction, r"sizes is \[0\.1\]; a reduction has one size", sizes=(0.1,))
    refused(
        replace(reduction, values=replace(reduction.values, kind="zero")),
        "ablation='mean' needs values",
        ablation="mean",
    )
    refused(reduction, "bootstrap is -2", bootstrap=-2)
    refused(reduction, "level is 0; it lies between", level=0)
    refused(reduction, "metric gave shape", metric=lambda logits, batch: logits)
    alone = examples(1)
    alone = replace(alone, counterfactual_tokens=None, counterfactual_labels=None)
    with pytest.raises(ValueError, match="examples holds one, and no counterfactual_tokens"):
        evaluate(bridge(), reduction, alone, ablation="counterfactual")


# Against known truth


@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.integers(1, 2**12 - 2))
@settings(max_examples=50)
def test_areas_are_those_of_scikit_learn(numbers: list[int], bits: int):
    units = Units((Site("neuron", 0, "hook_hidden", 12),))
    truth = Circuit(units, torch.tensor([bool(bits >> i & 1) for i in range(12)]))
    scores = torch.tensor(numbers, dtype=torch.float64)
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth.mask, scores), abs=1e-12)
    assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth.mask, scores), abs=1e-12)


def test_without_true_or_without_other_units_there_is_no_area():
    units = Units((Site("neuron", 0, "hook_hidden", 3),))
    assert math.isnan(auroc(torch.ones(3), Circuit.empty(units)))
    assert math.isnan(auroc(torch.ones(3), Circuit.full(units)))
    assert math.isnan(average_precision(torch.ones(3), Circuit.empty(units)))
    with pytest.raises(ValueError, match="4 numbers for 3 units"):
        auroc(torch.ones(4), Circuit.full(units))
