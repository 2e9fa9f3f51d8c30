"""Probes: the samples-by-units statistics of second-order risk, from one forward and a few backward passes.

Let ``z`` be the original logits, ``z'`` those with the removals made so far, ``D(z')`` the divergence between them and
``F(z')`` its Hessian (for KL the Fisher matrix of ``softmax(z')``). Removing unit ``u`` as well moves its value by
``c[u] - v'[u, t]`` and so, to first order, the logits. For one example the divergence after removing a set ``S`` is

    D(z') + sum_{u in S} l[u] + 1/2 sum_k ( sum_{u in S} a_k[u] )^2,

    l[u] = sum_t (dD/dv)[u, t] . (c[u] - v'[u, t]),
    a_k[u] = sum_t (d(xi_k . z')/dv)[u, t] . (c[u] - v'[u, t]),      sum_k xi_k xi_k' = F(z').

At the original model ``D`` and ``l`` vanish and this is the published expansion (arXiv 2602.24266), kept joint over
units instead of one by one. Later rounds expand around the *ablated* model, so the deviation already made is pinned
exactly: a unit that cancels an earlier removal gets a negative ``l``.

An expansion says nothing about large steps: it has a third-order remainder. Measure with :func:`tl_sparsify.risk`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows, batch_size_for, check_model, frozen
from tl_sparsify.core.intervene import Intervention, Recording, ablate, first_tokens, intervened, recorded
from tl_sparsify.core.measure import Recall, computed
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model

HEIGHT = 1024
"""More samples than this are projected at random onto as many rows."""


@dataclass(frozen=True)
class Samples:
    """One batch of samples: removing the set ``S`` as well changes the divergence of an example to about
    ``offset + sum_S linear + 1/2 sum over probes of (sum_S effects)^2``.

    Attributes:
        index: the examples.
        offset: the divergence already made (``D`` at the removals so far; 0 at the original model).
        linear: its derivative along the removal of each unit.
        effects: ``a``, for each probe, example and unit.
        made: ``offset`` at temperature 1, whatever the probes' is.
    """

    index: Int[Tensor, "batch"]
    offset: Float[Tensor, "batch"]
    linear: Float[Tensor, "batch units"]
    effects: Float[Tensor, "probes batch units"]
    made: Float[Tensor, "batch"]


def fisher_probes(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    seed: int,
) -> list[Float[Tensor, "rows choices"]]:
    """Probes on the logits whose second moments sum to the Fisher matrix of ``softmax(logits / temperature)``.

    Up to ``probes + 1`` answers the Fisher matrix is factored exactly (its Cholesky columns in closed form: Tanabe
    and Sagae, 1992), with random signs that keep several labelled positions apart; beyond that a probe is the
    gradient of ``log p(y)`` at a sampled ``y``. With ``temperature`` other than 1 the risk that they give is
    ``temperature**2`` times the risk at that temperature.
    """
    example, _ = answer_rows(batch)
    scale = 1 / torch.bincount(example, minlength=len(batch)).double().sqrt()[example]
    scale = scale.to(logits)[:, None]
    p = (logits / temperature).softmax(1)
    place = (index[example], _number(example))
    if logits.shape[1] - 1 <= probes:
        columns = _covariance_root(p)
        signs = [_random.signs(seed, 5, *place, column)[:, None].to(logits) for column in range(len(columns))]
        return [scale * sign * column for sign, column in zip(signs, columns, strict=True)]
    found: list[Float[Tensor, "rows choices"]] = []
    for probe in range(probes):
        u = _random.uniform(seed, 7, *place, probe).to(logits)[:, None]
        total = p.cumsum(1)
        answer = torch.searchsorted(total, u * total[:, -1:]).clamp_max(p.shape[1] - 1)
        found.append(-p.scatter_add(1, answer, -torch.ones_like(u)) * scale / math.sqrt(probes))
    return found


def _number(example: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Which of its example's answers each row is: draws by this and not by position know nothing of padding."""
    return torch.arange(len(example)) - torch.searchsorted(example, example)


