"""Text tasks for any language model: which words count, splits that never move, data, pairs, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.architectures import CONFIGS
from helpers.models import NoCasts, unchanged, unchecked
from helpers.native import randomised
from helpers.tokenized import bridge
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool, Shaped
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformer_lens import TransformerBridge
from transformers import PreTrainedTokenizerFast

from tl_sparsify import CausalModel, constants, heads, load_task, neurons, score, text
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.tasks.pairing import split_of

ROOT = Path(__file__).parent.parent
ANIMALS = "cat dog fox owl bear wolf hare crow toad goat lynx swan".split()
PLACES = "barn wood yard field".split()
WORDS = ["in", "the", "saw", "who", ",", *ANIMALS, *PLACES]
TEMPLATES = ("the {first} saw the {second}, who saw the", "in the {place} the {first} saw the {second}, who saw the")
SIZES = {"train": 64, "validation": 16, "test": 32}
SHIPPED = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement", "docstring")
ARCHITECTURES = {"GPT-2": "byte pairs", "Pythia": "byte pairs", "Llama": "space before"}
SIDES = ("left", "right")
Rows = Mapping[str, Shaped[np.ndarray, "n"]]

SEEN = CausalModel(
    inputs=("sentence", "first", "second"),
    mechanisms={"seen": lambda first: first, "answer": lambda seen: seen},
    output="answer",
)
LAST = CausalModel(inputs=SEEN.inputs, mechanisms={"last": lambda second: second}, output="last")


def rows(n: int, seed: int) -> Rows:
    """Two animals, at a place where the template has one."""
    fields = {"template": TEMPLATES, "first": ANIMALS, "second": ANIMALS, "place": PLACES}
    found = text.draw_rows(fields, n, seed)
    return {name: values[found["first"] != found["second"]] for name, values in found.items()}


def swapped(some: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    return {**some, "first": some["second"], "second": some["first"]}


def other_first(some: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
    first = rng.choice(words["first"], len(some["first"]))
    while (same := (first == some["first"]) | (first == some["second"])).any():
        first[same] = rng.choice(words["first"], int(same.sum()))
    return {**some, "first": first}


SENTENCES = text.Sentences(
    causal_model=SEEN,
    rows=rows,
    slots={"first": ANIMALS, "second": ANIMALS, "place": PLACES},
    outputs={animal: f" {animal}" for animal in ANIMALS},
    key=lambda some: text.row_keys(some, {"first": ANIMALS, "second": ANIMALS}),
    cell=lambda some: np.array(["{place}" in template for template in some["template"].tolist()]),
    counterfactuals={"swapped": swapped, "other_first": other_first},
    rivals=(LAST,),
    sizes=SIZES,
)


def _lines(words: Sequence[str]) -> list[str]:
    """Every word with its space and every number also without one, as the second half of a year."""
    return [f"{word} {word} {word}" for word in words] + [f"{word}{word}" for word in words if word.isdigit()]


def byte_pairs(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """As GPT-2's; every one of ``words`` is one token with its space, every other one several."""
    raw: Any = Tokenizer(models.BPE())
    pairs_of_digits = pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pairs_of_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=9000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_lines(words), trainer)
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **ends | special)


