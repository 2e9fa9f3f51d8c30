"""Examples: what a model is run on and which outputs are right, as one immutable value.

Labels mark where an answer is read: position ``p`` of example ``i`` is answered by ``labels[i, p]``, and -100 means
that no answer is read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

NO_LABEL = -100


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs, right answers and, where there are any, paired counterfactual inputs.

    Attributes:
        tokens: ``[n, pos]`` token ids (or any tensor whose first dimension is the example, for other models).
        labels: ``[n, pos]`` the right output token at each position, -100 where no answer is read.
        attention_mask: ``[n, pos]`` true where there is input; ``None``: everywhere.
        counterfactual_tokens: a paired source or corrupted input for each example.
        counterfactual_labels: its right answers.
        choices: the answer vocabulary; ``None``: every token.

    Raises:
        ValueError: shapes that do not belong together, no label at all, a negative id, a label outside ``choices``.
    """

    tokens: Shaped[Tensor, "n *rest"]
    labels: Int[Tensor, "n pos"]
    attention_mask: Bool[Tensor, "n pos"] | None = None
    counterfactual_tokens: Shaped[Tensor, "n *rest"] | None = None
    counterfactual_labels: Int[Tensor, "n pos"] | None = None
    choices: Int[Tensor, "k"] | None = None

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0:
            raise ValueError("tokens has no example")
        if self.labels.ndim != 2 or len(self.labels) != n:
            raise ValueError(
                f"labels has shape {tuple(self.labels.shape)}; tokens of shape {tuple(self.tokens.shape)} "
                f"need [{n}, pos], with -100 where no answer is read"
            )
        integers = not self.tokens.is_floating_point()
        if integers and self.tokens.ndim == 2 and self.labels.shape[1] not in (1, self.tokens.shape[1]):
            raise ValueError(f"labels has shape {tuple(self.labels.shape)}, tokens {tuple(self.tokens.shape)}")
        unlabelled = (self.labels == NO_LABEL).all(1).nonzero().flatten()
        if len(unlabelled):
            raise ValueError(
                f"labels has no answer for {len(unlabelled)} of {n} examples (first: {int(unlabelled[0])}); "
                "each example needs a label other than -100"
            )
        for name, ids in [("labels", self.labels[self.labels != NO_LABEL]), ("choices", self.choices)]:
            if ids is not None and bool((ids < 0).any()):
                raise ValueError(f"{name} holds {int(ids.min())}; token ids are not negative")
        for name, like in [
            ("attention_mask", self.tokens),
            ("counterfactual_tokens", self.tokens),
            ("counterfactual_labels", self.labels),
        ]:
            value = getattr(self, name)
            if value is not None and value.shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(like.shape)}")
        if self.choices is not None:
            if len(self.choices.unique()) != len(self.choices):
                raise ValueError(f"choices holds an id twice: {self.choices.tolist()}")
            known = torch.isin(self.labels, self.choices) | (self.labels == NO_LABEL)
            if not bool(known.all()):
                raise ValueError(f"labels holds {int(self.labels[~known][0])}, which is not among choices")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Int[Tensor, "some"] | Bool[Tensor, "n"]) -> Examples:
        """The examples at ``index`` (a slice, an index tensor or a mask)."""
        return replace(self, **{name: value[index] for name, value in self._tensors() if name != "choices"})

    def with_partners(self, partner: Int[Tensor, "n"]) -> Examples:
        """The same examples, each with the one numbered ``partner`` as its counterfactual."""
        return replace(self, counterfactual_tokens=self.tokens[partner], counterfactual_labels=self.labels[partner])

    def batches(self, batch_size: int | None) -> Iterator[tuple[Int[Tensor, "batch"], Examples]]:
        """Each batch with the indices of its examples, in order; ``None``: everything in one batch."""
        size = len(self) if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield torch.arange(part.start, part.stop), self[part]

    def to(self, device: torch.device | str) -> Examples:
        """The same examples with every tensor on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None]

    def __repr__(self) -> str:
        answers = int((self.labels != NO_LABEL).sum())
        paired = "" if self.counterfactual_tokens is None else ", with counterfactuals"
        return f"Examples({len(self):,} of shape {tuple(self.tokens.shape[1:])}, {answers:,} answers{paired})"
