"""Splits that never move, partners, and pairs on which doing nothing is right for half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.core.examples import Examples
from tl_sparsify.tasks.pairing import balanced, labelled_examples, pairs, partners, split_of

SIZE = 8
SUM = CausalModel(
    inputs=("a", "b", "c"),
    mechanisms={
        "left": lambda a, b: a > b,
        "rest": lambda c: c % 2 == 0,
        "both": lambda left, rest: left & rest,
        "idle": lambda a: a,
        "answer": lambda both: both,
    },
    output="answer",
)
POOL = dict(zip("abc", np.indices((SIZE,) * 3).reshape(3, -1), strict=True))
keys = arrays.arrays(np.int64, st.integers(1, 50), elements=st.integers(0, 2**62))
counts = st.lists(st.integers(4, 15), min_size=2, max_size=9)


def encode(inputs: Mapping[str, np.ndarray]) -> Examples:
    tokens = torch.tensor(np.stack([inputs[name] for name in SUM.inputs], 1))
    return labelled_examples(
        tokens, torch.tensor(SUM.run(inputs)["answer"].astype(np.int64)), choices=torch.tensor([0, 1])
    )


def changes(inputs: dict[str, np.ndarray], base: np.ndarray, source: np.ndarray, variable: str) -> np.ndarray:
    """Whether interchanging the variable changes the answer, pair by pair and by hand."""
    own, other = ({name: values[index] for name, values in inputs.items()} for index in (base, source))
    value = SUM.run(other)[variable]
    return SUM.run(own, do={variable: value})["answer"] != SUM.run(own)["answer"]


@given(keys, st.permutations(range(50)))
def test_a_split_depends_on_nothing_but_the_number(numbers: np.ndarray, order: Sequence[int]):
    order = [i for i in order if i < len(numbers)]
    np.testing.assert_array_equal(split_of(numbers)[order], split_of(numbers[order]))
    np.testing.assert_array_equal(
        split_of(numbers), [int(split_of(numbers[i : i + 1])[0]) for i in range(len(numbers))]
    )


def test_splits_are_the_same_for_ever():
    assert split_of(np.arange(20)).tolist() == SPLITS


# Written down once: shipped models were trained on the inputs that these make training inputs.
SPLITS = [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 2, 0, 0]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 2**40))
def test_splits_have_the_shares_asked_for(shares: list[int], start: int):
    found = np.bincount(split_of(np.arange(start, start + 20_000), shares), minlength=len(shares)) / 20_000
    np.testing.assert_allclose(found, np.array(shares) / sum(shares), atol=0.02)
    assert len(found) == len(shares)


@given(counts, st.integers(0, 5))
def test_partners_are_a_derangement_and_half_have_another_answer(sizes: list[int], seed: int):
    assume(2 * max(sizes) <= sum(sizes) + 1)
    answers = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)) * 7, sizes))
    partner = partners(answers, seed)
    assert sorted(partner.tolist()) == list(range(len(answers)))
    assert (partner != np.arange(len(answers))).all()
    changed = int((answers[partner] != answers).sum())
    assert abs(changed - len(answers) / 2) <= (1 if any(size % 2 for size in sizes) else 0)


def test_partners_are_a_function_of_the_seed_and_of_words_alike():
    answers = np.array([0, 1, 1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(partners(answers, 1), partners(answers, 1))
    np.testing.assert_array_equal(partners(answers, 1), partners(np.array(["no", "yes"])[answers], 1))
    assert any((partners(answers, 1) != partners(answers, seed)).any() for seed in (2, 3, 4))


@pytest.mark.parametrize("sizes", [(9, 7), (12, 4, 6), (4, 3), (8,)])
def test_partners_that_cannot_be_found_are_refused(sizes: tuple[int, ...]):
    answers = np.repeat(np.arange(len(sizes)), sizes)
    with pytest.raises(ValueError, match=rf"answers are .*{sizes[0]}.*at least 4 times.*more than half"):
        partners(answers, 0)


@given(st.sets(st.sampled_from(["left", "rest", "both", "answer"]), min_size=1), st.integers(1, 150), st.integers(0, 9))
def test_every_variable_changes_the_answer_of_half_of_the_pairs(chosen: set[str], n: int, seed: int):
    base, source = balanced(SUM, POOL, sorted(chosen), n=2 * n, seed=seed)
    assert len(base) == len(source) == 2 * n
    assert (base != source).all()
    for variable in chosen:
        assert int(changes(POOL, base, source, variable).sum()) == n


@given(st.integers(0, 40), st.integers(0, 9))
def test_an_odd_number_of_pairs_is_balanced_within_one(n: int, seed: int):
    base, source = balanced(SUM, POOL, ("left", "rest"), n=2 * n + 1, seed=seed)
    for variable in ("left", "rest"):
        assert abs(int(changes(POOL, base, source, variable).sum()) - n - 0.5) <= 1


def test_combinations_of_changes_are_even_where_that_is_possible():
    base, source = balanced(SUM, POOL, ("left", "rest"), n=400, seed=0)
    left, rest = (changes(POOL, base, source, variable) for variable in ("left", "rest"))
    assert min(np.bincount(2 * left + rest, minlength=4)) >= 50


def test_pairs_hold_the_inputs_that_they_encode():
    found = pairs(SUM, POOL, encode, {True: 1, False: 0}, n=64, seed=3, variables=("left", "rest", "both"))
    assert len(found) == 64
    for inputs, examples in ((found.base_inputs, found.base), (found.source_inputs, found.source)):
        assert torch.equal(encode(dict(inputs)).tokens, examples.tokens)
        assert examples.labels[:, -1].tolist() == SUM.run(inputs)["answer"].astype(int).tolist()
    own = found.base.labels[:, -1]
    assert int((found.expected(SUM, ("left",)) == own).sum()) == 32


def test_pairs_are_a_function_of_the_seed_and_leave_the_random_state_alone():
    state = repr(np.random.get_state())
    draw = lambda seed: balanced(SUM, POOL, ("left",), n=32, seed=seed)  # noqa: E731
    for one, two in zip(draw(1), draw(1), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (draw(1)[0] != draw(2)[0]).any()
    assert repr(np.random.get_state()) == state


def test_a_variable_that_never_changes_the_answer_is_refused_by_name():
    with pytest.raises(ValueError, match="interchanging 'idle' changes the answer for none"):
        pairs(SUM, POOL, encode, {True: 1, False: 0}, n=16, seed=0)


def test_a_variable_that_always_changes_the_answer_is_refused_by_name():
    flip = CausalModel(inputs=("a",), mechanisms={"answer": lambda a: a}, output="answer")
    with pytest.raises(ValueError, match="interchanging 'answer' changes the answer for all"):
        balanced(flip, {"a": np.arange(9)}, ("answer",), n=16, seed=0)


def test_an_unknown_variable_is_refused_by_name():
    with pytest.raises(ValueError, match="lefft"):
        balanced(SUM, POOL, ("lefft",), n=16, seed=0)


def test_a_single_input_is_refused():
    with pytest.raises(ValueError, match="inputs holds 1 inputs"):
        balanced(SUM, {name: values[:1] for name, values in POOL.items()}, ("left",), n=16, seed=0)


def test_changes_that_exclude_each_other_are_refused_by_name():
    """Three variables of which exactly one counts for each base: no half of the pairs can be had for all three."""
    third = CausalModel(
        inputs=("kind", "x", "y", "z"),
        mechanisms={
            "first": lambda x: x,
            "second": lambda y: y,
            "third": lambda z: z,
            "answer": lambda kind, first, second, third: np.choose(kind, [first, second, third]),
        },
        output="answer",
    )
    pool = dict(zip(third.inputs, np.indices((3, 2, 2, 2)).reshape(4, -1), strict=True))
    with pytest.raises(ValueError, match=r"interchanging '(first|second|third)' would change the answer for .* of 60"):
        balanced(third, pool, ("first", "second", "third"), n=60, seed=0)


def test_a_pool_too_small_for_the_pairs_is_refused_with_the_remedy():
    """The variable is nearly always the same: its change is too rare among the candidates."""
    rare = CausalModel(inputs=("a",), mechanisms={"answer": lambda a: a == 0}, output="answer")
    with pytest.raises(ValueError, match=r"\d+ pairs too few .* that 4000 balanced pairs need: give a pool"):
        balanced(rare, {"a": np.arange(20_000)}, ("answer",), n=4000, seed=0)


def test_examples_are_answered_at_one_position():
    tokens = torch.arange(12).reshape(3, 4)
    last, second = (
        labelled_examples(tokens, torch.tensor([7, 8, 9])),
        labelled_examples(tokens, torch.tensor([7, 8, 9]), position=1),
    )
    assert last.labels.tolist() == [[-100, -100, -100, k] for k in (7, 8, 9)]
    assert second.labels.tolist() == [[-100, k, -100, -100] for k in (7, 8, 9)]
    assert last.choices is None and last.counterfactual_tokens is None