def _covariance_root(p: Float[Tensor, "rows choices"]) -> list[Float[Tensor, "rows choices"]]:
    """Columns ``l_j`` with ``sum_j l_j l_j' = diag(p) - p p'`` for each row."""
    rest = p.flip(1).cumsum(1).flip(1)  # rest[j] = p[j] + p[j+1] + ...
    columns: list[Float[Tensor, "rows choices"]] = []
    for j in range(p.shape[1] - 1):
        before, after = rest[:, j].clamp_min(1e-30), rest[:, j + 1]
        diagonal = (p[:, j] / before * after).clamp_min(0).sqrt()
        # in this order no two small numbers are multiplied
        below = -(p[:, j + 1 :] / after.clamp_min(1e-30)[:, None]) * diagonal[:, None]
        columns.append(torch.cat([p.new_zeros(len(p), j), diagonal[:, None], below], 1))
    return columns


def metric_probe(
    logits: Float[Tensor, "rows choices"], batch: Examples, index: Int[Tensor, "batch"], *, metric: Metric, seed: int
) -> list[Float[Tensor, "rows choices"]]:
    """The one probe of a scalar metric: its gradient, with a random sign for each of several labelled positions."""
    example, _ = answer_rows(batch)
    scale = 1 / torch.bincount(example, minlength=len(batch)).double().sqrt()[example]
    sign = _random.signs(seed, 5, index[example], _number(example), 0)
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(metric(z, batch).sum(), z)
    return [(scale * sign).to(logits)[:, None] * gradient]


def output_probes(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    metric: Metric | None,
    seed: int,
) -> list[Float[Tensor, "rows choices"]]:
    """The probes of the divergence: Fisher probes for KL, the one exact probe for a scalar metric."""
    if metric is not None:
        return metric_probe(logits, batch, index, metric=metric, seed=seed)
    return fisher_probes(logits, batch, index, probes=probes, temperature=temperature, seed=seed)


def samples(
    model: Model,
    examples: Examples,
    removal: Reduction,
    *,
    current: Reduction | None = None,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    interventions: InterventionDistribution = NONE,
    restorable: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    recall: Recall = computed,
) -> Iterator[Samples]:
    """The samples of every batch, for the removal of each unit to ``removal.values``, linearised in the model with
    ``current``'s units already removed (``None``: the original model), both models under the same ``interventions``.
    Units that are already removed have no effect; with ``restorable``, minus that of taking them back. ``recall`` may
    know the original's logits from an earlier call (:func:`remembering`).

    One forward and ``probes`` backward passes over the data (fewer probes where fewer are exact); with ``current``
    one forward and one backward pass more; for each ``interchange`` in the distribution one forward pass more for each
    model. Memory does not grow with the number of examples. With ``temperature`` other than 1 everything is
    ``temperature**2`` times the divergence at that temperature.

    Raises:
        ValueError: a model in training mode, fewer than one probe, a temperature that is not positive, NaN or
            infinite activations.
    """
    check_model(model)
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least one is needed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    for site, value in zip(removal.units.sites, removal.values.tensors, strict=True):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"values for {site.hook} hold NaN or infinite constants: no unit can be set to them")
    for index, batch in examples.batches(batch_size_for(model, examples, batch_size)):
        same = (interventions, model, removal, examples, index, seed)
        removed = () if current is None else (ablate(current.for_examples(index)),)
        with torch.no_grad():
            z = None
            if current is not None:
                with intervened(model, *drawn_interventions(*same)):
                    z = recall(int(index[0]), lambda batch=batch: answer_logits(model, batch))
            with intervened(model, *removed):
                drawn = drawn_interventions(*same)
        settings = {"probes": probes, "temperature": temperature, "metric": metric, "seed": seed}
        part = _linearised(model, batch, index, removal.for_examples(index), removed, drawn, z, settings)
        if current is not None and not restorable:
            mask = current.circuit.mask.to(part.effects)
            part = replace(part, linear=part.linear * mask, effects=part.effects * mask)
        yield part


