"""The shipped tasks that have a model of their own, loaded once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from helpers.cards import FOLDER
from helpers.places import loaded
from tl_sparsify import (
    Examples,
    list_tasks,
)

NAMES = tuple(name for name in list_tasks() if (FOLDER / name / "model").is_dir())  # text: test_text_tasks.py
SPLITS = ("train", "validation", "test")

every_task = pytest.mark.parametrize("name", NAMES)


@cache
def splits(name: str, seed: int = 0) -> dict[str, Examples]:
    return dict(zip(SPLITS, loaded(name).examples(seed), strict=True))


def metrics(name: str) -> dict[str, Any]:
    return {"kind": "trained"} | json.loads((FOLDER / name / "model" / "metrics.json").read_text())
