"""A text task about animals, and tokenizers and checkpoints made for it by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from jaxtyping import Shaped
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.architectures import CONFIGS
from helpers.native import randomised
from tl_sparsify import CausalModel, text

ROOT = Path(__file__).parent.parent.parent
ANIMALS = "cat dog fox owl bear wolf hare crow toad goat lynx swan".split()
PLACES = "barn wood yard field".split()
WORDS = ["in", "the", "saw", "who", ",", *ANIMALS, *PLACES]
TEMPLATES = ("the {first} saw the {second}, who saw the", "in the {place} the {first} saw the {second}, who saw the")
SIZES = {"train": 64, "validation": 16, "test": 32}
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
