"""Baselines: other ways to order units, with the signature of :mod:`tl_sparsify.search.score`'s.

Each is a function ``(model, examples, units, *, seed, ...) -> Scores``; larger means needed more. They are here to be
beaten, so each is the method as published, without its bugs, and states what it costs. ``n`` is the number of units.

==========================  =================================================================  ======================
method                      what it is                                                         forward + backward
==========================  =================================================================  ======================
``random``                  a random order                                                     0
``activation_norm``         the length of the unit's value                                     1
``variance``                of the unit's value (:mod:`tl_sparsify.search.score`)                     2
``scaled_variance``         of what the unit writes (:mod:`tl_sparsify.search.score`)                 2
``exact_zero``              divergence by setting the unit to zero                             ``n + 1``
``exact_mean``              divergence by setting the unit to its mean                         ``n + 2``
``activation_patching``     a metric's change by the unit's value in another run               ``n + 2``
``attribution_patching``    the same to first order                                            2 + 1
``atp_star``                the same, attention exact, gradients past a block at a time              5 + blocks, blocks
``second_order``            a metric's change to second order                                  2 + 2
``eap``                     absolute first-order effects on all later readers                  2 + 1
``eap_ig``                  the same, along the way between the two inputs                     1 + ``steps``, ``steps``
``hard_concrete``           trained: stochastic gates and a penalty on open ones               81 + 80 by default
``top_k_gate``              trained: gates that sum to a random size                           81 + 80 by default
``information_bottleneck``  trained: gates between a value and noise                           81 + 80 by default
``acdc``                    edges removed one at a time at each threshold                      ``thresholds n + 2``
``eap_ig_activations``      edges: the same, along the way between what writers write         ``2 + layers (steps - 1)``
``information_flow``        edges: how near a writer's vector is to what the reader takes in   1
``in_rounds``               any of them, again and again in the model with units removed       ``rounds`` times
==========================  =================================================================  ======================

A one-unit score cannot see redundancy or cancellation; :func:`tl_sparsify.sparsify` selects jointly.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.patching import generic_activation_patch

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify.comparison.edge_attribution import (
    Direction,
    Edges,
    Run,
    corrupted_run,
    eap,
    eap_ig,
    edge_attribution,
    runs,
)
from tl_sparsify.comparison.edge_scores import acdc, eap_ig_activations, information_flow
from tl_sparsify.comparison.rounds import in_rounds
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_logits,
    answer_rows,
    check_call,
    output,
    run_values,
    shared_batches,
    unit_positions,
)
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.memory import device_of
from tl_sparsify.core.metrics import Metric, by_example, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.units import Model, Units
from tl_sparsify.gradients.backward import Name, Rules, named
from tl_sparsify.masking.hard_concrete import hard_concrete
from tl_sparsify.masking.information_bottleneck import information_bottleneck
from tl_sparsify.masking.top_k_gate import top_k_gate
from tl_sparsify.patching.atp_star import atp_star
from tl_sparsify.patching.second_order import second_order
from tl_sparsify.search.attribution import exact, gradient
from tl_sparsify.search.constants import zero
from tl_sparsify.search.score import scaled_variance, variance
from tl_sparsify.search.scores import Scores

__all__ = [
    "Edges",
    "acdc",
    "activation_norm",
    "activation_patching",
    "atp_star",
    "attribution_patching",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "edge_attribution",
    "exact_mean",
    "exact_zero",
    "hard_concrete",
    "in_rounds",
    "information_bottleneck",
    "information_flow",
    "random",
    "scaled_variance",
    "second_order",
    "top_k_gate",
    "variance",
]

_PATCHED = re.compile(r"blocks\.(\d+)\.(?:attn\.hook_(z)|mlp\.hook_(post)|hook_(mlp_out|attn_out))")


@checked
def random(model: Model, examples: Examples, units: Units, *, seed: int = 0) -> Scores:
    """A random score for every unit: the control that every method must beat. No model pass.

    Example:
        >>> tls.baselines.random(model, train, units, seed=0).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    scores = _random.uniform(seed, 61, torch.arange(len(units)))
    return Scores(units, scores, torch.full_like(scores, float("nan")), "random", "no unit", 0, 0)


