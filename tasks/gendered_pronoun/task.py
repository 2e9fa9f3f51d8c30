"""Gendered pronoun: "isn't he" or "isn't she"? Data and causal models, for any language model.

After Mathwin, Corlouer, Kran, Barez and Nanda, *Identifying a preliminary circuit for predicting gendered pronouns in
GPT-2 small* (2023), with a second name in every sentence.
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
TEMPLATES = (
    "So {name} is a {adjective} friend of {other}, isn't",
    "I know that {name} is a {adjective} friend of {other}, isn't",
    "So {name} was a {adjective} friend of {other}, wasn't",
    "You said that {name} was a {adjective} friend of {other}, wasn't",
)
FIELDS = {"template": TEMPLATES, "name": NAMES, "adjective": WORDS["adjectives"], "other": NAMES}
Rows = tls.text.Rows


def rows(n: int, seed: int = 0) -> Rows:
    """Rows of two different names."""
    found = tls.text.draw_rows(FIELDS, n, seed)
    different = found["name"] != found["other"]
    return {name: values[different] for name, values in found.items()}


def key(inputs: Rows) -> Int[np.ndarray, "n"]:
    """What decides the split: both names and the adjective."""
    return tls.text.row_keys(inputs, {name: FIELDS[name] for name in ("name", "other", "adjective")})


INPUTS = ("sentence", "name", "other")
Words = Shaped[np.ndarray, "n"]


def gender(name: Words) -> Words:
    """``he`` or ``she``."""
    return np.where(np.isin(name, WORDS["men"]), "he", "she")


# What goes to the end of the sentence is whether the name is a man's or a woman's, not the name.
GENDER = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"gender": gender, "pronoun": lambda gender: gender},
    output="pronoun",
)
# Wrong: the other name, which is nearer.
NEAREST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"gender": lambda other: gender(other), "pronoun": lambda gender: gender},
    output="pronoun",
)
# Wrong: "he" only where no woman is named.
ANY_WOMAN = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "gender": gender,
        "others": lambda other: gender(other),
        "pronoun": lambda gender, others: np.where((gender == "he") & (others == "he"), "he", "she"),
    },
    output="pronoun",
)


def other_gender(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """Another name, of the other gender."""
    name = rows["name"].copy()
    usable = np.array(words["name"])
    for sex in ("he", "she"):
        names = usable[gender(usable) != sex]
        drawn = rng.choice(names, len(name))
        while (clash := drawn == rows["other"]).any():
            drawn[clash] = rng.choice(names, int(clash.sum()))
        name = np.where(gender(rows["name"]) == sex, drawn, name)
    return {**rows, "name": name}


def other_friend(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """Another friend, whose gender must not matter: held against the other pronoun."""
    drawn = rng.choice(words["other"], len(rows["other"]))
    while (clash := (drawn == rows["name"]) | (drawn == rows["other"])).any():
        drawn[clash] = rng.choice(words["other"], int(clash.sum()))
    return {**rows, "other": drawn}


SENTENCES = tls.text.Sentences(
    causal_model=GENDER,
    rows=rows,
    slots={"name": NAMES, "other": NAMES, "adjective": WORDS["adjectives"]},
    outputs={"he": " he", "she": " she"},
    key=key,
    cell=lambda rows: 2 * (gender(rows["name"]) == "he") + (gender(rows["other"]) == "he"),
    counterfactuals={"other_gender": other_gender, "other_friend": other_friend},
    held_against=lambda rows: np.where(gender(rows["name"]) == "he", "she", "he"),
)


def task(
    model: Any = None, padding_side: Literal["left", "right"] = "left", prepend_bos: bool | None = None
) -> tls.Task:
    """The task for a language model (a Hugging Face name or folder, or a bridge), or for the one that comes with this
    package: see the card, README.md."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, padding_side, prepend_bos)
    return data.task(
        "gendered_pronoun",
        "he or she, by the first of two names",
        alignment() if model is None else tls.Alignment({}),
        chance=0.5,
        causal_models={"gender": GENDER, "nearest": NEAREST, "any_woman": ANY_WOMAN},
        wrong=("nearest", "any_woman"),
    )


def alignment() -> tls.Alignment:
    """The unit of the package's own language model that carries the gender (found by find_alignment.py): a head of
    layer 3, which brings it to the end."""
    heads = tls.Site(kind="head", layer=3, hook="blocks.3.attn.hook_z", size=6, positions=-1)
    return tls.Alignment({"gender": [tls.Unit(heads, 3)]})
