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

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.checks import all_finite
from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify._internal.readers import rows_first, rows_last
from tl_sparsify.core.distributions import NONE, InterventionDistribution, drawn_interventions, paired_values
from tl_sparsify.core.distributions import removal as removal_of
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows, check_model, frozen, in_batches
from tl_sparsify.core.intervene import Intervention, Recording, intervened, recorded
from tl_sparsify.core.measure import Recall, computed
from tl_sparsify.core.metrics import (
    Metric,
    divergence,
    divergence_and_slope,
    most_answers,
    output_probes,
)
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, check_positions
from tl_sparsify.reading.heard import taking, together

_LEAST = 1e-6
"""Of a slope's square: below it a slope is mostly rounding, which must not become a direction."""

_VANISHING = 1e-16
"""A probability below which exact probes lose what they say of the slope."""


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


@dataclass(frozen=True)
class Derivatives:
    """Vectors on the logits, a backward pass each, that hold the slope and the Hessian of every example's divergence.

    Attributes:
        vectors: the probes, and where need be the slope itself.
        probes: how many of the vectors, the first ones, are probes: factors of the Hessian.
        slope: ``[vectors, batch]``, the combination of an example's vectors that is its slope.
        offset: the divergence itself.
    """

    vectors: list[Float[Tensor, "rows choices"]]
    probes: int
    slope: Float[Tensor, "vectors batch"]
    offset: Float[Tensor, "batch"]


def output_derivatives(
    original: Float[Tensor, "rows choices"],
    here: Float[Tensor, "rows choices"],
    batch: Examples,
    index: Int[Tensor, "batch"],
    *,
    probes: int,
    temperature: float,
    metric: Metric | None,
    seed: int,
    most: int = 1,
) -> Derivatives:
    """The slope ``s`` and probes of the Hessian ``F`` at the logits ``here``, in as few vectors as hold both.

    Where probes factor ``F`` exactly, the slope is a combination of them: with ``F w = s`` it is
    ``sum_k (xi_k . w) xi_k``. Where they are sampled, the first is ``s`` itself, at a length at which it is a part of
    ``F``, and the others are drawn from what is left of it: two or more of them are as many as without a slope. Only
    with one probe, with more labelled positions than exact probes can keep apart, or with probabilities that vanish
    is the slope a vector more.
    """
    settings = {"temperature": temperature, "metric": metric, "seed": seed, "most": most}
    offset, slope = divergence_and_slope(original, here, batch, metric, temperature)
    example = answer_rows(batch)[0].to(here.device)
    columns = 1 if metric is not None else here.shape[1] - 1
    drawn = columns > probes > 1
    vectors = output_probes(here, batch, index, probes=probes - drawn, **settings)

    def along(
        vectors: list[Float[Tensor, "rows choices"]], others: list[Float[Tensor, "rows choices"]]
    ) -> Float[Tensor, "vectors batch"]:
        """Inner products of pairs, over the rows of each example; one at a time, as logits may be large."""
        rows = torch.stack([(one.double() * other).sum(1) for one, other in zip(vectors, others, strict=True)])
        return rows.new_zeros(len(rows), len(batch)).index_add(1, example, rows)

    if drawn:
        dual = _dual(slope, here / temperature, example, len(batch))
        square = along([slope], [dual])[0]
        length = (square + _LEAST).sqrt()
        # E xi xi' = F, so that the second moments of xi - c (xi . w) s are F - (2 c - c^2 s . w) s s'
        c = (1 - (_LEAST / (square + _LEAST)).sqrt()) / square.clamp_min(1e-300)
        shares = (c * along(vectors, [dual] * len(vectors)))[:, example, None].to(slope)
        first = slope / length[example, None].to(slope)
        weights = torch.cat([length[None], torch.zeros_like(length).expand(len(vectors), -1)])
        rest = [vector - share * slope for vector, share in zip(vectors, shares, strict=True)]
        return Derivatives([first, *rest], len(weights), weights, offset)
    if 0 < columns <= probes and most <= probes // columns:  # exact, and each labelled position has its own
        if metric is not None:
            lengths = along(vectors, vectors).clamp_min(1e-300)
            return Derivatives(vectors, len(vectors), along(vectors, [slope] * len(vectors)) / lengths, offset)
        if bool(((here / temperature).softmax(1) > _VANISHING).all()):
            dual = _dual(slope, here / temperature, example, len(batch))
            return Derivatives(vectors, len(vectors), along(vectors, [dual] * len(vectors)), offset)
    weights = slope.new_zeros(len(vectors) + 1, len(batch), dtype=torch.float64)
    weights[-1] = 1
    return Derivatives([*vectors, slope], len(vectors), weights, offset)


