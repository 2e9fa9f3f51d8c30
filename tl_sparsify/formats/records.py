"""Examples from files and tables as people have them: which rows can be used, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch

from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.formats.answers import Answer, Problem, following, ids_of
from tl_sparsify.formats.rows import Row, columns, has, read_rows, value

AUTO = "auto"
_USUAL = {
    "prompt": ("prompt", "clean"),
    "answer": ("answer", "answers", "correct_idx"),
    "wrong_answer": ("wrong_answer", "wrong_answers", "incorrect_idx"),
    "counterfactual_prompt": ("counterfactual_prompt", "corrupted", "corrupt"),
}
_IDS = ("_idx", "_id", "_ids", "_token_id")
_SPECIAL = ("eos_token", "bos_token", "sep_token", "pad_token", "unk_token")


@dataclass(frozen=True, eq=False)
class LoadedExamples:
    """What :func:`load_examples` made of a source.

    Attributes:
        examples: of the rows that can be used.
        rows: their numbers in the source, from 0.
        dropped: the others: ``row, reason, detail``.
        notes: what was decided on the way (which of several right answers is the label).

    Example:
        >>> rows = [{"clean": "David gave a ring to", "answers": [" Alan", " David"]}]
        >>> loaded = tls.load_examples(tls.load_task("ioi").model(), rows)
        >>> loaded.examples, loaded.notes
        (Examples(1 of shape (6,), 1 answers), ('1 rows have several right answers: the first is the label',))
    """

    examples: Examples
    rows: tuple[int, ...]
    dropped: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason, the most frequent first."""
        return {str(reason): int(n) for reason, n in self.dropped["reason"].value_counts().items()}

    def __repr__(self) -> str:
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.reasons.items())
        total = len(self.rows) + len(self.dropped)
        return f"LoadedExamples({len(self.rows):,} of {total:,} rows{f'; dropped: {why}' if why else ''})"


@dataclass(frozen=True)
class _Table:
    """The columns of a source, a value for each row."""

    prompts: list[Any]
    answers: list[Answer]
    wrong: list[Answer] | None
    others: list[Any] | None
    several: int


