"""RAVEL: entities, their attributes and prompts that ask for them, from the published files, as tasks.

After Huang, Wu, Potts, Geva and Geiger, *RAVEL: Evaluating interpretability methods on disentangling language model
representations* (2024). For each kind of entity there are ``ravel_city_entity_attributes.json``,
``ravel_city_attribute_to_prompts.json``, ``ravel_city_entity_to_split.json`` and ``ravel_city_prompt_to_split.json``.
The prompts from Wikipedia, which ask for no attribute, are not read.

A source asks what its base asks, of another entity of as many tokens. A variable stands for each attribute: taken from
the source it changes the answer where it is asked for (cause), and nowhere else (isolate).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped

from tl_sparsify._internal.files import reading
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.formats.answers import Problem, following, ids_of
from tl_sparsify.formats.records import load_examples
from tl_sparsify.tasks.published import SPLITS, Place, Reader, Unusable, as_dataset, dropped_of, refuse
from tl_sparsify.tasks.task import Task

_SPLIT = {"train": "train", "val": "validation", "validation": "validation", "dev": "validation", "test": "test"}
_FILES = ("entity_attributes", "attribute_to_prompts", "entity_to_split", "prompt_to_split")
_SLOT = "%s"
_SIZES = {"train": 1024, "validation": 256, "test": 512}
_LOOKED_AT = 4096  # questions of each split, drawn once for ever: half of them for the attribute


@dataclass(frozen=True)
class Files:
    """What the files of one kind of entity say.

    Attributes:
        entities: the attributes of each.
        prompts: the prompts that ask for each attribute, with ``%s`` for the entity.
        splits: of entities and prompts alike.
        name: the files' names up to their last part.
    """

    entities: Mapping[str, Mapping[str, str]]
    prompts: Mapping[str, Sequence[str]]
    splits: Mapping[str, str]
    name: str

    @cached_property
    def asked(self) -> dict[str, str]:
        """What each prompt asks for."""
        return {prompt: attribute for attribute, some in self.prompts.items() for prompt in some}

    def answer(self, entity: str, prompt: str, attribute: str | None = None) -> str:
        """What follows: an attribute's value, with the space before it that the prompt leaves out."""
        return _lead(prompt) + self.entities[entity][attribute or self.asked[prompt]]


