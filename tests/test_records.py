"""Examples from files and tables: every shape in one call, which rows are left out and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.models import unchecked
from helpers.tokenized import WORDS, bridge, byte_pairs, with_a_space_before, word_level

import tl_sparsify as tls
from tl_sparsify.core.examples import Examples

CAT, DOG, SAT, RAN, HOME = (WORDS.index(word) for word in ("cat", "dog", "sat", "ran", "home"))
PROMPTS, OTHERS = ["the cat", "then the dog"], ["the dog", "then the cat"]
GOOD = [{"prompt": "the cat", "answer": " sat"}, {"prompt": "then the dog", "answer": " ran"}]
BAD = [
    {"prompt": "the cat", "answer": " sat"},
    {"prompt": "", "answer": " sat"},
    {"prompt": "the dog", "answer": " sat home"},
    {"prompt": "the dog", "answer": None},
    {"prompt": "the dog", "answer": " ran and"},
    {"prompt": "the dog", "answer": " flew"},
    {"prompt": "the dog", "answer": " ran"},
]


def load(source: Any, **settings: Any) -> tls.LoadedExamples:
    return tls.load_examples(word_level(), source, **{"padding_side": "left"} | settings)


def same(found: Examples, expected: Examples) -> None:
    for name in ("tokens", "labels", "attention_mask", "counterfactual_tokens", "counterfactual_labels", "choices"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.fixture
def right() -> Examples:
    """What most shapes here hold."""
    words = {"wrong_answers": [" ran", " sat"], "counterfactual_prompts": OTHERS}
    return Examples.from_prompts(word_level(), PROMPTS, [" sat", " ran"], padding_side="left", **words)  # type: ignore


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def streamed() -> Iterator[dict[str, Any]]:
    yield from GOOD
    raise AssertionError("read past its limit")


def test_a_csv_file_with_token_ids(tmp_path: Path, right: Examples):
    rows = [f"the cat,the dog,{SAT},{RAN}", f"then the dog,then the cat,{RAN},{SAT}"]
    found = load(write(tmp_path / "pairs.csv", "\n".join(["clean,corrupted,correct_idx,incorrect_idx", *rows])))
    same(found.examples, right)
    assert found.rows == (0, 1) and len(found.dropped) == 0 and found.notes == ()
    assert found.examples.labels.tolist() == [[-100, -100, SAT], [-100, -100, RAN]]


def test_an_object_with_prompts_and_several_answers(tmp_path: Path, right: Examples):
    rows = [
        {"clean": "the cat", "corrupt": "the dog", "answers": [" sat", " home"], "wrong_answers": [" ran"]},
        {"clean": "then the dog", "corrupt": "then the cat", "answers": [" ran"], "wrong_answers": [" sat", " home"]},
    ]
    found = load(write(tmp_path / "pairs.json", json.dumps({"name": "pairs", "prompts": rows})))
    same(found.examples, right)
    assert found.notes == ("1 rows have several right answers: the first is the label",)


@pytest.mark.parametrize("nested", [True, False])
def test_answers_as_pairs_of_right_and_wrong(nested: bool):
    pairs: list[Any] = [(" sat", " ran"), (" ran", " sat")]
    found = load([(prompt, [pair] if nested else pair) for prompt, pair in zip(PROMPTS, pairs, strict=True)])
    same(found.examples, Examples.from_prompts(word_level(), PROMPTS, [" sat", " ran"], wrong_answers=[" ran", " sat"],
                                               padding_side="left"))  # fmt: skip


def test_nested_columns_and_choices_by_place():
    """The benchmark's multiple choice: `choices{label, text}`, `answerKey`, `symbol_counterfactual{prompt}`."""
    rows = [
        {"prompt": "the cat", "choices": {"label": ["sat", "ran"]}, "answerKey": 0,
         "symbol_counterfactual": {"prompt": "the dog"}},
        {"prompt": "then the dog", "choices": {"label": ["home", "ran"]}, "answerKey": 1,
         "symbol_counterfactual": {"prompt": "then the cat"}},
    ]  # fmt: skip
    named = {"answer": "answerKey", "counterfactual_prompt": "symbol_counterfactual.prompt", "choices": "choices.label"}
    found = load(rows, answer_prefix=" ", **named).examples
    assert found.labels[:, -1].tolist() == [SAT, RAN] and found.counterfactual_labels is None
    assert found.choices is not None and found.choices.tolist() == [SAT, RAN, HOME]
    assert found.counterfactual_tokens is not None and found.counterfactual_tokens[:, -1].tolist() == [DOG, CAT]


def test_a_row_with_a_choice_that_is_no_answer():
    rows = [row | {"choices": [" sat", " ran"]} for row in GOOD] + [GOOD[0] | {"choices": [" sat", " ran home"]}]
    found = load(rows, choices="choices", unusable="drop")
    assert found.rows == (0, 1) and found.dropped["reason"].tolist() == ["choice of several tokens"]
    assert found.examples.choices is not None and found.examples.choices.tolist() == [SAT, RAN]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "frame", "dataset", "stream", "columns"])
