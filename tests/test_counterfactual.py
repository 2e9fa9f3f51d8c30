"""Removed units at their values on counterfactual inputs, in all that takes a reduction: against runs by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import NoCasts, bridge, examples, unchanged
from helpers.native import native
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.distributions import removal
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import divergence
from tl_sparsify.core.probes import samples
from tl_sparsify.presentation.circuit_data import Request, gathered

KINDS: dict[str, Callable[[Any], tls.Units]] = {
    "units": lambda model: tls.heads(model) + tls.neurons(model),
    "edges": tls.edges,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def setting(kind: str, seed: int = 0, kept: float = 0.6) -> tuple[Any, tls.Examples, tls.Reduction]:
    """A model, examples with counterfactuals and a random circuit whose removed units take their values there."""
    model, batch = native() if kind == "edges" else bridge(), examples(8)
    units = KINDS[kind](model)
    draw = torch.rand(len(units), generator=torch.Generator().manual_seed(seed))
    return (
        model,
        batch,
        tls.constants.reduced(
            model, tls.Circuit(units, draw < kept), tls.constants.counterfactual(model, batch, units)
        ),
    )


def divergences(model: Any, batch: tls.Examples, units: tls.Units, keep: Tensor, together: int = 1) -> Tensor:
    """Of so many examples at a time: their counterfactual run first, then their own with the units set to what they
    were there."""
    found: list[Tensor] = []
    for index in torch.arange(len(batch)).split(together):
        one = batch[index]
        source = tls.run_values(model, one.counterfactuals, units)
        with torch.no_grad():
            original = answer_logits(model, one)
            with tls.intervened(model, tls.Intervention(units, keep, source, first_token="bos")):
                found.append(divergence(original, answer_logits(model, one), one, None).double())
    return torch.cat(found)


@every_kind
def test_risk_is_that_of_runs_by_hand(kind: str):
    model, batch, reduction = setting(kind)
    expected = divergences(model, batch, reduction.units, reduction.circuit.mask.double())
    with unchanged(model):
        found = [tls.risk(model, reduction, batch, batch_size=size) for size in (None, 3)]
    for one in found:
        assert one.mean == pytest.approx(float(expected.mean()), rel=1e-9) and one.mean > 1e-4
    means = tls.constants.reduced(model, reduction.circuit, tls.constants.mean(model, batch, reduction.units))
    assert tls.risk(model, means, batch).mean != pytest.approx(found[0].mean, rel=0.05)


@every_kind
def test_evaluation_is_that_of_counterfactual_ablation(kind: str):
    model, batch, reduction = setting(kind)
    means = replace(reduction, values=tls.constants.mean(model, batch, reduction.units))
    found = tls.evaluate(model, reduction, batch, seed=0)
    assert found == tls.evaluate(model, means, batch, ablation="counterfactual", seed=0)
    assert found.kind == reduction.kind == "counterfactual"
    assert found.risk.mean == pytest.approx(tls.risk(model, reduction, batch).mean, rel=1e-9)


@every_kind
def test_probes_are_derivatives_along_the_way_to_the_counterfactual(kind: str):
    model, batch, reduction = setting(kind)
    units, keep = reduction.units, reduction.circuit.mask.double()
    with NoCasts():
        (part,) = samples(model, batch, reduction, current=reduction, probes=16, restorable=True)
        assert torch.allclose(part.offset.double(), divergences(model, batch, units, keep), atol=1e-10)
        for unit in range(0, len(units), max(1, len(units) // 6)):
            step = torch.zeros(len(units), dtype=torch.float64)
            step[unit] = 1e-4
            after, before = (divergences(model, batch, units, keep + sign * step, 8) for sign in (-1, 1))
            slope = (after - before) / 2e-4
            assert torch.allclose(part.linear[:, unit].double(), slope, atol=1e-6), units.names[unit]


@every_kind
def test_probes_at_the_original_model_are_its_curvature(kind: str):
    model, batch, reduction = setting(kind)
    units, whole = reduction.units, torch.ones(len(reduction.units), dtype=torch.float64)
    with NoCasts():
        (part,) = samples(model, batch, reduction, probes=16)
        for unit in range(0, len(units), max(1, len(units) // 4)):
            step = torch.zeros_like(whole)
            step[unit] = 1e-3
            twice = sum(divergences(model, batch, units, whole + sign * step, 8) for sign in (-1, 1))
            assert torch.allclose(part.effects[:, :, unit].double().square().sum(0), twice / 1e-6, rtol=1e-2, atol=1e-6)


@every_kind
def test_scores_are_those_with_the_counterfactual_as_source(kind: str):
    model, batch, reduction = setting(kind)
    paired = reduction.values
    for scorer in (tls.score.gradient, tls.score.integrated):
        assert torch.equal(
            scorer(model, batch, paired.units, values=paired).scores,
            scorer(model, batch, paired.units, source="counterfactual").scores,
        )
    few = list(paired.units)[:5]
    alone = tls.score.exact(model, batch, few, source="counterfactual", progress=False).scores
    for number, unit in enumerate(few):
        without = replace(reduction, circuit=~tls.Circuit.of(paired.units, [unit]))
        assert tls.risk(model, without, batch).mean == pytest.approx(float(alone[number]), rel=1e-6, abs=1e-12)


@every_kind
def test_the_search_removes_units_to_their_counterfactuals(kind: str):
    model, batch, reduction = setting(kind)
    paired, units = reduction.values, reduction.units
    with unchanged(model):
        path = tls.sparsify(model, batch, units, values=paired, rounds=4, smallest=0.1, progress=False)
    for step in path.rounds:
        keep = step.reduction.circuit.mask.double()
        expected = float(divergences(model, batch, units, keep).mean())
        assert step.reduction.kind == "counterfactual" and step.measured.mean == pytest.approx(expected, rel=1e-6)
    half = path.at(0.5)
    drawn = [random_like(half, seed) for seed in range(5)]
    assert tls.risk(model, half, batch).mean < min(tls.risk(model, other, batch).mean for other in drawn)
    curve = tls.evaluate(model, path, batch, sizes=(0.25, 0.5), bootstrap=0)
    assert curve.ablation == "counterfactual" and curve.risk[1] == pytest.approx(tls.risk(model, half, batch).mean)


def random_like(reduction: tls.Reduction, seed: int) -> tls.Reduction:
    order = torch.randperm(len(reduction.units), generator=torch.Generator().manual_seed(seed))
    return reduction.with_circuit(tls.Circuit(reduction.units, reduction.circuit.mask[order]))


@every_kind
def test_baselines_take_them_too(kind: str):
    model, batch, reduction = setting(kind)
    paired, units = reduction.values, reduction.units
    quiet: dict[str, Any] = {"values": paired, "progress": False}
    mask = tls.baselines.top_k_gate(model, batch, units, steps=20, **quiet)
    assert mask.forward_passes == 1 + 2 * 20 and bool(torch.isfinite(mask.scores).all())
    quiet |= {"smallest": 0.1}
    rounds = tls.baselines.in_rounds(tls.score.gradient, model, batch, units, rounds=3, absolute=True, **quiet)
    again = tls.baselines.in_rounds(
        tls.score.gradient, model, batch, units, rounds=3, absolute=True, batch_size=3, **quiet
    )
    assert rounds.forward_passes == again.forward_passes == 3 * 3 - 1  # in the first round nothing is removed yet
    for kept in (0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1):  # within a round edges that reach nothing tie up to round-off
        assert rounds.top(kept) == again.top(kept)
    quiet |= {"smallest": 0.5}
    one = tls.baselines.in_rounds(tls.score.risk, model, batch, units, rounds=1, **quiet)
    assert one.top(0.5) == tls.score.risk(model, batch, units, values=paired).top(0.5)
    better = [tls.risk(model, replace(reduction, circuit=found.top(0.5)), batch).mean for found in (mask, rounds)]
    assert max(better) < tls.risk(model, random_like(replace(reduction, circuit=mask.top(0.5)), 0), batch).mean


@every_kind
def test_polish_and_pages_measure_them(kind: str):
    model, batch, reduction = setting(kind, kept=0.3)
    before = tls.risk(model, reduction, batch).mean
    polished = tls.polish(model, reduction, batch, passes=40)
    assert tls.risk(model, polished, batch).mean < before and polished.kind == "counterfactual"
    if kind == "units":
        request = Request(limit=4, effects=8, shown=2, progress=False)
        data = gathered(model, reduction, batch, request)
        first = data["units"][0]
        unit = reduction.units[first["name"]]
        without = reduction.with_circuit(reduction.circuit - tls.Circuit.of(reduction.units, [unit]))
        rise = tls.risk(model, without, batch).mean - before
        assert first["effect"] == pytest.approx(rise, rel=1e-2, abs=1e-6)


@every_kind
def test_they_are_saved_and_compared(kind: str, tmp_path: Path):
    model, batch, reduction = setting(kind)
    reduction.save(tmp_path / "paired")
    loaded = tls.Reduction.load(tmp_path / "paired")
    assert loaded == reduction and loaded.kind == "counterfactual"
    assert tls.risk(model, loaded, batch) == tls.risk(model, reduction, batch)
    means = replace(reduction, values=tls.constants.mean(model, batch, reduction.units))
    assert means != reduction and not reduction.values.constant and reduction.values.paired
    assert repr(reduction.values).startswith("Values(of counterfactual inputs")


def test_the_whole_circuit_needs_no_counterfactuals():
    model, batch, reduction = setting("units")
    whole = reduction.with_circuit(tls.Circuit.full(reduction.units))
    alone = replace(batch, counterfactual_tokens=None, counterfactual_labels=None)
    assert tls.risk(model, whole, alone).mean == 0
    assert removal(model, whole, alone, torch.arange(2)).keep.min() == 1


def test_what_needs_constants_is_refused_by_name():
    model, batch, reduction = setting("units")
    alone = replace(batch, counterfactual_tokens=None, counterfactual_labels=None)
    units, paired = reduction.units, reduction.values
    with pytest.raises(ValueError, match="source is not given"):
        tls.ablate(reduction)
    with pytest.raises(ValueError, match="source is given, and the reduction has mean values"):
        means = replace(reduction, values=tls.constants.mean(model, batch, units))
        tls.ablate(means, tls.run_values(model, batch.counterfactuals, units))
    with pytest.raises(ValueError, match="source is for"):
        tls.ablate(reduction, tls.run_values(model, batch.counterfactuals, tls.heads(model)))
    for call in (tls.risk, tls.evaluate):
        with pytest.raises(ValueError, match="counterfactual"):
            call(model, reduction, alone)
    with pytest.raises(ValueError, match="counterfactual"):
        tls.constants.counterfactual(model, alone, units)
    with pytest.raises(ValueError, match="give it constants"):
        tls.fold(model, reduction)
    with pytest.raises(ValueError, match="nothing to fit"):
        tls.constants.refit(model, reduction, batch, batch, steps=1, progress=False)
    with pytest.raises(ValueError, match="give one with constants"):
        tls.constants.neighbours(model, reduction, batch)
    with pytest.raises(ValueError, match="the reduction has none"):
        tls.risk(model, reduction, batch, interventions=tls.InterventionDistribution.mean(0.5))
    with pytest.raises(ValueError, match="no constants to be refitted"):
        refitting = tls.Refitting(steps=3)
        tls.sparsify(model, batch, units, values=paired, held_out=batch, refitting=refitting, progress=False)
    path = tls.sparsify(model, batch, units, values=paired, held_out=batch, rounds=2, progress=False)
    assert path.at(0.5).kind == "counterfactual"
