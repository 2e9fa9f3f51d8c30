"""The tasks of the Mechanistic Interpretability Benchmark, from a folder with its data sets: their published columns,
and which rows its own code leaves out.

An answer is the *first* token of its text, as the benchmark takes it, and rows are left out whose right and wrong
answer have other numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import tokenizer_of
from tl_sparsify.formats.answers import ids_of
from tl_sparsify.formats.records import LoadedExamples, NoUsableRow, load_examples
from tl_sparsify.formats.rows import Row, columns, read_rows, value, whole

Split = Literal["train", "validation", "test"]
_FILES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class CircuitTask:
    """How a task of the circuit track is told by its columns.

    Attributes:
        counterfactual: the usual kind.
        right, wrong: the texts of the answers of a row, of which ``wrong`` takes the counterfactual's column. A
            ``ValueError`` says why a row has none.
        same: other texts that need as many tokens as the right answer.
        operator: of which only these rows count.
        folder: the part of the data set that holds it.

    Example:
        >>> tls.mib.CircuitTask("random_counterfactual", lambda row: "3", lambda row, other: "4").counterfactual
        'random_counterfactual'
    """

    counterfactual: str
    right: Callable[[Row], str]
    wrong: Callable[[Row, Row], str]
    same: Callable[[Row], list[str]] = lambda row: []
    operator: str | None = None
    folder: str = ""


def _text(row: Row, name: str) -> str:
    """What a row has in a column, as text."""
    found = value(row, name)
    if found is None:
        raise ValueError(f"no {name}")
    return str(found)


def _label(row: Row) -> str:
    """The letter of the right choice."""
    labels, key = value(row, "choices.label"), row.get("answerKey")
    if not isinstance(labels, list | tuple):
        raise ValueError("no choices.label")
    place = whole(key)
    if place is None or not 0 <= place < len(labels):
        raise ValueError(f"answerKey is {key!r}, of {len(labels)} choices")
    return str(labels[place])


_CHOICE = CircuitTask("symbol_counterfactual", _label, lambda _, other: _label(other))
_TASKS = {
    "ioi": CircuitTask(
        "s2_io_flip_counterfactual",
        lambda row: f" {_text(row, 'metadata.indirect_object')}",
        lambda row, _: f" {_text(row, 'metadata.subject')}",
        same=lambda row: [f" {_text(row, 'metadata.random_c')}"],
    ),
    "mcqa": CircuitTask("symbol_counterfactual", _label, lambda _, other: _label(other), folder="4_answer_choices"),
    "arc_easy": _CHOICE,
    "arc_challenge": _CHOICE,
    **{
        f"arithmetic_{name}": CircuitTask(
            "random_counterfactual",
            lambda row: _text(row, "label"),
            lambda _, other: _text(other, "label"),
            operator=operator,
        )
        for name, operator in {"addition": "+", "subtraction": "-"}.items()
    },
}


@checked
def circuit_task(
    tokenizer_or_model: Any,
    name: str,
    folder: str | Path,
    *,
    split: Split = "train",
    counterfactual: str | None = None,
    pairs: Literal["equal", "any"] = "equal",
    limit: int | None = None,
    **settings: Any,
) -> LoadedExamples:
    """Examples of a task of the circuit track, with its counterfactuals and the benchmark's filters.

    Args:
        name: ``ioi, mcqa, arithmetic_addition, arithmetic_subtraction, arc_easy, arc_challenge``.
        folder: its data set on this machine: files (parquet, JSON lines or JSON) whose name begins with the split.
        counterfactual: the column of the counterfactuals; the benchmark's usual one where not given.
        pairs: as in :func:`load_examples`: the benchmark keeps pairs of other length.
        limit: at most so many usable rows by the benchmark's filters.
        settings: ``prepend_bos, padding_side, max_length`` of :func:`load_examples`.

    Returns:
        Examples of the rows that can be used; ``dropped`` lists the others, also those that the benchmark's filters
        leave out or that lack what the task is told by. Answers are the first tokens of their texts. No model pass.

    Raises:
        FileNotFoundError: no file of this split in the folder.
        ValueError: an unknown task or counterfactual, no row that can be used.

    Example:
        >>> import json, pathlib
        >>> row = {"prompt": "David gave a ring to", "label": " Alan", "operator": "+",
        ...        "random_counterfactual": {"prompt": "Alan gave a ring to", "label": " David"}}
        >>> _ = pathlib.Path("train.json").write_text(json.dumps([row]))
        >>> tls.mib.circuit_task(tls.load_task("ioi").model(), "arithmetic_addition", ".")
        LoadedExamples(1 of 1 rows)
    """
    if name not in _TASKS:
        raise ValueError(f"name is {name!r}; the benchmark's circuit tasks are {', '.join(_TASKS)}")
    if limit is not None:
        check_count("limit", limit)
    task = _TASKS[name]
    rows = read_rows(_file(Path(folder), split, task.folder), None)
    kind = task.counterfactual if counterfactual is None else counterfactual
    known = [
        column for column in dict.fromkeys(key for row in rows for key in row) if column.endswith("_counterfactual")
    ]
    if kind not in known:
        raise ValueError(f"counterfactual is {kind!r}; the data set has {', '.join(known) or 'none'}")
    tokenizer = tokenizer_of(tokenizer_or_model)
    flat: list[dict[str, Any]] = []
    for row in rows:
        why, ids = _filtered(tokenizer, task, row, row.get(kind))
        one = {"prompt": row.get("prompt"), "corrupt": value(row, f"{kind}.prompt")}
        flat.append(one | {"correct_idx": ids[0], "incorrect_idx": ids[1], "left_out": why})
    if limit is not None:
        fine = [i for i, row in enumerate(flat) if row["left_out"] is None][:limit]
        flat = flat[: fine[-1] + 1] if fine else flat
    return load_examples(tokenizer_or_model, flat, pairs=pairs, left_out="left_out", unusable="drop", **settings)


@checked
def causal_pairs(
    tokenizer_or_model: Any,
    folder: str | Path,
    *,
    split: Split = "train",
    answer: Callable[[Row], str] | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, tuple[Examples, Examples]]:
    """Base and source inputs of a task of the causal-variable track, for each kind of counterfactual (every column
    ``*_counterfactual`` with a prompt): what is interchanged from the source into the base.

    Args:
        answer: the text of a row's right answer, of base and source alike; where not given the choice that
            ``answerKey`` names, else ``label``, ``answer`` or ``answers``.
        limit: at most so many rows are read.
        settings: ``answer_prefix`` and others of :func:`load_examples`.

    Returns:
        For each kind the bases, whose counterfactuals are the sources, and the sources with their own answers, row by
        row. Rows that cannot be used are left out, and kinds without any that can. No model pass.

    Raises:
        FileNotFoundError: no file of this split in the folder.
        ValueError: no counterfactual, or none with a row that can be used.

    Example:
        >>> import json, pathlib
        >>> row = {"prompt": "David gave a ring to", "label": " Alan",
        ...        "name_counterfactual": {"prompt": "Alan gave a ring to", "label": " David"}}
        >>> _ = pathlib.Path("test.json").write_text(json.dumps([row]))
        >>> tls.mib.causal_pairs(tls.load_task("ioi").model(), ".", split="test")["name_counterfactual"][0]
        Examples(1 of shape (6,), 1 answers, with counterfactuals)
    """
    said = _usual_answer if answer is None else answer
    rows = read_rows(_file(Path(folder), split, "4_answer_choices"), limit)
    kinds = [
        column for column in dict.fromkeys(key for row in rows for key in row) if column.endswith("_counterfactual")
    ]
    found: dict[str, tuple[Examples, Examples]] = {}
    for kind in kinds:
        some = [row for row in rows if isinstance(row.get(kind), dict) and row[kind].get("prompt")]
        flat = [
            {
                "prompt": row.get("prompt"),
                "corrupt": row[kind]["prompt"],
                "answer": said(row),
                "other": said(row[kind]),
            }
            for row in some
        ]
        both = _both_ways(tokenizer_or_model, flat, settings) if flat else None
        if both is not None:
            found[kind] = both
    if not found:
        raise ValueError(f"no counterfactual of {folder} can be used: its columns are {', '.join(columns(rows))}")
    return found


def _both_ways(tokenizer_or_model: Any, flat: list[Row], settings: dict[str, Any]) -> tuple[Examples, Examples] | None:
    """Bases and sources of the rows that can be used as both; ``None``: there is none."""
    back = [{"prompt": row["corrupt"], "answer": row["other"]} for row in flat]
    try:
        bases, sources = (load_examples(tokenizer_or_model, some, unusable="drop", **settings) for some in (flat, back))
    except NoUsableRow:
        return None
    if bases.rows == sources.rows:
        return bases.examples, sources.examples
    few = [flat[i] for i in bases.rows if i in set(sources.rows)]
    return _both_ways(tokenizer_or_model, few, settings) if few else None


def _usual_answer(row: Row) -> str:
    """The text of a row's answer, empty where it has none."""
    if value(row, "choices.label") is not None and row.get("answerKey") is not None:
        try:
            return _label(row)
        except ValueError:
            return ""
    found = next((row[name] for name in ("label", "answer", "answers") if row.get(name) is not None), "")
    return str(found[0] if isinstance(found, list) and found else found)