def test_every_container(tmp_path: Path, kind: str):
    frame = pd.DataFrame(GOOD)
    path = tmp_path / f"rows.{kind}"
    sources: dict[str, Any] = {
        "csv": lambda: frame.to_csv(path, index=False) or path,
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t") or str(path),
        "json": lambda: write(path, json.dumps(GOOD)),
        "jsonl": lambda: write(path, "".join(json.dumps(row) + "\n" for row in GOOD)),
        "parquet": lambda: frame.to_parquet(path) or path,
        "frame": lambda: frame,
        "dataset": lambda: Dataset.from_list(GOOD).with_format("torch"),
        "stream": lambda: IterableDataset.from_generator(streamed),
        "columns": lambda: {name: list(frame[name]) for name in frame},
    }
    found = load(sources[kind](), limit=2)
    same(found.examples, Examples.from_prompts(word_level(), PROMPTS, [" sat", " ran"], padding_side="left"))


def test_nested_columns_of_a_parquet_file(tmp_path: Path):
    rows = [{"q": {"text": row["prompt"]}, "answers": [row["answer"], " home"]} for row in GOOD]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    found = load(tmp_path / "rows.parquet", prompt="q.text")
    assert found.examples.labels[:, -1].tolist() == [SAT, RAN] and "2 rows have several" in found.notes[0]
    second = load(tmp_path / "rows.parquet", prompt="q.text", answer="answers.1")
    assert second.examples.labels[:, -1].tolist() == [HOME, HOME]


def test_what_cannot_be_used_is_said_at_once():
    with pytest.raises(ValueError) as error:
        load(BAD)
    lines = str(error.value).splitlines()
    assert lines[0] == "source has 5 rows of 7 that cannot be used; unusable='drop' leaves them out:"
    assert sorted(lines[1:]) == [
        "  1: answer is a word that the tokenizer does not know (first: row 5, answer is ' flew', "
        "which becomes '<unk>')",
        "  1: no answer (first: row 3, answer is empty)",
        "  1: no prompt (first: row 1, prompt is None)",
        "  2: answer of several tokens (first: row 2, answer is ' sat home', 2 tokens, ['sat', 'home'])",
    ]
    assert lines[1].startswith("  2: ")


def test_what_cannot_be_used_is_dropped_only_on_request():
    found = load(BAD, unusable="drop")
    same(found.examples, Examples.from_prompts(word_level(), ["the cat", "the dog"], [" sat", " ran"]))
    assert found.rows == (0, 6) and found.dropped["row"].tolist() == [1, 2, 3, 4, 5]
    assert found.reasons["answer of several tokens"] == 2 and sum(found.reasons.values()) == 5
    assert repr(found).startswith("LoadedExamples(2 of 7 rows; dropped: 2 answer of several tokens, ")


def test_none_left_is_an_error_also_then():
    with pytest.raises(ValueError, match="1 rows of 1 that cannot be used; no row can be used"):
        load([{"prompt": "", "answer": " sat"}], unusable="drop")


def test_pairs_wrong_answers_and_choices():
    rows = [
        {"prompt": "the cat", "corrupt": "the dog", "answer": " sat", "wrong_answer": " ran"},
        {"prompt": "the cat", "corrupt": "then the dog", "answer": " sat", "wrong_answer": " ran"},
        {"prompt": "the cat", "corrupt": "", "answer": " sat", "wrong_answer": " ran"},
        {"prompt": "the cat", "corrupt": "the dog", "answer": " sat", "wrong_answer": " sat"},
        {"prompt": "the cat", "corrupt": "the dog", "answer": " home", "wrong_answer": " ran"},
        {"prompt": "the cat", "corrupt": "the dog", "answer": " sat", "wrong_answer": " home"},
        {"prompt": "the cat", "corrupt": "the dog", "answer": " sat"},
    ]
    found = load(rows, choices=[" sat", " ran"], unusable="drop")
    assert found.rows == (0,)
    assert found.dropped["reason"].tolist() == [
        "a pair of other length", "no counterfactual prompt", "wrong answer is the right one",
        "answer not among choices", "wrong answer not among choices", "no wrong answer",
    ]  # fmt: skip
    unpaired = load(rows, counterfactual_prompt=None, wrong_answer=None)
    assert len(unpaired.examples) == 7 and unpaired.examples.counterfactual_tokens is None


def test_pairs_have_no_wrong_answer_where_there_is_to_be_none():
    rows = [{"prompt": "the cat", "answers": [(" sat", " ran")]}]
    assert load(rows).examples.counterfactual_labels is not None
    assert load(rows, wrong_answer=None).examples.counterfactual_labels is None


