"""Other methods' scores of edges: ACDC, integrated gradients at the writers, and information-flow routes.

ACDC removes edges one at a time, wherever the divergence grows by less than a threshold (Conmy et al., arXiv
2304.14997). Integrated gradients average the gradient at each reader over runs in which the writers of one layer lie
between their values in two runs (Hanna et al., arXiv 2403.17806). Information-flow routes ask no gradient: how near
what a writer writes comes to all that a reader takes in (Ferrando and Voita, arXiv 2403.00824).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.readers import term_count
from tl_sparsify.comparison.edge_attribution import Run, runs
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import paired_values, removal
from tl_sparsify.core.edges import prune
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_logits,
    check_call,
    frozen,
    in_batches,
    output,
    run_values,
    shared_batches,
    unit_positions,
)
from tl_sparsify.core.intervene import Intervention, intervened, recorded
from tl_sparsify.core.measure import remembering
from tl_sparsify.core.metrics import Metric, by_example, divergence, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean
from tl_sparsify.search.scores import Scores

_MOST = 100_000  # forward passes
_ENTRIES = 2**26  # of what writers write in another run, that are kept


@checked
def acdc(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    thresholds: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1),
    values: Values | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """ACDC, for edges: from the logits backwards each edge is removed if the mean KL(original || circuit) grows by less
    than a threshold, and with a head or MLP that nothing reads any more go all edges into it.

    An edge's score is the largest of ``thresholds`` (nats) at which it stays, 0 where it stays at none: many are equal,
    and circuits of sizes between those of the thresholds are cut among equals by the order of the units.

    Args:
        values: what removed edges carry (the published method's is the other run's value): the writers' means over
            ``examples`` where not given.

    One forward pass for each threshold and edge at most, one for the original's answers, and one for the means, or for
    the other run of :func:`constants.counterfactual`. That one is kept up to 2**26 numbers of what writers write on all
    examples; what is beyond runs again for each edge.

    Raises:
        ValueError: units that are no edges; thresholds that are none, negative or not finite; more than 100,000 forward
            passes.

    Example:
        >>> coarse = tls.edges(model, "layer")
        >>> tls.baselines.acdc(model, test, coarse, thresholds=[0.1], progress=False).measured_in
        'nats'
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    _check_edges(units)
    if not thresholds or not all(math.isfinite(t) and t >= 0 for t in thresholds):
        raise ValueError(f"thresholds is {thresholds!r}: give some numbers of nats, none of them negative")
    if len(units) * len(thresholds) > _MOST:
        raise ValueError(
            f"units holds {len(units):,} edges and thresholds {len(thresholds)}, a forward pass for each: "
            f"more than {_MOST:,}; take fewer thresholds, tls.edges(model, 'layer'), or baselines that are cheaper"
        )
    constants = mean(model, examples, units, batch_size=batch_size) if values is None else values
    (risk, passes), scores = _risks(model, examples, batch_size), torch.zeros(len(units), dtype=torch.float64)
    for threshold in sorted(thresholds):
        scores[_sweep(risk, units, constants, threshold, progress)] = threshold
    unknown = torch.full_like(scores, float("nan"))
    return Scores(units, scores, unknown, "ACDC", "nats", 1 + (values is None) + passes(), 0)


def _check_edges(units: Units) -> None:
    if any(site.kind != "edge" for site in units.sites):
        raise ValueError(f"units are {units!r}, not all of them edges: tls.edges(model) gives some")


def _risks(
    model: Model, examples: Examples, batch_size: int | None
) -> tuple[Callable[[Reduction], float], Callable[[], int]]:
    """What measures a reduction's risk (nats) on these examples, and what says how many forward passes that has taken,
    but for the original's. The original's answers are remembered, and what writers write in the other run of values of
    counterfactual inputs."""
    logits, writes = remembering(), remembering(_ENTRIES)
    rows: Counter[str] = Counter()

    def risk(reduction: Reduction) -> float:
        paired = reduction.values.paired
        widest = Units((max(reduction.units.sites, key=lambda site: site.rows),))

        def of(index: Int[Tensor, "batch"], batch: Examples) -> Moments:
            def written() -> Float[Tensor, "batch pos writers d_model"]:
                rows["other"] += len(index)
                return paired_values(model, examples, index, widest.for_examples(index, examples.spans)).tensors[0]

            original = logits(index, lambda: answer_logits(model, batch))
            here = reduction.for_examples(index, examples.spans).units
            w = writes(index, written) if paired else None  # of which each reader's writers are a beginning
            source = None if w is None else Values(here, tuple(w[:, :, : site.rows] for site in here.sites))
            rows["own"] += len(index)
            with intervened(model, removal(model, reduction, examples, index, source)):
                return Moments.of(divergence(original, answer_logits(model, batch), batch))

        rows["times"] += 1
        with torch.no_grad():
            return float(Moments.over(in_batches(of, model, examples, batch_size), len(examples)).mean)

    def passes() -> int:
        return rows["times"] + math.ceil(rows["times"] * rows["other"] / max(1, rows["own"]))

    return risk, passes


