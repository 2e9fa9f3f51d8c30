"""Verdicts on evidence whose numbers are written by hand, and on networks whose every neuron is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from helpers.carrier import PLACE, SUM, Carrier, sums
from helpers.equality import BOTH, EQUALITY, LEFT, NEITHER, RIGHT, TRUE, Network, drawn, pairs_of
from helpers.written import evidence, row

from tl_sparsify import Alignment, Evidence, verify
from tl_sparsify.abstraction.verdicts import Role, Verdict, accepted, verdicts


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
        units=7.0, removed=3, retained=0.875, tells_apart=0.5, is_answer=False,
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


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"tells_apart": 0.1}, "accepted"),  # the limit belongs to the accepted side
        ({"tells_apart": 0.0999}, "cannot tell"),
        ({"tells_apart": 0.0}, "cannot tell"),
        ({"tells_apart": 0.0, "is_answer": True}, "accepted"),
        ({"tells_apart": 0.0, "accuracy": 0.9}, "rejected"),  # neither the variable nor the answer is carried
        ({"tells_apart": math.nan}, "accepted"),  # as older versions wrote it
    ],
)
def test_a_high_accuracy_is_no_evidence_where_the_pairs_do_not_tell_the_variable_from_the_answer(
    changes: dict[str, Any], verdict: str
):
    found = evidence(original=changes)
    left = found.verdict("left")
    assert (left.verdict, left.accepted) == (verdict, verdict == "accepted")
    assert found.verdicts().verdict[0] == verdict and found.verdicts().accepted[0] == left.accepted
    assert found.verdict("left", "reduced").verdict == "accepted" and not found.verdict("left", "reduced").reservation
    if verdict == "cannot tell":
        share = "10.0%" if changes["tells_apart"] else "0.0%"
        assert left.reservation.startswith(f"{share} of the pairs tell left from the answer, fewer than 10%")
        assert "Give pairs whose source has another answer" in left.reservation
    elif changes.get("is_answer"):
        assert left.reservation.startswith("left is the answer or fixes it alone")
    else:
        assert left.reservation == ""


def test_a_table_without_the_share_is_judged_as_it_was():
    table = evidence().to_frame().drop(columns=["tells_apart", "is_answer", "changes"])
    assert verdicts(table).accepted.tolist() == evidence().verdicts().accepted.tolist()
    assert verdicts(table).tells_apart.isna().all() and set(verdicts(table).verdict) == {"accepted", "rejected"}


# Units that carry the answer


def test_pairs_tell_a_variable_from_the_answer_where_both_predict_different_outputs():
    # a from the source: 2 + 1, 3 + 0, 0 + 2, 1 + 1; the source's own answers: 3, 1, 2, 1
    pairs = sums([(0, 1), (1, 0), (0, 2), (1, 1)], [(2, 1), (3, 2), (0, 2), (1, 0)])
    assert pairs.expected(SUM, ("first",)).tolist() == [3, 3, 2, 2]
    assert pairs.tells_apart(SUM, ("first",)).tolist() == [False, True, False, True]
    assert not pairs.tells_apart(SUM, ("total",)).any() and not pairs.tells_apart(SUM, ("first", "total")).any()
    alignment = Alignment({"first": PLACE, "total": PLACE})
    found = verify(Carrier(), SUM, alignment, pairs, draws=0)
    for line in found.rows:
        if line.variable == "first" and line.intervention != "arbitrary labels":
            # 3 and 3 are another answer than the base's 1 and 1, then 2 and 2 are the base's own
            assert (line.tells_apart, line.is_answer, line.changes) == (0.5, False, 0.5), line.intervention
        elif line.variable == "total" and line.intervention != "arbitrary labels":
            assert (line.tells_apart, line.is_answer, line.changes) == (0.0, True, 0.5), line.intervention
        assert math.isnan(line.tells_apart) == (line.variable == "(none)")
    # what carries the answer is wrong on just the pairs that tell the two apart
    assert found.accuracy("first") == 0.5 and found.verdict("first").verdict == "rejected"
    assert found.accuracy("total") == 1 and found.verdict("total").verdict == "accepted"


def test_units_that_carry_the_answer_are_not_accepted_for_a_variable_by_pairs_that_share_the_rest():
    """With b the same on both sides, carrying a and carrying the answer is one and the same."""
    inputs = list(itertools.product(range(4), range(4)))
    base, source = zip(*((x, y) for x in inputs for y in inputs if x[1] == y[1]), strict=True)
    found = verify(Carrier(), SUM, Alignment({"first": PLACE}), sums([*base], [*source]), draws=0)
    verdict = found.verdict("first")
    assert (verdict.accuracy, verdict.tells_apart, verdict.verdict) == (1.0, 0.0, "cannot tell")
    assert not verdict.accepted and "tell first from the answer" in verdict.reservation


def test_with_a_source_each_the_answer_that_is_told_apart_least_counts():
    found = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn()), draws=0)
    joint = [line for line in found.rows if "&" in line.variable and line.model == "original"]
    together = {line.sources_apart: line for line in joint}
    assert together[False].is_answer and together[False].tells_apart == 0
    assert not together[True].is_answer and 0.1 < together[True].tells_apart < 0.9


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


def test_of_a_variable_that_changes_no_answer_nothing_is_told():
    found = evidence(original={"accuracy_changed": math.nan, "changes": 0.0})
    left = found.verdict("left")
    assert (left.verdict, left.accepted) == ("cannot tell", False)
    assert left.reservation.startswith("left changes the expected answer of no pair that counts")
    assert found.verdict("left", "reduced").accepted
    assert evidence(original={"accuracy_changed": math.nan, "accuracy": 0.9}).verdict("left").verdict == "rejected"
    same = drawn(60)[0]
    measured = verify(Network(), EQUALITY, TRUE, pairs_of(same, same), draws=1)
    assert measured.accuracy("left") == 1 and measured.verdict("left").verdict == "cannot tell"
