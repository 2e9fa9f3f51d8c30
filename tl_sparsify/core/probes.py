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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify._internal.readers import rows_first, rows_last
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions, paired_values
from tl_sparsify.core.distributions import removal as removal_of
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows, check_model, frozen, shared_batches
from tl_sparsify.core.intervene import Intervention, Recording, intervened, recorded
from tl_sparsify.core.measure import Recall, computed
from tl_sparsify.core.metrics import Metric, divergence, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model
from tl_sparsify.reading.heard import products


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
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """Probes on the logits whose second moments sum to the Fisher matrix of ``softmax(logits / temperature)``.

    Up to ``probes + 1`` answers the Fisher matrix is factored exactly (its Cholesky columns in closed form: Tanabe
    and Sagae, 1992). Several labelled positions of an example are kept apart by probes of their own where ``probes``
    are enough for that, which is exact too, and else by random signs, drawn as often as ``probes`` allow. ``most`` is
    the largest number of positions of any example, also of other batches, so that all have as many probes. With more
    answers a probe is the gradient of ``log p(y)`` at a sampled ``y``. With ``temperature`` other than 1 the risk that
    they give is ``temperature**2`` times the risk at that temperature.
    """
    example, _ = answer_rows(batch)
    # An example's divergence is the mean over its answers. Probes are squared, so each takes the root of that share.
    scale = 1 / torch.bincount(example, minlength=len(batch)).double().sqrt()[example]
    scale = scale.to(logits)[:, None]
    p = (logits / temperature).softmax(1)
    if logits.shape[1] - 1 <= probes:
        columns = _covariance_root(p)
        draws = probes // max(1, len(columns))
        return [
            scale * sign[:, None].to(logits) * column
            for number, column in enumerate(columns)
            for sign in _kept_apart(example, index, draws=draws, most=most, column=number, seed=seed)
        ]
    place = (index[example], _number(example))
    found: list[Float[Tensor, "rows choices"]] = []
    for probe in range(probes):
        u = _random.uniform(seed, 7, *place, probe).to(logits)[:, None]
        total = p.cumsum(1)  # its last entry is 1 only up to rounding
        answer = torch.searchsorted(total, u * total[:, -1:]).clamp_max(p.shape[1] - 1)
        # p - e_y has mean 0 and covariance diag(p) - p p', which is the Fisher matrix, where y is drawn from p
        found.append(-p.scatter_add(1, answer, -torch.ones_like(u)) * scale / math.sqrt(probes))
    return found


def most_answers(examples: Examples) -> int:
    """The largest number of labelled positions of any example."""
    return int((examples.labels != NO_LABEL).sum(1).max()) if len(examples) else 1