def word_level(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """Words and marks; spaces are dropped, other words are unknown."""
    known = ["<s>", "<unk>", *dict.fromkeys([*words, ","])]
    raw: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


def space_before(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space goes before every text, and the tokenizer puts its own first token there."""
    raw: Any = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pairs_of_digits = pre_tokenizers.Split(Regex(r"▁?\d{1,2}"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pairs_of_digits, pre_tokenizers.Split("▁", "merged_with_next")])
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=9000, special_tokens=["<unk>", "<s>"], initial_alphabet=letters, show_progress=False
    )
    raw.train_from_iterator(_lines(words), trainer)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"bos_token": "<s>", "unk_token": "<unk>"} | special)


KINDS = {"byte pairs": byte_pairs, "word level": word_level, "space before": space_before}
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind: str, words: tuple[str, ...] = tuple(WORDS)) -> Any:
    return KINDS[kind](words)


@cache
def maker(kind: str) -> Any:
    return lambda: tokenizer_of(kind)


def without_model(tokenizer: Any, n_ctx: int = 99) -> Any:
    """As a bridge with this tokenizer, as far as data are concerned."""
    cfg = SimpleNamespace(n_ctx=n_ctx, d_vocab=len(tokenizer), default_prepend_bos=tokenizer.bos_token is not None)
    return SimpleNamespace(tokenizer=tokenizer, cfg=cfg)


@cache
def task_of(kind: str, words: tuple[str, ...] = tuple(WORDS), **settings: Any) -> text.TextTask:
    return text.TextTask(SENTENCES, without_model(tokenizer_of(kind, words)), **settings)


@cache
def all_words() -> tuple[str, ...]:
    """Every word of the shipped tasks, and every number of two digits."""
    lists = json.loads((ROOT / "tasks" / "words.json").read_text())
    words = [word for entry in lists.values() for some in entry for word in ([some] if isinstance(some, str) else some)]
    return (*words, *(f"{number:02d}" for number in range(100)), "the", "he", "she", "is", "are")


def checkpoint(folder: Path, architecture: str, tokenizer: Any, length: int = 256, **settings: Any) -> Path:
    """A small model with random weights and its tokenizer, in Hugging Face format."""
    class_name, config = CONFIGS[architecture]
    model_class = getattr(transformers, class_name)
    size = {"n_positions" if architecture == "GPT-2" else "max_position_embeddings": length}
    made = model_class.config_class(**config | size | {"vocab_size": len(tokenizer)} | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        randomised(model_class(made), scale=0.4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each architecture, with a tokenizer that knows every word of the shipped tasks."""
    return {
        name: checkpoint(tmp_path_factory.mktemp(name), name, tokenizer_of(kind, all_words()))
        for name, kind in ARCHITECTURES.items()
    }


# Words


@every_kind
@given(st.sets(st.sampled_from(ANIMALS)))
def test_words_that_the_tokenizer_splits_or_does_not_know_are_left_out(kind: str, known: set[str]):
    words = ("the", *(word for word in ANIMALS if word in known))
    assert set(text.single_token_words(tokenizer_of(kind, words), ANIMALS)) == known


@every_kind
def test_single_words_stay_in_their_order_and_none_is_none(kind: str):
    assert text.single_token_words(tokenizer_of(kind), ["fox", "zebra", "cat"]) == ["fox", "cat"]
    assert text.single_token_words(tokenizer_of(kind), []) == []


@pytest.mark.parametrize("kind", ["byte pairs", "space before"])
def test_numbers_are_those_of_two_tokens(kind: str):
    tokenizer = tokenizer_of(kind, ("the", "17", "18", "32", "05"))
    found = text.two_token_numbers(tokenizer, ["17", "18", "19"], ["32", "05", "07"])
    heads_and_tails = [[(head, tail) for tail in ("32", "05", "07")] for head in ("17", "18", "19")]

    def pieces(head: str, tail: str) -> list[str]:
        ids = tokenizer(f"the {head}{tail}", add_special_tokens=False)["input_ids"]
        return [piece.strip("Ġ▁") for piece in tokenizer.convert_ids_to_tokens(ids)]

    expected = [[pieces(head, tail) == ["the", head, tail] for head, tail in row] for row in heads_and_tails]
    assert found.tolist() == expected and found.any() and not found.all()


def test_rows_of_words_are_drawn_from_their_lists_and_each_by_its_number():
    fields = {"first": ANIMALS, "place": PLACES, "number": (1, 2, 3)}
    few, many, other = text.draw_rows(fields, 50, 3), text.draw_rows(fields, 400, 3), text.draw_rows(fields, 50, 4)
    for name, words in fields.items():
        assert set(many[name].tolist()) == set(words)
        assert many[name][:50].tolist() == few[name].tolist() != other[name].tolist()
        assert (np.unique(many[name], return_counts=True)[1] > 400 / len(words) / 2).all()


def test_keys_number_the_words_of_the_fields_alone():
    some = {"first": np.array(["cat", "cat", "dog", "cat"]), "place": np.array(["barn", "wood", "barn", "barn"])}
    fields = {"first": ANIMALS, "place": PLACES}
    one, two, three, again = text.row_keys(some, fields).tolist()
    assert one == again and len({one, two, three}) == 3
    assert text.row_keys({**some, "other": some["place"]}, fields).tolist() == [one, two, three, one]
    every = {"first": np.repeat(ANIMALS, len(PLACES)), "place": np.tile(PLACES, len(ANIMALS))}
    assert sorted(text.row_keys(every, fields).tolist()) == list(range(len(ANIMALS) * len(PLACES)))


def test_templates_are_filled_row_by_row():
    some = {"first": np.array(["cat", "dog"]), "place": np.array(["barn", "wood"])}
    assert text.filled(["a {first}", "{place}: {first}, {first}"], some) == ["a cat", "wood: dog, dog"]


# Data


@every_kind
def test_sentences_hold_only_words_of_one_token(kind: str):
    known = ("the", "in", "saw", "who", ",", *ANIMALS[:8], *PLACES[:2])
    task = text.TextTask(replace(SENTENCES, sizes=dict.fromkeys(SIZES, 8)), without_model(tokenizer_of(kind, known)))
    assert task.words == {"first": ANIMALS[:8], "second": ANIMALS[:8], "place": PLACES[:2]}
    for some in task.rows:
        assert set(some["first"].tolist()) | set(some["second"].tolist()) <= set(ANIMALS[:8])
        assert set(some["place"].tolist()) <= set(PLACES[:2])
    assert task.choices == [f" {animal}" for animal in ANIMALS[:8]]
    for examples in (*task.examples(0), task.pairs(16, 0).base):
        assert examples.choices is not None and len(examples.choices) == 8


def test_an_output_without_a_space_is_a_choice_whatever_the_words():
    task = text.TextTask(
        replace(SENTENCES, outputs={"cat": " cat", "zebra": " zebra", "05": "05"}),
        without_model(tokenizer_of("byte pairs")),
    )
    assert task.choices == [" cat", "05"]


@every_kind
def test_no_sentence_occurs_twice_and_the_splits_do_not_depend_on_the_tokenizer_or_the_seed(kind: str):
    everywhere = {name: set() for name in SIZES}
    for words in (WORDS, [*WORDS[:13], *PLACES]):
        task = text.TextTask(replace(SENTENCES, sizes=dict.fromkeys(SIZES, 4)), without_model(KINDS[kind](words)))
        for seed in (0, 1):
            data = task.dataset(seed)
            found = [prompt for part in data.values() for prompt in part["prompt"]]
            assert len(set(found)) == len(found)
            for name in SIZES:
                everywhere[name] |= set(data[name]["prompt"])
        for name, some in zip(SIZES, task.rows, strict=True):
            prompts = text.filled(some["template"].tolist(), some)
            assert len(set(prompts)) == len(prompts)
            everywhere[name] |= set(prompts)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert everywhere[one] and not everywhere[one] & everywhere[other]


def test_the_key_decides_the_split():
    for number, some in enumerate(task_of("byte pairs").rows):
        assert (split_of(SENTENCES.key(some)) == number).all() and len(some["first"]) >= list(SIZES.values())[number]


def test_data_are_a_function_of_the_seed():
    task, again = task_of("byte pairs"), text.TextTask(SENTENCES, without_model(byte_pairs(WORDS)))
    for kind in (None, "swapped", "other_first"):
        one, same, other = task.dataset(3, kind), again.dataset(3, kind), task.dataset(4, kind)
        assert list(one) == list(SIZES) and [len(one[name]) for name in one] == list(SIZES.values())
        for name in SIZES:
            assert one[name].to_dict() == same[name].to_dict()
            assert set(one[name]["prompt"]) != set(other[name]["prompt"])
    assert task.pairs(16, 3).base.tokens.tolist() == again.pairs(16, 3).base.tokens.tolist()
    assert task.pairs(16, 3).base.tokens.tolist() != task.pairs(16, 4).base.tokens.tolist()


def test_random_states_are_left_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    task_of("byte pairs").examples(5)
    task_of("byte pairs").pairs(16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@every_kind
@pytest.mark.parametrize("counterfactual", [None, "swapped", "other_first"])
def test_columns_answers_and_counterfactuals(kind: str, counterfactual: str | None):
    task = task_of(kind)
    data = task.dataset(0, counterfactual)["train"]
    assert data.column_names == [
        "sentence", "first", "second", "prompt", "answer", "counterfactual_prompt", "counterfactual_answer",
    ]  # fmt: skip
    for row in data:
        assert row["prompt"] == row["sentence"].format(first=row["first"], second=row["second"])
        assert row["answer"] == f" {row['first']}"
        other = row["counterfactual_answer"].strip()
        second = row["first"] if counterfactual != "other_first" else row["second"]
        assert row["counterfactual_prompt"] == row["sentence"].format(first=other, second=second)
        assert other == row["second"] if counterfactual != "other_first" else other not in (row["first"], row["second"])
        one, two = task.tokenizer([row["prompt"], row["counterfactual_prompt"]], add_special_tokens=False)["input_ids"]
        assert len(one) == len(two)
    assert sum("in the" in prompt for prompt in data["prompt"]) == len(data) / 2, "as many of each cell"


def test_the_first_kind_of_counterfactual_is_the_usual_one():
    task = task_of("byte pairs")
    assert task.dataset(0)["test"].to_dict() == task.dataset(0, "swapped")["test"].to_dict()
    assert task.dataset(0)["test"].to_dict() != task.dataset(0, "other_first")["test"].to_dict()


def test_an_answer_is_held_against_what_the_task_says():
    against = replace(SENTENCES, held_against=lambda some: some["second"])
    data = text.TextTask(against, task_of("byte pairs").source).dataset(0, "other_first")["test"]
    assert data["counterfactual_answer"] == [f" {animal}" for animal in data["second"]]


@every_kind
@pytest.mark.parametrize("side", SIDES)
def test_examples_are_the_data_as_tokens(kind: str, side: Any):
    task = task_of(kind, padding_side=side)
    for examples, data in zip(task.examples(2), task.dataset(2).values(), strict=True):
        mask, other = examples.attention_mask, examples.counterfactual_tokens
        assert mask is not None and other is not None and examples.counterfactual_labels is not None
        assert mask[:, -1 if side == "left" else 0].all()
        for i, row in enumerate(data):
            for tokens, prompt in ((examples.tokens, row["prompt"]), (other, row["counterfactual_prompt"])):
                read = task.tokenizer.decode(tokens[i, mask[i]].tolist(), skip_special_tokens=True)
                assert read.replace(" ,", ",").strip() == prompt
            where = (examples.labels[i] != -100).nonzero().flatten()
            assert where.tolist() == [int(mask[i].nonzero().max())]
            for labels, answer in (
                (examples.labels, "answer"),
                (examples.counterfactual_labels, "counterfactual_answer"),
            ):
                assert task.tokenizer.decode([int(labels[i, where])]).strip() == row[answer].strip()


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


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {}])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_the_beginning_token_goes_first_where_it_is_wanted(special: dict[str, str], wanted: bool | None):
    task = text.TextTask(SENTENCES, without_model(word_level(WORDS, **special)), "right", prepend_bos=wanted)
    if wanted and not special:
        with pytest.raises(ValueError, match="prepend_bos is True, and the tokenizer has no beginning-of-sequence"):
            task.examples(0)
        return
    first = bool(special) if wanted is None else wanted
    for examples in (*task.examples(0), task.pairs(16, 0).base, task.pairs(16, 0).source):
        assert bool((examples.tokens[:, 0] == task.tokenizer.convert_tokens_to_ids("<s>")).all()) == first


# Pairs


@every_kind
@pytest.mark.parametrize(("n", "seed"), [(128, 0), (9, 4)])
def test_pairs_are_balanced_for_the_variables_of_the_model_and_of_its_rivals(kind: str, n: int, seed: int):
    pairs = task_of(kind).pairs(n, seed)
    assert len(pairs) == len(pairs.base) == len(pairs.source) == n
    own = pairs.expected(SEEN, ())
    assert torch.equal(own, pairs.base.labels[pairs.base.labels != -100])
    for model in (SEEN, LAST):
        for variable in model.variables:
            changed = int((pairs.expected(model, (variable,)) != pairs.expected(model, ())).sum())
            assert abs(changed - n / 2) <= 1, variable


@pytest.mark.parametrize("split", [0, 1, 2])
def test_both_sides_of_a_pair_are_of_the_split_and_differ(split: int):
    task = task_of("byte pairs")
    pairs = task.pairs(64, 0, split)
    for inputs in (pairs.base_inputs, pairs.source_inputs):
        assert tuple(inputs) == SEEN.inputs
        assert (split_of(SENTENCES.key(inputs)) == split).all()
    assert (pairs.base.tokens != pairs.source.tokens).any(1).all()
    names = {"sentence": pairs.base_inputs["sentence"], "first": pairs.base_inputs["first"]}
    assert all("{first}" in sentence and first not in sentence for sentence, first in zip(*names.values(), strict=True))


def test_sources_are_made_as_the_task_says():
    def any_first(some: Rows, words: Mapping[str, Sequence[str]], rng: np.random.Generator) -> Rows:
        template, other = rng.choice(TEMPLATES, len(some["first"])), other_first(some, words, rng)
        return {**other, "first": np.where(rng.random(len(template)) < 0.5, some["first"], other["first"])} | {
            "template": template
        }

    made = replace(SENTENCES, sources=any_first, rivals=())
    pairs = text.TextTask(made, task_of("byte pairs").source).pairs(64, 0)
    assert pairs.base_inputs["second"].tolist() == pairs.source_inputs["second"].tolist()
    assert pairs.base_inputs["sentence"].tolist() != pairs.source_inputs["sentence"].tolist()
    assert (split_of(SENTENCES.key(pairs.source_inputs)) == 2).all()
    with pytest.raises(ValueError, match="interchanging 'last' changes the answer for none of the pairs"):
        text.TextTask(replace(made, rivals=(LAST,)), task_of("byte pairs").source).pairs(64, 0)
    with pytest.raises(ValueError, match="interchanging 'seen' changes the answer for all of the pairs"):
        text.TextTask(replace(made, sources=other_first), task_of("byte pairs").source).pairs(64, 0)


def test_what_a_tokenizer_must_do_besides_is_asked_for():
    def no_toads(tokenizer: Any, some: Rows) -> Bool[np.ndarray, "n"]:
        assert len(tokenizer(["the"])["input_ids"]) == 1
        return some["first"] != "toad"

    task = text.TextTask(replace(SENTENCES, fits=no_toads), task_of("byte pairs").source)
    assert all("toad" not in some["first"] and "toad" in some["second"] for some in task.rows)


# Models


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shipped_task_works_with_a_checkpoint(architecture: str, name: str, folders: dict[str, Path]):
    task = load_task(name, model=folders[architecture])
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
    own = text.load_tokenizer(folders[architecture])("the")["input_ids"][0] == bos  # the bridge's may be another one
    assert bool((first == bos).all()) == (bos is not None and own)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bridge_is_the_checkpoint(architecture: str, folders: dict[str, Path]):
    task = load_task("subject_verb_agreement", model=str(folders[architecture]))
    test = task.examples(0)[2][:16]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[architecture]).eval()
    theirs.config._attn_implementation = "eager"
    assert test.attention_mask is not None and test.choices is not None
    mask = test.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(input_ids=test.tokens, attention_mask=mask, position_ids=positions).logits
    expected = logits[:, -1][:, test.choices]
    assert torch.allclose(answer_logits(task.model(), test), expected, atol=1e-4)


