"""Masks: a number for every unit, trained so that the circuit of the greatest keeps the original output.

Each unit's ``keep`` is a gate in [0, 1], a function of its logit; the loss is the divergence from the original output
with every unit at ``value + keep * (v - value)``, by gradient descent on the logits. Two families:

    hard_concrete  each gate is drawn from a stretched, clipped logistic distribution, with a penalty on the expected
                   number of open gates (Louizos et al., arXiv 1712.01312; for circuits: subnetwork probing, Cao et al.,
                   arXiv 2104.03514, and edge pruning, Bhaskar et al., arXiv 2406.16778, here at the level of units);
    top_k_gate     the gates are ``sigmoid((logit - threshold) / temperature)`` with the threshold at which they sum to
                   ``k``, and ``k`` is drawn anew for every step: one training serves all sizes.

``sharpen`` starts the second from the order of a search: with few, large units a search's expansion says little, and
what it found is still a far better start than nothing.

A trained mask is judged by its circuit: between 0 and 1 a unit passes on a part of what it says, and a trained set of
parts can do what no set of whole units does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.ranks import gathered, share
from tl_sparsify.core.circuit import Circuit, FirstToken, Values
from tl_sparsify.core.distributions import paired_values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, check_call, frozen
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.measure import remembering, risk
from tl_sparsify.core.memory import device_of, dtype_of
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean
from tl_sparsify.search.path import CircuitPath, Round
from tl_sparsify.search.scores import Scores, kept_count

_EPOCHS = 80  # as many backward passes as sparsify takes with four probes and 20 rounds
_SHARPENING = 20  # passes over the data, where a path's order is the start
_LEAST = 1e-6  # nats; risks below it count as this
_PER_STEP = 256  # examples
_STRATA = 8  # sizes in a step
_JUDGED = 10  # times, on held-out examples
_SIZES = (0.5, 0.2, 0.1, 0.05, 0.02)  # at which they are judged
_LOW, _HIGH, _BETA = -0.1, 1.1, 2 / 3  # the stretch and the temperature of Louizos et al.

Gates = Callable[[Float[Tensor, "units"], Int[Tensor, "batch"], int], Float[Tensor, "batch units"]]
"""From the logits, the examples of a step and its number: each example's gates."""


