"""Text tasks: templates filled with words, for the tokenizer of whatever language model is asked.

Which words a task can use depends on the tokenizer. The rule: a word that is filled in must be one token with the space
before it, so that prompts of one template have one length and positions match; rows with another word are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, NamedSplit
from jaxtyping import Bool, Int, Shaped

from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.tasks.language_models import begins, load_language_model, load_sizes, load_tokenizer
from tl_sparsify.tasks.pairing import balanced_among, split_of
from tl_sparsify.tasks.task import Task
from tl_sparsify.tasks.tokenizers import (
    Rows,
    digit_by_digit,
    draw_rows,
    filled,
    prompts,
    row_keys,
    single_token_words,
    two_token_numbers,
)

__all__ = [
    "Counterfactual",
    "Rows",
    "Sentences",
    "TextTask",
    "digit_by_digit",
    "draw_rows",
    "filled",
    "load_language_model",
    "load_tokenizer",
    "prompts",
    "row_keys",
    "single_token_words",
    "two_token_numbers",
]

_ROWS = 2**14  # that a task's data are taken from, drawn once for ever
_CANDIDATES = 8192  # pairs that balanced ones are chosen among


Counterfactual = Callable[[Rows, Mapping[str, Sequence[str]], np.random.Generator], Rows]


@dataclass(frozen=True, eq=False)
class Sentences:
    """A text task, whatever the language model: what is said, and what the right answer is.

    Attributes:
        causal_model: the task's algorithm. Its inputs are ``sentence`` (the template, into which all words are filled
            but the other inputs) and columns of the rows.
        rows: ``rows(n, seed)``: at most ``n`` rows, each with a ``template`` and a word for each of its slots.
        slots: the words of each slot.
        outputs: the text of every value of the causal model's output, with the space before it.
        written: ``outputs`` as a tokenizer can read them, where that depends on it.
        key: a number for each row, which decides its split.
        cell: which cell each row is in; data are drawn evenly from the cells.
        counterfactuals: by the name of their kind, functions of rows, of the words of each slot that can be used, and
            of a generator, that give each row another one of as many tokens. The first kind is the usual one.
        held_against: for each row the output that its answer is held against; that of the counterfactual where not
            given.
        sources: as a counterfactual, which inputs are taken as sources; any other row of the split where not given.
        rivals: other causal models for whose variables pairs are balanced too.
        fits: what a tokenizer must be able to do with each row besides having the words of its slots.
        sizes: of the splits ``train``, ``validation`` and ``test``.

    Example:
        >>> fields = {"template": ["{name} drinks"], "name": ["Ann", "Tom"]}
        >>> drink = tls.CausalModel(
        ...     ("sentence", "name"), {"drink": lambda name: np.where(name == "Ann", "tea", "milk")}, "drink"
        ... )
        >>> sentences = tls.text.Sentences(
        ...     drink, rows=lambda n, seed: tls.text.draw_rows(fields, n, seed), slots={"name": fields["name"]},
        ...     outputs={"tea": " tea", "milk": " milk"},
        ...     key=lambda rows: tls.text.row_keys(rows, {"name": fields["name"]}),
        ...     cell=lambda rows: rows["name"], counterfactuals={},
        ... )
        >>> sentences.answers(sentences.rows(3, 0)).tolist()
        ['tea', 'milk', 'milk']
    """

    causal_model: CausalModel
    rows: Callable[[int, int], Rows]
    slots: Mapping[str, Sequence[str]]
    outputs: Mapping[Any, str]
    key: Callable[[Rows], Int[np.ndarray, "n"]]
    cell: Callable[[Rows], Shaped[np.ndarray, "n"]]
    counterfactuals: Mapping[str, Counterfactual]
    held_against: Callable[[Rows], Shaped[np.ndarray, "n"]] | None = None
    sources: Counterfactual | None = None
    rivals: Sequence[CausalModel] = ()
    fits: Callable[[Any, Rows], Bool[np.ndarray, "n"]] | None = None
    written: Callable[[Any], Mapping[Any, str]] | None = None
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 1024, "validation": 256, "test": 512})

    def inputs(self, rows: Rows) -> dict[str, Shaped[np.ndarray, "n"]]:
        """The causal model's inputs."""
        own = {name: rows[name] for name in self.causal_model.inputs if name != "sentence"}
        open_slots = {name: np.full(len(values), f"{{{name}}}") for name, values in own.items()}
        return {"sentence": np.array(filled(rows["template"].tolist(), {**rows, **open_slots}))} | own

    def answers(self, rows: Rows) -> Shaped[np.ndarray, "n"]:
        """The causal model's answers."""
        return self.causal_model.run(self.inputs(rows))[self.causal_model.output]