def load_examples(
    tokenizer_or_model: Any,
    source: Any,
    *,
    prompt: str = AUTO,
    answer: str = AUTO,
    wrong_answer: str | None = AUTO,
    counterfactual_prompt: str | None = AUTO,
    choices: str | Sequence[str] | None = None,
    answers_as: Literal["auto", "text", "ids"] = "auto",
    answer_prefix: str = "",
    unusable: Literal["refuse", "drop"] = "refuse",
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> LoadedExamples:
    """Examples from a file or table, a row each, as :meth:`Examples.from_prompts` makes them of lists.

    An answer may be a word, a token id, a list of right ones (the first is the label, and ``notes`` say so), or a list
    of pairs ``[(right, wrong), ...]``, of which the first counts. Of several wrong ones the first counts too.

    Args:
        tokenizer_or_model: a Hugging Face tokenizer, or a model that has one.
        source: a path to a ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` or ``.parquet`` file, a pandas frame, a list of
            dictionaries or of pairs ``(prompt, answer)``, a dictionary with one list of rows, a data set (streaming
            ones are read to their end, or to ``limit``).
        prompt, answer, wrong_answer, counterfactual_prompt: columns, nested ones by dotted name
            (``symbol_counterfactual.prompt``). ``auto``: by the names that they often have (``prompt`` or ``clean``;
            ``answer``, ``answers`` or ``correct_idx``; ``wrong_answer``, ``wrong_answers`` or ``incorrect_idx``;
            ``counterfactual_prompt``, ``corrupted`` or ``corrupt``). ``None``: there is none.
        choices: the answer vocabulary, or the column that lists each row's choices; whole numbers as answers are then
            places in that list, from 0.
        answers_as: what numbers are: ``ids`` of tokens or ``text``; ``auto``: ids in columns whose name ends in
            ``_idx``, ``_id`` or ``_ids``, and else text. Whole numbers in another column are refused until it is said.
        answer_prefix: goes before each answer and choice that is text: ``" "`` where a file leaves the space out.
        unusable: what is done with rows that cannot be used: ``refuse`` them all in one error, or ``drop`` them.
        prepend_bos, padding_side, max_length: as in :meth:`Examples.from_prompts`.
        limit: at most so many rows are read.

    Returns:
        Examples of the usable rows, in their order; the others with their reasons. No model pass.

    Raises:
        FileNotFoundError: no such file.
        ValueError: rows that cannot be used, how many for which reason and the first of each: a prompt or answer that
            is empty, a prompt longer than the context, an answer of several tokens, unknown or not among ``choices``,
            a wrong answer that is the right one, a counterfactual prompt of another length. With ``drop`` only where
            none is left. Also a column that there is not, or two that may be meant, and a choice of several tokens.

    Example:
        >>> rows = [("David gave a ring to", " Alan"), ("", " Alan"), ("Alan gave a ring to", " David")]
        >>> tls.load_examples(tls.load_task("ioi").model(), rows, unusable="drop")
        LoadedExamples(2 of 3 rows; dropped: 1 no prompt)
    """
    if unusable not in ("refuse", "drop"):
        raise ValueError(f"unusable is {unusable!r}; it is refuse or drop")
    if answers_as not in ("auto", "text", "ids"):
        raise ValueError(f"answers_as is {answers_as!r}; it is auto, text or ids")
    tokenizer = _tokenizer(tokenizer_or_model)
    rows = read_rows(source, limit)
    given = {"prompt": prompt, "answer": answer, "wrong_answer": wrong_answer}
    named = _named(rows, given | {"counterfactual_prompt": counterfactual_prompt})
    listed = _listed(rows, choices)
    table = _table(rows, named, listed, answers_as, answer_prefix)
    settings: dict[str, Any] = {"prepend_bos": prepend_bos, "padding_side": padding_side, "max_length": max_length}
    vocabulary = int(getattr(getattr(tokenizer_or_model, "cfg", None), "d_vocab", 0) or len(tokenizer))

    problems = _prompt_problems(tokenizer_or_model, tokenizer, table, settings)
    fine = [i for i in range(len(rows)) if i not in problems]
    prompts = [table.prompts[i] for i in fine]
    options = None
    if choices is not None and fine:
        each = {fine[0]: list(choices)} if listed is None else {i: listed[i] or [] for i in fine}
        each = {i: [f"{answer_prefix}{word}" for word in some] for i, some in each.items()}
        options, wrong = _options(tokenizer, prompts[0], each, vocabulary)
        if wrong and listed is None:
            raise ValueError(f"choices has some that cannot be answers: {wrong[fine[0]].detail}")
        problems |= wrong
    labels: dict[str, dict[int, int]] = {}
    for name, some in [("answer", table.answers), ("wrong answer", table.wrong)]:
        if some is not None:
            tokens = following(tokenizer, name, prompts, [some[i] for i in fine], vocabulary)
            labels[name] = {i: token for i, token in zip(fine, tokens, strict=True) if isinstance(token, int)}
            for i, token in zip(fine, tokens, strict=True):
                if (problem := _answer_problem(name, some[i], token, options)) is not None:
                    problems.setdefault(i, problem)
    for i, token in labels.get("wrong answer", {}).items():
        if token == labels["answer"].get(i):
            detail = f"wrong answer is {(table.wrong or [])[i]!r}, and so is the answer"
            problems.setdefault(i, Problem("wrong answer is the right one", detail))

    dropped = pd.DataFrame(
        [(i, problems[i].reason, problems[i].detail) for i in sorted(problems)], columns=["row", "reason", "detail"]
    )
    kept = [i for i in range(len(rows)) if i not in problems]
    if not kept or (problems and unusable == "refuse"):
        raise ValueError(_refusal(dropped, len(rows), bool(kept)))
    examples = _made(tokenizer_or_model, tokenizer, table, kept, labels, options, settings)
    notes = [f"{table.several:,} rows have several right answers: the first is the label"] if table.several else []
    return LoadedExamples(examples, tuple(kept), dropped, tuple(notes))


def _tokenizer(source: Any) -> Any:
    found = source if hasattr(source, "convert_ids_to_tokens") else getattr(source, "tokenizer", None)
    if not hasattr(found, "convert_ids_to_tokens"):
        raise ValueError(
            f"tokenizer_or_model is of type {type(source).__name__}, which has no tokenizer: give a Hugging Face "
            "tokenizer or a model that has one"
        )
    return found


def _named(rows: list[Row], given: Mapping[str, str | None]) -> dict[str, str | None]:
    """The column of each argument; ``None``: there is none."""
    found: dict[str, str | None] = {}
    for argument, name in given.items():
        usual = [one for one in _USUAL[argument] if has(rows, one)] if name == AUTO else []
        if len(usual) > 1:
            raise ValueError(f"source has the columns {' and '.join(usual)}: say which is meant by {argument}=")
        found[argument] = (usual[0] if usual else None) if name == AUTO else name
        needed = argument in ("prompt", "answer")
        if (found[argument] is None and needed) or (name not in (AUTO, None) and not has(rows, str(name))):
            what = f"has no column {name!r}" if name not in (AUTO, None) else f"has no usual name for {argument}"
            raise ValueError(f"source {what}: its columns are {', '.join(columns(rows))}; name one by {argument}=")
    return found


def _listed(rows: list[Row], choices: str | Sequence[str] | None) -> list[list[Any] | None] | None:
    """Each row's choices, where they are a column."""
    if not isinstance(choices, str):
        return None
    found = [value(row, choices) for row in rows]
    if not any(isinstance(some, list | tuple) for some in found):
        raise ValueError(f"choices is {choices!r}, which is no column of lists: columns are {', '.join(columns(rows))}")
    return [list(some) if isinstance(some, list | tuple) else None for some in found]


def _table(
    rows: list[Row], named: Mapping[str, str | None], listed: list[Any] | None, answers_as: str, prefix: str
) -> _Table:
    def read(argument: str) -> list[Any] | None:
        name = named[argument]
        return None if name is None else [value(row, name) for row in rows]

    right, paired, several = [], [], 0
    for entry in read("answer") or []:
        first, against, more = _first(entry)
        several += more
        right.append(first)
        paired.append(against)
    wrong = read("wrong_answer")
    wrong = [_first(entry)[0] for entry in wrong] if wrong is not None else paired
    name = named["wrong_answer"] or named["answer"]
    of_right = (str(named["answer"]), answers_as, prefix)
    return _Table(
        prompts=read("prompt") or [],
        answers=_typed(right, listed, *of_right),
        wrong=_typed(wrong, listed, str(name), answers_as, prefix) if any(one is not None for one in wrong) else None,
        others=read("counterfactual_prompt"),
        several=several,
    )


def _first(entry: Any) -> tuple[Any, Any, bool]:
    """The first right answer, what it is held against where it comes as a pair, and whether there are more."""
    if isinstance(entry, tuple) and len(entry) == 2:
        return entry[0], entry[1], False
    if isinstance(entry, list | tuple):
        if not entry:
            return None, None, False
        pair = entry[0]
        first, against = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (pair, None)
        return first, against, len(entry) > 1
    return entry, None, False


def _typed(some: list[Any], listed: list[Any] | None, name: str, answers_as: str, prefix: str) -> list[Answer]:
    """Answers as words or token ids."""
    as_ids = answers_as == "ids" or (answers_as == "auto" and name.rsplit(".", 1)[-1].endswith(_IDS))
    found: list[Answer] = []
    for i, one in enumerate(some):
        whole = not isinstance(one, bool) and (isinstance(one, int) or (isinstance(one, float) and one.is_integer()))
        if one is None or one == "":
            found.append(None)
        elif as_ids:
            if not whole and not (isinstance(one, str) and one.strip().isdecimal()):
                raise ValueError(f"{name} of row {i} is {one!r}, which is no token id: say answers_as='text'")
            found.append(int(one))
        elif whole and listed is not None and answers_as == "auto":
            here = listed[i] or []
            found.append(f"{prefix}{here[int(one)]}" if 0 <= one < len(here) else None)
        elif isinstance(one, int | float) and answers_as == "auto":
            raise ValueError(f"{name} of row {i} is the number {one}: say answers_as='ids' (of tokens) or 'text'")
        else:
            found.append(f"{prefix}{one}")
    return found


def _prompt_problems(source: Any, tokenizer: Any, table: _Table, settings: Mapping[str, Any]) -> dict[int, Problem]:
    """What is wrong with prompts and pairs, by row."""
    found: dict[int, Problem] = {}
    lengths: list[dict[int, int]] = []
    most = _limit(source, tokenizer, settings["max_length"])
    start = _start(source, tokenizer, table.prompts, most, settings)
    for what, texts in [("prompt", table.prompts), ("counterfactual prompt", table.others or [])]:
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
        if lengths[0].get(i, n) != n:
            detail = f"{lengths[0][i]} tokens in the prompt, {n} in the counterfactual prompt"
            found.setdefault(i, Problem("a pair of other length", detail))
    return found


def _start(source: Any, tokenizer: Any, prompts: Sequence[Any], most: int, settings: Mapping[str, Any]) -> list[int]:
    """What goes before every prompt, as :meth:`Examples.from_prompts` decides it, seen on a short one."""
    text = min((one for one in prompts if isinstance(one, str) and one), key=len, default="")
    [row] = ids_of(tokenizer, [text]) if text else [[]]
    stands = _stand_in(tokenizer, [text]) if 0 < len(row) < most else None
    if stands is None or row[:1] == [tokenizer.bos_token_id]:
        return []
    seen = Examples.from_prompts(source, [text], [stands], prepend_bos=settings["prepend_bos"])
    return seen.tokens[0, : seen.tokens.shape[1] - len(row)].tolist()


def _stand_in(tokenizer: Any, prompts: Sequence[str]) -> str | None:
    """A special token that may follow every prompt as one token: what stands for answers that are token ids."""
    rows = ids_of(tokenizer, prompts)
    for name in _SPECIAL:
        token = getattr(tokenizer, name, None)
        if token is None:
            continue
        number = tokenizer.convert_tokens_to_ids(token)
        joined = ids_of(tokenizer, [prompt + token for prompt in prompts])
        if all(ids == [*row, number] for ids, row in zip(joined, rows, strict=True)):
            return str(token)
    return None


def _limit(source: Any, tokenizer: Any, max_length: int | None) -> int:
    context = getattr(getattr(source, "cfg", None), "n_ctx", None)
    known = [limit for limit in (max_length, context) if limit is not None]
    return int(min(known)) if known else int(getattr(tokenizer, "model_max_length", 10**30))


def _options(
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
    return list(dict.fromkeys(token for token in usable if isinstance(token, int))), wrong


def _answer_problem(what: str, given: Answer, token: int | Problem, options: list[int] | None) -> Problem | None:
    if isinstance(token, Problem):
        return token
    if options is not None and token not in options:
        return Problem(f"{what} not among choices", f"{what} is {given!r}")
    return None


def _refusal(dropped: pd.DataFrame, total: int, some: bool) -> str:
    """Everything that is wrong with a source, in one message."""
    lines = []
    for reason, n in dropped["reason"].value_counts().items():
        first = dropped[dropped["reason"] == reason].iloc[0]
        lines.append(f"  {n:,}: {reason} (first: row {first['row']}, {first['detail']})")
    mend = "unusable='drop' leaves them out" if some else "no row can be used"
    return f"source has {len(dropped):,} rows of {total:,} that cannot be used; {mend}:\n" + "\n".join(lines)


def _made(
    source: Any,
    tokenizer: Any,
    table: _Table,
    kept: list[int],
    labels: Mapping[str, Mapping[int, int]],
    options: list[int] | None,
    settings: Mapping[str, Any],
) -> Examples:
    prompts = [table.prompts[i] for i in kept]
    words = [table.answers[i] for i in kept]
    if not all(isinstance(word, str) for word in words):
        stands = _stand_in(tokenizer, prompts)
        if stands is None:
            raise ValueError(
                "answer holds token ids, and no special token of the tokenizer can stand for them: give words"
            )
        words = [stands] * len(kept)
    others = None if table.others is None else [table.others[i] for i in kept]
    made = Examples.from_prompts(source, prompts, words, counterfactual_prompts=others, **settings)  # type: ignore

    def placed(name: str) -> torch.Tensor:
        tokens = torch.tensor([labels[name][i] for i in kept])
        return torch.where(made.labels == NO_LABEL, NO_LABEL, tokens[:, None])

    return replace(
        made,
        labels=placed("answer"),
        counterfactual_labels=placed("wrong answer") if "wrong answer" in labels else None,
        choices=None if options is None else torch.tensor(options),
    )
