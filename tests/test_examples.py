"""Examples: what belongs together, what is refused, and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import examples, inputs, unchecked
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify.core.examples import Examples

TOKENS = torch.arange(12).reshape(3, 4)
LABELS = torch.tensor([[-100, -100, -100, 5]]).repeat(3, 1)
NAMES = ("tokens", "labels", "attention_mask", "counterfactual_tokens", "counterfactual_labels")


def every_part(n: int = 3) -> Examples:
    data = examples(n, choices=(1, 2))
    mask = torch.ones_like(data.tokens, dtype=torch.bool)
    other = (data.counterfactual_tokens, data.counterfactual_labels)
    return Examples(data.tokens, data.labels, mask, *other, choices=data.choices)


@given(st.integers(1, 9), st.integers(1, 12))
def test_batches_put_together_are_the_examples(n: int, size: int):
    data = every_part(n)
    batches = list(data.batches(size))
    assert torch.equal(torch.cat([index for index, _ in batches]), torch.arange(n))
    assert max(len(batch) for _, batch in batches) == min(n, size)
    for name in NAMES:
        assert torch.equal(torch.cat([getattr(batch, name) for _, batch in batches]), getattr(data, name))
    assert all(torch.equal(batch.choices, data.choices) for _, batch in batches)


def test_without_a_size_there_is_one_batch():
    [(index, batch)] = every_part().batches(None)
    assert len(batch) == len(index) == 3
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(every_part().batches(0))


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 1]), torch.tensor([False, True, True])])
def test_an_index_takes_every_part(index: Any):
    data = every_part()
    assert all(torch.equal(getattr(data[index], name), getattr(data, name)[index]) for name in NAMES)
    assert torch.equal(data[index].choices, data.choices)


def test_labels_may_be_one_a_row_and_inputs_floats():
    assert len(Examples(TOKENS, LABELS[:, -1:])) == 3
    assert len(inputs(7)) == 7
    assert Examples(torch.randn(3, 2, 2, generator=torch.Generator()), LABELS).labels.shape == (3, 4)


def test_to_moves_and_keeps_every_part():
    data = every_part().to("cpu")
    assert all(torch.equal(getattr(data, name), getattr(every_part(), name)) for name in NAMES)


def test_the_repr_is_one_line_with_the_numbers():
    assert repr(every_part()) == "Examples(3 of shape (5,), 3 answers, with counterfactuals)"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labels": LABELS[:2]}, r"labels has shape \(2, 4\).*need \[3, pos\]"),
        ({"labels": LABELS[:, :3]}, r"labels has shape \(3, 3\), tokens \(3, 4\)"),
        ({"labels": LABELS.where(torch.tensor([[True], [False], [True]]), -100)}, r"no answer for 1 of 3.*first: 1"),
        ({"labels": torch.full((3, 4), -100)}, "labels has no answer for 3 of 3"),
        ({"labels": LABELS.where(LABELS < 0, -2)}, "labels holds -2"),
        ({"labels": torch.zeros(3, 0, dtype=torch.long)}, "labels has shape"),
        ({"tokens": TOKENS[:0], "labels": LABELS[:0]}, "tokens has no example"),
        ({"attention_mask": torch.ones(3, 3, dtype=torch.bool)}, r"attention_mask has shape \(3, 3\).*\(3, 4\)"),
        ({"counterfactual_tokens": TOKENS[:, :2]}, r"counterfactual_tokens has shape \(3, 2\).*\(3, 4\)"),
        ({"counterfactual_labels": LABELS[:2]}, r"counterfactual_labels has shape \(2, 4\).*\(3, 4\)"),
        ({"choices": torch.tensor([3, 4])}, "labels holds 5, which is not among choices"),
        ({"choices": torch.tensor([5, -4])}, "choices holds -4"),
        ({"choices": torch.tensor([5, 6, 5])}, r"choices holds an id twice: \[5, 6, 5\]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(changes: dict[str, Any], says: str):
    with unchecked(), pytest.raises(ValueError, match=says):
        Examples(**{"tokens": TOKENS, "labels": LABELS} | changes)


def test_examples_without_labels_are_refused():
    with pytest.raises(TypeError, match="labels"):
        Examples(TOKENS)  # type: ignore[call-arg]


def test_examples_are_frozen():
    with pytest.raises(AttributeError):
        every_part().tokens = TOKENS  # type: ignore[misc]


def test_partners_are_each_others_counterfactuals():
    plain = Examples(torch.arange(12).reshape(4, 3), torch.tensor([[-100, -100, i] for i in range(4)]))
    paired = plain.with_partners(torch.tensor([2, 0, 3, 1]))
    assert paired.counterfactual_tokens is not None and paired.counterfactual_labels is not None
    assert paired.counterfactual_tokens[:, 0].tolist() == [6, 0, 9, 3]
    assert paired.counterfactual_labels[:, 2].tolist() == [2, 0, 3, 1]
    assert paired.tokens is plain.tokens and plain.counterfactual_tokens is None


def test_a_sample_is_a_random_part_in_order():
    data = Examples(torch.arange(40).view(20, 2), torch.arange(40).view(20, 2))
    some = data.sample(8, seed=3)
    rows = some.tokens[:, 0]
    assert len(some) == 8 and torch.equal(rows, rows.unique()) and torch.equal(some.labels, some.tokens)
    assert torch.equal(data.sample(8, seed=3).tokens, some.tokens)
    assert not torch.equal(data.sample(8, seed=4).tokens, some.tokens)
    assert int(rows.max()) > 15  # not the first ones
    assert data.sample(20) is data
    with pytest.raises(ValueError, match="n is 0; at least one"):
        data.sample(0)