@checked
def activation_norm(
    model: Model, examples: Examples, units: Units, *, seed: int = 0, batch_size: int | None = None
) -> Scores:
    """The length of each unit's value, in its own units: the mean over an example's positions that are neither padding
    nor the beginning-of-sequence token, then over examples. Rescaling a unit fools it, and edges from one writer are
    all alike: their value is what it writes.

    One forward pass over the data.

    Raises:
        ValueError: a model in training mode.

    Example:
        >>> tls.baselines.activation_norm(model, train, units).forward_passes
        1
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, examples, batch_size):
            here = units.for_examples(index, examples.spans)
            with recorded(model, here) as recording:
                output(model, batch)
            lengths: list[Float[Tensor, "batch some"]] = []
            for site, v in zip(here.sites, recording.read(), strict=True):
                where = unit_positions(model, batch, site, v).double()[..., None]
                total = (where * v.double().norm(dim=3)).sum(1) / where.sum(1).clamp_min(1)
                lengths.append(total.repeat(1, len(site.readers) or 1).to(device_of(model)))
            yield Moments.of(torch.cat(lengths, 1))

    with torch.no_grad():
        total = Moments.over(parts(), len(examples))
    return Scores(units, total.mean, total.stderr, "activation norm", "activation units", 1, 0)


@checked
def exact_zero(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """:func:`score.exact` with zeros: the KL divergence (nats), or the drop of ``metric``, when one unit is zero.

    One forward pass over the data for each unit and one for the original; one of one example.

    Raises:
        ValueError: as :func:`score.exact`.

    Example:
        >>> tls.baselines.exact_zero(model, train, units, progress=False).forward_passes
        13
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    settings = {"metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    found = exact(model, examples, units, values=zero(model, examples, units), **settings)
    return replace(found, name="exact, zero")


@checked
def exact_mean(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    values: Values | None = None,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """:func:`score.exact` with means (or other constants): the KL divergence (nats), or the drop of ``metric``, when
    one unit is at its mean.

    One forward pass over the data for each unit and one for the original; one for the means where not given.

    Raises:
        ValueError: as :func:`score.exact`.

    Example:
        >>> tls.baselines.exact_mean(model, train, units, progress=False).forward_passes
        14
    """
    settings = {"metric": metric, "seed": seed, "batch_size": batch_size, "progress": progress}
    return replace(exact(model, examples, units, values=values, **settings), name="exact, mean")


@checked
def activation_patching(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    source: Run | None = None,
    direction: Direction = "noising",
    metric: Metric = log_odds,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Activation patching by TransformerLens: what each unit's value in another run does to ``metric`` (in its units),
    one unit at a time, at all of its positions together.

    Args:
        source: the corrupted run; where not given the counterfactual if the examples have one, else another example.
        direction: ``noising``: the drop when the clean run gets the corrupted value, which is
            :func:`score.exact` with that source. ``denoising``: the rise when the corrupted run gets the clean value,
            of the metric with the clean run's right answers. Both are positive for a unit that carries the answer.
        metric: one number for each labelled position; an example's is their mean.

    One forward pass over the data for each unit, one for the run that is changed and one for the other. Units are
    heads, neurons, whole MLPs and attention layers.

    Raises:
        ValueError: a model in training mode or none of TransformerLens's; other units; an unknown ``source`` or
            ``direction``, or one that the examples do not have; a metric that gives not one number for each row.

    Example:
        >>> found = tls.baselines.activation_patching(model, train, units, progress=False)
        >>> found.absolute.top(0.25)  # signed: an order by size takes `absolute`
        Circuit(3 of 12 units: 3 heads)
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    for site in units.sites:
        if _PATCHED.fullmatch(site.hook) is None or site.kind not in ("head", "neuron", "mlp", "attention"):
            raise ValueError(
                f"{site.kind} units of {site.hook} are not patched: use heads(), neurons(), mlps() or attentions()"
            )
    if not all(hasattr(model, name) for name in ("run_with_hooks", "cfg")):
        raise ValueError(f"{type(model).__name__} is no model of TransformerLens's: use score.exact with a source")
    sign = 1 if direction == "noising" else -1

    def parts() -> Iterator[Moments]:
        for index, _ in shared_batches(model, examples, batch_size):
            near, far = runs(examples, index, source, direction, seed)
            here = units.for_examples(index, examples.spans)
            before = by_example(measured_by(metric, answer_logits(model, near), near), near).double()
            after = _patched(model, near, run_values(model, far, here), metric, progress)
            yield Moments.of(sign * (before[:, None] - after))

    with torch.no_grad():
        total = Moments.over(parts(), len(examples))
    name = f"activation patching ({direction})"
    return Scores(units, total.mean, total.stderr, name, "units of the metric", len(units) + 2, 0)


@dataclass(frozen=True)
class _Masked:
    """What TransformerLens's patching asks of a model, for one batch: the attention mask goes along, which it leaves
    out."""

    model: Any
    batch: Examples

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        mask = self.batch.attention_mask
        given = {} if mask is None else {"attention_mask": mask.to(tokens.device).long()}
        return methodcaller("run_with_hooks", tokens, fwd_hooks=fwd_hooks, **given)(self.model)


def _patched(
    model: Model, batch: Examples, values: Values, metric: Metric, progress: bool
) -> Float[Tensor, "batch units"]:
    """The metric of each example with each unit alone at its value. One forward pass for each unit."""
    units = values.units
    example, position = answer_rows(batch)
    found: list[Tensor] = []

    def measured(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
        rows = logits[example.to(logits.device), position.to(logits.device)]
        rows = rows if batch.choices is None else rows[:, batch.choices.to(rows.device)]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        found.append(by_example(measured_by(metric, rows, batch), batch).double())
        return found[-1].mean()  # what TransformerLens keeps, in float32

    def patch(activation: Tensor, index: list[int], new: dict[int, Tensor]) -> Tensor:
        _, number, unit = index
        site = units.sites[number]
        v = site.read(activation)
        value, changed = new[number][:, :, unit].to(v), v.clone()
        where = site.position_mask(*v.shape[:2])
        kept = v[:, :, unit]
        changed[:, :, unit] = value if where is None else torch.where(where.to(v.device)[..., None], value, kept)
        return site.write(activation, v, changed)

    cache: dict[str, dict[int, Tensor]] = {}
    rows: dict[str, list[tuple[int, int, int]]] = {}
    for number, (site, value) in enumerate(zip(units.sites, values.tensors, strict=True)):
        match = cast("re.Match[str]", _PATCHED.fullmatch(site.hook))
        cache.setdefault(site.hook, {})[number] = value
        rows.setdefault(cast(str, match[match.lastindex or 2]), []).extend(
            (int(match[1]), number, unit) for unit in range(site.size)
        )
    tokens = batch.tokens.to(device_of(model))
    order: list[int] = []
    with nullcontext() if progress and sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        for name, cells in rows.items():
            order += [units.offsets[number] + unit for _, number, unit in cells]
            frame = pd.DataFrame(cells, columns=["layer", "site", "unit"])
            patching: Any = generic_activation_patch
            patching(_Masked(model, batch), tokens, cache, measured, patch, activation_name=name, index_df=frame)
    return torch.stack(found, 1)[:, torch.tensor(order).argsort().to(found[0].device)]


@checked
def attribution_patching(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    source: Run | None = None,
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Attribution patching: :func:`activation_patching` (``noising``) to first order, linearised at the clean run. It
    is :func:`score.gradient` with a source run: signed, in units of ``metric``.

    Args:
        source: the corrupted run; where not given the counterfactual if the examples have one, else another example.
        backward: how the metric is differentiated (:mod:`tl_sparsify.gradients.backward`): ``true``, ``gim``, ``relp``.

    Two forward and one backward pass over the data.

    Raises:
        ValueError: as :func:`score.gradient`.

    Example:
        >>> found = tls.baselines.attribution_patching(model, train, units)
        >>> found.forward_passes, found.backward_passes
        (2, 1)
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    run = corrupted_run(examples, source)
    settings: dict[str, Any] = {"metric": metric, "backward": backward, "seed": seed, "batch_size": batch_size}
    found = gradient(model, examples, units, source=run, **settings)
    return replace(found, name=named("attribution patching", backward))
