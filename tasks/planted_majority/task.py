"""Planted majority: are two of three symbols low, in a transformer in which every unit's part is known?

An input is three symbols and a query token; the answer is read at the query. The transformer was trained by interchange
interventions (``python -m tasks.planting planted_majority``) to have each variable where :func:`alignment` says.
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

SYMBOLS, HALF = 32, 16  # token ids 0 to 31; those below 16 are low
QUERY, YES, NO = 32, 33, 34
VOCABULARY = 35
CELLS = 8
INPUTS = ("p", "q", "r")
LENGTH = 4
ANSWERS = {True: YES, False: NO}
SIZES = {"train": 2048, "validation": 512, "test": 768}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
FOLDER = Path(__file__).parent

MAJORITY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda p: p < HALF,
        "second": lambda q: q < HALF,
        "third": lambda r: r < HALF,
        "majority": lambda first, second, third: first.astype(int) + second + third >= 2,
    },
    output="majority",
)
# The same answers, but whether r is low is no variable of its own: right as far as it goes.
TWO_VOTES = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda p: p < HALF,
        "second": lambda q: q < HALF,
        "majority": lambda first, second, r: first.astype(int) + second + (r < HALF) >= 2,
    },
    output="majority",
)
# Wrong, though its answers are the same: the third has a vote only where the first two are told to differ.
TIE_BREAK = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda p: p < HALF,
        "second": lambda first, q: first == (q < HALF),
        "third": lambda r: r < HALF,
        "majority": lambda first, second, third: np.where(second, first, third),
    },
    output="majority",
)
# Wrong: a symbol counts when it is even.
EVEN = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda p: p % 2 == 0,
        "second": lambda q: q % 2 == 0,
        "third": lambda r: r % 2 == 0,
        "majority": lambda first, second, third: first.astype(int) + second + third >= 2,
    },
    output="majority",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="planted_majority",
        description="are two of three symbols low, planted in three heads and 16 neurons",
        model=lambda: tls.task.load_native(FOLDER / "model"),
        dataset=dataset,
        examples=examples,
        causal_model=MAJORITY,
        alignment=alignment(),
        pairs=pairs,
        chance=0.5,
        causal_models={
            "majority": MAJORITY,
            "two_votes": TWO_VOTES,
            "tie_break": TIE_BREAK,
            "even": EVEN,
        },
        wrong=("tie_break", "even"),
        truth=truth(),
        ablation="mean",
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted: three heads of layer 0 and every other neuron of layer 1, at the query."""
    return tls.Alignment(
        {
            "first": [_head(0, 2, position=3)],
            "second": [_head(0, 0, position=3)],
            "third": [_head(0, 1, position=3)],
            "majority": [tls.Unit(_neurons(layer=1, position=3), i) for i in range(1, SHAPE["mlp"], 2)],
        }
    )


def truth() -> dict[str, tuple[str, ...]]:
    """The true units by what makes them true, as the training script measured them."""
    path = FOLDER / "model" / "truth.json"
    return {name: tuple(units) for name, units in json.loads(path.read_text()).items()} if path.is_file() else {}


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 3), strict=True))


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All inputs by split and votes: ``pools()[split][4 * first + 2 * second + third]`` holds input numbers."""
    index = np.arange(SYMBOLS**3)
    values = MAJORITY.run(inputs_of(index))
    split, cell = tls.pairing.split_of(index), 4 * values["first"] + 2 * values["second"] + values["third"]
    return tuple(tuple(index[(split == s) & (cell == k)] for k in range(CELLS)) for s in range(3))


def drawn(rng: np.random.Generator, split: int, size: int, replace: bool = False) -> dict[str, Int[np.ndarray, "size"]]:
    """``size`` inputs of a split in random order, as many with each combination of votes."""
    parts = [rng.choice(pool, size // CELLS, replace=replace) for pool in pools()[split]]
    return inputs_of(rng.permutation(np.concatenate(parts)))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, votes even in each split.

    Returns:
        Columns ``p``, ``q``, ``r`` (symbols) and ``answer`` ("yes" or "no").
    """
    rng = np.random.default_rng([seed, 61])
    splits = {name: drawn(rng, split, size) for split, (name, size) in enumerate(SIZES.items())}
    words = {name: np.where(MAJORITY.run(inputs)["majority"], "yes", "no") for name, inputs in splits.items()}
    return DatasetDict({name: Dataset.from_dict({**splits[name], "answer": words[name]}) for name in SIZES})


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[p, q, r, query]``, answered at the query."""
    majority = torch.from_numpy(MAJORITY.run(inputs)["majority"].copy())
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(majority), QUERY)], axis=1))
    return tls.pairing.answered(tokens, torch.where(majority, YES, NO), choices=torch.tensor([YES, NO]))


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``; half of the counterfactuals have another answer."""
    train, validation, test = (_examples(data, seed) for data in dataset(seed).values())
    return train, validation, test


def pairs(n: int = 512, seed: int = 0, split: int = 2) -> tls.Pairs:
    """Pairs of inputs of the test split (or another one), balanced for every variable."""
    pool = drawn(np.random.default_rng([seed, 67]), split, 512)
    return tls.pairing.pairs(MAJORITY, pool, encode, ANSWERS, n=n, seed=seed)


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, by how many symbols are low."""
    low = [bin(cell).count("1") for cell in range(CELLS)]
    cells = {f"{n}_low": [pool for pool, votes in zip(pools()[2], low, strict=True) if votes == n] for n in range(4)}
    return {name: measure(encode(inputs_of(np.concatenate(parts)))) for name, parts in cells.items()}


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
