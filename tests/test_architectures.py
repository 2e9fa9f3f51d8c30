"""Scores, effects and risk on every architecture of the Hugging Face configs: grouped-query attention, gated MLPs,
parallel blocks, post-norms; with padding on either side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, batch, bridge, padded
from helpers.models import NoCasts, fisher, softened

from tl_sparsify import constants, score
from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.measure import risk
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units, heads, mlps, neurons
from tl_sparsify.expansion.linearisation import joint_moments
from tl_sparsify.search.joint import sparsify


def every_kind(model: Any) -> Units:
    generator = torch.Generator().manual_seed(1)
    width = model.W_E.shape[1]
    basis = torch.linalg.qr(torch.randn(width, 2, generator=generator, dtype=torch.float64))[0]
    hook = f"blocks.{len(model.blocks) - 1}.hook_resid_pre"
    return (
        heads(model) + neurons(model) + mlps(model) + directions(model, hook, basis) + stream_directions(model, basis)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_effects_are_the_derivatives_of_the_logits(name: str):
    model, examples = bridge(name), batch(n=2)  # built before: other tests share it
    with NoCasts():
        units = every_kind(model)
        values = constants.mean(model, examples, units)
        removal = Reduction(Circuit.full(units), values)
        [found] = samples(model, examples, removal, probes=2)
        for i in range(2):
            one = examples[i : i + 1]
            keep = torch.ones(len(units), dtype=torch.float64)
            change = -torch.autograd.functional.jacobian(
                lambda k, one=one: softened(model, one, removal, k, None)[0], keep
            )
            logits = answer_logits(model, one)[0].detach()
            expected = torch.einsum("cu,cd,dw->uw", change, fisher(logits), change)
            effects = found.effects[:, i]
            close = (effects.T @ effects - expected).abs().max() <= 1e-7 * expected.abs().max()
            assert bool(close)


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_effects_are_measured_risks(name: str):
    model, examples = bridge(name), batch()
    units = heads(model) + mlps(model)
    values = constants.mean(model, examples, units)
    found = score.exact(model, examples, units, values=values)
    for number, unit in enumerate(units.names):
        alone = risk(model, constants.reduced(model, ~Circuit.of(units, [unit]), values), examples)
        assert float(found.scores[number]) == pytest.approx(alone.mean, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_has_no_effect(name: str, side: str):
    model, plain = bridge(name), batch()
    with NoCasts():
        units = heads(model) + neurons(model)
        values = constants.mean(model, plain, units)
        other = padded(plain, side)
        again = constants.mean(model, other, units)
        for a, b in zip(values.tensors, again.tensors, strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
        before = score.risk(model, plain, units, values=values)
        after = score.risk(model, other, units, values=values)
        assert torch.allclose(before.scores, after.scores, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_search_runs_and_its_predictions_start_from_what_was_measured(name: str):
    model, examples = bridge(name), batch(n=8)
    units = heads(model) + neurons(model)
    path = sparsify(model, examples, units, rounds=3, progress=False)
    last = path.rounds[-1].reduction
    nothing = torch.zeros(len(units), dtype=torch.bool)
    predicted = joint_moments(samples(model, examples, last, current=last), nothing)
    assert float(predicted.mean) == pytest.approx(path.rounds[-1].measured.mean, rel=1e-9)
    assert sorted(path.order.tolist()) == list(range(len(units)))


def test_a_hook_point_that_an_architecture_lacks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_mid"):
        directions(bridge("Pythia"), "blocks.0.hook_resid_mid", torch.eye(24)[:, :2])
