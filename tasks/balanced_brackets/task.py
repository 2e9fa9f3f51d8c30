"""Balanced brackets: is a row of 18 brackets balanced? Data, causal models and the trained transformer.

An input is eighteen brackets and a query token; the answer is read at the query.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Bool, Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls

LENGTH = 18
OPEN, CLOSE, QUERY, BALANCED, UNBALANCED = range(5)
VOCABULARY = 5
ANSWER_POSITION = LENGTH
ANSWERS = {True: BALANCED, False: UNBALANCED}
SIZES = {"train": 2304, "validation": 576, "test": 768}
# The neurons of layer 1 that carry ``balanced`` at the answer, as find_alignment.py finds them.
BALANCED_NEURONS = (
    0, 5, 7, 10, 11, 14, 16, 18, 22, 23, 24, 25, 26, 27, 36, 38, 40, 42, 44, 48, 49, 50, 51, 53, 55, 57, 58, 60, 61,
    65, 70, 71, 74, 75, 77, 80, 85, 86, 94, 96, 99, 104, 107, 109, 114, 117, 122, 125,
)  # fmt: skip
MODEL = Path(__file__).parent / "model"


def depth(brackets: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n length"]:
    """Opening less closing brackets, up to and with each bracket."""
    return np.cumsum(1 - 2 * brackets.astype(np.int8), axis=1, dtype=np.int8)


def total_zero(brackets: Int[np.ndarray, "n length"]) -> Bool[np.ndarray, "n"]:
    """As many opening as closing brackets."""
    return np.equal(depth(brackets)[:, -1], 0)


def never_below(brackets: Int[np.ndarray, "n length"]) -> Bool[np.ndarray, "n"]:
    """No beginning of the row has more closing than opening brackets."""
    return np.greater_equal(depth(brackets).min(1), 0)


BRACKETS = tls.CausalModel(
    inputs=("brackets",),
    mechanisms={
        "total_zero": total_zero,
        "never_below": never_below,
        "balanced": lambda total_zero, never_below: total_zero & never_below,
    },
    output="balanced",
)
# The same answers, but whether it ever goes below is found only while the answer is formed: right as far as it goes.
TOTAL_ONLY = tls.CausalModel(
    inputs=("brackets",),
    mechanisms={
        "total_zero": total_zero,
        "balanced": lambda total_zero, brackets: total_zero & never_below(brackets),
    },
    output="balanced",
)
# Wrong, with the right answers: no end of the row has more opening brackets. The same where the total is zero.
FROM_THE_RIGHT = tls.CausalModel(
    inputs=("brackets",),
    mechanisms={
        "total_zero": total_zero,
        "never_below": lambda brackets: never_below(1 - brackets[:, ::-1]),
        "balanced": lambda total_zero, never_below: total_zero & never_below,
    },
    output="balanced",
)
# Wrong: only the two outermost brackets are looked at.
OUTERMOST = tls.CausalModel(
    inputs=("brackets",),
    mechanisms={
        "total_zero": total_zero,
        "never_below": lambda brackets: (brackets[:, 0] == OPEN) & (brackets[:, -1] == CLOSE),
        "balanced": lambda total_zero, never_below: total_zero & never_below,
    },
    output="balanced",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="balanced_brackets",
        description=f"are {LENGTH} brackets balanced",
        model=load_model,
        dataset=dataset,
        examples=examples,
        causal_model=BRACKETS,
        alignment=alignment(),
        pairs=pairs,
        chance=0.5,
        causal_models={
            "brackets": BRACKETS,
            "total_only": TOTAL_ONLY,
            "from_the_right": FROM_THE_RIGHT,
            "outermost": OUTERMOST,
        },
        wrong=("from_the_right", "outermost"),
    )


def alignment() -> tls.Alignment:
    """Which units carry each variable when the answer is read (found by find_alignment.py)."""
    first, second = (
        tls.Site(kind="head", layer=layer, hook=f"blocks.{layer}.attn.hook_z", size=4, positions=ANSWER_POSITION)
        for layer in range(2)
    )
    neurons = tls.Site(kind="neuron", layer=1, hook="blocks.1.mlp.hook_post", size=128, positions=ANSWER_POSITION)
    return tls.Alignment(
        {
            "total_zero": [tls.Unit(first, i) for i in range(4)],
            "never_below": [tls.Unit(second, i) for i in (1, 2, 3)],
            "balanced": [tls.Unit(neurons, i) for i in BALANCED_NEURONS],
        }
    )


def brackets(index: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n length"]:
    """The rows with these numbers: bracket ``i`` closes where bit ``i`` is set."""
    return index[:, None] >> np.arange(LENGTH) & 1


@lru_cache(maxsize=1)
def _space() -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """The split, and the cell ``2 * total_zero + never_below``, of each of the 2 ** 18 inputs."""
    index = np.arange(2**LENGTH)
    rows = brackets(index)
    return tls.pairing.split_of(index), 2 * total_zero(rows).astype(np.int64) + never_below(rows)


def pools(part: str) -> tuple[Int[np.ndarray, "n"], ...]:
    """The input numbers of a split by cell: neither, only never below, only total zero, both (balanced)."""
    split, cell = _space()
    return tuple(np.flatnonzero((split == list(SIZES).index(part)) & (cell == k)) for k in range(4))


@lru_cache(maxsize=3)
def near_misses(part: str) -> tuple[Int[np.ndarray, "k 2"], ...]:
    """Pairs of a balanced input and one a step away, both of the split, by the cell of the second: a bracket flipped
    (neither; only never below) or an opening bracket exchanged with a closing one (only total zero)."""
    split, cell = _space()
    balanced = pools(part)[3]
    flips = 1 << np.arange(LENGTH)
    exchanges = np.array([a | b for a, b in itertools.combinations(flips, 2)])
    found = []
    for k, step in enumerate((flips, flips, exchanges)):
        broken = balanced[:, None] ^ step
        row, column = np.nonzero((split[broken] == list(SIZES).index(part)) & (cell[broken] == k))
        found.append(np.stack([balanced[row], broken[row, column]], 1))
    return tuple(found)


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition. Half of each split is balanced; each other input is a
    step away from one of these, a third of them in each of the three unbalanced cells.

    Returns:
        Columns ``brackets`` (0 opens, 1 closes) and ``answer`` ("balanced" or "unbalanced"). An unbalanced input
        stands half a split behind the balanced one that it is a step away from.
    """
    rng = np.random.default_rng(seed)
    return DatasetDict({name: _rows(rng, name, size) for name, size in SIZES.items()})


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``.

    Counterfactuals: for half of the examples the other input of the pair that is a step away, which changes the
    answer; for half another input of the same cell, which does not.
    """
    train, validation, test = (_examples(rows) for rows in dataset(seed).values())
    return train, validation, test


def pairs(n: int = 512, seed: int = 0, part: str = "test") -> tls.Pairs:
    """Pairs of inputs of the test part of the input space (or of another), balanced for every variable.

    They are drawn from all balanced inputs of the part and as many of each unbalanced cell.
    """
    rng = np.random.default_rng([seed, 1])
    cells = pools(part)
    pool = np.concatenate([rng.choice(inputs, len(cells[3]), replace=False) for inputs in cells])
    inputs = {"brackets": brackets(pool)}
    return tls.pairing.pairs(BRACKETS, inputs, encode, ANSWERS, n=n, seed=seed)


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[brackets, query]``, answered at the query."""
    rows = inputs["brackets"]
    answer = np.where(BRACKETS.run(inputs)["balanced"], BALANCED, UNBALANCED)
    tokens = torch.tensor(np.concatenate([rows, np.full((len(rows), 1), QUERY)], 1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(answer), choices=torch.tensor([BALANCED, UNBALANCED]))


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)


