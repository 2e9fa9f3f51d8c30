"""TestedModel-verb agreement: "the keys near the cabinet are". Data and causal models, for any language model.

After Linzen, Dupoux and Goldberg, *Assessing the ability of LSTMs to learn syntax-sensitive dependencies* (2016).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Shaped

import tl_sparsify as tls

WORDS = json.loads((Path(__file__).parents[1] / "words.json").read_text())
NOUNS = [word for pair in WORDS["nouns"] for word in pair]
TEMPLATES = (
    "The {noun} {preposition} the {other}",
    "Today the {noun} {preposition} the {other}",
    "I think that the {noun} {preposition} the {other}",
    "We can see that the {noun} {preposition} the {other}",
)
FIELDS = {"template": TEMPLATES, "noun": NOUNS, "preposition": WORDS["prepositions"], "other": NOUNS}
Rows = tls.text.Rows


def rows(n: int, seed: int = 0) -> Rows:
    """Rows of two nouns, which are not one noun's two forms."""
    found = tls.text.draw_rows(FIELDS, n, seed)
    stem = {word: number for number, pair in enumerate(WORDS["nouns"]) for word in pair}
    different = np.array([stem[a] != stem[b] for a, b in zip(found["noun"], found["other"], strict=True)])
    return {name: values[different] for name, values in found.items()}


def key(inputs: Rows) -> Int[np.ndarray, "n"]:
    """What decides the split: both nouns and the preposition."""
    return tls.text.row_keys(inputs, {name: FIELDS[name] for name in ("noun", "other", "preposition")})


INPUTS = ("sentence", "noun", "other")
OTHER_FORM = {a: b for pair in WORDS["nouns"] for a, b in (pair, pair[::-1])}
PLURALS = [plural for _, plural in WORDS["nouns"]]
Words = Shaped[np.ndarray, "n"]


def verb(plural: Bool[np.ndarray, "n"]) -> Words:
    """``is`` or ``are``."""
    return np.where(plural, "are", "is")


# What goes to the end is whether the subject is a plural.
SUBJECT = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"plural": lambda noun: np.isin(noun, PLURALS), "verb": verb},
    output="verb",
)
# Wrong: the nearest noun; either of them.
NEAREST = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"plural": lambda other: np.isin(other, PLURALS), "verb": verb},
    output="verb",
)
EITHER = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "plural": lambda noun: np.isin(noun, PLURALS),
        "attractor": lambda other: np.isin(other, PLURALS),
        "verb": lambda plural, attractor: verb(plural | attractor),
    },
    output="verb",
)


def other_number(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The subject's other form."""
    return {**rows, "noun": np.array([OTHER_FORM[noun] for noun in rows["noun"].tolist()])}


def other_attractor(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The other noun's other form, which must not matter: held against the other verb."""
    return {**rows, "other": np.array([OTHER_FORM[noun] for noun in rows["other"].tolist()])}


def fits(tokenizer: Any, rows: Rows) -> Bool[np.ndarray, "n"]:
    """Whether both forms of both nouns are single tokens."""
    usable = set(tls.text.single_token_words(tokenizer, NOUNS))
    both = [noun for noun in NOUNS if {noun, OTHER_FORM[noun]} <= usable]
    return np.isin(rows["noun"], both) & np.isin(rows["other"], both)


SENTENCES = tls.text.Sentences(
    causal_model=SUBJECT,
    rows=rows,
    slots={"noun": NOUNS, "other": NOUNS, "preposition": WORDS["prepositions"]},
    outputs={"is": " is", "are": " are"},
    key=key,
    cell=lambda rows: 2 * np.isin(rows["noun"], PLURALS) + np.isin(rows["other"], PLURALS),
    counterfactuals={"other_number": other_number, "other_attractor": other_attractor},
    held_against=lambda rows: np.where(np.isin(rows["noun"], PLURALS), "is", "are"),
    fits=fits,
)


def task(
    model: Any = None, padding_side: Literal["left", "right"] = "left", prepend_bos: bool | None = None
) -> tls.Task:
    """The task for a language model (a Hugging Face name or folder, or a bridge), or for the one that comes with this
    package: see the card, README.md."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, padding_side, prepend_bos)
    return data.task(
        "subject_verb_agreement",
        "is or are, by the first of two nouns",
        alignment() if model is None else tls.Alignment({}),
        chance=0.5,
        causal_models={"subject": SUBJECT, "nearest": NEAREST, "either": EITHER},
        wrong=("nearest", "either"),
    )


def alignment() -> tls.Alignment:
    """The units of the package's own language model that carry the number (found by find_alignment.py): two heads of
    layer 3, which bring it to the end."""
    heads = tls.Site(kind="head", layer=3, hook="blocks.3.attn.hook_z", size=6, positions=-1)
    return tls.Alignment({"plural": [tls.Unit(heads, index) for index in (1, 3)]})
