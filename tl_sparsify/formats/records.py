"""Examples from files and tables as people have them: which rows can be used, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import tokenizer_of
from tl_sparsify.formats import checks
from tl_sparsify.formats.answers import Problem
from tl_sparsify.formats.assembly import Usable, assembled
from tl_sparsify.formats.columns import AUTO, listed_choices, named_columns, table
from tl_sparsify.formats.rows import columns, has, read_rows, value, whole
from tl_sparsify.formats.spans import Span, token_spans


class NoUsableRow(ValueError):
    """No row of a source can be used."""


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


@checked
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
    answer_tokens: Literal["one", "several"] = "one",
    spans: str | Mapping[str, str] | None = None,
    pairs: Literal["equal", "any"] = "equal",
    left_out: str | None = None,
    unusable: Literal["refuse", "drop"] = "refuse",
    prepend_bos: bool | None = None,
    padding_side: Literal["left", "right"] | None = None,
    max_length: int | None = None,
    limit: int | None = None,
) -> LoadedExamples:
    """Examples from a file or table, a row each, as :meth:`Examples.from_prompts` makes them of lists.

    An answer may be a word, a token id, a list of right ones, or a list of pairs ``[(right, wrong), ...]``. The first
    is the label (``notes`` say so), and all of them are ``right_answers`` and ``wrong_answers``, of which
    :mod:`metrics` take sums and means: a list of all later years says "any later year".

    Args:
        tokenizer_or_model: a Hugging Face tokenizer, or a model that has one.
        source: a path to a ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` or ``.parquet`` file, a pandas frame, a list of
            dictionaries or of pairs ``(prompt, answer)``, a dictionary with one list of rows, a data set (streaming
            ones are read to their end, or to ``limit``).
        prompt, answer, wrong_answer, counterfactual_prompt: columns, nested ones by dotted name
            (``symbol_counterfactual.prompt``). ``auto``: by the names that they often have (``prompt`` or ``clean``;
            ``answer``, ``answers`` or ``correct_idx``; ``wrong_answer``, ``wrong_answers`` or ``incorrect_idx``;
            ``counterfactual_prompt``, ``corrupted`` or ``corrupt``). ``None``: there is none, and no wrong answer from
            pairs either.
        choices: the answer vocabulary, or the column that lists each row's choices; whole numbers as answers are then
            places in that list, from 0.
        answers_as: what numbers are: ``ids`` of tokens or ``text``; ``auto``: ids in columns whose name ends in
            ``_idx``, ``_id`` or ``_ids``, and else text. Whole numbers in another column are refused until it is said.
        answer_prefix: goes before each answer and choice that is text: ``" "`` where a file leaves the space out.
        answer_tokens: ``several``: an answer may be more than one token. Each is labelled at its position, behind those
            before it, and the answer is right only if all are; a wrong one needs as many. Only the first of several
            right answers counts then.
        spans: named parts of the prompt, for ``units.at("S1")``: the column that holds ``{"S1": (start, end), ...}`` in
            characters (JSON in a text file), or for each name the column that holds its ``(start, end)``. The tokens
            that it touches are found by the tokenizer; the counterfactual's are the same.
        pairs: ``any`` keeps counterfactual prompts of another length, for what only runs them; where a position takes
            its value from them, such rows are refused by number.
        left_out: a column that says why a row is not wanted. A row is wanted where the cell is empty, missing, NaN,
            false or zero (in a text file ``false`` or ``0``).
        unusable: what is done with rows that cannot be used: ``refuse`` them all in one error, or ``drop`` them.
        prepend_bos, padding_side, max_length: as in :meth:`Examples.from_prompts`.
        limit: at most so many rows are read.

    Returns:
        Examples of the usable rows, in their order; the others with their reasons. No model pass.

    Raises:
        FileNotFoundError: no such file.
        ValueError: rows that cannot be used, how many for which reason and the first of each: a prompt or answer that
            is empty, a prompt longer than the context (with the answer's tokens but the last), an answer of several
            tokens, unknown, no token id where it must be one or not among ``choices``, a wrong answer that is a right
            one, a counterfactual prompt of another length, a span that is missing or touches no token. With ``drop``
            only where none is left. Also a column that there is not, or two that may be meant, a table whose rows have
            more fields than its header, and a choice of several tokens.

    Example:
        >>> rows = [("David gave a ring to", " Alan"), ("", " Alan"), ("Alan gave a ring to", " David")]
        >>> tls.load_examples(tls.load_task("ioi").model(), rows, unusable="drop")
        LoadedExamples(2 of 3 rows; dropped: 1 no prompt)
    """
    if unusable not in ("refuse", "drop"):
        raise ValueError(f"unusable is {unusable!r}; it is refuse or drop")
    if answers_as not in ("auto", "text", "ids"):
        raise ValueError(f"answers_as is {answers_as!r}; it is auto, text or ids")
    if pairs not in ("equal", "any"):
        raise ValueError(f"pairs is {pairs!r}; it is equal or any")
    if answer_tokens not in ("one", "several") or (answer_tokens == "several" and choices is not None):
        beside = "" if choices is None else ", and choices are of one token"
        raise ValueError(f"answer_tokens is {answer_tokens!r}; it is one or several{beside}")
    if padding_side not in (None, "left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it is left or right")
    tokenizer = tokenizer_of(tokenizer_or_model)
    rows = read_rows(source, limit)
    given = {"prompt": prompt, "answer": answer, "wrong_answer": wrong_answer}
    named = named_columns(rows, given | {"counterfactual_prompt": counterfactual_prompt})
    if isinstance(spans, str) and not has(rows, spans):
        raise ValueError(f"spans is {spans!r}; source has no such column: its columns are {', '.join(columns(rows))}")
    if left_out is not None and not has(rows, left_out):
        raise ValueError(
            f"left_out is {left_out!r}; source has no such column: its columns are {', '.join(columns(rows))}"
        )
    listed = listed_choices(rows, choices)
    said = table(rows, named, listed, spans, answers_as, answer_prefix, paired=wrong_answer is not None)
    settings: dict[str, Any] = {"prepend_bos": prepend_bos, "padding_side": padding_side, "max_length": max_length}
    vocabulary = int(getattr(getattr(tokenizer_or_model, "cfg", None), "d_vocab", 0) or len(tokenizer))

    problems, lengths = checks.prompt_problems(tokenizer_or_model, tokenizer, said, pairs == "any", settings)
    problems = said.problems | problems
    if left_out is not None:
        reasons = {i: value(row, left_out) for i, row in enumerate(rows)}
        problems |= {i: Problem("left out", str(why)) for i, why in reasons.items() if not _is_wanted(why)}
    fine = [i for i in range(len(rows)) if i not in problems]
    prompts = [said.prompts[i] for i in fine]
    options = None
    if choices is not None and fine:
        each = {fine[0]: list(choices)} if listed is None else {i: listed[i] or [] for i in fine}
        each = {i: [f"{answer_prefix}{word}" for word in some] for i, some in each.items()}
        options, wrong = checks.option_tokens(tokenizer, prompts[0], each, vocabulary)
        if wrong and listed is None:
            raise ValueError(f"choices has some that cannot be answers: {wrong[fine[0]].detail}")
        problems |= wrong
    several = answer_tokens == "several"
    found: dict[str, dict[int, list[list[int]]]] = {}
    for name, some in [("answer", said.answers), ("wrong answer", said.wrong)]:
        if some is not None:
            mine = {i: some[i][:1] if several else some[i] for i in fine}
            found[name], wrong = checks.answer_tokens(tokenizer, name, said.prompts, mine, vocabulary, options, several)
            problems = wrong | problems
    problems = checks.clashes(found, said, several) | checks.answer_problems(lengths, found["answer"]) | problems
    placed: dict[int, dict[str, Span]] = {}
    if said.spans is not None:
        located = token_spans(tokenizer, prompts, [said.spans[i] for i in fine])
        placed = {i: where for i, where in zip(fine, located, strict=True) if not isinstance(where, Problem)}
        problems = {i: where for i, where in zip(fine, located, strict=True) if isinstance(where, Problem)} | problems

    dropped = pd.DataFrame(
        [(i, problems[i].reason, problems[i].detail) for i in sorted(problems)], columns=["row", "reason", "detail"]
    )
    kept = [i for i in range(len(rows)) if i not in problems]
    if not kept:
        raise NoUsableRow(_refusal(dropped, len(rows), False))
    if problems and unusable == "refuse":
        raise ValueError(_refusal(dropped, len(rows), True))
    usable = Usable(
        prompts=[said.prompts[i] for i in kept],
        others=None if said.others is None else [said.others[i] for i in kept],
        answers=[found["answer"][i] for i in kept],
        wrong=[found["wrong answer"][i] for i in kept] if "wrong answer" in found else None,
        spans=[placed[i] for i in kept] if placed else None,
    )
    examples = assembled(tokenizer_or_model, tokenizer, usable, options, settings)
    many = sum(len(said.answers[i]) > 1 for i in range(len(rows)))
    notes = [f"{many:,} rows have several right answers: the first is the label"] if many else []
    return LoadedExamples(examples, tuple(kept), dropped, tuple(notes))


def _is_wanted(cell: Any) -> bool:
    """Whether a cell that may say why a row is left out says nothing."""
    false = isinstance(cell, str) and cell.strip().lower() in ("", "false")  # as a text file has it
    return not cell or false or whole(cell) == 0


def _refusal(dropped: pd.DataFrame, total: int, some: bool) -> str:
    """Everything that is wrong with a source, in one message."""
    lines = []
    for reason, n in dropped["reason"].value_counts().items():
        first = dropped[dropped["reason"] == reason].iloc[0]
        lines.append(f"  {n:,}: {reason} (first: row {first['row']}, {first['detail']})")
    mend = "unusable='drop' leaves them out" if some else "no row can be used"
    return f"source has {len(dropped):,} rows of {total:,} that cannot be used; {mend}:\n" + "\n".join(lines)
