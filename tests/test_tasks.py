"""Every shipped task: what its card says of the data, the labels and the pairs is true.

A task of this repository has a dataset whose columns are the causal model's inputs, in the order of its examples, one
answer for each input, and a folder ``model`` with weights and ``metrics.json``. Its ``kind`` there is ``trained``,
``compiled`` (from a program) or ``planted`` (trained so that given units carry given variables).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.cards import FOLDER, HEADINGS, card, section, single
from helpers.places import loaded, model_of
from helpers.shipped import NAMES, SPLITS, every_task, metrics, splits

from tl_sparsify import (
    Examples,
    Pairs,
    heads,
    list_tasks,
    load_task,
    neurons,
)

KINDS = ("trained", "compiled", "planted")


def columns(name: str, split: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The causal model's inputs, from the raw data."""
    data = loaded(name).dataset(seed)[split].with_format("numpy")
    return {column: np.asarray(data[column]) for column in loaded(name).causal_model.inputs}


def answers(name: str, inputs: dict[str, np.ndarray]) -> list[int]:
    """The causal model's output as a token, for each input."""
    model, tokens = loaded(name).causal_model, loaded(name).pairs(16, 0).answers
    return [tokens[value] for value in model.run(inputs)[model.output].tolist()]


def rows(tokens: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, ...]]:
    """Each example's tokens, and behind them the position at which it is answered."""
    where = (labels != -100).double().argmax(1)
    return [tuple(row) for row in torch.cat([tokens, where[:, None]], 1).tolist()]


def inputs_of(examples: Examples) -> list[tuple[int, ...]]:
    return rows(examples.tokens, examples.labels)


def sources_of(examples: Examples) -> list[tuple[int, ...]]:
    assert examples.counterfactual_tokens is not None and examples.counterfactual_labels is not None
    return rows(examples.counterfactual_tokens, examples.counterfactual_labels)


def balanced_variables(name: str) -> tuple[str, ...]:
    """The variables for which doing nothing must be right for half of the pairs. In a compiled program there may be
    variables that no single interchange shows."""
    task = loaded(name)
    if metrics(name)["kind"] != "compiled":
        return task.causal_model.variables
    return tuple(dict.fromkeys((*task.alignment.variables, task.causal_model.output)))


def test_there_are_tasks():
    assert {path.parent.name for path in FOLDER.glob("*/task.py")} == set(list_tasks()) > set(NAMES) != set()


@every_task
def test_the_card_has_its_parts(name: str):
    text = card(name)
    assert text.startswith("# ") and len(text.splitlines()[0]) > 2
    found = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    for heading in HEADINGS:
        assert len(section(name, heading).split()) >= 5, f"{heading} is empty"
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text)
    assert not re.search(r"\b[A-Z]{5,}\b (seconds|minutes|%)", text), "a figure was never filled in"


@every_task
def test_the_task_is_of_a_known_kind(name: str):
    task, kind = loaded(name), metrics(name)["kind"]
    assert kind in KINDS
    assert task.name == name and task.ablation == ("zero" if kind == "compiled" else "mean")
    assert set(task.truth) <= {"weights", "removal"}
    assert bool(task.truth) == (kind != "trained"), "the true units are known just where they were put there"
    units = heads(model_of(name)) + neurons(model_of(name))
    assert all(found and len(set(found)) == len(found) for found in task.truth.values())
    assert all(unit in units.names for found in task.truth.values() for unit in found)
    assert set(task.truth.get("removal", ())) <= set(task.truth.get("weights", units.names)), "removal of idle units"


@every_task
def test_a_task_is_at_hand_with_its_model_its_examples_and_a_thousand_pairs(name: str):
    task = load_task(name)
    pairs = task.pairs(1000, 9)
    with torch.no_grad():
        assert task.model()(pairs.base.tokens).isfinite().all()
    assert len(pairs.base) == 1000 and sum(map(len, task.examples(9))) >= 100


@every_task
def test_the_card_draws_the_causal_model_and_names_its_rivals(name: str):
    text, task = card(name), loaded(name)
    for line in task.causal_model.graph().splitlines():
        if "-->" in line:
            assert line.strip() in text
    assert all(f"`{rival}`" in text for rival in task.causal_models if task.causal_models[rival] != task.causal_model)


@every_task
def test_no_example_occurs_twice_and_the_splits_are_disjoint(name: str):
    found = [row for examples in splits(name).values() for row in inputs_of(examples)]
    assert len(set(found)) == len(found)


@every_task
def test_no_seed_moves_an_example_to_another_split(name: str):
    trained = {row for seed in (0, 1) for row in inputs_of(splits(name, seed)["train"])}
    held_out = {row for seed in (0, 2) for split in SPLITS[1:] for row in inputs_of(splits(name, seed)[split])}
    assert not trained & held_out


