"""The four tasks of one transformer: their data, against loops, and the examples of each alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tasks.multi_task import task as multi_task

every_one = pytest.mark.parametrize("name", multi_task.TASKS)
REFERENCE: dict[str, Callable[[list[int]], int]] = {
    "first": lambda row: row[0],
    "greatest": max,
    "after": lambda row: row[max(i for i in range(len(row) - 1) if row[i] == row[-1]) + 1],
    "count": lambda row: row[:-1].count(row[-1]),
}


def test_no_input_comes_twice():
    tasks, numbers = multi_task.rows()
    assert len(tasks) == len(numbers) == multi_task.ROWS
    assert len(np.unique(np.column_stack([tasks, numbers]), axis=0)) == multi_task.ROWS


@every_one
def test_the_answers_are_those_of_loops(name: str):
    for examples in multi_task.subset(name):
        answers = [REFERENCE[name](row[1:]) for row in examples.tokens.tolist()]
        assert examples.labels[:, multi_task.CURRENT].tolist() == answers


@every_one
@pytest.mark.parametrize("seed", [0, 4])
def test_a_subset_is_the_part_of_the_examples_that_is_of_one_task(name: str, seed: int):
    token = multi_task.NUMBERS + list(multi_task.TASKS).index(name)
    for part, whole in zip(multi_task.subset(name, seed), multi_task.SPACE.examples(seed), strict=True):
        own = whole.tokens[:, 0] == token
        assert torch.equal(part.tokens, whole.tokens[own]) and torch.equal(part.labels, whole.labels[own])
        assert len(part) * len(multi_task.TASKS) == len(whole)
        assert part.counterfactual_tokens is not None and part.counterfactual_labels is not None
        assert bool((part.counterfactual_tokens[:, 0] == token).all())
        changed = (part.labels != part.counterfactual_labels).any(1).double().mean()
        assert float(changed) == pytest.approx(0.5, abs=0.02)


def test_an_unknown_subset_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"unknown task 'last'; the four are first, greatest, after, count"):
        multi_task.subset("last")


@every_one
def test_the_transformer_does_each_of_the_four(name: str):
    test = multi_task.subset(name)[2]
    with torch.no_grad():
        answer = multi_task.load_model()(test.tokens)[:, multi_task.CURRENT].argmax(1)
    assert float((answer == test.labels[:, multi_task.CURRENT]).double().mean()) >= 0.99


def test_every_task_has_as_many_examples_of_each_of_its_answers():
    for examples in multi_task.SPACE.examples(1):
        for name in multi_task.TASKS:
            own = examples.tokens[:, 0] == multi_task.NUMBERS + list(multi_task.TASKS).index(name)
            _, counts = examples.labels[own, multi_task.CURRENT].unique(return_counts=True)
            assert len(set(counts.tolist())) == 1, name
