"""Planted equality: is (a == b) the same as (c == d), in a transformer in which every unit's part is known?

An input is four symbols and a query token; the answer is read at the query. The transformer was trained by interchange
interventions (``python -m tasks.planting planted_equality``) to have each variable where :func:`alignment` says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

import tl_sparsify as tls
from tl_sparsify.tasks.places import Places

SYMBOLS = 32  # token ids 0 to 31
QUERY, SAME, DIFFERENT = 32, 33, 34
VOCABULARY = 35
INPUTS = ("a", "b", "c", "d")
LENGTH = 5
ANSWERS = {True: SAME, False: DIFFERENT}
SIZES = {"train": 2048, "validation": 512, "test": 768}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1250, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
MATCHING = ("L0H1", "L0H2")  # the heads that compare symbols
PLACES = Places(heads=SHAPE["heads"], neurons=SHAPE["mlp"])
FOLDER = Path(__file__).parent

EQUALITY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left_found": lambda a, b: a == b,
        "right_found": lambda c, d: c == d,
        "left": lambda left_found: left_found,
        "right": lambda right_found: right_found,
        "same": lambda left, right: left == right,
    },
    output="same",
)
# The same answers, but the pairs are compared only where the query is: right as far as it goes.
AT_THE_QUERY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, b: a == b,
        "right": lambda c, d: c == d,
        "same": lambda left, right: left == right,
    },
    output="same",
)
# Wrong: the pairs are formed across.
CROSSED = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left_found": lambda a, c: a == c,
        "right_found": lambda b, d: b == d,
        "left": lambda left_found: left_found,
        "right": lambda right_found: right_found,
        "same": lambda left, right: left == right,
    },
    output="same",
)
# Wrong: the same answers, but the second half is told by another variable: are the two pairs alike?
REVERSED = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left_found": lambda a, b: a == b,
        "right_found": lambda left_found, c, d: left_found == (c == d),
        "left": lambda left_found: left_found,
        "right": lambda right_found: right_found,
        "same": lambda right: right,
    },
    output="same",
)


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: their symbols are the digits of ``index`` to the base 32."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 4), strict=True))


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[a, b, c, d, query]``, answered at the query."""
    same = EQUALITY.run(inputs)["same"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(same), QUERY)], axis=1))
    answers = torch.tensor([ANSWERS[value] for value in same.tolist()])
    return tls.pairing.labelled_examples(tokens, answers, choices=torch.tensor([SAME, DIFFERENT]))


SPACE = tls.InputSpace(
    causal_model=EQUALITY,
    size=SYMBOLS**4,
    inputs_of=inputs_of,
    cells=4,
    cell=lambda values: 2 * values["left"].astype(np.int64) + values["right"],
    encode=encode,
    word=lambda same: np.where(same, "same", "different"),
    answers=ANSWERS,
    sizes=SIZES,
    pool=832,
)
drawn, dataset, examples, pairs = SPACE.drawn, SPACE.dataset, SPACE.examples, SPACE.pairs


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "planted_equality",
        "is (a == b) the same as (c == d), planted in four heads and four neurons",
        FOLDER / "model",
        alignment(),
        chance=0.5,
        causal_models={"equality": EQUALITY, "at_the_query": AT_THE_QUERY, "crossed": CROSSED, "reversed": REVERSED},
        wrong=("crossed", "reversed"),
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted: a head at ``b``, one at ``d``, two at the query, neurons at the query."""
    return tls.Alignment(
        {
            "left_found": [PLACES.head(0, 1, position=1)],
            "right_found": [PLACES.head(0, 2, position=3)],
            "left": [PLACES.head(1, 0, position=4)],
            "right": [PLACES.head(1, 3, position=4)],
            "same": [PLACES.neuron(1, i, position=4) for i in (3, 11, 18, 26)],
        }
    )


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, cell by cell."""
    names = ("neither", "right_only", "left_only", "both")
    return {name: measure(SPACE.of_cells(2, cell)) for cell, name in enumerate(names)}
