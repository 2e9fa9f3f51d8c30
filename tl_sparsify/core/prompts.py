"""Prompts: text to tokens, labels and mask, by the user's own tokenizer.

An answer is the token that comes next: the text ``prompt + answer`` must have the prompt's tokens and one more. So
the space between two words belongs to the answer (`` Paris``); a tokenizer that drops spaces may do without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

NO_LABEL = -100
_SIDES = ("left", "right")
_PROMPTS = ("prompts", "counterfactual_prompts")


def encoded(
    source: Any,
    texts: Mapping[str, Sequence[str] | None],
    *,
    prepend_bos: bool | None,
    padding_side: str | None,
    max_length: int | None,
) -> dict[str, Tensor | None]:
    """The fields of ``Examples`` for lists of texts: ``prompts``, ``answers`` and, where they are not ``None``,
    ``wrong_answers``, ``counterfactual_prompts``, ``counterfactual_answers`` and ``choices``. The tokenizer is left as
    it is; no model pass."""
    tokenizer = tokenizer_of(source)
    given = _checked(texts)
    side = getattr(tokenizer, "padding_side", "right") if padding_side is None else padding_side
    if side not in _SIDES:
        raise ValueError(f"padding_side is {side!r}; it is {' or '.join(_SIDES)}")
    start = beginning(source, tokenizer, given["prompts"][0], prepend_bos)
    rows = {name: _rows(tokenizer, name, given[name]) for name in _PROMPTS if name in given}
    full = {name: [row if row[:1] == start else start + row for row in some] for name, some in rows.items()}
    _check_lengths(full, given, *length_limit(source, tokenizer, max_length))
    ids = {name: _answers(tokenizer, name, given, rows) for name in given if name not in rows}
    _check_answers(given, ids)
    width = max(map(len, full["prompts"]))
    fill = filler(source, tokenizer)

    def labelled(answers: list[int]) -> Int[Tensor, "n pos"]:
        labels = [[NO_LABEL] * (len(row) - 1) + [answer] for row, answer in zip(full["prompts"], answers, strict=True)]
        return padded(labels, width, side, NO_LABEL)

    mask = padded([[1] * len(row) for row in full["prompts"]], width, side, 0).bool()
    other, wrong = full.get("counterfactual_prompts"), ids.get("counterfactual_answers", ids.get("wrong_answers"))
    return {
        "tokens": padded(full["prompts"], width, side, fill),
        "labels": labelled(ids["answers"]),
        "attention_mask": None if bool(mask.all()) else mask,
        "counterfactual_tokens": None if other is None else padded(other, width, side, fill),
        "counterfactual_labels": None if wrong is None else labelled(wrong),
        "choices": torch.tensor(ids["choices"]) if "choices" in ids else None,
    }


def column(dataset: Any, argument: str, name: str | None) -> list[str] | None:
    """The texts in a column of a ``datasets.Dataset``; ``None`` where no name is given."""
    names = getattr(dataset, "column_names", None)
    if isinstance(names, Mapping):
        raise ValueError(f"dataset has the splits {', '.join(names)}: give one, dataset[{next(iter(names))!r}]")
    if not isinstance(names, list) or not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset is of type {type(dataset).__name__}: give a datasets.Dataset")
    if name is None:
        return None
    if name not in names:
        raise ValueError(f"dataset has no column {name!r}: its columns are {', '.join(names)}; name one by {argument}=")
    return list(dataset.with_format(None)[name])


def tokenizer_of(source: Any) -> Any:
    """The tokenizer that ``source`` is, or has."""
    found = source if hasattr(source, "convert_ids_to_tokens") else getattr(source, "tokenizer", None)
    if found is None or not hasattr(found, "convert_ids_to_tokens"):
        raise ValueError(
            f"tokenizer_or_model is of type {type(source).__name__}, which has no tokenizer: give a Hugging Face "
            "tokenizer (PreTrainedTokenizerFast(tokenizer_object=...) wraps one of the tokenizers package)"
        )
    return found


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text with the space before it, which tokenizers like Llama 2's drop where it is decoded alone."""
    raw = tokenizer.convert_ids_to_tokens(token)
    marked = isinstance(raw, str) and raw.startswith("▁")
    return raw.replace("▁", " ") if marked else tokenizer.decode([token])


