"""Gradients, integrated gradients and exact effects, against slow references with hooks of the test's own, in float64,
for every kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.kinds import KINDS, N, close, data, padded
from helpers.models import (
    TwoLayers,
    bridge,
    examples,
    fresh,
    inputs,
    linear,
    reduction_of,
    seeded,
    unchanged,
    unchecked,
    units_of,
)
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import attribution_patch

from tl_sparsify import constants, score
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, run_values
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import risk
from tl_sparsify.core.metrics import correct, log_odds, log_probability
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, mlps, neurons
from tl_sparsify.search.scores import Scores

ALL = pytest.mark.parametrize("kind", KINDS)


def constants_of(model: Any, units: Units) -> Values:
    """Random constants of the right widths."""
    zero = constants.zero(model, data(), units.for_examples(torch.arange(1)))
    return Values(units, tuple(torch.randn(v.shape, generator=seeded(3), dtype=v.dtype) for v in zero.tensors))


def softened(model: Any, batch: Examples, units: Units, values: Values, keep: Tensor) -> Tensor:
    """The logits with each unit at ``c + keep (v - c)``, ``keep`` of shape ``[batch, units]``; from nothing but
    ``model.hooks``, unit by unit."""
    hooks: list[Any] = []
    for site, part, value in zip(units.sites, units.slices, values.tensors, strict=True):
        where = site.position_mask(len(batch), 5)
        mask = torch.ones(len(batch), 5) if where is None else where.expand(len(batch), 5)

        def hook(x: Tensor, hook: Any, site: Site, part: slice, c: Tensor, mask: Tensor) -> Tensor:
            old = x
            for u in range(site.size):
                removed = (1 - keep[:, part][:, u])[:, None] * mask
                if site.kind == "head":
                    change = torch.zeros_like(x)
                    change[:, :, u] = c[..., u, :] - old[:, :, u]
                    x = x + removed[:, :, None, None] * change
                elif site.kind == "neuron":
                    change = torch.zeros_like(x)
                    change[:, :, u] = c[..., u, 0] - old[:, :, u]
                    x = x + removed[:, :, None] * change
                elif site.basis is not None:
                    coordinate = old @ torch.linalg.pinv(site.basis)[u]
                    x = x + (removed * (c[..., u, 0] - coordinate))[:, :, None] * site.basis[:, u]
                else:
                    x = x + removed[:, :, None] * (c[..., 0, :] - old)
            return x

        for number, name in enumerate(site.hook_names):
            c = value[..., number : number + 1] if site.also else value
            hooks.append((name, lambda x, hook, f=hook, s=site, p=part, c=c, m=mask: f(x, hook, s, p, c, m)))
    with model.hooks(fwd_hooks=hooks):
        return answer_logits(model, batch)


def per_example(rows: Tensor) -> Tensor:
    """The mean over an example's two answers."""
    return rows.view(-1, 2).mean(1)


def check(found: Scores, effects: Tensor, relative: float = 1e-9) -> None:
    """Mean and standard error of effects ``[n, units]``."""
    assert effects.abs().max() > 1e-4
    assert close(found.scores, effects.mean(0), relative)
    assert close(found.stderr, effects.std(0) / len(effects) ** 0.5, relative)


def slopes(model: Any, batch: Examples, units: Units, values: Values, level: float) -> Tensor:
    keep = torch.full((len(batch), len(units)), level, dtype=torch.float64).requires_grad_()
    rows = log_odds(softened(model, batch, units, values, keep), batch)
    return torch.autograd.grad(per_example(rows).sum(), keep)[0]


# Gradients


@ALL
def test_the_gradient_is_the_derivative_of_the_metric_along_the_removal(kind: str):
    model, batch = bridge(), data()
    units = KINDS[kind](model)
    values = constants_of(model, units)
    with unchanged(model):
        found = score.gradient(model, batch, units, values=values)
    check(found, slopes(model, batch, units, values, 1.0))
    assert (found.name, found.forward_passes, found.backward_passes) == ("gradient", 1, 1)


