"""Accuracy: how well a model does a task at all. A circuit of a model that cannot do it explains nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, check_model
from tl_sparsify.core.metrics import correct
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
    """The model's accuracy over labelled positions. One forward pass.

    Raises:
        ValueError: a model in training mode, a NaN or infinite output.
    """
    check_model(model)
    every, among, rows = 0.0, 0.0, 0
    with torch.no_grad():
        for _, batch in examples.batches(batch_size_for(model, examples, batch_size)):
            whole = replace(batch, choices=None)
            logits = answer_logits(model, whole)
            right = correct(logits, whole)
            every, rows = every + float(right.sum()), rows + len(right)
            chosen = logits if batch.choices is None else logits[:, batch.choices.to(logits.device)]
            among += float(correct(chosen, batch).sum())
    return Accuracy(every / rows, among / rows, len(examples))
