"""Answers as people write them down, words or token ids, as the tokens that come next after each prompt.

The rules are those of :meth:`Examples.from_prompts`, for a list at a time: what is no answer is said with a reason
instead of an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Answer = str | int | None
"""A word as it follows the prompt, a token id, or nothing."""


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used: a ``reason`` that many rows share, and what it is in this one."""

    reason: str
    detail: str


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without special ones: one call for all."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def following(
    tokenizer: Any,
    what: str,
    prompts: Sequence[str],
    answers: Sequence[Answer],
    vocabulary: int,
    *,
    several: bool = False,
) -> list[list[int] | Problem]:
    """The token (with ``several`` the tokens) by which each answer follows its prompt, or what is wrong with it.
    ``what`` names it in reasons. Five calls of the tokenizer, whatever the number of rows."""
    found: list[list[int] | Problem] = [Problem(f"no {what}", f"{what} is empty")] * len(answers)
    words: list[int] = []
    for i, answer in enumerate(answers):
        if isinstance(answer, str):
            words.append(i)
        elif answer is not None:
            detail = f"{what} is {answer}, the vocabulary has {vocabulary:,} tokens"
            known = 0 <= answer < vocabulary
            found[i] = [answer] if known else Problem(f"{what} is no token id of the model", detail)
    texts = [(prompts[i], str(answers[i])) for i in words]
    once = list(dict.fromkeys(prompt for prompt, _ in texts))
    of = dict(zip(once, ids_of(tokenizer, once), strict=True))
    joined = ids_of(tokenizer, [prompt + word for prompt, word in texts])
    left: list[int] = []
    for place, (i, (prompt, _), ids) in enumerate(zip(words, texts, joined, strict=True)):
        row = of[prompt]
        if ids[: len(row)] == row and (len(ids) > len(row) if several else len(ids) == len(row) + 1):
            found[i] = ids[len(row) :]
        else:
            left.append(place)
    some = [(words[place], *texts[place], of[texts[place][0]], joined[place]) for place in left]
    alone = ids_of(tokenizer, [word for _, _, word, _, _ in some])
    ended = ids_of(tokenizer, [f"{prompt} " for _, prompt, _, _, _ in some])
    apart = ids_of(tokenizer, [f"{prompt} {word.lstrip()}" for _, prompt, word, _, _ in some])
    for (i, _, word, row, ids), one, end, spaced in zip(some, alone, ended, apart, strict=True):
        if (several or len(one) == 1) and end == row and one and spaced == row + one:  # a tokenizer that drops spaces
            found[i] = one
        else:
            found[i] = _problem(tokenizer, what, word, row, ids, spaced)
    unknown = getattr(tokenizer, "unk_token_id", None)
    for i, (_, word) in zip(words, texts, strict=True):
        tokens = found[i]
        if (
            unknown is not None
            and isinstance(tokens, list)
            and unknown in tokens
            and word.strip() != tokenizer.unk_token
        ):
            detail = f"{what} is {word!r}, which becomes {tokenizer.unk_token!r}"
            found[i] = Problem(f"{what} is a word that the tokenizer does not know", detail)
    return found


def _problem(tokenizer: Any, what: str, word: str, row: list[int], ids: list[int], spaced: list[int]) -> Problem:
    longer = ids[: len(row)] == row
    pieces = tokenizer.convert_ids_to_tokens(ids[len(row) :] if longer else ids[-4:])
    mend = "" if spaced[:-1] != row else "; after a space it is one: answer_prefix=' '"
    if longer:
        reason = f"{what} of {'several' if pieces else 'no'} tokens"
        return Problem(reason, f"{what} is {word!r}, {len(pieces)} tokens, {pieces}{mend}")
    return Problem(f"{what} changes its prompt's last token", f"{what} is {word!r}, so that it ends in {pieces}{mend}")
