"""A text task to copy: "Take rice, fish and salt. First cut the", which food? Change what EDIT stands at.

It works as it is, with the language model that comes with the package or with any other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

import tl_sparsify as tls

Rows = tls.text.Rows  # a column for each slot, and one with the template of each row

# EDIT: what is said, up to the answer. Words in braces are slots. Templates may be of different lengths.
TEMPLATES = (
    "Take {first}, {second} and {third}. First cut the",
    "Take {first}, {second}, {fourth} and {third}. First cut the",
)
# EDIT: the words of each slot. Those that the model's tokenizer splits are left out.
FOODS = "bread cheese rice soup fish meat apples eggs butter sugar honey salt".split()
SLOTS = {"first": FOODS, "second": FOODS, "third": FOODS, "fourth": FOODS}

# EDIT: the algorithm that you believe in. A function's parameters are what it is worked out from. Inputs are slots, and
# `sentence`, which is all the rest. What you look for in the model is what lies between: here `wanted`.
INPUTS = ("sentence", "first", "third")
FIRST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"wanted": lambda first: first, "food": lambda wanted: wanted},
    output="food",
)
# EDIT: one that you do not believe in. A task without a wrong model can show nothing.
LAST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"wanted": lambda third: third, "food": lambda wanted: wanted},
    output="food",
)


def different(found: Rows) -> Bool[np.ndarray, "n"]:
    """Which rows make sense. EDIT: here those without the same food twice."""
    foods = np.sort(np.stack([found[slot] for slot in SLOTS]), 0)
    return (foods[1:] != foods[:-1]).all(0)


def rows(n: int, seed: int = 0) -> Rows:
    """Random rows."""
    found = tls.text.draw_rows({"template": TEMPLATES, **SLOTS}, n, seed)
    return {name: values[different(found)] for name, values in found.items()}


def key(found: Rows) -> Int[np.ndarray, "n"]:
    """What decides for ever whether a row is for training, validation or test. EDIT: the slots that matter."""
    return tls.text.row_keys(found, {slot: SLOTS[slot] for slot in ("first", "second", "third")})


def swapped(found: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The counterfactual. EDIT: the same sentence with as many tokens and another answer. ``words`` are the words of
    each slot that can be used."""
    return {**found, "first": found["third"], "third": found["first"]}


SENTENCES = tls.text.Sentences(
    causal_model=FIRST,
    rows=rows,
    slots=SLOTS,
    outputs={food: f" {food}" for food in FOODS},  # EDIT: the text of each answer: one token, with the space before it
    key=key,
    cell=lambda found: found["first"],  # data are drawn evenly from the cells, so that no answer is frequent
    counterfactuals={"swapped": swapped},
    sizes={"train": 256, "validation": 64, "test": 256},
)


def task(model: Any = None, prepend_bos: bool | None = None) -> tls.Task:
    """The task for a language model: a Hugging Face name, a folder, a bridge, or the package's own."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, prepend_bos=prepend_bos)
    return tls.Task(
        name="my_task",  # EDIT: its name, a sentence, and the accuracy of always giving one answer
        description="which of several foods is cut first",
        model=data.model,
        dataset=data.dataset,
        examples=data.examples,
        causal_model=FIRST,
        alignment=tls.Alignment({}),  # nobody has looked yet: `tl-sparsify run` does
        pairs=data.pairs,
        chance=1 / len(FOODS),
        causal_models={"first": FIRST, "last": LAST},
        wrong=("last",),
    )
