"""Whether a beginning token goes before each prompt: as asked, else as the tokenizer has it, unless the model is more
often right with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tokenized import bridge
from tokenizers import processors
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tl_sparsify import Examples, load_task
from tl_sparsify.tasks import beginning
from tl_sparsify.tasks.accuracy import Accuracy, accuracy
from tl_sparsify.tasks.beginning import settled

SHIPPED = Path(__file__).parent.parent / "tasks" / "language_model" / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights, whose tokenizer has a beginning token and does not put it first."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 1.0}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def begins(examples: Examples) -> bool:
    """Whether the beginning token (0) is the first one that is no padding."""
    mask = torch.ones_like(examples.tokens).bool() if examples.attention_mask is None else examples.attention_mask
    return bool((examples.tokens.gather(1, mask.int().argmax(1, keepdim=True)) == 0).all())


def first_of(task: Any) -> bool:
    found = {begins(examples) for examples in (*task.examples(0), task.pairs(8, 0).base)}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(
    ("with_bos", "without", "taken"),
    [
        ((0.9, 0.5), (0.8, 0.7), True),  # among the choices first
        ((0.8, 0.7), (0.9, 0.5), False),
        ((0.9, 0.6), (0.9, 0.5), True),  # then over the vocabulary
        ((0.9, 0.5), (0.9, 0.5), False),  # then as the tokenizer has it
    ],
)
def test_the_more_accurate_way_is_taken_and_said(
    with_bos: tuple[float, float], without: tuple[float, float], taken: bool, checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    def told(model: Any, examples: Examples, *, batch_size: int | None) -> Accuracy:
        assert len(examples) == 64
        choices, vocabulary = with_bos if begins(examples) else without
        return Accuracy(vocabulary, choices, 64)

    monkeypatch.setattr(beginning, "accuracy", told)
    found = settled("gendered_pronoun", model=str(checkpoint))
    assert found.prepend_bos is taken and first_of(found.task) is taken
    assert f"begin {'with' if taken else 'without'} a beginning-of-sequence token; accuracy with one: 0." in str(found)
    assert f"{with_bos[0]:.3f} among" in str(found) and f"{without[0]:.3f} among" in str(found)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_done_and_nothing_measured(asked: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(beginning, "accuracy", None)
    found = settled("gendered_pronoun", model=checkpoint, prepend_bos=asked)
    assert found.prepend_bos is asked and first_of(found.task) is asked and found.with_bos is None


def test_without_a_model_run_it_is_as_the_tokenizer_has_it_and_the_packages_own_keeps_its_token(checkpoint: Path):
    assert not first_of(load_task("gendered_pronoun", model=checkpoint))
    assert first_of(load_task("gendered_pronoun", model=checkpoint, prepend_bos=True))
    assert first_of(load_task("gendered_pronoun"))  # it learnt with one
    assert not first_of(load_task("gendered_pronoun", prepend_bos=False))
    assert settled("gendered_pronoun").prepend_bos is None


def test_a_task_that_is_none_of_text_knows_no_beginning():
    with pytest.raises(ValueError, match="prepend_bos is given, but the task planted_sum knows of no beginning token"):
        load_task("planted_sum", prepend_bos=True)


def test_accuracy_is_counted_over_the_vocabulary_and_among_the_choices():
    logits = torch.zeros(4, 8)  # token 5 wins always, among 1 and 2 the second one
    logits[:, 5], logits[:, 2] = 2.0, 1.0
    examples = Examples(torch.zeros(4, 1).long(), torch.tensor([[1], [2], [2], [2]]), choices=torch.tensor([1, 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_sparsify.tasks.accuracy.answer_logits", lambda model, batch: logits[: len(batch)])
        found = accuracy(bridge("GPT-2"), examples, batch_size=4)
        assert found == Accuracy(vocabulary=0.0, choices=0.75, n=4)
        assert str(found) == "0.750 among the choices, 0.000 over the whole vocabulary (n=4)"
        found = accuracy(bridge("GPT-2"), replace(examples, labels=torch.full((4, 1), 5), choices=None), batch_size=4)
        assert found == Accuracy(1.0, 1.0, 4) and str(found) == "1.000 (n=4)"
