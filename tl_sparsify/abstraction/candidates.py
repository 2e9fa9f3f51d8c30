"""Candidates: the sets of units that a search for a variable tries, and in which order.

A variable that sits at several places at once is carried by no one of them. Each place alone is then right on the pairs
on which the others happen not to matter, so that places which belong together are right on different pairs: unions are
tried in the order of how many pairs one of their parts at least gets right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify.abstraction.interchange import TestedModel
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit, Units

_MOST_PARTS = 5  # sets in a union


@dataclass(frozen=True)
class Group:
    """Units of one site at one position, or at all of them.

    Attributes:
        promising: those with a positive effect, the most promising first.
        whole: all of the site's.
    """

    promising: list[Unit]
    whole: list[Unit]


def grouped(
    units: Units, effects: Sequence[Float[Tensor, "pos _"]], subject: TestedModel, held: Bool[Tensor, "#pos"]
) -> list[Group]:
    """Sites at each position that every pair has, and at all of them, in the order of what their promising units
    promise together; the one of the highest effect where none is positive."""
    found: list[tuple[float, Group]] = []
    for site, effect in zip(units.sites, effects, strict=True):
        had = [i for i in range(site.size) if subject.has(Unit(site, i))]
        places = _places(site, len(effect))
        each = [place for place in places if bool(held.expand(len(effect))[place])]
        rows = {site.positions if len(effect) == 1 else position: effect[position] for position in each}
        total = effect[places].clamp_min(0).sum()
        if len(places) > 1 and effect[places].clamp_min(0).sum(1).max() < 0.9 * total:  # else the one place says it all
            rows[site.positions] = effect[places].sum(0)
        for where, row in rows.items():
            order = sorted(had, key=lambda i, row=row: -float(row[i]))
            order = order[: max(1, int((row[had] > 0).sum()))]
            if order:
                group = Group([Unit(site, i).at(where) for i in order], [Unit(site, i).at(where) for i in had])
                found.append((float(row[order].sum()), group))
    if not found:
        raise ValueError("the reduction keeps none of the units: nothing to align with")
    found.sort(key=lambda pair: -pair[0])
    return [group for promise, group in found if promise > 0] or [found[0][1]]


def candidates(groups: Sequence[Group]) -> list[list[Unit]]:
    """What to try, the most promising group and the plainest sets first: all promising units of a group, the first of
    them alone, all units of the site, then shares of the promising ones."""
    found: list[tuple[float, list[Unit]]] = []
    for rank, group in enumerate(groups):
        found += [(rank, group.promising), (rank + 1.5, group.promising[:1]), (rank + 2, group.whole)]
        found += [(rank + 3 + i, group.promising[:size]) for i, size in enumerate(_sizes(len(group.promising))[1:-1])]
    ordered = [tuple(units) for _, units in sorted(found, key=lambda pair: pair[0])]
    return [list(units) for units in dict.fromkeys(ordered)]


def unions(
    tried: Mapping[tuple[Unit, ...], Bool[Tensor, "n"]], weights: Float[Tensor, "n"], count: int
) -> list[list[Unit]]:
    """At most ``count`` unions of sets that were tried, most promising first: two sets, by the weight of the pairs that
    at least one of them gets right, and those two with others that add most to it. None that was tried; of
    sets that are right on the same pairs only the smallest takes part.

    Cost: a product of matrices over sets and pairs; no model pass.
    """
    alike: dict[tuple[bool, ...], tuple[Unit, ...]] = {}
    for some in sorted(tried, key=len):
        alike.setdefault(tuple(tried[some].tolist()), some)
    sets = list(alike.values())
    hits = torch.stack([tried[some] for some in sets]).to(weights)
    both = (hits * weights) @ hits.T
    alone = both.diagonal()
    covered = alone[:, None] + alone - both
    units = [frozenset(some) for some in sets]
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(sets)), 2)
        if not (units[i] <= units[j] or units[j] < units[i])
    ]
    pairs.sort(key=lambda pair: (-float(covered[pair]), len(units[pair[0]] | units[pair[1]])))
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for rank, pair in enumerate(pairs[:count]):
        found += [(rank + len(parts) - 2, rank, parts) for parts in _covering(hits, weights, pair)]
    known, joined = set(map(frozenset, tried)), dict[frozenset[Unit], list[Unit]]()
    for _, _, parts in sorted(found):
        union = list(dict.fromkeys(unit for part in parts for unit in sets[part]))
        if frozenset(union) not in known:
            joined.setdefault(frozenset(union), union)
    return list(joined.values())[:count]


def _covering(
    hits: Float[Tensor, "sets n"], weights: Float[Tensor, "n"], pair: tuple[int, int]
) -> list[tuple[int, ...]]:
    """A pair of sets, and the same with one more after the other, each the one that adds most to what is right."""
    found: list[tuple[int, ...]] = [pair]
    missed = (1 - hits[list(pair)].amax(0)) * weights
    while len(found[-1]) < _MOST_PARTS:
        added = hits @ missed
        best = int(added.argmax())
        if not added[best] > 0:
            break
        found.append((*found[-1], best))
        missed = missed * (1 - hits[best])
    return found


def prefixes(best: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Prefixes of the best set, evenly spaced, above a quarter of it."""
    low, high = len(best) // 4, len(best)
    sizes = {low + round((high - low) * (i + 1) / (count + 1)) for i in range(count)} - {0, low, high}
    return [list(best[:size]) for size in sorted(sizes)]


def _sizes(n: int) -> list[int]:
    """All of them, and a quarter, a sixteenth, ... of them, down to one."""
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // 4))
    return sizes


def every_place(subject: TestedModel, units: Units, effects: Sequence[Float[Tensor, "pos _"]]) -> int:
    """One pass for each unit at each of its positions, and one over the sources."""
    had = [(_places(site, len(effect)), site) for site, effect in zip(units.sites, effects, strict=True)]
    return 1 + sum(len(places) * sum(subject.has(Unit(site, i)) for i in range(site.size)) for places, site in had)


def _places(site: Site, length: int) -> list[int]:
    """The positions at which a site's units are meant, of ``length``."""
    mask = site.position_mask(1, length)
    return list(range(length)) if mask is None else mask[0].nonzero().flatten().tolist()
