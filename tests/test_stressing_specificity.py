"""Specificity: four heads of a network with four tasks, which one task needs and another one does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from helpers.models import unchanged

import tl_sparsify as tls
from tasks.multi_task.task import TASKS, subset
from tl_sparsify.stressing.measuring import Setting
from tl_sparsify.stressing.specificity import specificity
from tl_sparsify.stressing.table import Stand

SETTING = Setting(draws=10, bootstrap=200)
HEADS = ["L0H4", "L0H5", "L2H2", "L2H3"]


@cache
def network() -> tuple[Any, tls.Reduction, dict[str, tls.Examples]]:
    task = tls.load_task("multi_task")
    model = task.model()
    units = tls.heads(model)
    values = tls.constants.mean(model, task.examples(0)[0].sample(512), units)  # of all four tasks
    reduction = tls.constants.reduced(model, tls.Circuit.of(units, HEADS), values)
    return model, reduction, {name: subset(name)[2].sample(128) for name in TASKS}


def test_heads_are_specific_against_a_task_that_does_without_and_not_against_one_that_needs_them():
    model, reduction, test = network()
    others = {name: test[name] for name in ("greatest", "after")}
    with unchanged(model):
        greatest, after = specificity(model, reduction, test["count"], others, SETTING)
    assert (greatest.case, greatest.stand) == ("greatest", Stand.HOLDS) and greatest.value < greatest.control
    assert (after.case, after.stand) == ("after", Stand.FAILS) and after.low > after.control_high
    without = reduction.with_circuit(~reduction.circuit)
    for row in (greatest, after):
        assert row.value == pytest.approx(tls.risk(model, without, test[row.case]).mean, rel=1e-5)
        assert row.forward == SETTING.draws + 2 and row.n == 128


def test_what_harms_its_own_task_no_more_than_any_is_specific_to_nothing():
    model, reduction, test = network()
    [row] = specificity(model, reduction, test["greatest"], {"count": test["count"]}, SETTING)
    assert row.stand is Stand.UNKNOWN and "its own task" in row.because


def test_batches_change_no_number_and_nothing_is_asked_of_a_circuit_of_everything():
    model, reduction, test = network()
    rows = [
        specificity(
            model, reduction, test["count"], {"after": test["after"]}, Setting(draws=3, bootstrap=50, batch_size=size)
        )
        for size in (None, 50)
    ]
    assert rows[0][0].value == pytest.approx(rows[1][0].value, rel=1e-5)
    assert rows[0][0].high == pytest.approx(rows[1][0].high, rel=1e-5)
    whole = reduction.with_circuit(tls.Circuit.full(reduction.units))
    assert specificity(model, whole, test["count"], {"after": test["after"]}, SETTING) == ()
