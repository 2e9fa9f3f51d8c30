"""The information bottleneck: its training against one number at a time, and against what is known to be needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, fresh, planted, unchanged, units_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import tl_sparsify as tls
from tl_sparsify._internal import random as _random
from tl_sparsify.masking.information_bottleneck import information, information_bottleneck


def by_one(model: Any, data: tls.Examples, units: tls.Units, *, steps: int, rate: float, beta: float) -> Tensor:
    """The logits after some steps over all examples: noise number by number, its prior and its divergence from it as
    distributions, autograd through everything."""
    hooks = [site.hook for site in units.sites]
    with torch.no_grad():
        original, cache = model.run_with_cache(data.tokens)
    clean = [cache[hook] if cache[hook].ndim == 4 else cache[hook][..., None] for hook in hooks]
    mu, sigma = [v.mean((0, 1)) for v in clean], [v.std((0, 1), correction=0) for v in clean]
    logits = torch.full((len(units),), 5.0, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in range(steps):
        gates, information, acts = units.split(logits.sigmoid()), [], []
        for number, (hook, gate, v) in enumerate(zip(hooks, gates, clean, strict=True)):
            noise = torch.empty_like(v)
            width = v.shape[3]
            for b, t, u, w in torch.cartesian_prod(*map(torch.arange, v.shape)).tolist():
                z = _random.normal(0, 101, step, number, b, t + 1, u * width + w)
                noise[b, t, u, w] = mu[number][u, w] + sigma[number][u, w] * z
            share, loose = gate[:, None], sigma[number].clamp_min(1e-300)
            given = Normal(mu[number] + share * (v - mu[number]), (1 - share) * loose)
            information.append(kl_divergence(given, Normal(mu[number], loose)).mean((0, 1, 3)))

            def act(activation: Tensor, hook: Any, noise: Tensor = noise, share: Tensor = share) -> Tensor:
                return share.view(share.shape if activation.ndim == 4 else -1) * activation + (
                    (1 - share) * noise
                ).reshape(activation.shape)

            acts.append((hook, act))
        answers = model.run_with_hooks(data.tokens, fwd_hooks=acts)
        total = beta * torch.cat(information).mean()
        for row, labels in enumerate(data.labels):
            for position in (labels != -100).nonzero().flatten():
                p, q = (part[row, position].log_softmax(0) for part in (original, answers))
                total = total + (p.exp() * (p - q)).sum() / len(data)
        adam.zero_grad()
        total.backward()
        adam.step()
        schedule.step()
    return logits.detach()


def test_training_is_that_of_its_definition():
    model, data = bridge(act_fn="gelu"), examples(3)
    units = units_of(model)
    expected = by_one(model, data, units, steps=3, rate=0.8, beta=2.0)
    found = information_bottleneck(model, data, units, steps=3, learning_rate=0.8, beta=2.0, batch_size=2)
    torch.testing.assert_close(found.scores, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(st.lists(st.floats(-30, 12), min_size=1, max_size=5))
def test_information_is_the_divergence_from_the_prior_on_average(some: list[float]):
    """Over values of mean 0 and variance 1, whatever they are."""
    logits = torch.tensor(some, dtype=torch.float64)
    v = torch.tensor([-2.0, 1, 1, 0, 0, 0, 1, -1], dtype=torch.float64)
    v = (v - v.mean()) / v.std(correction=0)
    gate = logits.sigmoid()[:, None]
    expected = kl_divergence(Normal(gate * v, 1 - gate), Normal(0.0, 1.0)).mean(1)
    assert torch.allclose(information(logits), expected, rtol=1e-6, atol=1e-9)
    assert bool((information(logits) >= -1e-12).all())


def test_the_planted_units_have_the_greatest_logits():
    kept = ("L0H0", "L1N2")
    model, data = planted(kept), examples(32)
    found = information_bottleneck(model, data, units_of(model), steps=30, learning_rate=0.5)
    assert set(found.top(2 / 14).names) == set(kept)


def test_a_higher_price_lets_less_through():
    model, data = bridge(), examples(8)
    cheap, dear = (
        information_bottleneck(model, data, units_of(model), steps=8, learning_rate=1.0, beta=beta).scores
        for beta in (0.01, 10.0)
    )
    assert bool((dear < cheap).all())


def test_padding_changes_nothing():
    model, data = bridge(), examples(8)
    mask = torch.ones_like(data.tokens, dtype=torch.bool)
    plain = tls.Examples(data.tokens, data.labels)
    ids, labels = torch.zeros(8, 2, dtype=torch.long), torch.full((8, 2), -100)
    behind = tls.Examples(
        torch.cat([data.tokens, ids], 1), torch.cat([data.labels, labels], 1), torch.cat([mask, ids.bool()], 1)
    )
    units = units_of(model)
    found = [information_bottleneck(model, some, units, steps=3).scores for some in (plain, behind)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("of", ["edges", "positions", "each"])
def test_any_units_have_gates(of: str):
    model, data = bridge(), examples(6)
    units = {
        "edges": tls.edges(model),
        "positions": tls.heads(model).at(4),
        "each": tls.neurons(model).at(torch.arange(6) % 5),
    }[of]
    first, again, other = (information_bottleneck(model, data, units, steps=2, seed=s) for s in (0, 0, 1))
    assert first.units == units and torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores) and bool(first.scores.isfinite().all())


def test_passes_are_counted_and_the_model_is_left_as_it_came_in():
    model, data = fresh(), examples(10)
    rows: list[int] = []
    with unchanged(model):
        hook = ("blocks.1.hook_resid_post", lambda value, hook: rows.append(len(value)))
        with model.hooks(fwd_hooks=[hook]):
            found = information_bottleneck(model, data, units_of(model), steps=4, per_step=5)
    assert sum(rows) == 10 * found.forward_passes + 1  # of one example, for its shape
    assert (found.forward_passes, found.backward_passes) == (4, 2)


def test_a_price_below_nothing_is_refused():
    with pytest.raises(ValueError, match=r"beta is -1.0; it must not be negative"):
        information_bottleneck(bridge(), examples(4), units_of(bridge()), beta=-1.0)
