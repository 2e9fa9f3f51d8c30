"""An overview of tasks: how a task's model does compared with chance, and how many units there are to choose from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tl_sparsify.core.forward import answer_logits, batch_size_for
from tl_sparsify.core.metrics import by_example, correct
from tl_sparsify.core.units import heads, neurons
from tl_sparsify.tasks.task import Task


@dataclass(frozen=True)
class Overview:
    """What there is to know of a task before a search.

    Attributes:
        task, description: for people.
        accuracy: of the model on the test examples, among the choices.
        chance: that of a constant answer.
        units: how many heads and neurons there are.
        kinds: the same in words.
        truth: how the true units are known (``weights``, ``removal``); empty where they are not.
        causal_models: how many hypotheses come with it, and how many of them are wrong.
    """

    task: str
    description: str
    accuracy: float
    chance: float
    units: int
    kinds: str
    truth: tuple[str, ...]
    causal_models: tuple[int, int]


def overview(task: Task, *, seed: int = 0, batch_size: int | None = None) -> Overview:
    """Load a task's model and see how well it does. One forward pass over the test examples."""
    model, (_, _, test) = task.model(), task.examples(seed)
    units = heads(model) + neurons(model)
    right, answers = 0.0, 0
    with torch.no_grad():
        for _, batch in test.batches(batch_size_for(model, test, batch_size)):
            found = by_example(correct(answer_logits(model, batch), batch), batch)
            right, answers = right + float(found.sum()), answers + len(found)
    return Overview(
        task.name,
        task.description,
        right / answers,
        task.chance,
        len(units),
        units.describe(),
        tuple(task.truth),
        (len(task.causal_models), len(task.wrong)),
    )
