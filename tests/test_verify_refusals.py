"""Verification refuses what does not belong together, by name, and leaves the model as it came in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.equality import (
    EQUALITY,
    LEFT,
    RIGHT,
    SAME,
    TRUE,
    Network,
    drawn,
    pairs_of,
    removal,
)
from helpers.models import unchanged
from helpers.verification import NATIVE, PARITY, native, native_pairs, reduction_of_native, stream_units

from tl_sparsify import (
    Alignment,
    Examples,
    Pairs,
    Site,
    Unit,
    fingerprint,
    fold,
    verify,
)


def state_of(model: Any) -> tuple[Any, ...]:
    modules = [module.training for module in model.modules()]
    hooks = [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
    return fingerprint(model), modules, hooks, gradients, torch.get_rng_state().tolist()


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = Network()
    model.first.bias.requires_grad_(False)
    before = state_of(model)
    verify(model, EQUALITY, TRUE, pairs_of(*drawn(20)), reduced=removal(model, LEFT))
    assert state_of(model) == before and before[2] == []


def test_the_model_is_left_as_it_was_after_an_exception():
    model = Network()
    before = state_of(model)
    nowhere = Alignment({"left": [unit.at(1) for unit in LEFT]})  # the network has one position
    with pytest.raises(ValueError, match="positions 1 of hook_first lie outside an input of length 1"):
        verify(model, EQUALITY, nowhere, pairs_of(*drawn(20)), reduced=removal(model, RIGHT))
    assert state_of(model) == before and before[2] == []


def test_an_unknown_variable_is_refused_by_name():
    with pytest.raises(ValueError, match="alignment names 'middle'; the causal model has left, right, same"):
        verify(Network(), EQUALITY, Alignment({"left": LEFT, "middle": LEFT}), pairs_of(*drawn(8)))


def test_an_empty_alignment_is_refused():
    with pytest.raises(ValueError, match="alignment of 'right' is empty"):
        Alignment({"left": LEFT, "right": []})


def test_answers_without_a_token_are_refused():
    with pytest.raises(ValueError, match=r"answers has no token for the causal model's output \['False'\]"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(), answers={True: SAME}))


@pytest.mark.parametrize("which", ["model", "reduced"])
def test_a_model_in_training_mode_is_refused(which: str):
    model, small = native(), fold(native(), reduction_of_native([]))
    (model if which == "model" else small).train()
    with pytest.raises(ValueError, match=r"model is in training mode.*call model\.eval\(\)"):
        verify(model, PARITY, NATIVE, native_pairs(), reduced=small)


def test_units_of_another_model_are_refused():
    elsewhere = Alignment({"left": [Unit(Site("neuron", 0, "hook_third", 3), 0)]})
    with pytest.raises(ValueError, match="no hook point 'hook_third'"):
        verify(Network(), EQUALITY, elsewhere, pairs_of(*drawn(8)))
    larger = Alignment({"left": [Unit(Site("neuron", 0, "hook_first", 99), 50)]})
    with pytest.raises(ValueError, match=r"hook_first yields \(8, 8\); a site of 99 neuron units"):
        verify(Network(), EQUALITY, larger, pairs_of(*drawn(8)))


def test_a_reduction_of_another_model_is_refused():
    with pytest.raises(ValueError, match="reduction was made for the model"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), reduced=removal(Network(blind=0), LEFT))


def test_a_model_that_was_not_folded_is_refused_as_reduced():
    with pytest.raises(ValueError, match="give a model made by fold"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), reduced=Network())


def test_what_is_no_evidence_is_named():
    evidence = verify(Network(), EQUALITY, Alignment({"left": LEFT}), pairs_of(*drawn(8)))
    with pytest.raises(KeyError, match=r"no evidence for .*'right'.*there is.*'left'"):
        evidence.accuracy("right")


def test_reprs_are_one_line():
    evidence = verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)))
    assert "left 1.000 (original)" in repr(evidence) and "\n" not in repr(evidence)
    assert repr(TRUE) == "Alignment(left: 3 units, right: 3 units, same: 2 units)"
    assert TRUE.variables == ("left", "right", "same")


def changed_pairs(**changes: Callable[[Pairs], Any]) -> Pairs:
    whole = pairs_of(*drawn(8))
    parts = {name: getattr(whole, name) for name in ("base_inputs", "source_inputs", "base", "source", "answers")}
    return Pairs(**parts | {name: change(whole) for name, change in changes.items()})


def test_pairs_that_do_not_belong_together_are_refused():
    assert len(changed_pairs()) == 8
    with pytest.raises(ValueError, match="source has 5 examples, base 8: pairs need equal numbers"):
        changed_pairs(source=lambda pairs: pairs.source[:5])
    with pytest.raises(ValueError, match=r"source_inputs\['b'\] has 3 values for 8 pairs"):
        changed_pairs(source_inputs=lambda pairs: pairs.source_inputs | {"b": np.zeros(3)})
    several = torch.zeros(8, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="base has examples with several labels"):
        changed_pairs(base=lambda pairs: Examples(pairs.base.tokens, several))
    with pytest.raises(ValueError, match="source has examples with several labels"):
        changed_pairs(source=lambda pairs: Examples(pairs.source.tokens, several))


@pytest.mark.parametrize("goal", [0.0, 1.1, -1.0, float("nan")])
def test_a_goal_that_is_no_accuracy_is_refused(goal: float):
    with pytest.raises(ValueError, match=rf"goal is {goal}; an accuracy lies in \(0, 1\]"):
        verify(Network(), EQUALITY, TRUE, pairs_of(*drawn(8)), goal=goal)


@pytest.mark.parametrize("reduced", [None, "reduction", "folded"])
def test_a_transformer_is_left_as_it_came_in_whatever_happens(reduced: str | None):
    model = native()
    next(model.parameters()).requires_grad_(False)
    reduction = reduction_of_native(["L0H1", "L1N3"])
    small = fold(model, reduction)
    given = {None: None, "reduction": reduction, "folded": small}[reduced]
    outside = Alignment({"answer": stream_units(2, 0, 9)})  # the input has four positions
    with unchanged(model), unchanged(small):
        verify(model, PARITY, NATIVE, native_pairs(20), reduced=given, draws=1, goal=0.9)
        with pytest.raises(ValueError, match="lie outside an input of length 4"):
            verify(model, PARITY, outside, native_pairs(20), reduced=given, draws=1)
        with pytest.raises(ValueError, match="answers has no token"):
            pairs = native_pairs(20)
            few = Pairs(pairs.base_inputs, pairs.source_inputs, pairs.base, pairs.source, {0: 0})
            verify(model, PARITY, NATIVE, few, reduced=given, draws=1)
    state = torch.get_rng_state()
    verify(model, PARITY, NATIVE, native_pairs(20), reduced=given, draws=1)
    assert torch.equal(torch.get_rng_state(), state)
