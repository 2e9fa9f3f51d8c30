"""Edges: how much of what a unit writes matters to each component that reads it, to first order.

A unit writes ``w[u]`` into the residual stream (a head its value times its block of ``W_O``, a neuron its value times
its row of ``W_out``, a whole layer its output). A later reader takes the stream in: the query, key or value of a head,
an MLP, or the logits. With ``g[r]`` the gradient of the metric with respect to what reader ``r`` takes in,

    edge[u, r] = E[ sum_t (w_clean[u, t] - w_corrupted[u, t]) . g[r, t] ],

the mean over examples taken before anything else (EAP: Syed et al., arXiv 2310.10348). A unit is scored by the sum or
the greatest of its edges' absolute values: their signed sum is attribution patching again, and where it is not, the
stream is not a sum of what units write, and the model is refused. EAP-IG averages ``g`` over inputs between the two
runs (Hanna et al., arXiv 2403.17806).

A first-order effect says little about large steps, and a sum of absolute values is not the effect of anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.ranks import summed
from tl_sparsify.comparison.edge_readers import Reader, Slopes, readers_of, taps
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, frozen, run_values, shared_batches
from tl_sparsify.core.intervene import Intervention, Recording, intervened, recorded
from tl_sparsify.core.metrics import Metric, by_example, log_odds, measured_by
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Units
from tl_sparsify.gradients.backward import Name, Rules, modified, named
from tl_sparsify.search.scores import Scores

Direction = Literal["noising", "denoising"]
"""Which run is changed, and so at which one effects are linearised: the clean one, or the corrupted one."""
Run = Literal["counterfactual", "shuffled"]
"""Where the corrupted run comes from: the paired counterfactual, or another example of the split."""

_STREAM = Units((Site("residual", 0, "blocks.0.hook_resid_pre", 1),))  # what goes into the first block
_ENTRIES = 2**26  # of the largest tensor that is made here


@dataclass(frozen=True, eq=False)
class Edges:
    """A score for the edge from every unit to every reader.

    Attributes:
        units: the units, which write.
        readers: their names: ``L1H0.q``, ``L1H0.k``, ``L1H0.v``, ``L1MLP``, ``logits``.
        scores: in units of the metric, signed: positive says that the metric is lower with the corrupted value. 0 where
            the reader does not come after the unit.
        forward_passes, backward_passes: over the data.

    Example:
        >>> edges = tls.baselines.edge_attribution(model, train, units)
        >>> tuple(edges.scores.shape) == (len(units), len(edges.readers)), "logits" in edges.readers
        (True, True)
    """

    units: Units
    readers: tuple[str, ...]
    scores: Float[Tensor, "units readers"]
    forward_passes: int
    backward_passes: int

    def nodes(self, reduce: Literal["sum", "max"]) -> Float[Tensor, "units"]:
        """The sum, or the greatest, of the absolute values of each unit's edges.

        Raises:
            ValueError: another ``reduce``.
        """
        if reduce not in ("sum", "max"):
            raise ValueError(f"reduce is {reduce!r}; it is sum or max")
        return self.scores.abs().sum(1) if reduce == "sum" else self.scores.abs().amax(1)

    def __repr__(self) -> str:
        u, r = divmod(int(self.scores.abs().argmax()), len(self.readers))
        largest = f"{self.units[u]} -> {self.readers[r]}"
        return f"Edges({len(self.units):,} units, {len(self.readers):,} readers, largest {largest})"


@checked
def eap(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    reduce: Literal["sum", "max"] = "sum",
    source: Run | None = None,
    direction: Direction = "noising",
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """Edge attribution patching, by unit: the sum or the greatest of the absolute values of its edges
    (:func:`edge_attribution`), in units of the metric.

    Two forward and one backward pass over the data.

    Raises:
        ValueError: as :func:`edge_attribution`, and another ``reduce``.

    Example:
        >>> tls.baselines.eap(model, train, units).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    shared = {"source": source, "direction": direction, "metric": metric, "seed": seed, "batch_size": batch_size}
    shared |= {"backward": backward}
    return eap_ig(model, examples, units, steps=1, reduce=reduce, **shared)


