"""Planted sum: is a + b greater than c + d, in a transformer in which every unit's part is known?

An input is four numbers and a query token; the answer is read at the query. The transformer was trained by interchange
interventions (``python -m tasks.planting planted_sum``) to have each variable where :func:`alignment` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Int

import tl_sparsify as tls

NUMBERS = 16  # token ids 0 to 15; before training they stand on a line, in their order
QUERY, GREATER, NOT_GREATER = 16, 17, 18
VOCABULARY = 19
INPUTS = ("a", "b", "c", "d")
LENGTH = 5
ANSWERS = {True: GREATER, False: NOT_GREATER}
SIZES = {"train": 2048, "validation": 512, "test": 768}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
FOLDER = Path(__file__).parent

SUMS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, b: a + b,
        "right": lambda c, d: c + d,
        "greater": lambda left, right: left > right,
    },
    output="greater",
)
# The same answers, but the right sum is formed only while the two are compared: right as far as it goes.
LEFT_ONLY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"left": lambda a, b: a + b, "greater": lambda left, c, d: left > c + d},
    output="greater",
)
# Wrong, though its answers are the same: differences across are compared.
DIFFERENCES = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, c: a - c,
        "right": lambda b, d: d - b,
        "greater": lambda left, right: left > right,
    },
    output="greater",
)
# Wrong: the greater number of each side is compared.
GREATEST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, b: np.maximum(a, b),
        "right": lambda c, d: np.maximum(c, d),
        "greater": lambda left, right: left > right,
    },
    output="greater",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="planted_sum",
        description="is a + b greater than c + d, planted in two heads and eight neurons",
        model=lambda: tls.task.load_native(FOLDER / "model"),
        dataset=dataset,
        examples=examples,
        causal_model=SUMS,
        alignment=alignment(),
        pairs=pairs,
        chance=0.5,
        causal_models={
            "sums": SUMS,
            "left_only": LEFT_ONLY,
            "differences": DIFFERENCES,
            "greatest": GREATEST,
        },
        wrong=("differences", "greatest"),
        truth=truth(),
        ablation="mean",
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted, all at the query: two heads of layer 0, eight neurons of layer 1."""
    return tls.Alignment(
        {
            "left": [_head(0, 2, position=4)],
            "right": [_head(0, 0, position=4)],
            "greater": [tls.Unit(_neurons(layer=1, position=4), i) for i in range(1, SHAPE["mlp"], 4)],
        }
    )


def truth() -> dict[str, tuple[str, ...]]:
    """The true units by what makes them true, as the training script measured them."""
    path = FOLDER / "model" / "truth.json"
    return {name: tuple(units) for name, units in json.loads(path.read_text()).items()} if path.is_file() else {}


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: the digits of ``index`` to the base 16."""
    return dict(zip(INPUTS, np.unravel_index(index, (NUMBERS,) * 4), strict=True))


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All inputs by split, answer and closeness: ``pools()[split][2 * greater + close]`` holds input numbers; close
    are sums that differ by two at most."""
    index = np.arange(NUMBERS**4)
    values = SUMS.run(inputs_of(index))
    close = np.abs(values["left"] - values["right"]) <= 2
    split, cell = tls.pairing.split_of(index), 2 * values["greater"].astype(np.int64) + close
    return tuple(tuple(index[(split == s) & (cell == k)] for k in range(4)) for s in range(3))


def drawn(rng: np.random.Generator, split: int, size: int, replace: bool = False) -> dict[str, Int[np.ndarray, "size"]]:
    """``size`` inputs of a split in random order, a quarter of them from each cell."""
    parts = [rng.choice(pool, size // 4, replace=replace) for pool in pools()[split]]
    return inputs_of(rng.permutation(np.concatenate(parts)))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, a quarter of each split in each cell.

    Returns:
        Columns ``a``, ``b``, ``c``, ``d`` (numbers) and ``answer`` ("greater" or "not greater").
    """
    rng = np.random.default_rng([seed, 61])
    splits = {name: drawn(rng, split, size) for split, (name, size) in enumerate(SIZES.items())}
    words = {name: np.where(SUMS.run(inputs)["greater"], "greater", "not greater") for name, inputs in splits.items()}
    return DatasetDict({name: Dataset.from_dict({**splits[name], "answer": words[name]}) for name in SIZES})


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[a, b, c, d, query]``, answered at the query."""
    greater = SUMS.run(inputs)["greater"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(greater), QUERY)], axis=1))
    answers = torch.tensor([ANSWERS[value] for value in greater.tolist()])
    return tls.pairing.answered(tokens, answers, choices=torch.tensor([GREATER, NOT_GREATER]))


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``; half of the counterfactuals have another answer."""
    train, validation, test = (_examples(data, seed) for data in dataset(seed).values())
    return train, validation, test


def pairs(n: int = 512, seed: int = 0, split: int = 2) -> tls.Pairs:
    """Pairs of inputs of the test split (or another one), balanced for every variable."""
    pool = drawn(np.random.default_rng([seed, 67]), split, 1000)
    return tls.pairing.pairs(SUMS, pool, encode, ANSWERS, n=n, seed=seed)


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, cell by cell."""
    names = ("not_greater", "not_greater_close", "greater", "greater_close")
    return {name: measure(encode(inputs_of(pool))) for name, pool in zip(names, pools()[2], strict=True)}


def _examples(data: Dataset, seed: int) -> tls.Examples:
    columns = data.with_format("numpy")
    found = encode({name: np.asarray(columns[name]) for name in INPUTS})
    partner = torch.from_numpy(tls.pairing.partners(found.labels[:, -1].numpy(), seed))
    return found.with_partners(partner)


def _head(layer: int, index: int, position: int) -> tls.Unit:
    hook = f"blocks.{layer}.attn.hook_z"
    return tls.Unit(tls.Site(kind="head", layer=layer, hook=hook, size=SHAPE["heads"], positions=position), index)


def _neurons(layer: int, position: int) -> tls.Site:
    hook = f"blocks.{layer}.mlp.hook_post"
    return tls.Site(kind="neuron", layer=layer, hook=hook, size=SHAPE["mlp"], positions=position)
