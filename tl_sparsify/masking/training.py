"""Masks: a number for every unit, trained so that the circuit of the greatest keeps the original output.

Each unit's ``keep`` is a gate in [0, 1], a function of its logit; the loss is the divergence from the original output
with every unit at ``value + keep * (v - value)``, by gradient descent on the logits. A module each:

    hard_concrete           gates drawn from a stretched, clipped logistic distribution, a penalty on open ones;
    top_k_gate              gates that sum to a size drawn anew for every step;
    information_bottleneck  gates between value and noise, a penalty on the information that they let through;
    sharpening              the second from the order of a search;
    weaving                 one path of several orders.

A trained mask is judged by its circuit: between 0 and 1 a unit passes on a part of what it says, and a trained set of
parts can do what no set of whole units does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.ranks import gathered, share
from tl_sparsify.core.circuit import FirstToken, Values
from tl_sparsify.core.distributions import paired_values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, check_call, check_held_out, frozen, halving
from tl_sparsify.core.intervene import Intervention
from tl_sparsify.core.measure import circuit_risks, remembered, remembering, with_slopes
from tl_sparsify.core.memory import device_of, keep_dtype_of
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.masking.gates import Gates, Weighting
from tl_sparsify.search.constants import mean
from tl_sparsify.search.scores import Scores

PER_STEP = 256  # examples
_EPOCHS = 80  # as many backward passes as sparsify takes with four probes and 20 rounds
_JUDGED = 10  # times, on held-out examples
_SIZES = (0.5, 0.2, 0.1, 0.05, 0.02)  # at which they are judged

Known = Callable[[Int[Tensor, "some"]], Float[Tensor, "rows choices"]]
"""The original's logits for some of the examples."""
Replacements = Callable[[Int[Tensor, "batch"], Units, int], Values]
"""From some examples, the units there and a step's number: what closed gates set the units to."""


def trained(
    model: Model,
    examples: Examples,
    units: Units,
    start: Float[Tensor, "units"],
    gates: Gates,
    penalty: Callable[[Float[Tensor, "units"]], Float[Tensor, ""]] | None,
    *,
    steps: int | None,
    learning_rate: float,
    per_step: int,
    values: Values | None,
    held_out: Examples | None,
    metric: Metric | None,
    seed: int,
    batch_size: int | None,
    progress: bool,
    name: str,
    first_token: FirstToken = "bos",
    replaced: Replacements | None = None,
    weighting: Weighting | None = None,
    original: Known | None = None,
) -> Scores:
    """The logits after training; where ``replaced`` is given closed gates set units to that, not to ``values``. All
    examples of a step count alike unless a ``weighting`` says otherwise. Where more examples are seen than there are,
    the original's logits come from one pass over all (:func:`remembered`), or from the caller's, ``original``."""
    check_call(model, examples, units, seed=seed)
    check_held_out(units, held_out, examples)
    for what, given in (("steps", steps), ("per_step", per_step)):
        if given is not None and check_count(what, given, least=None, most=MOST) < 1:
            raise ValueError(f"{what} is {given}; at least one is needed")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}; it must be positive")
    constants = mean(model, examples, units, batch_size=batch_size) if values is None else values
    if constants.units != units or not (constants.constant or constants.paired):
        raise ValueError(f"values are {constants!r}: give constants for {units!r}")
    size, together = min(per_step, len(examples)), batch_size_for(model, examples, batch_size, units)
    steps = math.ceil(_EPOCHS * len(examples) / size) if steps is None else steps
    per_epoch, every = len(examples) // size, math.ceil(steps / _JUDGED)
    many = steps * size > len(examples)
    known = remembered(model, examples, batch_size=batch_size) if many and original is None else original
    logits = start.to(device_of(model), keep_dtype_of(model)).requires_grad_()
    best, lowest = logits.detach().clone(), float("inf")
    judging: dict[str, Any] = {"metric": metric, "batch_size": batch_size, "recall": remembering()}
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def slopes(
        index: Int[Tensor, "some"], keep: Float[Tensor, "some units"], step: int
    ) -> Iterator[tuple[Float[Tensor, "rows units"], Float[Tensor, "rows"]]]:
        def of(rows: Int[Tensor, "batch"], batch: Examples) -> tuple[Tensor, Tensor]:
            some, here = index[rows], units.for_examples(index[rows], examples.spans)
            with torch.no_grad():
                of_original = answer_logits(model, batch) if known is None else known(some)
                if replaced is not None:
                    values_here = replaced(some, here, step)
                else:
                    values_here = paired_values(model, examples, some, here) if constants.paired else constants
            removed = Intervention(here, keep[rows], Values(here, values_here.tensors), first_token=first_token)
            found, slope = with_slopes(model, removed, batch, lambda ours: divergence(of_original, ours, batch, metric))
            return slope / len(index), found

        for rows in torch.arange(len(index))[share(len(index))].split(together):
            yield from halving(of, rows, examples[index[rows]], batch_size)

    with frozen(model):
        for step in bar(range(steps), "training a mask", progress):
            order = _random.permutation(len(examples), seed, 89, step // per_epoch)
            index = order[(step % per_epoch) * size :][:size]
            if size < len(examples):  # else in random order: gates may depend on an example's place
                index = index.sort().values
            with torch.enable_grad():
                keep = gates(logits, index, step)
            rows = gathered(slopes(index, keep, step), len(index))
            slope = torch.cat([one for one, _ in rows])
            if weighting is not None:
                slope = slope * weighting(torch.cat([found for _, found in rows]), step).to(slope)[:, None]
            with torch.enable_grad():
                loss = (keep * slope).sum() + (0 if penalty is None else penalty(logits))
            (logits.grad,) = torch.autograd.grad(loss, logits)
            optimizer.step()
            schedule.step()
            if held_out is not None and ((step + 1) % every == 0 or step + 1 == steps):
                found = _judged(model, logits.detach(), constants, held_out, first_token, **judging)
                if found < lowest:
                    best, lowest = logits.detach().clone(), found
    scores = logits.detach() if held_out is None else best
    times = 1 + (known is None) + constants.paired
    forward, backward = (math.ceil(times * steps * size / len(examples)) for times in (times, 1))
    forward += known is not None and original is None
    unknown = torch.full_like(scores, float("nan"))
    return Scores(units, scores, unknown, name, "logit", forward + (values is None), backward)


def _judged(
    model: Model,
    logits: Float[Tensor, "units"],
    values: Values,
    held_out: Examples,
    first_token: FirstToken,
    **judging: Any,
) -> float:
    """The measured risk of the circuits of the greatest logits, averaged over sizes."""
    scores = Scores(values.units, logits, logits, "", "", 0, 0)
    circuits = [scores.top(fraction) for fraction in _SIZES]
    different = list(dict.fromkeys(circuits))
    reduction = Reduction(circuits[0], values, first_token=first_token)
    found = dict(zip(different, circuit_risks(model, reduction, different, held_out, **judging), strict=True))
    return sum(found[circuit].mean for circuit in circuits) / len(circuits)
