"""The text tasks' sentences, read again by the templates, with the answers worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from helpers.places import loaded
from tasks.docstring import task as docstring
from tasks.gendered_pronoun import task as gendered_pronoun
from tasks.greater_than import task as greater_than
from tasks.ioi import task as ioi
from tasks.subject_verb_agreement import task as subject_verb_agreement
from tl_sparsify import (
    Examples,
    Pairs,
    text,
)
from tl_sparsify.tasks.pairing import split_of
from tl_sparsify.tasks.task import own_language_model

MODULES: Mapping[str, ModuleType] = {
    "ioi": ioi,
    "greater_than": greater_than,
    "gendered_pronoun": gendered_pronoun,
    "subject_verb_agreement": subject_verb_agreement,
    "docstring": docstring,
}
SPLITS = ("train", "validation", "test")
every_task = pytest.mark.parametrize("name", MODULES)


@cache
def own_tokenizer() -> Any:
    return text.load_tokenizer(own_language_model())


@cache
def data_of(name: str, counterfactual: str | None = None, seed: int = 0) -> Mapping[str, Mapping[str, list[Any]]]:
    task: Any = loaded(name)
    return {split: data.to_dict() for split, data in task.dataset(seed, counterfactual).items()}


@cache
def splits(name: str, counterfactual: str | None = None, seed: int = 0) -> dict[str, Examples]:
    task: Any = loaded(name)
    return dict(zip(SPLITS, task.examples(seed, counterfactual), strict=True))


@cache
def pairs_of(name: str, n: int = 512, seed: int = 0) -> Pairs:
    return loaded(name).pairs(n, seed)


@cache
def patterns(name: str) -> tuple[re.Pattern[str], ...]:
    """A regular expression for each template: words at first, the same ones again later."""
    module = MODULES[name]
    templates = module.template(np.arange(1, 4)).tolist() if name == "docstring" else module.TEMPLATES
    found: list[re.Pattern[str]] = []
    for template in templates:
        seen: set[str] = set()
        pattern = ""
        for plain, slot in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
            word = r"\d\d" if slot in ("century", "year") else r"\w+"
            pattern += re.escape(plain)
            if slot:
                pattern += f"(?P={slot})" if slot in seen else f"(?P<{slot}>{word})"
                seen.add(slot)
        found.append(re.compile(pattern))
    return tuple(found)


def read(name: str, prompt: str) -> dict[str, Any] | None:
    """The words of a sentence; ``None`` where it is none of the task's."""
    for number, pattern in enumerate(patterns(name), start=1):
        if match := pattern.fullmatch(prompt):
            return match.groupdict() | {"template": number} | ({"documented": number} if name == "docstring" else {})
    return None


def split_of_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """The splits that the task's key puts sentences into."""
    slots = set.intersection(*map(set, rows)) - {"template"}
    columns = {slot: np.array([row[slot] for row in rows]) for slot in slots}
    return set(split_of(MODULES[name].key(columns)).tolist())
