"""Four tasks in one transformer, told apart by the first token: data, causal models and the trained transformer.

An input is the name of a task and seven numbers, the last of which is the current one; the answer, a number, is read
there. ``subset(name)`` gives the examples of one of the four, so that their circuits can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls
from tl_sparsify._internal import random as _random

NUMBERS = 12  # token ids 0 to 11
LENGTH = 7  # numbers; the task stands before them
CURRENT = LENGTH  # the position of the current number, where the answer is read
ROWS = 2**17  # the inputs, drawn once for ever
REPEATED = 2**12  # more are drawn, because some come twice
LEAST_GREATEST = 6  # smaller ones are rare
MOST_COUNT = 3  # more are rare
ANSWERS = {number: number for number in range(NUMBERS)}
SIZES = {"train": 1920, "validation": 576, "test": 768}
SHAPE = {"layers": 3, "heads": 6, "width": 96, "mlp": 256}
# Found by find_alignment.py: heads of layer 0 that read the task, and neurons of the last layer that carry the answer.
RULE_HEADS = (0, 2, 3, 4, 5)
ANSWER_NEURONS = (
    0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 18, 19, 20, 21, 22, 23, 27, 28, 29, 30, 32, 33, 36, 37, 38, 39, 40,
    41, 42, 43, 44, 45, 47, 48, 49, 50, 51, 52, 53, 54, 55, 61, 62, 64, 66, 67, 68, 70, 72, 73, 74, 75, 76, 78, 79,
    80, 81, 82, 85, 86, 87, 88, 89, 90, 91, 93, 94, 95, 96, 97, 98, 101, 102, 103, 105, 107, 108, 109, 110, 111,
    112, 113, 115, 116, 118, 119, 120, 121, 124, 125, 126, 127, 128, 129, 130, 132, 133, 134, 135, 136, 138, 139,
    140, 141, 142, 143, 144, 145, 146, 149, 150, 151, 153, 155, 157, 158, 159, 160, 164, 165, 167, 168, 169, 170,
    171, 172, 174, 175, 176, 178, 180, 181, 182, 183, 184, 185, 188, 189, 190, 191, 192, 193, 196, 197, 198, 199,
    200, 201, 202, 203, 204, 205, 206, 207, 208, 209, 211, 215, 216, 217, 218, 219, 221, 222, 223, 225, 226, 227,
    228, 229, 230, 231, 232, 233, 235, 236, 237, 238, 239, 240, 241, 242, 244, 246, 248, 249, 250, 254, 255,
)  # fmt: skip
MODEL = Path(__file__).parent / "model"

Row = Int[np.ndarray, "n length"]


def first(numbers: Row) -> Int[np.ndarray, "n"]:
    """The first number."""
    return numbers[:, 0]


def greatest(numbers: Row) -> Int[np.ndarray, "n"]:
    """The greatest number."""
    return numbers.max(1)


def after(numbers: Row) -> Int[np.ndarray, "n"]:
    """What followed the last earlier occurrence of the current number."""
    same = numbers[:, :-1] == numbers[:, -1:]
    where = LENGTH - 1 - same[:, ::-1].argmax(1)
    return np.take_along_axis(numbers, where[:, None], 1)[:, 0]


def count(numbers: Row) -> Int[np.ndarray, "n"]:
    """How often the current number occurs earlier."""
    return (numbers[:, :-1] == numbers[:, -1:]).sum(1)


TASKS: dict[str, Callable[[Row], Int[np.ndarray, "n"]]] = {
    "first": first,
    "greatest": greatest,
    "after": after,
    "count": count,
}  # the k-th is named by the token NUMBERS + k
VOCABULARY = NUMBERS + len(TASKS)


def answer(rule: Int[np.ndarray, "n"], numbers: Row) -> Int[np.ndarray, "n"]:
    """The answer of each row's task."""
    return np.choose(rule, [function(numbers) for function in TASKS.values()])


# Which task it is, is brought to where the answer is formed.
RULE = tls.CausalModel(
    inputs=("task", "numbers"),
    mechanisms={"rule": lambda task: task, "answer": answer},
    output="answer",
)
# Wrong, though its answers are right: all four answers are found, then one is chosen.
PARALLEL = tls.CausalModel(
    inputs=("task", "numbers"),
    mechanisms={
        **{f"the_{name}": function for name, function in TASKS.items()},
        "rule": lambda task: task,
        "answer": lambda rule, the_first, the_greatest, the_after, the_count: np.choose(
            rule, [the_first, the_greatest, the_after, the_count]
        ),
    },
    output="answer",
)
# Wrong: the least number instead of the greatest; the task makes no difference.
LEAST = tls.CausalModel(
    inputs=("task", "numbers"),
    mechanisms={
        "rule": lambda task: task,
        "answer": lambda rule, numbers: np.where(rule == 1, numbers.min(1), answer(rule, numbers)),
    },
    output="answer",
)
ONE_TASK = tls.CausalModel(
    inputs=("task", "numbers"),
    mechanisms={"answer": greatest},
    output="answer",
)


