"""Specificity: whether a circuit is this task's own, or what the model needs for anything.

The circuit itself is removed and everything else kept. On its own task that should do more harm than removing random
circuits of the same kinds and layers; on other tasks it should not (arXiv 2605.08348).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.stressing.measuring import Measured, Setting, alike, measured, removing
from tl_sparsify.stressing.table import Stand, StressRow


def specificity(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    others: Mapping[str, Examples],
    setting: Setting,
) -> tuple[StressRow, ...]:
    """The risk on other tasks with the circuit removed, beside that with random circuits removed that have as many
    units of each kind in each layer.

    The claim holds of a task where removing the circuit does no more than the tolerance above what removing random
    circuits does, *and* on the circuit's own task it does more: a circuit whose removal harms nothing is specific to
    nothing. It fails where removing the circuit certainly harms the other task more than random ones do. Where removing
    random circuits already ruins the model for the other task as much as anything can, nothing is told; the control's
    figure shows that.

    Removed units take the reduction's constants, those of its own task, in the circuit and in random ones alike.

    Cost: ``setting.draws + 2`` forward passes over each set of examples, its own too. The passes of a line are over its
    own task's examples.

    Raises:
        ValueError: a reduction with affine replacements, which belong to its own circuit.
    """
    if reduction.mixing is not None:
        raise ValueError("reduction has affine replacements, which are fitted for its own circuit: give its constants")
    if not 0 < len(reduction.circuit) < len(reduction.units):
        return ()
    draws = [alike(reduction.circuit, setting.seed, draw) for draw in range(setting.draws)]
    many = max(1, len(draws))
    more = torch.tensor([1.0] + [-1 / many] * len(draws))  # the circuit's less the mean of random ones

    def without(on: Examples) -> Measured:
        removals = [removing(reduction.with_circuit(~one), ~one, on) for one in (reduction.circuit, *draws)]
        return measured(model, removals, on, setting)

    own = without(examples)
    needed, (needed_low, _) = own.interval(more)
    rows: list[StressRow] = []
    for name, on in others.items():
        with counted(model) as passes:
            found = without(on)
        value, between = found.column(0)
        control, around = found.interval(torch.tensor([0.0] + [1 / many] * len(draws)))
        rise, (low, high) = found.interval(more)
        if not needed_low > setting.tolerance:
            stand, why = Stand.UNKNOWN, f"on its own task it does no more than random circuits ({needed:.3g} more)"
        elif low > setting.tolerance:
            stand, why = Stand.FAILS, f"{rise:.3g} more than random circuits"
        elif high <= setting.tolerance:
            stand, why = Stand.HOLDS, f"on its own task {needed:.3g} more than random circuits, here {rise:.3g}"
        else:
            stand, why = Stand.UNKNOWN, f"{rise:.3g} more than random circuits, about the tolerance"
        rows.append(
            StressRow(
                row="specificity",
                case=name,
                claim="removing the circuit harms this task no more than removing random circuits like it",
                value=value,
                low=between[0],
                high=between[1],
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
