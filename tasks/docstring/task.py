"""Docstring: which argument is described next? Data and causal models, for any language model.

After Heimersheim and Janiak, *A circuit for Python docstrings in a 4-layer attention-only transformer* (2023).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

import tl_sparsify as tls

WORDS = json.loads((Path(__file__).parents[1] / "words.json").read_text())
ARGUMENTS, OTHERS, FUNCTIONS = WORDS["arguments"], WORDS["words"], WORDS["functions"]
NAMES = ("a", "b", "c", "d")
HEAD = 'def {function}(self, {a}, {b}, {c}, {d}):\n    """{word_0} {word_1} {word_2}\n\n'
LINES = (
    "    :param {a}: {word_3} {word_4}\n",
    "    :param {b}: {word_5} {word_6}\n",
    "    :param {c}: {word_7} {word_3}\n",
)
FIELDS = (
    {"function": FUNCTIONS}
    | {name: ARGUMENTS for name in NAMES}
    | {"documented": (1, 2, 3)}
    | {f"word_{i}": OTHERS for i in range(8)}
)
Rows = tls.text.Rows


def rows(n: int, seed: int = 0) -> Rows:
    """Rows with four different arguments."""
    found = tls.text.draw_rows(FIELDS, n, seed)
    arguments = np.stack([found[name] for name in NAMES], 1)
    ordered = np.sort(arguments, 1)
    different = (ordered[:, 1:] != ordered[:, :-1]).all(1)
    found = {name: values[different] for name, values in found.items()}
    return {**found, "template": template(found["documented"])}


def key(inputs: Rows) -> Int[np.ndarray, "n"]:
    """What decides the split: the four arguments, in their order."""
    return tls.text.row_keys(inputs, {name: ARGUMENTS for name in NAMES})


INPUTS = ("sentence", *NAMES, "documented")
Words = Shaped[np.ndarray, "n"]


def at(index: Int[np.ndarray, "n"], a: Words, b: Words, c: Words, d: Words) -> Words:
    """The argument at a place."""
    return np.choose(index, [a, b, c, d])


def after(previous: Words, a: Words, b: Words, c: Words, d: Words) -> Words:
    """The argument that stands after another one; after the last, the first."""
    place = (np.stack([a, b, c, d]) == previous).argmax(0)
    return at((place + 1) % 4, a, b, c, d)


# How many arguments were described says which one is next.
COUNT = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"count": lambda documented: documented, "next": lambda count, a, b, c, d: at(count, a, b, c, d)},
    output="next",
)
# The same answers, but the argument that was described last is looked for in the head, and the one behind it is the
# answer. Other models may do this; the package's own does not.
PREVIOUS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "previous": lambda documented, a, b, c, d: at(documented - 1, a, b, c, d),
        "next": after,
    },
    output="next",
)
# Wrong: the last argument; the one that was described last.
LAST = tls.CausalModel(inputs=INPUTS, mechanisms={"next": lambda d: d}, output="next")
AGAIN = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"next": lambda documented, a, b, c, d: at(documented - 1, a, b, c, d)},
    output="next",
)


def template(documented: Int[np.ndarray, "n"]) -> Words:
    """The text with so many arguments described."""
    return np.array([HEAD + "".join(LINES[:k]) + "    :param" for k in range(4)])[documented]


def arguments(rows: Rows) -> Shaped[np.ndarray, "four n"]:
    """The four arguments."""
    return np.stack([rows[name] for name in NAMES])


def reordered(rows: Rows, rng: np.random.Generator) -> dict[str, Words]:
    """The arguments in a random order."""
    order = rng.random((4, len(rows["a"]))).argsort(0)
    return dict(zip(NAMES, np.take_along_axis(arguments(rows), order, 0), strict=True))


def moved(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The arguments in another order, such that another one is next."""
    found = {name: rows[name].copy() for name in NAMES}
    right = at(rows["documented"], **found)
    while (same := at(rows["documented"], **found) == right).any():
        for name, values in reordered(rows, rng).items():
            found[name][same] = values[same]
    return {**rows, **found}


def other_arguments(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """Four other arguments."""
    partner = np.roll(rng.permutation(len(rows["a"])), 1)
    return {**rows, **{name: rows[name][partner] for name in NAMES}}


def sources(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The same arguments in any order, any number of them described, the last of which is not the base's last: so that
    the argument before and the count can be told apart."""
    found = {name: rows[name].copy() for name in NAMES}
    documented = rows["documented"].copy()
    again = np.ones(len(documented), dtype=bool)
    while again.any():
        new, count = reordered(rows, rng), rng.integers(1, 4, len(documented))
        for name in NAMES:
            found[name][again] = new[name][again]
        documented[again] = count[again]
        again = at(documented - 1, **found) == rows["d"]
    return {**rows, **found, "documented": documented, "template": template(documented)}


SENTENCES = tls.text.Sentences(
    causal_model=COUNT,
    rows=rows,
    slots={"function": FUNCTIONS, **dict.fromkeys(NAMES, ARGUMENTS), **{f"word_{i}": OTHERS for i in range(8)}},
    outputs={name: f" {name}" for name in ARGUMENTS},
    key=key,
    cell=lambda rows: rows["documented"],
    counterfactuals={"moved": moved, "other_arguments": other_arguments},
    sources=sources,
    rivals=(PREVIOUS,),
)


def task(
    model: Any = None, padding_side: Literal["left", "right"] = "left", prepend_bos: bool | None = None
) -> tls.Task:
    """The task for a language model (a Hugging Face name or folder, or a bridge), or for the one that comes with this
    package: see the card, README.md."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, padding_side, prepend_bos)
    return data.task(
        "docstring",
        "which argument of a function is described next",
        alignment() if model is None else tls.Alignment({}),
        chance=1 / len(ARGUMENTS),
        causal_models={"count": COUNT, "previous": PREVIOUS, "last": LAST, "again": AGAIN},
        wrong=("last", "again", *(("previous",) if model is None else ())),  # other models may look for it
    )


def alignment() -> tls.Alignment:
    """The units of the package's own language model that carry the count (found by find_alignment.py): the heads of
    layers 0 and 1 at the end."""
    sites = [
        tls.Site(kind="head", layer=layer, hook=f"blocks.{layer}.attn.hook_z", size=6, positions=-1) for layer in (0, 1)
    ]
    return tls.Alignment({"count": [tls.Unit(site, index) for site in sites for index in range(site.size)]})
