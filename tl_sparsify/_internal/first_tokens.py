"""First tokens: where a rule leaves removed units alone, by what the model is called with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


@contextmanager
def watching_first_tokens(
    model: Any, rules: Iterable[str], seen: dict[str, Bool[Tensor, "batch pos"] | None]
) -> Iterator[None]:
    """Note, whenever the model runs, where each rule leaves the first token alone: only the call knows its input."""
    own = model.__dict__.get("forward")
    forward = model.forward  # run_with_hooks calls it as well, past any hook on the module
    mine = threading.get_ident()

    def noting(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != mine:
            return forward(*args, **kwargs)
        tokens = args[0] if args else kwargs.get("input")
        cache = kwargs.get("past_key_values")
        later = cache is not None and cache.get_seq_length() > 0  # the first token was in an earlier call
        mask = kwargs.get("attention_mask")
        for rule in rules:
            seen[rule] = None
            if isinstance(tokens, Tensor) and tokens.ndim == 2 and not later:
                seen[rule] = first_tokens(model, tokens, mask, rule)
        return forward(*args, **kwargs)

    object.__setattr__(model, "forward", noting)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(model, "forward")
        else:
            object.__setattr__(model, "forward", own)


def first_tokens(
    model: Any,
    tokens: Shaped[Tensor, "batch pos"],
    attention_mask: Shaped[Tensor, "batch pos"] | None,
    rule: str,
) -> Bool[Tensor, "batch pos"] | None:
    """Where ``rule`` leaves units alone: the first position of each row that is no padding, if its token is one that
    the rule names; ``None``: nowhere. A model without a tokenizer has no beginning-of-sequence token."""
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if rule == "none" or tokens.is_floating_point() or (rule == "bos" and bos is None):
        return None
    valid = (
        torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.to(tokens.device) > 0
    )
    first = valid & (valid.long().cumsum(1) == 1)
    if rule == "any":
        return first
    first &= tokens == bos
    return first if bool(first.any()) else None
