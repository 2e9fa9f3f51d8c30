"""Constants against means and losses computed by hand, and what a refit promises."""

from __future__ import annotations

from dataclasses import replace
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
    random_values,
    reduction_of,
    seeded,
    unchanged,
    units_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify import constants
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core import measure
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import computed, risk
from tl_sparsify.core.metrics import log_odds
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.units import attentions, mlps, neurons

SEEDS = st.integers(0, 2**31)
CHOICES = (1, 4, 7, 8)


def cached(model: Any, data: Examples, hook: str) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_cache(data.tokens)[1][hook]


def refit(reduction: Reduction, **changes: Any) -> Reduction:
    given: dict[str, Any] = {"steps": 20, "progress": False}
    return constants.refit(bridge(), reduction, train(), validation(), **given | changes)


def train() -> Examples:
    return examples(16, 1, choices=CHOICES)


def validation() -> Examples:
    return examples(12, 2, choices=CHOICES)


def mean_ablation(seed: int = 2) -> Reduction:
    model = bridge()
    units = units_of(model)
    return constants.reduced(model, Circuit(units, random_mask(units, seed)), constants.mean(model, train(), units))


# Means


def test_means_are_over_examples_and_positions():
    model, data = bridge(), examples(7)
    found = constants.mean(model, data, units_of(model) + mlps(model) + attentions(model))
    for site, value in zip(found.units.sites, found.tensors, strict=True):
        expected = cached(model, data, site.hook).flatten(0, 1).mean(0).reshape(value.shape)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_moments_of_units_are_their_spread():
    model, data = bridge(), examples(7)
    *_, found = constants.unit_moments(model, data, neurons(model), batch_size=3)
    values = cached(model, data, "blocks.1.mlp.hook_post").flatten(0, 1)
    torch.testing.assert_close(found.variance[:, 0], values.var(0, correction=0))
    assert (found.count == 35).all()


def test_means_of_units_at_positions_are_taken_there():
    model, data = bridge(), examples(6)
    z = cached(model, data, "blocks.1.mlp.hook_post")
    each = torch.tensor([0, 4, 2, 2, 1, 3])
    for where, expected in [
        (1, z[:, 1].mean(0)),
        ((0, 4), z[:, [0, 4]].mean((0, 1))),
        (slice(2, None), z[:, 2:].mean((0, 1))),
        (each, z[torch.arange(6), each].mean(0)),
    ]:
        found = constants.mean(model, data, neurons(model).at(where), batch_size=4)
        torch.testing.assert_close(found.tensors[1][:, 0], expected)


def test_padding_is_left_out_of_the_means():
    model, data = bridge(), examples(4)
    mask = torch.rand(4, 5, generator=seeded(0)) < 0.6
    mask[:, -1] = True
    padded = Examples(data.tokens, data.labels, mask)
    with torch.no_grad():
        _, cache = model.run_with_cache(data.tokens, attention_mask=mask.long())
    expected = cache["blocks.0.mlp.hook_post"][mask].mean(0)
    torch.testing.assert_close(constants.mean(model, padded, neurons(model)).tensors[0][:, 0], expected)


def test_constants_have_the_models_precision_and_zeros_the_same_shape():
    for dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        model = bridge(dtype=dtype)
        units = units_of(model)
        mean, zero = constants.mean(model, examples(3), units), constants.zero(model, examples(3), units)
        assert {tensor.dtype for tensor in (*mean.tensors, *zero.tensors)} == {expected}
        assert [t.shape for t in mean.tensors] == [t.shape for t in zero.tensors]
        assert not any(tensor.any() for tensor in zero.tensors)


def test_a_reduction_of_ones_own_circuit_is_bound_to_the_model():
    model = bridge()
    units = units_of(model)
    found = constants.reduced(model, Circuit.of(units, ["L0H1"]), random_values(units), "mine")
    assert (found.circuit.names, found.kind, found.fingerprint) == (("L0H1",), "mine", fingerprint(model))


# Refit


@given(SEEDS, st.floats(0.01, 30))
@settings(max_examples=6)
def test_a_refit_is_never_worse_on_validation(seed: int, learning_rate: float):
    units = units_of(bridge())
    reduction = Reduction(Circuit(units, random_mask(units, seed)), random_values(units, seed))
    found = refit(reduction, steps=4, learning_rate=learning_rate, seed=seed)
    assert risk(bridge(), found, validation()).mean <= risk(bridge(), reduction, validation()).mean


def test_a_refit_lowers_the_risk_of_means_on_new_examples():
    reduction, test = mean_ablation(), examples(40, 3, choices=CHOICES)
    found = refit(reduction, steps=40)
    assert risk(bridge(), found, validation()).mean < 0.8 * risk(bridge(), reduction, validation()).mean
    assert risk(bridge(), found, test).mean < risk(bridge(), reduction, test).mean


def test_a_refit_finds_the_best_constant_of_a_linear_model():
    model, data = linear(), inputs(20)
    start = Reduction(Circuit.of(model.units, model.units.names[1:]), random_values(model.units))

    def first(logits: torch.Tensor, batch: Examples) -> torch.Tensor:
        return logits[:, 0]

    found = constants.refit(model, start, data, data, steps=200, metric=first, progress=False)
    best = constants.mean(model, data, model.units)  # for a quadratic divergence
    torch.testing.assert_close(found.values.tensors[0][0], best.tensors[0][0], rtol=0.01, atol=0.01)


