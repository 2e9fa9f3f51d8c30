"""Interchange between inputs of different length: at the positions that are input in both, counted from the end.

The answer is read at the end of an input, so that the last position of one stands for the last of the other, whichever
side is padded. What one has beyond the beginning of the other keeps its own values. A slice that names an end counts
positions as they are; the end that it names is input in both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.intervene import Intervention
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units


def between(
    units: Units, keep: Float[Tensor, "*batch units"], taken: Values, base: Examples, source: Examples
) -> list[Intervention]:
    """Units of a run on ``base`` with the values ``taken`` from one on ``source``, as interventions. No model pass.

    Raises:
        ValueError: a slice that names a position which is padding in ``base``.
    """
    shifted = _shifted(base, source)
    if shifted is None:
        return [Intervention(units, keep, taken)]
    made: list[Intervention] = []
    for site, share, value in zip(units.sites, units.split(keep), taken.tensors, strict=True):
        place, moved = _place(site, value, *shifted)
        one = Units((place,))
        made.append(Intervention(one, share, Values(one, (moved,))))
    return made


def step(
    units: Units,
    old: tuple[Float[Tensor, "batch pos _ _"], ...],
    taken: Values,
    base: Examples,
    source: Examples,
) -> list[Float[Tensor, "batch pos _ _"]]:
    """How far interchange moves the units' ``old`` values, per site; not at all at a position that one input lacks."""
    shifted = _shifted(base, source)
    steps: list[Tensor] = []
    for site, value, v in zip(units.sites, taken.tensors, old, strict=True):
        place, moved = (site, value) if shifted is None else _place(site, value, *shifted)
        where = place.position_mask(*v.shape[:2]) if shifted is not None and place is not site else None
        difference = moved.to(v) - v.detach()
        steps.append(difference if where is None else difference * where.to(v.device)[..., None, None])
    return steps


def _shifted(
    base: Examples, source: Examples
) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"]] | None:
    """Where base and source have input, and the source's position that stands for each one of the base; ``None`` where
    all have theirs at the same positions."""
    whole = torch.ones(base.labels.shape, dtype=torch.bool)
    one, two = (whole if part.attention_mask is None else part.attention_mask.cpu() for part in (base, source))
    if torch.equal(one, two):
        return None
    places = torch.arange(one.shape[1])
    end_one, end_two = ((mask * (places + 1)).amax(1, keepdim=True) for mask in (one, two))
    return one, two, places - (end_one - end_two)


def _place(
    site: Site,
    value: Float[Tensor, "batch pos _ _"],
    one: Bool[Tensor, "batch pos"],
    two: Bool[Tensor, "batch pos"],
    stands: Int[Tensor, "batch pos"],
) -> tuple[Site, Float[Tensor, "batch pos _ _"]]:
    """The site at the positions that both have, and the values that stand for those there."""
    where = site.positions
    if (where is not None and not isinstance(where, slice)) or value.shape[:2] != one.shape:
        return site, value  # named positions are checked as the model runs
    if isinstance(where, slice) and (where.start is not None or where.stop is not None):
        site.check_input(one)
        meant = site.position_mask(*one.shape)
        both = one & two if meant is None else one & two & meant
    else:
        inside = (stands >= 0) & (stands < one.shape[1])
        index = stands.clamp(0, one.shape[1] - 1)
        both = one & two.gather(1, index) & inside
        index = index.to(value.device)[..., None, None].expand_as(value)
        value = value.gather(1, index)
    return replace(site, positions=_listed(both)), value


def _listed(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch places"]:
    """The positions of each row, its last one again where others have more."""
    order = (~mask).int().argsort(dim=1, stable=True)  # those of the mask first, in order
    count = mask.sum(1, keepdim=True)
    column = torch.arange(max(1, int(count.max()))).expand(len(mask), -1)
    return order.gather(1, torch.minimum(column, (count - 1).clamp_min(0)))
