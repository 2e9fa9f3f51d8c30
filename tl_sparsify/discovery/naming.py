"""Names of groups of examples: the commonest last tokens of their contexts, and the commonest answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL, token_text

_NAMED = 3  # tokens on each side of a name
_RARE = 0.1  # of the group: a token that is rarer is left out of the name


def named(model: Any, group: Examples) -> str:
    """``' to' -> ' Mary', ' John'``: what the group's contexts end with, and what comes next, the commonest first."""
    before, answers = ends(group)
    right = _commonest(model, answers.tolist())
    return right if before is None else f"{_commonest(model, before.tolist())} → {right}"


def ends(examples: Examples) -> tuple[Int[Tensor, "n"] | None, Int[Tensor, "n"]]:
    """Of each example the token where its last answer is read (``None`` where inputs are no tokens, or have no
    positions), and that answer."""
    width = examples.labels.shape[1]
    last = ((examples.labels != NO_LABEL) * torch.arange(1, width + 1)).argmax(1, keepdim=True)
    answers = examples.labels.gather(1, last)[:, 0]
    if examples.tokens.is_floating_point() or examples.tokens.shape != examples.labels.shape:
        return None, answers
    return examples.tokens.gather(1, last)[:, 0], answers


def shown(model: Any, example: Examples) -> str:
    """One example as text: its context up to the last answer, and the answer in brackets."""
    before, answers = ends(example)
    answer = _token(model, int(answers[0]))
    if before is None:
        return f"[{answer}]"
    last = int((example.labels[0] != NO_LABEL).nonzero()[-1])
    mask = example.attention_mask
    some = torch.ones(last + 1, dtype=torch.bool) if mask is None else mask[0, : last + 1]
    ids = example.tokens[0, : last + 1][some].tolist()
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return f"{' '.join(map(str, ids))} [{answer}]"
    return f"{tokenizer.decode(ids, skip_special_tokens=True)}[{token_text(tokenizer, int(answers[0]))}]"


def _commonest(model: Any, ids: Iterable[int]) -> str:
    counts = Counter(ids)
    least = _RARE * counts.total()
    some = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_NAMED]
    kept = [token for i, (token, count) in enumerate(some) if i == 0 or count >= least]
    return ", ".join(_token(model, token) for token in kept)


def _token(model: Any, token: int) -> str:
    """A token's text in quotes, so that its spaces are seen; its number where there is no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else repr(token_text(tokenizer, token))