@checked
def eap_ig(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int = 5,
    reduce: Literal["sum", "max"] = "sum",
    source: Run | None = None,
    direction: Direction = "noising",
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """EAP with gradients averaged over ``steps`` inputs between the two runs (EAP-IG over inputs), by unit: the sum or
    the greatest of the absolute values of its edges (:func:`edge_attribution`), in units of the metric.

    ``1 + steps`` forward and ``steps`` backward passes over the data.

    Raises:
        ValueError: as :func:`edge_attribution`, and another ``reduce``.

    Example:
        >>> tls.baselines.eap_ig(model, train, units, steps=2).top(0.25)
        Circuit(3 of 12 units: 3 heads)
    """
    shared = {"source": source, "direction": direction, "metric": metric, "seed": seed, "batch_size": batch_size}
    shared |= {"backward": backward}
    found = edge_attribution(model, examples, units, steps=steps, **shared)
    scores = found.nodes(reduce)
    name = f"EAP ({reduce})" if steps == 1 else f"EAP-IG ({reduce}, {steps} steps)"
    name = named(name, backward)
    unknown = torch.full_like(scores, float("nan"))  # the absolute value of a mean has no simple one
    return Scores(units, scores, unknown, name, "units of the metric", found.forward_passes, found.backward_passes)


@checked
def edge_attribution(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    steps: int = 1,
    source: Run | None = None,
    direction: Direction = "noising",
    metric: Metric = log_odds,
    backward: Name | Rules = "true",
    seed: int = 0,
    batch_size: int | None = None,
) -> Edges:
    """The score of the edge from each unit (heads, neurons, whole MLPs and attention layers) to each later reader.

    Args:
        steps: 1: the gradient at one run (EAP). More: its mean at the stream ``far + k / steps * (near - far)`` into
            the first block, ``k = 1 .. steps``, from just after the far run to the near one, inclusive (EAP-IG); the
            near run is the one that ``direction`` names.
        source: the corrupted run; where not given the counterfactual if the examples have one, else another example.
        direction: ``noising``: the gradient is the clean run's, as in :func:`score.gradient` and the published EAP;
            the edges are minus TransformerLens's ``attribution_patch(model, clean=counterfactuals, corrupt=tokens)``
            in edge mode. ``denoising``: the gradient is the corrupted run's, of the metric with the clean run's right
            answers; the edges are those of ``attribution_patch(model, clean=tokens, corrupt=counterfactuals)``.
        metric: one number for each labelled position; an example's is their mean.
        backward: how the metric is differentiated (:mod:`tl_sparsify.gradients.backward`): ``true``, ``gim``, ``relp``.

    ``1 + steps`` forward and ``steps`` backward passes over the data. Memory: a number for each unit and reader.

    Raises:
        ValueError: a model in training mode; units other than these; what TransformerLens's edge mode refuses too:
            grouped-query attention, and a stream that is not the sum of what heads and MLPs write (post-norms, scales,
            parallel mixers); ``steps`` below one; an unknown ``source`` or ``direction``, or one that the examples do
            not have.

    Example:
        >>> tls.baselines.edge_attribution(model, train, units, steps=2).backward_passes
        2
    """
    check_call(model, examples, units, seed=seed, batch_size=batch_size)
    check_count("steps", steps, least=None, most=MOST)
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one is needed")
    weights, readers = _writing(model, units), readers_of(model)
    names = tuple(name for reader in readers for name in reader.names)

    def parts() -> Iterator[tuple[Tensor]]:
        for index, _ in shared_batches(model, examples, batch_size):
            near, far = runs(examples, index, source, direction, seed)
            here = units.for_examples(index, examples.spans)
            with modified(model, backward):
                part = _edges(model, near, far, here, weights, readers, steps, metric)
            yield (part.cpu(),)

    (total,) = summed(parts(), len(examples))
    sign = 1 if direction == "noising" else -1  # a step goes from the far run to the near one
    return Edges(units, names, sign * total / len(examples), 1 + steps, steps)


def runs(
    examples: Examples, index: Int[Tensor, "batch"], source: Run | None, direction: Direction, seed: int
) -> tuple[Examples, Examples]:
    """The run that is changed and the one that it is changed towards, for the examples ``index``: clean and corrupted
    for ``noising``, the other way round for ``denoising``. The run that is changed has the clean one's right and wrong
    answers.

    Raises:
        ValueError: an unknown ``source`` or ``direction``, one that the examples do not have, or answers that a
            corrupted run has elsewhere.
    """
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction is {direction!r}; it is noising or denoising")
    paired = InterventionDistribution.interchange(1.0, corrupted_run(examples, source))
    clean, corrupted = examples[index], source_batch(paired, examples, index, seed)
    if direction == "noising":
        return clean, corrupted
    if not torch.equal(clean.labels == NO_LABEL, corrupted.labels == NO_LABEL):
        raise ValueError(
            "direction is 'denoising', and shuffled partners are answered at other positions than their examples: "
            "give counterfactual_tokens, or use direction='noising'"
        )
    sets = {"right_answers": clean.right_answers, "wrong_answers": clean.wrong_answers}
    sets |= {"counterfactual_labels": clean.counterfactual_labels}  # wrong answers, where no others are given
    return replace(corrupted, labels=clean.labels, **sets), clean


def corrupted_run(examples: Examples, source: Run | None) -> Run:
    """The given source, or the counterfactual where the examples have one, else another example of the split."""
    if source is not None:
        return source
    return "shuffled" if examples.counterfactual_tokens is None else "counterfactual"


def _place(site: Site) -> int:
    """When a site writes: attention and MLPs in turn."""
    return 2 * site.layer + (site.kind in ("neuron", "mlp"))


def _writing(model: Any, units: Units) -> tuple[Float[Tensor, "some width d_model"] | None, ...]:
    """What each site's units are multiplied by where they write into the stream (``None``: nothing)."""
    hooks = {"head": "attn.hook_z", "neuron": "mlp.hook_post", "mlp": "hook_mlp_out", "attention": "hook_attn_out"}
    found: list[Tensor | None] = []
    for site in units.sites:
        if site.kind not in hooks or site.hook != f"blocks.{site.layer}.{hooks[site.kind]}":
            raise ValueError(
                f"{site.kind} units of {site.hook} write no edges: use heads(), neurons(), mlps() or attentions()"
            )
        block = model.blocks[site.layer]
        weight = block.attn.W_O if site.kind == "head" else block.mlp.W_out[:, None] if site.kind == "neuron" else None
        found.append(None if weight is None else _wide(weight.detach()))
    return tuple(found)


def _wide(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _edges(
    model: Model,
    near: Examples,
    far: Examples,
    units: Units,
    weights: tuple[Float[Tensor, "..."] | None, ...],
    readers: tuple[Reader, ...],
    steps: int,
    metric: Metric,
) -> Float[Tensor, "units readers"]:
    """The edges of one batch, summed over its examples: the step from the far run to the near one, times the mean of
    the gradients."""
    *at_far, start = run_values(model, far, units + _STREAM).tensors
    width, rows = start.shape[-1], start.shape[0] * start.shape[1]
    most = max(1, _ENTRIES // (width * max(rows, *(site.size for site in units.sites))))
    total = torch.zeros(len(units), sum(len(reader.names) for reader in readers), dtype=torch.float64)
    alone = torch.zeros(len(units), dtype=torch.float64)
    moves: list[Float[Tensor, "batch pos some width"]] = []
    for k in range(steps, 0, -1):  # the near run itself first: it says how far each unit moves
        between = Intervention(_STREAM, torch.full((1,), k / steps, dtype=torch.float64), Values(_STREAM, (start,)))
        with intervened(model, between):
            slopes, own = _slopes(model, near, units, readers, metric)
        if k == steps:
            moves = _moves(units, own.read(), tuple(at_far))
        parts = [(_wide(g) * move).sum((0, 1, 3)) for g, move in zip(own.pull(slopes.gradients), moves, strict=True)]
        alone += torch.cat([part.cpu() for part in parts]).double() / steps
        end = 0
        for reader in readers:
            first, end = end, end + len(reader.names)
            writers = [
                (part, move, weight)
                for site, part, move, weight in zip(units.sites, units.slices, moves, weights, strict=True)
                if reader.place > _place(site)
            ]
            for gradient in slopes.taken_in(reader, most) if writers else ():
                columns = slice(first, first := first + gradient.shape[2])
                for part, move, weight in writers:
                    total[part, columns] += _contracted(move, weight, _wide(gradient)).cpu().double() / steps
    _check_sums(units, total, alone, 1e-3 if start.dtype in (torch.float32, torch.float64) else 5e-2)
    return total


def _slopes(
    model: Model, batch: Examples, units: Units, readers: tuple[Reader, ...], metric: Metric
) -> tuple[Slopes, Recording]:
    """The gradients of the metric, summed over the batch, and the units in them. One forward and one backward pass."""
    with frozen(model), torch.enable_grad():
        with (
            recorded(model, units, gradients=True) as own,
            recorded(model, taps(model, readers), gradients=True) as rest,
        ):
            value = by_example(measured_by(metric, answer_logits(model, batch), batch), batch).sum()
        activations = own.activations | rest.activations
        found = torch.autograd.grad(value, list(activations.values()), allow_unused=True)
    gradients = {
        hook: torch.zeros_like(activation) if gradient is None else gradient
        for (hook, activation), gradient in zip(activations.items(), found, strict=True)
    }
    return Slopes(model, activations, gradients), own


def _moves(
    units: Units, near: tuple[Float[Tensor, "..."], ...], far: tuple[Float[Tensor, "..."], ...]
) -> list[Float[Tensor, "batch pos some width"]]:
    """By how much each unit's value is another in the near run than in the far one, where it is meant."""
    moves: list[Tensor] = []
    for site, v, other in zip(units.sites, near, far, strict=True):
        where = site.position_mask(*v.shape[:2])
        move = _wide(v.detach()) - _wide(other)
        moves.append(move if where is None else move * where.to(move)[..., None, None])
    return moves


def _contracted(
    move: Float[Tensor, "batch pos some width"],
    weight: Float[Tensor, "some width d_model"] | None,
    gradient: Float[Tensor, "batch pos readers d_model"],
) -> Float[Tensor, "some readers"]:
    """``sum_t (move . weight) . gradient`` for every unit and reader, over the batch."""
    if weight is None:  # the units write what they are
        return torch.einsum("bpud,bprd->ur", move, gradient)
    if weight.shape[1] > 1:
        return torch.einsum("bpud,bprd->ur", torch.einsum("bpuw,uwd->bpud", move, weight), gradient)
    # Many units of one number: [units, readers, d_model] is smaller than what each of them writes at each position.
    return torch.einsum("urd,ud->ur", torch.einsum("bpu,bprd->urd", move[..., 0], gradient), weight[:, 0])


def _check_sums(
    units: Units, edges: Float[Tensor, "units readers"], alone: Float[Tensor, "units"], allowed: float
) -> None:
    """Refuse a model in which the edges of a unit do not sum to its own effect."""
    size = edges.abs().sum(1)
    error = (edges.sum(1) - alone).abs() - allowed * size.clamp_min(1e-3 * float(size.max()))
    if bool((error > 0).any()):
        worst = int(error.argmax())
        raise ValueError(
            f"the edges of {units[worst].name} sum to {float(edges[worst].sum()):.4g}, its effect is "
            f"{float(alone[worst]):.4g}: in this architecture the stream is not the sum of what heads and MLPs write "
            "(a norm or a scale behind them, or a mixer beside them); use attribution_patching"
        )
