"""Examples from text: the answer is the next token, padding on either side, and what is refused."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers.models import NoCasts, unchanged, unchecked
from helpers.tokenized import ANSWERS, PROMPTS, WORDS, bridge, byte_pairs, with_a_space_before, word_level
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify import constants, score
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.units import heads, neurons


def last(examples: Examples) -> torch.Tensor:
    """The position of each example's label."""
    return (examples.labels != -100).int().argmax(1)


def test_the_answer_stands_at_the_last_token_of_the_prompt():
    tokenizer, prompts = word_level(), ["the cat sat and", "the dog"]
    right = Examples.from_prompts(tokenizer, prompts, [" ran", " sat"], padding_side="right")
    assert right.tokens.tolist() == [[3, 4, 6, 9], [3, 5, 0, 0]]
    assert right.labels.tolist() == [[-100, -100, -100, 7], [-100, 6, -100, -100]]
    assert right.attention_mask is not None
    assert right.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    left = Examples.from_prompts(tokenizer, prompts, [" ran", " sat"], padding_side="left")
    assert left.tokens.tolist() == [[3, 4, 6, 9], [0, 0, 3, 5]]
    assert left.labels.tolist() == [[-100, -100, -100, 7], [-100, -100, -100, 6]]
    assert left.attention_mask is not None
    assert left.attention_mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert left.counterfactual_tokens is left.counterfactual_labels is left.choices is None