@dataclass(frozen=True, eq=False)
class TextTask:
    """The data of :class:`Sentences` for one language model.

    Attributes:
        sentences: the task.
        source: what :func:`load_language_model` takes.
        padding_side: ``left``, so that positions count from the end, or ``right``.
        prepend_bos: whether the beginning-of-sequence token goes first. Where not given as the tokenizer has it by
            itself; where its files are not at hand, wherever there is such a token, as ``model.to_tokens`` does for
            most models.

    Example:
        >>> pronouns = tls.load_task("gendered_pronoun").dataset.__self__  # what the shipped text tasks are made of
        >>> pronouns.choices, pronouns.examples(0)[2]
        ([' he', ' she'], Examples(512 of shape (14,), 512 answers, with counterfactuals))
    """

    sentences: Sentences
    source: Any
    padding_side: Literal["left", "right"] = "left"
    prepend_bos: bool | None = None

    def task(
        self,
        name: str,
        description: str,
        alignment: Alignment,
        *,
        chance: float,
        causal_models: Mapping[str, CausalModel],
        wrong: tuple[str, ...],
    ) -> Task:
        """The task of these data; the arguments are :class:`~tl_sparsify.tasks.task.Task`'s. No model pass."""
        return Task(
            name=name,
            description=description,
            model=self.model,
            dataset=self.dataset,
            examples=self.examples,
            causal_model=self.sentences.causal_model,
            alignment=alignment,
            pairs=self.pairs,
            chance=chance,
            causal_models=causal_models,
            wrong=wrong,
        )

    def model(self) -> Any:
        """The language model."""
        return load_language_model(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def _reader(self) -> Any:
        """What reads the prompts: the tokenizer, and the sizes of the model, by which a prompt can be too long."""
        if not isinstance(self.source, str | Path):
            return self.source
        return SimpleNamespace(tokenizer=self.tokenizer, cfg=load_sizes(self.source))

    @cached_property
    def outputs(self) -> Mapping[Any, str]:
        """The text of every value of the output, for this tokenizer."""
        written = self.sentences.written
        return self.sentences.outputs if written is None else written(self.tokenizer)

    @cached_property
    def words(self) -> dict[str, list[str]]:
        """The words of each slot that are single tokens."""
        lists = {id(words): words for words in self.sentences.slots.values()}
        found = {number: single_token_words(self.tokenizer, words) for number, words in lists.items()}
        return {slot: found[id(words)] for slot, words in self.sentences.slots.items()}

    @cached_property
    def rows(self) -> tuple[dict[str, Shaped[np.ndarray, "_"]], ...]:
        """The rows of each split that the tokenizer can do with, none twice.

        Raises:
            ValueError: a tokenizer that can do with too few.
        """
        drawn = self._different(self.sentences.rows(_ROWS, 0))
        usable = self._usable(drawn)
        split = split_of(self.sentences.key(drawn))
        found = tuple({name: v[usable & (split == s)] for name, v in drawn.items()} for s in range(3))
        for (name, size), rows in zip(self.sentences.sizes.items(), found, strict=True):
            there = len(rows["template"])
            if there < size:
                raise ValueError(f"the tokenizer can do with {there} rows of {name}, {size} are needed: {self._why()}")
        return found

    def _different(self, rows: Rows) -> dict[str, Shaped[np.ndarray, "_"]]:
        """Each sentence once: the first row that has it."""
        first: dict[str, int] = {}
        for i, prompt in enumerate(prompts(rows)):
            first.setdefault(prompt, i)
        return {name: values[list(first.values())] for name, values in rows.items()}

    def _usable(self, rows: Rows) -> Bool[np.ndarray, "n"]:
        fits = np.all([np.isin(rows[slot], words) for slot, words in self.words.items()], 0)
        return fits if self.sentences.fits is None else fits & self.sentences.fits(self.tokenizer, rows)

    def _why(self) -> str:
        few = [
            f"of {len(self.sentences.slots[slot])} words for {slot} {len(words)} are one token (not {other!r})"
            for slot, words in self.words.items()
            for other in [next((w for w in self.sentences.slots[slot] if w not in words), None)]
            if other is not None
        ]
        return ", ".join(few) or "its numbers are not two tokens of two digits, nor one token a digit"

    @cached_property
    def choices(self) -> list[str]:
        """The texts of the outputs that the tokenizer can give, in their order."""
        texts = list(self.outputs.values())
        words = [text.removeprefix(" ") for text in texts if text.startswith(" ")]
        known = {f" {word}" for word in single_token_words(self.tokenizer, words)} if words else set()
        return [text for text in texts if text in known or not text.startswith(" ")]

    def _some(self, rng: np.random.Generator, split: int, size: int) -> dict[str, Shaped[np.ndarray, "size"]]:
        """Different rows of a split in random order, as many of each cell as there are."""
        rows = self.rows[split]
        order = rng.permutation(len(rows["template"]))
        cell = self.sentences.cell(rows)[order]
        _, inverse = np.unique(cell, return_inverse=True)
        turn = np.empty_like(inverse)
        for one in range(inverse.max() + 1):
            turn[inverse == one] = np.arange((inverse == one).sum())
        chosen = rng.permutation(order[np.argsort(turn, kind="stable")[:size]])
        return {name: values[chosen] for name, values in rows.items()}

    def dataset(self, seed: int = 0, counterfactual: str | None = None) -> DatasetDict:
        """Train, validation and test sentences of a seed, none twice.

        Args:
            counterfactual: the kind that each is paired with; the first one where not given.

        Returns:
            The causal model's inputs as columns, ``prompt``, ``answer``, ``counterfactual_prompt`` and
            ``counterfactual_answer`` (what the answer is held against).

        Raises:
            ValueError: an unknown kind, a tokenizer that can do with too few rows.
        """
        kinds = self.sentences.counterfactuals
        kind = next(iter(kinds)) if counterfactual is None else counterfactual
        if kind not in kinds:
            raise ValueError(f"counterfactual is {kind!r}; the kinds are {', '.join(kinds)}")
        rng = np.random.default_rng([seed, 89])
        parts: dict[str | NamedSplit, Dataset] = {}
        for split, (name, size) in enumerate(self.sentences.sizes.items()):
            rows = self._some(rng, split, size)
            other = kinds[kind](rows, self.words, rng)
            against = self.sentences.held_against
            wrong = self.sentences.answers(other) if against is None else against(rows)
            columns = {name: values.tolist() for name, values in self.sentences.inputs(rows).items()}
            columns |= {"prompt": prompts(rows), "answer": self._texts(self.sentences.answers(rows))}
            columns |= {"counterfactual_prompt": prompts(other), "counterfactual_answer": self._texts(wrong)}
            parts[name] = Dataset.from_dict(columns)
        return DatasetDict(parts)

    def examples(self, seed: int = 0, counterfactual: str | None = None) -> tuple[Examples, Examples, Examples]:
        """Train, validation and test examples of ``dataset(seed, counterfactual)``."""
        columns = {"counterfactual_prompt": "counterfactual_prompt", "counterfactual_answer": "counterfactual_answer"}
        train, validation, test = (
            Examples.from_dataset(self._reader, data, choices=self.choices, **columns, **self._settings)
            for data in self.dataset(seed, counterfactual).values()
        )
        return train, validation, test

    def pairs(self, n: int = 512, seed: int = 0, split: int = 2) -> Pairs:
        """Pairs of sentences of the test split (or another one), balanced for every variable of the causal model and
        of its rivals."""
        sentences, rng = self.sentences, np.random.default_rng([seed, 91])
        rows = self.rows[split]
        size = len(rows["template"])
        enough = max(_CANDIDATES, 16 * n)
        index = rng.integers(size, size=5 * enough)  # most sources that are made anew are of other splits
        base = {name: values[index] for name, values in rows.items()}
        if sentences.sources is None:
            other = (index + rng.integers(1, size, size=len(index))) % size
            source: Rows = {name: values[other] for name, values in rows.items()}
        else:
            source = sentences.sources(base, self.words, rng)
        there = split_of(sentences.key(source)) == split
        there &= np.any([base[name] != source[name] for name in base], 0)
        some = np.flatnonzero(there)[:enough]
        base, source = ({name: v[some] for name, v in rows.items()} for rows in (base, source))
        targets = [(model, v) for model in (sentences.causal_model, *sentences.rivals) for v in model.variables]
        chosen = balanced_among(sentences.inputs(base), sentences.inputs(source), targets, n=n, seed=seed)
        base, source = ({name: v[chosen] for name, v in rows.items()} for rows in (base, source))
        both = self._encoded({name: np.concatenate([base[name], source[name]]) for name in base})
        ids = dict(zip(self.choices, both.choices.tolist(), strict=True)) if both.choices is not None else {}
        answers = {value: ids[text] for value, text in self.outputs.items() if text in ids}
        return Pairs(sentences.inputs(base), sentences.inputs(source), both[:n], both[n:], answers)

    def _encoded(self, rows: Rows) -> Examples:
        texts = self._texts(self.sentences.answers(rows))
        return Examples.from_prompts(self._reader, prompts(rows), texts, choices=self.choices, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"prepend_bos": self._begins, "padding_side": self.padding_side}

    @property
    def _begins(self) -> bool:
        return begins(self.source, self.tokenizer) if self.prepend_bos is None else self.prepend_bos

    def _texts(self, outputs: Shaped[np.ndarray, "n"]) -> list[str]:
        return [self.outputs[value] for value in outputs.tolist()]
