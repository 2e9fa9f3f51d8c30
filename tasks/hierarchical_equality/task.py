"""Hierarchical equality: is (a == b) the same as (c == d)? Data, causal models and the trained transformer.

After Geiger, Wu, Potts, Icard and Goodman, *Finding Alignments Between Interpretable Causal Variables and Distributed
Neural Representations* (2024). An input is four symbols and a query token; the answer is read at the query.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls

SYMBOLS = 32  # token ids 0 to 31
QUERY, SAME, DIFFERENT = 32, 33, 34
VOCABULARY = 35
INPUTS = ("a", "b", "c", "d")
ANSWER_POSITION = 4
ANSWERS = {True: SAME, False: DIFFERENT}
SIZES = {"train": 2048, "validation": 512, "test": 768}
MODEL = Path(__file__).parent / "model"
# The neurons of layer 2 that carry ``same`` at the answer, as find_alignment.py finds them.
SAME_NEURONS = (
    5, 12, 21, 31, 35, 41, 46, 47, 48, 49, 60, 62, 66, 67, 73, 75, 78, 82, 90, 97, 102, 115, 124, 132,
    133, 139, 147, 151, 155, 159, 173, 174, 178, 179, 183, 186, 187, 192, 196, 206, 208, 210, 226, 236,
    242, 245, 253, 254,
)  # fmt: skip

EQUALITY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, b: a == b,
        "right": lambda c, d: c == d,
        "same": lambda left, right: left == right,
    },
    output="same",
)
# The same answers, but the right pair is compared only while the answer is formed: right as far as it goes.
LEFT_ONLY = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"left": lambda a, b: a == b, "same": lambda left, c, d: left == (c == d)},
    output="same",
)
# Wrong: the pairs are formed across, so that ``left`` and ``right`` are other variables.
CROSSED = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, c: a == c,
        "right": lambda b, d: b == d,
        "same": lambda left, right: left == right,
    },
    output="same",
)
# Wrong: the variables are right and the answer is their conjunction.
CONJUNCTION = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "left": lambda a, b: a == b,
        "right": lambda c, d: c == d,
        "same": lambda left, right: left & right,
    },
    output="same",
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="hierarchical_equality",
        description="is (a == b) the same as (c == d), over 32 symbols",
        model=load_model,
        dataset=dataset,
        examples=examples,
        causal_model=EQUALITY,
        alignment=alignment(),
        pairs=pairs,
        chance=0.5,
        causal_models={
            "equality": EQUALITY,
            "left_only": LEFT_ONLY,
            "crossed": CROSSED,
            "conjunction": CONJUNCTION,
        },
        wrong=("crossed", "conjunction"),
    )


def alignment() -> tls.Alignment:
    """Which units carry each variable when the answer is read (found by find_alignment.py): a head, a head, and
    neurons of the last layer."""
    heads = tls.Site(kind="head", layer=1, hook="blocks.1.attn.hook_z", size=4, positions=ANSWER_POSITION)
    neurons = tls.Site(kind="neuron", layer=2, hook="blocks.2.mlp.hook_post", size=256, positions=ANSWER_POSITION)
    return tls.Alignment(
        {
            "left": [tls.Unit(heads, 0)],
            "right": [tls.Unit(heads, 1)],
            "same": [tls.Unit(neurons, i) for i in SAME_NEURONS],
        }
    )


def symbols(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers: ``a``, ``b``, ``c``, ``d`` are the digits of ``index`` to the base 32."""
    return dict(zip(INPUTS, np.unravel_index(index, (SYMBOLS,) * 4), strict=True))


def cell(inputs: dict[str, Int[np.ndarray, "n"]]) -> Int[np.ndarray, "n"]:
    """Which of the four combinations of ``left`` and ``right`` each input is in: ``2 * left + right``."""
    values = EQUALITY.run(inputs)
    return 2 * values["left"].astype(np.int64) + values["right"]


@lru_cache(maxsize=1)
def pools() -> tuple[tuple[Int[np.ndarray, "n"], ...], ...]:
    """All 32 ** 4 inputs, by split and cell: ``pools()[split][cell]`` is an array of input numbers."""
    index = np.arange(SYMBOLS**4)
    splits, cells = tls.pairing.split_of(index), cell(symbols(index))
    return tuple(tuple(index[(splits == s) & (cells == k)] for k in range(4)) for s in range(3))


