"""Pairs of a text task: balanced, of one split, with sources as the task says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.animals import (
    LAST,
    SEEN,
    SENTENCES,
    TEMPLATES,
    Rows,
    all_words,
    every_kind,
    other_first,
    task_of,
    tokenizer_of,
    without_model,
)
from jaxtyping import Bool
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_sparsify import load_task, text
from tl_sparsify.tasks.pairing import split_of

# Pairs


@every_kind
@pytest.mark.parametrize(("n", "seed"), [(128, 0), (9, 4)])
def test_pairs_are_balanced_for_the_variables_of_the_model_and_of_its_rivals(kind: str, n: int, seed: int):
    pairs = task_of(kind).pairs(n, seed)
    assert len(pairs) == len(pairs.base) == len(pairs.source) == n
    own = pairs.expected(SEEN, ())
    assert torch.equal(own, pairs.base.labels[pairs.base.labels != -100])
    for model in (SEEN, LAST):
        for variable in model.variables:
            changed = int((pairs.expected(model, (variable,)) != pairs.expected(model, ())).sum())
            assert abs(changed - n / 2) <= 1, variable


@pytest.mark.parametrize("split", [0, 1, 2])
def test_both_sides_of_a_pair_are_of_the_split_and_differ(split: int):
    task = task_of("byte pairs")
    pairs = task.pairs(64, 0, split)
    for inputs in (pairs.base_inputs, pairs.source_inputs):
        assert tuple(inputs) == SEEN.inputs
        assert (split_of(SENTENCES.key(inputs)) == split).all()
    assert (pairs.base.tokens != pairs.source.tokens).any(1).all()
    names = {"sentence": pairs.base_inputs["sentence"], "first": pairs.base_inputs["first"]}
    assert all("{first}" in sentence and first not in sentence for sentence, first in zip(*names.values(), strict=True))


def test_sources_are_made_as_the_task_says():
    def any_first(some: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
        template, other = rng.choice(TEMPLATES, len(some["first"])), other_first(some, words, rng)
        return {**other, "first": np.where(rng.random(len(template)) < 0.5, some["first"], other["first"])} | {
            "template": template
        }

    made = replace(SENTENCES, sources=any_first, rivals=())
    pairs = text.TextTask(made, task_of("byte pairs").source).pairs(64, 0)
    assert pairs.base_inputs["second"].tolist() == pairs.source_inputs["second"].tolist()
    assert pairs.base_inputs["sentence"].tolist() != pairs.source_inputs["sentence"].tolist()
    assert (split_of(SENTENCES.key(pairs.source_inputs)) == 2).all()
    with pytest.raises(ValueError, match="interchanging 'last' changes the answer for none of the pairs"):
        text.TextTask(replace(made, rivals=(LAST,)), task_of("byte pairs").source).pairs(64, 0)
    with pytest.raises(ValueError, match="interchanging 'seen' changes the answer for all of the pairs"):
        text.TextTask(replace(made, sources=other_first), task_of("byte pairs").source).pairs(64, 0)


def test_what_a_tokenizer_must_do_besides_is_asked_for():
    def no_toads(tokenizer: Any, some: Rows) -> Bool[np.ndarray, "n"]:
        assert len(tokenizer(["the"])["input_ids"]) == 1
        return some["first"] != "toad"

    task = text.TextTask(replace(SENTENCES, fits=no_toads), task_of("byte pairs").source)
    assert all("toad" not in some["first"] and "toad" in some["second"] for some in task.rows)


def one_token_a_digit() -> PreTrainedTokenizerFast:
    """Words, and digits apart, as in Llama 3's, Qwen's, Gemma's and SmolLM's."""
    words = [word for word in all_words() if not word.isdigit()]
    raw: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words, *"0123456789"])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def test_years_told_digit_by_digit_are_answered_by_the_first_digit_of_the_end():
    tokenizer = one_token_a_digit()
    task = load_task("greater_than", model=without_model(tokenizer))
    train, validation, test = task.examples(0)
    assert (len(train), len(validation), len(test)) == (1024, 256, 512)
    for examples in (train, validation, test):
        ids = examples.tokens[examples.tokens != 0] if examples.attention_mask is None else examples.tokens
        assert ids is not None and examples.choices is not None and len(examples.choices) == 9
        digits = [tokenizer.convert_ids_to_tokens(row) for row in examples.tokens.tolist()]
        told = [[piece for piece in row if piece.isdigit()] for row in digits]
        answers = tokenizer.convert_ids_to_tokens(examples.labels[:, -1].tolist())
        assert {len(row) for row in told} == {6} and all(row[:2] == row[4:] for row in told)
        for (_, _, tens, last, _, _), answer in zip(told, answers, strict=True):
            # in 1731 or 1732 most of the decade is left, in 1738 or 1739 none: the next one
            assert last in "1289" and answer == str(int(tens) + (last in "89"))
    pairs = task.pairs(64, 0)
    assert pairs.answers["35"] == tokenizer.convert_tokens_to_ids("3") and len(set(pairs.answers.values())) == 9
    for kind in ("other_year", "earliest"):
        counterfactual: Any = task.examples
        other = counterfactual(0, kind)[2]
        assert bool((other.counterfactual_labels[:, -1] != other.labels[:, -1]).any())


def test_numbers_are_told_digit_by_digit_where_each_digit_is_a_token():
    assert text.digit_by_digit(one_token_a_digit(), ["1732", "5"]).tolist() == [True, True]
    assert text.digit_by_digit(tokenizer_of("byte pairs", ("the", "17", "32")), ["1732"]).tolist() == [False]
    assert text.digit_by_digit(tokenizer_of("word level"), ["17"]).tolist() == [False]  # unknown
