"""Words: rows of them, the sentences that they fill, and which are single tokens. No model pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count

Rows = Mapping[str, Shaped[np.ndarray, "n"]]
_MOST = 10**8  # rows


@checked
def draw_rows(
    fields: Mapping[str, Sequence[str] | Sequence[int]], n: int, seed: int = 0
) -> dict[str, Shaped[np.ndarray, "n"]]:
    """``n`` rows of words, each field drawn from its list; row ``i`` is a function of ``seed`` and ``i``.

    Raises:
        ValueError: a negative number of rows, a field without words.

    Example:
        >>> tls.text.draw_rows({"name": ["Ann", "Tom"], "thing": ["tea", "salt"]}, 3, seed=0)["name"].tolist()
        ['Ann', 'Tom', 'Ann']
    """
    check_count("n", n, least=0, most=_MOST)
    empty = [name for name, words in fields.items() if not len(words)]
    if empty:
        raise ValueError(f"fields has no words for {', '.join(empty)}: give at least one for each")
    rows = torch.arange(n)
    found: dict[str, Shaped[np.ndarray, "n"]] = {}
    for number, (name, words) in enumerate(fields.items()):
        chosen = (_random.uniform(seed, 83, number, rows) * len(words)).long().numpy()
        found[name] = np.array(words)[chosen]
    return found


@checked
def row_keys(inputs: Rows, fields: Mapping[str, Sequence[str]]) -> Int[np.ndarray, "n"]:
    """One number for each row, by its words in ``fields`` alone: what decides its split.

    Raises:
        ValueError: a field that the rows do not have, or a word that is none of its.

    Example:
        >>> rows = {"name": np.array(["Ann", "Tom"]), "thing": np.array(["salt", "tea"])}
        >>> tls.text.row_keys(rows, {"name": ["Ann", "Tom"], "thing": ["tea", "salt"]})
        array([1, 2])
    """
    number = np.zeros(_count(inputs, fields), dtype=np.int64)
    for name, words in fields.items():
        known = np.isin(inputs[name], words)
        if not known.all():
            raise ValueError(
                f"inputs has {str(inputs[name][~known][0])!r} for {name}, which is none of its fields' words"
            )
        order = np.argsort(words)
        number = number * len(words) + order[np.searchsorted(np.array(words)[order], inputs[name])]
    return number


@checked
def filled(templates: Sequence[str], inputs: Rows) -> list[str]:
    """Each row's template with its words filled in.

    Raises:
        ValueError: another number of templates than of rows, or one with a slot that the rows have no word for.

    Example:
        >>> tls.text.filled(["{name} drinks", "Here is {name}"], {"name": np.array(["Ann", "Tom"])})
        ['Ann drinks', 'Here is Tom']
    """
    count = _count(inputs, ())
    if len(templates) != count:
        raise ValueError(f"templates has {len(templates)} texts, inputs {count} rows: give one for each")
    columns = {name: values.tolist() for name, values in inputs.items()}
    found: list[str] = []
    for i, template in enumerate(templates):
        try:
            found.append(template.format(**{name: values[i] for name, values in columns.items()}))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"templates has {template!r}, which {', '.join(inputs)} do not fill ({type(error).__name__}: {error})"
            ) from error
    return found


@checked
def prompts(rows: Rows) -> list[str]:
    """Each row's own template with its words filled in: the text up to the answer.

    Raises:
        ValueError: rows without a template, or that do not fill it.

    Example:
        >>> tls.text.prompts({"template": np.array(["{name} drinks"]), "name": np.array(["Ann"])})
        ['Ann drinks']
    """
    _count(rows, ("template",))
    return filled(rows["template"].tolist(), rows)


def _count(rows: Rows, needed: Iterable[str]) -> int:
    """How many rows there are; refused where they lack a column, or columns differ in length."""
    lacking = [name for name in needed if name not in rows]
    if lacking or not rows:
        raise ValueError(f"rows of inputs have no column {', '.join(lacking) or 'at all'}; there is {', '.join(rows)}")
    lengths = {name: len(values) for name, values in rows.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"inputs has columns of different lengths: {lengths}")
    return next(iter(lengths.values()))


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