def test_prompts_longer_than_the_context():
    found = load([*GOOD, {"prompt": "then the cat and", "answer": " sat"}], max_length=3, unusable="drop")
    assert found.rows == (0, 1) and found.dropped["detail"].tolist() == ["4 tokens, at most 3"]
    tokenizer = word_level(bos_token="<s>")
    longer = {"max_length": 3, "prepend_bos": True, "unusable": "drop"}
    assert tls.load_examples(tokenizer, GOOD, **longer).dropped["detail"].tolist() == ["4 tokens, at most 3"]


@pytest.mark.parametrize("tokenizer", [byte_pairs, with_a_space_before])
@pytest.mark.parametrize("bos", [None, True, False])
def test_ids_and_words_give_the_same(tokenizer: Any, bos: bool | None):
    model = bridge("GPT-2", tokenizer=tokenizer)
    prompts, answers = ["the capital of France is", "the river of"], [" Paris", " Rome"]
    expected = Examples.from_prompts(model, prompts, answers, prepend_bos=bos)
    ids = expected.labels[expected.labels != -100].tolist()
    rows = [{"prompt": prompt, "correct_idx": number} for prompt, number in zip(prompts, ids, strict=True)]
    same(tls.load_examples(model, rows, prepend_bos=bos).examples, expected)
    pairs = list(zip(prompts, answers, strict=True))
    same(tls.load_examples(model, pairs, prepend_bos=bos).examples, expected)


def test_numbers_are_refused_until_it_is_said_what_they_are():
    rows = [{"prompt": "the cat", "answer": SAT}]
    with pytest.raises(ValueError, match="answer of row 0 is the number 6: say answers_as='ids'"):
        load(rows)
    assert load(rows, answers_as="ids").examples.labels.tolist() == [[-100, SAT]]
    with pytest.raises(ValueError, match="does not know"):
        load(rows, answers_as="text")
    with pytest.raises(
        ValueError, match=r"no token id of the model .first: row 0, answer is 99, the vocabulary has 11"
    ):
        load([{"prompt": "the cat", "answer": 99}], answers_as="ids")


def test_a_space_that_a_file_leaves_out():
    tokenizer = byte_pairs()
    rows = [("the capital of France is", "Paris")]
    with pytest.raises(ValueError, match="after a space it is one: answer_prefix=' '"):
        tls.load_examples(tokenizer, rows)
    found = tls.load_examples(tokenizer, rows, answer_prefix=" ").examples
    same(found, Examples.from_prompts(tokenizer, ["the capital of France is"], [" Paris"]))


def test_a_csv_file_keeps_text_as_it_is(tmp_path: Path):
    """ "NA" and "null" are words, and an empty cell is empty."""
    path = write(tmp_path / "rows.csv", "prompt,answer\nthe cat,NA\nthe cat,null\nthe cat,\nthe cat,sat\n")
    found = load(path, unusable="drop")
    assert found.rows == (3,)
    assert [detail[:19] for detail in found.dropped["detail"]] == [
        "answer is 'NA', whi",
        "answer is 'null', w",
        "answer is empty",
    ]


def test_what_is_not_understood_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no column 'question': its columns are prompt, answer; name one by prompt="):
        load(GOOD, prompt="question")
    with pytest.raises(ValueError, match=r"no usual name for answer: its columns are prompt, a.b; name one by answer="):
        load([{"prompt": "the cat", "a": {"b": " sat"}}])
    with pytest.raises(ValueError, match="columns prompt and clean: say which is meant by prompt="):
        load([GOOD[0] | {"clean": "the dog"}])
    with pytest.raises(ValueError, match="has the splits train: give one"):
        load(DatasetDict({"train": Dataset.from_list(GOOD)}))
    with pytest.raises(ValueError, match="choices has some that cannot be answers: choice is ' sat home'"):
        load(GOOD, choices=[" sat", " ran", " sat home"])
    with pytest.raises(ValueError, match="must end in"):
        load(write(tmp_path / "rows.xml", "<a/>"))
    with pytest.raises(ValueError, match="is no json"):
        load(write(tmp_path / "rows.json", "{"))
    with pytest.raises(FileNotFoundError, match="no file at"):
        load(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no row"):
        load([])
    with unchecked(), pytest.raises(ValueError, match="unusable is 'skip'"):
        load(GOOD, unusable="skip")
    with pytest.raises(ValueError, match="it must be a dictionary"):
        load(["the cat"])


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)


def test_two_hundred_rows_take_as_many_calls_as_seven():
    few, many = Counting(word_level()), Counting(word_level())
    tls.load_examples(few, BAD, unusable="drop")
    found = tls.load_examples(many, (BAD * 29)[:200], unusable="drop")
    assert few.calls == many.calls
    assert len(found.rows) == 57 and len(found.dropped) == 143  # 28 times 2 of 7, and the first of four more
