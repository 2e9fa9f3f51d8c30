"""Induction: copy what followed the last occurrence of the current token. Data, causal models and the transformer.

An input is 24 symbols; the last one is the current token, and the answer is read there.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls
from tl_sparsify._internal import random as _random

SYMBOLS = 10  # token ids 0 to 9
LENGTH = 24
CURRENT = LENGTH - 1  # the position of the current token, where the answer is read
ROWS = 2**17  # the inputs, drawn once for ever
MOST = 3  # earlier occurrences of the current token that are told apart: one, two, more
ANSWERS = {symbol: symbol for symbol in range(SYMBOLS)}
SIZES = {"train": 1920, "validation": 480, "test": 720}
SHAPE = {"layers": 2, "heads": 4, "width": 64, "mlp": 128}
# Heads of layer 0 that attend to the position before, and heads of layer 1 that look for the current symbol.
BEFORE_HEADS, LOOKING_HEADS = (2, 3), (0, 2)
MODEL = Path(__file__).parent / "model"


def previous(symbols: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n length"]:
    """At each position the symbol before it; -1 at the first."""
    return np.concatenate([np.full((len(symbols), 1), -1), symbols[:, :-1]], 1)


def matches(
    previous: Int[np.ndarray, "n length"], symbols: Int[np.ndarray, "n length"]
) -> Bool[np.ndarray, "n length"]:
    """The positions whose previous symbol is the current one."""
    return previous == symbols[:, -1:]


def last(found: Bool[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """The last position that is true."""
    return found.shape[1] - 1 - found[:, ::-1].argmax(1)


def at(where: Int[np.ndarray, "n"], symbols: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """The symbol at a position."""
    return np.take_along_axis(symbols, where[:, None], 1)[:, 0]


def table(symbols: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n symbols"]:
    """For every symbol what followed its last occurrence."""
    before = previous(symbols)
    return np.stack([at(last(before == symbol), symbols) for symbol in range(SYMBOLS)], 1)


def most_frequent(symbols: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """Where what followed the current symbol most often stands first."""
    after = matches(previous(symbols), symbols)
    often = (after[:, None] & (symbols[:, None] == symbols[:, :, None])).sum(2)
    return np.where(after, often, 0).argmax(1)


# Every position knows the symbol before it; the last one that knows the current symbol is found, and read.
INDUCTION = tls.CausalModel(
    inputs=("symbols",),
    mechanisms={
        "previous": previous,
        "where": lambda previous, symbols: last(matches(previous, symbols)),
        "answer": lambda where, symbols: at(where, symbols),
    },
    output="answer",
)
# The same answers, but how the place is found is left open: right as far as it goes.
LOOKUP = tls.CausalModel(
    inputs=("symbols",),
    mechanisms={
        "where": lambda symbols: last(matches(previous(symbols), symbols)),
        "answer": lambda where, symbols: at(where, symbols),
    },
    output="answer",
)
# Wrong, though its answers are right: a table of what follows each symbol, brought up to date at every step.
TABLE = tls.CausalModel(
    inputs=("symbols",),
    mechanisms={
        "table": table,
        "answer": lambda table, symbols: at(symbols[:, -1], table),
    },
    output="answer",
)
# Wrong: the first occurrence, and what followed most often (the first of several).
FIRST = tls.CausalModel(
    inputs=("symbols",),
    mechanisms={
        "previous": previous,
        "where": lambda previous, symbols: matches(previous, symbols).argmax(1),
        "answer": lambda where, symbols: at(where, symbols),
    },
    output="answer",
)
MOST_FREQUENT = tls.CausalModel(
    inputs=("symbols",),
    mechanisms={
        "where": most_frequent,
        "answer": lambda where, symbols: at(where, symbols),
    },
    output="answer",
)


@lru_cache(maxsize=1)
def rows() -> Int[np.ndarray, "rows length"]:
    """All inputs. Every symbol is among the first 23, so that each has been followed by something."""
    index = torch.arange(ROWS)[:, None]
    drawn = _random.bits(0, index, torch.arange(LENGTH)).remainder(SYMBOLS)
    place = _random.bits(1, index, torch.arange(CURRENT)).argsort(1)
    drawn.scatter_(1, place[:, :SYMBOLS], torch.arange(SYMBOLS).expand(ROWS, -1))
    return drawn.numpy()


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n length"]]:
    """The inputs with these numbers."""
    return {"symbols": rows()[index]}


def occurrences(symbols: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """How often the current symbol occurs earlier."""
    return matches(previous(symbols), symbols).sum(1)


def cell(values: tls.pairing.Inputs) -> Int[np.ndarray, "n"]:
    """The answer, and whether the current symbol occurs once, twice or more often before."""
    return MOST * values["answer"] + np.minimum(occurrences(values["symbols"]), MOST) - 1


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """The symbols as tokens, answered at the last."""
    answer = INDUCTION.run(inputs)["answer"]
    return tls.pairing.labelled_examples(
        torch.from_numpy(inputs["symbols"].copy()), torch.from_numpy(answer), choices=torch.arange(SYMBOLS)
    )


SPACE = tls.InputSpace(
    causal_model=INDUCTION,
    size=ROWS,
    inputs_of=inputs_of,
    cells=MOST * SYMBOLS,
    cell=cell,
    encode=encode,
    word=lambda answer: answer,
    answers=ANSWERS,
    sizes=SIZES,
    pool=1800,
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "induction",
        f"what followed the last occurrence of the current token, over {SYMBOLS} symbols",
        MODEL,
        alignment(),
        chance=1 / SYMBOLS,
        causal_models={
            "induction": INDUCTION,
            "lookup": LOOKUP,
            "table": TABLE,
            "first": FIRST,
            "most_frequent": MOST_FREQUENT,
        },
        wrong=("table", "first", "most_frequent"),
    )


def alignment() -> tls.Alignment:
    """Which units carry each variable (found by find_alignment.py): two heads that bring every position the symbol
    before it; queries and keys of the two heads that look for the current one; what these bring."""
    before = tls.Site(
        kind="head", layer=0, hook="blocks.0.attn.hook_z", size=SHAPE["heads"], positions=slice(0, LENGTH)
    )
    query, key, brought = (
        tls.Site(kind="head", layer=1, hook=f"blocks.1.attn.{hook}", size=SHAPE["heads"], positions=positions)
        for hook, positions in (("hook_q", CURRENT), ("hook_k", slice(0, LENGTH)), ("hook_z", CURRENT))
    )
    return tls.Alignment(
        {
            "previous": [tls.Unit(before, i) for i in BEFORE_HEADS],
            "where": [tls.Unit(site, i) for site in (query, key) for i in LOOKING_HEADS],
            "answer": [tls.Unit(brought, i) for i in LOOKING_HEADS],
        }
    )


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)
