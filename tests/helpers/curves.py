"""Scores to draw curves of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.models import bridge, examples, seeded, units_of
from tl_sparsify import Curve, Examples, Scores

ASKED = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)  # of 14 units
KEPT = (1, 3, 4, 7, 11, 14)
MEASURES = ("risk", "accuracy", "agreement", "metric", "faithfulness")


def data(n: int = 10, paired: bool = True) -> Examples:
    made = examples(n, answers=2, choices=(1, 4, 6, 9))
    return made if paired else replace(made, counterfactual_tokens=None, counterfactual_labels=None)


def scores_of(numbers: Tensor, units: Any = None) -> Scores:
    units = units_of(bridge()) if units is None else units
    return Scores(units, numbers, torch.zeros_like(numbers), "made up", "no unit", 0, 0)


def random_scores(seed: int = 0) -> Scores:
    return scores_of(torch.randn(14, generator=seeded(seed), dtype=torch.float64))


def numbers(curve: Curve) -> list[float]:
    """All numbers of a curve."""
    found: list[float] = [*curve.cpr_interval, *curve.cmd_interval, curve.cpr, curve.cmd, curve.original_accuracy]
    found += [curve.original_metric, curve.empty_metric, *curve.sizes]
    for measure in MEASURES:
        found += [*getattr(curve, measure), *(end for ends in curve.intervals[measure] for end in ends)]
    return found
