"""Planted backup: a head copies a symbol, and another head does so only where the first one did not.

An input is three symbols and a query token; the answer, the first symbol, is read at the query. The transformer was
trained by interchange interventions and ablations (``python -m tasks.planting planted_backup``).
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

SYMBOLS = 16  # token ids 0 to 15
QUERY = 16
VOCABULARY = 17
INPUTS = ("x", "y", "z")
LENGTH = 4
ANSWERS = {symbol: symbol for symbol in range(SYMBOLS)}
SIZES = {"train": 1024, "validation": 512, "test": 512}
SCHEDULE = {"steps": 1500, "batch": 256, "alone_steps": 0, "free_steps": 0}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
BACKUP = ("L0H1", "L1H2")  # the head that copies, and the one that takes over where it is removed
FOLDER = Path(__file__).parent

COPY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"carried": lambda x: x, "answer": lambda carried: carried},
    output="answer",
)
# The same answers in one step: right as far as it goes.
DIRECT = tls.CausalModel(inputs=INPUTS, mechanisms={"answer": lambda x: x}, output="answer")
# Wrong: another symbol is carried.
SECOND = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"carried": lambda y: y, "answer": lambda carried: carried},
    output="answer",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="planted_backup",
        description="the first of three symbols, copied by a head that has a silent backup",
        model=lambda: tls.task.load_native(FOLDER / "model"),
        dataset=dataset,
        examples=examples,
        causal_model=COPY,
        alignment=alignment(),
        pairs=pairs,
        chance=1 / SYMBOLS,
        causal_models={
            "copy": COPY,
            "direct": DIRECT,
            "second": SECOND,
        },
        wrong=("second",),
        truth=truth(),
        ablation="mean",
    )


def alignment() -> tls.Alignment:
    """Which head carries the symbol at the query while nothing is removed (the backup carries nothing then)."""
    return tls.Alignment({"carried": [_head(0, 1, position=3)]})


def truth() -> dict[str, tuple[str, ...]]:
    """The true units by what makes them true, as the training script measured them."""
    path = FOLDER / "model" / "truth.json"
    return {name: tuple(units) for name, units in json.loads(path.read_text()).items()} if path.is_file() else {}


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: their symbols are the digits of ``index`` to the base 16."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 3), strict=True))


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All inputs by split and answer: ``pools()[split][answer]`` holds input numbers."""
    index = np.arange(SYMBOLS**3)
    split, cell = tls.pairing.split_of(index), COPY.run(inputs_of(index))["answer"]
    return tuple(tuple(index[(split == s) & (cell == k)] for k in range(SYMBOLS)) for s in range(3))


def drawn(rng: np.random.Generator, split: int, size: int, replace: bool = False) -> dict[str, Int[np.ndarray, "size"]]:
    """``size`` inputs of a split in random order, as many with each answer."""
    parts = [rng.choice(pool, size // SYMBOLS, replace=replace) for pool in pools()[split]]
    return inputs_of(rng.permutation(np.concatenate(parts)))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, the answer even in each split.

    Returns:
        Columns ``x``, ``y``, ``z`` and ``answer`` (symbols).
    """
    rng = np.random.default_rng([seed, 61])
    splits = {name: drawn(rng, split, size) for split, (name, size) in enumerate(SIZES.items())}
    words = {name: COPY.run(inputs)["answer"] for name, inputs in splits.items()}
    return DatasetDict({name: Dataset.from_dict({**splits[name], "answer": words[name]}) for name in SIZES})


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[x, y, z, query]``, answered at the query."""
    answer = COPY.run(inputs)["answer"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(answer), QUERY)], axis=1))
    return tls.pairing.answered(tokens, torch.tensor(answer), choices=torch.arange(SYMBOLS))


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``; half of the counterfactuals have another answer."""
    train, validation, test = (_examples(data, seed) for data in dataset(seed).values())
    return train, validation, test


def pairs(n: int = 512, seed: int = 0, split: int = 2) -> tls.Pairs:
    """Pairs of inputs of the test split (or another one), balanced for every variable."""
    pool = drawn(np.random.default_rng([seed, 67]), split, 512)
    return tls.pairing.pairs(COPY, pool, encode, ANSWERS, n=n, seed=seed)


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space."""
    return {"test_part": measure(encode(inputs_of(np.concatenate(pools()[2]))))}


def _examples(data: Dataset, seed: int) -> tls.Examples:
    columns = data.with_format("numpy")
    found = encode({name: np.asarray(columns[name]) for name in INPUTS})
    partner = torch.from_numpy(tls.pairing.partners(found.labels[:, -1].numpy(), seed))
    return found.with_partners(partner)


def _head(layer: int, index: int, position: int) -> tls.Unit:
    hook = f"blocks.{layer}.attn.hook_z"
    return tls.Unit(tls.Site(kind="head", layer=layer, hook=hook, size=SHAPE["heads"], positions=position), index)
