"""Histogram by a compiled RASP program: how often does this letter occur? Causal models and alignment.

An input is six letters; the answer is read at the third: how many of the six are the same letter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

import tl_sparsify as tls
from tl_sparsify.tasks.compiled import INPUTS, Layout, Program, every_string, string

LETTERS = "abcde"  # token ids 0 to 4
LENGTH = 6
AT = 3  # behind BOS
MODEL = Path(__file__).parent / "model"


def width(selected: Bool[np.ndarray, "n *rest"]) -> Float[np.ndarray, "n *rest"]:
    """The attention that is left for the first token when it and all that is selected get the same."""
    return 1 / (1 + selected.sum(-1))


HIST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "string": string,
        "width": lambda string: width(string == string[:, AT - 1, None]),
        "count": lambda width: np.rint(1 / width - 1).astype(int),
    },
    output="count",
)
# Wrong, though its answers are right: the two sides are counted apart and added; the head counts both at once.
SIDES = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "before": lambda t1, t2, t3: (t1 == t3).astype(int) + (t2 == t3),
        "after": lambda t3, t4, t5, t6: (t4 == t3).astype(int) + (t5 == t3) + (t6 == t3),
        "count": lambda before, after: before + after + 1,
    },
    output="count",
)
# Wrong: only the letters up to here are counted, as a model with causal attention would.
SO_FAR = replace(
    HIST,
    mechanisms={**HIST.mechanisms, "width": lambda string: width(string[:, :AT] == string[:, AT - 1, None])},
)
# Wrong: the most frequent letter is counted, whatever stands here.
MOST = replace(
    HIST,
    mechanisms={**HIST.mechanisms, "width": lambda string: width(string[:, None] == string[..., None]).min(1)},
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return program().task()


def program() -> Program:
    """The compiled program, with more than the task says of it."""
    layout = Layout.load(MODEL)
    return Program(
        name="tracr_hist",
        description="how often the third of six letters occurs, by a compiled RASP program that counts every letter",
        folder=MODEL,
        causal_model=HIST,
        causal_models={"hist": HIST, "sides": SIDES, "so_far": SO_FAR, "most": MOST},
        wrong=("sides", "so_far", "most"),
        alignment=tls.Alignment({"width": layout.head(0, AT), "count": layout.some_neurons(0, range(14), AT)}),
        directions=tls.Alignment(
            {
                "width": layout.directions("hist_selector_width_attn_output", 0, AT, "resid_mid"),
                "count": layout.directions("hist", 0, AT),
            }
        ),
        inputs=lambda: every_string(len(LETTERS)),
        answers={count: count for count in range(LENGTH + 1)},
        asked=(1, 2, 3, 4),
        position=AT,
        sizes=(400, 120, 120),
    )