def _linearised(
    model: Model,
    batch: Examples,
    index: Int[Tensor, "batch"],
    removal: Reduction,
    removed: tuple[Intervention, ...],
    drawn: tuple[Intervention, ...],
    z: Float[Tensor, "rows choices"] | None,
    settings: dict[str, Any],
) -> Samples:
    """The samples of one batch; a function of its own, so that no activation outlives it."""
    with frozen(model), torch.enable_grad():
        with intervened(model, *drawn), recorded(model, removal.units) as own:
            with intervened(model, *removed), recorded(model, removal.units, gradients=True) as recording:
                changed = answer_logits(model, batch)
        here = changed.detach()
        vectors = output_probes(here, batch, index, **settings)
        slope = None if z is None else _slope(z, here, batch, settings["metric"], settings["temperature"])
        spared = first_tokens(model, batch.tokens, batch.attention_mask, removal.first_token)
        effects = _effects(own, recording, removal, changed, vectors if slope is None else [*vectors, slope], spared)
    if z is None:
        nothing = effects.new_zeros(len(batch))
        return Samples(index, nothing, torch.zeros_like(effects[0]), effects, nothing)
    offset = _divergence(z, here, batch, settings["metric"], settings["temperature"])
    return Samples(index, offset, effects[-1], effects[:-1], divergence(z, here, batch, settings["metric"]))


def _divergence(z: Tensor, here: Tensor, batch: Examples, metric: Metric | None, t: float) -> Float[Tensor, "batch"]:
    return divergence(z, here, batch, metric) if metric is not None else t * t * divergence(z / t, here / t, batch)


def _slope(
    z: Tensor, here: Tensor, batch: Examples, metric: Metric | None, temperature: float
) -> Float[Tensor, "rows choices"]:
    """The gradient of each example's divergence with respect to the logits ``here``."""
    with torch.enable_grad():
        here = here.clone().requires_grad_()
        total = _divergence(z, here, batch, metric, temperature).sum()
        return torch.autograd.grad(total, here)[0]


def _effects(
    own: Recording,
    recording: Recording,
    removal: Reduction,
    logits: Float[Tensor, "rows choices"],
    vectors: list[Float[Tensor, "rows choices"]],
    spared: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "probes batch units"]:
    """For each vector on the logits its derivative along the removal of each unit: from the value that the unit's own
    mechanism gives (before the removals made so far: overlapping directions share theirs) to the constant."""
    steps: list[Tensor] = []
    for site, v, c in zip(removal.units.sites, own.read(), removal.values.tensors, strict=True):
        v = v.detach() if v.dtype == torch.float64 else v.detach().float()
        step = c.to(v) - v
        where = site.position_mask(v.shape[0], v.shape[1])
        step = step if where is None else step * where.to(step)[..., None, None]
        steps.append(step if spared is None else step.masked_fill(spared.to(step.device)[..., None, None], 0))
    rows: list[Tensor] = []
    for gradients in pulled(recording, logits, vectors):
        parts = [(g.to(step) * step).sum((1, 3)) for g, step in zip(gradients, steps, strict=True)]
        rows.append(torch.cat([part.to(parts[0].device) for part in parts], 1))
    return torch.stack(rows)


def pulled(
    recording: Recording, logits: Float[Tensor, "rows choices"], vectors: list[Float[Tensor, "rows choices"]]
) -> Iterator[tuple[Float[Tensor, "batch pos some width"], ...]]:
    """For each vector on the logits its gradient with respect to the recorded units' values, per site. One backward
    pass each."""
    activations = recording.activations
    hooks = list(activations)
    for number, xi in enumerate(vectors):
        last = number == len(vectors) - 1
        gradients = torch.autograd.grad(
            (xi * logits).sum(), [activations[hook] for hook in hooks], retain_graph=not last, allow_unused=True
        )
        yield recording.pull(
            {
                hook: torch.zeros_like(activations[hook]) if gradient is None else gradient
                for hook, gradient in zip(hooks, gradients, strict=True)
            }
        )


