"""Code blocks of a page."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import tl_sparsify as tls


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """Number of the first line, and content, of each fenced block in one of the languages."""
    fenced = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in fenced.finditer(text)]


def few_examples(patch: pytest.MonkeyPatch, n: int) -> None:
    """Tasks are loaded with at most so many examples in each split: the same code runs, in less time."""
    load = tls.load_task

    def short(*args: Any, **options: Any) -> tls.Task:
        task = load(*args, **options)

        def examples(seed: int = 0) -> tuple[tls.Examples, tls.Examples, tls.Examples]:
            train, validation, test = task.examples(seed)
            return train[:n], validation[:n], test[:n]

        return replace(task, examples=examples)

    patch.setattr(tls, "load_task", short)
