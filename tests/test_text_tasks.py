"""The text tasks: cards, labels, counterfactuals and pairs.

Sentences are read again here, by the templates, and not as the tasks made them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cards import HEADINGS, card, section, single
from helpers.places import loaded
from helpers.sentences import (
    MODULES,
    SPLITS,
    data_of,
    every_task,
    own_tokenizer,
    pairs_of,
    read,
    split_of_rows,
    splits,
)

from tasks.docstring import task as docstring
from tasks.greater_than import task as greater_than
from tasks.ioi import task as ioi
from tl_sparsify import (
    Examples,
    list_tasks,
    load_task,
)
from tl_sparsify.tasks import language_models

FOLDER = Path(__file__).parent.parent / "tasks"


def kinds(name: str) -> tuple[str, ...]:
    return tuple(MODULES[name].SENTENCES.counterfactuals)


def right(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The right answers, worked out here and not by the causal models."""
    men = set(ioi.WORDS["men"])
    plurals = {plural for _, plural in ioi.WORDS["nouns"]}
    found = {
        "ioi": lambda row: row["second"] if row["third"] == row["first"] else row["first"],
        "greater_than": lambda row: next(end for end in greater_than.ENDS if int(end) > int(row["year"])),
        "gendered_pronoun": lambda row: "he" if row["name"] in men else "she",
        "subject_verb_agreement": lambda row: "are" if row["noun"] in plurals else "is",
        "docstring": lambda row: row["abcd"[row["documented"]]],
    }[name]
    space = "" if name == "greater_than" else " "
    return [space + found(row) for row in rows]


def rows_of(name: str, prompts: Sequence[str]) -> list[dict[str, Any]]:
    rows = [read(name, prompt) for prompt in prompts]
    assert all(row is not None for row in rows), next(p for p, row in zip(prompts, rows, strict=True) if row is None)
    return [row for row in rows if row is not None]


def prompts_of(name: str, examples: Examples, counterfactual: bool = False) -> list[str]:
    """The tokens as text again."""
    tokens = examples.counterfactual_tokens if counterfactual else examples.tokens
    assert tokens is not None
    return own_tokenizer().batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def words_of(labels: torch.Tensor) -> list[str]:
    return own_tokenizer().batch_decode(torch.tensor(single(labels))[:, None])


# What the task is


def test_the_text_tasks_are_those_without_a_model_of_their_own():
    own = {path.parent.name for path in FOLDER.glob("*/task.py") if (path.parent / "model").is_dir()}
    assert set(list_tasks()) - own == set(MODULES)


