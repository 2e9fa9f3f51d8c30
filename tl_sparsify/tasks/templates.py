"""Templates: rows of words, and the sentences that they fill. No model pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int, Shaped

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