@lru_cache(maxsize=1)
def rows() -> tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "rows length"]]:
    """All inputs: tasks, and numbers. Each earlier number is made the current one with a probability of a quarter."""
    index = torch.arange(ROWS + REPEATED)[:, None]
    drawn = _random.bits(0, index, torch.arange(LENGTH)).remainder(NUMBERS)
    again = _random.bits(1, index, torch.arange(LENGTH)).remainder(4) == 0
    numbers = torch.where(again, drawn[:, -1:], drawn)
    tasks = index[:, 0].remainder(len(TASKS))
    code = tasks + len(TASKS) * (numbers @ NUMBERS ** torch.arange(LENGTH))
    once = np.sort(np.unique(code.numpy(), return_index=True)[1])[:ROWS]
    return tasks.numpy()[once], numbers.numpy()[once]


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n *rest"]]:
    """The inputs with these numbers."""
    tasks, numbers = rows()
    return {"task": tasks[index], "numbers": numbers[index]}


def cell(values: tls.pairing.Inputs) -> Int[np.ndarray, "n"]:
    """Task and answer, such that every task has as many cells: 24. No cell where the current number does not occur
    earlier or too often, or where the greatest number is too small."""
    some, found, number = values["task"], values["answer"], values["numbers"].sum(1)
    each = np.choose(some, [2 * found, 4 * (found - LEAST_GREATEST), 2 * found, 8 * (found - 1)])
    rest = number % np.array([2, 4, 2, 8])[some]
    times = count(values["numbers"])
    valid = (times >= 1) & (times <= MOST_COUNT) & (greatest(values["numbers"]) >= LEAST_GREATEST)
    return np.where(valid, 24 * some + each + rest, -1)


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[task, numbers]``, answered at the last number."""
    found = RULE.run(inputs)["answer"]
    tokens = torch.tensor(np.concatenate([NUMBERS + inputs["task"][:, None], inputs["numbers"]], 1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(found), choices=torch.arange(NUMBERS))


SPACE = tls.InputSpace(
    causal_model=RULE,
    size=ROWS,
    inputs_of=inputs_of,
    cells=24 * len(TASKS),
    cell=cell,
    encode=encode,
    word=lambda answer: answer,
    answers=ANSWERS,
    sizes=SIZES,
    pool=960,
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return SPACE.task(
        "multi_task",
        f"four tasks by prefix ({', '.join(TASKS)}) on {LENGTH} numbers",
        MODEL,
        alignment(),
        chance=1 / 8,
        causal_models={"rule": RULE, "parallel": PARALLEL, "least": LEAST, "one_task": ONE_TASK},
        wrong=("parallel", "least", "one_task"),
    )


def subset(name: str, seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
    """The train, validation and test examples of ``task().examples(seed)`` that are of one of the four tasks.

    Counterfactuals are of the same task, and half of them have another answer.

    Raises:
        ValueError: a name that is none of the four.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the four are {', '.join(TASKS)}")
    token = NUMBERS + list(TASKS).index(name)

    def of(examples: tls.Examples) -> tls.Examples:
        chosen = examples[examples.tokens[:, 0] == token]
        partner = tls.pairing.partners(chosen.labels[:, CURRENT].numpy(), seed)
        return chosen.with_partners(torch.from_numpy(partner))

    train, validation, test = SPACE.examples(seed)
    return of(train), of(validation), of(test)


def alignment() -> tls.Alignment:
    """Which units carry each variable (found by find_alignment.py): what five heads of layer 0 read at the task, and
    neurons of the last layer where the answer is read."""
    neurons = tls.Site(kind="neuron", layer=2, hook="blocks.2.mlp.hook_post", size=SHAPE["mlp"], positions=CURRENT)
    return tls.Alignment({"rule": reading(0, RULE_HEADS), "answer": [tls.Unit(neurons, i) for i in ANSWER_NEURONS]})


def reading(layer: int, heads: Iterable[int]) -> list[tls.Unit]:
    """All that heads of a layer can read at the task: their keys and values there."""
    keys, values = (
        tls.Site(kind="head", layer=layer, hook=f"blocks.{layer}.attn.{hook}", size=SHAPE["heads"], positions=where)
        for hook, where in (("hook_k", slice(0, 1)), ("hook_v", 0))  # one place, written twice: names are not
    )
    return [tls.Unit(site, i) for site in (keys, values) for i in heads]


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)