@every_task
def test_the_card_has_its_parts_and_draws_the_causal_model(name: str):
    task, said = loaded(name), card(name)
    found = re.findall(r"^## (.+)$", said, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    assert all(len(section(name, heading).split()) >= 5 for heading in HEADINGS)
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", said)
    for line in task.causal_model.graph().splitlines():
        assert "-->" not in line or line.strip() in said
    assert all(f"`{rival}`" in said for rival in task.causal_models if task.causal_models[rival] != task.causal_model)
    assert " / ".join(f"{len(examples):,}" for examples in splits(name).values()) in said
    assert all(f"`{kind}`" in said for kind in kinds(name)), "a counterfactual is not told of"


@every_task
def test_a_task_has_a_model_and_a_thousand_examples_under_any_seed(name: str):
    task = load_task(name)
    assert task.model() is not None and sum(map(len, task.examples(9))) >= 1000


@every_task
def test_competing_models_have_the_same_inputs_and_right_ones_the_same_answers(name: str):
    task = loaded(name)
    assert (task.name, task.ablation, dict(task.truth)) == (name, "mean", {}) and task.description
    assert task.causal_model in task.causal_models.values()
    assert task.wrong and set(task.wrong) < set(task.causal_models)
    inputs = pairs_of(name).base_inputs
    answers = task.causal_model.run(inputs)[task.causal_model.output]
    for rival, model in task.causal_models.items():
        assert model.inputs == task.causal_model.inputs
        same = float((model.run(inputs)[model.output] == answers).mean())
        assert rival in task.wrong or same == 1, rival
    assert task.causal_model not in [task.causal_models[wrong] for wrong in task.wrong]
    variables = {model.variables for model in task.causal_models.values()}
    assert {rival.variables for rival in MODULES[name].SENTENCES.rivals} <= variables


# Data


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_answers(name: str, split: str):
    data, examples = data_of(name)[split], splits(name)[split]
    rows = rows_of(name, data["prompt"])
    assert prompts_of(name, examples) == data["prompt"]
    assert words_of(examples.labels) == data["answer"] == right(name, rows)
    model, tokens = loaded(name).causal_model, pairs_of(name, 16).answers
    for column in model.inputs[1:]:
        assert data[column] == [row[column] for row in rows]
    inputs = {column: np.array(data[column]) for column in model.inputs}
    assert [tokens[value] for value in model.run(inputs)[model.output].tolist()] == single(examples.labels)


@every_task
def test_the_rest_of_a_sentence_is_its_words_too(name: str):
    data = data_of(name)["test"]
    inputs = loaded(name).causal_model.inputs
    assert inputs[0] == "sentence"
    for i, (sentence, prompt) in enumerate(zip(data["sentence"], data["prompt"], strict=True)):
        assert sentence.format(**{column: data[column][i] for column in inputs[1:]}) == prompt


@every_task
def test_counterfactuals_are_what_they_are_called(name: str):
    for kind in kinds(name):
        data = data_of(name, kind)["test"]
        examples = splits(name, kind)["test"]
        assert prompts_of(name, examples, counterfactual=True) == data["counterfactual_prompt"]
        assert examples.counterfactual_labels is not None
        assert words_of(examples.counterfactual_labels) == data["counterfactual_answer"]
        base, other = rows_of(name, data["prompt"]), rows_of(name, data["counterfactual_prompt"])
        assert all(one["template"] == two["template"] for one, two in zip(base, other, strict=True))
        answers, held_against = data["answer"], data["counterfactual_answer"]
        if kind in ("swapped", "other_year", "earliest", "other_gender", "other_number", "moved", "other_arguments"):
            assert held_against == right(name, other)
        if kind not in ("earliest", "other_arguments"):
            assert all(one != two for one, two in zip(answers, held_against, strict=True))
        changed = [{slot for slot in one if one[slot] != two[slot]} for one, two in zip(base, other, strict=True)]
        allowed = {
            "swapped": {"third"},
            "another": {"third"},
            "other_year": {"year"},
            "earliest": {"year"},
            "other_gender": {"name"},
            "other_friend": {"other"},
            "other_number": {"noun"},
            "other_attractor": {"other"},
            "moved": {"a", "b", "c", "d"},
            "other_arguments": {"a", "b", "c", "d"},
        }[kind]
        assert set().union(*changed) == allowed
        assert kind in ("earliest", "other_arguments") or all(changed), "a counterfactual that is the sentence itself"
        if kind == "another":
            assert held_against == [f" {row['third']}" for row in base]
            assert all(row["third"] not in (row["first"], row["second"]) for row in other)
        if kind in ("other_friend", "other_attractor"):
            assert right(name, other) == answers, "it must not matter"
        if kind == "earliest":
            assert {row["year"] for row in other} == {"02"}
        if kind == "moved":
            assert all(
                {one[x] for x in "abcd"} == {two[x] for x in "abcd"} for one, two in zip(base, other, strict=True)
            )
        if kind == "other_attractor":
            stem = {word: number for number, pair in enumerate(ioi.WORDS["nouns"]) for word in pair}
            assert all(stem[one["other"]] == stem[two["other"]] for one, two in zip(base, other, strict=True))


@every_task
def test_no_sentence_occurs_twice_and_no_seed_moves_one_to_another_split(name: str):
    found = {split: set() for split in SPLITS}
    for seed in (0, 1, 2):
        data = data_of(name, None, seed)
        once = [prompt for split in SPLITS for prompt in data[split]["prompt"]]
        assert len(set(once)) == len(once)
        for split in SPLITS:
            found[split] |= set(data[split]["prompt"])
    assert not (found["train"] & found["test"] or found["train"] & found["validation"])
    assert not found["validation"] & found["test"]
    for number, split in enumerate(SPLITS):
        assert split_of_rows(name, rows_of(name, sorted(found[split]))) == {number}


@every_task
def test_a_constant_answer_has_the_accuracy_of_chance(name: str):
    labels = [label for examples in splits(name).values() for label in single(examples.labels)]
    found = max(labels.count(label) for label in set(labels)) / len(labels)
    assert found == pytest.approx(loaded(name).chance, abs=0.01)
    choices = splits(name)["test"].choices
    assert choices is not None and set(labels) == set(choices.tolist())


@every_task
def test_data_are_a_function_of_the_seed_and_random_states_stay(name: str):
    task, state, numpy_state = load_task(name), torch.get_rng_state(), np.random.get_state()[1]
    one, other = task.dataset(0), task.dataset(4)
    for split in SPLITS:
        assert one[split].to_dict() == data_of(name)[split] != other[split].to_dict()
    for examples, again in zip(task.examples(0), splits(name).values(), strict=True):
        assert torch.equal(examples.tokens, again.tokens) and torch.equal(examples.labels, again.labels)
    task.pairs(16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


# Pairs


@every_task
@pytest.mark.parametrize(("n", "seed"), [(512, 0), (64, 7)])
def test_doing_nothing_is_right_for_half_of_the_pairs(name: str, n: int, seed: int):
    pairs = pairs_of(name, n, seed)
    own = torch.tensor(single(pairs.base.labels))
    for model in (loaded(name).causal_model, *MODULES[name].SENTENCES.rivals):
        for variable in model.variables:
            assert abs(int((pairs.expected(model, (variable,)) == own).sum()) - n / 2) <= 1, variable


@every_task
def test_pairs_are_right_and_distinct_and_were_never_trained_on(name: str):
    pairs = pairs_of(name)
    assert len(pairs) == 512
    sides: list[list[str]] = []
    for inputs, examples in ((pairs.base_inputs, pairs.base), (pairs.source_inputs, pairs.source)):
        prompts = prompts_of(name, examples)
        rows = rows_of(name, prompts)
        assert words_of(examples.labels) == right(name, rows)
        assert set(inputs) == set(loaded(name).causal_model.inputs)
        for column in loaded(name).causal_model.inputs[1:]:
            assert [row[column] for row in rows] == np.asarray(inputs[column]).tolist()
        assert split_of_rows(name, rows) == {2}
        sides.append(prompts)
    assert all(base != source for base, source in zip(*sides, strict=True))
    assert pairs.base.tokens.shape == pairs.source.tokens.shape


@every_task
def test_pairs_are_a_function_of_number_and_seed(name: str):
    task = loaded(name)
    one, two, other = task.pairs(40, 3), task.pairs(40, 3), task.pairs(40, 4)
    assert torch.equal(one.base.tokens, two.base.tokens) and torch.equal(one.source.tokens, two.source.tokens)
    assert not torch.equal(one.base.tokens, other.base.tokens)
    assert [len(task.pairs(n, 0)) for n in (1, 5, 16)] == [1, 5, 16]


def test_sources_of_ioi_tell_place_from_name():
    """In half of the pairs whose place and name call for an answer at all, they call for different ones."""
    pairs = pairs_of("ioi")
    found = [pairs.expected(model, (v,)) for model, v in ((ioi.POSITION, "position"), (ioi.TOKEN, "name"))]
    assert 0.3 < float((found[0] != found[1]).double().mean()) < 0.7


def test_sources_of_docstring_tell_the_argument_before_from_the_count():
    pairs = pairs_of("docstring")
    models = ((docstring.PREVIOUS, "previous"), (docstring.COUNT, "count"))
    found = [pairs.expected(model, (v,)) for model, v in models]
    assert 0.2 < float((found[0] != found[1]).double().mean()) < 0.8


@every_task
def test_data_need_no_weights(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(language_models.TransformerBridge, "boot_transformers", None)
    task = load_task(name)
    assert len(task.pairs(8, 0)) == 8 and len(task.examples(0)) == 3
