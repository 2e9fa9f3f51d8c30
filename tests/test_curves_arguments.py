"""A curve's sizes, table and passes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.curves import ASKED, KEPT, MEASURES, data, random_scores, scores_of
from helpers.models import bridge, fresh, random_values, unchanged, unchecked, units_of
from torch import Tensor

from tl_sparsify import Circuit, CircuitPath, Examples, Values, constants, evaluate
from tl_sparsify import fingerprint as fingerprint_of
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.units import heads
from tl_sparsify.search.path import Round


def test_each_pass_is_counted():
    """Two passes and one for each size below 1, one more for the counterfactual run."""
    model, batch, calls = fresh(), data(), []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return forward(*args, **kwargs)

    model.forward = counted
    for kind, passes in (("counterfactual", 3), ("mean", 2)):
        calls.clear()
        values = random_values(units_of(model)) if kind == "mean" else None
        evaluate(model, random_scores(), batch, ablation=kind, values=values, sizes=ASKED, batch_size=4)
        assert sum(calls) == (passes + len(ASKED) - 1) * len(batch)


def test_units_that_do_nothing_have_no_faithfulness():
    model = fresh()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.out.original_component.weight.zero_()
    units = units_of(model)
    silent = type(units)(tuple(site for site in units.sites if site.kind == "neuron"))
    scores = scores_of(torch.arange(10).double(), silent)
    found = evaluate(model, scores, data(), ablation="zero", sizes=(0.5, 1.0), bootstrap=10)
    assert all(math.isnan(f) for f in (*found.faithfulness, found.cpr, found.cmd, *found.cpr_interval))
    assert found.risk == (0, 0) and found.intervals["risk"] == ((0, 0), (0, 0))


def test_to_frame_has_one_row_a_size():
    found = evaluate(bridge(), random_scores(), data(), ablation="zero", sizes=ASKED, bootstrap=10)
    frame = found.to_frame()
    expected = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")]
    assert list(frame.columns) == ["kept", "fraction", "ablation", *expected]
    assert frame.kept.tolist() == list(KEPT) and set(frame.ablation) == {"zero"}
    assert frame.risk.tolist() == list(found.risk) and frame.metric_high[2] == found.intervals["metric"][2][1]
    assert (frame.risk_low <= frame.risk_high).all()
    text = repr(found)
    assert text.startswith("Curve(6 sizes from 1 to 14 units, zero: CPR ") and "\n" not in text


# Errors


def refused(model: Any, what: Any, batch: Examples, match: str, **settings: Any) -> None:
    with unchanged(model), unchecked(), pytest.raises(ValueError, match=match):
        evaluate(model, what, batch, **settings)


def test_ablations_that_are_not_there_are_refused():
    model, scores, batch = bridge(), random_scores(), data()
    values = random_values(scores.units)
    refused(model, scores, batch, "scores carry no replacements: name the ablation")
    refused(model, scores, batch, "ablation='mean' needs values", ablation="mean")
    refused(model, scores, batch, "ablation is 'resample'; it is mean, zero or counterfactual", ablation="resample")
    refused(model, scores, batch, "values are given, and ablation is 'zero'", ablation="zero", values=values)
    other = random_values(heads(model))
    refused(model, scores, batch, r"needs a constant for each of Units\(14", ablation="mean", values=other)
    varying = Values(values.units, tuple(v.expand(10, 5, *v.shape) for v in values.tensors))
    refused(model, scores, batch, "needs a constant for each", ablation="mean", values=varying)
    alone = data(1, paired=False)
    refused(model, scores, alone, "examples holds one, and no counterfactual_tokens", ablation="counterfactual")


def test_sizes_and_bootstraps_that_are_not_there_are_refused():
    model, scores, batch = bridge(), random_scores(), data()
    refused(model, scores, batch, r"sizes is 0\.0; it must lie in", ablation="zero", sizes=(0.0, 0.5))
    refused(model, scores, batch, "sizes is empty", ablation="zero", sizes=())
    refused(model, scores, batch, "bootstrap is -1; give the number", ablation="zero", bootstrap=-1)
    refused(model, scores, batch, r"level is 1\.0; it lies between 0 and 1", ablation="zero", level=1.0)
    refused(model, scores, batch, "minimality is that of one circuit", ablation="zero", minimality=True)
    refused(model, Circuit.full(scores.units), batch, "reduction is a Circuit: give a Reduction")


def test_a_metric_of_another_shape_is_refused():
    refused(bridge(), random_scores(), data(), "metric gave shape", ablation="zero", metric=lambda z, batch: z)


def path_of(*values: Values, kind: str = "mean") -> CircuitPath:
    """Circuits of half and of all units, with constants of their own."""
    model = bridge()
    nothing = Estimate(0.0, 0.0, 1)
    rounds = []
    for kept, part in zip((14, 7), values, strict=True):
        circuit = Circuit(part.units, torch.arange(14) >= 14 - kept)
        reduction = constants.reduced(model, circuit, part, kind)
        rounds.append(Round(reduction, nothing, nothing, 0.0))
    return CircuitPath(values[0].units, torch.arange(14), tuple(rounds))


def test_paths_that_do_not_fit_are_refused():
    model, batch = bridge(), data()
    one, two = (random_values(units_of(model), seed) for seed in (0, 1))
    refused(model, path_of(one, two), batch, "several baselines")
    refused(model, path_of(one, two), batch, "several baselines", ablation="mean")
    assert evaluate(model, path_of(one, two), batch, ablation="mean", values=one).kept == (1, 3, 7, 14)
    refused(model, path_of(one, one), batch, "values are given, and no ablation", values=one)
    refused(model, path_of(one, one, kind="zero"), batch, "ablation='mean' needs values", ablation="mean")
    stranger = fresh(seed=5)
    assert fingerprint_of(stranger) != fingerprint_of(model)
    refused(stranger, path_of(one, one), batch, "reduction was made for the model")
    stranger.train()
    with unchecked(), pytest.raises(ValueError, match="training mode"):
        evaluate(stranger, random_scores(), batch, ablation="zero")


def test_the_model_is_left_as_it_came_when_a_pass_fails():
    model = bridge()
    calls: list[int] = []

    def metric(logits: Tensor, batch: Examples) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("stop")
        return logits[:, 0]

    with unchanged(model), pytest.raises(RuntimeError, match="stop"):
        evaluate(model, random_scores(), data(), ablation="counterfactual", metric=metric)