def _rows(rng: np.random.Generator, part: str, size: int) -> Dataset:
    """Families of a balanced input and a near miss; no input is in two of them."""
    taken = np.zeros(2**LENGTH, dtype=bool)
    families: list[np.ndarray] = []
    for edges in near_misses(part):
        edges = rng.permutation(edges)
        for column in (0, 1):  # each balanced input once, then each broken one
            edges = edges[np.sort(np.unique(edges[:, column], return_index=True)[1])]
        edges = edges[~taken[edges[:, 0]]][: size // 6]
        taken[edges[:, 0]] = True
        families.append(edges)
    index = np.concatenate(families)[np.arange(size // 2).reshape(3, -1).T.ravel()].T.ravel()
    answer = ["balanced"] * (size // 2) + ["unbalanced"] * (size // 2)
    return Dataset.from_dict({"brackets": brackets(index), "answer": answer})


def _examples(rows: Dataset) -> tls.Examples:
    found = encode({"brackets": np.asarray(rows.with_format("numpy")["brackets"])})
    partner = _partners(len(found))
    return found.with_partners(partner)


def _partners(size: int) -> Int[torch.Tensor, "n"]:
    """Of each six families (two for each kind of near miss) three are paired within, the others with the next ones of
    their kind."""
    family = torch.arange(size // 2)
    next_of_kind = torch.empty_like(family)
    outward = family % 6 < 3
    for kind in range(3):
        group = family[~outward & (family % 3 == kind)]
        next_of_kind[group] = group.roll(1)
    first = torch.where(outward, family + size // 2, next_of_kind)
    second = torch.where(outward, family, next_of_kind + size // 2)
    return torch.cat([first, second])
