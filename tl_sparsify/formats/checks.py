"""Checks: which rows of a source cannot be examples, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tl_sparsify.core.prompts import beginning, length_limit
from tl_sparsify.formats.answers import Answer, Problem, following, ids_of
from tl_sparsify.formats.columns import Table

Answers = dict[int, list[list[int]]]
"""For each row the tokens of each of its answers."""


@dataclass(frozen=True)
class Lengths:
    """How many tokens a row may have, and how many its longer prompt has, by row, with what goes before it."""

    most: int
    prompts: dict[int, int]


def prompt_problems(
    source: Any, tokenizer: Any, said: Table, any_pair: bool, settings: Mapping[str, Any]
) -> tuple[dict[int, Problem], Lengths]:
    """What is wrong with prompts and pairs, by row, and their lengths."""
    found: dict[int, Problem] = {}
    lengths: list[dict[int, int]] = []
    most, _ = length_limit(source, tokenizer, settings["max_length"])
    first = next((text for text in said.prompts if isinstance(text, str) and text), "")
    start = beginning(source, tokenizer, first, settings["prepend_bos"])
    for what, texts in [("prompt", said.prompts), ("counterfactual prompt", said.others or [])]:
        given = [i for i, text in enumerate(texts) if isinstance(text, str)]
        rows = dict(zip(given, ids_of(tokenizer, [texts[i] for i in given]), strict=True))
        for i, text in enumerate(texts):
            if not rows.get(i):
                found.setdefault(i, Problem(f"no {what}", f"{what} is {text!r}"))
        lengths.append({i: len(row) + (0 if row[:1] == start else len(start)) for i, row in rows.items()})
        for i, n in lengths[-1].items():
            if n > most:
                found.setdefault(i, Problem(f"{what} longer than the context", f"{n} tokens, at most {most}"))
    for i, n in lengths[1].items():
        if not any_pair and lengths[0].get(i, n) != n:
            detail = f"{lengths[0][i]} tokens in the prompt, {n} in the counterfactual prompt"
            found.setdefault(i, Problem("a pair of other length", detail))
    longer = {i: max(n, lengths[1].get(i, 0)) for i, n in lengths[0].items()}
    return found, Lengths(most, longer)


def answer_problems(lengths: Lengths, answers: Answers) -> dict[int, Problem]:
    """Rows whose prompt, or counterfactual prompt, is too long with the tokens of the answer that follow it: all but
    the last."""
    found: dict[int, Problem] = {}
    for i, some in answers.items():
        n = lengths.prompts[i] + len(some[0]) - 1 if some else 0
        if n > lengths.most:
            detail = f"{n} tokens with all of the answer but its last token, at most {lengths.most}"
            found[i] = Problem("prompt and answer longer than the context", detail)
    return found


def option_tokens(
    tokenizer: Any, prompt: str, each: Mapping[int, list[str]], vocabulary: int
) -> tuple[list[int], dict[int, Problem]]:
    """The tokens of all choices after a prompt, and the rows with a choice that is none."""
    words = list(dict.fromkeys(word for some in each.values() for word in some))
    found = following(tokenizer, "choice", [prompt] * len(words), words, vocabulary)
    tokens = dict(zip(words, found, strict=True))
    wrong: dict[int, Problem] = {}
    for i, some in each.items():
        bad = [token for word in some if isinstance(token := tokens[word], Problem)]
        if bad:
            wrong[i] = Problem(bad[0].reason, "; ".join(problem.detail for problem in bad))
    usable = [tokens[word] for i, some in each.items() if i not in wrong for word in some]
    return list(dict.fromkeys(token for some in usable if isinstance(some, list) for token in some)), wrong


def answer_tokens(
    tokenizer: Any,
    what: str,
    prompts: list[Any],
    answers: Mapping[int, list[Answer]],
    vocabulary: int,
    options: list[int] | None,
    several: bool,
) -> tuple[Answers, dict[int, Problem]]:
    """The tokens of every answer to some rows' prompts, and the rows with one that is none."""
    asked = [(i, answer) for i, some in answers.items() for answer in some]
    each = following(
        tokenizer, what, [prompts[i] for i, _ in asked], [a for _, a in asked], vocabulary, several=several
    )
    found: Answers = {i: [] for i in answers}
    wrong: dict[int, Problem] = {}
    for (i, answer), tokens in zip(asked, each, strict=True):
        if isinstance(tokens, Problem):
            wrong.setdefault(i, tokens)
        elif options is not None and tokens[0] not in options:
            wrong.setdefault(i, Problem(f"{what} not among choices", f"{what} is {answer!r}"))
        else:
            found[i].append(tokens)
    return found, wrong


def clashes(found: Mapping[str, Answers], said: Table, several: bool) -> dict[int, Problem]:
    """Rows whose wrong answer is a right one, or with ``several`` has another number of tokens."""
    problems: dict[int, Problem] = {}
    right = found["answer"]
    for i, some in found.get("wrong answer", {}).items():
        both = [tokens for tokens in some if tokens in right[i]]
        given = (said.wrong or [])[i]
        if both and len(given) == 1:
            problems[i] = Problem(
                "wrong answer is the right one", f"wrong answer is {given[0]!r}, and so is the answer"
            )
        elif both:
            problems[i] = Problem(
                "wrong answer is the right one", f"wrong answers are {given}, answers {said.answers[i]}"
            )
        elif several and some and right[i] and len(some[0]) != len(right[i][0]):
            detail = f"{len(right[i][0])} tokens in the answer, {len(some[0])} in the wrong answer"
            problems[i] = Problem("wrong answer of another number of tokens", detail)
    return problems
