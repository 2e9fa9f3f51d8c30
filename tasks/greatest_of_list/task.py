"""The greatest of four numbers: data, causal models and the trained transformer.

An input is four different numbers and a query token; the answer, the greatest number, is read at the query.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls

NUMBERS = 32  # token ids 0 to 31
QUERY = 32
VOCABULARY = 33
INPUTS = ("a", "b", "c", "d")
ANSWER_POSITION = 4
NUMBER_POSITIONS = (0, 1, 2, 3)
LEAST_ANSWER = 8  # smaller ones have too few inputs for splits with every answer equally often
ANSWERS = {number: number for number in range(NUMBERS)}
SIZES = {"train": 2400, "validation": 480, "test": 768}
MODEL = Path(__file__).parent / "model"


def _at(where: Int[np.ndarray, "n"], *numbers: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    return np.choose(where, numbers)


# Look for the place of the greatest, then read what stands there.
LOOKUP = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "where": lambda a, b, c, d: np.stack([a, b, c, d]).argmax(0),
        "greatest": lambda where, a, b, c, d: _at(where, a, b, c, d),
    },
    output="greatest",
)
# Wrong, with the right answers: the greatest of each half first.
HALVES = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first_half": lambda a, b: np.maximum(a, b),
        "second_half": lambda c, d: np.maximum(c, d),
        "greatest": lambda first_half, second_half: np.maximum(first_half, second_half),
    },
    output="greatest",
)
# Wrong, with the right answers: the greatest so far, number by number.
RUNNING = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "of_two": lambda a, b: np.maximum(a, b),
        "of_three": lambda of_two, c: np.maximum(of_two, c),
        "greatest": lambda of_three, d: np.maximum(of_three, d),
    },
    output="greatest",
)
# Wrong: the second greatest, and the last.
SECOND = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "where": lambda a, b, c, d: np.stack([a, b, c, d]).argsort(0)[-2],
        "greatest": lambda where, a, b, c, d: _at(where, a, b, c, d),
    },
    output="greatest",
)
LAST = tls.CausalModel(inputs=INPUTS, mechanisms={"greatest": lambda d: d}, output="greatest")


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="greatest_of_list",
        description=f"the greatest of four different numbers below {NUMBERS}",
        model=load_model,
        dataset=dataset,
        examples=examples,
        causal_model=LOOKUP,
        alignment=alignment(),
        pairs=pairs,
        chance=1 / (NUMBERS - LEAST_ANSWER),
        causal_models={
            "lookup": LOOKUP,
            "halves": HALVES,
            "running": RUNNING,
            "second_greatest": SECOND,
            "last": LAST,
        },
        wrong=("halves", "running", "second_greatest", "last"),
    )


def alignment() -> tls.Alignment:
    """Which units carry each variable (found by find_alignment.py): the keys of the four numbers, which decide where
    the query looks, and what the heads then bring to it."""
    keys, brought = (
        tls.Site(kind="head", layer=0, hook=f"blocks.0.attn.{hook}", size=4, positions=positions)
        for hook, positions in (("hook_k", NUMBER_POSITIONS), ("hook_z", ANSWER_POSITION))
    )
    return tls.Alignment(
        {
            "where": [tls.Unit(keys, i) for i in range(4)],
            "greatest": [tls.Unit(brought, i) for i in range(4)],
        }
    )


def numbers(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: ``a``, ``b``, ``c``, ``d`` are the digits of ``index`` to the base 32."""
    return dict(zip(INPUTS, np.unravel_index(index, (NUMBERS,) * len(INPUTS)), strict=True))


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All inputs of four different numbers, by split and answer: ``pools()[split][greatest]`` are input numbers."""
    index = np.arange(NUMBERS ** len(INPUTS))
    a, b, c, d = numbers(index).values()
    different = (a != b) & (a != c) & (a != d) & (b != c) & (b != d) & (c != d)
    index, answer = index[different], np.maximum(np.maximum(a, b), np.maximum(c, d))[different]
    key = tls.pairing.split_of(index) * NUMBERS + answer
    order = np.argsort(key, kind="stable")
    parts = np.split(index[order], np.searchsorted(key[order], np.arange(1, len(SIZES) * NUMBERS)))
    return tuple(tuple(parts[NUMBERS * s : NUMBERS * (s + 1)]) for s in range(len(SIZES)))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, every answer from 8 to 31 equally often.

    Returns:
        Columns ``a``, ``b``, ``c``, ``d`` and ``answer``, in random order.
    """
    rng = np.random.default_rng(seed)
    parts = {}
    for (name, size), pool in zip(SIZES.items(), pools(), strict=True):
        each = size // (NUMBERS - LEAST_ANSWER)
        drawn = np.concatenate([rng.choice(index, each, replace=False) for index in pool[LEAST_ANSWER:]])
        inputs = numbers(rng.permutation(drawn))
        parts[name] = Dataset.from_dict({**inputs, "answer": LOOKUP.run(inputs)["greatest"]})
    return DatasetDict(parts)


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``; the counterfactual of an example is another example
    of its split, with another answer for half of them."""
    train, validation, test = (_examples(rows, seed) for rows in dataset(seed).values())
    return train, validation, test


def pairs(
    n: int = 512, seed: int = 0, part: str = "test", causal_model: tls.CausalModel = LOOKUP, least: int = 3
) -> tls.Pairs:
    """Pairs of inputs of the test part of the input space (or of another), balanced for every variable of a causal
    model, from a pool in which every answer from 8 to 31 is there equally often.

    Without numbers below ``least``: 0, 1 and 2 are never the greatest of four, so no network learns to answer them.
    """
    rng = np.random.default_rng([seed, 1])
    pool = [index[_least(index) >= least] for index in pools()[list(SIZES).index(part)][LEAST_ANSWER:]]
    inputs = numbers(np.concatenate([rng.choice(index, len(pool[0]), replace=False) for index in pool]))
    return tls.pairing.pairs(causal_model, inputs, encode, ANSWERS, n=n, seed=seed)


def _least(index: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    return np.stack(list(numbers(index).values())).min(0)


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[a, b, c, d, query]``, answered at the query."""
    answer = LOOKUP.run(inputs)["greatest"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(answer), QUERY)], axis=1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(answer), choices=torch.arange(NUMBERS))


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)


def _examples(rows: Dataset, seed: int) -> tls.Examples:
    columns = rows.with_format("numpy")
    found = encode({name: np.asarray(columns[name]) for name in INPUTS})
    partner = torch.from_numpy(tls.pairing.partners(np.asarray(columns["answer"]), seed))
    return found.with_partners(partner)
