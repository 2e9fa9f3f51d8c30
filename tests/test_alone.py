"""Risk and means from one pass are those of two."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, exclusive_or, exclusive_or_inputs, inputs, linear, units_of
from torch import Tensor

from tl_sparsify import constants, score
from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.metrics import log_odds
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units, attentions, heads, mlps, neurons
from tl_sparsify.search.alone import alone
from tl_sparsify.tasks.task import load_task

SIZES = [1, 5, 12]


def every_kind(model: Any) -> Units:
    basis = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    units = units_of(model) + mlps(model) + attentions(model)
    return units + directions(model, "blocks.1.hook_resid_pre", basis) + stream_directions(model, basis)


def by_hand(model: Any, data: Any, values: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the examples, from the effects of every one."""
    reduction = Reduction(Circuit.full(values.units), values)
    [found] = samples(model, data, reduction, batch_size=len(data), **settings)
    each = found.effects.double().square().sum(0) / 2
    return each.mean(0), each.std(0) / len(data) ** 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, {"probes": 2, "temperature": 3.0}, {"metric": log_odds}, {"seed": 4}])
def test_one_pass_gives_what_two_give(size: int, settings: dict[str, Any]):
    model, data = bridge(), examples(12, answers=2)
    units = every_kind(model)
    values = constants.mean(model, data, units)
    mean, stderr = by_hand(model, data, values, **settings)
    passes: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: passes.append(len(value)))]):
        found = score.risk(model, data, units, batch_size=size, **settings)
    assert sum(passes) == 12 and found.forward_passes == 1
    torch.testing.assert_close(found.scores, mean, rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [True, False])
def test_batches_with_other_numbers_of_answers(size: int, first: bool):
    model, data = bridge(), examples(12, answers=2, choices=(1, 4, 7))
    single = torch.arange(12) < 5 if first else torch.arange(12) >= 5  # two probes for these, four for the others
    data = replace(data, labels=data.labels.masked_fill(single[:, None] & (torch.arange(5) == 3), -100))
    mean, stderr = by_hand(model, data, constants.mean(model, data, every_kind(model)))
    found = score.risk(model, data, every_kind(model), batch_size=size)
    torch.testing.assert_close(found.scores, mean, rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("where", [2, -1, slice(1, 4), torch.arange(12) % 5])
def test_units_at_positions(size: int, where: Any):
    model, data = bridge(), examples(12)
    units = heads(model).at(where) + neurons(model).at(where) + mlps(model)
    mean, stderr = by_hand(model, data, constants.mean(model, data, units))
    found = score.risk(model, data, units, batch_size=size)
    torch.testing.assert_close(found.scores, mean, rtol=1e-9, atol=1e-16)
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_means_are_the_means(size: int):
    model, data = bridge(), examples(12)
    units = every_kind(model)
    settings = {"probes": 2, "temperature": 1.0, "metric": None, "seed": 0}
    values, _, probes = alone(model, data, units, batch_size=size, **settings)
    assert probes == 2 and values.kind == "mean"
    for one, other in zip(values.tensors, constants.mean(model, data, units).tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_models_without_positions():
    model, data = linear(), inputs()
    mean, stderr = by_hand(model, data, constants.mean(model, data, model.units))
    found = score.risk(model, data, model.units, batch_size=5)
    torch.testing.assert_close(found.scores, mean, rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-9, atol=1e-14)


def test_units_that_are_constant_or_dead_have_no_risk_and_no_error():
    model = exclusive_or()
    found = score.risk(model, exclusive_or_inputs(), model.units, batch_size=7)
    assert found.scores[[2, 3, 7]].abs().max() <= 1e-25 and found.stderr[[2, 3, 7]].abs().max() <= 1e-20


@pytest.mark.parametrize("size", [3, 8])
def test_a_beginning_of_sequence_token_is_left_alone_as_in_a_reduction(size: int):
    task = load_task("ioi")
    model, train = task.model(), task.examples(0)[0]
    assert train.attention_mask is not None
    data = train[train.attention_mask.bool().all(1)][:8]  # the first positions are input in all of them
    stream = directions(model, "blocks.1.hook_resid_pre", torch.eye(192)[:, :64])
    units = heads(model) + neurons(model).at(slice(0, 6)) + stream
    first = first_tokens(model, data.tokens, data.attention_mask, "bos")
    assert first is not None and first.sum() == 8
    values = constants.mean(model, data, units)
    mean, stderr = by_hand(model, data, values)
    found = score.risk(model, data, units, batch_size=size)
    assert found.forward_passes == 1
    torch.testing.assert_close(found.scores, mean, rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(found.stderr, stderr, rtol=2e-5, atol=1e-12)
    [everywhere] = samples(model, data, Reduction(Circuit.full(units), values, first_token="none"), batch_size=8)
    other = everywhere.effects.double().square().sum(0).mean(0) / 2
    assert ((other - mean).abs() > 0.01 * mean).double().mean() > 0.5  # the rule makes a difference here


def test_where_wide_units_do_not_fit_the_means_take_a_pass(monkeypatch: pytest.MonkeyPatch):
    model, data = bridge(), examples(12)
    units = heads(model) + neurons(model)
    before = score.risk(model, data, units, batch_size=5)
    monkeypatch.setattr(score, "alone", partial(alone, room=100))
    passes: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: passes.append(len(value)))]):
        found = score.risk(model, data, units, batch_size=5)
    assert sum(passes) == 24 and found.forward_passes == 2
    torch.testing.assert_close(found.scores, before.scores, rtol=1e-9, atol=1e-16)
    assert score.risk(model, data, units, batch_size=12).forward_passes == 1  # one batch keeps nothing
    assert score.risk(model, data, neurons(model), batch_size=5).forward_passes == 1


@pytest.mark.parametrize("wrong, says", [({"probes": 0}, "probes is 0"), ({"temperature": 0.0}, "temperature is 0")])
def test_wrong_settings_are_refused(wrong: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        score.risk(bridge(), examples(3), neurons(bridge()), **wrong)
