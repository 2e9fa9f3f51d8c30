"""Faults of version 0.1.0 that have no other place, each by its right value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, fresh, reduction_of, unchecked, units_of

import tl_sparsify as tls
from tl_sparsify import Examples, constants, fold, load_task, score
from tl_sparsify.comparison.evaluate import auroc, average_precision
from tl_sparsify.core.circuit import NeighbourMap
from tl_sparsify.folding.bridge import load_folded, save_folded


def test_a_refit_within_no_grad_is_the_refit():
    model, data = bridge(), examples(6)
    plain = constants.refit(model, reduction_of(model), data, data, steps=2, progress=False)
    with torch.no_grad():
        assert constants.refit(model, reduction_of(model), data, data, steps=2, progress=False) == plain


def test_a_model_without_its_weights_is_refused():
    with pytest.raises(ValueError, match="model is on the meta device, without its weights: load it onto cpu or cuda"):
        score.risk(fresh().to("meta"), examples(4), units_of(bridge()))


def test_token_ids_of_three_dimensions_are_refused():
    data = examples(4)
    with unchecked(), pytest.raises(ValueError, match=r"tokens are of shape \(4, \d+, 1\)"):
        tls.risk(bridge(), reduction_of(bridge()), Examples(data.tokens[..., None], data.labels))


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "", ".hidden", "a\\b", "a\nb"])
def test_a_tasks_name_is_no_path(name: str):
    with pytest.raises(ValueError, match=r"name is .*: results go to a folder of it"):
        replace(load_task("planted_backup"), name=name)


@pytest.mark.parametrize("temperature", [1e300, 1e-300, 0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_no_probe_has_is_named(temperature: float):
    with pytest.raises(ValueError, match=r"temperature is .*; it must"):
        tls.Probing(temperature=temperature)


def test_what_is_wanted_is_said_in_one_sentence():
    model = bridge()
    with unchecked(), pytest.raises(ValueError) as refusal:
        constants.mean(model, examples(4), 3)  # type: ignore[arg-type]
    assert str(refusal.value).startswith("units is a int, not Units: tls.heads(model)")
    with unchecked(), pytest.raises(ValueError) as refusal:
        tls.compare(model, load_task("planted_backup"), methods=[3])  # type: ignore[list-item]
    assert " a a " not in str(refusal.value) and " a an " not in str(refusal.value)


def test_evidence_on_another_models_folded_model_is_refused(tmp_path: Path):
    task = load_task("planted_backup")
    model, other = task.model(), task.model()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    units = tls.heads(other)
    folded = fold(
        other, constants.reduced(other, tls.Circuit.full(units), constants.zero(other, task.examples(0)[0], units))
    )
    save_folded(folded, tmp_path / "small")
    for small in (folded, load_folded(tmp_path / "small")):
        assert small.origin == tls.fingerprint(other)
        with pytest.raises(ValueError, match="reduced was made for the model"):
            tls.verify(model, task.causal_model, task.alignment, task.pairs(16, 0), reduced=small)


def test_maps_of_neighbours_with_nan_are_refused():
    reduction = reduction_of(bridge())
    at = [site.kind for site in reduction.units.sites].index("neuron")
    kept = reduction.units.split(reduction.circuit.mask)[at]
    rows, columns = (~kept).nonzero().flatten()[:1], kept.nonzero().flatten()[:1]
    for weight, fine in ((0.5, True), (float("nan"), False), (float("inf"), False)):
        part = NeighbourMap(len(kept), rows, columns, torch.tensor([weight]).double())
        mixing = tuple(part if i == at else None for i in range(len(reduction.units.sites)))
        if fine:
            assert replace(reduction, mixing=mixing).mixing == mixing
        else:
            with pytest.raises(ValueError, match="has NaN or infinite weights"):
                replace(reduction, mixing=mixing)


def test_a_default_device_changes_nothing():
    model, data = bridge(), examples(8)

    def found() -> list[object]:
        path = tls.sparsify(model, data, units_of(model), rounds=2, progress=False)
        full = constants.reduced(model, tls.Circuit.full(path.units), constants.mean(model, data, path.units))
        fitted = constants.refit(model, path.at(0.5), data, data, steps=2, progress=False)
        return [path.at(0.5), full, fitted, tls.risk(model, fitted, data)]

    plain = found()
    torch.set_default_device("meta")
    try:
        assert found() == plain
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.long, torch.bool])
def test_values_are_real_numbers(dtype: torch.dtype):
    values = reduction_of(bridge()).values
    with unchecked(), pytest.raises(ValueError, match=f"tensors hold one of {dtype}; values are real numbers"):
        tls.Values(values.units, tuple(tensor.to(dtype) for tensor in values.tensors))


def test_a_basis_of_another_width_is_refused():
    message = r"basis has 5 rows, and the model's residual stream 8: \[width, directions\]"
    with pytest.raises(ValueError, match=message):
        tls.directions(bridge(), "blocks.0.hook_resid_post", torch.eye(5)[:, :2])
    with pytest.raises(ValueError, match=message):
        tls.stream_directions(bridge(), torch.eye(5)[:, :2])
    neurons = tls.directions(bridge(), "blocks.0.mlp.hook_post", torch.eye(5)[:, :2])
    assert neurons.names == ("L0D0", "L0D1")


@pytest.mark.parametrize("measure", [auroc, average_precision])
def test_scores_that_are_nan_have_no_order(measure: Callable[..., float]):
    units = units_of(bridge())
    scores = torch.arange(len(units)).float()
    scores[[2, 5]] = float("nan")
    with pytest.raises(ValueError, match="scores holds 2 NaN, which have no place in an order"):
        measure(scores, tls.Circuit.of(units, units.names[:3]))


@pytest.mark.parametrize("n", [0, -5, 2.5, True])
def test_a_number_of_units_that_is_none_is_refused(n: Any):
    with unchecked(), pytest.raises(ValueError, match="n is "):
        score.kept_count(n, 0.5)
