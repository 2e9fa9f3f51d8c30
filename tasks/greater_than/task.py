"""Greater than: in which year did it end? Data and causal models, for any language model.

After Hanna, Liu and Variengien, *How does GPT-2 compute greater-than?* (2023).
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
TEMPLATES = (
    "The {event} lasted from the year {century}{year} to the year {century}",
    "Then a {event} went on from the year {century}{year} to the year {century}",
)
CENTURIES = [str(century) for century in range(11, 19)]
YEARS = [f"{year:02d}" for year in range(2, 94)]
FIELDS = {"template": TEMPLATES, "event": WORDS["events"], "century": CENTURIES, "year": YEARS}
Rows = tls.text.Rows


def rows(n: int, seed: int = 0) -> Rows:
    """Rows of events, centuries and first years."""
    return tls.text.draw_rows(FIELDS, n, seed)


def key(inputs: Rows) -> Int[np.ndarray, "n"]:
    """What decides the split: event, century and year."""
    return tls.text.row_keys(inputs, {name: FIELDS[name] for name in ("event", "century", "year")})


# Where a year is told digit by digit, the answer is the first digit of the end. Of years that end in 1 or 2 it is the
# same as the year's, of years that end in 8 or 9 the next one: what is later, and soonest, is plain from that digit.
PLAIN = ("1", "2", "8", "9")
ENDS = [f"{year:02d}" for year in range(15, 100, 10)]  # the answers that are told apart
INPUTS = ("sentence", "century", "year")
Words = Shaped[np.ndarray, "n"]


def asked(n: int, seed: int = 0) -> Rows:
    """Rows of which examples are made: from the year 05 on, so that every end has ten years before it."""
    found = rows(n, seed)
    late = found["year"] >= "05"
    return {name: values[late] for name, values in found.items()}


def later(start: Int[np.ndarray, "n"]) -> Words:
    """The first of the ends after a year."""
    return np.array(ENDS)[np.searchsorted(np.array(ENDS, dtype=int), start, side="right")]


# The first year is brought to where the last one is told; the answer is later.
LATER = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"start": lambda year: year.astype(int), "end": later},
    output="end",
)
# Wrong: tens alone decide (the end of the decade, whether before the year or after it); the century decides.
TENS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "tens": lambda year: year.astype(int) // 10,
        "end": lambda tens: np.array(ENDS)[np.maximum(tens - 1, 0)],
    },
    output="end",
)
CENTURY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"start": lambda century: century.astype(int), "end": later},
    output="end",
)


def other_year(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """Another first year, with another answer."""
    year = rows["year"].copy()
    for century in np.unique(rows["century"]):  # a tokenizer may split some years of some centuries otherwise
        here = np.flatnonzero(rows["century"] == century)
        pool = np.unique(rows["year"][here])
        same = here
        while len(same) and len(np.unique(later(pool.astype(int)))) > 1:
            year[same] = rng.choice(pool, len(same))
            same = same[later(year[same].astype(int)) == later(rows["year"][same].astype(int))]
    return {**rows, "year": year}


def earliest(rows: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    """The first year is 02 (the paper has 01): every end is later."""
    return {**rows, "year": np.full(len(rows["year"]), YEARS[0])}


def by_digit(tokenizer: Any) -> bool:
    """Whether the tokenizer has one token a digit."""
    return bool(tls.text.digit_by_digit(tokenizer, [f"{century}{end}" for century in CENTURIES for end in ENDS]).all())


def fits(tokenizer: Any, rows: Rows) -> Bool[np.ndarray, "n"]:
    """Whether the year of a row, the earliest one and the ends of its century are two tokens of two digits; or one
    token a digit, and the first digit of the end is plain."""
    if by_digit(tokenizer):
        return np.array([year[-1] in PLAIN for year in rows["year"].tolist()], dtype=bool)
    usable = tls.text.two_token_numbers(tokenizer, CENTURIES, [*YEARS, *ENDS])
    century = np.array([CENTURIES.index(c) for c in rows["century"].tolist()], dtype=int)
    year = np.array([YEARS.index(y) for y in rows["year"].tolist()], dtype=int)
    always = np.all(usable[:, [0, *range(len(YEARS), usable.shape[1])]], axis=1)  # the earliest year, and the ends
    return usable[century, year] & always[century]


def written(tokenizer: Any) -> Mapping[str, str]:
    """The ends as they are answered: both digits, or where each is a token of its own the first one."""
    size = 1 if by_digit(tokenizer) else 2
    return {end: end[:size] for end in ENDS}


SENTENCES = tls.text.Sentences(
    causal_model=LATER,
    rows=asked,
    slots={"event": WORDS["events"]},
    outputs={end: end for end in ENDS},
    key=key,
    cell=lambda rows: later(rows["year"].astype(int)),
    counterfactuals={"other_year": other_year, "earliest": earliest},
    held_against=None,
    fits=fits,
    written=written,
)


def task(
    model: Any = None, padding_side: Literal["left", "right"] = "left", prepend_bos: bool | None = None
) -> tls.Task:
    """The task for a language model (a Hugging Face name or folder, or a bridge), or for the one that comes with this
    package: see the card, README.md."""
    source = tls.task.own_language_model() if model is None else model
    data = tls.text.TextTask(SENTENCES, source, padding_side, prepend_bos)
    return data.task(
        "greater_than",
        "when something ended: the first of nine years that is later than the one in which it began",
        alignment() if model is None else tls.Alignment({}),
        chance=1 / len(ENDS),
        causal_models={"later": LATER, "tens": TENS, "century": CENTURY},
        wrong=("tens", "century"),
    )


def alignment() -> tls.Alignment:
    """The unit of the package's own language model that carries the year (found by find_alignment.py): a head of
    layer 0, which brings it to the end."""
    heads = tls.Site(kind="head", layer=0, hook="blocks.0.attn.hook_z", size=6, positions=-1)
    return tls.Alignment({"start": [tls.Unit(heads, 2)]})
