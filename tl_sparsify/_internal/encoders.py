"""Encoders: how a site of dictionary features reads its units. Tensors, and no word about where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoder:
    """``act((x - center) @ weight + bias)``, the entries ``index`` of it: all features that could take one another's
    place (with ``k``) are computed, those that are units are read.

    Attributes:
        weight: ``[width, rivals]``.
        bias: ``[rivals]``.
        offset: ``[out]``, what the decoder adds to the features' sum.
        center: ``[width]``, what is taken off before; nothing where not given.
        threshold: ``[rivals]``: an entry that is not above it is 0 (JumpReLU); without it 0 is the threshold (ReLU).
        k: how many of the largest entries of each position stay; all where not given.
        index: ``[units]``; all where not given.
    """

    weight: Float[Tensor, "width rivals"]
    bias: Float[Tensor, "rivals"]
    offset: Float[Tensor, "out"]
    center: Float[Tensor, "width"] | None = None
    threshold: Float[Tensor, "rivals"] | None = None
    k: int | None = None
    index: Int[Tensor, "units"] | None = None

    def encode(self, x: Float[Tensor, "*place width"]) -> Float[Tensor, "*place units"]:
        """The units' activations, in the precision of ``x``."""
        shifted = x if self.center is None else x - self.center.to(x)
        before = shifted @ self.weight.to(x) + self.bias.to(x)
        found = before.relu()
        if self.threshold is not None:
            found = torch.where(before > self.threshold.to(x), found, 0.0)
        if self.k is not None and self.k < found.shape[-1]:
            largest = before.topk(self.k, dim=-1).indices
            found = torch.zeros_like(found).scatter(-1, largest, found.gather(-1, largest))
        return found if self.index is None else found[..., self.index.to(x.device)]

    def parts(self) -> dict[str, Any]:
        """What it is made of, by name, without what is not given."""
        made = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in made.items() if part is not None}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Encoder):
            return False
        mine, theirs = self.parts(), other.parts()
        return mine.keys() == theirs.keys() and all(_same(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        return hash((tuple(self.weight.shape), self.k))


def check_encoder(site: Any) -> None:
    """Refuse a site of features without an encoder, one of others with it, and numbers that are not one a feature.

    Raises:
        ValueError: such a site.
    """
    what = f"{site.kind} units of {site.hook}"
    if (site.encoder is not None) != (site.kind in ("feature", "error")) or (site.source and site.encoder is None):
        raise ValueError(f"{what}: features and their error have an encoder, others have none, and no source")
    if site.numbers and (site.kind != "feature" or len(site.numbers) != site.size):
        raise ValueError(f"{what} have {len(site.numbers)} numbers; {site.size} features have one each")


def placed(activation: Float[Tensor, "..."]) -> Float[Tensor, "batch pos width"]:
    """An activation with a dimension for positions, in float32 or better."""
    x = activation if activation.ndim == 3 else activation[:, None]
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def left_over(
    x: Float[Tensor, "batch pos width"],
    features: Float[Tensor, "batch pos units"],
    columns: Float[Tensor, "width units"],
    encoder: Any,
) -> Float[Tensor, "batch pos one width"]:
    """What the features do not account for of an activation."""
    return (x - encoder.offset.to(x) - features @ columns.to(x).T)[:, :, None]


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def to_read(
    site: Any, arrived: Mapping[str, Float[Tensor, "..."]], activation: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."] | None]:
    """Where a site's values are read: features' in activations as they were before this intervention changed any."""
    if site.encoder is None:
        return activation, None
    source = site.source or site.hook
    if source not in arrived:
        raise ValueError(f"{site.hook} came before {source}, which its features encode: is the source a later layer's?")
    return arrived[site.hook], arrived[source]
