"""Examples: what a model is run on and which outputs are right, as one immutable value.

Labels mark where an answer is read: position ``p`` of example ``i`` is answered by ``labels[i, p]``, and -100 means
that no answer is read there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.core.prompts import NO_LABEL, column, encoded


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
        counterfactual_mask: where the counterfactual has input, where that differs: pairs of other length, in which
            nothing can be interchanged.
        right_answers: ``[n, rights]`` every right answer to an example, its label among them, filled up with -100;
            :mod:`metrics` take sums or means of them, the divergence has no need of them.
        wrong_answers: ``[n, wrongs]`` those that they are held against.
        spans: ``[n, 2]`` for each name the first position and the one behind the last: ``units.at("S1")``.
        whole: whether an example's labels are the tokens of one answer, which is right only if all are.

    Raises:
        ValueError: shapes that do not belong together, no label at all, a negative id, a label outside ``choices`` or
            not among the right answers, a span without a position.

    Example:
        >>> tls.Examples(torch.tensor([[3, 3, 7, 7, 32]]), torch.tensor([[-100, -100, -100, -100, 33]]))
        Examples(1 of shape (5,), 1 answers)
    """

    tokens: Shaped[Tensor, "n *rest"]
    labels: Int[Tensor, "n pos"]
    attention_mask: Bool[Tensor, "n pos"] | None = None
    counterfactual_tokens: Shaped[Tensor, "n *rest"] | None = None
    counterfactual_labels: Int[Tensor, "n pos"] | None = None
    choices: Int[Tensor, "k"] | None = None
    counterfactual_mask: Bool[Tensor, "n pos"] | None = None
    right_answers: Int[Tensor, "n rights"] | None = None
    wrong_answers: Int[Tensor, "n wrongs"] | None = None
    spans: Mapping[str, Int[Tensor, "n 2"]] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "labels", "attention_mask", "counterfactual_tokens", "counterfactual_labels", "choices"):
            object.__setattr__(self, name, _typed(name, getattr(self, name)))
        n = len(self.tokens) if self.tokens.ndim else 0
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
        self._check_sets()
        for name, like in [
            ("attention_mask", self.tokens),
            ("counterfactual_tokens", self.tokens),
            ("counterfactual_labels", self.labels),
            ("counterfactual_mask", self.tokens),
        ]:
            value = getattr(self, name)
            if value is not None and value.shape != like.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {tuple(like.shape)}")
        if self.attention_mask is not None:
            self._check_mask(self.attention_mask)
        if self.choices is not None:
            if self.choices.ndim != 1 or not len(self.choices):
                raise ValueError(
                    f"choices has shape {tuple(self.choices.shape)}; it must be [k], a token for each answer"
                )
            if len(self.choices.unique()) != len(self.choices):
                raise ValueError(f"choices holds an id twice: {self.choices.tolist()}")
            known = torch.isin(self.labels, self.choices) | (self.labels == NO_LABEL)
            if not bool(known.all()):
                raise ValueError(f"labels holds {int(self.labels[~known][0])}, which is not among choices")

    def _check_sets(self) -> None:
        sets = {"right_answers": self.right_answers, "wrong_answers": self.wrong_answers}
        for name, some in [(name, some) for name, some in sets.items() if some is not None]:
            if bool(((self.labels != NO_LABEL).sum(1) != 1).any()):
                raise ValueError(f"{name} need one labelled position for each example")
            outside = some != NO_LABEL
            if len(some) != len(self.tokens) or not bool(outside.any(1).all()):
                raise ValueError(f"{name} has shape {tuple(some.shape)}; each example needs at least one")
            if self.choices is not None and not bool((torch.isin(some, self.choices) | ~outside).all()):
                raise ValueError(f"{name} holds {int(some[outside & ~torch.isin(some, self.choices)][0])}, no choice")
        if self.right_answers is not None:
            label = self.labels.max(1, keepdim=True).values
            missing = (self.right_answers != label).all(1).nonzero().flatten()
            if len(missing):
                raise ValueError(f"right_answers of {len(missing)} examples lack the label (first: {int(missing[0])})")
        for name, places in (self.spans or {}).items():
            if places.shape != (len(self.tokens), 2) or bool((places[:, 0] >= places[:, 1]).any()):
                raise ValueError(f"spans[{name!r}] must hold a first position and one behind the last for each example")

    def _check_mask(self, mask: Bool[Tensor, "n pos"]) -> None:
        none = (~mask.flatten(1).any(1)).nonzero().flatten()
        if len(none):
            raise ValueError(
                f"attention_mask is false everywhere in {len(none)} of {len(mask)} examples (first: {int(none[0])}): "
                "true is where there is input"
            )
        if mask.shape != self.labels.shape:
            return  # of a model with one answer for each input
        hidden = ((self.labels != NO_LABEL) & ~mask.to(self.labels.device)).any(1).nonzero().flatten()
        if len(hidden):
            raise ValueError(
                f"attention_mask hides the labelled position of {len(hidden)} of {len(mask)} examples (first: "
                f"{int(hidden[0])}): an answer is read where there is input; is it padded on the other side?"
            )

    @classmethod
    def from_prompts(
        cls,
        tokenizer_or_model: Any,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        wrong_answers: Sequence[str] | None = None,
        counterfactual_prompts: Sequence[str] | None = None,
        counterfactual_answers: Sequence[str] | None = None,
        choices: Sequence[str] | None = None,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
    ) -> Examples:
        """Examples from text: each prompt is answered, at its last token, by the one token that comes next.

        The text ``prompt + answer`` must have the prompt's tokens and one more, so the space between two words belongs
        to the answer: ``("The capital of France is", " Paris")``. A tokenizer that drops spaces may do without it.

        Args:
            tokenizer_or_model: a Hugging Face tokenizer, or a model that has one as ``.tokenizer``. It is left as it
                is, also where it has no padding token: padding is masked, and any token may stand there.
            answers: the right answer to each prompt.
            wrong_answers: what each answer is held against: ``counterfactual_labels``, where no
                ``counterfactual_answers`` are given.
            counterfactual_prompts: a paired prompt for each, of as many tokens, so that positions match.
            counterfactual_answers: their right answers.
            choices: the answer vocabulary, each one token after the first prompt; every token where not given.
            prepend_bos: whether a beginning-of-sequence token goes before each prompt (never twice); where not given as
                ``model.to_tokens`` has it, and with a tokenizer as that has it.
            padding_side: where shorter prompts are filled up; the tokenizer's side where not given. Both give the same
                numbers; positions counted from the end (``units.at(-1)``) need ``left``.
            max_length: the most tokens that a prompt may have, where that is less than the model's context (or the
                tokenizer's ``model_max_length``). Nothing is ever cut off.

        Returns:
            Tokens, labels and mask ``[n, longest prompt]``; no mask where all are equally long. No model pass.

        Raises:
            ValueError: no prompt, one without a token or longer than the context, lists of other lengths, an answer or
                choice that is several tokens or unknown (with its pieces), or not among ``choices``, a wrong answer
                that is the right one, a pair of other lengths, ``prepend_bos`` for a tokenizer without such a token.
        """
        texts = {
            "prompts": prompts,
            "answers": answers,
            "wrong_answers": wrong_answers,
            "counterfactual_prompts": counterfactual_prompts,
            "counterfactual_answers": counterfactual_answers,
            "choices": choices,
        }
        settings: dict[str, Any] = {"prepend_bos": prepend_bos, "padding_side": padding_side, "max_length": max_length}
        parts: dict[str, Any] = encoded(tokenizer_or_model, texts, **settings)
        return cls(**parts)

    @classmethod
    def from_dataset(
        cls,
        tokenizer_or_model: Any,
        dataset: Any,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        wrong_answer: str | None = None,
        counterfactual_prompt: str | None = None,
        counterfactual_answer: str | None = None,
        choices: Sequence[str] | None = None,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
        max_length: int | None = None,
    ) -> Examples:
        """Examples from the columns of a ``datasets.Dataset``, as :meth:`from_prompts` makes them of lists.

        Args:
            dataset: one split, a row for each example.
            prompt, answer, wrong_answer, counterfactual_prompt, counterfactual_answer: the columns' names; ``None``:
                there is none.

        The other arguments, what is returned and refused are those of :meth:`from_prompts`. No model pass.

        Raises:
            ValueError: also a column that there is not (with those that there are), several splits at once.
        """
        return cls.from_prompts(
            tokenizer_or_model,
            column(dataset, "prompt", prompt) or [],
            column(dataset, "answer", answer) or [],
            wrong_answers=column(dataset, "wrong_answer", wrong_answer),
            counterfactual_prompts=column(dataset, "counterfactual_prompt", counterfactual_prompt),
            counterfactual_answers=column(dataset, "counterfactual_answer", counterfactual_answer),
            choices=choices,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            max_length=max_length,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Int[Tensor, "some"] | Bool[Tensor, "n"]) -> Examples:
        """The examples at ``index`` (a slice, an index tensor or a mask)."""
        taken: dict[str, Any] = {name: value[index] for name, value in self._tensors() if name != "choices"}
        if self.spans is not None:
            taken["spans"] = {name: places[index] for name, places in self.spans.items()}
        return replace(self, **taken)

    def sample(self, n: int, *, seed: int = 0) -> Examples:
        """A random ``n`` of the examples, in their order; all of them where there are no more."""
        return self if n >= len(self) else self[sampled(len(self), n, seed)]

    def with_partners(self, partner: Int[Tensor, "n"]) -> Examples:
        """The same examples, each with the one numbered ``partner`` as its counterfactual."""
        mask = self.attention_mask
        other = None if mask is None or torch.equal(mask, mask[partner]) else mask[partner]
        return replace(
            self,
            counterfactual_tokens=self.tokens[partner],
            counterfactual_labels=self.labels[partner],
            counterfactual_mask=other,  # pairs of other length
        )

    @property
    def counterfactuals(self) -> Examples:
        """The paired inputs, with the labels of those that they are paired with: a source run's.

        Raises:
            ValueError: there are none.
        """
        if self.counterfactual_tokens is None:
            raise ValueError("examples have no counterfactual_tokens: give them, or pair examples (with_partners)")
        none: dict[str, Any] = dict.fromkeys(("counterfactual_tokens", "counterfactual_labels", "counterfactual_mask"))
        return replace(self, tokens=self.counterfactual_tokens, **none)

    def batches(self, batch_size: int | None) -> Iterator[tuple[Int[Tensor, "batch"], Examples]]:
        """Each batch with the indices of its examples, in order; ``None``: everything in one batch."""
        size = len(self) if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield torch.arange(part.start, part.stop, device="cpu"), self[part]

    def to(self, device: torch.device | str) -> Examples:
        """The same examples with every tensor on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors()})

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, value) for name, value in found if isinstance(value, Tensor)]

    def __repr__(self) -> str:
        answers = int((self.labels != NO_LABEL).sum())
        paired = "" if self.counterfactual_tokens is None else ", with counterfactuals"
        return f"Examples({len(self):,} of shape {tuple(self.tokens.shape[1:])}, {answers:,} answers{paired})"


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sampled(total: int, n: int, seed: int = 0) -> Int[Tensor, "some"]:
    """A random ``n`` of the numbers below ``total``, in order; all of them where there are no more."""
    if n < 1:
        raise ValueError(f"n is {n}; at least one example is needed")
    return _random.permutation(total, seed, 79)[:n].sort().values


def _typed(name: str, value: Any) -> Any:
    """A part of the type that it is used in: ids and labels as int64, a mask as bool.

    Raises:
        ValueError: no tensor, or one of numbers that are none of these.
    """
    if value is None and name not in ("tokens", "labels"):
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor: give torch.tensor({name})")
    if name == "attention_mask":
        if value.dtype in _WHOLE and bool(((value == 0) | (value == 1)).all()):
            return value.bool()  # a tokenizer's
        if value.dtype != torch.bool:
            raise ValueError(f"attention_mask is of {value.dtype}; it must be bool, or whole numbers that are 0 or 1")
        return value
    if name.endswith("tokens"):
        if value.dtype in (torch.bool, torch.uint8) or value.is_complex():
            raise ValueError(f"{name} is of {value.dtype}; token ids are int64: give {name}.long()")
        return value
    if value.dtype not in _WHOLE:
        raise ValueError(f"{name} is of {value.dtype}; token ids are whole numbers: give {name}.long()")
    return value.long()
