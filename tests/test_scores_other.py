"""Variances, additivity and scores as values, and what holds for all scores; for every kind of unit, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.kinds import EACH, KINDS, N, basis, close, data, padded
from helpers.models import (
    TwoLayers,
    bridge,
    examples,
    fisher,
    fresh,
    inputs,
    jacobian,
    linear,
    random_mask,
    reduction_of,
    seeded,
    unchanged,
    units_of,
)
from torch import Tensor

from tl_sparsify import constants, score
from tl_sparsify.core.basis import stream_directions
from tl_sparsify.core.circuit import Circuit, NeighbourMap
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, run_values
from tl_sparsify.core.metrics import log_odds
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, neurons
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.scores import Scores

ALL = pytest.mark.parametrize("kind", KINDS)

# Variances


def deviations(model: Any, batch: Examples, units: Units, valid: Tensor) -> list[tuple[Site, Tensor, Tensor]]:
    """For each site its values ``[batch, pos, units, width]`` less their mean, and where they count."""
    found = []
    for site, v in zip(units.sites, run_values(model, batch, units).tensors, strict=True):
        where = site.position_mask(len(batch), 5)
        where = valid if where is None else valid & where
        found.append((site, v - v[where].mean(0), where))
    return found


def written(model: Any, site: Site, deviation: Tensor) -> Tensor:
    """The squared length of what every unit writes."""
    if site.kind == "head":
        return torch.einsum("bpuw,uwo->bpuo", deviation, model.blocks[site.layer].attn.W_O).square().sum(-1)
    if site.kind == "neuron":
        return deviation[..., 0].square() * model.blocks[site.layer].mlp.W_out.square().sum(1)
    scale = 1.0 if site.basis is None else site.basis.square().sum(0)
    return deviation.square().sum(-1) * scale


@ALL
@pytest.mark.parametrize("batch", [data(), padded()], ids=["full", "padded"])
def test_variances_are_those_of_all_values(kind: str, batch: Examples):
    model = bridge()
    units = KINDS[kind](model)
    valid = torch.ones(N, 5, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask
    plain, scaled, spread, count = [], [], [], []
    for site, deviation, where in deviations(model, batch, units, valid):
        squares = written(model, site, deviation)
        plain.append(deviation.square().sum(-1)[where].mean(0))
        scaled.append(squares[where].mean(0))
        spread.append((squares * where[:, :, None]).sum(1))
        count.append(where.sum(1, keepdim=True).expand(-1, site.size))
    with unchanged(model):
        found = score.variance(model, batch, units), score.scaled_variance(model, batch, units)
    assert close(found[0].scores, torch.cat(plain)) and close(found[1].scores, torch.cat(scaled))
    assert [(s.forward_passes, s.backward_passes) for s in found] == [(2, 0), (2, 0)]
    total, n = torch.cat(spread, 1), torch.cat(count, 1).double()
    scatter = (total - n * found[1].scores).square().sum(0) * N / (N - 1)
    assert close(found[1].stderr, scatter.sqrt() / n.sum(0), 1e-7)
    if batch.attention_mask is None:  # the same as the plain standard error of the examples' means
        assert close(found[1].stderr, (total / n).std(0) / N**0.5, 1e-7)


def test_the_scaled_variance_of_a_head_is_the_trace_of_its_writes_covariance():
    model, batch = bridge(), data()
    [z] = run_values(model, batch, Units(heads(model).sites[1:])).tensors
    expected = [
        torch.trace(w.T @ torch.cov(z[:, :, h].reshape(-1, 4).T, correction=0) @ w)
        for h, w in enumerate(model.blocks[1].attn.W_O)
    ]
    found = score.scaled_variance(model, batch, Units(heads(model).sites[1:]))
    assert close(found.scores, torch.stack(expected).detach())


def test_readers_are_taken_from_the_user():
    model, batch = linear(), inputs()
    hidden = batch.tokens @ model.w_in
    reader = torch.randn(6, 3, generator=seeded(8), dtype=torch.float64)
    for given in (reader, reader[:, None]):
        found = score.scaled_variance(model, batch, model.units, readers={"hook_hidden": given})
        assert close(found.scores, hidden.var(0, correction=0).detach() * reader.square().sum(1))
    transformer, tokens = bridge(), data()
    ones = {f"blocks.{layer}.attn.hook_z": torch.eye(4).expand(2, 4, 4) for layer in range(2)}
    own = score.scaled_variance(transformer, tokens, heads(transformer), readers=ones)
    assert close(own.scores, score.variance(transformer, tokens, heads(transformer)).scores)


def test_law_8_rescaling_a_neuron_and_its_reader_is_seen_by_variance_alone():
    model, batch = fresh(), data()
    units = neurons(model)
    factors = torch.exp(torch.randn(2, 5, generator=seeded(0), dtype=torch.float64) * 2)
    scorers = (score.variance, score.scaled_variance, score.risk)
    before = [scorer(model, batch, units).scores for scorer in scorers]
    with torch.no_grad():
        for block, factor in zip(model.blocks, factors, strict=True):
            getattr(block.mlp, "in").original_component.weight.mul_(factor[:, None])
            getattr(block.mlp, "in").original_component.bias.mul_(factor)
            block.mlp.out.original_component.weight.div_(factor)
    after = [scorer(model, batch, units).scores for scorer in scorers]
    assert close(after[0], before[0] * factors.flatten().square())
    assert close(after[1], before[1]) and close(after[2], before[2])


# What holds for all of them

SCORERS: dict[str, Callable[..., Scores]] = {
    "variance": score.variance,
    "scaled variance": score.scaled_variance,
    "gradient": score.gradient,
    "integrated": score.integrated,
    "exact": score.exact,
    "exact metric": lambda *args, **given: score.exact(*args, metric=log_odds, **given),
    "from counterfactuals": lambda *args, **given: score.exact(*args, source="counterfactual", **given),
    "gradient from others": lambda *args, **given: score.gradient(*args, source="shuffled", **given),
}


@pytest.mark.parametrize("scorer", SCORERS)
def test_law_4_batch_sizes_give_the_same_scores(scorer: str):
    model, batch = bridge(), padded()
    units = heads(model) + neurons(model).at(EACH) + stream_directions(model, basis(2))
    expected = SCORERS[scorer](model, batch, units, seed=1)
    assert bool(expected.stderr.isfinite().all()) and bool((expected.stderr > 0).any())
    for size in (1, 4, 13):
        found = SCORERS[scorer](model, batch, units, seed=1, batch_size=size)
        assert close(found.scores, expected.scores) and close(found.stderr, expected.stderr)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_give_nearly_the_same(scorer: str, dtype: torch.dtype):
    batch = data(24)
    wide, narrow = (SCORERS[scorer](bridge(dtype=d), batch, units_of(bridge(dtype=d))) for d in (torch.float64, dtype))
    assert narrow.scores.dtype == torch.float64
    assert close(narrow.scores, wide.scores, 1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_model_in_training_mode_is_refused(scorer: str):
    model = fresh().train()
    with pytest.raises(ValueError, match="training mode"):
        SCORERS[scorer](model, data(), units_of(model))


def test_a_plain_module_without_positions_has_all_scores():
    model, batch = linear(), replace(inputs(), counterfactual_tokens=inputs(seed=1).tokens)
    readers = {"hook_hidden": model.w_out.detach()}
    for name, scorer in SCORERS.items():
        given = {"readers": readers} if name == "scaled variance" else {}
        assert scorer(model, batch, model.units, **given).scores.shape == (6,)


# Additivity


def test_additivity_is_that_of_explicit_jacobians():
    model, batch = bridge(), examples(N, choices=(1, 4, 6))
    reduction = reduction_of(model)
    removed = ~reduction.circuit.mask
    change = jacobian(model, batch, reduction)[..., removed]
    curvature = torch.einsum("ncu,ncd,ndw->nuw", change, fisher(answer_logits(model, batch)), change).detach() / 2
    joint, alone = curvature.sum((1, 2)), curvature.diagonal(dim1=1, dim2=2).sum(1)
    found = score.additivity(model, batch, reduction, probes=2)
    ratio = alone.mean() / joint.mean()
    assert found.mean == pytest.approx(float(1 - ratio), rel=1e-9)
    slope = torch.stack([ratio, -torch.ones_like(ratio)]) / joint.mean()  # of 1 - alone / joint
    expected = (slope @ torch.cov(torch.stack([joint, alone])) @ slope / N).sqrt()
    assert found.stderr == pytest.approx(float(expected), rel=1e-9) and found.n == N


def test_additivity_is_what_a_search_says_of_its_first_round():
    model, batch = bridge(), data()
    settings = {"rounds": 2, "smallest": 0.3, "exchanges": 0, "seed": 5, "predict": True, "progress": False}
    path = sparsify(model, batch, units_of(model), **settings)
    found = score.additivity(model, batch, path.rounds[0].reduction, seed=5)
    assert float(found) == pytest.approx(path.rounds[0].additivity, rel=1e-9)


@pytest.mark.parametrize(("second", "expected"), [(1.0, 0.5), (-0.5, -4.0), (0.0, 0.0)])
def test_additivity_of_two_copies(second: float, expected: float):
    """Two units with one value, read with weights 1 and ``second``: ``1 - (1 + s^2) / (1 + s)^2``."""
    w_out = torch.tensor([[1.0, 0.0], [second, 0.0]], dtype=torch.float64)
    model = TwoLayers(torch.ones(4, 2, dtype=torch.float64), w_out)
    batch = inputs(choices=2)
    reduction = Reduction(Circuit.empty(model.units), constants.mean(model, batch, model.units))
    found = score.additivity(model, batch, reduction, metric=lambda logits, batch: logits[:, 0])
    assert found.mean == pytest.approx(expected, abs=1e-12) and found.stderr == pytest.approx(0, abs=1e-12)


def test_additivity_of_units_that_nothing_reads_is_none():
    model, batch = TwoLayers(torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)), inputs(5, 3, 2)
    reduction = Reduction(Circuit.empty(model.units), constants.mean(model, batch, model.units))
    assert (float(score.additivity(model, batch, reduction)), score.additivity(model, batch, reduction).stderr) == (
        0,
        0,
    )


# Scores as values


def test_absolute_scores_order_by_size():
    units = linear(3).units
    nothing = torch.zeros(3)
    scores = Scores(units, torch.tensor([-3.0, 1.0, 2.0]), nothing, "gradient", "units of the metric", 1, 1)
    assert scores.order.tolist() == [0, 1, 2] and scores.absolute.order.tolist() == [1, 2, 0]
    assert scores.absolute.top(0.3).names == ("L0N0",) and scores.absolute.name == "gradient (absolute)"
    assert scores.scores.tolist() == [-3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1.0, 2.0, 30.0, 4.0], [0.1, 0.2, 5.0, 0.3], 1.0),
        ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 0.8),
        ([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], 0.9486832980505138),  # 3 / sqrt(10): tied ranks 1.5 and 1.5
    ],
)
def test_rank_correlation(one: list[float], two: list[float], expected: float):
    units = linear(4).units
    a, b = (Scores(units, torch.tensor(x), torch.zeros(4), "a", "b", 0, 0) for x in (one, two))
    assert a.rank_correlation(b) == pytest.approx(expected) == b.rank_correlation(a)
    flat = Scores(units, torch.ones(4), torch.zeros(4), "a", "b", 0, 0)
    assert a.rank_correlation(flat) != a.rank_correlation(flat)  # NaN
    with pytest.raises(ValueError, match="other scores"):
        a.rank_correlation(Scores(linear(5).units, torch.ones(5), torch.zeros(5), "a", "b", 0, 0))


# Errors


def test_unknown_and_misshapen_readers_are_refused():
    model, batch = linear(), inputs()
    with pytest.raises(ValueError, match=r"readers has no entry for 'hook_hidden'.*\[6, width, out\] or \[6, out\]"):
        score.scaled_variance(model, batch, model.units)
    with pytest.raises(ValueError, match=r"readers of hook_hidden have shape \(5, 3\); it must be \[6, width, out\]"):
        score.scaled_variance(model, batch, model.units, readers={"hook_hidden": torch.ones(5, 3)})
    with pytest.raises(ValueError, match=r"width 2, there they have width 1: give \[6, 1, out\]"):
        score.scaled_variance(model, batch, model.units, readers={"hook_hidden": torch.ones(6, 2, 3)})
    with pytest.raises(ValueError, match="readers names 'hook_other'; the units lie at hook_hidden"):
        score.scaled_variance(model, batch, model.units, readers={"hook_other": torch.ones(6, 2)})
    hidden = Units((Site("neuron", 0, "blocks.0.mlp.hook_pre", 5),))
    with pytest.raises(ValueError, match=r"readers has no entry for 'blocks\.0\.mlp\.hook_pre'"):
        score.scaled_variance(bridge(), data(), hidden)


def test_additivity_of_nothing_of_affine_replacements_and_of_another_model_is_refused():
    model, batch = bridge(), data()
    units = units_of(model)
    reduction = reduction_of(model, torch.ones(len(units), dtype=torch.bool))
    with pytest.raises(ValueError, match="removes none of"):
        score.additivity(model, batch, reduction)
    mask = random_mask(units, 1) | (torch.arange(len(units)) < 4)
    mask[4], mask[5] = False, True
    entry = NeighbourMap(5, torch.tensor([0]), torch.tensor([1]), torch.ones(1, dtype=torch.float64))
    affine = replace(reduction_of(model, mask), mixing=(None, None, entry, None))
    with pytest.raises(ValueError, match="affine"):
        score.additivity(model, batch, affine)
    with pytest.raises(ValueError, match="was made for the model"):
        score.additivity(fresh(seed=2), batch, reduction_of(model))
