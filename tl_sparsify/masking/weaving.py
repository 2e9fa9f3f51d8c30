"""Weaving: of several orders of the same units one nested family of circuits, chosen by what circuits measure.

Circuits are listed from the largest to the smallest, as the rounds of a path are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.moments import Estimate
from tl_sparsify.search.exchanges import with_exchanged
from tl_sparsify.search.path import worse

Order = Int[Tensor, "units"]
Measure = Callable[[Sequence[Circuit]], list[Estimate]]
"""The measured risk of each circuit; what was measured once is known."""
Slopes = Callable[[Circuit], Float[Tensor, "units"]]
"""The derivative of a circuit's risk with respect to each unit's ``keep``."""
_LEAST = 1e-6  # nats; risks below it count as this
_SWEEPS, _MEASURED = 2, 3  # times that exchanges are offered; how many of those that are screened are measured


def together(orders: Sequence[Order]) -> Order:
    """The order of the sums of the places that units have in several orders."""
    return torch.stack([_places(order) for order in orders]).sum(0).argsort(stable=True)


def woven(full: Circuit, orders: Sequence[Order], sizes: Sequence[int], measure: Measure) -> list[Circuit]:
    """Circuits of these sizes: of every order alone, and of two ways that take at each size the better of the circuits
    of the two orders that do best there, from the largest on down and from the smallest on up, those with the lowest
    geometric mean of their risks."""
    empty = full - full
    alone = [[_filled(order, size, empty, full) for size in sizes] for order in orders]
    measure([circuit for circuits in alone for circuit in circuits])
    best_two = [
        [orders[i] for i in sorted(range(len(orders)), key=lambda i: measure([alone[i][place]])[0].mean)[:2]]
        for place in range(len(sizes))
    ]
    down, up = list[Circuit](), list[Circuit]()
    for size, two in zip(sizes, best_two, strict=True):
        around = down[-1] if down else full
        down.append(_lowest([_filled(order, size, empty, around) for order in two], measure))
    for size, two in reversed(list(zip(sizes, best_two, strict=True))):
        within = up[0] if up else empty
        up.insert(0, _lowest([_filled(order, size, within, full) for order in two], measure))

    def log_risks(circuits: list[Circuit]) -> float:
        return sum(math.log(max(found.mean, _LEAST)) for found in measure(circuits))

    return min([*alone, down, up], key=log_risks)


def with_exchanges(
    circuits: Sequence[Circuit],
    order: Order,
    kept: Circuit,
    count: int,
    *,
    measure: Measure,
    screen: Measure,
    slopes: Slopes,
) -> list[Circuit]:
    """Each circuit, or that with one unit exchanged which measures lowest, between the next smaller and the next larger
    one: of the ``count`` that the order would drop first, and of as many that the slopes of its risk would, those
    ``kept`` left out, for one of as many that they would take first. Where these are many pairs, those are measured
    that are lowest by ``screen``, which is cheaper. Twice: the second time around what had an exchange."""
    full, found, standing = Circuit.full(kept.units), list(circuits), _places(order)
    due = set(range(len(found)))
    for _ in range(_SWEEPS if count else 0):
        changed: set[int] = set()
        for place in sorted(due):
            here = found[place]
            smaller = found[place + 1] if place + 1 < len(found) else full - full
            larger = found[place - 1] if place else full
            leaving, entering = (side.mask.nonzero().flatten() for side in (here - smaller - kept, larger - here))
            if not len(leaving) or not len(entering):
                continue
            slope = slopes(here).cpu()
            out = _first(leaving, standing, count) | _first(leaving, -slope, count)
            back = _first(entering, -standing, count) | _first(entering, slope, count)
            offers = [with_exchanged(here, [pair]) for pair in itertools.product(out, back)]
            if len(offers) > _MEASURED:
                roughly = [one.mean for one in screen(offers)]
                offers = [offers[i] for i in sorted(range(len(offers)), key=roughly.__getitem__)[:_MEASURED]]
            found[place] = _lowest([here, *offers], measure)
            if found[place] != here:
                changed |= {place - 1, place, place + 1} & set(range(len(found)))
        due = changed
    return found


def grown(
    circuits: Sequence[Circuit], orders: Sequence[Order], around: Circuit, *, measure: Measure, slopes: Slopes
) -> list[Circuit]:
    """The same circuits, but that one which measures worse than the next smaller one is grown from it, within the next
    larger one (the first ``around``), where that measures lower: by an order, or by what does least of all to first
    order. (What would help most overshoots: on a deep model a circuit that is grown by it does far worse than the
    smaller one.)"""
    found = list(circuits)
    for place in reversed(range(len(found) - 1)):
        here, smaller = found[place : place + 2]
        if worse(*measure([here, smaller])):
            larger = found[place - 1] if place else around
            ways = [*orders, slopes(smaller).cpu().abs().argsort(stable=True).flip(0)]
            found[place] = _lowest([here, *(_filled(order, len(here), smaller, larger) for order in ways)], measure)
    return found


def followed(orders: Sequence[Order], circuits: Iterable[Circuit]) -> Order:
    """The order that keeps most of the circuits' units, each at its size."""
    last = [(circuit.mask, len(circuit)) for circuit in circuits]
    return max(orders, key=lambda order: sum(int(mask[order[len(order) - size :]].sum()) for mask, size in last))


def _lowest(circuits: list[Circuit], measure: Measure) -> Circuit:
    risks = [found.mean for found in measure(circuits)]
    return circuits[risks.index(min(risks))]


def _filled(order: Order, size: int, within: Circuit, around: Circuit) -> Circuit:
    """The units ``within``, and of those ``around`` them the last ones of an order: so many in all."""
    free = order[(around - within).mask[order]]
    return Circuit(within.units, within.mask.index_fill(0, free[len(free) - (size - len(within)) :], True))


def _first(some: Int[Tensor, "some"], by: Shaped[Tensor, "units"], count: int) -> dict[int, None]:
    """Of some units so many that come first, in this order."""
    return dict.fromkeys(some[by[some].argsort(stable=True)[:count]].tolist())


def _places(order: Order) -> Order:
    """Where each unit stands in an order."""
    return torch.empty_like(order).index_put((order,), torch.arange(len(order)))
