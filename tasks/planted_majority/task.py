"""Planted majority: are two of three symbols low, in a transformer in which every unit's part is known?

An input is three symbols and a query token; the answer is read at the query. The transformer was trained by interchange
interventions (``python -m tasks.planting planted_majority``) to have each variable where :func:`alignment` says.
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

SYMBOLS, HALF = 32, 16  # token ids 0 to 31; those below 16 are low
QUERY, YES, NO = 32, 33, 34
VOCABULARY = 35
INPUTS = ("p", "q", "r")
LENGTH = 4
ANSWERS = {True: YES, False: NO}
SIZES = {"train": 2048, "validation": 512, "test": 768}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 32}
PLACES = Places(heads=SHAPE["heads"], neurons=SHAPE["mlp"])
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


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 3), strict=True))


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[p, q, r, query]``, answered at the query."""
    majority = torch.from_numpy(MAJORITY.run(inputs)["majority"].copy())
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(majority), QUERY)], axis=1))
    return tls.pairing.labelled_examples(tokens, torch.where(majority, YES, NO), choices=torch.tensor([YES, NO]))


SPACE = tls.InputSpace(
    causal_model=MAJORITY,
    size=SYMBOLS**3,
    inputs_of=inputs_of,
    cells=8,
    cell=lambda values: 4 * values["first"] + 2 * values["second"] + values["third"],
    encode=encode,
    word=lambda majority: np.where(majority, "yes", "no"),
    answers=ANSWERS,
    sizes=SIZES,
    pool=512,
)
drawn, dataset, examples, pairs = SPACE.drawn, SPACE.dataset, SPACE.examples, SPACE.pairs


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "planted_majority",
        "are two of three symbols low, planted in three heads and 16 neurons",
        FOLDER / "model",
        alignment(),
        chance=0.5,
        causal_models={"majority": MAJORITY, "two_votes": TWO_VOTES, "tie_break": TIE_BREAK, "even": EVEN},
        wrong=("tie_break", "even"),
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted: three heads of layer 0 and every other neuron of layer 1, at the query."""
    return tls.Alignment(
        {
            "first": [PLACES.head(0, 2, position=3)],
            "second": [PLACES.head(0, 0, position=3)],
            "third": [PLACES.head(0, 1, position=3)],
            "majority": [PLACES.neuron(1, i, position=3) for i in range(1, SHAPE["mlp"], 2)],
        }
    )


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, by how many symbols are low."""
    cells = {f"{n}_low": [cell for cell in range(8) if cell.bit_count() == n] for n in range(4)}
    return {name: measure(SPACE.of_cells(2, *some)) for name, some in cells.items()}