def test_a_refit_moves_removed_units_only_and_keeps_the_baseline():
    reduction = mean_ablation()
    found = refit(reduction, steps=3, learning_rate=0.5)
    masks = reduction.units.split(reduction.circuit.mask)
    for new, old, kept in zip(found.values.tensors, reduction.values.tensors, masks, strict=True):
        assert torch.equal(new[kept], old[kept])
    assert found.values != reduction.values and found.circuit == reduction.circuit
    assert found.kind == "refit" and found.baseline == reduction.values
    again = refit(found, steps=3)
    assert again.baseline == reduction.values and again.fingerprint == reduction.fingerprint
    assert not any(tensor.requires_grad for tensor in found.values.tensors)


def test_a_refit_is_a_function_of_its_arguments():
    reduction = mean_ablation()
    found = [refit(reduction, steps=6, per_step=5, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


def test_with_everything_kept_there_is_nothing_to_fit():
    reduction = mean_ablation()
    full = reduction.with_circuit(Circuit.full(reduction.units))
    found = refit(full)
    assert found == replace(full, reference=full.values)


@pytest.mark.parametrize("width", [64, 3000])
def test_where_much_is_fitted_it_moves_less_in_proportion(width: int):
    model, data = bridge(d_mlp=width, act_fn="gelu"), examples(n=12)
    units = neurons(model)
    start = constants.reduced(model, Circuit.of(units, [units.names[0]]), constants.mean(model, data, units))
    varying = [cached(model, data, f"blocks.{layer}.mlp.hook_post").flatten(0, 1).std(0) > 0 for layer in (0, 1)]
    moving = int(torch.cat(varying)[1:].sum())
    rate = 0.05 * min(1, 4096 / moving)
    same: dict[str, Any] = {"steps": 10, "progress": False}
    by_itself = constants.refit(model, start, data, data, **same)
    told = constants.refit(model, start, data, data, learning_rate=rate, **same)
    assert (moving > 4096) == (width == 3000)
    for a, b in zip(by_itself.values.tensors, told.values.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not torch.equal(by_itself.values.tensors[0], start.values.tensors[0])


def test_a_refit_of_a_metric_lowers_its_error():
    reduction = mean_ablation()
    found = refit(reduction, metric=log_odds)
    before, after = (risk(bridge(), r, validation(), metric=log_odds).mean for r in (reduction, found))
    assert after < 0.9 * before


def test_units_at_positions_of_each_example_are_refitted():
    model, data = bridge(), train()
    units = neurons(model).at(torch.arange(16) % 5)
    reduction = constants.reduced(model, Circuit(units, random_mask(units, 1, 0.2)), random_values(units))
    found = constants.refit(model, reduction, data, data, steps=10, per_step=6, progress=False)
    assert risk(model, found, data).mean < risk(model, reduction, data).mean


# What is refused, and what is left behind


def test_fewer_than_one_step_is_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        refit(mean_ablation(), steps=0)


def test_the_model_leaves_as_it_came_in():
    model, data = fresh(), examples(6)
    model.embed.requires_grad_(False)
    reduction = reduction_of(model)
    with unchanged(model):
        constants.refit(model, reduction, data, data, steps=3, per_step=4, progress=False)
        constants.mean(model, data, units_of(model))
    calls = []

    def broken(logits: torch.Tensor, batch: Examples) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) == 5:  # in the first step
            raise RuntimeError("no more")
        return log_odds(logits, batch)

    with unchanged(model), pytest.raises(RuntimeError, match="no more"):
        constants.refit(model, reduction, data, data, steps=3, metric=broken, progress=False)
    assert len(calls) == 5


def test_a_refit_knows_the_originals_answers(monkeypatch: pytest.MonkeyPatch):
    settings: dict[str, Any] = {"steps": 8, "per_step": 5, "seed": 3}
    model, start = bridge(), mean_ablation()
    with counted(model) as passes:
        found = refit(start, **settings)
    n, v = len(train()), len(validation())
    # the deviations and the original's answers, a batch a step; on validation the answers, before, and after each step
    assert passes == {"forward": 2 * n + 8 * 5 + (1 + 1 + 8) * v, "backward": 8 * 5}
    monkeypatch.setattr(measure, "remembered", lambda *_, **__: None)
    monkeypatch.setattr(measure, "remembering", lambda: computed)
    again = refit(start, **settings)
    for mine, other in zip(found.values.tensors, again.values.tensors, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_zeros_of_units_that_are_placed_by_example_are_those_of_the_means():
    model, data = bridge(), examples(6)
    where = torch.tensor([0, 1, 2, 3, 1, 2])
    data = replace(data, spans={"there": torch.stack([where, where + 1], 1)})
    for units in (units_of(model).at(where), units_of(model).at("there")):
        zero, mean = constants.zero(model, data, units), constants.mean(model, data, units)
        assert zero.units == units and all(not v.any() for v in zero.tensors)
        assert [v.shape for v in zero.tensors] == [v.shape for v in mean.tensors]
