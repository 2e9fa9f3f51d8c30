"""Modular addition: the clock's algebra, and the claim that directions carry what no few heads and neurons do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tl_sparsify as tls
from tasks.finding import any_directions, grown, heads, table
from tasks.modular_addition import task as addition

EVERY = addition.inputs_of(np.arange(addition.MODULUS**2))


def test_doubling_the_angle_of_the_added_waves_gives_the_waves_of_the_sum():
    found = addition.doubled(addition.wave(EVERY["a"]) + addition.wave(EVERY["b"]))
    np.testing.assert_allclose(found, addition.wave(EVERY["a"] + EVERY["b"]), atol=1e-9)


def test_the_vote_is_for_the_number_whose_waves_they_are():
    numbers = np.arange(addition.MODULUS)
    np.testing.assert_array_equal(addition.vote(addition.wave(numbers)), numbers)
    np.testing.assert_array_equal(addition.vote(addition.wave(numbers + addition.MODULUS)), numbers)


@pytest.mark.parametrize("name", ["clock", "sum", "digits"])
def test_the_models_that_add_give_the_sum(name: str):
    found = addition.task().causal_models[name].run(EVERY)["answer"]
    np.testing.assert_array_equal(found, (EVERY["a"] + EVERY["b"]) % addition.MODULUS)


def test_the_difference_is_another_answer():
    found = addition.DIFFERENCE.run(EVERY)["answer"]
    np.testing.assert_array_equal(found, (EVERY["a"] - EVERY["b"]) % addition.MODULUS)


def test_the_directions_are_orthonormal_and_two_for_each_frequency():
    for units in addition.task().alignment.units.values():
        [site] = {unit.site for unit in units}
        assert site.basis is not None and len(units) == site.size == 2 * len(addition.KEYS)
        torch.testing.assert_close(site.basis.T @ site.basis, torch.eye(site.size), atol=1e-5, rtol=0)


def test_pairs_may_be_of_another_part_and_for_another_model():
    train = addition.pairs(64, 1, "train", addition.DIGITS)
    index = train.base_inputs["a"] * addition.MODULUS + train.base_inputs["b"]
    assert (tls.pairing.split_of(index) == 0).all()
    own = train.base.labels[:, addition.ANSWER_POSITION]
    for variable in addition.DIGITS.variables:
        assert abs(int((train.expected(addition.DIGITS, (variable,)) == own).sum()) - 32) <= 1


@pytest.mark.slow
def test_directions_carry_the_waves_where_as_many_neurons_or_any_one_head_do_not():
    task, test, search = addition.task(), addition.pairs(512, 0), addition.pairs(512, 1, "validation")
    model = task.model()
    rank = 2 * len(addition.KEYS)
    [site] = tls.neurons(model).at(addition.ANSWER_POSITION).sites
    [chosen] = grown(model, task.causal_model, search, site, "waves", (rank,))
    few = {"neurons": chosen} | heads(model, addition.ANSWER_POSITION, "=", 1)
    few |= {
        f"random {hook}": any_directions(model, hook, addition.ANSWER_POSITION, rank, 0)
        for hook in addition.PLACES.values()
    }
    carried = table(model, task.causal_model, test, dict(task.alignment.units))
    assert carried["waves"].min() >= 0.95
    assert table(model, task.causal_model, test, few)["waves"].max() < 0.75
