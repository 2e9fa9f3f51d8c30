"""Templates: leaving out a template that is another task costs more than leaving out random examples."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.models import unchanged

import tl_sparsify as tls
from tl_sparsify.stressing.measuring import Setting
from tl_sparsify.stressing.templates import across_templates

EQUALITY = ["L0H1", "L0H2", "L1H0", "L1H3", "L1N3", "L1N18", "L1N26"]
FEW = Setting(draws=4, bootstrap=100)


def planted() -> tuple[Any, tls.Reduction, tls.Examples]:
    task = tls.load_task("planted_equality")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.mean(model, train, units)
    return model, tls.constants.reduced(model, tls.Circuit.of(units, EQUALITY), values), test[:96]


def test_templates_without_a_meaning_do_not_matter():
    model, reduction, test = planted()
    templates = ["ab"[number % 2] for number in range(len(test))]
    with unchanged(model):
        found = across_templates(model, reduction, test, templates, FEW, rounds=5)
    [line] = found
    assert isinstance(line, tls.StressRow) and line.stand == "holds" and line.case == "each of 2 left out"


@pytest.mark.slow
def test_four_tasks_are_no_templates_of_one():
    task = tls.load_task("multi_task")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    means = tls.constants.mean(model, train, units)
    scores = tls.score.risk(model, train.sample(128), units, values=means, temperature=3.0)
    reduction = tls.constants.reduced(model, scores.top(0.3), means)
    some = test.sample(240)
    names = some.tokens[:, 0].tolist()  # the token that says which task it is
    table = tls.stress(model, reduction, some, rows=("templates",), templates=names, draws=5, bootstrap=200)
    [line] = table["templates"]
    assert line.stand == "fails" and line.low > line.control_high


def test_what_is_given_is_checked():
    model, reduction, test = planted()
    with pytest.raises(ValueError, match="3 entries for 96"):
        tls.stress(model, reduction, test, rows=("templates",), templates=["a", "b", "c"])
    for templates, said in ((None, "give templates"), (["a"] * 96, "one template")):
        table = tls.stress(model, reduction, test, rows=("templates",), templates=templates)
        assert said in table.left_out["templates"]
