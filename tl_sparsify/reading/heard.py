"""Effects of edges into attention without copies of the stream: from the gradients of queries, keys and values.

The gradient of reader ``r`` at its copy of the stream is ``J' W_r g_r``, with ``g_r`` the gradient of what it projects
the stream to, ``W_r`` the projection, and ``J`` the norm's derivative. Where nobody changed any copy ``J`` is the same
for all readers, and with the terms of :mod:`tl_sparsify.reading.norms`

    J' W_r g_r = C w W_r (rho g_r) - x' (x' . w W_r (rho g_r)) / d,

where ``x' . w W_r`` is what the reader projected, less its biases. Their products with what the writers write are the
effects, and their sum over readers is the gradient that goes on to earlier layers: both are taken on the way back, a
few examples at a time, so that nothing is projected twice and nothing of the size of readers times the stream is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.reading.norms import NormSlope, norm_slope

_ROOM = 2**21
"""Numbers of gradients at the stream at a time on the CPU: what its cache holds."""
_ROOM_ELSEWHERE = 2**26


Ways = dict[int, Float[Tensor, ""]]
"""For each norm the token of the part that came last behind it: gradients of all parts go back along these."""


@dataclass
class Behind:
    """What readers behind one norm have in common in a forward pass, and what a backward pass leaves here. The graph
    keeps this, and so this must not keep what comes of it.

    Attributes:
        stream: what goes into the norm; it has a gradient, and if nothing before it has, it is a leaf.
        noted: the gradients of what readers project, by hook point and part, until all have come.
        space: written over again and again: new memory each time would take longer than the products.
    """

    norm: Any
    stream: Float[Tensor, "batch pos d_model"]
    noted: list[tuple[Heard, str, Float[Tensor, "batch pos ..."]]] = field(default_factory=list)
    space: list[Tensor] = field(default_factory=list)

    @cached_property
    def slope(self) -> NormSlope | None:
        """The norm's derivative; ``None`` where it is not known, and the readers need copies."""
        return norm_slope(self.norm, self.stream)

    def taken(self) -> Float[Tensor, "batch pos d_model"]:
        """Leave each hook point the effects of its edges, and give the gradient at the stream."""
        heard = list({id(one): one for one, _, _ in self.noted}.values())
        noted = [one.joined({part: g for other, part, g in self.noted if other is one}) for one in heard]
        self.noted.clear()
        steps = [one.moved() for one in heard]
        like = steps[0]
        if self.slope is None:
            raise ValueError(f"{heard[0].name} is behind a norm that is not known")
        slope, (batch, pos), width = self.slope.to(like), like.shape[:2], like.shape[3]
        maps = [slope.through(*one.maps(like)) for one in heard]
        scaled = [_scaled(g.to(like), slope.scale) for g in noted]
        out = [_taken_out(one, g, added, slope) for one, g, (_, added) in zip(heard, scaled, maps, strict=True)]
        many = [len(g) for g in scaled]
        groups = [slice(0, sum(many))] if _same(steps) else list(_rows(many))
        written = [step.permute(2, 0, 1, 3).flatten(2) for step in steps[: len(groups)]]
        found = [like.new_empty(batch, s.stop - s.start, len(w)) for s, w in zip(groups, written, strict=True)]
        back = like.new_empty(batch, pos, width)
        room = _ROOM if like.device.type == "cpu" else _ROOM_ELSEWHERE
        some = min(batch, max(1, room // (sum(many) * pos * width)))
        space = self._space(sum(many) * some * pos * width, like)
        for start in range(0, batch, some):
            here = slice(start, min(start + some, batch))
            count = here.stop - here.start
            slopes = space[: sum(many) * count * pos * width].view(sum(many), count, pos, width)
            for g, (weight, _), share, rows in zip(scaled, maps, out, _rows(many), strict=True):
                part = slopes[rows]
                torch.bmm(g[:, here].flatten(1, 2), weight, out=part.view(len(part), -1, width))
                if slope.direction is not None and share is not None:
                    part.addcmul_(share[:, here, :, None], slope.direction[here], value=-1 / width)
            torch.sum(slopes, 0, out=back[here])
            by_example = slopes.flatten(2).transpose(0, 1)
            for rows, w, into in zip(groups, written, found, strict=True):
                torch.bmm(by_example[:, rows], w[:, here].permute(1, 2, 0), out=into[here])
        parts = found if len(found) == len(heard) else list(found[0].split(many, 1))
        for one, part in zip(heard, parts, strict=True):
            one.effects = part.flatten(1)
        return back.to(self.stream)

    def _space(self, size: int, like: Tensor) -> Float[Tensor, "size"]:
        there = self.space[0] if self.space else like.new_empty(0)
        if there.numel() < size or there.device != like.device or there.dtype != like.dtype:
            self.space[:] = [like.new_empty(size)]
        return self.space[0]


@dataclass
class Heard:
    """What readers in attention project the stream to, where none of them has a copy of its own: by part (``q``, ``k``,
    ``v``), once it is there. A hook that is offered it and gives it back needs no copies.

    Attributes:
        behind: what all readers behind one norm share.
        own: the parts.
        step: how what the writers write is moved, while effects are taken along it.
        effects: of the last backward pass, until they are taken.
    """

    name: str
    attn: Any
    readers: int
    behind: Behind
    own: dict[str, Float[Tensor, "batch pos ..."]] = field(default_factory=dict)
    step: Callable[[], Float[Tensor, "batch pos writers d_model"]] | None = None
    effects: Float[Tensor, "batch edges"] | None = None

    @property
    def stream(self) -> Float[Tensor, "batch pos d_model"]:
        """What goes into the norm; a leaf, where nothing before it has a gradient."""
        return self.behind.stream

    def note(self, part: str, own: Float[Tensor, "batch pos ..."], ways: Ways) -> Float[Tensor, "batch pos ..."]:
        """Keep a part; what takes its place notes its gradient."""
        if part in self.own:
            return own
        behind = self.behind
        self.own[part] = own.detach()
        way = ways.get(id(behind))
        if way is None and not behind.stream.requires_grad:
            behind.stream = behind.stream.detach().requires_grad_()
        first, before = way is None, behind.stream if way is None else way
        made, ways[id(behind)] = _Projected.apply(before, own, self, part, first)
        return made

    def moved(self) -> Float[Tensor, "batch pos writers d_model"]:
        """How far what each writer writes is moved."""
        if self.step is None:
            raise ValueError(f"{self.name} takes effects, and no step is known: go back within taking()")
        return self.step()

    def take(self) -> Float[Tensor, "batch edges"] | None:
        """The effects of this hook point's edges in the last backward pass; ``None`` where no gradient came here."""
        found, self.effects = self.effects, None
        return found

    def joined(self, parts: Mapping[str, Float[Tensor, "batch pos ..."]]) -> Float[Tensor, "batch pos readers some"]:
        """Of each reader all that it projects, or the gradients of that, one beside the other."""
        whole = [parts[part] if part in parts else torch.zeros_like(own) for part, own in self.own.items()]
        apart = [part.flatten(2).unflatten(2, (self.readers, -1)) for part in whole]
        return apart[0] if len(apart) == 1 else torch.cat(apart, 3)

    def maps(self, like: Tensor) -> tuple[Float[Tensor, "readers some d_model"], Float[Tensor, "readers some"]]:
        """Each reader's projections, one beside the other, and what is added to them."""
        weights, biases = [], []
        for part in self.own:
            weight = getattr(self.attn, f"W_{part.upper()}").detach().to(like)
            bias = getattr(self.attn, f"b_{part.upper()}", None)
            weights.append(weight.mT.unflatten(0, (self.readers, -1)).flatten(1, 2))
            biases.append((like.new_zeros(1) if bias is None else bias.detach().to(like)).flatten())
            biases[-1] = biases[-1].expand(weights[-1].shape[:2].numel()).view(self.readers, -1)
        if len(weights) == 1:
            return weights[0], biases[0]
        return torch.cat(weights, 1), torch.cat(biases, 1)


@contextmanager
def taking(
    heard: Mapping[int, Heard], step: Callable[[int], Float[Tensor, "batch pos writers d_model"]]
) -> Iterator[None]:
    """Backward passes in the context take effects along these steps of what the writers of each site write."""
    space: list[Tensor] = []
    for number, one in heard.items():
        one.step = partial(step, number)
        one.behind.space = space
    try:
        yield
    finally:
        for one in heard.values():
            one.step = one.effects = None
            one.behind.space = []


class _Projected(torch.autograd.Function):
    """A part, as something that gradients come back from along one way: that of the part that came first is taken
    last, when those of all others have been noted."""

    @staticmethod
    def forward(ctx: Any, way: Tensor, own: Tensor, heard: Heard, part: str, first: bool) -> Any:
        ctx.heard, ctx.part, ctx.first = heard, part, first
        return own.detach(), torch.ones((), device="cpu")

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        ctx.heard.behind.noted.append((ctx.heard, ctx.part, slopes[0]))
        back = ctx.heard.behind.taken() if ctx.first else torch.ones((), device="cpu")
        return back, None, None, None, None


def _scaled(
    gradient: Float[Tensor, "batch pos readers some"], scale: Float[Tensor, "batch pos one"]
) -> Float[Tensor, "readers batch pos some"]:
    by_reader = gradient.permute(2, 0, 1, 3)
    return torch.mul(by_reader, scale, out=by_reader.new_empty(by_reader.shape))


def _rows(many: Sequence[int]) -> Iterator[slice]:
    start = 0
    for count in many:
        yield slice(start, start + count)
        start += count


def _same(steps: Sequence[Tensor]) -> bool:
    return all(step.data_ptr() == steps[0].data_ptr() and step.shape == steps[0].shape for step in steps)


def _taken_out(
    heard: Heard,
    scaled: Float[Tensor, "readers batch pos some"],
    added: Float[Tensor, "readers some"],
    slope: NormSlope,
) -> Float[Tensor, "readers batch pos"] | None:
    """How much of the normalised stream's direction there is in each reader's gradient; ``None`` without a norm."""
    if slope.direction is None:
        return None
    values = heard.joined(heard.own).to(scaled) - added
    return (scaled * values.permute(2, 0, 1, 3)).sum(3)


def together(
    gradients: Sequence[Float[Tensor, "batch pos one d_model"]], step: Float[Tensor, "batch pos writers d_model"]
) -> Float[Tensor, "probes batch edges"]:
    """The effects of edges into one reader, whose gradients for all probes are given, in one product."""
    slopes = torch.stack([g[:, :, 0] for g in gradients], 1).to(step).flatten(2)
    return torch.bmm(slopes, step.transpose(1, 2).flatten(2).mT).transpose(0, 1)
