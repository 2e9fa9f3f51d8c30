"""Mechanisms: a network with four tasks has four groups of examples, one with a single mechanism one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.models import unchanged
from sklearn.metrics import adjusted_rand_score

import tl_sparsify as tls
from tl_sparsify.stressing.measuring import Setting, assigned, removing
from tl_sparsify.stressing.mechanisms import Mechanisms, mechanisms
from tl_sparsify.stressing.profiles import grouped

EQUALITY = ["L0H1", "L0H2", "L1H0", "L1H3", "L1N3", "L1N18", "L1N26"]


@cache
def four() -> tuple[Any, tls.Reduction, tls.Examples, tls.Examples]:
    """The network with four tasks, six of its heads, and train and test examples of all tasks."""
    task = tls.load_task("multi_task")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model)
    means = tls.constants.mean(model, train, units)
    scores = tls.score.risk(model, train.sample(256), units, values=means, temperature=3.0)
    return model, tls.constants.reduced(model, scores.top(6 / 18), means), train.sample(512), test.sample(512)


@cache
def one() -> tuple[Any, tls.Reduction, tls.Examples, tls.Examples]:
    """A network with one mechanism, and the units that it is made of."""
    task = tls.load_task("planted_equality")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    means = tls.constants.mean(model, train, units)
    return model, tls.constants.reduced(model, tls.Circuit.of(units, EQUALITY), means), train[:96], test[:96]


def agreement(groups: torch.Tensor, examples: tls.Examples) -> float:
    """With the task that the first token names."""
    return float(adjusted_rand_score(examples.tokens[:, 0].numpy(), groups.numpy()))


def test_profiles_tell_the_tasks_and_groups_are_nested():
    model, reduction, train, test = four()
    with unchanged(model):
        labels, groups = grouped(model, reduction, train, test, 5, Setting())
    assert agreement(labels[:, 3], train) >= 0.9 and agreement(groups[:, 3], test) >= 0.9
    for more, fewer in zip(labels.T[1:], labels.T, strict=False):
        assert len(torch.stack([more, fewer]).unique(dim=1).T) == len(more.unique()) == len(fewer.unique()) + 1


def test_batches_change_no_group():
    model, reduction, train, test = one()
    some = [grouped(model, reduction, train[:48], test[:20], 3, Setting(batch_size=size)) for size in (None, 7)]
    assert torch.equal(some[0][0], some[1][0]) and torch.equal(some[0][1], some[1][1])
    # a test example's group is its own business
    _, fewer = grouped(model, reduction, train[:48], test[10:20], 3, Setting())
    assert torch.equal(fewer, some[0][1][10:])


@pytest.mark.slow
def test_four_tasks_are_four_mechanisms():
    model, reduction, train, test = four()
    with unchanged(model):
        table = tls.stress(model, reduction, test, rows=("mechanisms",), train=train, draws=5, bootstrap=200)
    [line] = table["mechanisms"]
    found = table.details["mechanisms"]
    assert line.stand == "fails" and line.because.startswith("4 groups")
    assert found.count == 4 and agreement(found.groups, test) >= 0.9
    assert bool((found.cross.diag() <= found.cross.min(1).values).all())  # a group's own circuit is its best
    assert line.value == pytest.approx(float(found.risks[0] - found.risks[3]))
    for group, circuit in enumerate(found.circuits):
        mine = test[found.groups == group]
        risk = tls.risk(model, reduction.with_circuit(circuit), mine).mean
        assert len(circuit) == 6 and float(found.cross[group, group]) == pytest.approx(risk, rel=1e-5)
    # groups at random gain nothing
    assert line.control <= 0.01 < line.low


def test_a_single_mechanism_is_one_group():
    model, reduction, train, test = one()
    with unchanged(model):
        found = mechanisms(model, reduction, test, Setting(draws=5, bootstrap=100), train=train)
    assert isinstance(found, Mechanisms)
    assert found.count == 1 and found.rows[0].stand == "holds"
    assert not bool(found.groups.any()) and len(found.circuits) == 1


def test_where_random_circuits_do_as_well_one_group_says_nothing():
    """Without both heads of the backup task all circuits of idle units are the same."""
    task = tls.load_task("planted_backup")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    means = tls.constants.mean(model, train, units)
    idle = tls.constants.reduced(model, tls.Circuit.of(units, ["L0H0", "L1N3"]), means)
    copies = tls.Circuit.of(units, ["L0H1", "L1H2"])
    with tls.intervened(model, tls.Intervention(units, (~copies.mask).float(), means)):
        found = mechanisms(model, idle, test[:48], Setting(draws=3, bootstrap=50), train=train[:48])
    assert isinstance(found, Mechanisms) and found.rows[0].stand == "cannot tell"


def test_an_example_has_the_removal_of_its_column():
    model, reduction, _, test = one()
    few = test[:9]
    circuits = [reduction.circuit, tls.Circuit.of(reduction.units, ["L0H1"])]
    choices = torch.tensor([[0, 1, -1]] * 4 + [[1, 1, 0]] * 5)
    removals = [removing(reduction, circuit, few) for circuit in circuits]
    found = assigned(model, removals, choices, few, Setting(bootstrap=0, batch_size=4))
    each = [[tls.risk(model, reduction.with_circuit(one), few[i : i + 1]).mean for one in circuits] for i in range(9)]
    slow = [sum(0 if row[c] < 0 else each[i][row[c]] for i, row in enumerate(choices.tolist())) / 9 for c in range(3)]
    assert found.mean.tolist() == pytest.approx(slow, rel=1e-4, abs=1e-9)


def test_too_few_examples_are_left_out():
    model, reduction, train, test = one()
    table = tls.stress(model, reduction, test[:20], train=train[:20], rows=("mechanisms",))
    assert "at least 32" in table.left_out["mechanisms"]
    whole = reduction.with_circuit(tls.Circuit.full(reduction.units))
    assert "every one" in tls.stress(model, whole, test, rows=("mechanisms",)).left_out["mechanisms"]