@dataclass(frozen=True)
class Linearisation:
    """The samples of a whole split: ``R(S) = offset + linear[S].sum() + 1/2 |matrix[:, S].sum(1)|^2``.

    Attributes:
        offset: the risk already made (nats).
        linear: ``[units]``, its derivative along the removal of each unit.
        matrix: ``[rows, units]``; at most :data:`HEIGHT` rows, a random projection over samples beyond that.
        projected: whether rows are a projection.
        deviation: ``[rows, units]``: for each example the part of a unit's effect that lies along the deviation already
            made, ``l[u] / sqrt(2 D)``. It is exact where ``matrix`` is sampled, and bounds what the slope can bring: by
            Cauchy and Schwarz no quadratic that belongs to ``D`` and ``l`` is below ``(sum_S l)^2 / (4 D)``.
        spread: ``[units]``, the standard error over examples of half a unit's own square.
        samples: examples times probes.
    """

    offset: float
    linear: Float[Tensor, "units"]
    matrix: Float[Tensor, "rows units"]
    projected: bool
    deviation: Float[Tensor, "examples units"] | None = None
    spread: Float[Tensor, "units"] | None = None
    samples: int = 0

    def predicted(self, removed: Bool[Tensor, "units"]) -> float:
        """The predicted risk after also removing ``removed`` (nats); a divergence is never negative."""
        removed = removed.to(self.matrix.device)
        square = self.matrix[:, removed].sum(1).double().square().sum()
        return max(0.0, self.offset + float(self.linear[removed].double().sum() + square / 2))


def linearise(batches: Iterator[Samples], n: int, *, seed: int, height: int = HEIGHT) -> Linearisation:
    """Gather the samples of ``n`` examples into one matrix of at most ``height`` rows (:func:`linearise_folds`)."""
    return merged(linearise_folds(batches, n, seed=seed, height=height, folds=1))


