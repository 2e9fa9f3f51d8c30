"""Affine replacements: removed units as linear maps of kept ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, fisher, fresh, inputs, linear, random_mask, unchanged, unchecked, units_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify import constants
from tl_sparsify.comparison.cost import counted
from tl_sparsify.comparison.evaluate import evaluate
from tl_sparsify.core.circuit import Circuit, NeighbourMap
from tl_sparsify.core.distributions import InterventionDistribution
from tl_sparsify.core.forward import answer_logits, output
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads, neurons


def with_mean(model: Any, batch: Any, mask: Any = None, seed: int = 0) -> Reduction:
    units = units_of(model)
    kept = random_mask(units, seed, 0.6) if mask is None else mask
    return constants.reduced(model, Circuit(units, kept), constants.mean(model, batch, units))


@pytest.mark.parametrize("nearest", [2, None])
def test_the_maps_are_those_of_a_ridge_regression(nearest: int | None):
    model, batch = bridge(), examples(n=40)
    reduction = with_mean(model, batch)
    fitted = constants.neighbours(
        model, reduction, batch, nearest=nearest, ridge=1e-3, weighting="uniform", batch_size=7
    )
    with recorded(model, reduction.units) as recording:
        output(model, batch)
    values = recording.read()
    assert fitted.mixing is not None
    for site, v, kept, c, mixing in zip(
        reduction.units.sites,
        values,
        reduction.units.split(reduction.circuit.mask),
        fitted.values.tensors,
        fitted.mixing,
        strict=True,
    ):
        if site.kind == "head":
            assert mixing is None
            continue
        assert mixing is not None
        rows = v.reshape(-1, site.size)
        centred = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-12)
        dense = mixing.matrix(rows).to_dense()
        for unit in (~kept).nonzero().flatten().tolist():
            correlation = (centred[:, kept].T @ centred[:, unit] / len(rows)).abs()
            best = correlation.argsort(descending=True)[: nearest or int(kept.sum())]
            columns = kept.nonzero().flatten()[best]
            a = centred[:, columns]
            target = centred[:, unit]
            solved = torch.linalg.solve(a.T @ a / len(rows) + 1e-3 * torch.eye(len(columns)), a.T @ target / len(rows))
            scale = rows.std(0, correction=0)
            expected = torch.zeros(site.size, dtype=torch.float64)
            expected[columns] = solved * scale[unit] / scale[columns].clamp_min(1e-12)
            assert torch.allclose(dense[unit], expected, atol=1e-8)
            assert c[unit, 0].item() == pytest.approx((rows[:, unit] - rows @ expected).mean().item(), abs=1e-9)


def test_ablating_sets_removed_units_to_their_map_of_the_kept_ones():
    model, batch = bridge(), examples()
    fitted = constants.neighbours(model, with_mean(model, batch), batch, nearest=None)
    with intervened(model, ablate(fitted)), recorded(model, fitted.units) as recording:
        output(model, batch)
    assert fitted.mixing is not None
    for v, kept, c, mixing in zip(
        recording.read(),
        fitted.units.split(fitted.circuit.mask),
        fitted.values.tensors,
        fitted.mixing,
        strict=True,
    ):
        if mixing is not None:
            expected = c[:, 0] + v[..., 0] @ mixing.matrix(v).to_dense().T
            assert torch.allclose(v[..., ~kept, 0], expected[..., ~kept], atol=1e-10)


def test_a_duplicate_is_removed_at_no_loss():
    model, batch = fresh(), examples(n=30)
    with torch.no_grad():
        weights = model.blocks[0].mlp
        getattr(weights, "in").original_component.weight[3] = getattr(weights, "in").original_component.weight[1]
        getattr(weights, "in").original_component.bias[3] = getattr(weights, "in").original_component.bias[1]
    units = neurons(model)
    reduction = constants.reduced(model, ~Circuit.of(units, ["L0N3"]), constants.mean(model, batch, units))
    fitted = constants.neighbours(model, reduction, batch, nearest=1, ridge=1e-9)
    assert risk(model, reduction, batch).mean > 1e-4
    assert risk(model, fitted, batch).mean < 1e-12


def test_under_interchange_the_map_sees_partly_interchanged_neighbours():
    model, batch = linear(units=6, features=3), inputs(n=200, features=3)
    units = model.units
    reduction = constants.reduced(model, ~Circuit.of(units, ["L0N0", "L0N1"]), constants.mean(model, batch, units))
    shuffled = InterventionDistribution.interchange(0.5)
    clean = constants.neighbours(model, reduction, batch, nearest=None)
    robust = constants.neighbours(model, reduction, batch, nearest=None, interventions=shuffled)
    assert risk(model, clean, batch).mean < risk(model, robust, batch).mean
    # only the kept units are interchanged: removed ones keep the base's value in the original
    swapped = {"interventions": shuffled, "seed": 3}
    assert risk(model, robust, batch, **swapped).mean < risk(model, clean, batch, **swapped).mean


def test_samples_count_as_much_as_the_output_depends_on_removed_units_there():
    model, batch = bridge(), examples(n=24, choices=(1, 4, 7, 8))
    reduction = with_mean(model, batch)
    settings = {"nearest": None, "temperature": 2.0, "probes": 3}  # three probes are exact for four answers
    fitted = constants.neighbours(model, reduction, batch, batch_size=5, **settings)
    units = reduction.units
    slopes, values = [], []
    for i in range(len(batch)):
        with recorded(model, units, gradients=True) as recording:
            logits = answer_logits(model, batch[i : i + 1])
        hooks = [recording.activations[site.hook] for site in units.sites]
        rows = [torch.autograd.grad(z, hooks, retain_graph=True, allow_unused=True) for z in logits[0]]
        slopes.append([torch.stack([row[number][0] for row in rows]) for number in range(len(hooks))])
        values.append([hook.detach()[0] for hook in hooks])
        slopes[-1].append(fisher(logits[0].detach() / 2.0))
    assert fitted.mixing is not None
    parts = zip(units.sites, units.split(reduction.circuit.mask), fitted.values.tensors, fitted.mixing, strict=True)
    for number, (site, kept, c, mixing) in enumerate(parts):
        if mixing is None or site.kind == "head":
            continue
        v = torch.cat([row[number] for row in values])
        scale = v.std(0, correction=0) * ~kept
        weight = torch.cat(
            [torch.einsum("cpu,cd,dpu,u->p", row[number], row[-1], row[number], scale**2).sqrt() for row in slopes]
        )
        weight = weight / weight.mean() + 3.0
        weight = weight / weight.sum()
        centred = v - weight @ v
        deviation = (weight @ centred.square()).sqrt()
        x, y = centred[:, kept] / deviation[kept].clamp_min(1e-12), centred[:, ~kept]
        solved = torch.linalg.solve(
            x.T @ (weight[:, None] * x) + 1e-3 * torch.eye(x.shape[1]), x.T @ (weight[:, None] * y)
        )
        expected = (solved / deviation[kept].clamp_min(1e-12)[:, None]).T
        assert torch.allclose(mixing.matrix(v).to_dense()[~kept][:, kept], expected, atol=1e-8)
        assert torch.allclose(c[~kept, 0], weight @ (v[:, ~kept] - v[:, kept] @ expected.T), atol=1e-8)
    uniform = constants.neighbours(model, reduction, batch, weighting="uniform", **settings)
    assert uniform.mixing != fitted.mixing


def test_where_the_output_depends_on_nothing_removed_all_samples_count_the_same():
    model, batch = fresh(), examples(n=20)
    with torch.no_grad():
        model.blocks[0].mlp.out.original_component.weight.zero_()
    units = neurons(model)
    reduction = constants.reduced(model, ~Circuit.of(units, ["L0N3"]), constants.mean(model, batch, units))
    plain = constants.neighbours(model, reduction, batch, weighting="uniform")
    fitted = constants.neighbours(model, reduction, batch)
    assert fitted.mixing is not None and plain.mixing is not None and fitted.mixing[0] is not None
    assert plain.mixing[0] is not None
    assert torch.allclose(fitted.mixing[0].weights, plain.mixing[0].weights, rtol=1e-9)


def test_more_draws_of_the_interventions_are_more_samples():
    model, batch = linear(units=6, features=3), inputs(n=30, features=3)
    units = model.units
    reduction = constants.reduced(model, ~Circuit.of(units, ["L0N0", "L0N1"]), constants.mean(model, batch, units))
    shuffled = InterventionDistribution.interchange(0.5)
    under: dict[str, Any] = {"nearest": None, "interventions": shuffled, "weighting": "uniform"}
    few, many = (
        [constants.neighbours(model, reduction, batch, draws=d, seed=s, **under) for s in (0, 50)] for d in (1, 30)
    )
    apart = [(b.values.tensors[0] - a.values.tensors[0]).abs().max() for a, b in (few, many)]
    assert apart[1] < apart[0] / 2
    repeated = constants.neighbours(model, reduction, batch, draws=3, nearest=None, weighting="uniform")
    once = constants.neighbours(model, reduction, batch, nearest=None, weighting="uniform")
    assert torch.allclose(repeated.values.tensors[0], once.values.tensors[0], atol=1e-12)


@pytest.mark.parametrize(("weighting", "forward", "backward"), [("uniform", 2, 0), ("curvature", 3, 6)])
def test_the_fit_takes_the_passes_that_it_says(weighting: Any, forward: int, backward: int):
    model, batch = bridge(), examples(n=10, choices=(1, 4, 7, 8))
    reduction = with_mean(model, batch)
    with unchanged(model), counted(model) as passes:
        constants.neighbours(model, reduction, batch, weighting=weighting, draws=2, batch_size=4)
    assert passes == {"forward": forward * 10, "backward": backward * 10}


@given(st.integers(0, 2**31))
@settings(max_examples=10)
def test_the_fit_is_no_worse_in_squares_than_the_mean(seed: int):
    model, batch = bridge(), examples(n=20, seed=seed)
    reduction = with_mean(model, batch, seed=seed)
    fitted = constants.neighbours(model, reduction, batch, nearest=None, ridge=1e-6, weighting="uniform")
    with recorded(model, reduction.units) as recording:
        output(model, batch)
    for v, kept, c, m, mixing in zip(
        recording.read(),
        reduction.units.split(reduction.circuit.mask),
        fitted.values.tensors,
        reduction.values.tensors,
        fitted.mixing or (None,) * 4,
        strict=True,
    ):
        if mixing is None:
            continue
        affine = c[:, 0] + v[..., 0] @ mixing.matrix(v).to_dense().T
        error = (affine - v[..., 0])[..., ~kept].square().mean((0, 1))
        assert bool((error <= (m[:, 0] - v[..., 0])[..., ~kept].square().mean((0, 1)) + 1e-12).all())


def test_it_is_saved_and_measured_like_any_other(tmp_path: Path):
    model, batch = bridge(), examples(n=20)
    reduction = with_mean(model, batch)
    with unchanged(model):
        fitted = constants.neighbours(model, reduction, batch, nearest=2)
        refitted = constants.refit(model, fitted, batch, batch, steps=20, progress=False)
    for each in (fitted, refitted):
        each.save(tmp_path / "affine.reduction")
        assert Reduction.load(tmp_path / "affine.reduction") == each
    assert risk(model, refitted, batch).mean <= risk(model, fitted, batch).mean
    assert refitted.mixing != fitted.mixing
    found = evaluate(model, fitted, batch)
    with torch.no_grad():
        original = answer_logits(model, batch)
        with intervened(model, ablate(fitted)):
            reduced = answer_logits(model, batch)
    agreement = (original.argmax(1) == reduced.argmax(1)).double().mean()
    assert found.agreement == pytest.approx(agreement.item())


def test_bad_maps_are_refused():
    model, batch = bridge(), examples()
    fitted = constants.neighbours(model, with_mean(model, batch), batch)
    with pytest.raises(ValueError, match="fitted for its own circuit"):
        fitted.with_circuit(Circuit.full(fitted.units))
    with pytest.raises(ValueError, match="nearest is 0"):
        constants.neighbours(model, with_mean(model, batch), batch, nearest=0)
    with pytest.raises(ValueError, match="draws is 0"):
        constants.neighbours(model, with_mean(model, batch), batch, draws=0)
    with unchecked(), pytest.raises(ValueError, match="weighting is 'even'; it is curvature or uniform"):
        constants.neighbours(model, with_mean(model, batch), batch, weighting="even")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"ridge is 0\.0"):
        constants.neighbours(model, with_mean(model, batch), batch, ridge=0.0)
    units = neurons(model)
    wrong = NeighbourMap(5, torch.tensor([0]), torch.tensor([1]), torch.ones(1, dtype=torch.float64))
    reduction = constants.reduced(model, Circuit.full(units), constants.mean(model, batch, units))
    with pytest.raises(ValueError, match="kept"):
        Reduction(reduction.circuit, reduction.values, mixing=(wrong, None))
    only = heads(model)
    unaffected = constants.reduced(model, Circuit.empty(only), constants.mean(model, batch, only))
    assert constants.neighbours(model, unaffected, batch).mixing is None