def test_without_padding_there_is_no_mask():
    found = Examples.from_prompts(word_level(), ["the cat", "the dog"], ["ran", "sat"])
    assert found.attention_mask is None and found.tokens.shape == (2, 2)


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from(WORDS[3:]), min_size=1, max_size=9), st.sampled_from(WORDS[3:])), min_size=1
    ),
    st.sampled_from(["left", "right"]),
    st.booleans(),
)
def test_what_the_mask_leaves_reads_as_the_prompt(rows: list[tuple[list[str], str]], side: Any, bos: bool):
    tokenizer = word_level(bos_token="<s>", pad_token="</s>")
    prompts = [" ".join(words) for words, _ in rows]
    found = Examples.from_prompts(
        tokenizer, prompts, [f" {answer}" for _, answer in rows], padding_side=side, prepend_bos=bos
    )
    mask = torch.ones_like(found.tokens).bool() if found.attention_mask is None else found.attention_mask
    for i, (prompt, (words, answer)) in enumerate(zip(prompts, rows, strict=True)):
        row = found.tokens[i, mask[i]]
        assert tokenizer.decode(row.tolist()) == ("<s> " if bos else "") + prompt
        assert len(row) == len(words) + bos
        assert bool((found.tokens[i, ~mask[i]] == WORDS.index("</s>")).all())
        assert found.labels[i, last(found)[i]] == WORDS.index(answer)
        assert int((found.labels[i] != -100).sum()) == 1
        assert mask[i, : last(found)[i] + 1].sum() == len(row)
        assert mask[i, 0 if side == "right" else -1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("tokenizer", [byte_pairs, with_a_space_before])
def test_tokens_are_those_of_the_bridge(tokenizer: Any, bos: bool | None, side: Any):
    model = bridge("GPT-2", tokenizer=tokenizer)
    found = Examples.from_prompts(model, PROMPTS, ANSWERS, prepend_bos=bos, padding_side=side)
    assert torch.equal(found.tokens, model.to_tokens(PROMPTS, prepend_bos=bos, padding_side=side))


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama"])
def test_padding_on_either_side_gives_the_same_numbers(name: str):
    model = bridge(name)
    units = heads(model) + neurons(model)
    settings: dict[str, Any] = {"choices": ANSWERS}  # so few that probes are exact
    padded = [
        Examples.from_prompts(model, PROMPTS, ANSWERS, padding_side=side, **settings) for side in ("left", "right")
    ]
    assert all(examples.attention_mask is not None for examples in padded)
    with NoCasts():
        alone = [Examples.from_prompts(model, [p], [a], **settings) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        logits = torch.cat([answer_logits(model, one) for one in alone])
        for examples in padded:
            assert torch.allclose(answer_logits(model, examples), logits, rtol=1e-9, atol=1e-11)
        values = [constants.mean(model, examples, units) for examples in padded]
        for one, other in zip(values[0].tensors, values[1].tensors, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)
        left, right = (score.risk(model, examples, units, values=values[0]) for examples in padded)
    assert torch.allclose(left.scores, right.scores, rtol=1e-9, atol=1e-14)
    assert float(left.scores.max()) > 0


def test_a_model_and_its_tokenizer_are_left_as_they_came():
    model = bridge("GPT-2")
    tokenizer = byte_pairs()
    for source, own in ((model, model.tokenizer), (tokenizer, tokenizer)):
        before = (own.backend_tokenizer.to_str(), own.pad_token, own.padding_side, own.model_max_length, len(own))
        with unchanged(model):
            Examples.from_prompts(source, PROMPTS, ANSWERS, padding_side="left", choices=[*ANSWERS, " river"])
            with unchecked(), pytest.raises(ValueError, match="answers"):
                Examples.from_prompts(source, PROMPTS, ["Thessaloniki", *ANSWERS[1:]])
        after = (own.backend_tokenizer.to_str(), own.pad_token, own.padding_side, own.model_max_length, len(own))
        assert after == before
    assert tokenizer.pad_token is None


def test_padding_that_the_model_does_not_know_is_not_used():
    tokenizer = byte_pairs()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(d_vocab=size, n_ctx=9, default_prepend_bos=False))
    found = Examples.from_prompts(model, PROMPTS, ANSWERS)
    assert found.attention_mask is not None and int(found.tokens.max()) < size
    assert bool((found.tokens[~found.attention_mask] == tokenizer.eos_token_id).all())
    assert int(Examples.from_prompts(tokenizer, PROMPTS, ANSWERS).tokens.max()) == size


@pytest.mark.parametrize("answer", [" sat", "sat"])
def test_a_tokenizer_that_drops_spaces_needs_none(answer: str):
    found = Examples.from_prompts(word_level(), ["the cat"], [answer])
    assert found.labels.tolist() == [[-100, 6]]


def test_the_space_belongs_to_the_answer():
    pairs, pieces = byte_pairs(), with_a_space_before()
    for tokenizer, token in ((pairs, "ĠParis"), (pieces, "▁Paris")):
        found = Examples.from_prompts(tokenizer, PROMPTS[:1], [" Paris"])
        assert int(found.labels[0, -1]) == tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id
    assert len(pieces(" Paris", add_special_tokens=False)["input_ids"]) == 2  # by itself it is two


def test_a_first_token_is_the_tokenizers_custom_and_never_twice():
    prompts, answers = ["the cat", "<s> the dog"], ["sat", "sat"]
    assert Examples.from_prompts(word_level(bos_token="<s>"), prompts[:1], answers[:1]).tokens.tolist() == [[3, 4]]
    asked = Examples.from_prompts(word_level(bos_token="<s>"), prompts, answers, prepend_bos=True)
    assert asked.tokens.tolist() == [[0, 3, 4], [0, 3, 5]]
    own = with_a_space_before()
    assert Examples.from_prompts(own, PROMPTS[:1], ANSWERS[:1]).tokens[0].tolist() == own(PROMPTS[0])["input_ids"]


def test_counterfactuals_and_choices():
    tokenizer = word_level()
    found = Examples.from_prompts(
        tokenizer,
        ["the cat sat", "dog"],
        ["home", "ran"],
        counterfactual_prompts=["the dog ran", "cat"],
        counterfactual_answers=["then", "home"],
        choices=["home", "then", "ran"],
        padding_side="left",
    )
    assert found.counterfactual_tokens is not None and found.choices is not None
    assert found.counterfactual_labels is not None
    assert found.tokens.tolist() == [[3, 4, 6], [0, 0, 5]]
    assert found.counterfactual_tokens.tolist() == [[3, 5, 7], [0, 0, 4]]
    assert found.counterfactual_labels.tolist() == [[-100, -100, 10], [-100, -100, 8]]
    assert found.choices.tolist() == [8, 10, 7]
    wrong = Examples.from_prompts(tokenizer, ["the cat", "dog"], ["sat", "ran"], wrong_answers=["ran", "sat"])
    assert wrong.counterfactual_labels is not None and wrong.counterfactual_tokens is None
    assert wrong.counterfactual_labels.tolist() == [[-100, 7], [6, -100]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [], "answers": []}, "prompts is empty: give at least one"),
    ({"prompts": "the cat"}, "prompts is one text, 'the cat': give a list"),
    ({"answers": ["sat"]}, "answers has 1 texts for 2 prompts"),
    ({"counterfactual_prompts": ["the dog"]}, "counterfactual_prompts has 1 texts for 2 prompts"),
    ({"answers": ["sat", 5]}, r"answers\[1\] is 5: it must be text"),
    ({"prompts": ["the cat", ""]}, r"prompts\[1\] is '', which has no token"),
    ({"prompts": ["  ", "the dog"]}, r"prompts\[0\] is '  ', which has no token"),
    ({"answers": ["sat", " ran home"]}, r"answers\[1\] is ' ran home', which is 2 tokens, \['ran', 'home'\].*another"),
    ({"answers": ["", "ran"]}, r"answers\[0\] is '', which is 0 tokens, \[\].*take another word"),
    ({"answers": ["sat", " zebra"]}, r"answers\[1\] is ' zebra', which the tokenizer does not know.*'<unk>'.*another"),
    ({"choices": ["sat", "zebra"]}, r"choices\[1\] is 'zebra', which the tokenizer does not know"),
    ({"choices": ["sat", "home"]}, r"answers\[1\] is 'ran', which is not among choices"),
    ({"choices": []}, r"answers\[0\] is 'sat', which is not among choices"),
    ({"choices": ["sat", "ran", " sat"]}, r"choices holds an id twice: \[6, 7, 6\]"),
    ({"wrong_answers": ["ran", "ran"]}, r"wrong_answers\[1\] is 'ran', the right answer"),
    ({"wrong_answers": ["home", "sat"], "choices": ["sat", "ran"]}, r"wrong_answers\[0\] is 'home', which is not"),
    ({"counterfactual_answers": ["ran", "sat"]}, "counterfactual_answers needs counterfactual_prompts"),
    (
        {"counterfactual_prompts": ["the dog", "the"]},
        r"counterfactual_prompts\[1\] has 1 tokens and prompts\[1\] 2.*'the dog' and 'the'",
    ),
    (
        {"counterfactual_prompts": ["a b"] * 2, "counterfactual_answers": ["ran"] * 2, "wrong_answers": ["x"] * 2},
        "wrong_answers and counterfactual_answers are both",
    ),
    ({"prepend_bos": True}, "prepend_bos is True, and the tokenizer has no beginning-of-sequence token"),
    ({"padding_side": "both"}, "padding_side is 'both'; it is left or right"),
    ({"max_length": 1}, r"prompts\[0\] has 2 tokens, max_length is 1: shorten it \('the cat'\)"),
    ({"max_length": 0}, "max_length is 0; it must be at least 1"),
    ({"tokenizer_or_model": object()}, "tokenizer_or_model is of type object, which has no tokenizer"),
    ({"tokenizer_or_model": word_level().backend_tokenizer}, r"of type Tokenizer, .*PreTrainedTokenizerFast\("),
]  # fmt: skip


