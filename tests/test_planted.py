"""The planted models are what their cards say: the true units carry their variables, and no other does anything."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_sparsify as tls
from tl_sparsify.core.units import select

FOLDER = Path(__file__).parent.parent / "tasks"
FOUND = ("planted_equality", "planted_gate", "planted_majority", "planted_sum")
NAMES = (*FOUND, "planted_backup")
MATTERS = 1e-2  # nats: what removing a true unit costs at least, where it is true by removal
ANSWER = -1

every_planted = pytest.mark.parametrize("name", NAMES)


@cache
def loaded(name: str) -> tuple[tls.Task, Any, tls.Units]:
    """A planted task, its model, and the model's heads and neurons."""
    task = tls.load_task(name)
    model = task.model()
    return task, model, tls.heads(model) + tls.neurons(model)


@cache
def pairs_of(name: str) -> tls.Pairs:
    return loaded(name)[0].pairs(1024, 0)


@cache
def splits(name: str) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    return loaded(name)[0].examples(0)


@cache
def path_of(name: str) -> tls.CircuitPath:
    """A path of circuits down to the true units, and below."""
    task, model, units = loaded(name)
    train, validation, _ = splits(name)
    true = len(task.truth["weights"]) if name != "planted_backup" else 1
    sizes = [0.7, 0.5, 0.35, true / len(units)]
    return tls.sparsify(model, train[:512], units, sizes=sizes, held_out=validation, progress=False)


@cache
def metrics(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "model" / "metrics.json").read_text())


def mask_of(units: tls.Units, names: tuple[str, ...]) -> torch.Tensor:
    return torch.tensor([unit in names for unit in units.names])


def changed(name: str, unit: tls.Unit) -> float:
    """The share of answers that change when a unit is interchanged."""
    _, model, _ = loaded(name)
    pairs = pairs_of(name)
    units, mask = select([unit])
    with torch.no_grad():
        plain = model(pairs.base.tokens)[:, ANSWER].argmax(1)
        swap = tls.interchange(tls.Circuit(units, mask), tls.run_values(model, pairs.source, units))
        with tls.intervened(model, swap):
            return float((model(pairs.base.tokens)[:, ANSWER].argmax(1) != plain).double().mean())


def removed(name: str, *gone: str) -> tls.Reduction:
    """The model with some units at their means over the training split."""
    _, model, units = loaded(name)
    values = tls.constants.mean(model, splits(name)[0], units)
    return tls.constants.reduced(model, tls.Circuit(units, ~mask_of(units, gone)), values)


@every_planted
def test_the_others_do_nothing_interchanged_or_removed(name: str):
    task, model, units = loaded(name)
    others = [unit for unit in units if unit.name not in task.truth["weights"]]
    assert max(changed(name, unit) for unit in others) == metrics(name)["worst_outside"] == 0
    outside = ~mask_of(units, task.truth["weights"])
    costs = tls.score.exact(model, splits(name)[2], units, progress=False).scores
    assert float(costs[outside].max()) < 1e-8
    everything = removed(name, *[unit.name for unit in others])
    assert tls.risk(model, everything, splits(name)[2]).mean < 1e-6


@every_planted
def test_the_others_are_busy(name: str):
    task, model, units = loaded(name)
    spread = tls.score.scaled_variance(model, splits(name)[0], units).scores
    true = mask_of(units, task.truth["weights"])
    assert float((spread[~true] > 0).double().mean()) > 0.9
    assert float((spread[~true] >= spread[true].min()).double().mean()) > 0.3


@every_planted
def test_the_truth_is_the_alignment_and_what_removing_shows(name: str):
    task, model, units = loaded(name)
    aligned = {unit.at(None).name for aligned in task.alignment.units.values() for unit in aligned}
    backup = {"L1H2"} if name == "planted_backup" else set()
    assert set(task.truth["weights"]) == aligned | backup
    costs = tls.score.exact(model, splits(name)[2], units, progress=False).scores
    matter = {unit for unit, cost in zip(units.names, costs.tolist(), strict=True) if cost >= MATTERS}
    assert set(task.truth.get("removal", ())) == matter
    assert matter <= set(task.truth["weights"])


