"""Templates: leaving out a template that is another task costs more than leaving out random examples."""

from __future__ import annotations

import pytest
from helpers.models import unchanged

import tl_sparsify as tls
from tl_sparsify.stressing.measuring import Setting
from tl_sparsify.stressing.templates import across_templates

EQUALITY = ["L0H1", "L0H2", "L1H0", "L1H3", "L1N3", "L1N18", "L1N26"]
FEW = Setting(draws=4, bootstrap=100)


def planted() -> tuple[object, tls.Reduction, tls.Examples]:
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


def test_two_tasks_are_no_two_templates_of_one():
    task = tls.load_task("multi_task")
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model)
    means = tls.constants.mean(model, train, units)
    tokens = test.tokens[:, 0]
    both = test[(tokens == 12) | (tokens == 15)][:96]  # the first number, and how often the current one comes
    scores = tls.score.risk(model, both, units, values=means, temperature=3.0)
    reduction = tls.constants.reduced(model, scores.top(0.5), means)
    [line] = across_templates(model, reduction, both, both.tokens[:, 0].tolist(), FEW, rounds=3)
    assert isinstance(line, tls.StressRow) and line.stand == "fails" and line.value > line.control


def test_what_is_given_is_checked():
    model, reduction, test = planted()
    with pytest.raises(ValueError, match="3 entries for 96"):
        tls.stress(model, reduction, test, rows=("templates",), templates=["a", "b", "c"])
    for templates, said in ((None, "give templates"), (["a"] * 96, "one template")):
        table = tls.stress(model, reduction, test, rows=("templates",), templates=templates)
        assert said in table.left_out["templates"]
