"""Accuracy: how well a model does a task at all. A circuit of a model that cannot do it explains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tl_sparsify._internal.ranks import summed
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_model, shared_batches
from tl_sparsify.core.metrics import by_example, correct
from tl_sparsify.core.units import Model

ENOUGH = 0.7
"""Among the choices; below it a run warns."""


@dataclass(frozen=True)
class Accuracy:
    """How often the right answer has the greatest logit.

    Attributes:
        vocabulary: among all tokens.
        choices: among the choices; the same where there are none.
        n: examples.
    """

    vocabulary: float
    choices: float
    n: int

    def __str__(self) -> str:
        if self.vocabulary == self.choices:
            return f"{self.choices:.3f} (n={self.n})"
        return f"{self.choices:.3f} among the choices, {self.vocabulary:.3f} over the whole vocabulary (n={self.n})"


def accuracy(model: Model, examples: Examples, *, batch_size: int | None = None) -> Accuracy:
    """The model's accuracy: of each example's labelled positions the share that is right (all or none of an answer of
    several tokens), and the mean of these. One forward pass.

    Raises:
        ValueError: a model in training mode, a NaN or infinite output.
    """
    check_model(model)

    def parts() -> Iterator[tuple[Tensor]]:
        for _, batch in shared_batches(model, examples, batch_size):
            whole = replace(batch, choices=None)
            logits = answer_logits(model, whole)
            chosen = logits if batch.choices is None else logits[:, batch.choices.to(logits.device)]
            right = [by_example(correct(logits, whole), batch), by_example(correct(chosen, batch), batch)]
            yield (torch.stack([part.sum().double() for part in right]),)

    with torch.no_grad():
        (total,) = summed(parts(), len(examples))
    every, among = (total / len(examples)).tolist()
    return Accuracy(every, among, len(examples))
