"""A space of inputs: splits that never move, cells drawn evenly, data that are a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tl_sparsify import CausalModel, Examples, InputSpace
from tl_sparsify.tasks.pairing import labelled_examples

AND = CausalModel(
    ("a", "b"), {"low": lambda a: a < 8, "even": lambda b: b % 2 == 0, "both": lambda low, even: low & even}, "both"
)


def encode(inputs: dict[str, np.ndarray]) -> Examples:
    both = torch.from_numpy(AND.run(inputs)["both"].copy())
    return labelled_examples(torch.tensor(np.stack([inputs["a"], inputs["b"]], 1)), both.long())


SPACE = InputSpace(
    causal_model=AND,
    size=32 * 32,
    inputs_of=lambda index: dict(zip(("a", "b"), np.unravel_index(index, (32, 32)), strict=True)),
    cells=2,
    cell=lambda values: values["both"].astype(np.int64),
    encode=encode,
    word=lambda both: np.where(both, "yes", "no"),
    answers={True: 1, False: 0},
    sizes={"train": 40, "validation": 16, "test": 24},
    pool=32,
)


def test_every_input_is_in_one_split_and_one_cell():
    numbers = [number for split in SPACE.numbers for cell in split for number in cell.tolist()]
    assert sorted(numbers) == list(range(1024))
    for split in SPACE.numbers:
        for cell, members in enumerate(split):
            assert (AND.run(SPACE.inputs_of(members))["both"] == bool(cell)).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_data_are_even_disjoint_and_a_function_of_the_seed(seed: int):
    data, again = SPACE.dataset(seed), SPACE.dataset(seed)
    rows = {name: set(zip(part["a"], part["b"], strict=True)) for name, part in data.items()}
    assert {name: len(found) for name, found in rows.items()} == dict(SPACE.sizes)
    assert not rows["train"] & rows["test"] and not rows["validation"] & rows["test"]
    for name, part in data.items():
        assert part.to_dict() == again[name].to_dict()
        assert part["answer"].count("yes") * 2 == len(part)
    for examples in SPACE.examples(seed):
        assert examples.counterfactual_labels is not None
        changed = (examples.labels != examples.counterfactual_labels).any(1)
        assert float(changed.double().mean()) == 0.5


def test_pairs_are_balanced_and_of_their_split():
    pairs = SPACE.pairs(40, 3)
    own = pairs.base.labels[:, -1]
    for variable in AND.variables:
        assert float((pairs.expected(AND, (variable,)) == own).double().mean()) == 0.5
    tested = {number for cell in SPACE.numbers[2] for number in cell.tolist()}
    assert {32 * int(a) + int(b) for a, b in pairs.base.tokens.tolist()} <= tested


def test_more_than_a_cell_holds_is_refused():
    with pytest.raises(ValueError, match=r"size is 800, 400 of each of 2 cells; a cell of split 2 has \d+"):
        SPACE.drawn(np.random.default_rng(0), 2, 800)


def test_all_inputs_of_some_cells():
    assert len(SPACE.of_cells(2, 0, 1)) == sum(map(len, SPACE.numbers[2]))
    assert set(SPACE.of_cells(1, 1).labels[:, -1].tolist()) == {1}
