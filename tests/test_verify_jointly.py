"""Several variables interchanged at once, and all the units that no variable is aligned with."""

from __future__ import annotations

import numpy as np
from helpers.equality import (
    BOTH,
    EQUALITY,
    FIRST,
    LEFT,
    NEITHER,
    RIGHT,
    TRUE,
    Network,
    drawn,
    named,
    pairs_of,
    removal,
)
from helpers.verification import row, swapped

from tl_sparsify import (
    Alignment,
    Unit,
    verify,
)


def apart(base: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bases, and a source each for two variables, no two of which share a pair."""
    return base[0:-1:2], source[0:-1:2], source[1::2]


def test_variables_are_interchanged_jointly_from_one_source_and_from_a_source_each():
    base, source = drawn(401)
    crossed = Alignment({"left": RIGHT, "right": LEFT, "same": [BOTH, NEITHER]})
    for alignment, carried in ((TRUE, ("left", "right")), (crossed, ("right", "left"))):
        evidence = verify(Network(), EQUALITY, alignment, pairs_of(base, source), draws=1)
        for name, (bases, first, second) in (
            ("aligned units", (base, source, source)),
            ("aligned units, a source each", apart(base, source)),
        ):
            sources = {"left": named(first), "right": named(second)}
            wanted = EQUALITY.interchange(named(bases), sources)["same"]
            taken = dict(zip(carried, sources.values(), strict=True))
            given = EQUALITY.interchange(named(bases), taken)["same"]
            found = row(evidence, "left & right", intervention=name)
            assert (found.accuracy, found.units, found.removed) == ((given == wanted).mean(), 6, 0)
            assert found.pairs == len(bases) == (401 if name == "aligned units" else 200)
            changed = wanted != EQUALITY.run(named(bases))["same"]
            assert found.accuracy_changed == (given == wanted)[changed].mean()
            assert (found.accuracy == 1) == (alignment is TRUE or name == "aligned units")


def test_pairs_jointly_interchanged_are_right_on_all_their_inputs():
    base, source = drawn()
    evidence = verify(Network(blind=1), EQUALITY, TRUE, pairs_of(base, source), draws=0)

    def right(rows: np.ndarray) -> np.ndarray:
        return ~((rows[:, 0] == 1) & EQUALITY.run(named(rows))["same"])

    one = right(base) & right(source)
    each = np.logical_and.reduce([right(rows) for rows in apart(base, source)])
    assert row(evidence, "left & right").retained == one.mean()
    found = row(evidence, "left & right", intervention="aligned units, a source each")
    assert (found.retained, found.pairs) == (each.mean(), each.sum()) and found.pairs < one.sum() / 2


def test_only_variables_without_an_aligned_ancestor_go_together():
    for alignment, joint in (
        (Alignment({"left": LEFT, "same": [BOTH]}), set()),
        (Alignment({"same": [BOTH]}), set()),
        (Alignment({"right": RIGHT, "left": LEFT}), {"right & left"}),
    ):
        frame = verify(Network(), EQUALITY, alignment, pairs_of(*drawn(20)), draws=0).to_frame()
        assert {name for name in frame.variable if "&" in name} == joint


def test_a_reduction_without_the_units_of_a_variable_is_counted_jointly():
    model = Network()
    evidence = verify(model, EQUALITY, TRUE, pairs_of(*drawn(40)), reduced=removal(model, LEFT), draws=0)
    found = row(evidence, "left & right", "reduced")
    assert (found.units, found.removed) == (3, 3)


def test_units_that_no_variable_is_aligned_with_change_nothing_where_the_alignment_is_whole():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn()), draws=4)
    every = row(evidence, "(none)", intervention="all unaligned units")
    some = row(evidence, "(none)", intervention="unaligned units, at random")
    assert (every.accuracy, every.units, every.pairs) == (1, 4, 400)
    assert (some.accuracy, some.units, some.pairs) == (1, 4, 1600)
    assert np.isnan(every.accuracy_changed) and np.isnan(some.accuracy_changed)


def test_unaligned_units_that_matter_change_answers():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, Alignment({"left": LEFT}), pairs_of(base, source), draws=6)
    plain, given = EQUALITY.run(named(base))["same"], swapped(base, source, "right")
    every = row(evidence, "(none)", intervention="all unaligned units")
    some = row(evidence, "(none)", intervention="unaligned units, at random")
    assert (every.accuracy, every.units) == ((plain == given).mean(), 5)  # of the alignment's own hook point
    assert every.accuracy < some.accuracy < 1 and (some.units, some.pairs) == (3, 2400)


def test_an_alignment_with_everything_leaves_nothing_unaligned():
    every = [Unit(FIRST, i) for i in range(FIRST.size)]
    frame = verify(Network(), EQUALITY, Alignment({"left": every}), pairs_of(*drawn(20))).to_frame()
    assert "(none)" not in set(frame.variable)
