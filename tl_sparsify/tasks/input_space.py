"""An input space: all inputs of a task by number, cut into fixed splits, and into cells that are drawn evenly.

For tasks whose inputs can be counted. Cells (which variables are true, say) keep rare combinations from being missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Int, Shaped

from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.tasks.native import load_native
from tl_sparsify.tasks.pairing import Inputs, pairs, partners, split_of
from tl_sparsify.tasks.task import Task, load_truth


@dataclass(frozen=True, eq=False)
class InputSpace:
    """The inputs of a task.

    Attributes:
        causal_model: the task's algorithm, which gives every label.
        size: how many inputs there are.
        inputs_of: the inputs with these numbers.
        cells, cell: how many cells there are, and which one each input is in, from the values of all variables.
        encode: the examples of some inputs, with one label each.
        word: the output's values as they stand in the dataset.
        answers: the token of every value of the output.
        sizes: of the splits ``train``, ``validation`` and ``test``, multiples of ``cells``.
        pool: how many inputs pairs are chosen among.

    Example:
        >>> parity = tls.CausalModel(("x",), {"odd": lambda x: x % 2}, "odd")
        >>> def encode(rows):
        ...     x = torch.from_numpy(rows["x"])
        ...     return tls.pairing.labelled_examples(x[:, None], x % 2)
        >>> space = tls.InputSpace(
        ...     parity, size=200, inputs_of=lambda number: {"x": number}, cells=2, cell=lambda values: values["odd"],
        ...     encode=encode, word=lambda odd: odd, answers={0: 0, 1: 1},
        ...     sizes={"train": 64, "validation": 16, "test": 16},
        ... )
        >>> space.examples(seed=0)[0]
        Examples(64 of shape (1,), 64 answers, with counterfactuals)
    """

    causal_model: CausalModel
    size: int
    inputs_of: Callable[[Int[np.ndarray, "n"]], dict[str, Shaped[np.ndarray, "n *rest"]]]
    cells: int
    cell: Callable[[Mapping[str, np.ndarray]], Int[np.ndarray, "n"]]
    encode: Callable[[Inputs], Examples]
    word: Callable[[Shaped[np.ndarray, "n"]], Shaped[np.ndarray, "n"]]
    answers: Mapping[Any, int]
    sizes: Mapping[str, int]
    pool: int = 512

    @cached_property
    def numbers(self) -> tuple[tuple[Int[np.ndarray, "_"], ...], ...]:
        """All input numbers: ``numbers[split][cell]``."""
        index = np.arange(self.size)
        cell = self.cell(self.causal_model.run(self.inputs_of(index)))
        split = split_of(index)
        return tuple(tuple(index[(split == s) & (cell == k)] for k in range(self.cells)) for s in range(3))

    def drawn(
        self, rng: np.random.Generator, split: int, size: int, replace: bool = False
    ) -> dict[str, Shaped[np.ndarray, "size *rest"]]:
        """``size`` inputs of a split in random order, as many of each cell.

        Raises:
            ValueError: a cell with fewer inputs than that, without ``replace``.
        """
        least = min(map(len, self.numbers[split]))
        if not replace and least < size // self.cells:
            raise ValueError(
                f"size is {size}, {size // self.cells} of each of {self.cells} cells; "
                f"a cell of split {split} has {least}"
            )
        parts = [rng.choice(cell, size // self.cells, replace=replace) for cell in self.numbers[split]]
        return self.inputs_of(rng.permutation(np.concatenate(parts)))

    def dataset(self, seed: int = 0) -> DatasetDict:
        """Train, validation and test inputs without repetition, with the column ``answer``."""
        rng = np.random.default_rng([seed, 61])
        splits = {name: self.drawn(rng, split, size) for split, (name, size) in enumerate(self.sizes.items())}
        words = {name: self.word(self.causal_model.run(x)[self.causal_model.output]) for name, x in splits.items()}
        return DatasetDict({name: Dataset.from_dict({**splits[name], "answer": words[name]}) for name in self.sizes})

    def examples(self, seed: int = 0) -> tuple[Examples, Examples, Examples]:
        """Train, validation and test examples of ``dataset(seed)``; half of the counterfactuals have another answer."""
        train, validation, test = (self._examples(data, seed) for data in self.dataset(seed).values())
        return train, validation, test

    def _examples(self, data: Dataset, seed: int) -> Examples:
        columns = data.with_format("numpy")
        found = self.encode({name: np.asarray(columns[name]) for name in self.causal_model.inputs})
        answers = found.labels[found.labels >= 0].numpy()
        return found.with_partners(torch.from_numpy(partners(answers, seed)))

    def pairs(self, n: int = 512, seed: int = 0, split: int = 2) -> Pairs:
        """Pairs of inputs of the test split (or another one), balanced for every variable."""
        pool = self.drawn(np.random.default_rng([seed, 67]), split, self.pool)
        return pairs(self.causal_model, pool, self.encode, self.answers, n=n, seed=seed)

    def task(
        self,
        name: str,
        description: str,
        model: Path,
        alignment: Alignment,
        *,
        chance: float,
        causal_models: Mapping[str, CausalModel],
        wrong: tuple[str, ...],
    ) -> Task:
        """The task of this space's inputs, for a native model in the folder ``model`` and the true units that may be
        named there; the other arguments are :class:`~tl_sparsify.tasks.task.Task`'s. No model pass."""
        return Task(
            name=name,
            description=description,
            model=lambda: load_native(model),
            dataset=self.dataset,
            examples=self.examples,
            causal_model=self.causal_model,
            alignment=alignment,
            pairs=self.pairs,
            chance=chance,
            causal_models=causal_models,
            wrong=wrong,
            truth=load_truth(model),
        )

    def of_cells(self, split: int, *cells: int) -> Examples:
        """All inputs of some cells of a split."""
        return self.encode(self.inputs_of(np.concatenate([self.numbers[split][cell] for cell in cells])))
