"""Small models with tokenizers of each kind, and texts for them."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedTokenizerFast

from helpers.architectures import CONFIGS
from helpers.native import randomised

WORDS = ("<s>", "</s>", "<unk>", "the", "cat", "dog", "sat", "ran", "home", "and", "then")
SENTENCES = ["the capital of France is Paris", "the capital of Italy is Rome", "the river of Rome is the Tiber"] * 9
PROMPTS = ["the capital of France is", "the river of", "is the capital of Italy the"]
ANSWERS = [" Paris", " Rome", " capital"]


def word_level(**special: str) -> PreTrainedTokenizerFast:
    """Words between spaces; spaces themselves are dropped."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)


def _trained(raw: Tokenizer, special: tuple[str, ...], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(SENTENCES, trainer)
    return raw


def byte_pairs() -> PreTrainedTokenizerFast:
    """As GPT-2's: a word's space is part of it, and there is no padding token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    _trained(raw, ("<|endoftext|>",), pre_tokenizers.ByteLevel.alphabet())
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def with_a_space_before() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space goes before every text, and the tokenizer puts its own first token there."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # type: ignore[assignment]
    _trained(raw, ("<unk>", "<s>"), [])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")


@cache
def bridge(name: str, **settings: Any) -> Any:
    """A small model with random weights, in float64, and a byte-pair tokenizer (or another one)."""
    tokenizer = settings.pop("tokenizer", byte_pairs)()
    architecture, config = CONFIGS[name]
    model_class = getattr(transformers, architecture)
    made = model_class.config_class(**config | {"vocab_size": len(tokenizer)} | settings)
    made._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = randomised(model_class(made).double(), scale=0.4)
    with TemporaryDirectory() as folder:  # TransformerLens loads it again from where it came
        tokenizer.save_pretrained(folder)
        saved = PreTrainedTokenizerFast.from_pretrained(folder)
        return build_bridge_from_module(model, architecture, hf_config=made, tokenizer=saved).eval()
