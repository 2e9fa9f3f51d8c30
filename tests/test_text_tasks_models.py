"""The text tasks with the package's own language model: what it knows, and where it keeps the variables."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import transformers
from helpers.cards import single
from helpers.places import carried, loaded, model_of, places
from helpers.sentences import (
    MODULES,
    data_of,
    every_task,
    own_tokenizer,
    pairs_of,
    patterns,
    read,
    split_of_rows,
    splits,
)

from tasks.greater_than import task as greater_than
from tasks.language_model import corpus
from tl_sparsify import (
    Examples,
    heads,
    neurons,
    residuals,
    text,
)
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.tasks.task import own_language_model


@torch.no_grad()
def logits_of(name: str, examples: Examples, *, every: bool = False) -> torch.Tensor:
    """At the answers, among the choices or over the whole vocabulary."""
    wanted = Examples(examples.tokens, examples.labels, examples.attention_mask) if every else examples
    parts = [answer_logits(model_of(name), batch) for _, batch in wanted.batches(128)]
    return torch.cat(parts)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_language_model_was_trained_on_the_train_part_only(seed: int):
    documents = corpus.documents(3000, seed)
    found = dict.fromkeys(MODULES, 0)
    for name in MODULES:
        for document in documents:
            for pattern in patterns(name):
                if (match := pattern.match(document)) and document[match.end() :]:
                    row = read(name, match.group())
                    assert row is not None
                    if name == "ioi" and row["third"] not in (row["first"], row["second"]):
                        continue  # a third person gives: no sentence of the task
                    assert split_of_rows(name, [row]) == {0}, document
                    found[name] += 1
    assert min(found.values()) > 100


# The package's own language model


def test_the_language_model_is_in_hugging_face_format_and_small():
    folder = own_language_model()
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert sum(file.stat().st_size for file in files) <= 20 * 2**20
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    tokens = splits("ioi")["test"].tokens[splits("ioi")["test"].tokens[:, 1] != own_tokenizer().bos_token_id][:8]
    with torch.no_grad():
        assert torch.allclose(model_of("ioi")(tokens), theirs(tokens).logits, atol=1e-3)


def test_every_word_of_the_tasks_is_one_token_of_the_language_model():
    for module in MODULES.values():
        for slot, words in module.SENTENCES.slots.items():
            assert text.single_token_words(own_tokenizer(), words) == list(words), slot
    numbers = text.two_token_numbers(own_tokenizer(), greater_than.CENTURIES, [*greater_than.YEARS, *greater_than.ENDS])
    assert numbers.all()


@every_task
def test_the_language_model_does_the_task(name: str):
    """At least 95 % right among the choices and over the whole vocabulary; of greater_than there the year is later."""
    for split in ("validation", "test"):
        examples, data = splits(name)[split], data_of(name)[split]
        labels = torch.tensor(single(examples.labels))
        assert examples.choices is not None
        assert float((examples.choices[logits_of(name, examples).argmax(1)] == labels).double().mean()) >= 0.95
        said = own_tokenizer().batch_decode(logits_of(name, examples, every=True).argmax(1)[:, None])
        if name == "greater_than":
            later = [s.isdigit() and len(s) == 2 and int(s) > int(y) for s, y in zip(said, data["year"], strict=True)]
            assert np.mean(later) >= 0.95
        else:
            assert np.mean([one == two for one, two in zip(said, data["answer"], strict=True)]) >= 0.95


def shortest(examples: Examples) -> int:
    """How many positions, counted from the end, are input in every example."""
    mask = examples.attention_mask
    return examples.tokens.shape[1] if mask is None else int(mask.sum(1).min())


@pytest.mark.slow
@every_task
def test_the_language_model_does_not_implement_the_wrong_models(name: str):
    """A wrong model gives other answers than the network; or one of its variables is at no place of one position."""
    task, pairs, few = loaded(name), pairs_of(name), pairs_of(name, 32, 1)
    assert pairs.base.choices is not None
    said = pairs.base.choices[logits_of(name, pairs.base).argmax(1)]
    assert float((said == pairs.expected(task.causal_model, ())).double().mean()) >= 0.95
    for wrong in task.wrong:
        rival = task.causal_models[wrong]
        found = [float((said == pairs.expected(rival, ())).double().mean())]
        for variable in set(rival.variables) - {rival.output} if found[0] >= 0.9 else ():
            everywhere = places(model_of(name), min(shortest(few.base), shortest(few.source)))
            found.append(max(carried(name, rival, variable, units, few) for units in everywhere))
        assert min(found) < 0.9, wrong


@every_task
def test_padding_on_either_side_gives_the_same_answers(name: str):
    left, right_ = splits(name)["test"], MODULES[name].task(padding_side="right").examples(0)[2]
    assert left.attention_mask is not None and not torch.equal(left.tokens, right_.tokens)
    assert torch.allclose(logits_of(name, left[:64]), logits_of(name, right_[:64]), atol=1e-3)


@every_task
def test_the_alignments_variables_and_units_exist(name: str):
    task, model = loaded(name), model_of(name)
    variables = {variable for rival in task.causal_models.values() for variable in rival.variables}
    assert task.alignment.variables and set(task.alignment.variables) <= variables
    sites = {site.hook: site for site in (heads(model) + neurons(model) + residuals(model)).sites}
    length = pairs_of(name).base.tokens.shape[1]
    for variable, units in task.alignment.units.items():
        assert units and len({unit.name for unit in units}) == len(units), variable
        for unit in units:
            there = sites[re.sub(r"attn\.hook_[qkv]$", "attn.hook_z", unit.site.hook)]
            assert unit.site.layer == there.layer and 0 <= unit.index < unit.site.size
            mask = unit.site.position_mask(1, length)
            assert unit.site.positions is not None and mask is not None and bool(mask.any()), "it says where"