@every_task
def test_the_data_are_a_function_of_the_seed(name: str):
    task = loaded(name)
    first, again, other = (task.dataset(seed) for seed in (3, 3, 4))
    assert tuple(first) == SPLITS
    assert all(first[split].to_dict() == again[split].to_dict() for split in SPLITS)
    assert all(first[split].to_dict() != other[split].to_dict() for split in SPLITS)
    for one, two in zip(task.examples(3), task.examples(3), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
        assert one.counterfactual_tokens is not None and two.counterfactual_tokens is not None
        assert torch.equal(one.counterfactual_tokens, two.counterfactual_tokens)


@every_task
def test_making_data_leaves_the_random_state_alone(name: str):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    loaded(name).examples(5)
    loaded(name).pairs(16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_causal_models_answers(name: str, split: str):
    examples, inputs = splits(name)[split], columns(name, split)
    assert single(examples.labels) == answers(name, inputs)
    assert len(set(single(examples.labels))) > 1
    words = set(zip(loaded(name).dataset(0)[split]["answer"], single(examples.labels), strict=True))
    assert len(words) == len({word for word, _ in words}) == len({label for _, label in words})


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_counterfactual_labels_are_the_causal_models_answers(name: str, split: str):
    examples = splits(name)[split]
    assert examples.counterfactual_tokens is not None and examples.counterfactual_labels is not None
    right = dict(zip(inputs_of(examples), answers(name, columns(name, split)), strict=True))
    assert single(examples.counterfactual_labels) == [right[row] for row in sources_of(examples)]
    assert all(source != base for source, base in zip(sources_of(examples), inputs_of(examples), strict=True))
    where = (examples.labels != -100).nonzero()
    assert torch.equal(where, (examples.counterfactual_labels != -100).nonzero())


@every_task
def test_a_constant_answer_has_the_accuracy_of_chance(name: str):
    for examples in splits(name).values():
        labels = single(examples.labels)
        found = max(labels.count(label) for label in set(labels)) / len(labels)
        assert found == pytest.approx(loaded(name).chance, abs=1e-12 if len(set(labels)) == 2 else 0.02)


@every_task
def test_counterfactuals_change_the_answer_of_half_of_the_examples(name: str):
    for examples in splits(name).values():
        assert examples.counterfactual_labels is not None
        changed = int((examples.labels != examples.counterfactual_labels).any(1).sum())
        kinds = len(set(single(examples.labels)))
        assert abs(changed - len(examples) / 2) <= (1 if kinds == 2 else 0.02 * len(examples))


@every_task
@pytest.mark.parametrize(("n", "seed"), [(512, 0), (64, 7)])
def test_doing_nothing_is_right_for_half_of_the_pairs(name: str, n: int, seed: int):
    task = loaded(name)
    pairs = task.pairs(n, seed)
    own = torch.tensor(single(pairs.base.labels))
    for variable in balanced_variables(name):
        expected = pairs.expected(task.causal_model, (variable,))
        assert abs(int((expected == own).sum()) - n / 2) <= 1, variable


@every_task
def test_pairs_are_right_and_distinct_and_were_never_trained_on(name: str):
    task = loaded(name)
    trained = set(inputs_of(splits(name)["train"])) | set(inputs_of(splits(name)["validation"]))
    pairs = task.pairs(512, 0)
    assert len(pairs) == 512
    for inputs, examples in ((pairs.base_inputs, pairs.base), (pairs.source_inputs, pairs.source)):
        assert set(inputs) == set(task.causal_model.inputs)
        assert single(examples.labels) == answers(name, dict(inputs))
        assert not trained & set(inputs_of(examples))
    assert all(base != source for base, source in zip(inputs_of(pairs.base), inputs_of(pairs.source), strict=True))


@every_task
def test_pairs_and_examples_are_encoded_alike(name: str):
    pairs, examples, inputs = loaded(name).pairs(64, 0), splits(name)["test"], columns(name, "test")
    assert pairs.base.tokens.shape[1] == examples.tokens.shape[1]
    sides = [(pairs.base, pairs.base_inputs), (pairs.source, pairs.source_inputs), (examples, inputs)]
    codes = np.concatenate([np.array(inputs_of(side)) for side, _ in sides]).T  # tokens, and where the answer is read
    for column in inputs:
        values = np.concatenate([np.asarray(given[column]) for _, given in sides])
        for entry in values.reshape(len(values), -1).T:  # one code for each value, and one value for each code
            kinds = len(set(entry.tolist()))
            assert any(len(set(code)) == kinds == len(set(zip(code, entry, strict=True))) for code in codes), column


def tensors(pairs: Pairs) -> Iterator[torch.Tensor]:
    for examples in (pairs.base, pairs.source):
        yield from (examples.tokens, examples.labels)


@every_task
def test_pairs_are_a_function_of_number_and_seed(name: str):
    task = loaded(name)
    same = zip(tensors(task.pairs(40, 3)), tensors(task.pairs(40, 3)), strict=True)
    assert all(torch.equal(one, two) for one, two in same)
    assert not torch.equal(task.pairs(40, 3).base.tokens, task.pairs(40, 4).base.tokens)
    assert [len(task.pairs(n, 0)) for n in (1, 5, 16)] == [1, 5, 16]


@every_task
def test_the_cards_sizes_are_those_of_the_data_and_the_model(name: str):
    text = card(name)
    assert " / ".join(f"{len(examples):,}" for examples in splits(name).values()) in text
    units = heads(model_of(name)) + neurons(model_of(name))
    assert f"{len(units):,} units ({units.describe()})" in text
