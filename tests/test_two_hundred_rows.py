"""Two hundred rows of each shape that people have: one call, as many usable rows as there are, in under five seconds.

The prompts are the package's own language model's; 91 of the 200 answers are words of several tokens for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import IterableDataset

import tl_sparsify as tls

ROWS, USABLE, SECONDS = 200, 109, 5.0
Shape = Callable[["Made", Path], tuple[Any, dict[str, Any]]]


class Made:
    """Rows with an answer of one token, then rows with one of several, both with a wrong one and a corrupted prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        names = tls.text.single_token_words(tokenizer, ["David", "Alan", "Mary", "Tom", "Anna", "Peter", "John"])[:4]
        self.rows: list[dict[str, str]] = []
        for i in range(ROWS):
            a, b = names[i % 4], names[(i + 1 + i // 4 % 3) % 4]
            right = f" {a}" if i < USABLE else f" {a} {b}"
            clean, corrupted = (f"{a} and {b} met. {giver} gave a ring to" for giver in (b, a))
            self.rows.append({"clean": clean, "corrupted": corrupted, "right": right, "wrong": f" {b}"})

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def records(self) -> list[dict[str, Any]]:
        names = {"prompt": "clean", "answer": "right", "counterfactual_prompt": "corrupted", "wrong_answer": "wrong"}
        return [{name: row[given] for name, given in names.items()} for row in self.rows]


def csv_with_ids(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    """`clean, corrupted, correct_idx, incorrect_idx`; an id outside the vocabulary where there is no single token."""
    ids = [made.ids(r["right"]) for r in made.rows]
    frame = pd.DataFrame(
        {
            "clean": [r["clean"] for r in made.rows],
            "corrupted": [r["corrupted"] for r in made.rows],
            "correct_idx": [some[0] if len(some) == 1 else 10**6 for some in ids],
            "incorrect_idx": [made.ids(r["wrong"])[-1] for r in made.rows],
        }
    )
    frame.to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv", {}


def object_with_prompts(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    rows = [
        {"clean": r["clean"], "corrupt": r["corrupted"], "answers": [r["right"]], "wrong_answers": [r["wrong"]]}
        for r in made.rows
    ]
    (folder / "pairs.json").write_text(json.dumps({"prompts": rows}))
    return folder / "pairs.json", {}


def nested_columns(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The place of the answer among the choices; one of several tokens among them makes the row unusable."""
    rows = [
        {"prompt": r["clean"], "choices": {"label": [r["right"], r["wrong"]], "text": ["x", "y"]}, "answerKey": 0,
         "symbol_counterfactual": {"prompt": r["corrupted"]}}
        for r in made.rows
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    named = {"answer": "answerKey", "counterfactual_prompt": "symbol_counterfactual.prompt", "choices": "choices.label"}
    return folder / "rows.parquet", named


def pairs_of_answers(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    return [(r["clean"], [(r["right"], r["wrong"])]) for r in made.rows], {}


def frame(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    return pd.DataFrame(made.records()), {}


def stream(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        yield from made.records()

    return IterableDataset.from_generator(rows), {"limit": ROWS}


def other_lengths(made: Made, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The 91 rows have usable answers, and a corrupted prompt of another length."""
    rows = made.records()
    for row in rows[USABLE:]:
        first, *_ = row["prompt"].split()
        row |= {"answer": f" {first}", "counterfactual_prompt": "a ring to"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl", {}


SHAPES: tuple[Shape, ...] = (
    csv_with_ids, object_with_prompts, nested_columns, pairs_of_answers, frame, stream, other_lengths,
)  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Made:
    return Made(tls.text.load_tokenizer(tls.task.own_language_model()))


def loaded(made: Made, shape: Shape, folder: Path, **settings: Any) -> tls.LoadedExamples:
    source, named = shape(made, folder)
    begun = time.perf_counter()
    found = tls.load_examples(made.tokenizer, source, padding_side="left", **{"unusable": "drop"} | named | settings)
    assert time.perf_counter() - begun < SECONDS
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_usable_rows_are_counted_and_the_others_have_a_reason(made: Made, shape: Shape, tmp_path: Path):
    found = loaded(made, shape, tmp_path)
    assert found.rows == tuple(range(USABLE)) and len(found.examples) == USABLE
    assert found.dropped["row"].tolist() == list(range(USABLE, ROWS)) and len(found.reasons) == 1
    right = [made.ids(row["right"])[-1] for row in made.rows[:USABLE]]
    assert found.examples.labels[:, -1].tolist() == right
    assert (found.examples.counterfactual_tokens is None) == (shape is pairs_of_answers)


def test_answers_of_several_tokens_and_pairs_of_other_length_can_be_asked_for(made: Made, tmp_path: Path):
    several = loaded(made, frame, tmp_path, answer_tokens="several", wrong_answer=None)
    assert len(several.examples) == ROWS and len(several.dropped) == 0
    labelled = (several.examples.labels != -100).sum(1)
    assert labelled[:USABLE].tolist() == [1] * USABLE and (labelled[USABLE:] > 1).all()
    assert len(loaded(made, other_lengths, tmp_path, pairs="any").examples) == ROWS
