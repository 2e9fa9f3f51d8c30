"""Contexts: places of a text whose next token a model predicts, as examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.ranks import gathered
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_index, answer_logits, answer_rows, check_model, shared_batches
from tl_sparsify.core.prompts import NO_LABEL, beginning, filler, length_limit, padded, tokenizer_of
from tl_sparsify.core.units import Model

_SHORTEST = 4  # tokens of a context: with fewer there is little to predict from
_BLANK = re.compile(r"\r?\n[ \t]*\r?\n\s*")


@checked
def contexts(
    model: Model,
    text: str | Sequence[str],
    *,
    n: int = 512,
    length: int = 48,
    probability: float = 0.5,
    prepend_bos: bool | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Examples:
    """Contexts of a text, each with the token that comes next as its answer, where the model finds that probable.

    Documents are cut into windows of ``length`` tokens; a window gives at most one context, from its first token to a
    random place of it, so that no two contexts have a token of the text in common.

    Args:
        model: a language model with its tokenizer as ``.tokenizer``.
        text: documents, or one text, whose documents have blank lines between them.
        n: the most contexts; drawn from all windows, and in the order of the text.
        length: tokens in a window, the last of which can only be an answer.
        probability: the least that the model gives the right token.
        prepend_bos: as for :meth:`Examples.from_prompts`.

    Returns:
        At most ``n`` examples, padded on the left, over the whole vocabulary.

    Cost: one forward pass over the text.

    Raises:
        ValueError: a model without a tokenizer, windows shorter than five tokens or longer than the model's context, a
            probability outside [0, 1), a text of which nothing is predicted that well.

    Example:
        >>> small = tls.text.load_language_model(tls.task.own_language_model())
        >>> tls.contexts(small, "Ann went to the farm. Where is Ann? She is at the farm.", length=16)
        Examples(1 of shape (...,), 1 answers)
    """
    check_model(model)
    check_count("n", n)
    check_count("length", length, least=_SHORTEST + 1)
    if not 0 <= probability < 1:
        raise ValueError(f"probability is {probability}; it lies in [0, 1): 0.5, say")
    tokenizer = tokenizer_of(model)
    documents = [part for part in _BLANK.split(text) if part.strip()] if isinstance(text, str) else list(text)
    rows: list[list[int]] = (
        tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    )
    windows = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
    windows = [window for window in windows if len(window) > _SHORTEST]
    if not windows:
        raise ValueError(f"text has no document of more than {_SHORTEST} tokens: give a longer one")
    start = beginning(model, tokenizer, documents[0], prepend_bos)
    limit, what = length_limit(model, tokenizer, None)
    if length + len(start) > limit:
        raise ValueError(f"length is {length}, {what} is {limit}: give at most {limit - len(start)}")
    fill = filler(model, tokenizer)
    found = _predicted(model, _whole(windows, start, fill), probability, batch_size)
    order = _random.uniform(seed, 131, found[:, 0], found[:, 1]).argsort()
    first = _first_of_each(found[order, 0])
    some = found[order[first][_random.permutation(len(first), seed, 137)[:n].sort().values]]
    if not len(some):
        raise ValueError(
            f"of the text's {len(windows)} windows none has a token to which the model gives {probability} or more: "
            "lower probability, or give a text that it knows"
        )
    taken = [start + windows[window][: place + 1] for window, place in some.tolist()]
    answers = [windows[window][place + 1] for window, place in some.tolist()]
    width = max(map(len, taken))
    labels = [[NO_LABEL] * (len(row) - 1) + [answer] for row, answer in zip(taken, answers, strict=True)]
    mask = padded([[1] * len(row) for row in taken], width, "left", 0).bool()
    return Examples(
        padded(taken, width, "left", fill),
        padded(labels, width, "left", NO_LABEL),
        None if bool(mask.all()) else mask,
    )


def _whole(windows: list[list[int]], start: list[int], fill: int) -> Examples:
    """The windows, with an answer wherever a context may end."""
    width = max(map(len, windows)) + len(start)
    before = len(start) + _SHORTEST - 1
    labels = [[NO_LABEL] * before + window[_SHORTEST:] + [NO_LABEL] for window in windows]
    mask = padded([[1] * (len(start) + len(window)) for window in windows], width, "right", 0).bool()
    tokens: Int[Tensor, "n pos"] = padded([start + window for window in windows], width, "right", fill)
    return Examples(tokens, padded(labels, width, "right", NO_LABEL), None if bool(mask.all()) else mask)


def _predicted(model: Any, whole: Examples, probability: float, batch_size: int | None) -> Int[Tensor, "found two"]:
    """Window, and place in it, of the last token of every context whose answer is probable enough."""
    skipped = int((whole.labels[0] != NO_LABEL).nonzero()[0]) - (_SHORTEST - 1)  # the beginning-of-sequence token

    def parts() -> Iterator[Int[Tensor, "some two"]]:
        for index, batch in shared_batches(model, whole, batch_size):
            logits = answer_logits(model, batch)
            example, position = answer_rows(batch)
            right = answer_index(batch).to(logits.device)[:, None]
            sure = logits.double().log_softmax(1).gather(1, right)[:, 0].exp().cpu() >= probability
            yield torch.stack([index[example[sure]], position[sure] - skipped], 1)

    with torch.no_grad():
        return torch.cat(gathered(parts(), len(whole)))


def _first_of_each(window: Int[Tensor, "n"]) -> Int[Tensor, "windows"]:
    """Where each window comes first, in the order of the windows."""
    many = torch.arange(len(window))
    if not len(window):
        return many
    _, number = window.unique(return_inverse=True)
    return torch.full((int(number.max()) + 1,), len(window)).scatter_reduce(0, number, many, "amin")