@checked
def hard_concrete(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    penalty: float = 2.0,
    per_step: int = _PER_STEP,
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

    By default 160 forward and 80 backward passes over the data, in general ``2 steps per_step / n`` and half as many;
    one forward pass more for the means where not given, and 100 over ``held_out``.

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
    return _trained(model, examples, units, start, gates, opened, name="hard concrete", **settings)


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
    per_step: int = _PER_STEP,
    values: Values | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Sigmoid gates that sum to ``k``, one for each unit, trained by Adam on the divergence from the original output
    at random sizes ``k``. A unit's score is its logit.

    A gate is ``sigmoid((logit - threshold) / temperature)``; the threshold at which all gates sum to ``k`` is found by
    bisection, and the gradient goes through it implicitly, ``d threshold / d logit[u] = w[u] / sum w`` with ``w = gate
    (1 - gate)`` (T. Ahle, *Differentiable top-k*, 2022). Eight sizes ``k`` are drawn for every step, one in each eighth
    of the way from ``smallest`` to all of the units by logarithm; the examples take them in turn. Logits start at 0.

    Args:
        steps: of Adam, with a cosine schedule; where not given as many as make 80 passes over the data.
        temperature: of the gates. The lower, the nearer to a set of whole units.
        smallest: the smallest size, as a fraction of the units.
        per_step, values, held_out, metric, batch_size: as in :func:`hard_concrete`.

    By default 160 forward and 80 backward passes over the data, in general ``2 steps per_step / n`` and half as many;
    one forward pass more for the means where not given, and 100 over ``held_out``.

    Raises:
        ValueError: as in :func:`hard_concrete`; a ``temperature`` that is not positive, or ``smallest`` outside (0, 1].

    Example:
        >>> tls.baselines.top_k_gate(model, train, units, steps=3, progress=False).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    gates = _of_random_sizes(kept_count(len(units), smallest, "smallest"), len(units), temperature, seed)
    start = torch.zeros(len(units))
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "values": values}
    settings |= {"held_out": held_out, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    return _trained(model, examples, units, start, gates, None, name="top-k gate", **settings)


@checked
def sharpen(
    model: Model,
    path: CircuitPath,
    train: Examples,
    *,
    steps: int | None = None,
    learning_rate: float = 0.15,
    temperature: float = 0.2,
    per_step: int = _PER_STEP,
    always_keep: Circuit | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Train the gates of :func:`top_k_gate` from the order of a path, and return the better of the two paths: for few,
    large units (heads, edges, whole MLPs), which an expansion of second order says little about.

    Logits start evenly spaced from -1 to 1 in the path's order. Both paths are measured on ``held_out`` at the sizes of
    the path's rounds; the one with the lower geometric mean of its risks is returned, with these.

    Args:
        path: of constants or counterfactual values that were not refitted in its rounds (refit afterwards).
        steps: of Adam, with a cosine schedule; where not given as many as make 20 passes over ``train``.
        always_keep: units that stay in every circuit.
        held_out: where both are measured; ``train`` where not given.
        learning_rate, temperature, per_step, metric, batch_size: as in :func:`top_k_gate`.

    By default 40 forward and 20 backward passes over ``train``, in general ``2 steps per_step / n`` and half as many;
    two forward passes over ``held_out`` for each round, and one of the original model.

    Raises:
        ValueError: a model in training mode; a path by cost, or whose constants were refitted in its rounds; ``steps``
            or ``per_step`` below one; a ``learning_rate`` or ``temperature`` that is not positive.

    Example:
        >>> better = tls.sharpen(model, path, train, steps=3, progress=False)
        >>> better.to_frame()["kept"].tolist() == path.to_frame()["kept"].tolist()
        True
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if path.costs is not None:
        raise ValueError("path is ordered by costs, which a mask does not know: sharpen one of a search without costs")
    last, units = path.rounds[-1].reduction, path.units
    if last.refitted or last.mixing is not None:
        raise ValueError(
            f"path has {last.kind} values, fitted in its rounds: search with Refitting(0), and refit after"
        )
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    size = min(per_step, len(train))
    start = torch.empty(len(units))
    start[path.order] = torch.linspace(-1, 1, len(units))
    gates = _of_random_sizes(len(last.circuit), len(units), temperature, seed)
    steps = math.ceil(_SHARPENING * len(train) / max(1, size)) if steps is None else steps
    settings = {"steps": steps, "learning_rate": learning_rate, "per_step": per_step, "values": last.values}
    settings |= {"held_out": None, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    settings |= {"first_token": last.first_token}
    logits = _trained(model, train, units, start, gates, None, name="sharpened", **settings).scores.cpu().double()
    if always_keep is not None:
        logits = logits.masked_fill(always_keep.mask, float("inf"))
    judged, recall = train if held_out is None else held_out, remembering()
    unknown = Estimate(float("nan"), float("nan"), len(judged), "nats" if metric is None else "squared units")

    def measured(order: Int[Tensor, "units"]) -> CircuitPath:
        """The path of an order, at the sizes of the given one."""
        ordered, rounds = replace(path, order=order), list[Round]()
        for step in path.rounds:
            reduction = ordered.at(step.reduction.circuit.fraction)
            found = risk(model, reduction, judged, metric=metric, seed=seed, recall=recall, batch_size=batch_size)
            rounds.append(Round(reduction, unknown, found, float("nan")))
        return replace(ordered, rounds=tuple(rounds))

    both = [measured(path.order), measured(logits.argsort(stable=True))]
    return min(both, key=lambda one: sum(math.log(max(r.measured.mean, _LEAST)) for r in one.rounds))


def _of_random_sizes(least: int, most: int, temperature: float, seed: int) -> Gates:
    """Gates that sum to a size drawn for each step, one in each eighth of the way between the two by logarithm."""

    def gates(logits: Float[Tensor, "units"], index: Int[Tensor, "batch"], step: int) -> Float[Tensor, "batch units"]:
        u = (torch.arange(_STRATA) + _random.uniform(seed, 83, step, torch.arange(_STRATA))) / _STRATA
        k = (math.log(least) + u * math.log(most / least)).exp()
        return soft_top_k(logits, k.to(logits), temperature)[torch.arange(len(index)) % _STRATA]

    return gates


@checked
def soft_top_k(
    logits: Float[Tensor, "units"], k: Float[Tensor, "batch"], temperature: float
) -> Float[Tensor, "batch units"]:
    """Gates ``sigmoid((logits - threshold) / temperature)`` that sum to ``k``, for each ``k`` between 0 and all units
    (at all units they are 1), with the implicit gradient of the threshold. No model pass.

    Raises:
        ValueError: a ``k`` outside of that.
    """
    n = len(logits)
    if bool(((k <= 0) | (k > n)).any()):
        raise ValueError(
            f"k lies between {float(k.min()):g} and {float(k.max()):g}; it must be positive and at most {n}"
        )
    share = (k / n).clamp_max(1 - 1e-9)[:, None].double()
    with torch.no_grad():
        scaled = logits.double() / temperature
        low, high = scaled.min() - share.logit(), scaled.max() - share.logit()  # all gates above, all below k / n
        for _ in range(60):
            middle = (low + high) / 2
            more = (scaled - middle).sigmoid().sum(1, keepdim=True) > share * n
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        threshold = (low + high) / 2
        gate = (scaled - threshold).sigmoid()
        weight = gate * (1 - gate)
        weight = (weight / weight.sum(1, keepdim=True).clamp_min(1e-300)).to(logits)
    moved = (weight * (logits - logits.detach())).sum(1, keepdim=True)  # 0, with the threshold's gradient
    return ((logits - moved) / temperature - threshold.to(logits)).sigmoid()


def _trained(
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
) -> Scores:
    """The logits after training."""
    check_call(model, examples, seed=seed)
    for what, given in (("steps", steps), ("per_step", per_step)):
        if given is not None and check_count(what, given, least=None, most=MOST) < 1:
            raise ValueError(f"{what} is {given}; at least one is needed")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}; it must be positive")
    constants = mean(model, examples, units, batch_size=batch_size) if values is None else values
    if constants.units != units or not (constants.constant or constants.paired):
        raise ValueError(f"values are {constants!r}: give constants for {units!r}")
    size, together = min(per_step, len(examples)), batch_size_for(model, examples, batch_size)
    steps = math.ceil(_EPOCHS * len(examples) / size) if steps is None else steps
    per_epoch, every = len(examples) // size, max(1, steps // _JUDGED)
    wide = torch.float64 if dtype_of(model) == torch.float64 else torch.float32
    logits = start.to(device_of(model), wide).requires_grad_()
    best, lowest = logits.detach().clone(), float("inf")
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def slopes(index: Int[Tensor, "some"], keep: Float[Tensor, "some units"]) -> Iterator[Float[Tensor, "rows units"]]:
        for rows in torch.arange(len(index))[share(len(index))].split(together):
            batch, here = examples[index[rows]], units.for_examples(index[rows], examples.spans)
            mine = keep.detach()[rows].requires_grad_()
            with torch.no_grad():
                original = answer_logits(model, batch)
                values_here = paired_values(model, examples, index[rows], here) if constants.paired else constants
            removal = Intervention(here, mine, Values(here, values_here.tensors), first_token=first_token)
            with torch.enable_grad(), intervened(model, removal):
                loss = divergence(original, answer_logits(model, batch), batch, metric).sum() / len(index)
            yield torch.autograd.grad(loss, mine)[0]

    with frozen(model):
        for step in bar(range(steps), "training a mask", progress):
            order = _random.permutation(len(examples), seed, 89, step // per_epoch)
            index = order[(step % per_epoch) * size :][:size].sort().values
            with torch.enable_grad():
                keep = gates(logits, index, step)
            slope = torch.cat(gathered(slopes(index, keep), len(index)))
            with torch.enable_grad():
                loss = (keep * slope).sum() + (0 if penalty is None else penalty(logits))
            (logits.grad,) = torch.autograd.grad(loss, logits)
            optimizer.step()
            schedule.step()
            if held_out is not None and (step + 1) % every == 0:
                found = _judged(model, logits.detach(), units, constants, held_out, metric, batch_size)
                if found < lowest:
                    best, lowest = logits.detach().clone(), found
    scores = logits.detach() if held_out is None else best
    times = 3 if constants.paired else 2
    forward, backward = (math.ceil(times * steps * size / len(examples)) for times in (times, 1))
    unknown = torch.full_like(scores, float("nan"))
    return Scores(units, scores, unknown, name, "logit", forward + (values is None), backward)


def _judged(
    model: Model,
    logits: Float[Tensor, "units"],
    units: Units,
    values: Values,
    held_out: Examples,
    metric: Metric | None,
    batch_size: int | None,
) -> float:
    """The measured risk of the circuits of the greatest logits, averaged over sizes."""
    scores = Scores(units, logits, logits, "", "", 0, 0)
    circuits = [Reduction(scores.top(fraction), values) for fraction in _SIZES]
    found = (risk(model, circuit, held_out, metric=metric, batch_size=batch_size) for circuit in circuits)
    return sum(estimate.mean for estimate in found) / len(circuits)
