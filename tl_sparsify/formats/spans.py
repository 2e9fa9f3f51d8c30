"""Spans: named parts of a prompt, from text offsets to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tl_sparsify.formats.answers import Problem

Span = tuple[int, int]
"""The first token of a prompt and the one behind the last."""


def token_spans(
    tokenizer: Any, prompts: Sequence[str], spans: Sequence[Mapping[str, Any]]
) -> list[dict[str, Span] | Problem]:
    """The tokens of each prompt that each of its spans, ``(start, end)`` in characters, touches; or what is wrong. All
    prompts must have the spans that any has. One call of the tokenizer.

    Raises:
        ValueError: a tokenizer that does not say where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"spans need a tokenizer that knows where its tokens stand in the text, and {type(tokenizer).__name__} is "
            "none: load a fast one, or give Examples their spans as positions"
        )
    settings = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    offsets = tokenizer(list(prompts), **settings)["offset_mapping"] if prompts else []
    names = list(dict.fromkeys(name for some in spans for name in some))
    return [
        _located(prompt, some, [(int(a), int(b)) for a, b in where], names)
        for prompt, some, where in zip(prompts, spans, offsets, strict=True)
    ]


def _located(
    prompt: str, some: Mapping[str, Any], offsets: list[Span], names: Sequence[str]
) -> dict[str, Span] | Problem:
    found: dict[str, Span] = {}
    for name in names:
        given = some.get(name)
        if given is None:
            return Problem(f"no span {name}", f"spans are {', '.join(some) or 'none'}")
        if not _is_span(given, len(prompt)):
            return Problem(f"span {name} is none", f"{name} is {given!r}, the prompt has {len(prompt)} characters")
        start, end = given
        touched = [i for i, (a, b) in enumerate(offsets) if a < end and start < b]
        if not touched:
            return Problem(f"span {name} of no token", f"{name} is {prompt[start:end]!r}")
        found[name] = (touched[0], touched[-1] + 1)
    return found


def _is_span(given: Any, length: int) -> bool:
    whole = isinstance(given, list | tuple) and len(given) == 2 and all(type(part) is int for part in given)
    return whole and 0 <= given[0] < given[1] <= length
