"""Top-k masks: the gates are ``sigmoid((logit - threshold) / temperature)`` with the threshold at which they sum to
``k``, and ``k`` is drawn anew for every step: one training serves all sizes."""

from __future__ import annotations

import torch

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.units import Model, Units
from tl_sparsify.masking.gates import of_random_sizes, relative_to_size
from tl_sparsify.masking.training import PER_STEP, trained
from tl_sparsify.search.scores import Scores, kept_count


@checked
def top_k_gate(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    temperature: float = 0.2,
    smallest: float = 0.01,
    relative: bool = False,
    per_step: int = PER_STEP,
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Sigmoid gates that sum to ``k``, one for each unit, trained by Adam on the divergence from the original output
    at random sizes ``k``: a mask of random budgets, where one training gives the order for all sizes. A unit's score is
    its logit.

    A gate is ``sigmoid((logit - threshold) / temperature)``; the threshold at which all gates sum to ``k`` is found by
    bisection, and the gradient goes through it implicitly, ``d threshold / d logit[u] = w[u] / sum w`` with ``w = gate
    (1 - gate)`` (T. Ahle, *Differentiable top-k*, 2022). Eight sizes ``k`` are drawn for every step, one in each eighth
    of the way from ``smallest`` to all of the units by logarithm; the examples take them in turn. Logits start at 0.

    Args:
        steps: of Adam, with a cosine schedule; where not given as many as make 80 passes over the data.
        temperature: of the gates. The lower, the nearer to a set of whole units.
        smallest: the smallest size, as a fraction of the units.
        relative: divide each size's divergence by its own level, a running mean, so that large circuits, which diverge
            little, count as much as small ones.
        per_step, values, held_out, metric, batch_size: as in :func:`hard_concrete`.

    By default 81 forward and 80 backward passes over the data, in general ``steps per_step / n`` of both and one for
    the original's logits; where these are more than 2^24 numbers, they are made in each step, by as many passes again;
    one forward pass more for the means where not given, and at most 51 over ``held_out``.

    Raises:
        ValueError: as in :func:`hard_concrete`; a ``temperature`` that is not positive, or ``smallest`` outside (0, 1].

    Example:
        >>> tls.baselines.top_k_gate(model, train, units, steps=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    gates = of_random_sizes(kept_count(len(units), smallest, "smallest"), len(units), temperature, seed)
    start = torch.zeros(len(units))
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "values": values}
    settings |= {"held_out": held_out, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    weighting = relative_to_size() if relative else None
    return trained(model, examples, units, start, gates, None, name="top-k gate", weighting=weighting, **settings)
