"""What a text task refuses: checkpoints without their parts, names, tokenizers that split words, prompts too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.animals import PLACES, SENTENCES, all_words, checkpoint, every_kind, task_of, tokenizer_of, without_model
from helpers.models import unchecked
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tl_sparsify import load_task, text

# What is refused


def loaders(source: Any) -> Sequence[Any]:
    return (
        lambda: text.load_language_model(source),
        lambda: text.load_tokenizer(source),
        lambda: text.TextTask(SENTENCES, source).examples(0),
        lambda: load_task("ioi", model=source).model(),
    )


def test_folders_without_their_parts_are_refused(checkpoints: dict[str, Path], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((checkpoints["GPT-2"] / "config.json").read_text())
    for folder, message in (
        ("empty", "has no config.json: give a folder in Hugging Face format"),
        ("bare", "has no tokenizer.json: save the tokenizer there too"),
        ("nowhere", "there is no folder"),
    ):
        for load in loaders(tmp_path / folder):
            with pytest.raises(ValueError, match=message):
                load()
    (tmp_path / "bare" / "tokenizer.json").write_text((checkpoints["GPT-2"] / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"the language model '.*bare' cannot be loaded: .*model\.safetensors"):
        text.load_language_model(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ValueError, match=r"the language model '.*bare' cannot be loaded: "):
        text.load_language_model(tmp_path / "bare")


@pytest.mark.parametrize("name", ["gpt2", "nobody/no-such-model", "not a name", "a/b/c"])
def test_a_name_that_cannot_be_loaded_is_one_error_at_once(name: str):
    for load in loaders(name):
        with pytest.raises(ValueError, match=f"^the language model '{name}' cannot be loaded: .*[^ ]$") as caught:
            load()
        assert "\n" not in str(caught.value)


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


def test_an_unknown_kind_of_counterfactual_is_refused():
    for ask in (task_of("byte pairs").dataset, task_of("byte pairs").examples):
        with pytest.raises(ValueError, match="counterfactual is 'mean'; the kinds are swapped, other_first"):
            ask(0, "mean")


def test_a_model_for_a_task_that_has_its_own_is_refused(checkpoints: dict[str, Path]):
    with pytest.raises(ValueError, match="model is given, but the task hierarchical_equality has a model of its own"):
        load_task("hierarchical_equality", model=checkpoints["GPT-2"])


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