@every_planted
def test_the_planted_units_carry_their_variables_and_others_carry_none(name: str):
    task, model, _ = loaded(name)
    evidence = tls.verify(model, task.causal_model, task.alignment, pairs_of(name), draws=3)
    for variable in task.alignment.variables:
        assert evidence.accuracy(variable) >= 0.95
        assert evidence.accuracy(variable) == pytest.approx(metrics(name)["interchange"][variable], abs=0.005)
        assert evidence.accuracy(variable, intervention="random units") < 0.6


@every_planted
def test_the_wrong_causal_models_are_found_out(name: str):
    task, model, _ = loaded(name)
    for rival in task.wrong:
        evidence = tls.verify(model, task.causal_models[rival], task.alignment, pairs_of(name), draws=0)
        assert min(evidence.accuracy(variable) for variable in task.alignment.variables) < 0.75, rival


@pytest.mark.parametrize("name", FOUND)
def test_the_search_finds_the_true_units_and_they_fold(name: str):
    task, model, _ = loaded(name)
    reduction = path_of(name).rounds[-1].reduction
    assert set(reduction.circuit.names) == set(task.truth["weights"])
    assert tls.risk(model, reduction, splits(name)[2]).mean < 1e-6
    small = tls.fold(model, reduction)
    evidence = tls.verify(model, task.causal_model, task.alignment, pairs_of(name), reduced=small, draws=0)
    assert min(evidence.accuracy(variable, "reduced") for variable in task.alignment.variables) >= 0.95


def accuracy_without(*gone: str) -> float:
    _, model, _ = loaded("planted_backup")
    return tls.evaluate(model, removed("planted_backup", *gone), splits("planted_backup")[2]).accuracy


def test_the_backup_stands_in_and_both_are_needed():
    first, second = "L0H1", "L1H2"
    assert accuracy_without(first) >= 0.99
    assert accuracy_without(second) >= 0.99
    assert accuracy_without(first, second) == pytest.approx(loaded("planted_backup")[0].chance, abs=0.01)


def test_the_backup_carries_the_symbol_where_the_first_head_is_gone():
    task, model, units = loaded("planted_backup")
    stand_in = tls.Alignment({"carried": [units["L1H2"].at(3)]})
    found = tls.verify(model, task.causal_model, stand_in, pairs_of(task.name), reduced=removed(task.name, "L0H1"))
    assert found.accuracy("carried", "reduced") >= 0.95
    assert found.accuracy("carried") == found.accuracy("carried", intervention="do nothing") == 0.5
    assert changed(task.name, units["L1H2"]) == 0


def test_single_unit_scores_are_blind_to_the_pair():
    _, model, units = loaded("planted_backup")
    test = splits("planted_backup")[2]
    costs = tls.score.exact(model, test, units, progress=False)
    both = tls.risk(model, removed("planted_backup", "L0H1", "L1H2"), test).mean
    for unit in ("L0H1", "L1H2"):
        assert float(costs.scores[units.index(unit)]) < MATTERS < 1 < both


def test_the_search_keeps_one_head_of_the_pair():
    task, model, _ = loaded("planted_backup")
    last = path_of(task.name).rounds[-1].reduction
    assert len(set(last.circuit.names) & {"L0H1", "L1H2"}) == len(last.circuit) == 1
    assert tls.evaluate(model, last, splits(task.name)[2]).accuracy >= 0.99
    small = tls.fold(model, last)
    evidence = tls.verify(model, task.causal_model, task.alignment, pairs_of(task.name), reduced=small, draws=0)
    assert evidence.accuracy("carried", "reduced") >= 0.95
