"""Planted gate: p chooses between b and c, in a transformer in which every unit's part is known.

An input is three symbols and a query token; the answer, one of the symbols, is read at the query. The transformer was
trained by interchange interventions (``python -m tasks.planting planted_gate``) to have each variable where
:func:`alignment` says.
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

SYMBOLS, SWITCHES = 8, 64  # token ids 0 to 7 (what b and c are), then 8 to 71 (what p is)
HALF = SYMBOLS + SWITCHES // 2
QUERY = SYMBOLS + SWITCHES
VOCABULARY = QUERY + 1
CELLS = 2 * SYMBOLS
INPUTS = ("p", "b", "c")
LENGTH = 4
ANSWERS = {symbol: symbol for symbol in range(SYMBOLS)}
SIZES = {"train": 1024, "validation": 512, "test": 512}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 48}
FOLDER = Path(__file__).parent

GATE = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "gate": lambda p: p < HALF,
        "first": lambda b: b,
        "second": lambda c: c,
        "chosen": lambda gate, first, second: np.where(gate, first, second),
    },
    output="chosen",
)
# The same answers, but whether p is low is no variable of its own: right as far as it goes.
UNGATED = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda b: b,
        "second": lambda c: c,
        "chosen": lambda p, first, second: np.where(p < HALF, first, second),
    },
    output="chosen",
)
# Wrong, though its answers are the same: b and c are sorted into the wanted and the unwanted one beforehand.
SORTED = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "gate": lambda p: p < HALF,
        "first": lambda gate, b, c: np.where(gate, b, c),
        "second": lambda gate, b, c: np.where(gate, c, b),
        "chosen": lambda first: first,
    },
    output="chosen",
)
# Wrong: the gate is whether p is even.
EVEN = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "gate": lambda p: p % 2 == 0,
        "first": lambda b: b,
        "second": lambda c: c,
        "chosen": lambda gate, first, second: np.where(gate, first, second),
    },
    output="chosen",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="planted_gate",
        description="p chooses between b and c, planted in three heads and 24 neurons",
        model=lambda: tls.task.load_native(FOLDER / "model"),
        dataset=dataset,
        examples=examples,
        causal_model=GATE,
        alignment=alignment(),
        pairs=pairs,
        chance=1 / SYMBOLS,
        causal_models={
            "gate": GATE,
            "ungated": UNGATED,
            "sorted": SORTED,
            "even": EVEN,
        },
        wrong=("sorted", "even"),
        truth=truth(),
        ablation="mean",
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted: three heads of layer 0 and every other neuron of layer 1, at the query."""
    return tls.Alignment(
        {
            "gate": [_head(0, 1, position=3)],
            "first": [_head(0, 0, position=3)],
            "second": [_head(0, 3, position=3)],
            "chosen": [tls.Unit(_neurons(layer=1, position=3), i) for i in range(0, SHAPE["mlp"], 2)],
        }
    )


def truth() -> dict[str, tuple[str, ...]]:
    """The true units by what makes them true, as the training script measured them."""
    path = FOLDER / "model" / "truth.json"
    return {name: tuple(units) for name, units in json.loads(path.read_text()).items()} if path.is_file() else {}


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers."""
    p, b, c = np.unravel_index(index, (SWITCHES, SYMBOLS, SYMBOLS))
    return {"p": SYMBOLS + p, "b": b, "c": c}


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All inputs by split, gate and answer: ``pools()[split][2 * chosen + gate]`` holds input numbers."""
    index = np.arange(SWITCHES * SYMBOLS**2)
    values = GATE.run(inputs_of(index))
    split, cell = tls.pairing.split_of(index), 2 * values["chosen"] + values["gate"]
    return tuple(tuple(index[(split == s) & (cell == k)] for k in range(CELLS)) for s in range(3))


def drawn(rng: np.random.Generator, split: int, size: int, replace: bool = False) -> dict[str, Int[np.ndarray, "size"]]:
    """``size`` inputs of a split in random order, as many with each gate and answer."""
    parts = [rng.choice(pool, size // CELLS, replace=replace) for pool in pools()[split]]
    return inputs_of(rng.permutation(np.concatenate(parts)))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, gate and answer even in each split.

    Returns:
        Columns ``p``, ``b``, ``c`` (symbols) and ``answer`` (a symbol).
    """
    rng = np.random.default_rng([seed, 61])
    splits = {name: drawn(rng, split, size) for split, (name, size) in enumerate(SIZES.items())}
    words = {name: GATE.run(inputs)["chosen"] for name, inputs in splits.items()}
    return DatasetDict({name: Dataset.from_dict({**splits[name], "answer": words[name]}) for name in SIZES})


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[p, b, c, query]``, answered at the query."""
    chosen = GATE.run(inputs)["chosen"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(chosen), QUERY)], axis=1))
    return tls.pairing.answered(tokens, torch.tensor(chosen), choices=torch.arange(SYMBOLS))


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``; half of the counterfactuals have another answer."""
    train, validation, test = (_examples(data, seed) for data in dataset(seed).values())
    return train, validation, test


def pairs(n: int = 512, seed: int = 0, split: int = 2) -> tls.Pairs:
    """Pairs of inputs of the test split (or another one), balanced for every variable."""
    pool = drawn(np.random.default_rng([seed, 67]), split, 512)
    return tls.pairing.pairs(GATE, pool, encode, ANSWERS, n=n, seed=seed)


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, by gate."""
    cells = {"first_chosen": pools()[2][1::2], "second_chosen": pools()[2][::2]}
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
