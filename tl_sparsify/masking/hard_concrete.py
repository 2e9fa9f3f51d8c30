"""Hard-concrete masks: each gate is drawn from a stretched, clipped logistic distribution, with a penalty on the number
of open gates that is to be expected (Louizos et al., arXiv 1712.01312; for circuits: subnetwork probing, Cao et al.,
arXiv 2104.03514, and edge pruning, Bhaskar et al., arXiv 2406.16778, here at the level of units)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.units import Model, Units
from tl_sparsify.masking.training import PER_STEP, trained
from tl_sparsify.search.scores import Scores

_LOW, _HIGH, _BETA = -0.1, 1.1, 2 / 3  # the stretch and the temperature of Louizos et al.


@checked
def hard_concrete(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    penalty: float = 2.0,
    per_step: int = PER_STEP,
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Hard-concrete gates, one for each unit, trained by Adam on the divergence from the original output plus
    ``penalty`` times the expected share of open gates. A unit's score is its gate's logit.

    With ``u`` uniform, a gate is ``sigmoid((log u - log(1 - u) + logit) / beta)`` stretched to (-0.1, 1.1) and clipped
    to [0, 1], at temperature ``beta = 2/3``; it is drawn anew for every unit, example and step. It is open with
    probability ``sigmoid(logit - beta log(0.1 / 1.1))``. All logits start at 2, where that is 0.97.

    Args:
        steps: of Adam, with a cosine schedule; where not given as many as make 80 passes over the data.
        penalty: in the divergence's unit. It sets which size of circuit the training is for: tune it.
        per_step: examples in a step.
        values: what a closed gate sets its unit to; the means where not given.
        held_out: where given, the logits that are best there are returned: about ten times, the measured risk of the
            circuits of the best 50, 20, 10, 5 and 2 % of the units, on average.
        metric: half its squared error instead of the KL divergence.
        batch_size: examples at a time (as many as fit where not given): the numbers do not depend on it.

    By default 81 forward and 80 backward passes over the data, in general ``steps per_step / n`` of both and one for
    the original's logits; where these are more than 2^24 numbers, they are made in each step, by as many passes again;
    one forward pass more for the means where not given, and at most 51 over ``held_out``.

    Raises:
        ValueError: a model in training mode; ``steps`` or ``per_step`` below one; a negative ``penalty``; a
            ``learning_rate`` that is not positive; values of other units or of a run.

    Example:
        >>> tls.baselines.hard_concrete(model, train, units, steps=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    if penalty < 0:
        raise ValueError(f"penalty is {penalty}; it must not be negative")

    def gates(logits: Float[Tensor, "units"], index: Int[Tensor, "batch"], step: int) -> Float[Tensor, "batch units"]:
        u = _random.uniform(seed, 79, step, index[:, None], torch.arange(len(units))).clamp(1e-6, 1 - 1e-6)
        noise = u.logit().to(logits)
        return (((noise + logits) / _BETA).sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def opened(logits: Float[Tensor, "units"]) -> Float[Tensor, ""]:
        return penalty * (logits - _BETA * math.log(-_LOW / _HIGH)).sigmoid().mean()

    start = torch.full((len(units),), 2.0)
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "values": values}
    settings |= {"held_out": held_out, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    return trained(model, examples, units, start, gates, opened, name="hard concrete", **settings)
