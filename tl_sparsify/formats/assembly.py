"""Assembly: examples of the rows that can be used, from their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL, beginning, filler, padded
from tl_sparsify.formats.answers import ids_of
from tl_sparsify.formats.spans import Span


@dataclass(frozen=True)
class Usable:
    """Rows that can be used: texts, and for each the tokens of every right and every wrong answer."""

    prompts: list[str]
    others: list[str] | None
    answers: list[list[list[int]]]
    wrong: list[list[list[int]]] | None
    spans: list[dict[str, Span]] | None


def assembled(
    source: Any,
    tokenizer: Any,
    usable: Usable,
    options: list[int] | None,
    settings: Mapping[str, Any],
) -> Examples:
    """The examples. Of an answer of several tokens each is labelled where it comes next, and all but the last follow
    the prompt (teacher forcing), also the counterfactual one."""
    side = settings["padding_side"] or getattr(tokenizer, "padding_side", "right")
    start = beginning(source, tokenizer, usable.prompts[0], settings["prepend_bos"])
    right = [some[0] for some in usable.answers]
    fill = filler(source, tokenizer)

    def rows(texts: Sequence[str]) -> list[list[int]]:
        read = ids_of(tokenizer, texts)
        full = [row if row[:1] == start else start + row for row in read]
        return [row + answer[:-1] for row, answer in zip(full, right, strict=True)]

    own = rows(usable.prompts)
    other = None if usable.others is None else rows(usable.others)
    width = max(map(len, [*own, *(other or [])]))

    def labelled(answers: Sequence[list[int]]) -> Int[Tensor, "n pos"]:
        labels = [[NO_LABEL] * (len(row) - len(some)) + some for row, some in zip(own, answers, strict=True)]
        return padded(labels, width, side, NO_LABEL)

    mask = padded([[1] * len(row) for row in own], width, side, 0).bool()
    masks = mask if other is None else padded([[1] * len(row) for row in other], width, side, 0).bool()
    sets = {"right_answers": usable.answers, "wrong_answers": usable.wrong}
    several = any(len(some) > 1 for each in sets.values() for some in each or [])
    whole = any(len(answer) > 1 for answer in right)
    spans = None
    if usable.spans is not None:
        ahead = [len(row) - len(answer) + 1 for row, answer in zip(own, right, strict=True)]  # the prompt's tokens
        read = [len(row) for row in ids_of(tokenizer, usable.prompts)]
        before = [
            n - m + (width - len(row) if side == "left" else 0) for n, m, row in zip(ahead, read, own, strict=True)
        ]
        names = usable.spans[0]
        spans = {
            name: torch.tensor(
                [[n + place for place in some[name]] for n, some in zip(before, usable.spans, strict=True)]
            )
            for name in names
        }
    return Examples(
        padded(own, width, side, fill),
        labelled(right),
        attention_mask=None if bool(mask.all()) else mask,
        counterfactual_tokens=None if other is None else padded(other, width, side, fill),
        counterfactual_labels=None if usable.wrong is None else labelled([some[0] for some in usable.wrong]),
        choices=None if options is None else torch.tensor(options),
        counterfactual_mask=None if torch.equal(mask, masks) else masks,
        spans=spans,
        whole=whole,
        **({name: _set(each) for name, each in sets.items() if each is not None} if several and not whole else {}),
    )


def _set(each: Sequence[list[list[int]]]) -> Int[Tensor, "n some"]:
    rows = [[tokens[0] for tokens in some] for some in each]
    return padded(rows, max(map(len, rows)), "right", NO_LABEL)
