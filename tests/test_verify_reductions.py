"""Verification of a reduction and of its folded model: what is removed is not interchanged, and the two agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.equality import (
    BOTH,
    EQUALITY,
    FIRST,
    LEFT,
    NEITHER,
    RIGHT,
    SECOND,
    TRUE,
    UNITS,
    UNREAD,
    Network,
    drawn,
    named,
    pairs_of,
    removal,
)
from helpers.verification import (
    AGREEMENT,
    NATIVE,
    PARITY,
    answered,
    answered_by,
    native,
    native_pairs,
    reduction_of_native,
    row,
    stream_units,
    swapped,
)

from tl_sparsify import (
    Alignment,
    Circuit,
    Reduction,
    Site,
    Unit,
    Units,
    Values,
    attentions,
    constants,
    fingerprint,
    fold,
    heads,
    mlps,
    neurons,
    run_values,
    verify,
)


def test_removed_aligned_units_are_not_interchanged_and_are_counted():
    base, source = drawn()
    model = Network()
    reduction = removal(model, [LEFT[0], RIGHT[1], RIGHT[2]])
    evidence = verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=reduction)
    assert [row(evidence, v, "reduced").removed for v in ("left", "right", "same")] == [1, 2, 0]
    assert [row(evidence, v, "reduced").units for v in ("left", "right", "same")] == [2, 1, 2]
    assert [row(evidence, v).removed for v in ("left", "right", "same")] == [0, 0, 0]
    assert evidence.accuracy("left") == 1

    def seen(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b, c, d = rows.T
        return (a == b) & (a != 0), (c == d) & (c == 0)

    (left, right), (other, _) = seen(base), seen(source)
    right_on_both = ((left == right) == EQUALITY.run(named(base))["same"]) & (
        (seen(source)[0] == seen(source)[1]) == EQUALITY.run(named(source))["same"]
    )
    found = row(evidence, "left", "reduced")
    assert found.retained == right_on_both.mean() < 1
    assert found.accuracy == ((other == right) == swapped(base, source, "left"))[right_on_both].mean()


def test_all_aligned_units_removed_is_doing_nothing():
    model = Network()
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=removal(model, LEFT))
    aligned, nothing = row(evidence, "left", "reduced"), row(evidence, "left", "reduced", "do nothing")
    assert (aligned.units, aligned.removed) == (0, 3)
    assert aligned.accuracy == nothing.accuracy


def test_the_interchange_of_a_reduction_takes_values_of_the_reduced_models_own_run():
    base, source = drawn()
    model = Network()
    reduction = removal(model, LEFT, value=1.0)  # a = b three times over: BOTH is then positive, whatever the input
    evidence = verify(model, EQUALITY, Alignment({"same": [BOTH, NEITHER]}), pairs_of(base, source), reduced=reduction)
    assert (answered(model, base, reduction)).all()
    retained = EQUALITY.run(named(base))["same"] & EQUALITY.run(named(source))["same"]
    found = row(evidence, "same", "reduced")
    assert found.pairs == retained.sum() and found.accuracy == 1


def test_units_of_which_the_reduction_knows_nothing_are_still_there():
    model = Network()
    first = Units((FIRST,))
    values = Values(first, (torch.zeros(FIRST.size, 1, dtype=torch.float64),))
    reduction = Reduction(~Circuit.of(first, UNREAD[:1]), values)
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=reduction)
    found = row(evidence, "same", "reduced")
    assert (found.accuracy, found.units, found.removed) == (1.0, 2, 0)


@pytest.mark.parametrize(
    "gone",
    [
        [],
        ["L0H1", "L0H2", *(f"L1N{i}" for i in range(10)), "L0N3"],
        ["L0H0", "L0H2", *(f"L1N{i}" for i in range(20)), "L0N0", "L0N1"],
    ],
)
def test_a_reduction_and_its_folded_model_give_the_same_evidence(gone: list[str]):
    model, reduction = native(), reduction_of_native(gone)
    pairs = answered_by(model, native_pairs(), reduction)
    frames = [
        verify(model, PARITY, NATIVE, pairs, reduced=reduced, draws=2, seed=5).to_frame()
        for reduced in (reduction, fold(model, reduction))
    ]
    risks = [frame.pop("risk") for frame in frames]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    pd.testing.assert_series_equal(*risks, rtol=1e-5, atol=1e-6)  # norms are in float32
    original, reduced = (frames[1][frames[1].model == name] for name in ("original", "reduced"))
    removed = {v: sum(unit.at(None).name in gone for unit in NATIVE.units[v]) for v in NATIVE.variables}
    aligned = reduced[(reduced.intervention == "aligned units") & reduced.variable.isin(NATIVE.variables)]
    assert dict(zip(aligned.variable, aligned.removed, strict=True)) == removed
    assert (reduced.retained == 1).all()
    assert not gone or 0 < original.retained.iloc[0] < 1


def test_the_residual_stream_of_a_folded_model_is_still_there():
    stream = Alignment({"answer": [Unit(Site("residual", 1, "blocks.1.hook_resid_post", 1, 3), 0)]})
    reduction = reduction_of_native(["L0H0", "L1N3", "L1N4"])
    for reduced in (reduction, fold(native(), reduction)):
        found = row(verify(native(), PARITY, stream, native_pairs(), reduced=reduced), "answer", "reduced")
        assert (found.accuracy, found.units, found.removed) == (1.0, 1, 0)


def test_a_reduction_that_keeps_everything_agrees_with_the_original():
    model = Network()
    for reduced in (removal(model, []), removal(model, UNREAD, value=3.0)):
        found = row(verify(model, EQUALITY, TRUE, pairs_of(*drawn()), reduced=reduced), "(none)", "reduced", AGREEMENT)
        assert (found.accuracy, found.risk, found.pairs, found.retained) == (1, 0, 400, 1)
        assert found.units == pytest.approx(0.1 * reduced.circuit.mask.sum())
    both = verify(native(), PARITY, NATIVE, native_pairs(), reduced=fold(native(), reduction_of_native([])))
    found = row(both, "(none)", "reduced", AGREEMENT)
    assert found.accuracy == 1 and found.risk == pytest.approx(0, abs=1e-9) and found.units == pytest.approx(4.8)


def test_agreement_and_risk_are_those_of_random_interchanges_by_hand():
    base, source = drawn(1000, seed=3)
    model = Network()
    second = [Unit(SECOND, i) for i in range(SECOND.size)]
    reduced = removal(model, second)  # answers "different", whatever the input: logits 0 and 0.5
    found = row(verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=reduced), "(none)", "reduced", AGREEMENT)

    def first(rows: np.ndarray) -> np.ndarray:
        a, b, c, d = rows.T
        return np.stack([a == b] * 3 + [c == d] * 3, 1) & (np.stack([a] * 3 + [c] * 3, 1) == np.tile(range(3), 2))

    rng = np.random.default_rng(0)
    same, risk = [], []
    for _ in range(50):
        mixed = np.where(rng.random((1000, 6)) < 0.1, first(source), first(base)).sum(1)
        logit = np.maximum(mixed - 1, 0) + np.maximum(1 - mixed, 0) - 0.5
        p = 1 / (1 + np.exp(-logit))
        q = 1 / (1 + np.exp(0.5))
        same.append(logit < 0)
        risk.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    assert found.units == pytest.approx(0.8) and found.pairs == 1000
    assert abs(found.accuracy - np.mean(same)) < 4 * np.std(same) / np.sqrt(1000)
    assert abs(found.risk - np.mean(risk)) < 4 * np.std(risk) / np.sqrt(1000)


def test_a_reduction_that_keeps_nothing_is_compared_without_interchange():
    model = Network()
    every = [Unit(site, i) for site in UNITS.sites for i in range(site.size)]
    base, source = drawn()
    found = row(
        verify(model, EQUALITY, TRUE, pairs_of(base, source), reduced=removal(model, every)),
        *("(none)", "reduced", AGREEMENT),
    )
    assert (found.units, found.accuracy) == (0, (~EQUALITY.run(named(base))["same"]).mean())


def test_the_margin_bound_is_that_of_the_two_models_logits():
    pairs = pairs_of(*drawn(300))
    model = Network()
    reduction = Reduction(
        Circuit(UNITS, torch.ones(len(UNITS), dtype=torch.bool)),
        Values(UNITS, (torch.zeros(FIRST.size, 1), torch.zeros(SECOND.size, 1))),
        fingerprint=fingerprint(model),
    )
    [row] = [r for r in verify(model, EQUALITY, TRUE, pairs, reduced=reduction).rows if "kept units" in r.intervention]
    assert row.margin_bound == 0 and row.accuracy == 1  # nothing removed: no logit moves
    mask = torch.ones(len(UNITS), dtype=torch.bool)
    mask[0] = False
    smaller = Reduction(Circuit(UNITS, mask), reduction.values, fingerprint=fingerprint(model))
    [row] = [r for r in verify(model, EQUALITY, TRUE, pairs, reduced=smaller).rows if "kept units" in r.intervention]
    assert 1 - row.accuracy <= row.margin_bound <= 1


def test_removed_units_take_each_run_s_counterfactual_in_every_control():
    """The same counterfactual for all: its values at a position are constants, and so is what each control finds."""
    model, pairs = native(), native_pairs(40)
    other = torch.tensor([[5, 4, 3, 2]]).expand(40, -1)
    pairs = replace(
        pairs,
        base=replace(pairs.base, counterfactual_tokens=other),
        source=replace(pairs.source, counterfactual_tokens=other),
    )
    units = heads(model).at(1)
    paired = constants.counterfactual(model, pairs.base, units)
    constant = Values(units, tuple(v[0, 1] for v in run_values(model, pairs.base.counterfactuals[:1], units).tensors))
    circuit = ~Circuit.of(units, [units.names[1], units.names[2]])
    alignment = Alignment({"odd": stream_units(2, 0, 1), "more": [heads(model)["L0H0"].at(2)]})
    found, expected = (
        verify(model, PARITY, alignment, pairs, reduced=constants.reduced(model, circuit, values), draws=2).to_frame()
        for values in (paired, constant)
    )
    assert "norm-matched random subspace" in set(found[found.model == "reduced"].intervention)
    pd.testing.assert_frame_equal(found, expected)


def test_a_single_choice_is_never_another():
    pairs = native_pairs(40)
    zero = ((pairs.base.labels[:, 3] == 0) & (pairs.source.labels[:, 3] == 0)).nonzero().flatten()
    pairs = pairs[zero]
    pairs = replace(
        pairs,
        base=replace(pairs.base, choices=torch.tensor([0])),
        source=replace(pairs.source, choices=torch.tensor([0])),
    )
    found = row(
        verify(native(), PARITY, NATIVE, pairs, reduced=reduction_of_native(["L0H1"]), draws=1),
        "(none)", "reduced", AGREEMENT,
    )  # fmt: skip
    assert (found.accuracy, found.margin_bound) == (1.0, 0.0)


@pytest.mark.parametrize("gone", ["L0ATTN", "L0MLP"])
@pytest.mark.parametrize("piecewise", [False, True])
def test_parts_of_a_removed_layer_and_the_layer_itself_are_gone_in_reduction_and_fold(gone: str, piecewise: bool):
    model, pairs = native(), native_pairs(40)
    family, whole, part = (heads, attentions, "L0H1") if gone == "L0ATTN" else (neurons, mlps, "L0N1")
    units = family(model) if piecewise else whole(model)
    removed = [name for name in units.names if name.startswith("L0")]
    values = constants.mean(model, pairs.base, units)
    reduction = constants.reduced(model, ~Circuit.of(units, removed), values)
    alignment = Alignment({"odd": [family(model)[part].at(2)], "more": [whole(model)[gone].at(2)]})
    for tested in (reduction, fold(model, reduction)):
        found = verify(model, PARITY, alignment, pairs, reduced=tested, draws=0)
        for variable in ("odd", "more"):
            line = row(found, variable, "reduced")
            assert (line.units, line.removed) == (0, 1) and row(found, variable).units == 1
