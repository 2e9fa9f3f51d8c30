"""AtP* and attribution to second order, against one head at a time and an explicit Hessian."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import unchecked
from helpers.native import native
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.comparison.cost import cost_of
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import by_example, log_odds, measured_by


def model_of(name: str) -> Any:
    return native() if name == "plain" else architectures.bridge(name)


def with_partners(n: int = 4) -> tls.Examples:
    examples = architectures.batch(n)
    return replace(
        examples, counterfactual_tokens=examples.tokens.flip(0), counterfactual_labels=examples.labels.flip(0)
    )


def metric_of(model: Any, examples: tls.Examples) -> Tensor:
    return by_example(measured_by(log_odds, answer_logits(model, examples), examples), examples)


def by_one(model: Any, examples: tls.Examples, units: tls.Units, rules: Any) -> Tensor:
    """The effects of one head's queries, keys and values at a time, the stream as it is, and of neurons."""
    other = examples.counterfactuals
    sites = units.sites
    with tls.backward.modified(model, rules), tls.recorded(model, units, gradients=True) as recording:
        value = metric_of(model, examples).sum()
    hooks = [site.hook for site in sites]
    found = torch.autograd.grad(value, [recording.activations[hook] for hook in hooks], allow_unused=True)
    effects = torch.zeros(len(examples), len(units), dtype=torch.float64)
    for site, part, clean, gradient in zip(sites, units.slices, recording.read(), found, strict=True):
        if gradient is None:
            continue
        g = site.pull(gradient)
        if site.kind == "neuron":
            there = tls.run_values(model, other, tls.Units((site,))).tensors[0]
            effects[:, part] = ((clean - there) * g).sum((1, 3)).abs()
            continue
        for name in ("q", "k", "v"):
            hook = f"blocks.{site.layer}.attn.hook_{name}"
            shared = site.size // len(getattr(model.blocks[site.layer].attn, f"W_{name.upper()}"))
            inputs = tls.Units((tls.Site("head", site.layer, hook, site.size // shared),))
            there = tls.run_values(model, other, inputs)
            for head in range(site.size):
                keep = torch.ones(len(inputs))
                keep[head // shared] = 0
                with (
                    torch.no_grad(),
                    tls.recorded(model, tls.Units((site,))) as seen,
                    tls.intervened(model, tls.Intervention(inputs, keep, there)),
                ):
                    model(examples.tokens)
                move = clean[:, :, head] - seen.read()[0][:, :, head]
                effects[:, part.start + head] += (move * g[:, :, head]).sum((1, 2)).abs()
    return effects.detach()


@pytest.mark.parametrize("name", ["plain", "GPT-2", "Llama"])
@pytest.mark.parametrize("drop", [False, True])
def test_atp_star_is_one_head_at_a_time(name: str, drop: bool):
    model, examples = model_of(name), with_partners()
    units = tls.heads(model) + tls.neurons(model)
    rules = [tls.backward.Rules(without=(layer,)) for layer in range(3)] if drop else [tls.backward.TRUE]
    expected = torch.stack([by_one(model, examples, units, rule) for rule in rules]).sum(0) / (2 if drop else 1)
    for size in (None, 1):
        found = tls.baselines.atp_star(model, examples, units, drop=drop, batch_size=size)
        torch.testing.assert_close(found.scores, expected.mean(0), rtol=1e-6, atol=1e-9)
    assert (found.forward_passes, found.backward_passes) == ((8, 3) if drop else (6, 1))


def test_atp_star_sees_saturated_attention():
    model, examples = native(), with_partners()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(200.0)
    try:
        units = tls.heads(model)
        found = tls.baselines.atp_star(model, examples, units, drop=False)
        queries = tls.Units(tuple(tls.Site("head", n, f"blocks.{n}.attn.hook_q", 4) for n in range(3)))
        flat = tls.score.gradient(model, examples, queries, source="counterfactual").absolute
        assert float(found.scores.sum()) > 2 * float(flat.scores.sum())
    finally:
        with torch.no_grad():
            for block in model.blocks:
                block.attn.q.weight.div_(200.0)


def hessian_of(model: Any, examples: tls.Examples, units: tls.Units, values: tls.Values) -> tuple[Tensor, Tensor]:
    """The gradient and Hessian of each example's metric with respect to ``keep``."""
    slopes, bends = [], []
    for number in range(len(examples)):
        one = examples[number : number + 1]

        def metric(keep: Tensor, one: tls.Examples = one) -> Tensor:
            with tls.intervened(model, tls.Intervention(units, keep, values, first_token="bos")):
                return metric_of(model, one).sum()

        keep = torch.ones(len(units), dtype=torch.float64)
        slopes.append(torch.autograd.functional.jacobian(metric, keep))
        bends.append(torch.autograd.functional.hessian(metric, keep))
    return torch.stack(slopes), torch.stack(bends)


@pytest.mark.parametrize("name", ["plain", "GPT-2"])
def test_second_order_is_the_explicit_hessian(name: str):
    model, examples = model_of(name), architectures.batch()
    units = tls.heads(model)
    values = tls.constants.mean(model, examples, units)
    g, h = hessian_of(model, examples, units, values)
    for size in (None, 1):
        found = tls.baselines.second_order(model, examples, units, values=values, batch_size=size)
        torch.testing.assert_close(found.scores, (g - h.sum(2) / 2).mean(0), rtol=1e-8, atol=1e-10)
    alone = tls.baselines.second_order(model, examples, units, values=values, direction="alone", draws=400)
    expected = (g - h.diagonal(dim1=1, dim2=2) / 2).mean(0)
    off = (h - torch.diag_embed(h.diagonal(dim1=1, dim2=2))).square().sum(2).mean(0).sqrt()
    # the mean over draws and examples is within five of its standard errors
    assert bool(((alone.scores - expected).abs() < 5 * off / 2 / (400 * len(examples)) ** 0.5).all())


def test_what_cannot_be_is_refused():
    model, examples = architectures.bridge("GPT-2"), architectures.batch()
    with pytest.raises(ValueError, match="AtP\\* is for heads and neurons"):
        tls.baselines.atp_star(model, examples, tls.mlps(model))
    with unchecked(), pytest.raises(ValueError, match="direction is 'both'; it is joint or alone"):
        tls.baselines.second_order(model, examples, tls.heads(model), direction="both")  # type: ignore[arg-type]


def test_atp_star_runs_the_model_as_often_as_it_says():
    model, examples = native(), with_partners()
    for units, passes in ((tls.heads(model) + tls.neurons(model), 5), (tls.neurons(model), 2)):
        found, cost = cost_of(
            model, len(examples), lambda units=units: tls.baselines.atp_star(model, examples, units, drop=False)
        )
        assert cost.forward == found.forward_passes == passes + 1