def _dual(
    slope: Float[Tensor, "rows choices"], logits: Float[Tensor, "rows choices"], example: Int[Tensor, "rows"], n: int
) -> Float[Tensor, "rows choices"]:
    """``w`` with ``F w`` the slope: a slope sums to zero, and so ``(diag(p) - p p') w = p w``."""
    answers = torch.bincount(example, minlength=n)[example][:, None]
    return (slope.double() * answers).div_(logits.double().softmax(1).clamp_min_(_VANISHING))


def vectors_of(answers: int, probes: int, most: int = 1) -> int:
    """How many vectors the KL divergence over so many answers takes, of examples with ``most`` labelled positions."""
    exact = max(0, answers - 1)
    if exact > probes:
        return max(2, probes)
    draws = probes // max(1, exact)
    return exact * min(draws, most) + (most > draws)


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

    One forward and ``probes`` backward passes over the data (fewer where fewer are exact); with ``current`` one forward
    pass more, and a backward pass where probes do not hold the slope (:func:`output_derivatives`); for each
    ``interchange`` in the distribution one forward pass more for each model; one more for values of counterfactual
    inputs. Memory does not grow with the number of examples. With ``temperature`` other than 1 everything is
    ``temperature**2`` times the divergence at that temperature.

    Raises:
        ValueError: a model in training mode, fewer than one probe, a temperature that is not positive, NaN or
            infinite activations.
    """
    check_model(model)
    check_positions(removal.units, len(examples))
    if metric is None and examples.choices is not None and len(examples.choices) == 1:
        raise ValueError(
            f"choices has one answer, {int(examples.choices[0])}, which is certain: there is no divergence"
        )
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least one is needed")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    paired = removal.values.paired or (current is not None and current.values.paired)
    for site, value in zip(removal.units.sites, removal.values.tensors, strict=True):
        if not removal.values.paired and not all_finite(value):
            raise ValueError(f"values for {site.hook} hold NaN or infinite constants: no unit can be set to them")
    most = most_answers(examples)
    settings = {"probes": probes, "temperature": temperature, "metric": metric, "seed": seed, "most": most}

    def of(index: Int[Tensor, "batch"], batch: Examples) -> Samples:
        same = (interventions, model, removal, examples, index, seed)
        there = removal.for_examples(index, examples.spans)
        source = paired_values(model, examples, index, there.units) if paired else None
        past = source if current is not None and current.values.paired else None  # of what has no constants of its own
        removed = () if current is None else (removal_of(model, current, examples, index, past),)
        with torch.no_grad():
            z = None
            if current is not None:
                with intervened(model, *drawn_interventions(*same)):
                    z = recall(index, lambda: answer_logits(model, batch))
            with intervened(model, *removed):
                drawn = drawn_interventions(*same)
        target = source if source is not None and removal.values.paired else removal.values
        part = _linearised(model, batch, index, there, target.tensors, removed, drawn, z, settings)
        if current is None or restorable:
            return part
        mask = current.circuit.mask.to(part.effects)
        return replace(part, linear=part.linear * mask, effects=part.effects * mask)

    yield from in_batches(of, model, examples, batch_size, removal.units)


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
        before = recorded(model, removal.units) if removed else nullcontext()
        with intervened(model, *drawn), before as own:
            with intervened(model, *removed), recorded(model, removal.units, gradients=True, lean=True) as recording:
                changed = answer_logits(model, batch)
        own = recording if own is None else own
        here = changed.detach()
        spared = first_tokens(model, batch.tokens, batch.attention_mask, removal.first_token)
        if z is None:
            vectors = output_probes(here, batch, index, **settings)
            effects = _effects(own, recording, values, changed, vectors, spared, drawn)
            nothing = effects.new_zeros(len(batch))
            return Samples(index, nothing, torch.zeros_like(effects[0]), effects, nothing)
        derivatives = output_derivatives(z, here, batch, index, **settings)
        effects = _effects(own, recording, values, changed, derivatives.vectors, spared, drawn)
    linear = torch.einsum("vb,vbu->bu", derivatives.slope.to(effects), effects)
    made = divergence(z, here, batch, settings["metric"])
    return Samples(index, derivatives.offset, linear, effects[: derivatives.probes], made)


def _effects(
    own: Recording,
    recording: Recording,
    values: tuple[Float[Tensor, "..."], ...],
    logits: Float[Tensor, "rows choices"],
    vectors: list[Float[Tensor, "rows choices"]],
    spared: Bool[Tensor, "batch pos"] | None,
    drawn: tuple[Intervention, ...],
) -> Float[Tensor, "probes batch units"]:
    """For each vector on the logits its derivative along the removal of each unit: from the value that the unit's own
    mechanism gives (before the removals made so far: overlapping directions share theirs), or ``drawn`` interventions
    give it, to its replacement."""
    moved = list(zip(recording.units.sites, (v.detach() for v in own.read()), values, strict=True))
    past = [_edges_set(drawn, number) for number in range(len(moved))]
    steps = _steps(moved, spared, in_place=not any(past))
    heard = {i: recording.heard[site.hook] for i, (site, *_) in enumerate(moved) if site.hook in recording.heard}

    def step(number: int) -> Float[Tensor, "batch _ _ _"]:
        kept = steps[number]  # others are made when they are needed, and not kept
        return step_to(*moved[number], spared) if kept is None else kept

    rows: list[dict[int, Tensor]] = []
    later: dict[int, list[Tensor]] = {}  # edges of which one product serves all vectors
    with taking(heard, step):
        for gradients in pulled(recording, logits, vectors):
            rows.append({})
            for number, ((site, v, _), g) in enumerate(zip(moved, gradients, strict=True)):
                if number in heard:
                    found = heard[number].take()
                    rows[-1][number] = v.new_zeros(len(v), site.size) if found is None else found
                elif site.kind == "edge" and g.shape[2] == 1 and not past[number]:
                    later.setdefault(number, []).append(g)
                else:
                    move = step(number)
                    rows[-1][number] = site.along(g.to(move), move)
                    for share, c in past[number]:  # from there on, and not from what the writer writes
                        move = step_to(site, v, c, spared)
                        rows[-1][number] -= share.to(move) * site.along(g.to(move), move)
    for number, gradients in later.items():
        for row, one in zip(rows, together(gradients, step(number)), strict=True):
            row[number] = one
    return torch.stack([torch.cat([row[i].to(row[0].device) for i in range(len(moved))], 1) for row in rows])


def _edges_set(
    drawn: tuple[Intervention, ...], number: int
) -> list[tuple[Float[Tensor, "batch units"], Float[Tensor, "..."]]]:
    """Which of a site's edges are set by interventions, of which each example is under one, and to what. Other units'
    activations show that by themselves."""
    if not drawn or drawn[0].units.sites[number].kind != "edge":
        return []
    found = [(1 - part.units.split(part.keep)[number], part.values.tensors[number]) for part in drawn]
    return [(share, value) for share, value in found if bool(share.any())]


def _steps(
    moved: list[tuple[Site, Float[Tensor, "batch _ _ _"], Float[Tensor, "..."]]],
    spared: Bool[Tensor, "batch pos"] | None,
    *,
    in_place: bool,
) -> list[Float[Tensor, "batch _ _ _"] | None]:
    """The step of every site's values. Edges have the same writers' again and again: one step of all writers serves all
    sites whose values begin as the largest one's do; for others (positions of their own, say) ``None``. Where it serves
    all edges it takes the place of their values, if nothing else needs these (``in_place``): new memory takes longer.
    """
    edges = [part for part in moved if part[0].kind == "edge" and part[0].positions is None]
    most, all_v, all_c = max(edges or moved, key=lambda part: part[0].rows)

    def shares(site: Site, v: Tensor, c: Tensor) -> bool:
        if site.kind != "edge" or site.positions is not None or v.data_ptr() != all_v.data_ptr():
            return False
        return torch.equal(c, all_c[: len(c)]) if c.ndim == 2 else c.data_ptr() == all_c.data_ptr()

    alike = [shares(*part) for part in moved]
    alone = in_place and all(same for same, (site, *_) in zip(alike, moved, strict=True) if site.kind == "edge")
    whole = all_v
    if edges:
        whole = step_to(most, all_v, all_c, spared, in_place=alone)
        whole = rows_last(rows_first(whole).contiguous())
    return [
        whole[:, :, : site.rows] if same else None if site.kind == "edge" else step_to(site, v, c, spared)
        for same, (site, v, c) in zip(alike, moved, strict=True)
    ]


def step_to(
    site: Site,
    v: Float[Tensor, "batch pos some width"],
    c: Float[Tensor, "*run some width"],
    spared: Bool[Tensor, "batch pos"] | None,
    *,
    in_place: bool = False,
) -> Float[Tensor, "batch pos some width"]:
    """By how much setting each value to its replacement moves it, where it is set at all; ``in_place`` it may take the
    value's place."""
    v = v.detach() if v.dtype == torch.float64 else v.detach().float()
    step = torch.sub(c.to(v), v, out=v if in_place else None)
    where = site.position_mask(v.shape[0], v.shape[1])
    step = step if where is None else step * where.to(step)[..., None, None]
    return step if spared is None else step.masked_fill_(spared.to(step.device)[..., None, None], 0)


def pulled(
    recording: Recording,
    outputs: Float[Tensor, "*shape"],
    vectors: list[Float[Tensor, "*shape"]],
    *,
    again: bool = False,
) -> Iterator[tuple[Float[Tensor, "batch pos some width"], ...]]:
    """For each vector on the outputs (logits, or other values of the same run) its gradient with respect to the
    recorded units' values, per site. One backward pass each; ``again``: the graph is needed afterwards."""
    activations = dict(recording.activations)
    # what is heard takes its effects on the way to these
    activations |= {f"{name}:stream": one.stream for name, one in recording.heard.items() if one.stream.is_leaf}
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