def test_a_bridge_is_taken_as_it_is(folders: dict[str, Path]):
    model = text.load_language_model(folders["GPT-2"])
    task = load_task("ioi", model=model)
    assert task.model() is model
    with unchanged(model):
        mine, theirs = task.examples(0), load_task("ioi", model=folders["GPT-2"]).examples(0)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)


def test_loading_data_does_not_load_the_model(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TransformerBridge, "boot_transformers", None)
    task = load_task("subject_verb_agreement", model=folders["GPT-2"])
    assert len(task.pairs(8, 0)) == 8
    with pytest.raises(TypeError):
        task.model()


# What is refused


def loaders(source: Any) -> Sequence[Any]:
    return (
        lambda: text.load_language_model(source),
        lambda: text.load_tokenizer(source),
        lambda: text.TextTask(SENTENCES, source).examples(0),
        lambda: load_task("ioi", model=source).model(),
    )


def test_folders_without_their_parts_are_refused(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folders["GPT-2"] / "config.json").read_text())
    for folder, message in (
        ("empty", "has no config.json: give a folder in Hugging Face format"),
        ("bare", "has no tokenizer.json: save the tokenizer there too"),
        ("nowhere", "there is no folder"),
    ):
        for load in loaders(tmp_path / folder):
            with pytest.raises(ValueError, match=message):
                load()
    (tmp_path / "bare" / "tokenizer.json").write_text((folders["GPT-2"] / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"the language model '.*bare' cannot be loaded: .*model\.safetensors"):
        text.load_language_model(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ValueError, match=r"the language model '.*bare' cannot be loaded: "):
        text.load_language_model(tmp_path / "bare")


@pytest.mark.parametrize("name", ["gpt2", "nobody/no-such-model", "not a name", "a/b/c"])
def test_a_name_that_cannot_be_loaded_is_one_error_at_once(name: str):
    for load in loaders(name):
        start = time.monotonic()
        with pytest.raises(ValueError, match=f"^the language model '{name}' cannot be loaded: .*[^ ]$") as caught:
            load()
        assert time.monotonic() - start < 5 and "\n" not in str(caught.value)


def test_a_bridge_without_a_tokenizer_is_refused():
    for load in loaders(SimpleNamespace(tokenizer=None)):
        with pytest.raises(
            ValueError, match="model is of type SimpleNamespace, without a tokenizer: give one that has"
        ):
            load()


@every_kind
def test_a_tokenizer_that_splits_the_words_is_refused_with_one_of_them(kind: str):
    few = ("the", "in", "saw", "who", ",", "dog", *PLACES)
    task = text.TextTask(SENTENCES, without_model(tokenizer_of(kind, few)))
    message = r"can do with 0 rows of train, 64 are needed: of 12 words for first 1 are one token \(not 'cat'\), of 12"
    for ask in (task.dataset, task.examples, task.pairs):
        with pytest.raises(ValueError, match=message):
            ask()
    nothing = text.TextTask(SENTENCES, without_model(tokenizer_of(kind, ("the",))))
    with pytest.raises(ValueError, match=r"12 words for first 0 are one token \(not 'cat'\)"):
        nothing.examples()


def test_a_tokenizer_that_does_not_pair_digits_is_refused_for_years(tmp_path: Path):
    raw: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *all_words()])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    task = load_task("greater_than", model=without_model(tokenizer))
    with pytest.raises(
        ValueError, match="can do with 0 rows of train, 1024 are needed: its numbers are not two tokens"
    ):
        task.examples(0)