@pytest.mark.parametrize("changes, says", REFUSED)
def test_what_is_refused(changes: dict[str, Any], says: str):
    given = {"tokenizer_or_model": word_level(), "prompts": ["the cat", "the dog"], "answers": ["sat", "ran"]} | changes
    with unchecked(), pytest.raises(ValueError, match=says):
        Examples.from_prompts(**given)


@pytest.mark.parametrize("tokenizer", [byte_pairs, with_a_space_before])
@pytest.mark.parametrize(
    "prompt, answer, says",
    [
        (PROMPTS[0], " Thessaloniki", r"which is 11 tokens, \['.', 'T', .*take another word"),
        (PROMPTS[0] + " ", "Paris", r"changes the end of its prompt.*take it from the end of the prompt \(' Paris'\)"),
        ("the capital of Fra", "nce", r"which changes the end of its prompt, to \[.*'.France'\].*take another word"),
        (PROMPTS[0], "", r"which is 0 tokens, \[\].*take another word"),
    ],
)  # fmt: skip
def test_an_answer_of_several_pieces_is_refused_with_the_mend(tokenizer: Any, prompt: str, answer: str, says: str):
    with pytest.raises(ValueError, match=rf"answers\[0\] is '{answer}', .*{says}"):
        Examples.from_prompts(tokenizer(), [prompt], [answer])


@pytest.mark.parametrize("tokenizer", [byte_pairs, with_a_space_before])
def test_a_word_without_its_space_is_refused_with_the_mend(tokenizer: Any):
    says = r"'Paris', which is 2 tokens, \['Pa', 'ris'\].*begin it with the space \(' Paris'\)"
    with pytest.raises(ValueError, match=says):
        Examples.from_prompts(tokenizer(), PROMPTS[:1], ["Paris"])


