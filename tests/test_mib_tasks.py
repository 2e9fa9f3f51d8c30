"""The benchmark's tasks in its published columns: its filters, its counterfactuals, its first tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.tokenized import bridge

import tl_sparsify as tls


@pytest.fixture(scope="module")
def model() -> Any:
    return bridge("GPT-2")


def tokens(model: Any, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def ioi_row(first: str, second: str, third: str) -> dict[str, Any]:
    prompt = f"the river of {first} and {second}. {second} is the capital of"
    return {
        "prompt": prompt,
        "template": "...",
        "metadata": {"subject": second, "indirect_object": first, "random_c": third, "object": "river"},
        "choices": [first, second],
        "answerKey": 0,
        "s2_io_flip_counterfactual": {"prompt": f"the river of {first} and {second}. {first} is the capital of"},
        "abc_counterfactual": {"prompt": f"the river of {third} and {third}. {third} is the capital of"},
    }


IOI = [ioi_row("Rome", "Paris", "Italy"), ioi_row("Rome", "Paris", "Xenophon"), ioi_row("France", "Italy", "Rome")]


def test_ioi(model: Any, tmp_path: Path):
    (tmp_path / "data").mkdir()
    pd.DataFrame(IOI[:2]).to_parquet(tmp_path / "data" / "train-00000-of-00002.parquet")
    pd.DataFrame(IOI[2:]).to_parquet(tmp_path / "data" / "train-00001-of-00002.parquet")
    found = tls.mib.circuit_task(model, "ioi", tmp_path)
    assert found.rows == (0, 2) and found.reasons == {"left out": 1}
    lengths = [len(tokens(model, f" {name}")) for name in ("Rome", "Paris", "Xenophon")]
    assert found.dropped["detail"].tolist() == [f"answers of {lengths} tokens"]
    data = found.examples
    assert data.labels.max(1).values.tolist() == [tokens(model, " Rome")[0], tokens(model, " France")[0]]
    assert data.counterfactual_labels is not None and data.counterfactual_tokens is not None
    assert data.counterfactual_labels.max(1).values.tolist() == [tokens(model, " Paris")[0], tokens(model, " Italy")[0]]
    assert tokens(model, " Rome")[0] in data.counterfactual_tokens[0, -6:].tolist()
    other = tls.mib.circuit_task(model, "ioi", tmp_path, counterfactual="abc_counterfactual")
    assert other.examples.counterfactual_tokens is not None
    assert not torch.equal(other.examples.counterfactual_tokens, data.counterfactual_tokens)
    assert len(tls.mib.circuit_task(model, "ioi", tmp_path, limit=1).examples) == 1
    with pytest.raises(ValueError, match="the data set has s2_io_flip_counterfactual, abc_counterfactual"):
        tls.mib.circuit_task(model, "ioi", tmp_path, counterfactual="none")
    with pytest.raises(FileNotFoundError, match=r"no file test\*"):
        tls.mib.circuit_task(model, "ioi", tmp_path, split="test")


def choice_row(key: int, other_key: int, labels: list[str], others: list[str]) -> dict[str, Any]:
    def text(names: list[str]) -> str:
        return " ".join(f"the river is{name}" for name in names)

    counterfactual = {"prompt": text(others), "choices": {"label": others}, "answerKey": other_key}
    return {
        "prompt": text(labels),
        "choices": {"label": labels, "text": ["a", "b"]},
        "answerKey": key,
        "symbol_counterfactual": counterfactual,
        "answerPosition_counterfactual": counterfactual | {"answerKey": 1 - other_key},
    }


CHOICES = [
    choice_row(0, 1, [" Rome", " Paris"], [" France", " Italy"]),
    choice_row(1, 0, [" Rome", " Paris"], [" Italy", " France"]),
    choice_row(1, 0, [" Rome", " Paris"], [" Xenophon", " France"]),
]


@pytest.mark.parametrize("name", ["mcqa", "arc_easy", "arc_challenge"])
def test_multiple_choice(model: Any, tmp_path: Path, name: str):
    """The part with four choices is the benchmark's, where the data set has several."""
    (tmp_path / "4_answer_choices").mkdir()
    (tmp_path / "2_answer_choices").mkdir()
    (tmp_path / "4_answer_choices" / "validation.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    if name == "mcqa":
        (tmp_path / "2_answer_choices" / "validation.jsonl").write_text(json.dumps(CHOICES[0]))
    found = tls.mib.circuit_task(model, name, tmp_path, split="validation", pairs="any")
    assert found.rows == (0, 1) and found.reasons == {"left out": 1}
    assert found.examples.labels.max(1).values.tolist() == [tokens(model, " Rome")[0], tokens(model, " Paris")[0]]
    wrong = found.examples.counterfactual_labels
    assert wrong is not None and wrong.max(1).values.tolist() == [tokens(model, " Italy")[0]] * 2


def sum_row(operator: str, label: Any, other: Any, counterfactual: bool = True) -> dict[str, Any]:
    prompt = {"prompt": "the river of", "label": other} if counterfactual else {"prompt": None, "label": None}
    return {"prompt": "the capital of", "operator": operator, "label": label, "random_counterfactual": prompt}


SUMS = [
    sum_row("+", "is", "the"), sum_row("-", "the", "is"), sum_row("+", "is", "the", False),
    sum_row("+", "Xenophon", "the"), sum_row("+", "is", "Xenophon"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows"), [("arithmetic_addition", (0,)), ("arithmetic_subtraction", (1,))])
def test_arithmetic(model: Any, tmp_path: Path, name: str, rows: tuple[int, ...]):
    (tmp_path / "test.json").write_text(json.dumps(SUMS))
    found = tls.mib.circuit_task(model, name, tmp_path, split="test", pairs="any")
    assert found.rows == rows and len(found.dropped) == 4
    details = found.dropped["detail"].tolist()
    assert sum("operator is" in detail for detail in details) == (1 if name.endswith("addition") else 4)
    if name.endswith("addition"):
        assert "no counterfactual" in details
        assert found.examples.labels.max(1).values.tolist() == tokens(model, "is")[:1]


def test_pairs_of_the_causal_variables(model: Any, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, CHOICES[:2])))
    found = tls.mib.causal_pairs(model, tmp_path)
    assert list(found) == ["symbol_counterfactual", "answerPosition_counterfactual"]
    base, source = found["symbol_counterfactual"]
    assert base.labels.max(1).values.tolist() == [tokens(model, " Rome")[0], tokens(model, " Paris")[0]]
    assert source.labels.max(1).values.tolist() == [tokens(model, " Italy")[0]] * 2
    assert base.counterfactual_tokens is not None and torch.equal(base.counterfactual_tokens, source.tokens)
    _, moved = found["answerPosition_counterfactual"]
    assert moved.labels.max(1).values.tolist() == [tokens(model, " France")[0]] * 2
    named = tls.mib.causal_pairs(model, tmp_path, answer=lambda row: " Rome", limit=1)
    assert named["symbol_counterfactual"][1].labels.max(1).values.tolist() == [tokens(model, " Rome")[0]]


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no metadata at all": ("ioi", {"metadata": None}, "no metadata.indirect_object"),
    "metadata that is text": ("ioi", {"metadata": "Rome"}, "no metadata.indirect_object"),
    "no subject": ("ioi", {"metadata": {"indirect_object": "Rome", "random_c": "Rome"}}, "no metadata.subject"),
    "a third name that is missing": (
        "ioi", {"metadata": {"indirect_object": "Rome", "subject": "Paris", "random_c": None}}, "no metadata.random_c"
    ),
    "a key too large": ("arc_easy", {"answerKey": 7}, "answerKey is 7, of 2 choices"),
    "a key below zero": ("arc_easy", {"answerKey": -1}, "answerKey is -1, of 2 choices"),
    "no key": ("arc_easy", {"answerKey": None}, "answerKey is None, of 2 choices"),
    "a letter": ("arc_easy", {"answerKey": "A"}, "answerKey is 'A', of 2 choices"),
    "half a key": ("arc_easy", {"answerKey": 0.5}, "answerKey is 0.5, of 2 choices"),
    "no choices": ("arc_easy", {"choices": None}, "no choices.label"),
    "no choices in the counterfactual": (
        "arc_easy", {"symbol_counterfactual": {"prompt": CHOICES[0]["prompt"], "answerKey": 0}}, "no choices.label"
    ),
    "no label": ("arithmetic_addition", {"label": None}, "no label"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_a_row_that_lacks_what_the_task_is_told_by_is_dropped(model: Any, tmp_path: Path, what: str):
    name, change, says = FAULTS[what]
    good = {"ioi": IOI[0], "arc_easy": CHOICES[0], "arithmetic_addition": SUMS[0]}[name]
    gone = {key: value for key, value in good.items() if key not in change or change[key] is not None}
    (tmp_path / "train.json").write_text(json.dumps([good, good | change, gone, good]))
    found = tls.mib.circuit_task(model, name, tmp_path, pairs="any")
    assert found.reasons == {"left out": len(found.dropped)} and {0, 3} <= set(found.rows)
    assert found.dropped["detail"].tolist() == [says] * (1 if gone == good else 2)


def test_a_row_of_a_pair_without_an_answer_is_left_out(model: Any, tmp_path: Path):
    rows = [CHOICES[0], CHOICES[1] | {"answerKey": 7}, CHOICES[1] | {"answerKey": "A"}, {**CHOICES[1], "prompt": None}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base, source = tls.mib.causal_pairs(model, tmp_path)["symbol_counterfactual"]
    assert base.labels.max(1).values.tolist() == tokens(model, " Rome") and len(source) == 1


@pytest.mark.parametrize("part", ["base", "source"])
def test_a_kind_without_a_usable_row_is_left_out(model: Any, tmp_path: Path, part: str):
    """Its sources have no answer, or its bases another length than they do."""
    bad = {"prompt": CHOICES[0]["prompt"], "label": ""} if part == "source" else {"prompt": "the", "label": " Rome"}
    rows = [row | {"bad_counterfactual": bad} for row in CHOICES[:2]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(tls.mib.causal_pairs(model, tmp_path)) == ["symbol_counterfactual", "answerPosition_counterfactual"]
    with pytest.raises(ValueError, match="max_length is 0"):  # a wrong setting is no fault of a kind
        tls.mib.causal_pairs(model, tmp_path, max_length=0)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "the river", "label": "", "a_counterfactual": bad}))
    with pytest.raises(ValueError, match="no counterfactual of"):
        tls.mib.causal_pairs(model, tmp_path)


def test_rows_are_left_out_of_both_sides_of_a_pair(model: Any, tmp_path: Path):
    """The first row has no base, the second no source: the others stay side by side, as if they were alone."""
    rows = [CHOICES[0] | {"answerKey": 7}, choice_row(0, 7, [" Rome", " Paris"], [" France", " Italy"]), *CHOICES[:2]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = tls.mib.causal_pairs(model, tmp_path)["symbol_counterfactual"]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, CHOICES[:2])))
    alone = tls.mib.causal_pairs(model, tmp_path, split="test")["symbol_counterfactual"]
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)


def test_a_data_set_is_no_text_table(model: Any, tmp_path: Path):
    """Columns that hold columns cannot be in one."""
    pd.DataFrame(SUMS).to_csv(tmp_path / "train.csv")
    with pytest.raises(FileNotFoundError, match=r"no file train\* \(\.parquet, \.jsonl, \.json\)"):
        tls.mib.circuit_task(model, "arithmetic_addition", tmp_path)


def test_an_unknown_task_and_no_counterfactual(model: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="the benchmark's circuit tasks are ioi, mcqa, arc_easy"):
        tls.mib.circuit_task(model, "arc", tmp_path)
    (tmp_path / "train.json").write_text(json.dumps([{"prompt": "the river of", "answer": " Rome"}]))
    with pytest.raises(ValueError, match="no counterfactual of"):
        tls.mib.causal_pairs(model, tmp_path)
