"""The induction task's data and causal models, against loops, and what its transformer attends to."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import tl_sparsify as tls
from tasks.induction import task as induction

ROWS = induction.SPACE.pairs(200, 3).base_inputs["symbols"]


def followers(row: list[int]) -> list[int]:
    """What followed each earlier occurrence of the last symbol, in order."""
    return [row[i + 1] for i in range(len(row) - 1) if row[i] == row[-1]]


def most_frequent(found: list[int]) -> int:
    """The one that comes most often; the first of several."""
    counts = Counter(found)
    return next(symbol for symbol in found if counts[symbol] == max(counts.values()))


def test_the_rows_are_different_and_hold_every_symbol():
    rows = induction.rows()
    assert rows.shape == (induction.ROWS, induction.LENGTH)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert all((rows[:, :-1] == symbol).any(1).all() for symbol in range(induction.SYMBOLS))
    assert rows.min() == 0 and rows.max() == induction.SYMBOLS - 1


def test_the_models_answer_as_loops_do():
    lists = ROWS.tolist()
    expected = {
        "induction": [followers(row)[-1] for row in lists],
        "lookup": [followers(row)[-1] for row in lists],
        "table": [followers(row)[-1] for row in lists],
        "first": [followers(row)[0] for row in lists],
        "most_frequent": [most_frequent(followers(row)) for row in lists],
    }
    models = induction.task().causal_models
    assert set(models) == set(expected)
    for name, model in models.items():
        assert model.run({"symbols": ROWS})["answer"].tolist() == expected[name], name


def test_the_current_symbol_comes_once_twice_and_more_often_as_many_times():
    for examples in induction.SPACE.examples(0):
        times = np.minimum(induction.occurrences(examples.tokens.numpy()), induction.MOST)
        assert np.bincount(times).tolist() == [0, *[len(examples) // induction.MOST] * induction.MOST]


def test_an_interchange_of_what_stood_before_moves_the_place_and_not_the_symbols():
    pairs = induction.SPACE.pairs(64, 5)
    base, source = pairs.base_inputs["symbols"], pairs.source_inputs["symbols"]
    found = induction.INDUCTION.interchange({"symbols": base}, {"previous": {"symbols": source}})
    for row, other, where, answer in zip(
        base.tolist(), source.tolist(), found["where"].tolist(), found["answer"].tolist(), strict=True
    ):
        assert where == max(i for i in range(1, len(other)) if other[i - 1] == row[-1])
        assert answer == row[where]


@pytest.mark.parametrize("variable", ["previous", "where"])
def test_what_carries_the_variables_carries_no_table(variable: str):
    task, pairs = induction.task(), induction.SPACE.pairs(256, 2)
    model = task.model()
    alignment = tls.Alignment({"table": task.alignment.units[variable]})
    evidence = tls.verify(model, induction.TABLE, alignment, pairs, draws=0)
    own = tls.verify(model, induction.INDUCTION, task.alignment, pairs, draws=0)
    assert evidence.accuracy("table") < own.accuracy(variable) - 0.1


def test_a_head_attends_to_the_position_before_and_another_to_what_is_copied():
    model, test = induction.load_model(), induction.SPACE.examples(0)[2]
    with torch.no_grad():
        _, cache = model.run_with_cache(test.tokens)
    before = cache["blocks.0.attn.hook_pattern"][:, :, 1:].diagonal(dim1=2, dim2=3).mean((0, 2))
    symbols = test.tokens.numpy()
    where = torch.from_numpy(induction.INDUCTION.run({"symbols": symbols})["where"])
    at_current = cache["blocks.1.attn.hook_pattern"][:, :, induction.CURRENT]
    copied = at_current.gather(2, where[:, None, None].expand(-1, at_current.shape[1], 1)).mean((0, 2))
    assert float(before.max()) > 0.5
    assert float(copied.max()) > 0.5
