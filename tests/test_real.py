"""A real language model, SmolLM2-135M-Instruct: it does the text tasks, with the tasks' own prompts.

Skipped where `tl-sparsify fetch smollm2` has not fetched it; `make test` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tl_sparsify import heads, load_task, neurons, text
from tl_sparsify.tasks.accuracy import accuracy
from tl_sparsify.tasks.real_models import MARK, fetch, fetched

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not fetched("smollm2"), reason="`tl-sparsify fetch smollm2` fetches the model"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return text.load_language_model("smollm2")


def test_it_is_the_model_that_it_should_be(model: Any):
    assert len(heads(model)) == 270 and len(heads(model) + neurons(model)) == 46_350
    tokenizer = text.load_tokenizer("smollm2")
    assert tokenizer("The war of 1732")["input_ids"][-4:] == tokenizer.convert_tokens_to_ids(list("1732"))


def test_a_second_fetch_touches_nothing():
    folder = fetch("smollm2")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fetch("smollm2") == folder and before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (folder / MARK).is_file() and Path(folder / "model.safetensors").stat().st_size > 500_000_000


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("ioi", 0.97),
        ("docstring", 0.95),
        ("subject_verb_agreement", 0.93),
        ("gendered_pronoun", 0.85),
        ("greater_than", 0.75),
    ],
)
def test_it_does_the_tasks_among_their_answers(name: str, least: float, model: Any):
    validation = load_task(name, model="smollm2").examples(0)[1][:64]
    assert validation.tokens[:, 0].tolist() != [model.tokenizer.bos_token_id] * 64  # as its own tokenizer has it
    assert accuracy(model, validation, batch_size=32).choices >= least
