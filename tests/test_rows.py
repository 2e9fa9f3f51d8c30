"""Rows of files as people write them: fields too many, marks at the beginning, numbers as pandas writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.tokenized import WORDS, word_level

import tl_sparsify as tls
from tl_sparsify.formats.rows import read_rows

SAT, RAN = (WORDS.index(word) for word in ("sat", "ran"))
GOOD = [{"prompt": "the cat", "answer": " sat"}, {"prompt": "then the dog", "answer": " ran"}]


def load(source: Any, **settings: Any) -> tls.LoadedExamples:
    given: dict[str, Any] = {"padding_side": "left"} | settings
    return tls.load_examples(word_level(), source, **given)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


TOO_MANY = {
    "every row": ("prompt,answer\nFirst, the cat, sat\nThen, the dog, ran\n", r"rows of 3 fields and a header of 2"),
    "two more": ("prompt,answer\na,b,the cat, sat\n", r"rows of 4 fields and a header of 2 \(prompt, answer\)"),
    "a comma at the end": ("prompt,answer\nthe cat, sat,\nthe dog, ran,\n", r"rows of 3 fields and a header of 2"),
    "the first row": ("prompt,answer\nFirst, the cat, sat\nthe dog, ran\n", r"rows of 3 fields and a header of 2"),
    "a later row": ("prompt,answer\nthe cat, sat\nThen, the dog, ran\n", r"Expected 2 fields in line 3, saw 3"),
}


@pytest.mark.parametrize("which", TOO_MANY)
@pytest.mark.parametrize(("kind", "separator", "called"), [("csv", ",", "comma"), ("tsv", "\t", "tab")])
def test_a_table_whose_rows_have_more_fields_than_its_header_is_refused(
    tmp_path: Path, which: str, kind: str, separator: str, called: str
):
    text, says = TOO_MANY[which]
    path = write(tmp_path / f"rows.{kind}", text.replace(",", separator))
    with pytest.raises(ValueError, match=rf"rows\.{kind} .*{says}.*: put fields that hold a {called} in quotation"):
        load(path)
    mended = write(path, f'prompt{separator}answer\n"First{separator} the cat"{separator} sat\n')
    assert read_rows(mended, None) == [{"prompt": f"First{separator} the cat", "answer": " sat"}]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, kind: str):
    text = json.dumps(GOOD) if kind == "json" else "\n".join(map(json.dumps, GOOD))
    assert read_rows(write(tmp_path / f"rows.{kind}", text, "utf-8-sig"), None) == GOOD


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_json_line_ends_only_where_the_line_does(tmp_path: Path, separator: str, end: str):
    rows = [{"prompt": f"the{separator}cat", "answer": " sat"}, *GOOD]
    text = end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(f"{text}{end}{end}".encode())
    assert read_rows(tmp_path / "rows.jsonl", None) == rows


@pytest.mark.parametrize("content", ["3", "null", '"other.csv"', '"rows.json"'])
def test_a_json_file_that_holds_no_rows_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
):
    """What is in a file is never taken for a path, not even for its own."""
    monkeypatch.chdir(tmp_path)
    write(Path("other.csv"), "prompt,answer\nthe cat, sat\n")
    with pytest.raises(ValueError, match=rf"rows\.json holds {content}: it must hold a list of rows, or an object"):
        read_rows(write(Path("rows.json"), content), None)


def test_token_ids_of_a_column_with_an_empty_cell(tmp_path: Path):
    """pandas writes whole numbers as 6.0 where one is missing; the same rows straight from the frame."""
    frame = pd.DataFrame(
        {"prompt": ["the cat", "the cat", "the dog"], "correct_idx": [SAT, None, RAN], "incorrect_idx": [RAN, RAN, SAT]}
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert f"{SAT}.0" in (tmp_path / "rows.csv").read_text()
    for source in (tmp_path / "rows.csv", frame):
        found = load(source, unusable="drop")
        assert found.rows == (0, 2) and found.reasons == {"no answer": 1}
        assert found.examples.labels[:, -1].tolist() == [SAT, RAN]


@pytest.mark.parametrize("cell", ["sat", "6.5", "6,0", "-6", "6e0", 6.5, True])
def test_a_cell_that_is_no_token_id_is_a_problem_of_its_row(cell: Any):
    rows = [{"prompt": "the cat", "correct_idx": SAT}, {"prompt": "the cat", "correct_idx": cell}]
    found = load(rows, unusable="drop")
    assert found.rows == (0,) and found.reasons == {"answer is no token id": 1}
    assert found.dropped["detail"].tolist() == [
        f"correct_idx is {cell!r}: say answers_as='text' where answers are words"
    ]
    with pytest.raises(ValueError, match=r"1: answer is no token id \(first: row 1, correct_idx is"):
        load(rows)
    wrong = [row | {"incorrect_idx": row["correct_idx"], "correct_idx": RAN} for row in rows]
    assert load(wrong, unusable="drop").reasons == {"wrong answer is no token id": 1}


WANTED: list[Any] = [None, "", float("nan"), False, 0, 0.0, "False", "false", "0", "0.0", []]


def test_rows_are_left_out_by_what_a_cell_says(tmp_path: Path):
    cells = [*WANTED, "bad", True, 1, "True"]
    rows = [GOOD[0] | {"why": cell} for cell in cells]
    found = load(rows, left_out="why", unusable="drop")
    assert found.rows == tuple(range(len(WANTED)))
    assert found.dropped["detail"].tolist() == ["bad", "True", "1", "True"]
    frame = pd.DataFrame(GOOD).assign(why=[True, False])
    frame.to_csv(tmp_path / "rows.csv", index=False)
    for source in (frame, tmp_path / "rows.csv"):
        assert load(source, left_out="why", unusable="drop").rows == (1,)
    assert load(pd.DataFrame(GOOD).assign(why=False), left_out="why").rows == (0, 1)


def test_a_column_of_reasons_that_there_is_not():
    rows = [row | {"why": "bad"} for row in GOOD]
    with pytest.raises(ValueError, match="left_out is 'typo'; source has no such column: its columns are prompt, ans"):
        load(rows, left_out="typo")


def test_a_text_that_is_no_path_is_said_to_be_no_file():
    text = "David gave a ring to Alan. " * 30
    with pytest.raises(FileNotFoundError, match="no file at David gave a ring") as caught:
        tls.load_examples(tls.load_task("ioi").model(), text)
    assert len(str(caught.value)) < 300
