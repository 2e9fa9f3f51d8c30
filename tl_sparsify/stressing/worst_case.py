"""Worst case: how bad removed units can be made when they come back in part.

A circuit that is the whole story has the same risk whatever the units outside it are mixed to between their values and
their replacements. Projected gradient ascent looks for the mixture, a ``keep`` in [0, 1] for each removed unit, that
does most harm: one for all examples, chosen on some and reported on others, and one for each example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import summed
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, frozen, shared_batches
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.metrics import divergence
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.stressing.measuring import (
    Measured,
    Removal,
    Setting,
    alike,
    averaged,
    halves,
    measured,
    removing,
    softened,
)
from tl_sparsify.stressing.table import Stand, StressRow

FACTOR = 2.0
"""Times the measured risk: the worst case may come to that without a complaint."""
Keep = Float[Tensor, "*batch units"]


def worst_case(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    setting: Setting,
    *,
    train: Examples | None = None,
    starts: int = 8,
    steps: int = 6,
) -> tuple[StressRow, ...]:
    """The greatest risk over ``keep`` in [0, 1] of the removed units that ascent finds, beside the greatest of as many
    random masks.

    The claim holds where the worst case is at most the measured risk and the tolerance, or :data:`FACTOR` times the
    risk, *and* two controls behave: ascent did at least as well as the random masks (where it did not, it is no
    search), and random circuits of as many units of each kind in each layer have a higher risk than this one at its
    worst (where they have not, the circuit is so bad that nothing makes it worse). It fails where a mask was found that
    does more; that mask needs no control.

    Args:
        train: what the shared mask is chosen on; every other example where not given.
        starts: of the ascent: the reduction itself, and random masks.
        steps: of the ascent from each start, of signed gradients, ever shorter.

    Cost: about ``2 starts steps`` forward and ``starts steps`` backward passes for each case, ``starts steps`` forward
    passes for its random masks, and one for each of ``setting.draws`` random circuits.
    """
    gone = ~reduction.circuit.mask
    if not bool(gone.any()):
        return ()
    chosen, reported = halves(examples, train)
    tries = starts * steps
    with counted(model) as passes:
        keep = _ascended(model, reduction, chosen, setting, starts, steps)
        at_random = _worst_random(model, reduction, chosen, setting, tries)
        masks = [softened(reduction, mask, reported) for mask in (keep, at_random)]
        own = removing(reduction, reduction.circuit, reported)
        found = measured(model, [own, *masks, *_others(reduction, reported, setting)], reported, setting)
    some = keep[gone] > 0.5
    told = f"{int(some.sum())} of {len(some)} removed units more than half there"
    rows = [_row("one mask for all examples", found, told, passes, setting)]
    with counted(model) as passes:

        def columns(batch: Examples, index: Int[Tensor, "batch"]) -> Float[Tensor, "batch columns"]:
            return _each(model, reduction, reported, batch, index, setting, starts, steps)

        with frozen(model):
            found = averaged(model, columns, reported, setting, differentiated=reduction.units)
    return (*rows, _row("a mask for each example", found, "each example its own", passes, setting))


def _others(reduction: Reduction, examples: Examples, setting: Setting) -> list[Removal]:
    """Random circuits of as many units of each kind in each layer."""
    plain = replace(reduction, mixing=None)
    circuits = [alike(reduction.circuit, setting.seed, draw) for draw in range(setting.draws)]
    return [removing(plain.with_circuit(circuit), circuit, examples) for circuit in circuits]


def _row(case: str, found: Measured, told: str, passes: dict[str, int], setting: Setting) -> StressRow:
    """A line from columns: the measured risk, the worst case, the worst of the random masks, random circuits."""
    many = len(found.mean) - 3
    _, (_, high) = found.rise(1, 0)
    _, (_, most) = found.interval(torch.tensor([-FACTOR, 1.0] + [0.0] * (1 + many)))
    witness = 1 if float(found.mean[1]) >= float(found.mean[2]) else 2  # a random mask may be one
    rise, (low, _) = found.rise(witness, 0)
    _, (least, _) = found.interval(torch.tensor([-FACTOR, 2.0 - witness, witness - 1.0] + [0.0] * many))
    _, (above, _) = found.interval(torch.tensor([0.0, -1.0, 0.0] + [1 / max(1, many)] * many))
    risk, worst, control, *others = found.mean.tolist()
    stand, why = Stand.UNKNOWN, "the interval reaches both sides"
    if low > setting.tolerance and least > 0:
        stand, why = Stand.FAILS, f"{rise:.3g} above the measured risk {risk:.3g}"
    elif worst < control - setting.tolerance:
        why = "random masks do more harm than ascent found: it is no search"
    elif not above > setting.tolerance:
        why = f"random circuits are no worse ({sum(others) / max(1, many):.3g}): there is nothing to make worse"
    elif high <= setting.tolerance or most <= 0:
        stand, why = Stand.HOLDS, f"the measured risk is {risk:.3g}"
    _, between = found.column(1)
    _, around = found.column(2)
    return StressRow(
        row="worst case",
        case=case,
        claim=f"mixing removed units back in does not more than {FACTOR:g} times the risk, or the tolerance",
        value=worst,
        low=between[0],
        high=between[1],
        control=control,
        control_low=around[0],
        control_high=around[1],
        unit=setting.unit,
        stand=stand,
        because=f"{why}; {told}",
        n=found.n,
        forward=passes["forward"] / found.n,
        backward=passes["backward"] / found.n,
    )


def _first(gone: Bool[Tensor, "units"], setting: Setting, start: int, index: Int[Tensor, "batch"] | None) -> Keep:
    """Where ascent begins: the reduction itself, then random masks, of each example its own where ``index`` is given.

    The even ones are uniform in [0, 1], the odd ones at the corners."""
    units = torch.arange(len(gone))
    where = (units,) if index is None else (index[:, None], units)
    drawn = _random.uniform(setting.seed, 107, start, *where)
    if start == 0:
        drawn = torch.zeros_like(drawn)
    elif start % 2:
        share = _random.uniform(setting.seed, 109, start, *where[:-1], 0) if index is not None else 0.5
        drawn = (drawn < share).double()
    return torch.where(gone, drawn, 1.0).float()


def _slope(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    batch: Examples,
    index: Int[Tensor, "batch"],
    original: Float[Tensor, "rows choices"],
    keep: Keep,
    setting: Setting,
) -> tuple[Float[Tensor, "batch"], Keep]:
    """Each example's divergence under a mask, and the gradient of their sum."""
    leaf = keep.detach().requires_grad_()
    here = replace(ablate(reduction.for_examples(index, examples.spans)), keep=leaf)
    with torch.enable_grad(), intervened(model, here):
        found = divergence(original, answer_logits(model, batch), batch, setting.metric)
        (slope,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True)
    return found.detach().double().cpu(), torch.zeros_like(leaf) if slope is None else slope.detach()


