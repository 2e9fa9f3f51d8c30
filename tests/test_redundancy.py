"""Redundancy, on the shipped model in which one head copies the answer and another one does so only where the first is
gone: what scores of single units say of the pair, and what the search does with it.

Every method here puts the first head above all others, so a circuit of one unit is right by any of them. What they miss
is the pair. Scores in nats say that neither head costs anything, and dropping what costs nothing drops both. Patching,
attribution and edges say that the first head is everything and the second nothing; but the answer outlives the first,
and then hangs on the second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

import tl_sparsify as tls
from tl_sparsify import baselines, constants, score
from tl_sparsify.search.scores import Scores

FIRST, BACKUP = "L0H1", "L1H2"
PAIR = {FIRST, BACKUP}
ALLOWED = 0.01  # nats

Method = Callable[..., Scores]
IN_NATS: dict[str, Method] = {
    "single-unit risk": partial(score.risk, probes=15),  # exact: there are sixteen answers
    "exact effect of the mean": partial(baselines.exact_mean, progress=False),
    "exact effect of zero": partial(baselines.exact_zero, progress=False),
}
BY_METRIC: dict[str, Method] = {
    "activation patching, noising": partial(baselines.activation_patching, progress=False),
    "activation patching, denoising": partial(baselines.activation_patching, direction="denoising", progress=False),
    "attribution patching": baselines.attribution_patching,
    "EAP, sum": baselines.eap,
    "EAP, max": partial(baselines.eap, reduce="max"),
    "EAP, sum, at the corrupted run": partial(baselines.eap, direction="denoising"),
    "EAP-IG": baselines.eap_ig,
}


@cache
def loaded() -> tuple[Any, tls.Units, tls.Examples, tls.Examples, tls.Examples]:
    """The model, its heads and neurons, and some of its splits."""
    task = tls.load_task("planted_backup")
    model = task.model()
    train, validation, test = (part[:256] for part in task.examples(0))
    return model, tls.heads(model) + tls.neurons(model), train, validation, test


@cache
def values(kind: str) -> tls.Values:
    model, units, train, _, _ = loaded()
    return (constants.zero if kind == "exact effect of zero" else constants.mean)(model, train, units)


@cache
def scored(name: str) -> Scores:
    model, units, train, _, _ = loaded()
    return (IN_NATS | BY_METRIC)[name](model, train, units)


def of(scores: Scores, unit: str) -> float:
    return float(scores.scores[scores.units.index(unit)])


def without(*gone: str, kind: str = "mean") -> tls.Reduction:
    _, units, *_ = loaded()
    return tls.Reduction(~tls.Circuit.of(units, gone), values(kind))


def accuracy(reduction: tls.Reduction) -> float:
    model, *_, test = loaded()
    return tls.evaluate(model, reduction, test).accuracy


@pytest.mark.parametrize("name", IN_NATS)
def test_in_nats_neither_head_costs_anything_and_both_cost_everything(name: str):
    model, *_, test = loaded()
    alone = of(scored(name), FIRST) + of(scored(name), BACKUP)
    together = tls.risk(model, without(*PAIR, kind=name), test).mean
    assert 0 < alone < ALLOWED < 1 < together
    for head in PAIR:
        assert accuracy(without(head, kind=name)) == 1


@pytest.mark.parametrize("name", IN_NATS)
def test_dropping_what_costs_nothing_alone_drops_both(name: str):
    _, units, *_ = loaded()
    circuit = tls.Circuit(units, scored(name).scores >= ALLOWED)
    assert not PAIR & set(circuit.names)
    assert accuracy(tls.Reduction(circuit, values(name))) <= 0.1


@pytest.mark.parametrize("name", BY_METRIC)
def test_patching_and_edges_see_one_head_alone(name: str):
    """The backup gets less than a hundredth of the first head's score; scored where that one is removed, it gets more
    than a hundred times what it got."""
    model, units, train, _, _ = loaded()
    found = scored(name)
    assert units.names[int(found.order[-1])] == FIRST
    assert abs(of(found, BACKUP)) < 0.01 * of(found, FIRST)
    with tls.intervened(model, tls.ablate(without(FIRST))):
        later = BY_METRIC[name](model, train, units)
    assert of(later, BACKUP) > 100 * abs(of(found, BACKUP))
    assert accuracy(without(FIRST)) == 1  # which the first head's score denies


@pytest.mark.parametrize("name", ["single-unit risk", "exact effect of the mean", "EAP, sum", "EAP, max", "EAP-IG"])
def test_two_units_by_score_are_both_heads(name: str):
    """One of them, with anything else, would do as well."""
    _, units, *_ = loaded()
    assert set(scored(name).top(2 / len(units)).names) == PAIR


def test_the_search_keeps_one_head():
    model, units, train, validation, _ = loaded()
    path = tls.sparsify(model, train, units, rounds=8, progress=False)
    for step in path.rounds:
        assert PAIR & set(step.reduction.circuit.names)  # never neither
    found = path.within(model, validation, ALLOWED)
    assert len(PAIR & set(found.circuit.names)) == 1
    assert accuracy(found) == 1
    other = (PAIR - set(found.circuit.names)).pop()
    [kept] = PAIR & set(found.circuit.names)
    assert accuracy(without(other)) == 1 and accuracy(without(other, kept)) <= 0.1
