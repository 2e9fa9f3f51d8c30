"""Baselines: other ways to order units, with the signature of :mod:`tl_sparsify.score`'s."""

from __future__ import annotations

import torch

from tl_sparsify import _random
from tl_sparsify.examples import Examples
from tl_sparsify.score import Scores
from tl_sparsify.units import Model, Units


def random(model: Model, examples: Examples, units: Units, *, seed: int = 0) -> Scores:
    """A random score for every unit: the control that every method must beat. No model pass."""
    scores = _random.uniform(seed, 61, torch.arange(len(units)))
    return Scores(units, scores, torch.full_like(scores, float("nan")), "random", "no unit", 0, 0)
