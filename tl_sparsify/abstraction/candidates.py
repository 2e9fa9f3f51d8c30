"""Candidates: the sets of units that a search for a variable tries, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify.abstraction.interchange import TestedModel
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit, Units


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