def _sweep(
    risk: Callable[[Reduction], float], units: Units, values: Values, threshold: float, progress: bool
) -> Bool[Tensor, "units"]:
    """The edges that stay at a threshold."""
    kept, now = torch.ones(len(units), dtype=torch.bool), 0.0
    readers = [
        range(part.start + number * site.rows, part.start + (number + 1) * site.rows)
        for site, part in zip(units.sites, units.slices, strict=True)
        for number in range(len(site.readers))
    ]
    for reader in bar(readers[::-1], f"ACDC at {threshold:g} nats", progress):
        kept = prune(Circuit(units, kept)).mask
        for edge in reversed(reader):
            if not kept[edge]:
                continue
            without = kept.clone()
            without[edge] = False
            then = risk(Reduction(Circuit(units, without), values))
            if then - now < threshold:
                kept, now = without, then
    return prune(Circuit(units, kept)).mask


@checked
def eap_ig_activations(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int = 5,
    values: Values | None = None,
    source: Run | None = None,
    metric: Metric = log_odds,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """EAP-IG over activations, for edges: ``sum_t (w - w') . g``, with ``w'`` what the writer writes in the other run
    and ``g`` the gradient of ``metric`` at the reader, averaged over runs in which what one layer's heads, one MLP or
    the embedding write is ``w' + k / steps (w - w')``, ``k = 1 .. steps``, and all else follows from there (after arXiv
    2403.17806, which moves activations one layer at a time; here what is moved goes on to depend on what its layer
    reads). A beginning-of-sequence token is left alone. Signed, in units of the metric: positive says that the metric
    is lower with the other run's value. One step is :func:`score.gradient`.

    Args:
        values: what writers write instead of in another run: a constant for each.
        source: the other run; where not given the counterfactual if the examples have one, else another example.

    With ``n`` layers of heads, MLPs and the embedding together, ``2 + n (steps - 1)`` forward and ``1 + n (steps - 1)``
    backward passes over the data.

    Raises:
        ValueError: units that are no edges; ``steps`` below one; values of other units or of a run, or together with a
            ``source``; an unknown ``source``, or one that the examples do not have.

    Example:
        >>> coarse = tls.edges(model, "layer")
        >>> tls.baselines.eap_ig_activations(model, test, coarse, steps=2).backward_passes
        8
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    _check_edges(units)
    check_count("steps", steps, least=None, most=MOST)
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
    if values is not None and (values.units != units or not (values.constant or values.paired)):
        raise ValueError(
            f"values are {values!r}: give a constant for each writer of {units!r}, or name the run by source"
        )
    if values is not None and source is not None:
        raise ValueError(f"values are given, and source is {source!r}: give one of them")
    kept, other = _together(units), None if values is None or values.paired else values
    run: Run | None = "counterfactual" if values is not None and values.paired else source

    def parts() -> Iterator[Moments]:
        for index, _ in shared_batches(model, examples, batch_size, units):
            here = units.for_examples(index, examples.spans)
            near, tensors = examples[index], () if other is None else other.tensors
            if other is None:
                near, far = runs(examples, index, run, "noising", seed)
                tensors = run_values(model, far, here).tensors
            replaced = Values(here, tensors)
            yield Moments.of(_integrated(model, near, here, replaced, kept, steps, metric))

    total = Moments.over(parts(), len(examples))
    passes = 1 + len(kept) * (steps - 1)
    name = f"EAP-IG, activations ({steps} steps)"
    return Scores(units, total.mean, total.stderr, name, "units of the metric", passes + (other is None), passes)


def _together(units: Units) -> Bool[Tensor, "layers units"]:
    """For the embedding, each layer's heads and each MLP, in order, which edges they write."""
    most = max((site.writers for site in units.sites), key=len)
    layers = list(dict.fromkeys(_layer(name) for name in most))
    numbers = [
        torch.tensor([layers.index(_layer(name)) for name in site.writers]).repeat(len(site.readers))
        for site in units.sites
    ]
    return torch.cat(numbers) == torch.arange(len(layers))[:, None]


def _layer(writer: str) -> str:
    """``L2H`` of ``L2H11``: those that are moved together."""
    return re.sub(r"H\d+$", "H", writer)


def _integrated(
    model: Model,
    batch: Examples,
    units: Units,
    values: Values,
    layers: Bool[Tensor, "layers units"],
    steps: int,
    metric: Metric,
) -> Float[Tensor, "batch units"]:
    """The mean over layers and steps of each writer's whole step along the gradient at each reader."""
    moves: list[Float[Tensor, "batch pos writers d_model"]] = []
    first = first_tokens(model, batch.tokens, batch.attention_mask, "bos")  # stays as it is, as in every ablation
    total: Tensor | None = None
    between = [(layer, k / steps) for k in range(1, steps) for layer in layers]
    for layer, level in [(layers[0], 1.0), *between]:  # the clean run first: it says how far each writer moves
        keep = 1 - (1 - level) * layer.double()
        with frozen(model), torch.enable_grad():
            moved = Intervention(units, keep, values, first_token="bos")
            with intervened(model, moved), recorded(model, units, gradients=True) as own:
                value = by_example(measured_by(metric, answer_logits(model, batch), batch), batch).sum()
            hooks = list(own.activations)
            slopes = torch.autograd.grad(value, [own.activations[hook] for hook in hooks])
        if not moves:
            for site, w, other in zip(units.sites, own.read(), values.tensors, strict=True):
                w = w.detach() if w.dtype == torch.float64 else w.detach().float()
                moved_at = torch.ones(w.shape[:2], dtype=torch.bool, device=w.device)
                for where in (site.position_mask(*w.shape[:2]), None if first is None else ~first):
                    moved_at &= True if where is None else where.to(w.device)
                moves.append((w - other.to(w)) * moved_at.to(w)[..., None, None])
        along = zip(units.sites, own.pull(dict(zip(hooks, slopes, strict=True))), moves, strict=True)
        found = torch.cat([site.along(slope.to(move), move) for site, slope, move in along], 1).double()
        total = found * len(layers) if total is None else total + found  # at the near run all layers are the same
    if total is None:
        raise ValueError(f"steps is {steps}; at least one is needed")
    return total / (len(layers) * steps)


@checked
def information_flow(
    model: Model, examples: Examples, units: Units, *, seed: int = 0, batch_size: int | None = None
) -> Scores:
    """Information-flow routes, for edges: ``max(0, |x| - |x - w|) / sum over writers of the same``, with ``x`` what the
    reader takes in, ``w`` what the writer writes and ``|.|`` the sum of absolute values, the mean over an example's
    positions (without padding and a beginning-of-sequence token) and over examples (arXiv 2403.00824). Shares, from 0
    to 1; those of a reader sum to 1. They know nothing of what the reader does with it: a head's query, key and value
    have equal scores.

    One forward pass over the data.

    Raises:
        ValueError: units that are no edges; a model with norms behind attention, where what a head writes is no part of
            what a reader takes in.

    Example:
        >>> found = tls.baselines.information_flow(model, test, tls.edges(model))
        >>> round(float(found.scores[[name.endswith("->L1H2.q") for name in found.units.names]].sum()), 6)
        1.0
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    _check_edges(units)
    if any(term_count(model, site.writers) > 1 for site in units.sites):
        raise ValueError("model has norms behind attention: what a head writes is no part of what a reader takes in")

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, examples, batch_size, units):
            here = units.for_examples(index, examples.spans)
            with recorded(model, here) as own:
                output(model, batch)
            found: list[Float[Tensor, "batch some"]] = []
            for site, w in zip(here.sites, own.read(), strict=True):
                x, where = own.activations[site.hook], unit_positions(model, batch, site, w).double()
                alike = bool((x == x[:, :, :1]).all())  # readers differ only in a model with edges removed
                shares = torch.stack([_shares(w, x[:, :, r]) for r in range(1 if alike else x.shape[2])], 1)
                means = torch.einsum("bp,brpw->brw", where, shares) / where.sum(1).clamp_min(1)[:, None, None]
                found.append(means.expand(-1, x.shape[2], -1).flatten(1))
            yield Moments.of(torch.cat(found, 1))

    with torch.no_grad():
        total = Moments.over(parts(), len(examples))
    return Scores(units, total.mean, total.stderr, "information flow", "share of what is read", 1, 0)


def _shares(
    written: Float[Tensor, "batch pos writers d_model"], taken: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos writers"]:
    """How near each vector comes to the one taken in, as shares."""
    x, w = (part.flatten(0, 1).double() for part in (taken, written))
    near = (x.abs().sum(-1, keepdim=True) - torch.cdist(x[:, None], w, p=1)[:, 0]).clamp_min(0)
    return (near / near.sum(-1, keepdim=True).clamp_min(1e-30)).unflatten(0, taken.shape[:2])
