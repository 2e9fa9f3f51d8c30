"""CausalGym: minimal pairs of sentences as published, ``train.json``, ``dev.json`` and ``test.json``, as tasks.

After Arora, Jurafsky and Potts, *CausalGym: Benchmarking causal interpretability methods on linguistic tasks* (2024).
A row has a sentence and a source as lists of regions that are aligned by number, the type of each (one of two), what
follows each, and the task that the row is of: ``base, src, base_type, src_type, base_label, src_label, task``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Shaped

from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.formats.answers import Problem
from tl_sparsify.formats.records import load_examples
from tl_sparsify.formats.rows import Row, read_rows
from tl_sparsify.tasks.pairing import split_of
from tl_sparsify.tasks.published import SPLITS, Place, Reader, Unusable, as_dataset, dropped_of, refuse, usable_of
from tl_sparsify.tasks.task import Task

COLUMNS = ("base", "src", "base_type", "src_type", "base_label", "src_label", "task")
_FILES = {"train": ("train",), "validation": ("dev", "validation", "valid", "val"), "test": ("test",)}
_ENDS = (".json", ".jsonl", ".parquet")
_START = "<|endoftext|>"  # how the published sentences begin, whatever the model's own token is

TYPE = CausalModel(
    inputs=("sentence_type", "first_type", "first_label", "second_label"),
    mechanisms={
        "type": lambda sentence_type: sentence_type,
        "label": lambda type, first_type, first_label, second_label: np.where(
            type == first_type, first_label, second_label
        ),
    },
    output="label",
)


@dataclass(frozen=True)
class Line:
    """A row of a file, and where it stands."""

    place: Place
    row: Row


@dataclass(frozen=True, eq=False)
class CausalGym:
    """The data of one of its tasks for one language model.

    Attributes:
        part: the task (``agr_gender``).
        lines: the rows of each split.
        reader: for which model.
        unusable: what is done with rows that cannot be used.
    """

    part: str
    lines: Mapping[str, Sequence[Line]]
    reader: Reader
    unusable: Unusable

    @cached_property
    def _settings(self) -> dict[str, Any]:
        started = any(_is_marked(line.row) for line in self.lines["train"])
        return self.reader.settings(True if started else None)

    @cached_property
    def _checked(self) -> tuple[dict[str, list[dict[str, Any]]], pd.DataFrame]:
        """The usable rows of each split, and why the others are not."""
        found: dict[str, list[dict[str, Any]]] = {}
        problems: list[tuple[str, Place, Problem]] = []
        every = Counter(str(line.row.get("base_type")) for lines in self.lines.values() for line in lines)
        types = sorted(name for name, _ in every.most_common(2))
        for split, lines in self.lines.items():
            wrong = {i: problem for i, line in enumerate(lines) if (problem := _problem(line.row, types)) is not None}
            fine = [i for i in range(len(lines)) if i not in wrong]
            flat = [_flat(lines[i].row) for i in fine]
            some = self._unreadable(flat) if flat else {}
            wrong |= {fine[j]: problem for j, problem in some.items()}
            found[split] = [row for j, row in enumerate(flat) if j not in some]
            problems += [(split, lines[i].place, wrong[i]) for i in sorted(wrong)]
        for split, lines in self.lines.items():
            mine = dropped_of([one for one in problems if one[0] == split])
            refuse(mine, len(lines), f"{split} of {self.part}", self.unusable)
        return found, dropped_of(problems)

    def _unreadable(self, flat: Sequence[dict[str, Any]]) -> dict[int, Problem]:
        """Rows that the tokenizer cannot do with, on either side."""
        wrong: dict[int, Problem] = {}
        lengths: list[dict[int, dict[str, int]]] = []
        for rows in (flat, [_turned(row) for row in flat]):
            problems, examples = usable_of(self.reader.readable, rows, self._settings, spans="spans")
            wrong = problems | wrong
            kept = [i for i in range(len(rows)) if i not in problems]
            sizes = {} if examples is None or examples.spans is None else examples.spans
            each = {name: (where[:, 1] - where[:, 0]).tolist() for name, where in sizes.items()}
            lengths.append({i: {name: n[j] for name, n in each.items()} for j, i in enumerate(kept)})
        for i in range(len(flat)):
            if i in wrong:
                continue
            for name, n in lengths[0][i].items():
                if (other := lengths[1][i].get(name)) != n:
                    detail = f"{name} has {n} tokens in base, {other} in src"
                    wrong.setdefault(i, Problem("a region of other length", detail))
            flat[i]["lengths"] = tuple(lengths[0][i].values())
        return wrong

    @property
    def _labels(self) -> list[str]:
        rows = [row for some in self._checked[0].values() for row in some]
        return sorted({row[name] for row in rows for name in ("answer", "wrong_answer")})

    def dropped(self) -> pd.DataFrame:
        """The rows that cannot be used: ``split, file, row, reason, detail``."""
        return self._checked[1]

    def dataset(self, seed: int = 0) -> Any:
        """The usable rows of each split in the order of a seed."""
        names = ("prompt", "answer", "counterfactual_prompt", "wrong_answer", "type")
        return as_dataset({s: [{name: row[name] for name in names} for row in self._some(s, seed)] for s in SPLITS})

    def _some(self, split: str, seed: int) -> list[dict[str, Any]]:
        rows = self._checked[0][split]
        return [rows[i] for i in np.random.default_rng([seed, 101]).permutation(len(rows))]

    def _examples(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        return load_examples(
            self.reader.readable, [dict(row) for row in rows], spans="spans", choices=self._labels, **self._settings
        ).examples

    def examples(self, seed: int = 0) -> tuple[Examples, Examples, Examples]:
        """Train, validation and test examples, each against its source's label."""
        train, validation, test = (self._examples(self._some(split, seed)) for split in SPLITS)
        return train, validation, test

    def pairs(self, n: int = 512, seed: int = 0) -> Pairs:
        """Test sentences, half of them with their published source (of the other type), half with a sentence of their
        own type and as many tokens in each region."""
        rng = np.random.default_rng([seed, 103])
        rows = self._checked[0]["test"]
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault((row["type"], row["lengths"]), []).append(i)
        same = [i for some in alike.values() if len({rows[i]["prompt"] for i in some}) > 1 for i in some]
        if not same and n > 1:
            raise ValueError(
                f"test of {self.part} has no two sentences of one type with as many tokens in each region: give a file "
                "with more rows, since half of all pairs are such"
            )
        base = [*_drawn(range(len(rows)), n - n // 2, rng), *_drawn(same, n // 2, rng)]
        sources = [_turned(rows[i]) for i in base[: n - n // 2]]
        for i in base[n - n // 2 :]:
            others = [j for j in alike[rows[i]["type"], rows[i]["lengths"]] if rows[j]["prompt"] != rows[i]["prompt"]]
            sources.append(rows[int(rng.choice(others))])
        order = rng.permutation(n)
        bases, sources = [rows[base[i]] for i in order], [sources[i] for i in order]
        both = self._examples([*bases, *sources])
        labels = both.labels[both.labels != NO_LABEL].tolist()
        other = [] if both.counterfactual_labels is None else both.counterfactual_labels
        wrong = other[other != NO_LABEL].tolist()  # type: ignore[index]
        rows_of = [*bases, *sources]
        answers = {row["answer"]: token for row, token in zip(rows_of, labels, strict=True)}
        answers |= {row["wrong_answer"]: token for row, token in zip(rows_of, wrong, strict=True)}
        return Pairs(_inputs(bases), _inputs(sources), both[:n], both[n:], answers)

    def task(self) -> Task:
        """The task."""
        labels = [str(line.row.get("base_label")) for line in self.lines["test"]]
        return Task(
            name=f"causalgym.{self.part}",
            description=f"what follows a sentence, by its type: {self.part} of CausalGym",
            model=self.reader.model,
            dataset=self.dataset,
            examples=self.examples,
            causal_model=TYPE,
            alignment=Alignment({}),
            pairs=self.pairs,
            chance=max(map(labels.count, labels)) / len(labels),
            causal_models={"type": TYPE},
            dropped=self.dropped,
        )


def read_task(
    part: str, path: Path, model: Any, *, prepend_bos: bool | None = None, unusable: Unusable = "refuse"
) -> Task:
    """One of CausalGym's tasks from a folder with its files, or from one file, whose rows then fall into splits by a
    hash of both sentences.

    Raises:
        FileNotFoundError: no such folder, or one without a file for a split.
        ValueError: a file without the published columns, or without a row of this task (with those that there are).
    """
    if path.is_dir():
        files = {split: _file(path, split) for split in SPLITS}
        lines = {split: _lines(file, part) for split, file in files.items()}
    else:
        every = _lines(path, part)
        numbers = np.array([crc32(str(sorted(map(str, _sides(line.row)))).encode()) for line in every])
        split = split_of(numbers.astype(np.int64))
        lines = {name: [line for line, s in zip(every, split, strict=True) if s == i] for i, name in enumerate(SPLITS)}
        empty = next((name for name, some in lines.items() if not some), None)
        if empty is not None:
            raise ValueError(f"{path} has {len(every)} rows of {part}, none of which falls to {empty}: give more")
    return CausalGym(part, lines, Reader(model, prepend_bos), unusable).task()


def _file(folder: Path, split: str) -> Path:
    usual = [folder / f"{name}{end}" for name in _FILES[split] for end in _ENDS]
    found = [path for path in usual if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {usual[0].name}, CausalGym's rows for {split}: download it there")
    return found[0]


def _lines(file: Path, part: str) -> list[Line]:
    rows = read_rows(file, None)
    missing = [name for name in COLUMNS if all(name not in row for row in rows)]
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}; CausalGym's columns are {', '.join(COLUMNS)}")
    found = [Line((file.name, f"row {i}"), row) for i, row in enumerate(rows) if _name(row) == part]
    if not found:
        known = sorted({_name(row) for row in rows})
        raise ValueError(f"{file} has no row of {part!r}; its tasks are {', '.join(known)}")
    return found


def _name(row: Row) -> str:
    """The task of a row, which some copies give with the file of its template (``syntaxgym/agr_gender``)."""
    return str(row.get("task")).rpartition("/")[2]


def _sides(row: Row) -> tuple[Any, Any]:
    return row.get("base"), row.get("src")


def _is_marked(row: Row) -> bool:
    base = row.get("base")
    return isinstance(base, list) and bool(base) and str(base[0]).startswith(_START)


def _problem(row: Row, types: Sequence[str]) -> Problem | None:
    """What is wrong with a row, whatever the tokenizer."""
    for name in ("base", "src"):
        regions = row.get(name)
        if not isinstance(regions, list) or not regions or not all(isinstance(part, str) for part in regions):
            return Problem(f"{name} is no list of regions", f"{name} is {str(regions)[:60]!r}; give a list of texts")
    for name in ("base_type", "src_type", "base_label", "src_label"):
        if not isinstance(row.get(name), str) or not row[name]:
            return Problem(f"no {name}", f"{name} is {row.get(name)!r}; it must be text")
    base, source = _sides(row)
    if len(base) != len(source):
        return Problem("regions that are not aligned", f"base has {len(base)} regions, src {len(source)}")
    if base == source:
        return Problem("src is base", f"both are {''.join(base)!r}")
    if row["base_type"] == row["src_type"]:
        return Problem("base and src of one type", f"both are {row['base_type']}; the labels could not tell them apart")
    unknown = [row[name] for name in ("base_type", "src_type") if row[name] not in types]
    if unknown:
        return Problem("a third type", f"{unknown[0]} beside {', '.join(types)}; a task has two types")
    return None


def _flat(row: Row) -> dict[str, Any]:
    """A row as :func:`load_examples` takes it, with the places of its regions."""
    base, source = ([*side] for side in _sides(row))
    base[0], source[0] = base[0].removeprefix(_START), source[0].removeprefix(_START)
    differ = [i for i, (a, b) in enumerate(zip(base, source, strict=True)) if a != b]
    return {
        "prompt": "".join(base),
        "counterfactual_prompt": "".join(source),
        "answer": row["base_label"],
        "wrong_answer": row["src_label"],
        "type": row["base_type"],
        "other_type": row["src_type"],
        "spans": _places(base, source, differ),
        "turned": _places(source, base, differ),
    }


def _places(regions: Sequence[str], others: Sequence[str], differ: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Where each region stands in the sentence, in characters; one that is empty on either side has no name."""
    ends = np.cumsum([0, *map(len, regions)]).tolist()
    found = {f"region{i}": (ends[i], ends[i + 1]) for i, part in enumerate(regions) if part and others[i]}
    return found | {"changed": (ends[differ[0]], ends[differ[-1] + 1])}


def _turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same pair with the source as base."""
    names = {"prompt": "counterfactual_prompt", "answer": "wrong_answer", "type": "other_type", "spans": "turned"}
    return dict(row) | {a: row[b] for a, b in names.items()} | {b: row[a] for a, b in names.items()}


def _inputs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Shaped[np.ndarray, "n"]]:
    """What the causal model takes: the sentence's type, and the label of each type in its pair."""
    first = [min(row["type"], row["other_type"]) for row in rows]
    labels = [{row["type"]: row["answer"], row["other_type"]: row["wrong_answer"]} for row in rows]
    return {
        "sentence_type": np.array([row["type"] for row in rows]),
        "first_type": np.array(first),
        "first_label": np.array([each[name] for each, name in zip(labels, first, strict=True)]),
        "second_label": np.array(
            [
                next(text for kind, text in each.items() if kind != name)
                for each, name in zip(labels, first, strict=True)
            ]
        ),
    }


def _drawn(some: Sequence[int], n: int, rng: np.random.Generator) -> list[int]:
    """``n`` of them, none twice where there are enough."""
    return rng.choice(np.array(some, dtype=np.int64), n, replace=n > len(some)).tolist() if n else []
