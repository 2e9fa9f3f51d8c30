"""Planted gate: p chooses between b and c, in a transformer in which every unit's part is known.

An input is three symbols and a query token; the answer, one of the symbols, is read at the query. The transformer was
trained by interchange interventions (``python -m tasks.planting planted_gate``) to have each variable where
:func:`alignment` says.
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

SYMBOLS, SWITCHES = 8, 64  # token ids 0 to 7 (what b and c are), then 8 to 71 (what p is)
HALF = SYMBOLS + SWITCHES // 2
QUERY = SYMBOLS + SWITCHES
VOCABULARY = QUERY + 1
INPUTS = ("p", "b", "c")
LENGTH = 4
ANSWERS = {symbol: symbol for symbol in range(SYMBOLS)}
SIZES = {"train": 1024, "validation": 512, "test": 512}
SCHEDULE = {"steps": 2500, "batch": 256, "alone_steps": 1000, "free_steps": 1750}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 48}
PLACES = Places(heads=SHAPE["heads"], neurons=SHAPE["mlp"])
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


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers."""
    p, b, c = np.unravel_index(index, (SWITCHES, SYMBOLS, SYMBOLS))
    return {"p": SYMBOLS + p, "b": b, "c": c}


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[p, b, c, query]``, answered at the query."""
    chosen = GATE.run(inputs)["chosen"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(chosen), QUERY)], axis=1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(chosen), choices=torch.arange(SYMBOLS))


SPACE = tls.InputSpace(
    causal_model=GATE,
    size=SWITCHES * SYMBOLS**2,
    inputs_of=inputs_of,
    cells=2 * SYMBOLS,
    cell=lambda values: 2 * values["chosen"] + values["gate"],
    encode=encode,
    word=lambda chosen: chosen,
    answers=ANSWERS,
    sizes=SIZES,
    pool=512,
)
drawn, dataset, examples, pairs = SPACE.drawn, SPACE.dataset, SPACE.examples, SPACE.pairs


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "planted_gate",
        "p chooses between b and c, planted in three heads and 24 neurons",
        FOLDER / "model",
        alignment(),
        chance=1 / SYMBOLS,
        causal_models={"gate": GATE, "ungated": UNGATED, "sorted": SORTED, "even": EVEN},
        wrong=("sorted", "even"),
    )


def alignment() -> tls.Alignment:
    """Where each variable was planted: three heads of layer 0 and every other neuron of layer 1, at the query."""
    return tls.Alignment(
        {
            "gate": [PLACES.head(0, 1, position=3)],
            "first": [PLACES.head(0, 0, position=3)],
            "second": [PLACES.head(0, 3, position=3)],
            "chosen": [PLACES.neuron(1, i, position=3) for i in range(0, SHAPE["mlp"], 2)],
        }
    )


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space, by gate."""
    cells = {"first_chosen": range(1, SPACE.cells, 2), "second_chosen": range(0, SPACE.cells, 2)}
    return {name: measure(SPACE.of_cells(2, *some)) for name, some in cells.items()}
