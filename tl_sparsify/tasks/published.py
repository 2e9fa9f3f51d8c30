"""Published data sets, which are files on the user's machine: what their readers share. Which rows can be used, and a
refusal by file, row and mend of those that cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pandas as pd
from datasets import Dataset, DatasetDict, NamedSplit

from tl_sparsify.core.examples import Examples
from tl_sparsify.formats.answers import Problem
from tl_sparsify.formats.records import load_examples
from tl_sparsify.tasks.language_models import begins, load_language_model, load_sizes, load_tokenizer

SPLITS = ("train", "validation", "test")
Unusable = Literal["refuse", "drop"]
Place = tuple[str, str]
"""The file of a row, and where in it the row stands (``row 3``, ``Paris``)."""


@dataclass(frozen=True, eq=False)
class Reader:
    """How texts become examples for a language model.

    Attributes:
        source: what :func:`load_language_model` takes.
        prepend_bos: whether the beginning-of-sequence token goes first; as the tokenizer has it where not given.
    """

    source: Any
    prepend_bos: bool | None = None

    def model(self) -> Any:
        """The language model."""
        return load_language_model(self.source)

    @cached_property
    def readable(self) -> Any:
        """The tokenizer and the model's sizes, for which a named model's weights are not loaded."""
        if not isinstance(self.source, str | Path):
            return load_language_model(self.source)
        return SimpleNamespace(tokenizer=load_tokenizer(self.source), cfg=load_sizes(self.source))

    @property
    def outputs(self) -> int:
        """How many tokens the model can answer with."""
        return int(getattr(getattr(self.readable, "cfg", None), "d_vocab", 0) or len(self.readable.tokenizer))

    def settings(self, first: bool | None = None) -> dict[str, Any]:
        """Beginning and padding, for :func:`load_examples`; ``first``: what the data have where nothing is said."""
        said = first if self.prepend_bos is None else self.prepend_bos
        if said is None:
            said = begins(self.source, self.readable.tokenizer)
        return {"prepend_bos": said and self.readable.tokenizer.bos_token_id is not None, "padding_side": "left"}


def dropped_of(problems: Sequence[tuple[str, Place, Problem]]) -> pd.DataFrame:
    """The rows that cannot be used: ``split, file, row, reason, detail``."""
    rows = [(split, *place, problem.reason, problem.detail) for split, place, problem in problems]
    return pd.DataFrame(rows, columns=["split", "file", "row", "reason", "detail"])


def refuse(dropped: pd.DataFrame, total: int, what: str, unusable: Unusable) -> None:
    """One error for all rows that cannot be used, unless they are to be dropped and others are left.

    Raises:
        ValueError: how many for which reason, with the file and row of the first, and the mend.
    """
    left = total - len(dropped)
    if left > 0 and (dropped.empty or unusable == "drop"):
        return
    lines = []
    for reason, n in dropped["reason"].value_counts().items():
        first = dropped[dropped["reason"] == reason].iloc[0]
        lines.append(f"  {n:,}: {reason} (first: {first['file']}, {first['row']}: {first['detail']})")
    mend = "mend the file, or leave them out by unusable='drop'" if left > 0 else "no row can be used"
    raise ValueError(f"{what} has {len(dropped):,} rows of {total:,} that cannot be used; {mend}:\n" + "\n".join(lines))


def usable_of(
    readable: Any, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], **columns: Any
) -> tuple[dict[int, Problem], Examples | None]:
    """What is wrong with each row, as :func:`load_examples` has it, and examples of the others (``None``: no other)."""
    try:
        loaded = load_examples(readable, list(rows), unusable="drop", **settings, **columns)
    except ValueError:
        one = {i: _why(readable, row, settings, columns) for i, row in enumerate(rows)}
        if any(problem is None for problem in one.values()):
            raise
        return {i: problem for i, problem in one.items() if problem is not None}, None
    lines = loaded.dropped.itertuples(index=False)
    return {int(line.row): Problem(str(line.reason), str(line.detail)) for line in lines}, loaded.examples  # type: ignore


def _why(readable: Any, row: Mapping[str, Any], settings: Mapping[str, Any], columns: Mapping[str, Any]) -> Any:
    """Where no row is left there is only the message: what it says of one row."""
    try:
        load_examples(readable, [dict(row)], **settings, **columns)
    except ValueError as error:
        said = str(error).splitlines()[-1].strip().removeprefix("1: ")
        reason, _, detail = said.partition(" (first: row 0, ")
        return Problem(reason, detail.removesuffix(")"))
    return None


def as_dataset(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> DatasetDict:
    """The rows of each split, as a data set."""
    found: dict[str | NamedSplit, Dataset] = {name: Dataset.from_list(list(map(dict, r))) for name, r in parts.items()}
    return DatasetDict(found)
