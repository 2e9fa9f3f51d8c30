"""Parts of a task's card, and of its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tl_sparsify import Unit
from tl_sparsify.core.units import select

FOLDER = Path(__file__).parent.parent.parent / "tasks"
HEADINGS = ("Data", "Model", "Where the variables live", "Limits", "Licence")


def single(labels: torch.Tensor) -> list[int]:
    """The one label of each row."""
    assert bool(((labels != -100).sum(1) == 1).all())
    return labels[labels != -100].tolist()


def section(name: str, heading: str) -> str:
    return card(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def card(name: str) -> str:
    return (FOLDER / name / "README.md").read_text()


def crowded(units: Sequence[Unit]) -> bool:
    """Whether a site has fewer units outside the set than inside, so that random units are partly the same ones."""
    sites, mask = select(units)
    return any(2 * int(taken.sum()) > site.size for site, taken in zip(sites.sites, sites.split(mask), strict=True))