def linearise_folds(
    batches: Iterator[Samples], n: int, *, seed: int, height: int = HEIGHT, folds: int = 2
) -> tuple[Linearisation, ...]:
    """Gather the samples of ``n`` examples, dealt out by number to as many linearisations of at most ``height`` rows
    together, each the mean over its own examples.

    More samples are projected: each goes, with random signs, to four of the rows (a sparse Johnson-Lindenstrauss
    map, Kane and Nelson, 2014), which keeps every ``R(S)`` in expectation. Memory: twice ``height`` by units.
    """
    gathering: list[_Gathering] = []
    for part in batches:
        if not gathering:
            k, _, u = part.effects.shape
            sizes = [len(range(fold, n, folds)) for fold in range(folds)]
            gathering = [_Gathering.empty(size, k, u, height // folds, part, seed) for size in sizes]
        for fold, one in enumerate(gathering):
            one.add(part, part.index % folds == fold)
    return tuple(one.linearisation() for one in gathering)


class _Gathering:
    """The sums of one fold while batches come in."""

    def __init__(self, n: int, k: int, u: int, height: int, like: Samples, seed: int) -> None:
        self.n, self.k, self.seed, self.height = n, k, seed, height
        self.offset = 0.0
        self.linear = like.linear.new_zeros(u, dtype=torch.float64)
        self.own, self.own_square = self.linear.clone(), self.linear.clone()
        self.matrix = _Rows(n * k, u, height, like.effects, seed, 11)
        self.deviation = _Rows(n, u, height, like.effects, seed, 13)

    @staticmethod
    def empty(n: int, k: int, u: int, height: int, like: Samples, seed: int) -> _Gathering:
        return _Gathering(n, k, u, height, like, seed)

    def add(self, part: Samples, mine: Bool[Tensor, "batch"]) -> None:
        here = mine.to(part.effects.device)
        if not bool(mine.any()):
            return
        offset, linear, effects = part.offset[here].double(), part.linear[here], part.effects[:, here]
        index = part.index[mine]
        self.offset += float(offset.sum()) / self.n
        self.linear += linear.double().sum(0) / self.n
        half = effects.double().square().sum(0) / 2
        self.own += half.sum(0) / self.n
        self.own_square += half.square().sum(0) / self.n
        root = (2 * offset).clamp_min(0).sqrt().to(linear)[:, None]
        along = torch.where(root > 0, linear / root.clamp_min(1e-30), 0.0)
        probe = torch.arange(self.k)[:, None]
        self.matrix.add(effects.flatten(0, 1) / math.sqrt(self.n), (index.expand(self.k, -1), probe))
        self.deviation.add(along / math.sqrt(self.n), (index, 0))

    def linearisation(self) -> Linearisation:
        variance = (self.own_square - self.own.square()).clamp_min(0) / max(1, self.n - 1)
        matrix, projected = self.matrix.stacked(), self.matrix.projected
        return Linearisation(
            self.offset,
            self.linear.to(matrix),
            matrix,
            projected,
            self.deviation.stacked(),
            variance.sqrt().to(matrix),
            self.n * self.k,
        )


class _Rows:
    """Rows as they come, or their random projection where they are more than ``height``."""

    def __init__(self, count: int, units: int, height: int, like: Tensor, seed: int, stream: int) -> None:
        self.projected = count > height
        self.seed, self.stream, self.height = seed, stream, height
        self.matrix = like.new_zeros(height if self.projected else 0, units)
        self.parts: list[Tensor] = []

    def add(self, rows: Float[Tensor, "some units"], counters: tuple[Any, ...]) -> None:
        if not self.projected:
            self.parts.append(rows)
            return
        for copy in range(4):
            draw = _random.bits(self.seed, self.stream, *counters, copy).flatten()
            row = ((draw >> 1) % (self.height // 4) + copy * (self.height // 4)).to(rows.device)
            sign = (0.5 - (draw & 1)).to(rows)  # +-1 over the root of the four copies
            self.matrix.index_add_(0, row, sign[:, None] * rows)

    def stacked(self) -> Float[Tensor, "rows units"]:
        return self.matrix if self.projected or not self.parts else torch.cat(self.parts)


def merged(folds: Sequence[Linearisation]) -> Linearisation:
    """All folds as one linearisation, each with the weight of its samples."""
    if len(folds) == 1:
        return folds[0]
    total = sum(fold.samples for fold in folds)
    shares = [fold.samples / total for fold in folds]

    def rows(parts: list[Float[Tensor, "rows units"]]) -> Float[Tensor, "rows units"]:
        return torch.cat([math.sqrt(share) * part for share, part in zip(shares, parts, strict=True)])

    spreads = [share * fold.spread for share, fold in zip(shares, folds, strict=True) if fold.spread is not None]
    deviations = [fold.deviation for fold in folds if fold.deviation is not None]
    return Linearisation(
        sum(share * fold.offset for share, fold in zip(shares, folds, strict=True)),
        torch.stack([share * fold.linear for share, fold in zip(shares, folds, strict=True)]).sum(0),
        rows([fold.matrix for fold in folds]),
        any(fold.projected for fold in folds),
        rows(deviations) if len(deviations) == len(folds) else None,
        torch.stack(spreads).sum(0) / math.sqrt(len(folds)) if len(spreads) == len(folds) else None,
        total,
    )


def joint_moments(batches: Iterator[Samples], removed: Bool[Tensor, "units"]) -> Moments:
    """The moments over examples of the predicted joint risk of a set, exactly (no projection)."""

    def of(part: Samples) -> Moments:
        gone = removed.to(part.effects.device)
        square = part.effects[..., gone].double().sum(2).square().sum(0) / 2
        found = part.offset.double() + part.linear[:, gone].double().sum(1) + square
        return Moments.of(found.clamp_min(0))  # a divergence is never negative

    return Moments.merge(of(part) for part in batches)