def one_token_a_digit() -> PreTrainedTokenizerFast:
    """Words, and digits apart, as in Llama 3's, Qwen's, Gemma's and SmolLM's."""
    words = [word for word in all_words() if not word.isdigit()]
    raw: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words, *"0123456789"])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def test_years_told_digit_by_digit_are_answered_by_the_first_digit_of_the_end():
    tokenizer = one_token_a_digit()
    task = load_task("greater_than", model=without_model(tokenizer))
    train, validation, test = task.examples(0)
    assert (len(train), len(validation), len(test)) == (1024, 256, 512)
    for examples in (train, validation, test):
        ids = examples.tokens[examples.tokens != 0] if examples.attention_mask is None else examples.tokens
        assert ids is not None and examples.choices is not None and len(examples.choices) == 9
        digits = [tokenizer.convert_ids_to_tokens(row) for row in examples.tokens.tolist()]
        told = [[piece for piece in row if piece.isdigit()] for row in digits]
        answers = tokenizer.convert_ids_to_tokens(examples.labels[:, -1].tolist())
        assert {len(row) for row in told} == {6} and all(row[:2] == row[4:] for row in told)
        for (_, _, tens, last, _, _), answer in zip(told, answers, strict=True):
            # in 1731 or 1732 most of the decade is left, in 1738 or 1739 none: the next one
            assert last in "1289" and answer == str(int(tens) + (last in "89"))
    pairs = task.pairs(64, 0)
    assert pairs.answers["35"] == tokenizer.convert_tokens_to_ids("3") and len(set(pairs.answers.values())) == 9
    for kind in ("other_year", "earliest"):
        counterfactual: Any = task.examples
        other = counterfactual(0, kind)[2]
        assert bool((other.counterfactual_labels[:, -1] != other.labels[:, -1]).any())


