"""Alternatives: whether another circuit of the same size, sharing few units with this one, does as well.

Methods differ in the circuits that they return, and a model can hold several that suffice (arXiv 2605.12671). So the
search runs again where most of the circuit's units are gone for good, and what it finds is measured on examples that it
has not seen, beside random circuits of the same size and overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import REFIT, REFITTED_NEIGHBOURS, Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.search.constants import mean
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.refitting import refit
from tl_sparsify.stressing.measuring import Setting, halves, measured, removing, sharing
from tl_sparsify.stressing.minimality import ranked
from tl_sparsify.stressing.table import Stand, StressRow

SHARES = (0.0, 0.25, 0.5)
"""How much of a circuit an alternative may share."""
_NAMED = 6


def alternatives(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    setting: Setting,
    *,
    train: Examples | None = None,
    shares: Sequence[float] = SHARES,
    rounds: int = 12,
) -> tuple[StressRow, ...]:
    """How much worse the best circuit is that a new search finds with at most so much of this circuit's units, beside
    random circuits of the same size and overlap.

    The claim, that none does as well, fails where one was found whose risk is within the tolerance of this circuit's
    (or below it) while random circuits are worse than what was found. It holds where the best one found is worse *and*
    random circuits are no better than it: a search that loses to them is none. That nothing was found is evidence as
    good as the search.

    Args:
        train: what is searched on; every other example where not given.
        shares: of the circuit, at most. Shares that come to as many units are one case.
        rounds: of each search.

    Cost: for each case one :func:`tl_sparsify.sparsify` of ``rounds`` rounds; a refit where the reduction was refitted;
    and ``setting.draws + 3`` forward passes.
    """
    chosen, reported = halves(examples, train)
    size, outside = len(reduction.circuit), len(reduction.units) - len(reduction.circuit)
    if not 0 < size or not outside:
        return ()
    counts = {int(share * size + 1e-9): share for share in sorted(shares, reverse=True)}
    rows: list[StressRow] = []
    for count, share in sorted(counts.items()):
        if size - count > outside:
            continue
        with counted(model) as passes:
            other = search_again(model, reduction, chosen, count, setting, rounds)
            plain = replace(other, circuit=reduction.circuit)
            drawn = [sharing(reduction.circuit, count, setting.seed, draw) for draw in range(setting.draws)]
            removals = [removing(part, part.circuit, reported) for part in (reduction, other)]
            removals += [removing(plain.with_circuit(one), one, reported) for one in drawn]
            found = measured(model, removals, reported, setting)
        many = max(1, len(drawn))
        rise, (low, high) = found.rise(1, 0)
        control, around = found.interval(torch.tensor([-1.0, 0.0] + [1 / many] * len(drawn)))
        names = other.circuit.names
        told = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        told = f"{told} ({len(other.circuit & reduction.circuit)} of {size} shared)"
        _, (above, _) = found.interval(torch.tensor([0.0, -1.0] + [1 / many] * len(drawn)))
        stand, why = Stand.UNKNOWN, f"about the tolerance: {told}"
        if high <= setting.tolerance and above > setting.tolerance:
            stand, why = Stand.FAILS, f"as good: {told}"
        elif not around[0] > setting.tolerance:
            why = "random circuits do as well as this one: neither means anything"
        elif rise > control + setting.tolerance:
            why = "random circuits do better than what the search found"
        elif low > setting.tolerance:
            stand, why = Stand.HOLDS, f"the best found: {told}"
        rows.append(
            StressRow(
                row="alternatives",
                case=f"at most {100 * share:g} % shared",
                claim=f"no other circuit of this size comes within {setting.tolerance:g} {setting.unit}",
                value=rise,
                low=low,
                high=high,
                control=control,
                control_low=around[0],
                control_high=around[1],
                unit=setting.unit,
                stand=stand,
                because=why,
                n=found.n,
                forward=passes["forward"] / found.n,
                backward=passes["backward"] / found.n,
            )
        )
    return tuple(rows)


def search_again(
    model: Model, reduction: Reduction, train: Examples, shared: int, setting: Setting, rounds: int
) -> Reduction:
    """The circuit of the same size that a search finds where all but ``shared`` of this circuit's units are gone from
    the start and do not come back: those that are dearest to it by the expansion may stay.

    Removed units have the reduction's values; where these were refitted, the means over ``train``, and are refitted.
    """
    again = reduction.values.kind in (REFIT, REFITTED_NEIGHBOURS) or reduction.mixing is not None
    values: Values = mean(model, train, reduction.units, batch_size=setting.batch_size) if again else reduction.values
    plain = replace(reduction, values=values, reference=None, mixing=None)
    dearest: Int[Tensor, "units"] = reduction.circuit.mask.nonzero().flatten()
    if shared:
        dearest = ranked(model, plain, train, 1, setting)[:, 0].flip(0)
    mask = ~reduction.circuit.mask
    mask[dearest[:shared]] = True
    start = Circuit(reduction.units, mask)
    size, n = len(reduction.circuit), len(mask)
    if len(start) > size:
        sizes = [len(start) * (size / len(start)) ** (i / rounds) for i in range(1, rounds + 1)]
        falling = sorted({max(size, round(kept)) for kept in sizes} - {len(start)}, reverse=True)
        path = sparsify(
            model,
            train,
            reduction.units,
            sizes=[kept / n for kept in falling],
            start=plain.with_circuit(start),
            metric=setting.metric,
            predict=False,
            seed=setting.seed,
            batch_size=setting.batch_size,
            first_token=reduction.first_token,
            progress=False,
        )
        plain = path.at(size / n)
    else:
        plain = plain.with_circuit(start)
    if not again or len(train) < 4:
        return plain
    fitted, held = halves(train, None)
    settings = {"metric": setting.metric, "seed": setting.seed, "batch_size": setting.batch_size}
    return refit(model, plain, fitted, held, progress=False, **settings)
