"""Path patching: what a path alone does when it carries another input, everything else at what it is.

A sender's output on the source input goes along one edge into one reader; what that reader's head or MLP then writes
goes along the next edge, and so on to the logits or the last reader, from where the model computes on as it does. All
other readers see what they see without (Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969). A path
of one edge is an edge removed under counterfactual ablation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.distributions import check_pairs
from tl_sparsify.core.edges import Readers, edges, heads_behind
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, run_values, shared_batches
from tl_sparsify.core.intervene import Intervention, interchange, intervened
from tl_sparsify.core.metrics import Metric, by_example, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.units import Model, Units

Direction = Literal["noising", "denoising"]


@checked
def patch_paths(
    model: Model,
    examples: Examples,
    paths: Sequence[str | Sequence[str]],
    *,
    readers: Readers = "qkv",
    metric: Metric = log_odds,
    direction: Direction = "noising",
    batch_size: int | None = None,
) -> pd.DataFrame:
    """By how much a metric moves when a path alone carries the values of each example's counterfactual input.

    Args:
        paths: each one ``"L0H1->L2H3.q"``, or of several edges ``"embed->L0H1.v->L2H3.q->logits"``, or a sequence of
            such, which carry them together (one sender to several receivers). The names are those of
            :func:`tl_sparsify.edges` with these ``readers``; a group of heads that share a key or value passes on what
            each of them writes.
        metric: one number for each labelled position; an example's is their mean.
        direction: ``noising`` brings the counterfactual's values into the example's run, ``denoising`` the example's
            into the counterfactual's, as TransformerLens's ``get_act_patch_direct_path`` does.

    Returns:
        A row for each path: ``path``, ``edges``, ``change`` (the mean of patched minus not), ``stderr``, ``before``
        (the mean without) and ``n``.

    Forward passes over the examples: two, one for each path, and one for each other beginning that paths have, once.

    Raises:
        ValueError: a model in training mode or without edges, no paths, a path that is none, or whose edges do not
            follow one another; examples without counterfactuals, or with pairs of other length.

    Example:
        >>> both = ["L0H2->L1H0.q", "L0H2->L1H0.k"]
        >>> found = tls.patch_paths(model, test, ["L0H2->L1H0.v", "L0H2->L1H0.v->logits", both])
        >>> found.columns.tolist(), found.edges.tolist()
        (['path', 'edges', 'change', 'stderr', 'before', 'n'], [1, 2, 2])
    """
    check_call(model, examples, batch_size=batch_size)
    if direction not in ("noising", "denoising"):
        raise ValueError(f"direction is {direction!r}; it is noising or denoising")
    if isinstance(paths, str) or not paths:
        raise ValueError(f'paths is {paths!r}; name at least one in a list: ["L0H1->L2H3.q"]')
    units = edges(model, readers)
    together = [[_hops(units, path) for path in ([one] if isinstance(one, str) else one)] for one in paths]
    if not all(together):
        raise ValueError("paths holds an empty sequence: name the paths that carry values together")
    counterfactuals = examples.counterfactuals
    check_pairs(examples)
    base, source = (examples, counterfactuals) if direction == "noising" else (counterfactuals, examples)

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, base, batch_size):
            runs = _Runs(model, batch, units, {(): run_values(model, source[index], units)})
            before = runs.measured((), metric)
            changed = [runs.measured([runs.along(hops) for hops in some], metric) - before for some in together]
            yield Moments.of(torch.stack([before, *changed], 1))

    with torch.no_grad():
        found = Moments.over(parts(), len(base))
    rows: list[dict[str, Any]] = []
    for number, (one, some) in enumerate(zip(paths, together, strict=True), 1):
        named = one if isinstance(one, str) else " + ".join(one)
        row: dict[str, Any] = {"path": named, "edges": sum(map(len, some)), "change": float(found.mean[number])}
        row |= {"stderr": float(found.stderr[number]), "before": float(found.mean[0]), "n": len(base)}
        rows.append(row)
    return pd.DataFrame(rows)


Hops = tuple[tuple[int, ...], ...]
"""A path: for each of its steps the edges that carry it, one after the other."""


def _hops(units: Units, path: str) -> Hops:
    sender, *rest = (name.strip() for name in path.split("->"))
    if not rest:
        raise ValueError(f'paths names {path!r}, which is no path: "L0H1->L2H3.q", "L0H1->L2H3.q->logits"')
    hops: list[tuple[int, ...]] = []
    senders = (sender,)
    for reader in rest:
        names = [f"{name}->{reader}" for name in senders]
        unknown = [name for name in names if name not in units.names]
        if unknown:
            raise ValueError(f"paths names {path!r}; the model has no edge {unknown[0]!r} (tls.edges(model).names)")
        hops.append(tuple(units.index(name) for name in names))
        senders = heads_behind(units, reader)
    return tuple(hops)


@dataclass(frozen=True)
class _Runs:
    """What writers write on one batch, in the runs in which a beginning of a path carries the source's values."""

    model: Model
    batch: Examples
    units: Units
    known: dict[Hops, Values]

    def along(self, hops: Hops) -> Intervention:
        """The last step of a path, carrying what the steps before it have made."""
        before = hops[:-1]
        if before not in self.known:
            with intervened(self.model, self.along(before)):
                self.known[before] = run_values(self.model, self.batch, self.units)
        mask = torch.zeros(len(self.units), dtype=torch.bool)
        mask[list(hops[-1])] = True
        return interchange(Circuit(self.units, mask), self.known[before])

    def measured(self, set_to: Sequence[Intervention], metric: Metric) -> Float[Tensor, "batch"]:
        with intervened(self.model, *set_to):
            logits = answer_logits(self.model, self.batch)
        return by_example(measured_by(metric, logits, self.batch).double(), self.batch).cpu()