@ALL
def test_integrated_is_the_average_derivative_along_the_line(kind: str):
    model, batch = bridge(), data()
    units = KINDS[kind](model)
    values = constants_of(model, units)
    with unchanged(model):
        found = score.integrated(model, batch, units, steps=3, values=values)
    check(found, torch.stack([slopes(model, batch, units, values, level) for level in (1 / 6, 0.5, 5 / 6)]).mean(0))
    assert (found.name, found.forward_passes, found.backward_passes) == ("integrated", 3, 3)


def test_means_are_the_default_and_cost_a_pass():
    model, batch = bridge(), padded()
    units = units_of(model)
    means = constants.mean(model, batch, units)
    for scorer, passes in ((score.gradient, 1), (score.integrated, 5), (score.exact, len(units) + 1)):
        assert torch.equal(scorer(model, batch, units).scores, scorer(model, batch, units, values=means).scores)
        assert scorer(model, batch, units, values=means).forward_passes == passes
        assert scorer(model, batch, units).forward_passes == passes + 1


@pytest.mark.parametrize("source", ["counterfactual", "shuffled"])
def test_another_run_is_a_source(source: Any):
    model, batch = bridge(), data()
    units = heads(model) + neurons(model).at(3)
    other = replace(batch, tokens=batch.counterfactual_tokens)
    if source == "shuffled":  # every example's partner is another one, and the same one for every batch size
        alone = score.gradient(model, batch, units, source=source, seed=2, batch_size=1)
        assert close(score.gradient(model, batch, units, source=source, seed=2).scores, alone.scores)
        assert not close(score.gradient(model, batch, units, source=source, seed=3).scores, alone.scores, 1e-3)
        return
    values = run_values(model, other, units)
    check(score.gradient(model, batch, units, source=source), slopes(model, batch, units, values, 1.0))
    found = score.integrated(model, batch, units, source=source, steps=2)
    check(found, (slopes(model, batch, units, values, 0.25) + slopes(model, batch, units, values, 0.75)) / 2)
    assert found.forward_passes == 3
    check(score.exact(model, batch, units, source=source), brute(model, batch, units, values))


@pytest.mark.parametrize("at", [None, 2])
def test_law_7_the_gradient_is_minus_transformer_lens_s_node_attribution(at: int | None):
    model, batch = bridge(), examples(4)
    units = heads(model) + mlps(model)
    units = units if at is None else units.at(at)

    def metric(logits: Tensor) -> Tensor:  # of the one example whose tokens these are
        number = next(metric_calls)
        return log_odds(logits[:, -1], batch[number : number + 1])[0]

    calls = [i for i in range(4) for _ in range(2)]  # each pair: the clean run, then the corrupt one
    metric_calls = iter(calls)
    theirs = attribution_patch(model, batch.counterfactual_tokens, batch.tokens, metric).node_scores  # type: ignore[arg-type]
    ours = score.gradient(model, batch, units, source="counterfactual")
    for unit, found in zip(units, ours.scores.tolist(), strict=True):
        kind = {"head": "attn_head_out", "mlp": "mlp_out"}[unit.site.kind]
        expected = sum(
            value
            for node, value in theirs.items()
            if (node.kind, node.layer) == (kind, unit.site.layer)
            and node.head in (None, unit.index)
            and at in (None, node.position)
        )
        assert found == pytest.approx(-expected, rel=1e-9)


# Linear models, and completeness


def difference(logits: Tensor, batch: Examples) -> Tensor:
    return logits[:, 0] - 2 * logits[:, 1] + 0.5 * logits[:, 2]


