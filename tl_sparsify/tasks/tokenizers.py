"""Tokenizers: which words and numbers are single tokens. No model pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from tl_sparsify._internal.arguments import checked


@checked
def single_token_words(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Those words that are one token after another word and a space.

    Example:
        >>> tokenizer = tls.text.load_tokenizer(tls.task.own_language_model())
        >>> tls.text.single_token_words(tokenizer, ["rice", "xylophone"])
        ['rice']
    """
    before, *after = _ids(tokenizer, ["the", *(f"the {word}" for word in words)])
    unknown = tokenizer.unk_token_id
    return [word for word, ids in zip(words, after, strict=True) if ids[:-1] == before and ids[-1] != unknown]


@checked
def two_token_numbers(tokenizer: Any, heads: Sequence[str], tails: Sequence[str]) -> Bool[np.ndarray, "heads tails"]:
    """Whether each number, written as a head and a tail (``17`` and ``32``), is these two tokens.

    Example:
        >>> tokenizer = tls.text.load_tokenizer(tls.task.own_language_model())
        >>> tls.text.two_token_numbers(tokenizer, ["17", "18"], ["32"]).tolist()
        [[True], [True]]
    """
    texts = [f"the {head}{tail}" for head in heads for tail in ("", *tails)]
    rows = _ids(tokenizer, ["the", *texts])
    before, width = rows[0], 1 + len(tails)
    parts = [rows[1 + i * width : 1 + (i + 1) * width] for i in range(len(heads))]
    return np.array([[len(p[0]) == len(before) + 1 and ids[:-1] == p[0] for ids in p[1:]] for p in parts])


@checked
def digit_by_digit(tokenizer: Any, numbers: Sequence[str]) -> Bool[np.ndarray, "numbers"]:
    """Whether each number is written one token a digit, so that its digits are told one after the other.

    Example:
        >>> tokenizer = tls.text.load_tokenizer(tls.task.own_language_model())
        >>> tls.text.digit_by_digit(tokenizer, ["1732", "1745"]).tolist()
        [False, False]
    """
    if not all(numbers):
        raise ValueError(f"numbers has an empty text, at place {list(numbers).index('')}: each has a digit at least")
    found: list[bool] = []
    for number in numbers:
        rows = _ids(tokenizer, ["the", *(f"the {number[:size]}" for size in range(1, len(number) + 1))])
        digits = rows[-1][-len(number) :]
        grown = all([*one, digit] == more for one, more, digit in zip(rows[1:], rows[2:], digits[1:], strict=False))
        found.append(grown and rows[1][:-1][: len(rows[0])] == rows[0] and tokenizer.unk_token_id not in digits)
    return np.array(found, dtype=bool)


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ValueError(
            f"tokenizer is of type {type(tokenizer).__name__}: give a Hugging Face tokenizer, such as "
            "tls.text.load_tokenizer(name)"
        )
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
