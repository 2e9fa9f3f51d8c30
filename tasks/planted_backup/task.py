"""Planted backup: a head copies a symbol, and another head does so only where the first one did not.

An input is three symbols and a query token; the answer, the first symbol, is read at the query. The transformer was
trained by interchange interventions and ablations (``python -m tasks.planting planted_backup``).
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
PLACES = Places(heads=SHAPE["heads"], neurons=SHAPE["mlp"])
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


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: their symbols are the digits of ``index`` to the base 16."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 3), strict=True))


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[x, y, z, query]``, answered at the query."""
    answer = COPY.run(inputs)["answer"]
    tokens = torch.tensor(np.stack([*(inputs[name] for name in INPUTS), np.full(len(answer), QUERY)], axis=1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(answer), choices=torch.arange(SYMBOLS))


SPACE = tls.InputSpace(
    causal_model=COPY,
    size=SYMBOLS**3,
    inputs_of=inputs_of,
    cells=SYMBOLS,
    cell=lambda values: values["answer"],
    encode=encode,
    word=lambda answer: answer,
    answers=ANSWERS,
    sizes=SIZES,
    pool=512,
)
drawn, dataset, examples, pairs = SPACE.drawn, SPACE.dataset, SPACE.examples, SPACE.pairs


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "planted_backup",
        "the first of three symbols, copied by a head that has a silent backup",
        FOLDER / "model",
        alignment(),
        chance=1 / SYMBOLS,
        causal_models={"copy": COPY, "direct": DIRECT, "second": SECOND},
        wrong=("second",),
    )


def alignment() -> tls.Alignment:
    """Which head carries the symbol at the query while nothing is removed (the backup carries nothing then)."""
    return tls.Alignment({"carried": [PLACES.head(0, 1, position=3)]})


def tables(measure: Callable[[tls.Examples], Any]) -> dict[str, Any]:
    """What ``measure`` finds on the whole test split of the input space."""
    return {"test_part": measure(SPACE.of_cells(2, *range(SYMBOLS)))}
