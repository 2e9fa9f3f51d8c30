"""Planted sum: is a + b greater than c + d, in a transformer in which every unit's part is known?

An input is four numbers and a query token; the answer is read at the query. The transformer was trained by interchange
interventions (``python -m tasks.planting planted_sum``) to have each variable where :func:`alignment` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

import tl_sparsify as tls
from tl_sparsify.tasks.places import Places

NUMBERS = 16  # token ids 0 to 15; before training they stand on a line, in their order
QUERY, GREATER, NOT_GREATER = 16, 17, 18
VOCABULARY = 19
INPUTS = ("a", "b", "c", "d")
LENGTH = 5
ANSWERS = {True: GREATER, False: NOT_GREATER}
SIZES = {"train": 2048, "validation": 512, "test": 768}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
PLACES = Places(heads=SHAPE["heads"], neurons=SHAPE["mlp"])
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


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: the digits of ``index`` to the base 16."""
    return dict(zip(INPUTS, np.unravel_index(index, (NUMBERS,) * 4), strict=True))


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[a, b, c, d, query]``, answered at the query."""
    greater = SUMS.run(inputs)["greater"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(greater), QUERY)], axis=1))
    answers = torch.tensor([ANSWERS[value] for value in greater.tolist()])
    return tls.pairing.labelled_examples(tokens, answers, choices=torch.tensor([GREATER, NOT_GREATER]))


def _cell(values: Mapping[str, np.ndarray]) -> Int[np.ndarray, "n"]:
    """By the answer, and whether the sums differ by two at most."""
    close = np.abs(values["left"] - values["right"]) <= 2
    return 2 * values["greater"].astype(np.int64) + close


SPACE = tls.InputSpace(
    causal_model=SUMS,
    size=NUMBERS**4,
    inputs_of=inputs_of,
    cells=4,
    cell=_cell,
    encode=encode,
    word=lambda greater: np.where(greater, "greater", "not greater"),
    answers=ANSWERS,
    sizes=SIZES,
    pool=1000,
)
drawn, dataset, examples, pairs = SPACE.drawn, SPACE.dataset, SPACE.examples, SPACE.pairs


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "planted_sum",
        "is a + b greater than c + d, planted in two heads and eight neurons",
        FOLDER / "model",
        alignment(),
        chance=0.5,
        causal_models={"sums": SUMS, "left_only": LEFT_ONLY, "differences": DIFFERENCES, "greatest": GREATEST},
        wrong=("differences", "greatest"),
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted, all at the query: two heads of layer 0, eight neurons of layer 1."""
    return tls.Alignment(
        {
            "left": [PLACES.head(0, 2, position=4)],
            "right": [PLACES.head(0, 0, position=4)],
            "greater": [PLACES.neuron(1, i, position=4) for i in range(1, SHAPE["mlp"], 4)],
        }
    )


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, cell by cell."""
    names = ("not_greater", "not_greater_close", "greater", "greater_close")
    return {name: measure(SPACE.of_cells(2, cell)) for cell, name in enumerate(names)}
