"""What an accuracy is held against: random units, made-up answers, random weights, the placebo of TransformerLens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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
from helpers.verification import (
    PARITY,
    answered_by,
    basis_of,
    native,
    native_pairs,
    row,
    rows_of,
    stream_units,
    swapped,
)
from torch import Tensor
from transformer_lens.tools.analysis.interchange import (
    NormMatchedPlacebo,
    SubspaceInterchange,
    collect_activations,
    intervened_logits,
    random_basis,
)

from tl_sparsify import (
    Alignment,
    Examples,
    Site,
    Unit,
    heads,
    verify,
)
from tl_sparsify.abstraction.certificates import confidence_sequence


def test_random_weights_are_judged_on_all_pairs():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    frame = rows_of(evidence, model="random weights")
    assert set(frame.intervention) == {"aligned units", "aligned units, a source each", "do nothing"}
    assert [*frame.pairs] == [400 // (1 + ("each" in name)) for name in frame.intervention]  # two pairs are one draw
    assert (frame.retained < 1).all()
    assert (rows_of(evidence, model="random weights", intervention="aligned units").accuracy < 0.9).all()


def test_random_units_are_as_many_of_the_same_site_outside_the_alignment():
    alignment = Alignment({"same": [BOTH, NEITHER]})  # outside are the one that nobody reads and the blind one, silent
    evidence = verify(Network(), EQUALITY, alignment, pairs_of(*drawn()), draws=3)
    random, nothing = (row(evidence, "same", intervention=name) for name in ("random units", "do nothing"))
    assert (random.units, random.pairs, random.accuracy) == (2, 3 * 400, nothing.accuracy)


def test_random_units_are_outside_of_every_variable():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn()), draws=4)
    found, nothing = (row(evidence, "left", intervention=name) for name in ("random units", "do nothing"))
    # of eight units of the site three carry this variable and three another one: two are left, and nothing reads them
    assert FIRST.size - len(LEFT) - len(RIGHT) == found.units < len(LEFT)
    assert (found.pairs, found.accuracy) == (4 * 400, nothing.accuracy)


def test_random_units_are_those_of_the_model_that_is_tested():
    model = Network()
    alone = Alignment({"left": LEFT})
    for gone, units in ((RIGHT[:1], 3), (RIGHT, 2), ([*RIGHT, *LEFT[:2]], 1)):
        evidence = verify(model, EQUALITY, alone, pairs_of(*drawn(40)), reduced=removal(model, gone), draws=3)
        found = row(evidence, "left", "reduced", intervention="random units")
        assert (found.units, row(evidence, "left", intervention="random units").units) == (units, 3)
    every = [Unit(FIRST, i) for i in range(FIRST.size) if Unit(FIRST, i) not in LEFT]
    evidence = verify(model, EQUALITY, alone, pairs_of(*drawn(40)), reduced=removal(model, every), draws=3)
    assert rows_of(evidence, model="reduced", intervention="random units").empty


def test_no_draws_no_random_control():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(20)), draws=0)
    assert "random units" not in set(evidence.to_frame().intervention)


def test_bounds_are_a_confidence_sequence_and_contain_the_accuracy():
    base, source = drawn()
    alignment = Alignment({"left": RIGHT, "right": LEFT, "same": [BOTH, NEITHER]})
    for level in (0.05, 0.01):
        evidence = verify(Network(blind=2), EQUALITY, alignment, pairs_of(base, source), draws=3, level=level)
        assert evidence.level == level
        for found in evidence.rows:
            assert 0 <= found.lower <= found.accuracy <= found.upper <= 1
    right = [~((rows[:, 0] == 2) & EQUALITY.run(named(rows))["same"]) for rows in (base, source)]
    hits = (swapped(base, source, "same") & (base[:, 0] != 2)) == swapped(base, source, "same")
    lower, upper = confidence_sequence(torch.tensor(hits[right[0] & right[1]]).double(), level=0.01)
    found = row(evidence, "same")
    assert (found.lower, found.upper) == (float(lower[-1]), float(upper[-1]))


def test_random_controls_are_no_more_certain_than_their_pairs():
    most = Alignment({"left": [Unit(FIRST, i) for i in range(FIRST.size - 1)]})
    few, many = (verify(Network(), EQUALITY, most, pairs_of(*drawn(100)), draws=draws) for draws in (1, 40))
    one, more = (row(evidence, "left", intervention="random units") for evidence in (few, many))
    assert (one.pairs, more.pairs) == (100, 4000)
    # the draws are much alike, and of the same pairs: forty times as many make the bounds hardly narrower
    assert more.stderr > one.stderr / 3
    assert more.upper - more.lower > (one.upper - one.lower) / 3


def test_without_other_units_there_are_no_random_ones():
    every = Alignment({"left": [Unit(FIRST, i) for i in range(FIRST.size)]})
    evidence = verify(Network(), EQUALITY, every, pairs_of(*drawn(40)))
    assert rows_of(evidence, variable="left", intervention="random units").empty


def test_made_up_answers_are_right_by_chance():
    only, arbitrary = Alignment({"left": LEFT}), ("left", "original", "arbitrary labels")
    found = row(verify(Network(), EQUALITY, only, pairs_of(*drawn(1600)), draws=0), *arbitrary)
    assert 0.3 < found.accuracy < 0.7
    again = [
        row(verify(Network(), EQUALITY, only, pairs_of(*drawn(300)), draws=0, seed=seed), *arbitrary)
        for seed in (1, 1, 2)
    ]
    assert again[0].accuracy == again[1].accuracy != again[2].accuracy


def test_the_placebo_is_transformer_lens_own():
    pairs, model = answered_by(native(), native_pairs(300)), native()  # more than TransformerLens takes at once
    each = torch.arange(300) % 2 + 2
    for where in (3, each):
        alignment = Alignment({"answer": stream_units(3, 4, where)})
        found = [
            row(
                verify(model, PARITY, alignment, pairs, draws=3, seed=11, batch_size=size),
                *("answer", "original", "norm-matched random subspace"),
            )
            for size in (None, 70)
        ]
        assert str(found[0]) == str(found[1]) and (found[0].pairs, found[0].units) == (900, 3)
        places = each if isinstance(where, Tensor) else torch.full((300,), where)
        hook, hits = "blocks.0.hook_resid_post", []

        def logits(tokens: Tensor) -> Tensor:
            return model(tokens)[:, 3, :4]

        values = collect_activations(model, hook, pairs.source.tokens, logits, positions=places)
        for seed in (11, 12, 13):
            move = NormMatchedPlacebo(SubspaceInterchange(basis_of(3, 4)), random_basis(16, 3, seed))
            given = intervened_logits(model, hook, move, pairs.base.tokens, values, logits, positions=places)
            hits.append(given.argmax(1) == pairs.expected(PARITY, ("answer",)))
        assert found[0].accuracy == pytest.approx(float(torch.stack(hits).double().mean()), abs=1e-12)
        assert found[0].accuracy != row(verify(model, PARITY, alignment, pairs), "answer").accuracy


def test_other_units_have_no_placebo():
    hook = "blocks.0.hook_resid_post"
    for units in (
        stream_units(2, 0, None),
        stream_units(2, 0, (1, 3)),
        stream_units(1, 0, 3) + stream_units(1, 1, 3, "blocks.1.hook_resid_post"),
        [Unit(Site("residual", 0, hook, 1, 3), 0)],
    ):
        frame = verify(native(), PARITY, Alignment({"answer": units}), native_pairs(20), draws=1).to_frame()
        assert "norm-matched random subspace" not in set(frame.intervention)


def test_units_at_spans_are_where_their_positions_are():
    model, pairs = native(), native_pairs(40)

    def with_spans(side: Examples) -> Examples:
        return replace(side, spans={"first": torch.tensor([[1, 2]] * 40), "second": torch.tensor([[2, 3]] * 40)})

    pairs = replace(pairs, base=with_spans(pairs.base), source=with_spans(pairs.source))
    found, expected = (
        verify(
            model,
            PARITY,
            Alignment({"odd": [heads(model)["L0H0"].at(one)], "more": [heads(model)["L0H0"].at(two)]}),
            pairs,
            draws=2,
        )
        for one, two in (("first", "second"), (1, 2))
    )
    assert found.to_frame().equals(expected.to_frame())
    for variable in ("odd", "more"):
        assert row(found, variable, intervention="random units").units == 1
