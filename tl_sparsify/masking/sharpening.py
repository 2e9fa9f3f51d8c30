"""Sharpening: the gates of the top-k mask, trained from the order of a search and from nothing, and exact exchanges.
With few, large units a search's expansion says little, and what it found is still a far better start than nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call, check_held_out
from tl_sparsify.core.measure import circuit_risks, remembered, remembering, risk_slopes
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import check_fingerprint
from tl_sparsify.core.units import Model
from tl_sparsify.masking.gates import of_random_sizes, relative_to_size
from tl_sparsify.masking.training import trained
from tl_sparsify.masking.weaving import followed, grown, together, with_exchanges, woven
from tl_sparsify.search.path import CircuitPath, Round, order_through
from tl_sparsify.search.scores import check_sizes, kept_count

_SHARPENING, _PER_STEP = 20, 32  # passes over the data; examples
_MOST_EXCHANGES = 32
_SCREENED = 4  # exchanges are screened on each fourth example


@checked
def sharpen(
    model: Model,
    path: CircuitPath,
    train: Examples,
    *,
    sizes: Sequence[float] | None = None,
    steps: int | None = None,
    learning_rate: float = 0.15,
    temperature: float = 0.2,
    relative: bool = False,
    per_step: int = _PER_STEP,
    exchanged: int = 2,
    always_keep: Circuit | None = None,
    held_out: Examples | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CircuitPath:
    """Train the gates of :func:`top_k_gate` twice, from the order of a path and from nothing, and weave the best path
    of these three orders and of what both masks say together: for few, large units (heads, edges, whole MLPs), which an
    expansion of second order says little about.

    Each training takes half of the steps. Logits start evenly spaced from -1 to 1 in the path's order, and at 0. The
    circuits of the four orders are measured on ``held_out`` at the sizes of the path's rounds. Two more paths take at
    each size the better of two circuits, by the two orders that do best there: one goes down from the largest circuit
    and leaves out more and more of it, the other grows from the smallest. Of the six paths that with the lowest
    geometric mean of its risks is taken.

    With ``sizes`` below the path's last circuit the path is gone on with instead: all steps train one mask inside of
    that circuit, from logits of 0 and at no size above it; those of all other units start below -4, in the path's
    order. Two orders are woven then, the path's and the mask's. On a deep model with few passes a search down to a
    fifth of the units is cheap and good; below that it takes most of its passes, and does worse than a mask.

    Each of its circuits is then offered exchanges, between the next smaller and the next larger one: one of the units
    that are the first to drop, for one of the first to take. These are the ``exchanged`` that both masks together say,
    and as many by the slope of the measured risk. Of more than three pairs the best three on each fourth example are
    measured on all, and the lowest is made, if it is lower than what was there. Once more around circuits that changed.
    A circuit that still measures worse than the next smaller one, by more than its standard error, is grown from that
    one within the next larger one, where that measures lower: by one of the orders, or by the units whose slopes say
    that they do least.

    Args:
        path: of constants or counterfactual values that were not refitted in its rounds (refit afterwards). Units that
            its ``start`` had removed already may come back. Where there are passes for masks, search it with
            ``exchanges=0``, and leave to them what rounds that are made again take (``benchmarks/sharpening.py``).
        sizes: of the circuits, as fractions of the units that fall; those of the path's rounds where not given.
        steps: of Adam, of both trainings together, each with a cosine schedule; where not given as many as make 20
            passes over ``train``.
        exchanged: units on either side of an exchange, by the masks and by the slope each; 0: none is made.
        always_keep: units that stay in every circuit.
        held_out: where they are measured; ``train`` where not given.
        learning_rate, temperature, relative, per_step, metric, batch_size: as in :func:`top_k_gate`.

    By default 21 forward and 20 backward passes over ``train``, in general ``steps per_step / n`` of both and one for
    the original's logits, as in :func:`top_k_gate`. Over ``held_out`` for each round at most eight forward passes (one
    for each circuit that differs), for its exchanges twice one forward and one backward pass and ``exchanged ** 2 + 3``
    forward passes, and at most six forward passes and a backward one where it is grown at last; and one of the original
    model, or two. Under counterfactual values a forward pass more for every backward pass, and one for each time that
    circuits are measured together: all of the four orders, and at most eight times for each round.

    Raises:
        ValueError: a model in training mode; a path by cost, or whose constants were refitted in its rounds; ``sizes``
            that do not fall, or outside of (0, 1]; more units to keep always than the smallest circuit has; ``steps``
            or ``per_step`` below one; ``exchanged`` below 0 or above 32; a ``learning_rate`` or ``temperature`` that is
            not positive.

    Example:
        >>> better = tls.sharpen(model, path, train, steps=3, progress=False)
        >>> better.to_frame()["kept"].tolist() == path.to_frame()["kept"].tolist()
        True
        >>> tls.sharpen(model, path, train, sizes=(0.5, 0.25), steps=3, progress=False).to_frame()["kept"].tolist()
        [6, 3]
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be positive")
    check_count("exchanged", exchanged, least=0, most=_MOST_EXCHANGES)
    if path.costs is not None:
        raise ValueError("path is ordered by costs, which a mask does not know: sharpen one of a search without costs")
    last, units = path.rounds[-1].reduction, path.units
    if last.refitted or last.mixing is not None:
        raise ValueError(
            f"path has {last.kind} values, fitted in its rounds: search with Refitting(0), and refit after"
        )
    check_call(model, train, units, seed=seed, batch_size=batch_size)
    check_held_out(units, held_out, train)
    check_fingerprint(model, last)
    if always_keep is not None and always_keep.units != units:
        raise ValueError(f"always_keep is a circuit over {always_keep.units!r}, not over {units!r}")
    kept = Circuit.empty(units) if always_keep is None else always_keep
    order = path.order[kept.mask[path.order].argsort(stable=True)]
    size, n = min(per_step, len(train)), len(units)
    counts = _counts(path, sizes)
    if len(kept) > counts[-1]:
        raise ValueError(f"always_keep has {len(kept)} units, the smallest circuit {counts[-1]}: keep fewer")
    within = len(last.circuit) if counts[-1] < len(last.circuit) else None
    gates = of_random_sizes(counts[-1], within or n, temperature, seed)
    steps = math.ceil(_SHARPENING * len(train) / max(1, size)) if steps is None else steps
    settings: dict[str, Any] = {"learning_rate": learning_rate, "per_step": per_step, "values": last.values}
    settings |= {"held_out": None, "metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    settings |= {"first_token": last.first_token, "name": "sharpened"}
    twice = steps * size > len(train)
    settings["original"] = remembered(model, train, batch_size=batch_size) if twice else None

    def trained_from(start: Float[Tensor, "units"], steps: int) -> Int[Tensor, "units"]:
        weighting = relative_to_size() if relative else None
        mask = trained(model, train, units, start, gates, None, steps=steps, weighting=weighting, **settings)
        return mask.scores.cpu().double().masked_fill(kept.mask, float("inf")).argsort(stable=True)

    orders = [order, trained_from(_logits(order, within), steps - (0 if within else steps // 2))]
    if not within and steps != 1:
        orders.append(trained_from(torch.zeros(n), steps // 2))
        orders.append(together(orders[1:]))
    judged = train if held_out is None else held_out
    measuring: dict[str, Any] = {"metric": metric, "recall": remembering(), "batch_size": batch_size}
    known: dict[Circuit, Estimate] = {}

    def measure(circuits: Sequence[Circuit]) -> list[Estimate]:
        new = list(dict.fromkeys(circuit for circuit in circuits if circuit not in known))
        known.update(zip(new, circuit_risks(model, last, new, judged, **measuring), strict=True))
        return [known[circuit] for circuit in circuits]

    some = torch.arange(0, len(judged), _SCREENED)
    there = last.for_examples(some)
    screening: dict[str, Any] = measuring | {"recall": remembering()}

    def screen(circuits: Sequence[Circuit]) -> list[Estimate]:
        offered = [Circuit(there.units, circuit.mask) for circuit in circuits]
        return circuit_risks(model, there, offered, judged[some], **screening)

    def slopes(circuit: Circuit) -> Float[Tensor, "units"]:
        return risk_slopes(model, last.with_circuit(circuit), judged, **measuring)

    circuits = woven(Circuit.full(units), orders, counts, measure)
    offering: dict[str, Any] = {"measure": measure, "screen": screen, "slopes": slopes}
    circuits = with_exchanges(circuits, orders[-1], kept, exchanged, **offering)
    # where a path is gone on with, its order says what its largest circuit may be grown by
    outermost = counts[0] if within else n
    around = torch.zeros(n, dtype=torch.bool).index_fill(0, order[n - outermost :], True)
    circuits = grown(circuits, orders, Circuit(units, around), measure=measure, slopes=slopes)
    unknown = Estimate(float("nan"), float("nan"), len(judged), "nats" if metric is None else "squared units")
    found = {step.reduction.circuit: step for step in path.rounds}
    rounds: list[Round] = []
    for circuit in circuits:
        step = found.get(circuit)
        predicted, additivity = (unknown, float("nan")) if step is None else (step.predicted, step.additivity)
        rounds.append(Round(last.with_circuit(circuit), predicted, known[circuit], additivity))
    return replace(path, order=order_through(followed(orders, circuits), rounds), rounds=tuple(rounds))


def _counts(path: CircuitPath, sizes: Sequence[float] | None) -> list[int]:
    """How many units each circuit keeps, from the largest on; sizes of the same number are one circuit."""
    if sizes is None:
        return [len(step.reduction.circuit) for step in path.rounds]
    check_sizes(sizes)
    return list(dict.fromkeys(kept_count(len(path.units), size) for size in sizes))


def _logits(order: Int[Tensor, "units"], within: int | None) -> Float[Tensor, "units"]:
    """Where a mask starts: evenly spaced from -1 to 1 in an order, or at 0 for so many units that are kept longest and
    from -5 to -4 for the rest, whose gates are shut by then, and which can still come back."""
    logits, n = torch.zeros(len(order)), len(order)
    spaced = torch.linspace(-1, 1, n) if within is None else torch.linspace(-5, -4, n - within)
    logits[order[: len(spaced)]] = spaced
    return logits