def test_a_prompt_longer_than_the_context_is_refused():
    model = bridge("GPT-2")
    context = model.cfg.n_ctx
    fits = " the" * (context - 1)
    assert Examples.from_prompts(model, [fits], [" capital"]).tokens.shape == (1, context)
    for source in (model, byte_pairs()):
        says = r"prompts\[1\] has 40 tokens, max_length is 9: shorten it \(' the the.* \.\.\. .*the'\)"
        with pytest.raises(ValueError, match=says):
            Examples.from_prompts(source, [" the", " the" * 40], [" capital"] * 2, max_length=9, prepend_bos=False)
    with pytest.raises(ValueError, match=rf"has {context + 1} tokens, the model's context is {context}"):
        Examples.from_prompts(model, [fits + " the"], [" capital"], max_length=10 * context)
    short = byte_pairs()
    short.model_max_length = 3
    with pytest.raises(ValueError, match=r"has 4 tokens, the tokenizer's model_max_length is 3"):
        Examples.from_prompts(short, [" the" * 4], [" capital"])


def test_a_model_without_a_tokenizer_is_refused():
    model = bridge("GPT-2")
    model.tokenizer, own = None, model.tokenizer
    try:
        with pytest.raises(ValueError, match="of type TransformerBridge, which has no tokenizer"):
            Examples.from_prompts(model, PROMPTS, ANSWERS)
    finally:
        model.tokenizer = own


COLUMNS = {
    "text": ["the cat sat", "dog"],
    "word": ["home", "ran"],
    "other": ["the dog ran", "cat"],
    "other word": ["then", "home"],
}


@pytest.mark.parametrize("shape", [None, "torch", "numpy", "pandas"])
def test_a_dataset_gives_what_its_columns_give(shape: str | None):
    tokenizer = word_level()
    data = Dataset.from_dict(COLUMNS).with_format(shape)
    found = Examples.from_dataset(
        tokenizer,
        data,
        prompt="text",
        answer="word",
        counterfactual_prompt="other",
        counterfactual_answer="other word",
        choices=["home", "then", "ran"],
        padding_side="left",
    )
    text, word, other, other_word = COLUMNS.values()
    expected = Examples.from_prompts(
        tokenizer,
        text,
        word,
        counterfactual_prompts=other,
        counterfactual_answers=other_word,
        choices=["home", "then", "ran"],
        padding_side="left",
    )
    for (name, mine), (_, theirs) in zip(vars(found).items(), vars(expected).items(), strict=True):
        assert mine is theirs or torch.equal(mine, theirs), name
    assert data.format["type"] == shape
    plain = Dataset.from_dict({"prompt": text, "answer": word, "wrong": ["ran", "home"]})
    wrong = Examples.from_dataset(tokenizer, plain, wrong_answer="wrong").counterfactual_labels
    assert wrong is not None and wrong.tolist() == [[-100, -100, 7], [8, -100, -100]]


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    data = Dataset.from_dict({"question": ["the cat"], "answer": ["sat"]})
    with pytest.raises(ValueError, match="no column 'prompt': its columns are question, answer; name one by prompt="):
        Examples.from_dataset(word_level(), data)
    with pytest.raises(ValueError, match=r"no column 'base'.*name one by counterfactual_prompt="):
        Examples.from_dataset(word_level(), data, prompt="question", counterfactual_prompt="base")
    with pytest.raises(ValueError, match=r"splits train, test: give one, dataset\['train'\]"):
        Examples.from_dataset(word_level(), DatasetDict({"train": data, "test": data}))
    for other in (data.to_iterable_dataset(), {"prompt": ["the cat"], "answer": ["sat"]}):
        with pytest.raises(ValueError, match=f"dataset is of type {type(other).__name__}: give a datasets.Dataset"):
            Examples.from_dataset(word_level(), other)
    with pytest.raises(ValueError, match="prompts is empty"):
        Examples.from_dataset(word_level(), data.select([]), prompt="question")
    numbers = Dataset.from_dict({"prompt": ["the cat"], "answer": [3]})
    with unchecked(), pytest.raises(ValueError, match=r"answers\[0\] is 3: it must be text"):
        Examples.from_dataset(word_level(), numbers)


def test_no_tokenizer_is_imported_for_examples_of_tensors():
    package = Path(__file__).parent.parent / "tl_sparsify"
    for module in ("examples", "prompts"):
        tree = ast.parse((package / "core" / f"{module}.py").read_text())
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not {name.split(".")[0] for name in names} & {"datasets", "tokenizers", "transformers"}
