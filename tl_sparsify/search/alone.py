"""Second-order risk of removing each unit alone to its mean, with the mean from the same pass.

A probe's effect of removing a unit is affine in the constant ``c`` that it is set to: with ``g`` the gradient and ``v``
the value at each position, ``a = sum_t g . (c - v) = a0 + G . (c - c0)``, ``G = sum_t g`` and ``a0`` the effect for any
other constant ``c0``. So one pass, with the first batch's means for ``c0``, gives what the risk takes, and the means of
all the data are put in at its end. Close to ``c`` nothing cancels.

For units of one number an example's risk is a parabola in ``c - c0``, and its mean and spread over examples follow from
the moments of three coefficients. For wider units ``a0`` and ``G`` of every example are kept, up to :data:`ROOM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify._internal.ranks import gathered, share, totalled
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_model, frozen, shared_batches, unit_positions
from tl_sparsify.core.intervene import Recording, joined, recorded
from tl_sparsify.core.metrics import most_answers, output_probes
from tl_sparsify.core.moments import Moments, added, batch_moments, mean_of
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units

ROOM = 2**28
"""Bytes for the effects of wide units."""

_FEW = 64  # examples at a time, at the end


@dataclass(frozen=True)
class _Parabolas:
    """Moments over examples of ``(G^2, a0 G, a0^2)``, each summed over probes: their number, means and summed products
    of deviations."""

    count: float
    mean: Float[Tensor, "three some"]
    spread: Float[Tensor, "three three some"]

    @staticmethod
    def of(effects: Float[Tensor, "probes batch some"], slopes: Float[Tensor, "probes batch some one"]) -> _Parabolas:
        a, g = effects.double(), slopes[..., 0].double()
        found = torch.stack([(g * g).sum(0), (a * g).sum(0), (a * a).sum(0)])
        centred = found - found.mean(1, keepdim=True)
        spread = centred.new_empty(3, *centred.shape[::2])
        for x, y in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)):  # faster than as many small matrix products
            spread[x, y] = spread[y, x] = (centred[x] * centred[y]).sum(0)
        return _Parabolas(float(found.shape[1]), found.mean(1), spread)

    def __add__(self, other: _Parabolas) -> _Parabolas:
        count = self.count + other.count
        step = other.mean - self.mean
        between = step[:, None] * step[None] * (self.count * other.count / count)
        return _Parabolas(count, self.mean + step * (other.count / count), self.spread + other.spread + between)

    def at(self, move: Float[Tensor, "some one"]) -> Moments:
        """The moments of half the squared effects with the constants moved by so much."""
        d = move[:, 0]
        weights = torch.stack([d * d / 2, d, torch.full_like(d, 0.5)])
        spread = torch.einsum("xu,xyu,yu->u", weights, self.spread, weights).clamp_min(0)
        return Moments(torch.full_like(d, self.count), (weights * self.mean).sum(0), spread)


@dataclass(frozen=True)
class _Room:
    """Where a site's effects and slopes go: those of wide units for all examples, those of units of one number for a
    batch at a time. Taken once, so that no memory is lost between the activations that come and go."""

    effects: Float[Tensor, "probes examples some"]
    slopes: Float[Tensor, "probes examples some width"]

    @staticmethod
    def of(values: Float[Tensor, "batch pos some width"], probes: int, examples: int) -> _Room:
        rows = examples if values.shape[-1] > 1 else len(values)
        slopes = values.new_empty(probes, rows, *values.shape[2:])
        return _Room(values.new_empty(slopes.shape[:3]), slopes)

    @property
    def wide(self) -> bool:
        return self.slopes.shape[-1] > 1

    def at(self, move: Float[Tensor, "some width"]) -> Moments:
        """The moments of half the squared effects with the constants moved by so much."""
        parts: list[Moments] = []
        for a, g in zip(self.effects.split(_FEW, 1), self.slopes.split(_FEW, 1), strict=True):
            effects = a.double() + torch.einsum("kbuw,uw->kbu", g, move.to(g)).double()
            parts.append(Moments.of(effects.square().sum(0) / 2))
        return Moments.merge(parts)


def alone(
    model: Model, examples: Examples, units: Units, *, batch_size: int, room: int = ROOM, **settings: Any
) -> tuple[Values, Moments | None, int]:
    """Every unit's mean, the moments over examples of the second-order risk of setting it alone to that, and the number
    of probes (backward passes); ``settings`` are those of :func:`tl_sparsify.core.probes.output_probes`.

    A beginning-of-sequence token is left alone, as it is by default in a reduction.

    One forward pass and a backward pass for each probe. Where the effects of wide units would need more than ``room``
    bytes only the means, from one forward pass.

    Raises:
        ValueError: a model in training mode; NaN or infinite activations.
    """
    check_model(model)
    center: tuple[Tensor, ...] = ()
    found: list[_Parabolas | None] = []
    rooms: list[_Room] = []
    probes, wide = 0, False
    mine = range(len(examples))[share(len(examples))]
    # as many probes in every batch, whatever its examples' numbers of answers
    settled = _Settled(len(examples), mine, room, settings | {"most": most_answers(examples)})

    def parts() -> Iterator[tuple[Moments, ...]]:
        nonlocal center, found, probes, wide
        batches = shared_batches(model, examples, batch_size)
        for index, batch in batches:
            here = units.for_examples(index, examples.spans)
            moments, center, terms, probes = _batch(model, batch, index, here, center, rooms, settled)
            yield moments
            if not rooms:
                wide = True
                rest = (batch_moments(model, part, units.for_examples(i, examples.spans)) for i, part in batches)
                yield reduce(added, rest)
                return
            found = [a + b if a and b else None for a, b in zip(found, terms, strict=True)] if found else terms

    moments = totalled(parts(), added, len(examples))
    if any(gathered([wide], len(examples))):
        return mean_of(moments, model, units), None, 0
    for site, part in zip(units.sites, moments, strict=True):
        if not bool(torch.isfinite(part.mean).all()):
            raise ValueError(f"activations at hook point {site.hook} are NaN or infinite")
    values = mean_of(moments, model, units)
    moves = [c.double() - start.double() for c, start in zip(values.tensors, center, strict=True)]
    risks = [(one or kept).at(move) for one, kept, move in zip(found, rooms, moves, strict=True)]
    whole = [torch.cat([getattr(r, name).to(risks[0].mean.device) for r in risks]) for name in _FIELDS]
    return values, Moments.over([Moments(*whole)], len(examples)), probes


_FIELDS = ("count", "mean", "spread")


@dataclass(frozen=True)
class _Settled:
    """The same for all batches: how many examples there are, which of them this process has, how many bytes their terms
    may take where they are several batches, and the settings of the probes."""

    n: int
    mine: range
    room: int
    probing: dict[str, Any]


def _batch(
    model: Model,
    batch: Examples,
    index: Int[Tensor, "batch"],
    units: Units,
    center: tuple[Tensor, ...],
    rooms: list[_Room],
    settled: _Settled,
) -> tuple[tuple[Moments, ...], tuple[Tensor, ...], list[_Parabolas | None], int]:
    """One batch; a function of its own, so that no activation outlives it. ``rooms`` is made by the first one, unless
    it would be too much; what wide units give stays there."""
    with frozen(model), torch.enable_grad(), recorded(model, units, gradients=True) as recording:
        logits = answer_logits(model, batch)
    values = [v.detach() for v in recording.read()]
    values = [v if v.dtype == torch.float64 else v.float() for v in values]
    moments = tuple(
        _mean(v[unit_positions(model, batch, site, v)]) for site, v in zip(units.sites, values, strict=True)
    )
    vectors = output_probes(logits.detach(), batch, index, **settled.probing)
    if not rooms:
        wide = [v[0, 0].numel() + v.shape[2] for v in values if v.shape[-1] > 1]
        needed = settled.n * len(vectors) * sum(wide) * values[0].element_size()
        if len(batch) < len(settled.mine) and needed > settled.room:
            return moments, (), [], 0
        center = mean_of(moments, model, units).tensors
        rooms += [_Room.of(v, len(vectors), len(settled.mine)) for v in values]
    begin = int(index[0]) - settled.mine.start
    rows = [slice(begin, begin + len(v)) if one.wide else slice(len(v)) for one, v in zip(rooms, values, strict=True)]
    spared = first_tokens(model, batch.tokens, batch.attention_mask, "bos")
    masks = [_left_alone(site, v, spared) for site, v in zip(units.sites, values, strict=True)]

    def take(probe: int, number: int, gradient: Float[Tensor, "batch pos some width"]) -> None:
        v, mask = values[number], masks[number]
        g = gradient.to(v)
        g = g if mask is None else g.masked_fill(mask, 0)
        torch.sum((center[number].to(v) - v).mul_(g), (1, 3), out=rooms[number].effects[probe, rows[number]])
        torch.sum(g, 1, out=rooms[number].slopes[probe, rows[number]])

    _backward(recording, logits, vectors, take)
    terms = [
        None if one.wide else _Parabolas.of(one.effects[:, some], one.slopes[:, some])
        for one, some in zip(rooms, rows, strict=True)
    ]
    return moments, center, terms, len(vectors)


def _mean(samples: Float[Tensor, "n some width"]) -> Moments:
    """Of the moments what a mean is taken from; no spread."""
    mean = samples.mean(0) if len(samples) else samples.new_zeros(samples.shape[1:])
    return Moments(torch.full_like(mean, len(samples)).double(), mean.double(), torch.zeros_like(mean).double())


def _left_alone(
    site: Site, v: Float[Tensor, "batch pos some width"], spared: Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "rows pos one one"] | None:
    """Where removing a site's units changes nothing: outside their positions, and at first tokens; ``None`` for no
    place."""
    where = site.position_mask(v.shape[0], v.shape[1])
    if where is None and spared is None:
        return None
    kept = torch.zeros(v.shape[:2], dtype=torch.bool) if where is None else ~where
    return (kept if spared is None else kept.to(spared.device) | spared).to(v.device)[..., None, None]


def _backward(
    recording: Recording,
    logits: Float[Tensor, "*shape"],
    vectors: list[Float[Tensor, "*shape"]],
    take: Callable[[int, int, Float[Tensor, "batch pos some width"]], None],
) -> None:
    """A backward pass for each vector on the logits, in which ``take(vector, site, gradient)`` is called for every site
    as its gradient is made: none is held. In place of those of hook points that the logits do not depend on there are
    zeros."""
    activations, sites = recording.activations, recording.units.sites
    parts: list[dict[str, Tensor]] = [{} for _ in sites]
    came: set[str] = set()
    probe = 0

    def note(hook: str, gradient: Tensor) -> None:
        came.add(hook)
        for number, (site, part) in enumerate(zip(sites, parts, strict=True)):
            if hook in site.hook_names:
                part[hook] = site.pull(gradient)
                if len(part) == len(site.hook_names):
                    take(probe, number, joined([part[name] for name in site.hook_names]))
                    part.clear()

    # what the graph starts at: every recorded activation that the logits depend on lies on the way there
    leaves = [activation for activation in activations.values() if activation.is_leaf]
    handles = [activation.register_hook(partial(note, hook)) for hook, activation in activations.items()]
    try:
        for probe, xi in enumerate(vectors):
            more = probe < len(vectors) - 1
            torch.autograd.grad(logits, leaves, xi.to(logits), retain_graph=more, allow_unused=True)
            for hook in [hook for hook in activations if hook not in came]:
                note(hook, torch.zeros_like(activations[hook]))
            came.clear()
    finally:
        for handle in handles:
            handle.remove()