def test_numbers_are_told_digit_by_digit_where_each_digit_is_a_token():
    assert text.digit_by_digit(one_token_a_digit(), ["1732", "5"]).tolist() == [True, True]
    assert text.digit_by_digit(tokenizer_of("byte pairs", ("the", "17", "32")), ["1732"]).tolist() == [False]
    assert text.digit_by_digit(tokenizer_of("word level"), ["17"]).tolist() == [False]  # unknown


def test_an_unknown_kind_of_counterfactual_is_refused():
    for ask in (task_of("byte pairs").dataset, task_of("byte pairs").examples):
        with pytest.raises(ValueError, match="counterfactual is 'mean'; the kinds are swapped, other_first"):
            ask(0, "mean")


def test_a_model_for_a_task_that_has_its_own_is_refused(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="model is given, but the task hierarchical_equality has a model of its own"):
        load_task("hierarchical_equality", model=folders["GPT-2"])


def test_a_prompt_longer_than_the_models_context_is_refused(tmp_path: Path):
    short = checkpoint(tmp_path, "GPT-2", tokenizer_of("byte pairs"), length=8)
    for source in (short, text.load_language_model(short)):
        task = text.TextTask(SENTENCES, source)
        for ask in (task.examples, task.pairs):
            with pytest.raises(
                ValueError, match=r"prompts\[\d+\] has \d+ tokens, the model's context is 8: shorten it"
            ):
                ask()


def test_an_unknown_side_is_refused():
    with unchecked(), pytest.raises(ValueError, match="padding_side is 'middle'; it is left or right"):
        text.TextTask(SENTENCES, task_of("byte pairs").source, "middle").examples()  # type: ignore[arg-type]
