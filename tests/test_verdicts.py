"""Verdicts on evidence whose numbers are written by hand, and on networks whose every neuron is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.equality import BOTH, EQUALITY, LEFT, NEITHER, RIGHT, TRUE, Network, drawn, pairs_of
from helpers.written import evidence, row

from tl_sparsify import Alignment, Evidence, verify
from tl_sparsify.abstraction.verdicts import Role, Verdict, accepted


def test_every_trained_model_has_a_verdict_on_every_variable_in_the_order_of_the_rows():
    table = evidence().verdicts()
    assert list(zip(table.model, table.variable, table.accepted, strict=True)) == [
        ("original", "left", True),
        ("original", "right", False),
        ("original", "left & right", True),
        ("original", "left & right (a source each)", True),
        ("reduced", "left", True),
        ("reduced", "right", False),
    ]


def test_a_verdict_is_a_row_of_the_table():
    assert evidence().verdict("left", "reduced") == Verdict(
        model="reduced", variable="left", accuracy=0.976, changed=0.955, lower=0.976 - 0.02, accepted=True,
        control="do nothing", control_accuracy=0.503, control_units=1.0, passing=(),
        units=7.0, removed=3, retained=0.875,
    )  # fmt: skip
    found = evidence(random={"accuracy": 0.97, "accuracy_changed": 0.96}).verdict("left")
    assert found.passing == (found.control,) == ("random weights",) and found.control_accuracy == 0.97
    assert math.isnan(Evidence(evidence().rows[6:7]).verdict("left & right").control_accuracy)


@pytest.mark.parametrize(
    ("accuracy", "changed", "fine"),
    [(0.95, 0.9, True), (0.9499, 1.0, False), (1.0, 0.8999, False), (1.0, math.nan, True), (math.nan, 1.0, False)],
)
def test_the_limits_belong_to_the_accepted_side(accuracy: float, changed: float, fine: bool):
    assert accepted(accuracy, changed) == fine


def test_what_was_not_judged_is_named():
    with pytest.raises(
        KeyError, match=r"no verdict on 'up' in the reduced model; there is one on .*'left', 'original'"
    ):
        evidence().verdict("up", "reduced")
    with pytest.raises(KeyError, match="random weights"):
        evidence().verdict("left", "random weights")
    assert Evidence(()).verdicts().empty and "accepted" in Evidence(()).verdicts()


def test_names_are_no_protocol():
    """The same evidence under other names has the same verdicts."""
    renamed = tuple(
        replace(r, intervention=f"method {i}", model={"random weights": "fresh"}.get(r.model, r.model))
        for i, r in enumerate(evidence().rows)
    )
    names = ["model", "variable", "accuracy", "accepted", "control_accuracy"]
    assert Evidence(renamed).verdicts()[names].equals(evidence().verdicts()[names])
    odd = Evidence((row("original", "do nothing", "v", 1.0, 1.0, role=Role.ALIGNED),))
    assert odd.verdict("v").accepted


def test_verify_says_what_each_row_is_for_and_judges_the_true_alignment_and_a_wrong_one():
    found = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn()))
    roles = {(r.intervention, r.role, r.sources_apart) for r in found.rows}
    assert roles == {
        ("aligned units", Role.ALIGNED, False),
        ("aligned units, a source each", Role.ALIGNED, True),
        ("do nothing", Role.CONTROL, False),
        ("random units", Role.CONTROL, False),
        ("arbitrary labels", Role.CONTROL, False),
        ("unaligned units, at random", Role.CHECK, False),
        ("all unaligned units", Role.UNALIGNED, False),
    }
    assert {r.model for r in found.rows if r.untrained} == {"random weights"}
    assert all(r.untrained == (r.model == "random weights") for r in found.rows)
    assert found.verdicts().accepted.all() and found.verdict("left").passing == ()
    wrong = verify(Network(), EQUALITY, Alignment({"left": RIGHT, "right": LEFT, "same": [BOTH, NEITHER]}),
                   pairs_of(*drawn()))  # fmt: skip
    assert [wrong.verdict(v).accepted for v in ("left", "right", "same")] == [False, False, True]
