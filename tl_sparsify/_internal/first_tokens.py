"""First tokens: where a rule leaves removed units alone, by what the model is called with."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
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
        call = tokens_of(model, args[0] if args else kwargs.get("input"), kwargs)
        seen.update({rule: None if call is None else first_tokens(model, *call, rule) for rule in rules})
        return forward(*args, **kwargs)

    object.__setattr__(model, "forward", noting)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(model, "forward")
        else:
            object.__setattr__(model, "forward", own)


def tokens_of(
    model: Any, input: Any, options: Mapping[str, Any]
) -> tuple[Shaped[Tensor, "batch pos"], Shaped[Tensor, "batch pos"] | None] | None:
    """What ``model(input, **options)`` is about: tokens and attention mask, of text those that the model makes of it
    itself. ``None`` for what is neither, and where the first tokens were in an earlier call."""
    cache, mask = options.get("past_key_values"), options.get("attention_mask")
    if cache is not None and cache.get_seq_length() > 0:
        return None
    if isinstance(input, Tensor):
        tokens = input[None] if input.ndim == 1 and mask is None else input  # one prompt without a batch
        return (tokens, mask) if tokens.ndim == 2 else None
    several, tokenizer = isinstance(input, list), getattr(model, "tokenizer", None)
    text = all(isinstance(one, str) for one in input) if several else isinstance(input, str)
    if not text or tokenizer is None or not hasattr(model, "to_tokens"):
        return None
    side = options.get("padding_side") or getattr(tokenizer, "padding_side", "right")
    tokens = model.to_tokens(input, prepend_bos=options.get("prepend_bos"), padding_side=side)
    if several and len(input) > 1 and side == "left" and mask is None:
        mask = _unpadded(model, tokens)
    return tokens, mask


def _unpadded(model: Any, tokens: Shaped[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
    """Where TransformerLens attends in left-padded text."""
    filler = model.tokenizer.pad_token_id
    if filler is None:
        return None
    padding = (tokens != filler).long().cumsum(1) == 0
    if model.tokenizer.bos_token_id == filler and getattr(model.cfg, "default_prepend_bos", True):
        last = padding.sum(1, keepdim=True) - 1  # the last filler is the beginning-of-sequence token
        padding &= torch.arange(tokens.shape[1], device=tokens.device) != last
    return ~padding


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