def _checked(texts: Mapping[str, Sequence[str] | None]) -> dict[str, list[str]]:
    """The lists that are given, as lists of as many texts as there are prompts."""
    for name, some in texts.items():
        if isinstance(some, str):
            raise ValueError(f"{name} is one text, {some!r}: give a list of texts")
    given = {name: list(some) for name, some in texts.items() if some is not None}
    n = len(given["prompts"])
    if n == 0:
        raise ValueError("prompts is empty: give at least one")
    for name, some in given.items():
        if name != "choices" and len(some) != n:
            raise ValueError(f"{name} has {len(some)} texts for {n} prompts: give one for each")
        for i, text in enumerate(some):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] is {text!r}: it must be text")
    if "counterfactual_answers" in given and "counterfactual_prompts" not in given:
        raise ValueError("counterfactual_answers needs counterfactual_prompts; without them give wrong_answers")
    if "counterfactual_answers" in given and "wrong_answers" in given:
        raise ValueError("wrong_answers and counterfactual_answers are both counterfactual_labels: give one of them")
    return given


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _rows(tokenizer: Any, name: str, prompts: list[str]) -> list[list[int]]:
    rows = _ids(tokenizer, prompts)
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"{name}[{i}] is {prompts[i]!r}, which has no token: give some text")
    return rows


def beginning(source: Any, tokenizer: Any, prompt: str, prepend_bos: bool | None) -> list[int]:
    """What goes before every prompt: the beginning-of-sequence token, or nothing."""
    bos: int | None = tokenizer.bos_token_id
    usable = bos is not None and tokenizer.convert_ids_to_tokens(bos) == tokenizer.bos_token
    if prepend_bos and not usable:
        raise ValueError("prepend_bos is True, and the tokenizer has no beginning-of-sequence token: give False")
    if bos is None or not usable:
        return []
    if prepend_bos is None:  # the model's custom, as model.to_tokens has it; else the tokenizer's own
        custom = getattr(getattr(source, "cfg", None), "default_prepend_bos", None)
        prepend_bos = tokenizer(prompt, verbose=False)["input_ids"][:1] == [bos] if custom is None else bool(custom)
    return [int(bos)] if prepend_bos else []