@dataclass(frozen=True, eq=False)
class Ravel:
    """The data of one attribute for one language model.

    Attributes:
        entity, attribute: what of what (``city``, ``Country``).
        files: the data.
        problems: the entities and prompts that nobody can use, by split.
        reader: for which model.
        unusable: what is done with rows that cannot be used.
    """

    entity: str
    attribute: str
    files: Files
    problems: Sequence[tuple[str, Place, Problem]]
    reader: Reader
    unusable: Unusable

    @cached_property
    def causal_model(self) -> CausalModel:
        """A variable for each attribute of the entity, and the one that the prompt asks for as answer."""
        files, names = self.files, {_variable(name): name for name in self.files.prompts}

        def answered(prompt: Shaped[np.ndarray, "n"], **values: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "n"]:
            own = [values[_variable(files.asked[text])][i] for i, text in enumerate(prompt.tolist())]
            return np.array([_lead(text) + str(value) for text, value in zip(prompt.tolist(), own, strict=True)])

        found: dict[str, Callable[..., Any]] = {name: _valued(files, attribute) for name, attribute in names.items()}
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, kind) for name in ("prompt", *names)]
        answered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return CausalModel(("entity", "prompt"), found | {"answer": answered}, "answer")

    @cached_property
    def _tokens(self) -> dict[str, int]:
        """The first token of every answer that an entity may get."""
        leads = {_lead(prompt): prompt.replace(_SLOT, "it") for prompt in self.files.asked}
        values = dict.fromkeys(value for own in self.files.entities.values() for value in own.values())
        texts = {lead + value: prompt for lead, prompt in leads.items() for value in values}
        tokens = following(
            self.reader.readable.tokenizer, "answer", [*texts.values()], [*texts], self.reader.outputs, several=True
        )
        return {text: some[0] for text, some in zip(texts, tokens, strict=True) if isinstance(some, list)}

    @cached_property
    def _checked(self) -> tuple[dict[str, list[dict[str, Any]]], pd.DataFrame]:
        """The usable questions of each split, each with the others that it can be paired with."""
        found: dict[str, list[dict[str, Any]]] = {}
        problems = list(self.problems)
        for number, split in enumerate(SPLITS):
            rows = self._questions(split, number)
            wrong = self._unreadable(rows)
            found[split] = [row for i, row in enumerate(rows) if i not in wrong]
            for some in _alike(found[split]).values():
                for row in some:
                    row["others"] = [other for other in some if other["token"] != row["token"]]
            alone = Problem(
                "no other entity of as many tokens", "and another answer to the same prompt is in the split"
            )
            lonely = [row for row in found[split] if not row["others"]]
            problems += [(split, rows[i]["place"], wrong[i]) for i in sorted(wrong)]
            problems += [(split, row["place"], alone) for row in lonely]
            found[split] = [row for row in found[split] if row["others"]]
            mine = [one for one in problems if one[0] == split]
            asked = {row["asked"] == self.attribute for row in found[split]}
            what = f"{split} of {self.files.name} for {self.attribute}"
            refuse(dropped_of(mine), len(found[split]) + len(mine), what, self.unusable)
            if asked != {True, False}:
                lack = f"asks for {self.attribute}" if True not in asked else "asks for another attribute"
                raise ValueError(f"{what} has no usable prompt that {lack}: give prompts and entities of this split")
        return found, dropped_of(problems)

    def _questions(self, split: str, number: int) -> list[dict[str, Any]]:
        """Entities and prompts of a split, put together; at most so many, half of them for the attribute."""
        entities = [name for name in self.files.entities if self.files.splits.get(name) == split]
        rng = np.random.default_rng([107, number])
        rows: list[dict[str, Any]] = []
        for mine in (True, False):
            prompts = [
                prompt
                for prompt, attribute in self.files.asked.items()
                if (attribute == self.attribute) == mine and self.files.splits.get(prompt) == split
            ]
            size = len(entities) * len(prompts)
            chosen = np.sort(rng.permutation(size)[: _LOOKED_AT // 2])
            rows += [self._question(entities[i % len(entities)], prompts[i // len(entities)]) for i in chosen.tolist()]
        return rows

    def _question(self, entity: str, prompt: str) -> dict[str, Any]:
        start = prompt.index(_SLOT)
        end = start + len(entity)
        return {
            "entity": entity,
            "template": prompt,
            "asked": self.files.asked[prompt],
            "prompt": prompt.replace(_SLOT, entity),
            "answer": self.files.answer(entity, prompt),
            "spans": {"entity": (start, end), "entity_end": (end - 1, end)},
            "place": (f"{self.files.name}_entity_attributes.json", f"{entity!r} in {prompt!r}"),
        }

    def _unreadable(self, rows: Sequence[dict[str, Any]]) -> dict[int, Problem]:
        """Questions that the tokenizer cannot do with."""
        tokenizer = self.reader.readable.tokenizer
        texts = [row["prompt"] for row in rows]
        answers = following(
            tokenizer, "answer", texts, [row["answer"] for row in rows], self.reader.outputs, several=True
        )
        lengths, whole = [len(ids) for ids in ids_of(tokenizer, texts)], self._tokens
        wrong: dict[int, Problem] = {}
        for i, (row, answer, n) in enumerate(zip(rows, answers, lengths, strict=True)):
            row["length"] = n
            others = [self.files.answer(row["entity"], row["template"], name) for name in self.files.prompts]
            lost = next((text for text in others if text not in whole), None)
            if isinstance(answer, Problem):
                wrong[i] = answer
            elif whole.get(row["answer"]) != answer[0] or lost is not None:
                wrong[i] = Problem("an answer that changes with its prompt", f"{lost or row['answer']!r}")
            else:
                row["token"] = answer[0]
        limit = getattr(getattr(self.reader.readable, "cfg", None), "n_ctx", None)
        for i, n in enumerate(lengths):
            if limit is not None and n + 1 > limit:
                wrong.setdefault(i, Problem("prompt longer than the context", f"{n} tokens, at most {limit}"))
        return wrong

    def dropped(self) -> pd.DataFrame:
        """The rows that cannot be used: ``split, file, row, reason, detail``."""
        return self._checked[1]

    def _some(self, split: str, seed: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Questions of a split, each with its source: half of them ask for the attribute, where there are enough."""
        rng = np.random.default_rng([seed, 109])
        return self._drawn(split, _SIZES[split], rng, again=False)

    def _drawn(
        self, split: str, n: int, rng: np.random.Generator, *, again: bool
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        rows = self._checked[0][split]
        chosen: list[dict[str, Any]] = []
        for mine, size in ((True, n - n // 2), (False, n // 2)):
            some = [row for row in rows if (row["asked"] == self.attribute) == mine]
            take = size if again else min(size, len(some))
            chosen += [some[i] for i in rng.choice(len(some), take, replace=take > len(some)).tolist()]
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        return [(row, row["others"][int(rng.integers(len(row["others"])))]) for row in chosen]

    def _examples(self, both: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Examples:
        rows = [
            {"prompt": row["prompt"], "spans": row["spans"], "answer": row["token"]}
            | {"corrupt": other["prompt"], "wrong_answer": other["token"]}
            for row, other in both
        ]
        settings = self.reader.settings()
        found = load_examples(self.reader.readable, rows, spans="spans", answers_as="ids", **settings).examples
        usable = [row for some in self._checked[0].values() for row in some]
        return replace(found, choices=torch.tensor(sorted({row["token"] for row in usable})))

    def dataset(self, seed: int = 0) -> Any:
        """The questions of each split that :meth:`examples` has, with their sources."""
        names = ("entity", "template", "asked", "prompt", "answer")
        return as_dataset(
            {
                split: [
                    {name: row[name] for name in names}
                    | {"source": other["entity"], "counterfactual_prompt": other["prompt"]}
                    | {"wrong_answer": other["answer"]}
                    for row, other in self._some(split, seed)
                ]
                for split in SPLITS
            }
        )

    def examples(self, seed: int = 0) -> tuple[Examples, Examples, Examples]:
        """Train, validation and test examples, each against the answer for another entity."""
        train, validation, test = (self._examples(self._some(split, seed)) for split in SPLITS)
        return train, validation, test

    def pairs(self, n: int = 512, seed: int = 0) -> Pairs:
        """Test questions with their sources; half of them ask for the attribute."""
        drawn = self._drawn("test", n, np.random.default_rng([seed, 113]), again=True)
        both = self._examples([*drawn, *((other, row) for row, other in drawn)])
        sides = [[row for row, _ in drawn], [other for _, other in drawn]]
        base, source = (
            {"entity": np.array([r["entity"] for r in rows]), "prompt": np.array([r["template"] for r in rows])}
            for rows in sides
        )
        return Pairs(base, source, both[:n], both[n:], self._tokens)

    def task(self) -> Task:
        """The task."""
        answers = [self.files.entities[name][self.attribute] for name in self.files.entities]
        return Task(
            name=f"ravel.{self.entity}.{self.attribute}",
            description=f"{self.attribute} of a {self.entity} and its other attributes, from RAVEL",
            model=self.reader.model,
            dataset=self.dataset,
            examples=self.examples,
            causal_model=self.causal_model,
            alignment=Alignment({}),
            pairs=self.pairs,
            chance=max(map(answers.count, set(answers))) / len(answers),
            causal_models={"attributes": self.causal_model},
            dropped=self.dropped,
        )


def read_task(
    part: str, path: Path, model: Any, *, prepend_bos: bool | None = None, unusable: Unusable = "refuse"
) -> Task:
    """An attribute of a kind of entity (``city/Country``) from a folder with its files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another form, an attribute that there is not (with those that there are).
    """
    entity, _, attribute = part.partition("/")
    parts = [_read(path, entity, what) for what in _FILES]
    name = f"ravel_{entity}"
    known = sorted(parts[1])
    wanted = next((one for one in known if attribute in (one, _variable(one))), None)
    if wanted is None:
        raise ValueError(
            f"{name}_attribute_to_prompts.json has no {attribute!r}: say ravel/{entity}/ and one of {', '.join(known)}"
        )
    if len(known) < 2:
        raise ValueError(
            f"{name}_attribute_to_prompts.json has {wanted} alone: the others are what it is told apart from"
        )
    files, problems = _sorted_out(name, *parts)
    return Ravel(entity, wanted, files, problems, Reader(model, prepend_bos), unusable).task()


def _read(folder: Path, entity: str, what: str) -> dict[str, Any]:
    path = folder / f"ravel_{entity}_{what}.json"
    if not path.is_file():
        kinds = sorted(
            p.name.split("_", 1)[1].removesuffix("_entity_attributes.json")
            for p in folder.glob("ravel_*_entity_attributes.json")
        )
        hint = f"entities there: {', '.join(kinds)}" if kinds and entity not in kinds else "unpack RAVEL's data there"
        raise FileNotFoundError(f"no file at {path}: {hint}")
    with reading(path, "JSON file in UTF-8", "Download it again."):
        content = json.loads(path.read_text(encoding="utf-8"))
    form = {"entity_attributes": dict, "attribute_to_prompts": list}.get(what, str)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds no object with entries: download it again")
    bad = next((key for key, entry in content.items() if not isinstance(entry, form)), None)
    if bad is not None:
        raise ValueError(f"{path}, {bad!r}: {str(content[bad])[:60]!r} is no {form.__name__}; download the file again")
    return content


def _sorted_out(
    name: str,
    entities: Mapping[str, Any],
    prompts: Mapping[str, Any],
    of_entity: Mapping[str, str],
    of_prompt: Mapping[str, str],
) -> tuple[Files, list[tuple[str, Place, Problem]]]:
    """Entities and prompts that can be used, whatever the tokenizer; the others with their reasons."""
    problems: list[tuple[str, Place, Problem]] = []
    splits: dict[str, str] = {}

    def take(what: str, key: str, given: Mapping[str, str], why: Problem | None) -> bool:
        split = _SPLIT.get(given.get(key, ""))
        if split is None:
            file = f"{name}_{what}_to_split.json"
            detail = f"its split is {given.get(key)!r}; it must be train, val or test"
            problems.append(("train", (file, repr(key)), Problem(f"{what} without a split", detail)))
            return False
        file = f"{name}_{'entity_attributes' if what == 'entity' else 'attribute_to_prompts'}.json"
        if why is not None:
            problems.append((split, (file, repr(key)), why))
            return False
        splits[key] = split
        return True

    fine: dict[str, dict[str, str]] = {}
    for key, values in entities.items():
        lost = [one for one in prompts if not isinstance(values.get(one), str) or not values[one].strip()]
        why = Problem(f"no {lost[0]}", f"{lost[0]} is {values.get(lost[0])!r}; it must be text") if lost else None
        if take("entity", key, of_entity, why):
            fine[key] = {one: values[one] for one in prompts}
    asking: dict[str, list[str]] = {}
    for attribute, some in prompts.items():
        asking[attribute] = []
        for prompt in some:
            once = isinstance(prompt, str) and prompt.count(_SLOT) == 1
            why = None if once else Problem("prompt without one %s", f"{str(prompt)[:60]!r} must have it once")
            if take("prompt", str(prompt), of_prompt, why):
                asking[attribute].append(prompt)
    if not fine:
        raise ValueError(f"{name}_entity_attributes.json has no entity that can be used: {problems[0][2].detail}")
    return Files(fine, asking, splits, name), problems


def _alike(rows: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    """The questions by prompt and number of tokens."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["template"], row["length"]), []).append(row)
    return found


def _valued(files: Files, attribute: str) -> Callable[..., Any]:
    return lambda entity: np.array([files.entities[name][attribute] for name in entity.tolist()])


def _lead(prompt: str) -> str:
    """What goes before the answer: a space, unless the prompt ends in one, or in a quote or an opening bracket."""
    return "" if re.search(r"[\s\"'(\[{]$", prompt) else " "


def _variable(attribute: str) -> str:
    """An attribute's name as a variable's: ``Award_Year``."""
    return re.sub(r"\W", "_", attribute)