@pytest.mark.parametrize("source", ["constant", "counterfactual"])
def test_law_7_exact_is_the_gradient_on_a_linear_model(source: Any):
    model, batch = linear(), inputs()
    other = torch.randn(12, 4, generator=seeded(6), dtype=torch.float64)
    batch = replace(batch, counterfactual_tokens=other)
    given: dict[str, Any] = {"source": source, "metric": difference}
    if source == "constant":
        given["values"] = reduction_of(model, units=model.units).values
    exact = score.exact(model, batch, model.units, **given)
    assert exact.scores.abs().min() > 1e-3
    for scorer in (score.gradient, score.integrated):
        found = scorer(model, batch, model.units, **given)
        assert close(found.scores, exact.scores) and close(found.stderr, exact.stderr)


def all_removed(model: Any, batch: Examples, units: Units, values: Values, metric: Any = log_odds) -> float:
    with torch.no_grad():
        with intervened(model, ablate(Reduction(Circuit.empty(units), values))):
            removed = metric(answer_logits(model, batch), batch)
        return float((metric(answer_logits(model, batch), batch) - removed).mean())


@pytest.mark.parametrize("steps", [1, 4])
def test_integrated_is_complete_on_a_linear_model(steps: int):
    model, batch = linear(), inputs()
    values = reduction_of(model, units=model.units).values
    found = score.integrated(model, batch, model.units, steps=steps, values=values, metric=difference)
    expected = all_removed(model, batch, model.units, values, difference)
    assert float(found.scores.sum()) == pytest.approx(expected, rel=1e-10)


def test_integrated_tends_to_completeness_as_steps_grow():
    model, batch = bridge(act_fn="gelu"), data()
    units = heads(model) + neurons(model)
    values = constants_of(model, units)
    expected = all_removed(model, batch, units, values)
    errors = [
        abs(float(score.integrated(model, batch, units, steps=steps, values=values).scores.sum()) - expected)
        for steps in (4, 16, 64)
    ]
    assert errors[1] < errors[0] / 6 and errors[2] < errors[1] / 12  # a midpoint rule: a sixteenth each time
    assert errors[2] < 1e-3 * abs(expected)
    gradient = float(score.gradient(model, batch, units, values=values).scores.sum())
    assert abs(gradient - expected) > 20 * errors[2]  # which the clean run's gradient alone is not


# Exact effects


def brute(model: Any, batch: Examples, units: Units, values: Values, metric: Any = None) -> Tensor:
    """One unit after the other, one example after the other."""
    effects = torch.zeros(len(batch), len(units), dtype=torch.float64)
    with torch.no_grad():
        for u in range(len(units)):
            keep = torch.ones(len(batch), len(units), dtype=torch.float64)
            keep[:, u] = 0
            original, removed = answer_logits(model, batch), softened(model, batch, units, values, keep)
            if metric is None:
                p, q = original.log_softmax(1), removed.log_softmax(1)
                effects[:, u] = per_example((p.exp() * (p - q)).sum(1))
            else:
                effects[:, u] = per_example(metric(original, batch) - metric(removed, batch))
    return effects


@ALL
@pytest.mark.parametrize("metric", [None, log_probability], ids=["KL", "metric"])
def test_exact_is_the_effect_of_removing_each_unit(kind: str, metric: Any):
    model, batch = bridge(), data(choices=(1, 4, 6) if metric is None else None)
    units = KINDS[kind](model)
    values = constants_of(model, units)
    with unchanged(model):
        found = score.exact(model, batch, units, values=values, metric=metric)
    check(found, brute(model, batch, units, values, metric))
    assert (found.forward_passes, found.backward_passes) == (len(units) + 1, 0)
    assert found.measured_in == ("nats" if metric is None else "units of the metric")


def test_exact_is_the_measured_risk_of_each_removal():
    model, batch = bridge(), padded()
    units = units_of(model)
    values = constants.mean(model, batch, units)
    found = score.exact(model, batch, units, progress=False)
    for name, effect, stderr in zip(units.names, found.scores.tolist(), found.stderr.tolist(), strict=True):
        measured = risk(model, Reduction(~Circuit.of(units, [name]), values), batch)
        assert (effect, stderr) == pytest.approx((measured.mean, measured.stderr), rel=1e-9)


