"""Templates: whether a circuit that is found without a template does as well on it as on any other examples.

Each template is left out once: the search runs on the examples of the others, and what it finds is measured on those of
the one left out. The control is the same with parts of the same sizes made at random, regardless of template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.settings import Probing
from tl_sparsify.stressing.measuring import Setting, alike, assigned, removing
from tl_sparsify.stressing.table import Stand, StressRow

_DEALT = 2  # times that examples are dealt out at random


def across_templates(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    templates: Sequence[Any],
    setting: Setting,
    *,
    rounds: int = 8,
) -> tuple[StressRow, ...] | str:
    """The risk of circuits of the reduction's size on the template that each was found without, beside that of circuits
    found without a random part of the examples. Or why nothing can be told.

    The claim, that templates do not matter, holds where leaving a template out costs no more than the tolerance above
    leaving out as many examples at random, and random circuits are worse than both. It fails where it certainly costs
    more, and more than in each of the two random deals.

    All circuits have the reduction's constants, those before a refit: only which units are kept can differ.

    Args:
        templates: of each example, the template that it was made from: anything that can be compared.

    Cost: for each template three searches of ``rounds`` rounds on the other examples; ``setting.draws`` forward passes,
    and three for each template.

    Raises:
        ValueError: templates that are not one for each example; a reduction with affine replacements.
    """
    if len(templates) != len(examples):
        raise ValueError(f"templates has {len(templates)} entries for {len(examples)} examples; give one for each")
    if reduction.mixing is not None:
        raise ValueError("reduction has affine replacements, which are fitted for its own circuit: give its constants")
    if not 0 < len(reduction.circuit) < len(reduction.units):
        return ()
    names = list(dict.fromkeys(templates))
    if len(names) < 2:
        return "all examples have one template"
    part = torch.tensor([names.index(name) for name in templates])
    plain = replace(reduction, values=reduction.baseline, reference=None)
    with counted(model) as passes:
        deals = [part[_random.permutation(len(part), setting.seed, 131, deal)] for deal in range(_DEALT)]
        found: list[Circuit] = []
        for parts in (part, *deals):
            found += [_without(model, plain, examples[parts != i], setting, rounds) for i in range(len(names))]
        drawn = [alike(reduction.circuit, setting.seed, draw) for draw in range(setting.draws)]
        choices: Int[Tensor, "n columns"] = torch.stack(
            [
                *(parts + number * len(names) for number, parts in enumerate((part, *deals))),
                *(torch.full_like(part, len(found) + draw) for draw in range(len(drawn))),
            ],
            1,
        )
        removals = [removing(plain, one, examples) for one in (*found, *drawn)]
        columns = assigned(model, removals, choices, examples, setting)
        alone = assigned(
            model,
            removals[: len(names)],
            torch.where(part[:, None] == torch.arange(len(names)), part[:, None], -1),
            examples,
            replace(setting, bootstrap=0),
        )
    value, between = columns.column(0)
    weights = torch.zeros(len(columns.mean))
    weights[1 : 1 + _DEALT] = 1 / _DEALT
    control, around = columns.interval(weights)
    first = torch.zeros(len(columns.mean))
    first[0] = 1
    rise, (low, high) = columns.interval(first - weights)
    at_random = torch.zeros(len(columns.mean))
    at_random[1 + _DEALT :] = 1 / max(1, len(drawn))
    useful = columns.interval(at_random - weights)[1][0] > setting.tolerance
    every = all(columns.rise(0, 1 + deal)[1][0] > setting.tolerance for deal in range(_DEALT))
    each = alone.mean * len(part) / torch.bincount(part, minlength=len(names))
    worst = int(each.argmax())
    told = f"{rise:.3g} more than without random parts; most on {str(names[worst])[:60]!r}: {float(each[worst]):.3g}"
    if not useful:
        stand, why = Stand.UNKNOWN, f"random circuits do as well as those found without random parts ({control:.3g})"
    elif low > setting.tolerance and every:
        stand, why = Stand.FAILS, told
    elif high <= setting.tolerance:
        stand, why = Stand.HOLDS, told
    else:
        stand, why = Stand.UNKNOWN, f"about the tolerance: {told}"
    line = StressRow(
        row="templates",
        case=f"each of {len(names)} left out",
        claim=f"leaving a template out costs no more than {setting.tolerance:g} {setting.unit} above random parts",
        value=value,
        low=between[0],
        high=between[1],
        control=control,
        control_low=around[0],
        control_high=around[1],
        unit=setting.unit,
        stand=stand,
        because=why,
        n=columns.n,
        forward=passes["forward"] / columns.n,
        backward=passes["backward"] / columns.n,
    )
    return (line,)


def _without(model: Model, reduction: Reduction, examples: Examples, setting: Setting, rounds: int) -> Circuit:
    """The circuit of the reduction's size that a search finds on these examples."""
    n, size = len(reduction.units), len(reduction.circuit)
    falling = sorted({max(size, round(n * (size / n) ** (i / rounds))) for i in range(1, rounds + 1)} - {n})
    path = sparsify(
        model,
        examples,
        reduction.units,
        sizes=[kept / n for kept in reversed(falling)],
        values=reduction.values,
        probing=Probing(temperature=3.0),
        metric=setting.metric,
        predict=False,
        first_token=reduction.first_token,
        seed=setting.seed,
        batch_size=setting.batch_size,
        progress=False,
    )
    return path.at(size / n).circuit
