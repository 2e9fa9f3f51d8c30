"""Rows: what people keep their prompts in, as a list of dictionaries with plain values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_sparsify._internal.files import reading

Row = dict[str, Any]
_MISSING = object()
_SHOWN = 200  # characters of a path that there is not
_LOOKED_AT = 100  # rows, for the names of columns
_DIGITS = re.compile(r"(\d+)(\.0+)?")


def read_rows(source: Any, limit: int | None) -> list[Row]:
    """The rows of a CSV, TSV, JSON, JSON lines or parquet file, a pandas frame, a list of dictionaries, a dictionary of
    columns (or with one list of rows), or a data set, streaming or not. A row ``(prompt, answer)`` has these two.

    Text stays as it is: nothing in a CSV file is taken for a number or for missing, but an empty cell is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file or value, a table whose rows have more fields than its header, several splits
            at once, no row, ``limit`` below one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    found = [_row(i, row) for i, row in enumerate(islice(_iterate(source), limit))]
    if not found:
        raise ValueError("source has no row: give at least one")
    return found


def value(row: Row, name: str) -> Any:
    """What a row has in a column, nested ones by dotted name (``symbol_counterfactual.prompt``, ``answers.0``);
    ``None``: nothing."""
    found = _find(row, name)
    return None if found is _MISSING or found == "" else found


def has(rows: list[Row], name: str) -> bool:
    """Whether any row has the column."""
    return any(_find(row, name) is not _MISSING for row in rows)


def columns(rows: list[Row]) -> list[str]:
    """The names of the columns, nested ones dotted."""
    return list(dict.fromkeys(name for row in rows[:_LOOKED_AT] for name in _names(row)))


def whole(entry: Any) -> int | None:
    """The whole number in a cell, also in digits, where pandas writes 318 as ``318.0`` if the column has an empty cell;
    ``None``: no such number."""
    if isinstance(entry, str):
        match = _DIGITS.fullmatch(entry.strip())
        return None if match is None else int(match[1])
    if isinstance(entry, float):
        return int(entry) if entry.is_integer() else None
    return entry if isinstance(entry, int) and not isinstance(entry, bool) else None


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    for key, entry in row.items():
        if isinstance(entry, Mapping):
            yield from (f"{key}.{name}" for name in _names(entry))
        else:
            yield str(key)


def _find(part: Any, name: str) -> Any:
    if isinstance(part, Mapping):
        if name in part:
            return part[name]
        head, dot, rest = name.partition(".")
        return _find(part[head], rest) if dot and head in part else _MISSING
    if isinstance(part, list):
        head, dot, rest = name.partition(".")
        if head.isdecimal() and int(head) < len(part):
            return _find(part[int(head)], rest) if dot else part[int(head)]
    return _MISSING


def _iterate(source: Any) -> Iterable[Any]:
    if isinstance(source, str | Path):
        return _file(Path(source))
    if isinstance(source, pd.DataFrame):
        return source.to_dict("records")
    if isinstance(source, Mapping):
        return _mapping(source)
    if hasattr(source, "with_format"):  # a data set, in whichever format it was left
        return source.with_format(None)
    if isinstance(source, Iterable):
        return source
    raise ValueError(
        f"source is of type {type(source).__name__}: give a path to a file, a pandas frame, a list of dictionaries or "
        "a data set"
    )


def _file(path: Path) -> Iterable[Any]:
    there = False
    with suppress(OSError):  # a text that is too long for a name
        there = path.is_file()
    if not there:
        raise FileNotFoundError(f"no file at {str(path)[:_SHOWN]} to read rows from")
    kind = path.suffix.lower()
    mend = "Make it again."
    if kind in (".csv", ".tsv"):
        with reading(path, f"{kind[1:]} table", mend):
            return _text_table(path, *((",", "comma") if kind == ".csv" else ("\t", "tab")))
    if kind == ".parquet":
        with reading(path, "parquet table", mend):
            return pd.read_parquet(path).to_dict("records")
    if kind not in (".json", ".jsonl", ".ndjson"):
        raise ValueError(f"source is {path.name!r}: its name must end in .csv, .tsv, .json, .jsonl or .parquet")
    with reading(path, f"{kind[1:]} file in UTF-8", mend):
        text = path.read_text(encoding="utf-8-sig")
    try:  # not splitlines: it also splits at characters that may stand within a JSON text, such as U+2028
        content = (
            json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {kind[1:]}: {error}") from error
    if not isinstance(content, list | dict):
        raise ValueError(f"{path} holds {json.dumps(content)[:60]}: it must hold a list of rows, or an object with one")
    return _iterate(content)


def _text_table(path: Path, separator: str, called: str) -> Iterable[Any]:
    mend = f"put fields that hold a {called} in quotation marks, and end no row with a {called}"
    try:
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.ParserError as error:
        raise ValueError(f"{path} cannot be read as a table ({str(error).strip()}): {mend}") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first of too many fields for names of rows
        more = frame.index.nlevels
        raise ValueError(
            f"{path} has rows of {more + len(frame.columns)} fields and a header of {len(frame.columns)} "
            f"({', '.join(map(str, frame.columns))}): {mend}"
        )
    return frame.to_dict("records")


def _mapping(source: Mapping[str, Any]) -> Iterable[Any]:
    if any(hasattr(part, "with_format") for part in source.values()):
        raise ValueError(f"source has the splits {', '.join(source)}: give one, source[{next(iter(source))!r}]")
    lists = {name: part for name, part in source.items() if isinstance(part, list | tuple)}
    lengths = {name: len(part) for name, part in lists.items()}
    held = [name for name, part in lists.items() if part and all(isinstance(row, Mapping) for row in part)]
    columns_of_one_length = len(lists) == len(source) and len(set(lengths.values())) == 1
    if len(held) == 1 and not (columns_of_one_length and len(lists) > 1):
        return lists[held[0]]
    if not columns_of_one_length:
        raise ValueError(
            f"source is an object with {', '.join(map(str, source))}: it must hold one list of rows, or columns of one "
            f"length (lists: {lengths})"
        )
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _row(i: int, row: Any) -> Row:
    if isinstance(row, list | tuple) and len(row) == 2:
        row = {"prompt": row[0], "answer": row[1]}
    if not isinstance(row, Mapping):
        raise ValueError(f"row {i} of source is {row!r}: it must be a dictionary, or a prompt and its answer")
    return {str(key): _plain(entry) for key, entry in row.items()}


def _plain(entry: Any) -> Any:
    """The same without numpy and without pandas' kinds of nothing."""
    if isinstance(entry, np.ndarray | np.generic):
        entry = entry.tolist()
    if isinstance(entry, Mapping):
        return {str(key): _plain(part) for key, part in entry.items()}
    if isinstance(entry, list):
        return [_plain(part) for part in entry]
    if isinstance(entry, tuple):
        return tuple(_plain(part) for part in entry)
    return None if entry is pd.NA or entry is pd.NaT or (isinstance(entry, float) and entry != entry) else entry
