"""Text tasks with a language model of any architecture: checkpoints, bridges, padding, and loading late."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.animals import ARCHITECTURES, SENTENCES, SIDES, SIZES, tokenizer_of
from helpers.models import NoCasts, unchanged
from helpers.tokenized import bridge
from transformer_lens import TransformerBridge

from tl_sparsify import constants, heads, load_task, neurons, score, text
from tl_sparsify.core.forward import answer_logits

SHIPPED = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement", "docstring")


@cache
def maker(kind: str) -> Any:
    return lambda: tokenizer_of(kind)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_either_side_gives_the_same_numbers(architecture: str):
    model = bridge(architecture, tokenizer=maker(ARCHITECTURES[architecture]))
    units = heads(model) + neurons(model)
    sentences = replace(SENTENCES, sizes=dict.fromkeys(SIZES, 6))
    left, right = (text.TextTask(sentences, model, side).examples(0)[0] for side in SIDES)  # type: ignore[arg-type]
    assert left.attention_mask is not None and right.attention_mask is not None
    assert not torch.equal(left.tokens, right.tokens)
    with NoCasts(), torch.no_grad():
        assert torch.allclose(answer_logits(model, left), answer_logits(model, right), rtol=1e-9, atol=1e-11)
    with NoCasts(), unchanged(model):
        values = constants.mean(model, left, units)
        one, two = (score.risk(model, examples, units, values=values) for examples in (left, right))
    assert torch.allclose(one.scores, two.scores, rtol=1e-9, atol=1e-14) and float(one.scores.max()) > 0


# Models


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shipped_task_works_with_a_checkpoint(architecture: str, name: str, checkpoints: dict[str, Path]):
    task = load_task(name, model=checkpoints[architecture])
    model = task.model()
    assert not any(module.training for module in model.modules()) and not task.alignment.units
    train, validation, test = task.examples(0)
    assert len(train) == 1024 and len(validation) == 256 and len(test) == 512
    pairs = task.pairs(32, 0)
    assert len(pairs) == 32 and set(pairs.base_inputs) == set(task.causal_model.inputs)
    for examples in (test[:8], pairs.base[:8]):
        logits = answer_logits(model, examples)
        assert examples.choices is not None
        assert logits.shape == (8, len(examples.choices)) and bool(logits.isfinite().all())
        assert int(examples.tokens.max()) < model.cfg.d_vocab
    bos = model.tokenizer.bos_token_id
    mask = torch.ones_like(test.tokens).bool() if test.attention_mask is None else test.attention_mask
    first = test.tokens.gather(1, mask.int().argmax(1, keepdim=True))
    own = (
        text.load_tokenizer(checkpoints[architecture])("the")["input_ids"][0] == bos
    )  # the bridge's may be another one
    assert bool((first == bos).all()) == (bos is not None and own)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bridge_is_the_checkpoint(architecture: str, checkpoints: dict[str, Path]):
    task = load_task("subject_verb_agreement", model=str(checkpoints[architecture]))
    test = task.examples(0)[2][:16]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[architecture]).eval()
    theirs.config._attn_implementation = "eager"
    assert test.attention_mask is not None and test.choices is not None
    mask = test.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(input_ids=test.tokens, attention_mask=mask, position_ids=positions).logits
    expected = logits[:, -1][:, test.choices]
    assert torch.allclose(answer_logits(task.model(), test), expected, atol=1e-4)


def test_a_bridge_is_taken_as_it_is(checkpoints: dict[str, Path]):
    model = text.load_language_model(checkpoints["GPT-2"])
    task = load_task("ioi", model=model)
    assert task.model() is model
    with unchanged(model):
        mine, theirs = task.examples(0), load_task("ioi", model=checkpoints["GPT-2"]).examples(0)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)


def test_loading_data_does_not_load_the_model(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TransformerBridge, "boot_transformers", None)
    task = load_task("subject_verb_agreement", model=checkpoints["GPT-2"])
    assert len(task.pairs(8, 0)) == 8
    with pytest.raises(TypeError):
        task.model()
