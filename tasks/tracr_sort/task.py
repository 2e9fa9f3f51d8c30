"""Sorting by a compiled RASP program: which is the third smallest number? Causal models and alignment.

An input is six numbers from 1 to 5, some of them equal; the answer is read at the third position: what stands there
when they are sorted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import tl_sparsify as tls
from tl_sparsify.tasks.compiled import INPUTS, Layout, Program, Strings, Tokens, every_string, string

NUMBERS = (1, 2, 3, 4, 5)  # token ids 0 to 4
LENGTH = 6
AT = 3  # behind BOS
EVERYWHERE = tuple(range(1, LENGTH + 1))
MODEL = Path(__file__).parent / "model"


def smaller(keys: Strings) -> Strings:
    """How many of the row's keys are smaller than each."""
    return (keys[:, None, :] < keys[:, :, None]).sum(2)


def one_pass(keys: Strings) -> Strings:
    """The index that each of the row's keys has when neighbours have been exchanged once, from left to right."""
    order = np.tile(np.arange(LENGTH), (len(keys), 1))
    rows = np.arange(len(keys))
    for i in range(LENGTH - 1):
        swap = keys[rows, order[:, i]] > keys[rows, order[:, i + 1]]
        order[swap, i : i + 2] = order[swap, i : i + 2][:, ::-1]
    return order.argsort(1)


def picked(string: Strings, ranks: Strings) -> Tokens:
    """The number that has rank ``AT - 1``."""
    return string[np.arange(len(string)), (ranks == AT - 1).argmax(1)]


SORT = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "string": string,
        # six times the program's keys, which are fractions: the earlier of two equal numbers is the smaller
        "keys": lambda string: LENGTH * string + np.arange(LENGTH),
        "widths": lambda keys: 1 / (1 + smaller(keys)),
        "ranks": lambda widths: np.rint(1 / widths - 1).astype(int),
        "sorted": picked,
    },
    output="sorted",
)
# The same answers without keys and ranks: the greatest of the three smallest.
SELECT = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "string": string,
        "smallest": lambda string: np.sort(string, 1)[:, :AT],
        "sorted": lambda smallest: smallest.max(1),
    },
    output="sorted",
)
# Wrong: the other way round.
DESCENDING = replace(SORT, mechanisms={**SORT.mechanisms, "widths": lambda keys: 1 / (1 + smaller(-keys))})
# Wrong: one pass of a bubble sort, which takes every number past its right neighbour once.
ONE_PASS = replace(SORT, mechanisms={**SORT.mechanisms, "widths": lambda keys: 1 / (1 + one_pass(keys))})


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return program().task()


def program() -> Program:
    """The compiled program, with more than the task says of it."""
    layout = Layout.load(MODEL)
    return Program(
        name="tracr_sort",
        description="the third smallest of six numbers from 1 to 5, by a compiled RASP program that sorts them",
        folder=MODEL,
        causal_model=SORT,
        causal_models={"sort": SORT, "select": SELECT, "descending": DESCENDING, "one_pass": ONE_PASS},
        wrong=("descending", "one_pass"),
        alignment=tls.Alignment(
            {
                "keys": layout.some_neurons(0, range(len(NUMBERS) * LENGTH), EVERYWHERE),
                "widths": layout.head(1, EVERYWHERE),
                "ranks": layout.some_neurons(1, range(14), EVERYWHERE),
                "sorted": layout.head(2, AT),
            }
        ),
        directions=tls.Alignment(
            {
                "keys": layout.directions("keys", 0, EVERYWHERE),
                "widths": layout.directions("target_pos_selector_width_attn_output", 1, EVERYWHERE, "resid_mid"),
                "ranks": layout.directions("target_pos", 1, EVERYWHERE),
                "sorted": layout.directions("sort", 2, AT),
            }
        ),
        inputs=lambda: every_string(len(NUMBERS)),
        answers={token: token for token in range(len(NUMBERS))},
        asked=tuple(range(len(NUMBERS))),
        position=AT,
        sizes=(140, 48, 48),
    )
