"""Text tasks for any tokenizer: which words count, rows, sentences, splits that never move, data and their tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.animals import (
    ANIMALS,
    KINDS,
    PLACES,
    SENTENCES,
    SIDES,
    SIZES,
    WORDS,
    byte_pairs,
    every_kind,
    task_of,
    tokenizer_of,
    without_model,
    word_level,
)
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify import text
from tl_sparsify.tasks.pairing import split_of

# Words


@every_kind
@given(st.sets(st.sampled_from(ANIMALS)))
def test_words_that_the_tokenizer_splits_or_does_not_know_are_left_out(kind: str, known: set[str]):
    words = ("the", *(word for word in ANIMALS if word in known))
    assert set(text.single_token_words(tokenizer_of(kind, words), ANIMALS)) == known


@every_kind
def test_single_words_stay_in_their_order_and_none_is_none(kind: str):
    assert text.single_token_words(tokenizer_of(kind), ["fox", "zebra", "cat"]) == ["fox", "cat"]
    assert text.single_token_words(tokenizer_of(kind), []) == []


@pytest.mark.parametrize("kind", ["byte pairs", "space before"])
def test_numbers_are_those_of_two_tokens(kind: str):
    tokenizer = tokenizer_of(kind, ("the", "17", "18", "32", "05"))
    found = text.two_token_numbers(tokenizer, ["17", "18", "19"], ["32", "05", "07"])
    heads_and_tails = [[(head, tail) for tail in ("32", "05", "07")] for head in ("17", "18", "19")]

    def pieces(head: str, tail: str) -> list[str]:
        ids = tokenizer(f"the {head}{tail}", add_special_tokens=False)["input_ids"]
        return [piece.strip("Ġ▁") for piece in tokenizer.convert_ids_to_tokens(ids)]

    expected = [[pieces(head, tail) == ["the", head, tail] for head, tail in row] for row in heads_and_tails]
    assert found.tolist() == expected and found.any() and not found.all()


def test_rows_of_words_are_drawn_from_their_lists_and_each_by_its_number():
    fields = {"first": ANIMALS, "place": PLACES, "number": (1, 2, 3)}
    few, many, other = text.draw_rows(fields, 50, 3), text.draw_rows(fields, 400, 3), text.draw_rows(fields, 50, 4)
    for name, words in fields.items():
        assert set(many[name].tolist()) == set(words)
        assert many[name][:50].tolist() == few[name].tolist() != other[name].tolist()
        assert (np.unique(many[name], return_counts=True)[1] > 400 / len(words) / 2).all()


def test_keys_number_the_words_of_the_fields_alone():
    some = {"first": np.array(["cat", "cat", "dog", "cat"]), "place": np.array(["barn", "wood", "barn", "barn"])}
    fields = {"first": ANIMALS, "place": PLACES}
    one, two, three, again = text.row_keys(some, fields).tolist()
    assert one == again and len({one, two, three}) == 3
    assert text.row_keys({**some, "other": some["place"]}, fields).tolist() == [one, two, three, one]
    every = {"first": np.repeat(ANIMALS, len(PLACES)), "place": np.tile(PLACES, len(ANIMALS))}
    assert sorted(text.row_keys(every, fields).tolist()) == list(range(len(ANIMALS) * len(PLACES)))


def test_templates_are_filled_row_by_row():
    some = {"first": np.array(["cat", "dog"]), "place": np.array(["barn", "wood"])}
    assert text.filled(["a {first}", "{place}: {first}, {first}"], some) == ["a cat", "wood: dog, dog"]


# Data


@every_kind
def test_sentences_hold_only_words_of_one_token(kind: str):
    known = ("the", "in", "saw", "who", ",", *ANIMALS[:8], *PLACES[:2])
    task = text.TextTask(replace(SENTENCES, sizes=dict.fromkeys(SIZES, 8)), without_model(tokenizer_of(kind, known)))
    assert task.words == {"first": ANIMALS[:8], "second": ANIMALS[:8], "place": PLACES[:2]}
    for some in task.rows:
        assert set(some["first"].tolist()) | set(some["second"].tolist()) <= set(ANIMALS[:8])
        assert set(some["place"].tolist()) <= set(PLACES[:2])
    assert task.choices == [f" {animal}" for animal in ANIMALS[:8]]
    for examples in (*task.examples(0), task.pairs(16, 0).base):
        assert examples.choices is not None and len(examples.choices) == 8


def test_an_output_without_a_space_is_a_choice_whatever_the_words():
    task = text.TextTask(
        replace(SENTENCES, outputs={"cat": " cat", "zebra": " zebra", "05": "05"}),
        without_model(tokenizer_of("byte pairs")),
    )
    assert task.choices == [" cat", "05"]


@every_kind
def test_no_sentence_occurs_twice_and_the_splits_do_not_depend_on_the_tokenizer_or_the_seed(kind: str):
    everywhere = {name: set() for name in SIZES}
    for words in (WORDS, [*WORDS[:13], *PLACES]):
        task = text.TextTask(replace(SENTENCES, sizes=dict.fromkeys(SIZES, 4)), without_model(KINDS[kind](words)))
        for seed in (0, 1):
            data = task.dataset(seed)
            found = [prompt for part in data.values() for prompt in part["prompt"]]
            assert len(set(found)) == len(found)
            for name in SIZES:
                everywhere[name] |= set(data[name]["prompt"])
        for name, some in zip(SIZES, task.rows, strict=True):
            prompts = text.filled(some["template"].tolist(), some)
            assert len(set(prompts)) == len(prompts)
            everywhere[name] |= set(prompts)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert everywhere[one] and not everywhere[one] & everywhere[other]


def test_the_key_decides_the_split():
    for number, some in enumerate(task_of("byte pairs").rows):
        assert (split_of(SENTENCES.key(some)) == number).all() and len(some["first"]) >= list(SIZES.values())[number]


def test_data_are_a_function_of_the_seed():
    task, again = task_of("byte pairs"), text.TextTask(SENTENCES, without_model(byte_pairs(WORDS)))
    for kind in (None, "swapped", "other_first"):
        one, same, other = task.dataset(3, kind), again.dataset(3, kind), task.dataset(4, kind)
        assert list(one) == list(SIZES) and [len(one[name]) for name in one] == list(SIZES.values())
        for name in SIZES:
            assert one[name].to_dict() == same[name].to_dict()
            assert set(one[name]["prompt"]) != set(other[name]["prompt"])
    assert task.pairs(16, 3).base.tokens.tolist() == again.pairs(16, 3).base.tokens.tolist()
    assert task.pairs(16, 3).base.tokens.tolist() != task.pairs(16, 4).base.tokens.tolist()


def test_random_states_are_left_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    task_of("byte pairs").examples(5)
    task_of("byte pairs").pairs(16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@every_kind
@pytest.mark.parametrize("counterfactual", [None, "swapped", "other_first"])
def test_columns_answers_and_counterfactuals(kind: str, counterfactual: str | None):
    task = task_of(kind)
    data = task.dataset(0, counterfactual)["train"]
    assert data.column_names == [
        "sentence", "first", "second", "prompt", "answer", "counterfactual_prompt", "counterfactual_answer",
    ]  # fmt: skip
    for row in data:
        assert row["prompt"] == row["sentence"].format(first=row["first"], second=row["second"])
        assert row["answer"] == f" {row['first']}"
        other = row["counterfactual_answer"].strip()
        second = row["first"] if counterfactual != "other_first" else row["second"]
        assert row["counterfactual_prompt"] == row["sentence"].format(first=other, second=second)
        assert other == row["second"] if counterfactual != "other_first" else other not in (row["first"], row["second"])
        one, two = task.tokenizer([row["prompt"], row["counterfactual_prompt"]], add_special_tokens=False)["input_ids"]
        assert len(one) == len(two)
    assert sum("in the" in prompt for prompt in data["prompt"]) == len(data) / 2, "as many of each cell"


def test_the_first_kind_of_counterfactual_is_the_usual_one():
    task = task_of("byte pairs")
    assert task.dataset(0)["test"].to_dict() == task.dataset(0, "swapped")["test"].to_dict()
    assert task.dataset(0)["test"].to_dict() != task.dataset(0, "other_first")["test"].to_dict()


def test_an_answer_is_held_against_what_the_task_says():
    against = replace(SENTENCES, held_against=lambda some: some["second"])
    data = text.TextTask(against, task_of("byte pairs").source).dataset(0, "other_first")["test"]
    assert data["counterfactual_answer"] == [f" {animal}" for animal in data["second"]]


@every_kind
@pytest.mark.parametrize("side", SIDES)
def test_examples_are_the_data_as_tokens(kind: str, side: Any):
    task = task_of(kind, padding_side=side)
    for examples, data in zip(task.examples(2), task.dataset(2).values(), strict=True):
        mask, other = examples.attention_mask, examples.counterfactual_tokens
        assert mask is not None and other is not None and examples.counterfactual_labels is not None
        assert mask[:, -1 if side == "left" else 0].all()
        for i, row in enumerate(data):
            for tokens, prompt in ((examples.tokens, row["prompt"]), (other, row["counterfactual_prompt"])):
                read = task.tokenizer.decode(tokens[i, mask[i]].tolist(), skip_special_tokens=True)
                assert read.replace(" ,", ",").strip() == prompt
            where = (examples.labels[i] != -100).nonzero().flatten()
            assert where.tolist() == [int(mask[i].nonzero().max())]
            for labels, answer in (
                (examples.labels, "answer"),
                (examples.counterfactual_labels, "counterfactual_answer"),
            ):
                assert task.tokenizer.decode([int(labels[i, where])]).strip() == row[answer].strip()


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {}])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_the_beginning_token_goes_first_where_it_is_wanted(special: dict[str, str], wanted: bool | None):
    task = text.TextTask(SENTENCES, without_model(word_level(WORDS, **special)), "right", prepend_bos=wanted)
    if wanted and not special:
        with pytest.raises(ValueError, match="prepend_bos is True, and the tokenizer has no beginning-of-sequence"):
            task.examples(0)
        return
    first = bool(special) if wanted is None else wanted
    for examples in (*task.examples(0), task.pairs(16, 0).base, task.pairs(16, 0).source):
        assert bool((examples.tokens[:, 0] == task.tokenizer.convert_tokens_to_ids("<s>")).all()) == first
