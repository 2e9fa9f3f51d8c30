"""Indirect object identification: who is given something? Data and causal models, for any language model.

After Wang, Variengien, Conmy, Shlegeris and Steinhardt, *Interpretability in the Wild* (2023). Two names are told, one
of them comes again; the answer is the other one.
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
NAMES = sorted(WORDS["men"] + WORDS["women"])
# The second half is the same in all, so that the third name is always five tokens from the end.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {third} gave a {object} to",
    "Then, {first} and {second} went to the {place}. {third} gave a {object} to",
    "After {first} and {second} met at the {place}, {third} gave a {object} to",
    "While {first} and {second} were at the {place}, {third} gave a {object} to",
    "Yesterday {first} and {second} had a long day at the {place}. {third} gave a {object} to",
)
FIELDS = {
    "template": TEMPLATES,
    "first": NAMES,
    "second": NAMES,
    "repeated": (0, 1),
    "place": WORDS["places"],
    "object": WORDS["objects"],
}
Rows = tls.text.Rows


def rows(n: int, seed: int = 0) -> Rows:
    """Rows with two names, the third name being the first or the second again."""
    found = tls.text.draw_rows(FIELDS, n, seed)
    different = found["first"] != found["second"]
    found = {name: values[different] for name, values in found.items()}
    found["third"] = np.where(found.pop("repeated") == 0, found["first"], found["second"])
    return found


def key(inputs: Rows) -> Int[np.ndarray, "n"]:
    """What decides the split: the two names, whatever their order, and the object."""
    names = np.sort(np.stack([inputs["first"], inputs["second"]]), 0)
    words = {"first": names[0], "second": names[1], "object": inputs["object"]}
    return tls.text.row_keys(words, {"first": NAMES, "second": NAMES, "object": WORDS["objects"]})


INPUTS = ("sentence", "first", "second", "third")
Words = Shaped[np.ndarray, "n"]


def place(first: Words, second: Words, third: Words) -> Int[np.ndarray, "n"]:
    """Which of the two names comes again: 0 the first, 1 the second."""
    return np.where(third == second, 1, 0)


# Which *name* is told again: the one that is not it is the answer, wherever it stands.
TOKEN = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "name": lambda third: third,
        "receiver": lambda name, first, second: np.where(first == name, second, first),
    },
    output="receiver",
)
# The same answers, but which of the two *places* is told again: the name at the other place is the answer, whatever
# the names are. Larger models are said to do this in part; the package's own does not.
POSITION = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "position": place,
        "receiver": lambda position, first, second: np.where(position == 1, first, second),
    },
    output="receiver",
)
# Wrong: the one that was named first; the one that was named last.
FIRST = tls.CausalModel(inputs=INPUTS, mechanisms={"receiver": lambda first: first}, output="receiver")
RECENT = tls.CausalModel(inputs=INPUTS, mechanisms={"receiver": lambda third: third}, output="receiver")


def swapped(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The other one gives: ABB becomes ABA."""
    return {
        **rows,
        "third": np.where(place(rows["first"], rows["second"], rows["third"]) == 1, rows["first"], rows["second"]),
    }


def unlike(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Words:
    """A name for each row that it does not have."""
    found = rng.choice(words["third"], len(rows["third"]))
    while (clash := (found == rows["first"]) | (found == rows["second"])).any():
        found[clash] = rng.choice(words["third"], int(clash.sum()))
    return found


def another(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """A third person gives: ABB becomes ABC, which has no right answer."""
    return {**rows, "third": unlike(rows, words, rng)}


def sources(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The base's third name or its answer comes again; with the answer stands a name that the base does not have. In
    any order, in a sentence of any form. So place and name can be told apart, and so can the name that comes again and
    the answer: the source's answer is then a new name, while its third name in the base makes the base's own third name
    the answer."""
    n = len(rows["first"])
    turned, changed = rng.integers(2, size=(2, n)) == 1
    answer = np.where(rows["third"] == rows["first"], rows["second"], rows["first"])
    new = unlike(rows, words, rng)
    third, other = np.where(changed, answer, rows["third"]), np.where(changed, new, answer)
    names = {"first": np.where(turned, third, other), "second": np.where(turned, other, third), "third": third}
    return {**rows, **names, "template": rng.choice(TEMPLATES, n), "place": rng.choice(words["place"], n)}


SENTENCES = tls.text.Sentences(
    causal_model=TOKEN,
    rows=rows,
    slots={
        "first": NAMES,
        "second": NAMES,
        "third": NAMES,
        "place": WORDS["places"],
        "object": WORDS["objects"],
    },
    outputs={name: f" {name}" for name in NAMES},
    key=key,
    cell=lambda rows: place(rows["first"], rows["second"], rows["third"]),
    counterfactuals={"swapped": swapped, "another": another},
    held_against=lambda rows: rows["third"],
    sources=sources,
    rivals=(POSITION,),
)


def task(
    model: Any = None, padding_side: Literal["left", "right"] = "left", prepend_bos: bool | None = None
) -> tls.Task:
    """The task for a language model (a Hugging Face name or folder, or a bridge), or for the one that comes with this
    package: see the card, README.md."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, padding_side, prepend_bos)
    return data.task(
        "ioi",
        "to whom something is given, by two names one of which comes again",
        alignment() if model is None else tls.Alignment({}),
        chance=1 / len(NAMES),
        causal_models={"token": TOKEN, "position": POSITION, "first": FIRST, "recent": RECENT},
        wrong=("first", "recent", *(("position",) if model is None else ())),  # other models may go by the place
    )


def alignment() -> tls.Alignment:
    """The unit of the package's own language model that carries the name (found by find_alignment.py): a head of
    layer 0, which brings it to the word after it, four tokens from the end."""
    heads = tls.Site(kind="head", layer=0, hook="blocks.0.attn.hook_z", size=6, positions=-4)
    return tls.Alignment({"name": [tls.Unit(heads, 2)]})