def dataset(seed: int = 0) -> DatasetDict:
    """Train, validation and test inputs without repetition, a quarter of each split in each cell.

    Returns:
        Columns ``a``, ``b``, ``c``, ``d`` (symbols, 0 to 31) and ``answer`` ("same" or "different"), in random order.
    """
    rng = np.random.default_rng(seed)
    return DatasetDict({name: _rows(rng, pools()[i], size) for i, (name, size) in enumerate(SIZES.items())})


def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """Train, validation and test examples of ``dataset(seed)``.

    The counterfactual of an example is another example of its split. Each of the 16 combinations of the two cells is
    equally frequent, so that the counterfactual's answer differs for half of the examples.
    """
    rng = np.random.default_rng(seed)
    rows = [data.with_format("numpy") for data in dataset(seed).values()]
    train, validation, test = ({name: np.asarray(data[name]) for name in INPUTS} for data in rows)
    return _examples(train, rng), _examples(validation, rng), _examples(test, rng)


def pairs(n: int = 512, seed: int = 0, part: str = "test") -> tls.Pairs:
    """Pairs of inputs for interchange interventions, from the test part of the input space or from another one.

    Each of the 16 combinations of base and source cell is equally frequent if n is a multiple of 16. Then for ``left``,
    ``right`` and ``same`` alike an intervention that does nothing is right for exactly half of the pairs. Inputs may
    occur in several pairs; a source is never its own base.
    """
    rng = np.random.default_rng(seed)
    base_cell, source_cell = np.divmod(rng.permutation(np.arange(n) % 16), 4)
    base, source = _draw(rng, base_cell, part), _draw(rng, source_cell, part)
    while (clash := base == source).any():
        source[clash] = _draw(rng, source_cell[clash], part)
    return tls.Pairs(
        base_inputs=symbols(base),
        source_inputs=symbols(source),
        base=tls.Examples(*encode(symbols(base)), choices=_choices()),
        source=tls.Examples(*encode(symbols(source)), choices=_choices()),
        answers=ANSWERS,
    )


def encode(
    inputs: dict[str, Int[np.ndarray, "n"]],
) -> tuple[Int[torch.Tensor, "n pos"], Int[torch.Tensor, "n pos"]]:
    """Tokens ``[a, b, c, d, query]`` and labels: the causal model's answer at the query, -100 elsewhere."""
    same = torch.from_numpy(EQUALITY.run(inputs)["same"].copy())
    tokens = torch.tensor(np.stack([*inputs.values(), np.full(len(same), QUERY)], axis=1))
    labels = torch.full_like(tokens, -100)
    labels[:, ANSWER_POSITION] = torch.where(same, SAME, DIFFERENT)
    return tokens, labels


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)


def partners(cells: Int[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "n"]:
    """For each example the number of another one; every example is a partner once.

    Every cell must hold a quarter of the examples, and that a multiple of eight. Each cell is cut into four groups;
    group j of cell i and group i of cell j are partners.
    """
    order = rng.permutation(len(cells))
    groups = order[np.argsort(cells[order], kind="stable")].reshape(4, 4, -1)
    sources = groups.swapaxes(0, 1).copy()
    for k in range(4):
        sources[k, k] = np.roll(groups[k, k], 1)
    partner = np.empty_like(order)
    partner[groups.ravel()] = sources.ravel()
    return partner


def _rows(rng: np.random.Generator, pool: tuple[Int[np.ndarray, "m"], ...], size: int) -> Dataset:
    drawn = np.concatenate([rng.choice(inputs, size // 4, replace=False) for inputs in pool])
    inputs = symbols(rng.permutation(drawn))
    answer = np.where(EQUALITY.run(inputs)["same"], "same", "different")
    return Dataset.from_dict({**inputs, "answer": answer})


def _examples(inputs: dict[str, Int[np.ndarray, "n"]], rng: np.random.Generator) -> tls.Examples:
    tokens, labels = encode(inputs)
    partner = torch.from_numpy(partners(cell(inputs), rng))
    return tls.Examples(
        tokens,
        labels,
        counterfactual_tokens=tokens[partner],
        counterfactual_labels=labels[partner],
        choices=_choices(),
    )


def _draw(rng: np.random.Generator, cells: Int[np.ndarray, "n"], part: str) -> Int[np.ndarray, "n"]:
    """An input of each of these cells."""
    drawn = np.empty_like(cells)
    for k, inputs in enumerate(pools()[list(SIZES).index(part)]):
        drawn[cells == k] = rng.choice(inputs, int((cells == k).sum()))
    return drawn


def _choices() -> Int[torch.Tensor, "k"]:
    return torch.tensor([SAME, DIFFERENT])
