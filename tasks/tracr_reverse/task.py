"""Reversal by a compiled RASP program: which letter stands at the other end? Causal models and alignment.

An input is a string of one to six letters, filled up with blanks; the answer is read at its first position.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import tl_sparsify as tls
from tl_sparsify.tasks.compiled import INPUTS, Layout, Program, Strings, Tokens, every_string, numbers, string
from tl_sparsify.tasks.pairing import split_of

LETTERS = "abcdef"
BLANK = 0  # token id; letters are ids 1 to 6
LENGTH = 6
AT = 1  # the first letter's position in the tokens, behind BOS
MODEL = Path(__file__).parent / "model"


def picked(string: Strings, opposite: Tokens) -> Tokens:
    """The letter at index ``opposite`` of each string."""
    return np.take_along_axis(string, opposite[:, None], 1)[:, 0]


REVERSE = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "string": string,
        "width": lambda string: 1 / (1 + (string != BLANK).sum(1)),
        "length": lambda width: np.rint(1 / width - 1).astype(int),
        "difference": lambda length: length - (AT - 1),
        "opposite": lambda difference: difference - 1,
        "reversed": picked,
    },
    output="reversed",
)
# The same answers from another variable: the blanks are counted, not the letters.
BLANKS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "string": string,
        "blanks": lambda string: (string == BLANK).sum(1),
        "opposite": lambda blanks: LENGTH - AT - blanks,
        "reversed": picked,
    },
    output="reversed",
)
# Wrong: one is not subtracted, so that the first blank counts as part of the string.
OFF_BY_ONE = replace(
    REVERSE, mechanisms={**REVERSE.mechanisms, "opposite": lambda difference: np.minimum(difference, LENGTH - 1)}
)
# Wrong: nothing is reversed.
COPY = replace(REVERSE, mechanisms={**REVERSE.mechanisms, "opposite": lambda difference: 0 * difference})


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return program().task()


def program() -> Program:
    """The compiled program, with more than the task says of it."""
    layout = Layout.load(MODEL)
    return Program(
        name="tracr_reverse",
        description="the last letter of a string of one to six letters, by a compiled RASP program that reverses it",
        folder=MODEL,
        causal_model=REVERSE,
        causal_models={"reverse": REVERSE, "blanks": BLANKS, "off_by_one": OFF_BY_ONE, "copy": COPY},
        wrong=("off_by_one", "copy"),
        alignment=tls.Alignment(
            {
                "width": layout.head(0, AT),
                "length": layout.some_neurons(0, range(13), AT),
                # one for each length at each index: those of the first index
                "difference": layout.some_neurons(1, range(0, (LENGTH + 1) * LENGTH, LENGTH), AT),
                "opposite": layout.some_neurons(2, range(12), AT),
                "reversed": layout.head(3, AT),
            }
        ),
        directions=tls.Alignment(
            {
                "width": layout.directions("length_selector_width_attn_output", 0, AT, "resid_mid"),
                "length": layout.directions("length", 0, AT),
                "difference": layout.directions("difference", 1, AT),
                "opposite": layout.directions("opposite", 2, AT),
                "reversed": layout.directions("reverse", 3, AT),
            }
        ),
        inputs=inputs,
        answers={token: token for token in range(len(LETTERS) + 1)},
        asked=tuple(range(1, len(LETTERS) + 1)),
        position=AT,
        sizes=(300, 100, 100),
    )


def every_input() -> Strings:
    """Every string of one to six letters, with blanks behind it."""
    found = []
    for length in range(1, LENGTH + 1):
        letters = 1 + every_string(len(LETTERS), length)
        found.append(np.pad(letters, ((0, 0), (0, LENGTH - length)), constant_values=BLANK))
    return np.concatenate(found)


def inputs() -> Strings:
    """Every string of up to four letters, a sixth of those of five and a 36th of those of six, always the same: so
    that the lengths from four to six are about equally frequent."""
    strings = every_input()
    keys = numbers(strings, len(LETTERS) + 1)
    length = (strings != BLANK).sum(1)
    chosen = (length <= 4) | ((length == 5) & (split_of(keys, (1, 5)) == 0))
    return strings[chosen | ((length == 6) & (split_of(keys, (1, 35)) == 0))]