def _stepped(keep: Keep, slope: Keep, gone: Bool[Tensor, "units"], step: int, steps: int) -> Keep:
    """One step of ascent, back into [0, 1]."""
    length = 0.5 * (1 - step / steps)
    return torch.where(gone, (keep + length * slope.sign()).clamp(0, 1), keep)


def _ascended(
    model: Model, reduction: Reduction, examples: Examples, setting: Setting, starts: int, steps: int
) -> Float[Tensor, "units"]:
    """The one mask that ascent found worst on these examples."""
    gone, n = ~reduction.circuit.mask, len(examples)

    def looked(keep: Float[Tensor, "units"]) -> tuple[float, Float[Tensor, "units"]]:
        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in shared_batches(model, examples, setting.batch_size, reduction.units):
                with torch.no_grad():
                    original = answer_logits(model, batch)
                found, slope = _slope(model, reduction, examples, batch, index, original, keep, setting)
                yield found.sum(), slope.double().cpu()

        total, slope = summed(parts(), n)
        return float(total) / n, slope.to(keep)

    best, most = torch.where(gone, 0.0, 1.0), float("-inf")
    with frozen(model):
        for start in range(starts):
            keep = _first(gone, setting, start, None)
            for step in range(steps):
                found, slope = looked(keep)
                if found > most:
                    best, most = keep, found
                keep = _stepped(keep, slope, gone, step, steps)
    return best


def _worst_random(
    model: Model, reduction: Reduction, examples: Examples, setting: Setting, tries: int
) -> Float[Tensor, "units"]:
    """The one of some random masks that is worst on these examples."""
    gone = ~reduction.circuit.mask
    masks = [_first(gone, setting, 1000 + number, None) for number in range(tries)]
    removals = [softened(reduction, mask, examples) for mask in masks]
    found = measured(model, removals, examples, replace(setting, bootstrap=0))
    return masks[int(found.mean.argmax())]


def _each(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    batch: Examples,
    index: Int[Tensor, "batch"],
    setting: Setting,
    starts: int,
    steps: int,
) -> Float[Tensor, "batch columns"]:
    """For each example of a batch its divergence, the worst by ascent on a mask of its own, and by random masks, and
    those of random circuits."""
    gone = ~reduction.circuit.mask
    original = answer_logits(model, batch)
    plain = worst = at_random = torch.zeros(0)
    for start in range(starts):
        keep = _first(gone, setting, start, index)
        for step in range(steps):
            found, slope = _slope(model, reduction, examples, batch, index, original, keep, setting)
            if start == step == 0:
                plain = worst = found
            worst = torch.maximum(worst, found)
            keep = _stepped(keep, slope, gone, step, steps)
    for number in range(starts * steps):
        mask = _first(gone, setting, 1000 + number, index)
        with intervened(model, replace(ablate(reduction.for_examples(index, examples.spans)), keep=mask)):
            found = divergence(original, answer_logits(model, batch), batch, setting.metric).double().cpu()
        at_random = found if not len(at_random) else torch.maximum(at_random, found)
    others: list[Float[Tensor, "batch"]] = []
    for removal in _others(reduction, examples, setting):
        with intervened(model, removal(index)):
            others.append(divergence(original, answer_logits(model, batch), batch, setting.metric).double().cpu())
    return torch.stack([plain, worst, at_random, *others], 1)