def test_exact_removes_several_units_in_one_pass():
    model, batch = fresh(), data()
    units, passes = units_of(model), []
    model.add_hook("blocks.0.mlp.hook_post", lambda value, hook: passes.append(len(value)))
    values = reduction_of(model).values
    score.exact(model, batch, units, values=values)
    assert passes == [N, N * len(units)]
    passes.clear()
    score.exact(model, batch, units, values=values, batch_size=4 * N + 1)
    assert passes == [N, *[4 * N] * 3, 2 * N]  # 14 units, four at a time


@pytest.mark.parametrize("source, given, more", [("constant", False, 1), ("constant", True, 1), ("shuffled", False, 2)])
def test_means_that_replace_units_and_are_intervened_with_are_taken_once(source: Any, given: bool, more: int):
    model, batch = bridge(), data()
    units = units_of(model)
    values = constants.mean(model, batch, units)
    drawn = {"interventions": InterventionDistribution.mean(0.5), "source": source, "progress": False}
    with counted(model) as passes:
        found = score.exact(model, batch, units, values=values if given else None, **drawn)
    assert passes["forward"] == found.forward_passes * len(batch) == (len(units) + 1 + more) * len(batch)
    if source == "constant":
        assert close(found.scores, score.exact(model, batch, units, values=values, **drawn).scores)


@pytest.mark.parametrize("metric", [correct, log_odds])
def test_signs_say_what_removal_does(metric: Any):
    """Unit 0 makes the right answer likelier, unit 1 less likely."""
    w_out = torch.tensor([[1.0, 0.0], [-0.5, 0.0]], dtype=torch.float64)
    model = TwoLayers(torch.eye(2, dtype=torch.float64), w_out)
    batch = Examples(torch.tensor([[1.0, 1.0], [2.0, 1.0]], dtype=torch.float64), torch.zeros(2, 1, dtype=torch.long))
    zero = Values(model.units, (torch.zeros(2, 1, dtype=torch.float64),))
    given: dict[str, Any] = {"values": zero, "metric": metric}
    exact = score.exact(model, batch, model.units, **given)
    if metric is correct:
        assert exact.scores.tolist() == [1.0, 0.0] and exact.stderr.tolist() == [0.0, 0.0]
        return
    assert exact.scores.tolist() == pytest.approx([1.5, -0.5])
    assert score.gradient(model, batch, model.units, **given).scores.tolist() == pytest.approx([1.5, -0.5])


# Errors


@pytest.mark.parametrize("scorer", [score.gradient, score.integrated, score.exact])
def test_wrong_replacements_are_refused(scorer: Callable[..., Scores]):
    model, batch = bridge(), data()
    units = units_of(model)
    values = constants.mean(model, batch, units)
    with pytest.raises(ValueError, match="source is 'corrupt'; it is constant, counterfactual or shuffled"):
        with unchecked():
            scorer(model, batch, units, source="corrupt")
    with pytest.raises(ValueError, match="values are given, and source is 'shuffled'"):
        scorer(model, batch, units, source="shuffled", values=values)
    with pytest.raises(ValueError, match=r"values are for .*4 heads"):
        scorer(model, batch, units, values=constants.mean(model, batch, heads(model)))
    with pytest.raises(ValueError, match="values vary by example"):
        scorer(model, batch, units, values=run_values(model, batch, units))
    with pytest.raises(ValueError, match="no counterfactual_tokens"):
        scorer(model, replace(batch, counterfactual_tokens=None), units, source="counterfactual")
    with pytest.raises(ValueError, match=r"metric gave shape \(\) for"):
        with unchecked():
            scorer(model, batch, units, metric=lambda logits, batch: logits.sum())
    with pytest.raises(ValueError, match="batch_size is 0"):
        scorer(model, batch, units, batch_size=0)


def test_wrong_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        score.integrated(bridge(), data(), units_of(bridge()), steps=0)
