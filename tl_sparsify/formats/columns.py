"""Columns: which column of a source is meant by what, and what its rows say in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl_sparsify.formats.answers import Answer, Problem
from tl_sparsify.formats.rows import Row, columns, has, value, whole

AUTO = "auto"
_USUAL = {
    "prompt": ("prompt", "clean"),
    "answer": ("answer", "answers", "correct_idx"),
    "wrong_answer": ("wrong_answer", "wrong_answers", "incorrect_idx"),
    "counterfactual_prompt": ("counterfactual_prompt", "corrupted", "corrupt"),
}
_IDS = ("_idx", "_id", "_ids", "_token_id")


@dataclass(frozen=True)
class Table:
    """The columns of a source, a value for each row: of answers all right ones and all wrong ones. ``problems`` says
    which rows have an answer that is none."""

    prompts: list[Any]
    answers: list[list[Answer]]
    wrong: list[list[Answer]] | None
    others: list[Any] | None
    spans: list[dict[str, Any]] | None
    problems: dict[int, Problem]


def named_columns(rows: list[Row], given: Mapping[str, str | None]) -> dict[str, str | None]:
    """The column of each argument; ``None``: there is none.

    Raises:
        ValueError: a column that there is not, or two that may be meant.
    """
    found: dict[str, str | None] = {}
    for argument, name in given.items():
        usual = [one for one in _USUAL[argument] if has(rows, one)] if name == AUTO else []
        if len(usual) > 1:
            raise ValueError(f"source has the columns {' and '.join(usual)}: say which is meant by {argument}=")
        found[argument] = (usual[0] if usual else None) if name == AUTO else name
        needed = argument in ("prompt", "answer")
        if (found[argument] is None and needed) or (name not in (AUTO, None) and not has(rows, str(name))):
            what = f"has no column {name!r}" if name not in (AUTO, None) else f"has no usual name for {argument}"
            raise ValueError(f"source {what}: its columns are {', '.join(columns(rows))}; name one by {argument}=")
    return found


def listed_choices(rows: list[Row], choices: str | Sequence[str] | None) -> list[list[Any] | None] | None:
    """Each row's choices, where they are a column.

    Raises:
        ValueError: a column without lists.
    """
    if not isinstance(choices, str):
        return None
    found = [value(row, choices) for row in rows]
    if not any(isinstance(some, list | tuple) for some in found):
        raise ValueError(f"choices is {choices!r}, which is no column of lists: columns are {', '.join(columns(rows))}")
    return [list(some) if isinstance(some, list | tuple) else None for some in found]


def table(
    rows: list[Row],
    named: Mapping[str, str | None],
    listed: list[Any] | None,
    spans: str | Mapping[str, str] | None,
    answers_as: str,
    prefix: str,
    paired: bool = True,
) -> Table:
    """What the rows say in their columns; ``paired``: pairs of answers have a wrong one.

    Raises:
        ValueError: numbers of which it is not said what they are, spans that are none.
    """

    def read(argument: str) -> list[Any] | None:
        name = named[argument]
        return None if name is None else [value(row, name) for row in rows]

    split = [_split(entry) for entry in read("answer") or []]
    wrong = read("wrong_answer")
    against = [pair[1] if paired else [] for pair in split] if wrong is None else [_split(entry)[0] for entry in wrong]
    name = named["wrong_answer"] or named["answer"]
    answers, problems = _typed(
        "answer", [right for right, _ in split], listed, str(named["answer"]), answers_as, prefix
    )
    wrong_answers: list[list[Answer]] | None = None
    if wrong is not None or any(against):
        wrong_answers, more = _typed("wrong answer", against, listed, str(name), answers_as, prefix)
        problems = more | problems
    return Table(
        prompts=read("prompt") or [],
        answers=answers,
        wrong=wrong_answers,
        others=read("counterfactual_prompt"),
        spans=None if spans is None else [_spans(i, row, spans) for i, row in enumerate(rows)],
        problems=problems,
    )


def _split(entry: Any) -> tuple[list[Any], list[Any]]:
    """All right answers of an entry, and what they are held against where they come as pairs."""
    if isinstance(entry, tuple) and len(entry) == 2:
        return [entry[0]], [entry[1]]
    if not isinstance(entry, list | tuple):
        return [entry], []
    pairs = [pair for pair in entry if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) == len(entry):
        return [right for right, _ in pairs], [wrong for _, wrong in pairs]
    return list(entry), []


def _typed(
    what: str, some: list[list[Any]], listed: list[Any] | None, name: str, answers_as: str, prefix: str
) -> tuple[list[list[Answer]], dict[int, Problem]]:
    """Answers as words or token ids, each once, and the rows with one that should be an id and is none."""
    as_ids = answers_as == "ids" or (answers_as == "auto" and name.rsplit(".", 1)[-1].endswith(_IDS))
    problems: dict[int, Problem] = {}

    def typed(i: int, one: Any) -> Answer:
        if one is None or one == "":
            return None
        number = whole(one)
        if as_ids:
            if number is None:
                detail = f"{name} is {one!r}: say answers_as='text' where answers are words"
                problems.setdefault(i, Problem(f"{what} is no token id", detail))
            return number
        if number is not None and not isinstance(one, str) and listed is not None and answers_as == "auto":
            here = listed[i] or []
            return f"{prefix}{here[number]}" if 0 <= number < len(here) else None
        if isinstance(one, int | float) and answers_as == "auto":
            raise ValueError(f"{name} of row {i} is the number {one}: say answers_as='ids' (of tokens) or 'text'")
        return f"{prefix}{one}"

    found = [list(dict.fromkeys(typed(i, one) for one in row)) or [None] for i, row in enumerate(some)]
    return found, problems


def _spans(i: int, row: Row, spans: str | Mapping[str, str]) -> dict[str, Any]:
    """A row's spans by name, as the source has them."""
    if not isinstance(spans, str):
        return {name: _read(value(row, column)) for name, column in spans.items()}
    found = _read(value(row, spans))
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{spans} of row {i} is {found!r}; spans are named, {{'S1': (start, end)}}")
    return dict(found or {})


def _read(entry: Any) -> Any:
    """A text file's cell may hold JSON."""
    if not isinstance(entry, str):
        return entry
    try:
        return json.loads(entry)
    except json.JSONDecodeError:
        return entry
