"""Verification on networks whose every neuron is known: accuracies are worked out with the causal model alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.equality import (
    BOTH,
    DIFFERENT,
    EQUALITY,
    EVERY,
    LEFT,
    NEITHER,
    RIGHT,
    SAME,
    TRUE,
    UNREAD,
    Network,
    drawn,
    named,
    pairs_of,
)
from helpers.verification import answered, row, rows_of, swapped
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_sparsify import (
    Alignment,
    Site,
    Unit,
    verify,
)


def test_the_network_is_right_on_every_input():
    assert (answered(Network(), EVERY) == EQUALITY.run(named(EVERY))["same"]).all()


def test_the_true_alignment_has_accuracy_one_for_every_variable():
    base, source = drawn()
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    for variable in ("left", "right", "same"):
        found = row(evidence, variable)
        assert (found.accuracy, found.stderr, found.accuracy_changed) == (1.0, 0.0, 1.0)
        assert (found.pairs, found.retained, found.removed) == (400, 1.0, 0)
        assert found.units == len(TRUE.units[variable])
        assert evidence.accuracy(variable) == 1.0


def test_doing_nothing_is_right_where_the_variable_does_not_change_the_answer():
    base, source = drawn()
    plain = EQUALITY.run(named(base))["same"]
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, source))
    for variable in ("left", "right", "same"):
        found = row(evidence, variable, intervention="do nothing")
        unchanged = swapped(base, source, variable) == plain
        assert 0 < unchanged.mean() < 1
        assert found.accuracy == unchanged.mean()
        assert found.accuracy_changed == 0 and found.units == 0
        assert found.stderr == pytest.approx(unchanged.std() / np.sqrt(len(unchanged)))


def test_units_that_nobody_reads_do_as_well_as_doing_nothing():
    evidence = verify(Network(), EQUALITY, Alignment({"left": UNREAD, "same": UNREAD}), pairs_of(*drawn()))
    for variable in ("left", "same"):
        aligned, nothing = row(evidence, variable), row(evidence, variable, intervention="do nothing")
        assert (aligned.accuracy, aligned.accuracy_changed) == (nothing.accuracy, 0.0)
        assert (aligned.units, nothing.units) == (2, 0)


@pytest.mark.parametrize(
    ("units", "carried"), [(RIGHT, ("right",)), (LEFT + RIGHT, ("left", "right")), ([BOTH, NEITHER], ("same",))]
)
def test_units_of_another_variable_have_the_accuracy_that_the_causal_model_says(
    units: list[Unit], carried: tuple[str, ...]
):
    base, source = drawn()
    found = row(verify(Network(), EQUALITY, Alignment({"left": units}), pairs_of(base, source)), "left")
    wanted, given = swapped(base, source, "left"), swapped(base, source, *carried)
    changed = wanted != EQUALITY.run(named(base))["same"]
    assert found.accuracy == (wanted == given).mean() < 0.9
    assert found.accuracy_changed == (wanted == given)[changed].mean()


def test_half_of_a_variables_units_are_right_for_the_pairs_that_they_decide():
    base, source = drawn()
    found = row(verify(Network(), EQUALITY, Alignment({"left": LEFT[:1]}), pairs_of(base, source)), "left")
    one = (base[:, :2] == 0).all(1), (source[:, :2] == 0).all(1)
    left = EQUALITY.run(named(base))["left"].astype(int) - one[0] + one[1]  # the sum of the first layer's neurons
    total = left + EQUALITY.run(named(base))["right"]
    answers = np.maximum(total - 1, 0) + np.maximum(1 - total, 0) > 0.5
    assert found.accuracy == (answers == swapped(base, source, "left")).mean() < 1


class Parity(HookedRootModule):
    """The same answers over two symbols from the number of ones: no neurons carry ``left``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.hook_first = HookPoint()
        self.setup()
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.copy_(-torch.arange(4.0))
            self.out.weight.zero_()
            self.out.weight[DIFFERENT] = torch.tensor([1.0, -2.0, 2.0, -2.0])
            self.out.bias.copy_(torch.tensor([0.5, 0.0]))
        self.double().eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.hook_first(self.first(tokens.double()).relu()))


def test_a_model_without_the_variable_has_no_units_that_carry_it():
    two = np.array(list(itertools.product(range(2), repeat=4)))
    base, source = np.repeat(two, 16, 0), np.tile(two, (16, 1))
    site = Site("neuron", 0, "hook_first", 4)
    best: dict[str, float] = {"left": 0.0, "right": 0.0, "same": 0.0}
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            alignment = Alignment({name: [Unit(site, i) for i in chosen] for name in best})
            evidence = verify(Parity(), EQUALITY, alignment, pairs_of(base, source), draws=0)
            assert row(evidence, "left").retained == 1
            best = {name: max(best[name], evidence.accuracy(name)) for name in best}
    assert best["same"] == 1
    assert best["left"] == best["right"] < 0.7


def test_only_pairs_that_the_model_answers_right_on_both_inputs_count():
    base, source = drawn()
    evidence = verify(Network(blind=1), EQUALITY, TRUE, pairs_of(base, source))
    same = EQUALITY.run(named(base))["same"], EQUALITY.run(named(source))["same"]
    wrong = (base[:, 0] == 1) & same[0], (source[:, 0] == 1) & same[1]
    retained = ~(wrong[0] | wrong[1])
    assert 0.5 < retained.mean() < 1
    for variable in ("left", "right", "same"):
        wanted = swapped(base, source, variable)
        nothing = row(evidence, variable, intervention="do nothing")
        assert nothing.retained == retained.mean() and nothing.pairs == retained.sum()
        assert nothing.accuracy == (wanted == same[0])[retained].mean()
        aligned = row(evidence, variable)
        given = wanted & (base[:, 0] != 1)  # the blind neuron is not interchanged
        assert aligned.accuracy == (given == wanted)[retained].mean()
        changed = retained & (wanted != same[0])
        assert aligned.accuracy_changed == (given == wanted)[changed].mean()
        assert row(evidence, variable, intervention="random units").pairs == 5 * retained.sum()


def test_no_pair_retained_gives_no_number():
    different = EVERY[~EQUALITY.run(named(EVERY))["same"]][:20]
    model = Network()
    with torch.no_grad():
        model.out.bias[SAME] = 100.0
    evidence = verify(model, EQUALITY, TRUE, pairs_of(different, different))
    frame = rows_of(evidence, model="original")
    assert (frame.retained == 0).all() and (frame.pairs == 0).all()
    assert frame.accuracy.isna().all() and frame.accuracy_changed.isna().all() and frame.stderr.isna().all()


def test_pairs_in_which_no_answer_changes_have_no_accuracy_changed():
    base, _ = drawn(30)
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(base, base))
    frame = rows_of(evidence, model="original")
    frame = frame[~frame.intervention.isin(["arbitrary labels", "aligned units, a source each"])]  # others' answers
    assert (frame.accuracy == 1).all() and frame.accuracy_changed.isna().all()