def length_limit(source: Any, tokenizer: Any, max_length: int | None) -> tuple[int, str]:
    """How many tokens a prompt may have, and what says so."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1")
    limits = {"max_length": max_length, "the model's context": getattr(getattr(source, "cfg", None), "n_ctx", None)}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    known = known or {"the tokenizer's model_max_length": getattr(tokenizer, "model_max_length", 10**30)}
    name = min(known, key=lambda name: known[name])
    return int(known[name]), name


def _check_lengths(
    full: Mapping[str, list[list[int]]], given: Mapping[str, list[str]], limit: int, limited_by: str
) -> None:
    for name, rows in full.items():
        for i, row in enumerate(rows):
            if len(row) > limit:
                raise ValueError(
                    f"{name}[{i}] has {len(row)} tokens, {limited_by} is {limit}: shorten it ({_short(given[name][i])})"
                )
    for i, (row, other) in enumerate(zip(full["prompts"], full.get("counterfactual_prompts", ()), strict=False)):
        if len(row) != len(other):
            pair = f"{_short(given['prompts'][i])} and {_short(given['counterfactual_prompts'][i])}"
            raise ValueError(
                f"counterfactual_prompts[{i}] has {len(other)} tokens and prompts[{i}] {len(row)}, so that positions "
                f"would not match: give a pair of one length ({pair})"
            )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")


def _answers(
    tokenizer: Any, name: str, given: Mapping[str, list[str]], rows: Mapping[str, list[list[int]]]
) -> list[int]:
    """The token of each word of a list: what it adds to its prompt (a choice: to the first prompt)."""
    words, side = given[name], "counterfactual_prompts" if name == "counterfactual_answers" else "prompts"
    prompts = given[side][:1] * len(words) if name == "choices" else given[side]
    before = rows[side][:1] * len(words) if name == "choices" else rows[side]
    joined = _ids(tokenizer, [prompt + word for prompt, word in zip(prompts, words, strict=True)])
    found: list[int] = []
    for i, (word, prompt, row, ids) in enumerate(zip(words, prompts, before, joined, strict=True)):
        token = _next(row, ids)
        token = _next_word(tokenizer, prompt, row, word) if token is None else token
        if token is None:
            raise ValueError(f"{name}[{i}] is {word!r}, {_why(tokenizer, prompt, row, word, ids)}")
        if token == tokenizer.unk_token_id and word.strip() != tokenizer.unk_token:
            raise ValueError(
                f"{name}[{i}] is {word!r}, which the tokenizer does not know (it becomes {tokenizer.unk_token!r}): "
                "take another word"
            )
        found.append(token)
    return found


def _next(row: list[int], ids: list[int]) -> int | None:
    """The one token by which ``ids`` is longer than ``row``."""
    return ids[-1] if ids[:-1] == row else None


def _next_word(tokenizer: Any, prompt: str, row: list[int], word: str) -> int | None:
    """The same for the next word, where the tokenizer drops the space before it: the word is then a token by itself."""
    alone, ended, apart = _ids(tokenizer, [word, f"{prompt} ", f"{prompt} {word}"])
    return alone[0] if len(alone) == 1 and ended == row and apart == row + alone else None


def _why(tokenizer: Any, prompt: str, row: list[int], word: str, ids: list[int]) -> str:
    """Why a word is no answer, its pieces, and the mend."""
    apart = ids[: len(row)] == row
    pieces = tokenizer.convert_ids_to_tokens(ids[len(row) :] if apart else ids[-4:])
    what = f"which is {len(pieces)} tokens, {pieces}" if apart else f"which changes the end of its prompt, to {pieces}"
    bare = prompt.rstrip()
    with_space = f" {word.lstrip()}"
    [shorter, longer] = _ids(tokenizer, [bare or prompt, f"{bare}{with_space}"])
    if not word.strip() or _next(shorter, longer) is None:
        return f"{what}: an answer is one token, take another word"
    where = "" if bare == prompt else " and take it from the end of the prompt"
    return f"{what}: an answer is one token, begin it with the space{where} ({with_space!r})"


def _check_answers(given: Mapping[str, list[str]], ids: Mapping[str, list[int]]) -> None:
    for name in ("answers", "wrong_answers", "counterfactual_answers"):
        for i, token in enumerate(ids.get(name, ())):
            if "choices" in ids and token not in ids["choices"]:
                raise ValueError(f"{name}[{i}] is {given[name][i]!r}, which is not among choices: add it to them")
            if name == "wrong_answers" and token == ids["answers"][i]:
                raise ValueError(f"wrong_answers[{i}] is {given[name][i]!r}, the right answer: give another one")


def filler(source: Any, tokenizer: Any) -> int:
    """What stands where there is no input: masked, so that any token that the model has will do."""
    size = getattr(getattr(source, "cfg", None), "d_vocab", None) or 10**30
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((token for token in special if token is not None and token < size), 0)


def padded(rows: list[list[int]], width: int, side: str, fill: int) -> Int[Tensor, "n pos"]:
    gaps = [[fill] * (width - len(row)) for row in rows]
    parts = [gap + row if side == "left" else row + gap for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(parts, dtype=torch.long)


def adds_beginning(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("the", verbose=False)["input_ids"][:1] == [bos]