def _filtered(tokenizer: Any, task: CircuitTask, row: Row, other: Any) -> tuple[str | None, list[int | None]]:
    """Why the benchmark leaves a row out, and the first tokens of its right and wrong answer."""
    nothing: list[int | None] = [None, None]
    if task.operator is not None and row.get("operator") != task.operator:
        return f"operator is {row.get('operator')!r}", nothing
    if not isinstance(other, dict) or other.get("prompt") is None:
        return "no counterfactual", nothing
    try:
        texts = [task.right(row), task.wrong(row, other), *task.same(row)]
    except ValueError as error:
        return str(error), nothing
    ids = ids_of(tokenizer, texts)
    lengths = [len(some) for some in ids]
    first: list[int | None] = [some[0] if some else None for some in ids[:2]]
    one = task.operator is None or lengths[0] == 1
    return (None if len(set(lengths)) == 1 and one else f"answers of {lengths} tokens"), first


def _file(folder: Path, split: str, part: str) -> list[Row] | Path:
    """The rows of a split: one file, or several one after the other."""
    files = sorted(p for p in folder.rglob(f"{split}*") if p.suffix in _FILES)
    inner = [path for path in files if part and part in path.parts]
    files = inner or files
    if not files:
        raise FileNotFoundError(f"no file {split}* ({', '.join(_FILES)}) in {folder}")
    return files[0] if len(files) == 1 else [row for path in files for row in read_rows(path, None)]
