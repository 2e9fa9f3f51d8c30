"""Minimality: whether a kept unit, or a pair of them, can leave within the tolerance.

The joint expansion around the circuit ranks all units and all pairs; those that it finds cheapest are removed and
measured on one half of the examples, and the cheapest of these is reported on the other half. A circuit to which idle
units were added on purpose goes through the same: there they must be found.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.expansion.linearisation import linearise
from tl_sparsify.stressing.measuring import Setting, added, halves, measured, removing, without
from tl_sparsify.stressing.table import Stand, StressRow

_POOL = 512  # units among which pairs are looked for


def minimality(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    setting: Setting,
    *,
    train: Examples | None = None,
    shortlist: int = 24,
) -> tuple[StressRow, ...]:
    """The least that the removal of one kept unit, and of a pair, adds to the risk, beside that of a circuit with idle
    units added on purpose.

    The claim, that nothing can leave, holds where the least rise is above the tolerance and the added units were found
    (the least rise of the padded circuit is within it). It fails where the least rise is within the tolerance: what can
    leave is at hand.

    Args:
        train: what is chosen on; every other example where not given.
        shortlist: candidates of each kind that are measured, the cheapest by the expansion. A unit that the expansion
            thinks dear is not measured: the claim is about the shortlist where there are more units than it holds.

    Cost: about ``4 shortlist + setting.draws`` forward passes over one half, and eight forward and ten backward passes
    for the expansions.
    """
    chosen, reported = halves(examples, train)
    if reduction.mixing is not None:
        raise ValueError("reduction has affine replacements, which are fitted for its own circuit: give its constants")
    if not len(reduction.circuit):
        return ()
    rows: list[StressRow] = []
    for size in (1, 2):
        if len(reduction.circuit) < size or len(reduction.units) - len(reduction.circuit) < size:
            continue
        with counted(model) as passes:
            padded = with_idle(model, reduction, chosen, size, setting)
            mine = cheapest(model, reduction, chosen, size, shortlist, setting)
            theirs = cheapest(model, padded, chosen, size, shortlist, setting)
            base, found = reduction.circuit, without(reduction.circuit, mine)
            circuits = [base, found, padded.circuit, without(padded.circuit, theirs)]
            columns = measured(model, [removing(reduction, one, reported) for one in circuits], reported, setting)
        rise, (low, high) = columns.rise(1, 0)
        control, around = columns.rise(3, 2)
        names = " and ".join(reduction.units.names[i] for i in mine)
        plus = " and ".join((padded.circuit - base).names)
        caught = around[1] <= setting.tolerance
        if high <= setting.tolerance:
            stand, why = Stand.FAILS, f"{names} can leave"
        elif not caught:
            stand, why = Stand.UNKNOWN, f"to take {plus}, added on purpose, away again costs more"
        elif low > setting.tolerance:
            stand, why = Stand.HOLDS, f"the cheapest is {names}; found was {plus}, added on purpose"
        else:
            stand, why = Stand.UNKNOWN, f"the cheapest is {names}, about the tolerance"
        rows.append(
            StressRow(
                row="minimality",
                case="one unit" if size == 1 else "a pair",
                claim=f"no {'unit' if size == 1 else 'pair'} can leave within {setting.tolerance:g} {setting.unit}",
                value=rise,
                low=low,
                high=high,
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
        )
    return tuple(rows)


def with_idle(model: Model, reduction: Reduction, examples: Examples, count: int, setting: Setting) -> Reduction:
    """The reduction with so many units more: of as many random removed ones as ``setting.draws``, those that change the
    risk least. One forward pass for each."""
    gone = (~reduction.circuit.mask).nonzero().flatten()
    drawn = gone[_random.uniform(setting.seed, 113, gone).argsort(stable=True)[: max(count, setting.draws)]]
    plus = [added(reduction.circuit, [unit]) for unit in drawn.tolist()]
    removals = [removing(reduction, circuit, examples) for circuit in (reduction.circuit, *plus)]
    found = measured(model, removals, examples, replace(setting, bootstrap=0)).mean
    least = (found[1:] - found[0]).abs().argsort(stable=True)[:count]
    return reduction.with_circuit(added(reduction.circuit, drawn[least].tolist()))


def cheapest(
    model: Model, reduction: Reduction, examples: Examples, size: int, shortlist: int, setting: Setting
) -> tuple[int, ...]:
    """The kept unit, or the pair, whose removal adds least to the measured risk on these examples, of the ``shortlist``
    that the expansion finds cheapest."""
    candidates = ranked(model, reduction, examples, size, setting)[:shortlist].tolist()
    circuits = [reduction.circuit, *(without(reduction.circuit, units) for units in candidates)]
    removals = [removing(reduction, circuit, examples) for circuit in circuits]
    found = measured(model, removals, examples, replace(setting, bootstrap=0)).mean
    return tuple(candidates[int(found[1:].argmin())])


def ranked(
    model: Model, reduction: Reduction, examples: Examples, size: int, setting: Setting
) -> Int[Tensor, "candidates size"]:
    """Kept units (``size`` 1) or pairs of them (2) in order of what the joint expansion around the circuit says that
    their removal adds to the risk, the cheapest first. Pairs are of the 512 cheapest units.

    Cost: two forward and five backward passes.
    """
    whole = len(reduction.circuit) == len(reduction.units)
    parts = samples(
        model,
        examples,
        reduction,
        current=None if whole else reduction,
        metric=setting.metric,
        seed=setting.seed,
        batch_size=setting.batch_size,
    )
    found = linearise(parts, len(examples), seed=setting.seed)
    kept = reduction.circuit.mask.nonzero().flatten()
    matrix, linear = found.matrix.double().cpu()[:, kept], found.linear.double().cpu()[kept]
    alone = linear + matrix.square().sum(0) / 2
    order = alone.argsort(stable=True)
    if size == 1:
        return kept[order][:, None]
    some = order[:_POOL]
    both: Float[Tensor, "some some"] = alone[some][:, None] + alone[some] + matrix[:, some].T @ matrix[:, some]
    first, second = torch.triu_indices(len(some), len(some), 1)
    best = both[first, second].argsort(stable=True)
    return torch.stack([kept[some[first[best]]], kept[some[second[best]]]], 1)
