"""The beginning token: whether a beginning-of-sequence token goes before each prompt of a text task.

Some models learnt with one and some without, and it can decide how well a model does a task. TransformerLens puts it
first wherever there is one; many tokenizers do not. Where the two differ a few examples are asked both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tl_sparsify.core.memory import device_of
from tl_sparsify.core.prompts import adds_beginning
from tl_sparsify.tasks.accuracy import Accuracy, accuracy
from tl_sparsify.tasks.language_models import load_tokenizer
from tl_sparsify.tasks.task import Task, load_task, takes

EXAMPLES = 64
"""Validation examples that are asked both ways."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """A task for a loaded model, and how its prompts begin.

    Attributes:
        task: with the choice taken.
        model: loaded.
        prepend_bos: the choice; ``None`` where the task has none to make.
        with_bos, without_bos: accuracy both ways, where it was measured.
    """

    task: Task
    model: Any
    prepend_bos: bool | None = None
    with_bos: Accuracy | None = None
    without_bos: Accuracy | None = None

    def __str__(self) -> str:
        if self.prepend_bos is None:
            return ""
        taken = f"prompts begin {'with' if self.prepend_bos else 'without'} a beginning-of-sequence token"
        if self.with_bos is None or self.without_bos is None:
            return taken
        return (
            f"{taken}; accuracy with one: {self.with_bos}; without: {self.without_bos} (--prepend-bos and "
            "--no-prepend-bos settle it)"
        )


def settled(
    name: str | Path,
    *,
    model: str | Path | None = None,
    prepend_bos: bool | None = None,
    device: torch.device | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Beginning:
    """Load a task and its model, and settle how prompts begin: as ``prepend_bos`` says, or where not given as the
    model's tokenizer has it by itself, unless the model is more often right with a beginning token.

    Two forward passes over 64 validation examples, where there is something to settle; else none.

    Raises:
        ValueError: as :func:`load_task`.
    """
    task = load_task(name, model=model, prepend_bos=prepend_bos)
    loaded = task.model()
    if device is not None and device_of(loaded) != device:
        loaded = loaded.to(device, print_details=False)
    if model is None or prepend_bos is not None:
        return Beginning(task, loaded, prepend_bos)
    tokenizer = load_tokenizer(model)
    if tokenizer.bos_token_id is None or not takes(name, "prepend_bos"):
        return Beginning(task, loaded)
    if adds_beginning(tokenizer):
        return Beginning(task, loaded, True)
    both = {first: load_task(name, model=model, prepend_bos=first) for first in (True, False)}
    found = {
        first: accuracy(loaded, one.examples(seed)[1][:EXAMPLES], batch_size=batch_size) for first, one in both.items()
    }
    first = _order(found[True]) > _order(found[False])
    return Beginning(both[first], loaded, first, found[True], found[False])


def _order(found: Accuracy) -> tuple[float, float]:
    return found.choices, found.vocabulary
