"""AtP*: attribution patching with exact attention and gradients that drop a block at a time (Kramar et al., arXiv
2403.00745).

First-order effects of queries and keys vanish where attention is saturated. Here attention is computed anew with a
head's queries (or keys, or values) from the other run, and only what follows is linearised:

    effect[h, q] = sum_t (z[h, t] - z'[h, t]) . g[h, t],      z' = head h's value with the other run's queries.

And effects through different blocks cancel. GradDrop takes them with the gradient going past one block at a time:
``1 / (L - 1) sum_l |effect without block l|``, where a unit's own block gives nothing.

Published per position; here a unit is replaced at all its positions together, as everywhere in this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, frozen, output, shared_batches
from tl_sparsify.core.intervene import Intervention, intervened, recorded
from tl_sparsify.core.metrics import Metric, by_example, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units
from tl_sparsify.gradients.backward import Rules, modified
from tl_sparsify.search.scores import Scores

Run = Literal["counterfactual", "shuffled"]
_PARTS = ("q", "k", "v")


@checked
def atp_star(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    source: Run | None = None,
    drop: bool = True,
    metric: Metric = log_odds,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """AtP* (arXiv 2403.00745) for heads and neurons, in units of the metric and never negative: of a head the sum over
    its queries, keys and values of their effects' absolute values, with attention computed exactly; of a neuron its
    effect's. Where heads share keys and values each is given its group's.

    Args:
        source: the other run; where not given the counterfactual if the examples have one, else another example.
        drop: take effects with gradients past each block in turn (GradDrop); else with all of them.
        metric: one number for each labelled position; an example's is their mean.

    Five forward passes (two for neurons alone), and with ``drop`` a forward and a backward pass for each block, else
    one of each.

    Raises:
        ValueError: a model in training mode, units other than heads and neurons, an unknown ``source`` or one that the
            examples do not have, a model without ``hook_q``, ``hook_k`` and ``hook_v``.

    Example:
        >>> tls.baselines.atp_star(model, train, units).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    for site in units.sites:
        if site.kind not in ("head", "neuron"):
            raise ValueError(f"AtP* is for heads and neurons; {site.hook} has units of kind {site.kind!r}")
    default = "shuffled" if examples.counterfactual_tokens is None else "counterfactual"
    paired = InterventionDistribution.interchange(1.0, source or default)
    layers = _layers(model)
    rules = [Rules(without=(layer,)) for layer in range(layers)] if drop and layers > 1 else [Rules()]

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, examples, batch_size, units):
            here = units.for_examples(index, examples.spans)
            other = source_batch(paired, examples, index, seed)
            moves = _moves(model, batch, other, here)
            total = torch.zeros(len(batch), len(units), dtype=torch.float64)
            for rule in rules:
                total += _sizes(moves, _gradients(model, batch, here, rule, metric)).cpu()
            yield Moments.of(total / max(1, len(rules) - 1))

    total = Moments.over(parts(), len(examples))
    forward = (5 if any(site.kind == "head" for site in units.sites) else 2) + len(rules)
    name = "AtP*" if drop else "AtP*, without GradDrop"
    return Scores(units, total.mean, total.stderr, name, "units of the metric", forward, len(rules))


def _layers(model: Any) -> int:
    return len(model.blocks)


def _whole(units: Units) -> Units:
    """The same units at every position."""
    return Units(tuple(replace(site, positions=None) for site in units.sites))


def _moves(model: Model, batch: Examples, other: Examples, units: Units) -> list[list[Float[Tensor, "batch pos _ _"]]]:
    """By how much each unit's value is another one with the other run's values: of heads by part, ``q, k, v``."""
    numbers = [number for number, site in enumerate(units.sites) if site.kind == "head"]
    inputs = [_inputs(model, [units.sites[number] for number in numbers], part) for part in _PARTS if numbers]
    clean, *_ = _values(model, batch, [_whole(units)])
    theirs, *parts = _values(model, other, [_whole(units), *inputs])
    by_part = _heads_by_part(model, batch, clean, numbers, parts)
    found: list[list[Tensor]] = []
    for number, (site, v, w) in enumerate(zip(units.sites, clean.tensors, theirs.tensors, strict=True)):
        if number in by_part:
            found.append([v - changed for changed in by_part[number]])
            continue
        where = site.position_mask(*v.shape[:2])
        found.append([v - w if where is None else (v - w) * where.to(v)[..., None, None]])
    return found


def _values(model: Model, batch: Examples, parts: list[Units]) -> list[Values]:
    """The values of several kinds of units. One forward pass."""
    with torch.no_grad(), ExitStack() as stack:
        seen = [stack.enter_context(recorded(model, part)) for part in parts]
        output(model, batch)
    return [Values(part, recording.read()) for part, recording in zip(parts, seen, strict=True)]


def _heads_by_part(
    model: Model, batch: Examples, clean: Values, numbers: list[int], theirs: list[Values]
) -> dict[int, list[Float[Tensor, "batch pos _ _"]]]:
    """The values of the heads of the sites with these numbers with queries, keys or values of the other run, all else
    in the model as it is: the heads of all layers at once, since what they pass on is set back."""
    if not numbers:
        return {}
    heads = Units(tuple(clean.units.sites[number] for number in numbers))
    own = Values(heads, tuple(clean.tensors[number] for number in numbers))
    unchanged = Intervention(heads, torch.zeros(len(heads)), own)
    found: dict[int, list[Tensor]] = {number: [] for number in numbers}
    for values in theirs:
        changed = Intervention(values.units, torch.zeros(len(values.units)), values)
        with torch.no_grad(), recorded(model, heads) as seen, intervened(model, changed, unchanged):
            output(model, batch)
        for number, value in zip(numbers, seen.read(), strict=True):
            found[number].append(value)
    return found


def _inputs(model: Any, sites: list[Site], part: str) -> Units:
    """The queries, keys or values of these sites' heads."""
    found: list[Site] = []
    for site in sites:
        attn = model.blocks[site.layer].attn
        size = site.size if part == "q" else len(attn.W_K if part == "k" else attn.W_V)
        found.append(Site("head", site.layer, f"blocks.{site.layer}.attn.hook_{part}", size, site.positions))
    return Units(tuple(found))


def _gradients(
    model: Model, batch: Examples, units: Units, rules: Rules, metric: Metric
) -> tuple[Float[Tensor, "batch pos _ _"], ...]:
    """The gradients of each example's metric with respect to the units."""
    with modified(model, rules), frozen(model), torch.enable_grad():
        with recorded(model, _whole(units), gradients=True) as recording:
            value = by_example(measured_by(metric, answer_logits(model, batch), batch), batch).sum()
        hooks = list(recording.activations)
        taken = torch.autograd.grad(value, [recording.activations[hook] for hook in hooks], allow_unused=True)
    return recording.pull(
        {
            hook: torch.zeros_like(recording.activations[hook]) if gradient is None else gradient
            for hook, gradient in zip(hooks, taken, strict=True)
        }
    )


def _sizes(
    moves: list[list[Float[Tensor, "batch pos _ _"]]],
    gradients: tuple[Float[Tensor, "batch pos _ _"], ...],
) -> Float[Tensor, "batch units"]:
    """Each unit's effects, without signs, summed over its parts."""
    return torch.cat(
        [
            torch.stack([(move.double() * g.double()).sum((1, 3)).abs() for move in parts]).sum(0)
            for parts, g in zip(moves, gradients, strict=True)
        ],
        1,
    )
