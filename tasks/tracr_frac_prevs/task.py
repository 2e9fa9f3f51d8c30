"""A share by a compiled RASP program: what part of the letters up to here are vowels? Causal models and alignment.

An input is six letters, three of the alphabet's six being vowels; the answer is read at the fourth: 0, 1/4, 1/2, 3/4 or
1 of the first four.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

import tl_sparsify as tls
from tl_sparsify.tasks.compiled import INPUTS, Layout, Program, every_string

LETTERS = "abcdei"  # token ids 0 to 5
VOWELS = (0, 4, 5)
LENGTH = 6
AT = 4  # behind BOS
MODEL = Path(__file__).parent / "model"


def vowel(token: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each letter is a vowel."""
    return np.isin(token, VOWELS)


def share(*vowels: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The part of them that are vowels."""
    return np.mean(vowels, axis=0)


FRAC_PREVS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "v1": lambda t1: vowel(t1),
        "v2": lambda t2: vowel(t2),
        "v3": lambda t3: vowel(t3),
        "v4": lambda t4: vowel(t4),
        "fraction": lambda v1, v2, v3, v4: share(v1, v2, v3, v4),
        "share": lambda fraction: fraction,
    },
    output="share",
)
# The same answers, and right as well, if coarser: `first` is v1 and v2 together, `second` v3 and v4.
HALVES = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "first": lambda t1, t2: vowel(t1).astype(int) + vowel(t2),
        "second": lambda t3, t4: vowel(t3).astype(int) + vowel(t4),
        "share": lambda first, second: (first + second) / 4,
    },
    output="share",
)
# Wrong: all six letters are looked at.
WHOLE = replace(
    FRAC_PREVS,
    mechanisms={
        **FRAC_PREVS.mechanisms,
        "fraction": lambda v1, v2, v3, v4, t5, t6: share(v1, v2, v3, v4, vowel(t5), vowel(t6)),
    },
)
# Wrong: the letter here is left out.
BEFORE = replace(
    FRAC_PREVS,
    mechanisms={
        **FRAC_PREVS.mechanisms,
        "fraction": lambda v1, v2, v3: share(v1, v2, v3),
    },
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return program().task()


def program() -> Program:
    """The compiled program, with more than the task says of it."""
    layout = Layout.load(MODEL)
    return Program(
        name="tracr_frac_prevs",
        description="the share of vowels among the first four of six letters, by a compiled RASP program",
        folder=MODEL,
        causal_model=FRAC_PREVS,
        causal_models={"frac_prevs": FRAC_PREVS, "halves": HALVES, "whole": WHOLE, "before": BEFORE},
        wrong=("whole", "before"),
        alignment=tls.Alignment(
            {
                **{f"v{i}": layout.some_neurons(0, [0], i) for i in range(1, 5)},
                "fraction": layout.head(1, AT),
                "share": layout.some_neurons(1, range(25), AT),
            }
        ),
        directions=tls.Alignment(
            {
                **{f"v{i}": layout.directions("vowel", 0, i) for i in range(1, 5)},
                "fraction": layout.directions("frac_prevs", 1, AT, "resid_mid"),
                "share": layout.directions("share", 1, AT),
            }
        ),
        inputs=lambda: every_string(len(LETTERS)),
        answers={value: token for token, value in enumerate(fractions())},
        asked=(0.0, 0.25, 0.5, 0.75, 1.0),
        position=AT,
        sizes=(200, 60, 60),
    )


def fractions() -> tuple[float, ...]:
    """The shares that there can be among up to six letters, in order: the output tokens."""
    return tuple(sorted({part / whole for whole in range(1, LENGTH + 1) for part in range(whole + 1)}))
