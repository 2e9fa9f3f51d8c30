"""Effects of edges into attention without copies of the stream: from the gradients of queries, keys and values.

The gradient of reader ``r`` at its copy of the stream is ``J' W_r g_r``, with ``g_r`` the gradient of what it projects
the stream to, ``W_r`` the projection, and ``J`` the norm's derivative. Where nobody changed any copy ``J`` is the same
for all readers, and for a step ``s_u`` of what writer ``u`` writes, with the terms of :mod:`tl_sparsify.reading.norms`,

    (J' W_r g_r) . s_u = rho ( (w W_r g_r) . s_u - (x' . w W_r g_r) (x' . s_u) / d - m (1 . w W_r g_r) (1 . s_u) / d ),

one product of matrices for all readers, probes, writers and positions, and a small one: ``x' . w W_r`` is what the
reader projected, less its biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.reading.norms import NormSlope, norm_slope

_ROOM = 2**21
"""Numbers of gradients at the stream at a time on the CPU: what its cache holds."""
_ROOM_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Heard:
    """What readers in attention project the stream to, where none of them has a copy of its own: by part (``q``, ``k``,
    ``v``), once it is there. A hook that is offered it and gives it back needs no copies.

    Attributes:
        shared: what is known of the norm, once for all hook points behind it.
    """

    name: str
    stream: Float[Tensor, "batch pos d_model"]
    norm: Any
    attn: Any
    readers: int
    shared: dict[str, NormSlope | None]
    own: dict[str, Float[Tensor, "batch pos ..."]] = field(default_factory=dict)

    @property
    def slope(self) -> NormSlope | None:
        """The norm's derivative; ``None`` where it is not known, and the readers need copies."""
        if "norm" not in self.shared:
            self.shared["norm"] = norm_slope(self.norm, self.stream)
        return self.shared["norm"]

    def note(self, part: str, own: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        """Keep a part, as what gradients can be taken of."""
        return self.own.setdefault(part, own if own.requires_grad else own.detach().requires_grad_())

    @property
    def leaves(self) -> dict[str, Float[Tensor, "batch pos ..."]]:
        """The parts by ``HOOK:PART``."""
        return {f"{self.name}:{part}": own for part, own in self.own.items()}

    def joined(self, leaves: Mapping[str, Float[Tensor, "batch pos ..."]]) -> Float[Tensor, "batch pos readers some"]:
        """Of each reader all that it projects, or the gradients of that, one beside the other."""
        parts = [leaves[f"{self.name}:{part}"].flatten(2).unflatten(2, (self.readers, -1)) for part in self.own]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    def maps(self, like: Tensor) -> tuple[Float[Tensor, "readers some d_model"], Float[Tensor, "readers some"]]:
        """Each reader's projections, one beside the other, and what is added to them."""
        weights, biases = [], []
        for part in self.own:
            weight = getattr(self.attn, f"W_{part.upper()}").detach().to(like)
            bias = getattr(self.attn, f"b_{part.upper()}", None)
            weights.append(weight.mT.reshape(self.readers, -1, weight.shape[1]))
            biases.append((like.new_zeros(1) if bias is None else bias.detach().to(like)).flatten())
            biases[-1] = biases[-1].expand(weights[-1].shape[:2].numel()).view(self.readers, -1)
        return torch.cat(weights, 1), torch.cat(biases, 1)


def products(
    gradients: Mapping[int, Sequence[Float[Tensor, "_ pos _ _"]]],
    heard: Mapping[int, Heard],
    alike: set[int],
    step: Callable[[int], Float[Tensor, "batch pos writers d_model"]],
) -> Iterator[tuple[int, Float[Tensor, "probes batch edges"]]]:
    """For each site, by number, the effects of its edges for all probes, whose gradients are given.

    Args:
        heard: of sites whose gradients are of what is heard; the others have one reader, and its gradient at the
            stream.
        alike: sites whose steps are those of the same writers; of these, all behind one norm are done together.
        step: the steps of a site's writers.
    """
    groups: dict[Any, list[int]] = {}
    for number in gradients:
        same = number in heard and number in alike
        groups.setdefault(id(heard[number].shared) if same else -number, []).append(number)
    space: list[Tensor] = []
    for numbers in groups.values():
        moves = step(numbers[0])
        if numbers[0] in heard:
            found = along_heard([heard[i] for i in numbers], [gradients[i] for i in numbers], moves, space)
            yield from zip(numbers, found, strict=True)
        else:
            slopes = torch.stack([g[:, :, 0] for g in gradients[numbers[0]]], 1).to(moves).flatten(2)
            yield numbers[0], torch.bmm(slopes, moves.transpose(1, 2).flatten(2).mT).transpose(0, 1)


def along_heard(
    heard: Sequence[Heard],
    gradients: Sequence[Sequence[Float[Tensor, "batch pos _ _"]]],
    step: Float[Tensor, "batch pos writers d_model"],
    space: list[Tensor],
) -> list[Float[Tensor, "probes batch edges"]]:
    """What each writer's step comes to along the gradient of each reader, for hook points behind one norm, each with
    its gradients for all probes. ``space`` is written over: new memory each time would take longer than the products.
    """
    slope = heard[0].slope
    if slope is None:
        raise ValueError(f"{heard[0].name} is behind a norm that is not known")
    slope = slope.to(step)
    written = step.permute(2, 0, 1, 3)
    (batch, pos), width, probes = step.shape[:2], step.shape[3], len(gradients[0])
    scaled = [_scaled(some, slope.scale) for some in gradients]
    maps = [slope.through(*one.maps(step)) for one in heard]
    rows = [len(g) * probes for g in scaled]
    found = step.new_empty(batch, sum(rows), len(written))
    room = _ROOM if step.device.type == "cpu" else _ROOM_ELSEWHERE
    many = min(batch, max(1, room // (sum(rows) * pos * width)))
    size = sum(rows) * many * pos * width
    if not space or space[0].numel() < size or space[0].device != step.device or space[0].dtype != step.dtype:
        space[:] = [step.new_empty(size)]
    for start in range(0, batch, many):
        end = min(start + many, batch)
        here = space[0][: sum(rows) * (end - start) * pos * width].view(sum(rows), end - start, pos * width)
        for (weight, _), g, part in zip(maps, scaled, here.split(rows), strict=True):
            torch.bmm(g[:, :, start:end].flatten(1, 3), weight, out=part.view(len(g), -1, width))
        torch.bmm(here.transpose(0, 1), written[:, start:end].flatten(2).permute(1, 2, 0), out=found[start:end])
    if slope.direction is not None:
        found -= _taken_out(heard, maps, scaled, slope, written)
    return [part.unflatten(1, (-1, probes)).permute(2, 0, 1, 3).flatten(2) for part in found.split(rows, 1)]


def _scaled(
    gradients: Sequence[Float[Tensor, "batch pos readers some"]], scale: Float[Tensor, "batch pos one"]
) -> Float[Tensor, "readers probes batch pos some"]:
    first = gradients[0]
    made = scale.new_empty(first.shape[2], len(gradients), *first.shape[:2], first.shape[3])
    for number, gradient in enumerate(gradients):
        torch.mul(gradient.to(scale).permute(2, 0, 1, 3), scale, out=made[:, number])
    return made


def _taken_out(
    heard: Sequence[Heard],
    maps: Sequence[tuple[Float[Tensor, "_ _ d_model"], Float[Tensor, "_ _"]]],
    scaled: Sequence[Float[Tensor, "_ probes batch pos _"]],
    slope: NormSlope,
    written: Float[Tensor, "writers batch pos d_model"],
) -> Float[Tensor, "batch rows writers"]:
    """What the norm's derivative takes out: the normalised stream's direction, and the mean."""
    sizes = [torch.einsum("bpd,wbpd->bpw", slope.direction, written)]
    values = [one.joined(one.leaves).detach().to(written) for one in heard]
    parts = zip(scaled, values, maps, strict=True)
    shares = [
        torch.cat([torch.einsum("rkbpc,bprc->brkp", g, v - added).flatten(1, 2) for g, v, (_, added) in parts], 1)
    ]
    if slope.centred:
        sizes.append(written.sum(-1).permute(1, 2, 0))
        sums = [torch.einsum("rkbpc,rc->brkp", g, weight.sum(-1)) for g, (weight, _) in zip(scaled, maps, strict=True)]
        shares.append(torch.cat([part.flatten(1, 2) for part in sums], 1))
    return torch.bmm(torch.cat(shares, 2), torch.cat(sizes, 1)) / written.shape[-1]
