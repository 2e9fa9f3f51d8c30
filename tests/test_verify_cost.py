"""What verification costs: batches, seeds, forward passes, and the pairs that a goal spares."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from helpers.equality import (
    BOTH,
    EQUALITY,
    LEFT,
    NEITHER,
    RIGHT,
    TRUE,
    Network,
    counted,
    drawn,
    pairs_of,
    removal,
)
from helpers.verification import PARITY, answered_by, native, native_pairs, row, stream_units, swapped

from tl_sparsify import (
    Alignment,
    Site,
    Unit,
    verify,
)


def test_batches_do_not_matter():
    frames = [
        verify(Network(blind=2), EQUALITY, TRUE, pairs_of(*drawn(13)), batch_size=size).to_frame()
        for size in (1, 5, None)
    ]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    pd.testing.assert_frame_equal(frames[0], frames[2], check_exact=True)


def test_the_same_seed_gives_the_same_evidence_and_another_one_other_controls():
    alignment = Alignment({"left": LEFT[:2]})
    same = [verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), seed=3).to_frame() for _ in range(2)]
    pd.testing.assert_frame_equal(*same, check_exact=True)
    evidence = [verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), seed=seed) for seed in range(5)]
    assert len({row(e, "left", intervention="random units").accuracy for e in evidence}) > 1
    assert len({row(e, "left").accuracy for e in evidence}) == 1


@pytest.mark.parametrize("draws", [0, 3])
def test_forward_passes_are_those_that_are_promised(draws: int):
    n, model, variables = 30, Network(), 3
    per_model = 2 + variables * (2 + draws) + (2 + 3 / 2) + (2 + draws)
    random = 2 + variables * 2 + (2 + 3 / 2)
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws))
    assert rows == n * (per_model + random)
    reduced = removal(model, LEFT[:1])
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws, reduced=reduced))
    assert rows == n * (2 * (per_model + 2) + random)
    _, rows = counted(model, lambda: verify(model, EQUALITY, TRUE, pairs_of(*drawn(n)), draws=draws, goal=0.95))
    assert rows == n * (per_model + random + 3 + variables)


def test_forward_passes_of_a_transformer_with_directions():
    n, model, layers, draws = 20, native(), 2, 3
    alignment = Alignment({"odd": stream_units(2, 0, 3), "more": stream_units(2, 1, slice(1, 3))})
    # all directions of each site are aligned, so there are no random ones
    per_model = 2 + 2 * (2 + layers) + (1 + draws) + (2 + 3 / 2) + (2 + draws)
    random = 2 + 2 * 2 + (2 + 3 / 2)
    _, rows = counted(model, lambda: verify(model, PARITY, alignment, native_pairs(n), draws=draws, batch_size=7))
    assert rows == n * (per_model + random)


@pytest.mark.parametrize("goal", [0.6, 0.95])
def test_with_a_goal_fewer_pairs_lead_to_the_same_decision(goal: float):
    stopped = []
    for units in (LEFT, RIGHT, LEFT[:2]):
        alignment, pairs = Alignment({"left": units, "same": [BOTH, NEITHER]}), pairs_of(*drawn(600, seed=1))
        whole, early = (
            verify(Network(), EQUALITY, alignment, pairs, draws=0, goal=wanted).to_frame() for wanted in (None, goal)
        )
        aligned = [f[(f.model == "original") & (f.intervention == "aligned units")] for f in (whole, early)]
        decisions = [list(zip(f.lower >= goal, f.upper < goal, strict=True)) for f in aligned]
        assert (early.pairs <= 600).all()
        assert decisions[0] == decisions[1]
        assert (early.pairs == 600).all() or all(any(decision) for decision in decisions[1])
        stopped.append(early.pairs.iloc[0])
    assert stopped[0] < 400


def test_with_a_goal_the_first_pairs_are_those_reported():
    base, source = drawn(1000)
    early = verify(Network(), EQUALITY, TRUE, pairs_of(base, source), goal=0.95, seed=2)
    taken = row(early, "left").pairs
    assert taken % 64 == 0 and taken < 300
    same = verify(Network(), EQUALITY, TRUE, pairs_of(base[:taken], source[:taken]), seed=2)
    pd.testing.assert_frame_equal(early.to_frame(), same.to_frame(), check_exact=True)


def test_what_stays_uncertain_takes_all_pairs():
    base, source = drawn(300)
    accuracy = (swapped(base, source, "left") == swapped(base, source, "right")).mean()
    evidence = verify(
        Network(), EQUALITY, Alignment({"left": RIGHT}), pairs_of(base, source), goal=float(accuracy), draws=0
    )
    assert row(evidence, "left").pairs == 300


def test_with_a_goal_positions_for_each_pair_stay_with_their_pair():
    pairs = answered_by(native(), native_pairs(320))
    where = torch.arange(320) % 4  # interchanging at 3 alone matters
    stream = Site("residual", 1, "blocks.1.hook_resid_post", 1, where)
    evidence = [
        verify(native(), PARITY, Alignment({"answer": [Unit(stream, 0)]}), pairs, goal=goal, draws=1)
        for goal in (0.6, None)
    ]
    taken = row(evidence[0], "answer").pairs
    assert taken < 320
    first = Site("residual", 1, "blocks.1.hook_resid_post", 1, where[:taken])
    again = verify(native(), PARITY, Alignment({"answer": [Unit(first, 0)]}), pairs[:taken], draws=1)
    pd.testing.assert_frame_equal(evidence[0].to_frame(), again.to_frame(), check_exact=True)
    placebos = [
        verify(native(), PARITY, Alignment({"answer": stream_units(2, 0, where)}), pairs, goal=goal, draws=2)
        for goal in (0.6, None)
    ]
    taken, whole = (row(e, "answer", intervention="norm-matched random subspace").pairs for e in placebos)
    assert taken < whole == 640