def _number(example: Int[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Which of its example's answers each row is: draws by this and not by position know nothing of padding."""
    return torch.arange(len(example)) - torch.searchsorted(example, example)


def _kept_apart(
    example: Int[Tensor, "rows"], index: Int[Tensor, "batch"], *, draws: int, most: int, column: int, seed: int
) -> list[Float[Tensor, "rows"]]:
    """Factors of the rows in each of at most ``draws`` probes, whose products sum to one for a row with itself and to
    zero for two rows of an example: exactly where it has at most ``draws``, else on average over random signs."""
    number, rows = _number(example), torch.bincount(example, minlength=len(index))[example]
    signs = [
        _random.signs(seed, 5, index[example], number, column, *([draw] if draw else []))
        for draw in range(min(draws, max(most, int(rows.max()))))
    ]
    own = [signs[0] * (number == draw) for draw in range(len(signs))]
    return [torch.where(rows <= draws, one, sign / math.sqrt(draws)) for one, sign in zip(own, signs, strict=True)]


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
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    metric: Metric,
    seed: int,
    probes: int = 1,
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """The one probe of a scalar metric, its gradient; of several labelled positions as :func:`fisher_probes`."""
    example, _ = answer_rows(batch)
    scale = 1 / torch.bincount(example, minlength=len(batch)).double().sqrt()[example]
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(measured_by(metric, z, batch).sum(), z)
    signs = _kept_apart(example, index, draws=probes, most=most, column=0, seed=seed)
    return [(scale * sign).to(logits)[:, None] * gradient for sign in signs]


def output_probes(
    logits: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    metric: Metric | None,
    seed: int,
    most: int = 1,
) -> list[Float[Tensor, "rows choices"]]:
    """The probes of the divergence: Fisher probes for KL, the one exact probe for a scalar metric."""
    if metric is not None:
        return metric_probe(logits, batch, index, metric=metric, seed=seed, probes=probes, most=most)
    return fisher_probes(logits, batch, index, probes=probes, temperature=temperature, seed=seed, most=most)


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
    """The samples of every batch of this process's share of the examples, for the removal of each unit to
    ``removal.values`` (constants, or what it is on the counterfactual input), linearised in the model with
    ``current``'s units already removed (``None``: the original model), both models under the same ``interventions``.
    Units that are already removed have no effect; with ``restorable``, minus that of taking them back. ``recall`` may
    know the original's logits from an earlier call (:func:`remembering`).

    One forward and ``probes`` backward passes over the data (fewer where fewer are exact); with ``current``
    one forward and one backward pass more; for each ``interchange`` in the distribution one forward pass more for each
    model; one more for values of counterfactual inputs. Memory does not grow with the number of examples. With
    ``temperature`` other than 1 everything is ``temperature**2`` times the divergence at that temperature.

    Raises:
        ValueError: a model in training mode, fewer than one probe, a temperature that is not positive, NaN or
            infinite activations.
    """
    check_model(model)
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least one is needed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    paired = removal.values.paired or (current is not None and current.values.paired)
    for site, value in zip(removal.units.sites, removal.values.tensors, strict=True):
        if not removal.values.paired and not bool(torch.isfinite(value).all()):
            raise ValueError(f"values for {site.hook} hold NaN or infinite constants: no unit can be set to them")
    most = most_answers(examples)
    for index, batch in shared_batches(model, examples, batch_size, removal.units):
        same = (interventions, model, removal, examples, index, seed)
        there = removal.for_examples(index, examples.spans)
        source = paired_values(model, examples, index, there.units) if paired else None
        past = source if current is not None and current.values.paired else None  # of what has no constants of its own
        removed = () if current is None else (removal_of(model, current, examples, index, past),)
        with torch.no_grad():
            z = None
            if current is not None:
                with intervened(model, *drawn_interventions(*same)):
                    z = recall(index, lambda batch=batch: answer_logits(model, batch))
            with intervened(model, *removed):
                drawn = drawn_interventions(*same)
        settings = {"probes": probes, "temperature": temperature, "metric": metric, "seed": seed, "most": most}
        target = source if source is not None and removal.values.paired else removal.values
        part = _linearised(model, batch, index, there, target.tensors, removed, drawn, z, settings)
        if current is not None and not restorable:
            mask = current.circuit.mask.to(part.effects)
            part = replace(part, linear=part.linear * mask, effects=part.effects * mask)
        yield part


def _linearised(
    model: Model,
    batch: Examples,
    index: Int[Tensor, "batch"],
    removal: Reduction,
    values: tuple[Float[Tensor, "..."], ...],
    removed: tuple[Intervention, ...],
    drawn: tuple[Intervention, ...],
    z: Float[Tensor, "rows choices"] | None,
    settings: dict[str, Any],
) -> Samples:
    """The samples of one batch; a function of its own, so that no activation outlives it."""
    with frozen(model), torch.enable_grad():
        with intervened(model, *drawn), recorded(model, removal.units) as own:
            with intervened(model, *removed), recorded(model, removal.units, gradients=True, lean=True) as recording:
                changed = answer_logits(model, batch)
        here = changed.detach()
        vectors = output_probes(here, batch, index, **settings)
        slope = None if z is None else _slope(z, here, batch, settings["metric"], settings["temperature"])
        spared = first_tokens(model, batch.tokens, batch.attention_mask, removal.first_token)
        vectors = vectors if slope is None else [*vectors, slope]
        effects = _effects(own, recording, values, changed, vectors, spared)
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
    values: tuple[Float[Tensor, "..."], ...],
    logits: Float[Tensor, "rows choices"],
    vectors: list[Float[Tensor, "rows choices"]],
    spared: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "probes batch units"]:
    """For each vector on the logits its derivative along the removal of each unit: from the value that the unit's own
    mechanism gives (before the removals made so far: overlapping directions share theirs) to its replacement."""
    moved = list(zip(recording.units.sites, own.read(), values, strict=True))
    steps = _steps(moved, spared)
    heard = {i: recording.heard[site.hook] for i, (site, *_) in enumerate(moved) if site.hook in recording.heard}

    def step(number: int) -> Float[Tensor, "batch _ _ _"]:
        kept = steps[number]  # others are made when they are needed, and not kept
        return step_to(*moved[number], spared) if kept is None else kept

    rows: list[dict[int, Tensor]] = []
    later: dict[int, list[Tensor]] = {}  # edges of which one product serves all vectors
    for gradients in pulled(recording, logits, vectors):
        rows.append({})
        for number, ((site, _, _), g) in enumerate(zip(moved, gradients, strict=True)):
            if number in heard or (site.kind == "edge" and g.shape[2] == 1):
                later.setdefault(number, []).append(g)
            else:
                move = step(number)
                rows[-1][number] = site.along(g.to(move), move)
    alike = {number for number, kept in enumerate(steps) if kept is not None}
    for number, part in products(later, heard, alike, step):
        for row, one in zip(rows, part, strict=True):
            row[number] = one
    return torch.stack([torch.cat([row[i].to(row[0].device) for i in range(len(moved))], 1) for row in rows])


def _steps(
    moved: list[tuple[Site, Float[Tensor, "batch _ _ _"], Float[Tensor, "..."]]],
    spared: Bool[Tensor, "batch pos"] | None,
) -> list[Float[Tensor, "batch _ _ _"] | None]:
    """The step of every site's values. Edges have the same writers' again and again: one step of all writers serves all
    sites whose values begin as the largest one's do; for others (positions of their own, say) ``None``."""
    edges = [part for part in moved if part[0].kind == "edge" and part[0].positions is None]
    most, all_v, all_c = max(edges or moved, key=lambda part: part[0].rows)
    whole = rows_last(rows_first(step_to(most, all_v, all_c, spared)).contiguous()) if edges else all_v

    def shares(site: Site, v: Tensor, c: Tensor) -> bool:
        if site.kind != "edge" or site.positions is not None or v.data_ptr() != all_v.data_ptr():
            return False
        return torch.equal(c, all_c[: len(c)]) if c.ndim == 2 else c.data_ptr() == all_c.data_ptr()

    return [
        whole[:, :, : site.rows] if shares(site, v, c) else None if site.kind == "edge" else step_to(site, v, c, spared)
        for site, v, c in moved
    ]


def step_to(
    site: Site,
    v: Float[Tensor, "batch pos some width"],
    c: Float[Tensor, "*run some width"],
    spared: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos some width"]:
    """By how much setting each value to its replacement moves it, where it is set at all."""
    v = v.detach() if v.dtype == torch.float64 else v.detach().float()
    step = c.to(v) - v
    where = site.position_mask(v.shape[0], v.shape[1])
    step = step if where is None else step * where.to(step)[..., None, None]
    return step if spared is None else step.masked_fill(spared.to(step.device)[..., None, None], 0)


def pulled(
    recording: Recording,
    outputs: Float[Tensor, "*shape"],
    vectors: list[Float[Tensor, "*shape"]],
    *,
    again: bool = False,
) -> Iterator[tuple[Float[Tensor, "batch pos some width"], ...]]:
    """For each vector on the outputs (logits, or other values of the same run) its gradient with respect to the
    recorded units' values, per site. One backward pass each; ``again``: the graph is needed afterwards."""
    activations = recording.activations | {
        k: leaf for one in recording.heard.values() for k, leaf in one.leaves.items()
    }
    hooks = list(activations)
    for number, xi in enumerate(vectors):
        keep = again or number < len(vectors) - 1
        inputs = [activations[hook] for hook in hooks]
        gradients = torch.autograd.grad(outputs, inputs, xi.to(outputs), retain_graph=keep, allow_unused=True)
        yield recording.pull(
            {
                hook: torch.zeros_like(activations[hook]) if gradient is None else gradient
                for hook, gradient in zip(hooks, gradients, strict=True)
            }
        )


def joint_moments(
    batches: Iterator[Samples], removed: Shaped[Tensor, "some"], restored: Shaped[Tensor, "others"] | None = None
) -> Moments:
    """The moments over examples of the predicted joint risk of a set, exactly (no projection); with ``restored`` (of
    ``restorable`` samples) of removing the one set and taking back the other. Sets are masks or indices."""

    def change(of: Float[Tensor, "*some units"]) -> Float[Tensor, "*some"]:
        moved = of[..., removed.to(of.device)].double().sum(-1)
        return moved if restored is None else moved - of[..., restored.to(of.device)].double().sum(-1)

    def of(part: Samples) -> Moments:
        # summed before it is squared: removals that undo each other cost nothing together
        square = change(part.effects).square().sum(0) / 2
        return Moments.of(part.offset.double() + change(part.linear) + square)

    return Moments.merge(of(part) for part in batches)
