"""Profiles: what removing each head does to an example, and groups of examples whose profiles are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import cut_tree, linkage
from torch import Tensor

from tl_sparsify._internal.ranks import gathered
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.stressing.measuring import Setting

PROBES, TEMPERATURE = 16, 3.0  # exact up to 17 answers
_FLOOR = 0.01  # of a profile, shared by its units: below it an effect is noise, whose logarithm would count


def grouped(
    model: Model, reduction: Reduction, chosen: Examples, reported: Examples, most: int, setting: Setting
) -> tuple[Int[Tensor, "n most"], Int[Tensor, "m most"]]:
    """Nested groups of the examples ``chosen``, one in the first column to ``most`` in the last, and for those
    ``reported`` the group whose mean profile is nearest. Ward's linkage (1963) of the profiles' centred logarithms
    (Aitchison, 1982), which compare shares and not amounts."""
    mine = torch.cat(gathered(profiles(model, reduction, chosen, setting), len(chosen)))
    tree = cut_tree(linkage(mine.numpy(), "ward"), n_clusters=list(range(1, most + 1)))
    labels = torch.from_numpy(tree).long()
    centres = [
        torch.stack([mine[labels[:, i] == group].mean(0) for group in range(i + 1)]) for i in range(labels.shape[1])
    ]

    def nearest() -> Iterator[Int[Tensor, "batch most"]]:
        for rows in profiles(model, reduction, reported, setting):
            yield torch.stack([torch.cdist(rows, some).argmin(1) for some in centres], 1)

    return labels, torch.cat(gathered(nearest(), len(reported)))


def profiles(
    model: Model, reduction: Reduction, examples: Examples, setting: Setting
) -> Iterator[Float[Tensor, "batch some"]]:
    """Of each example the centred logarithm of each unit's share of the single-unit risks. Where there are heads only
    theirs: neurons tell the answer, and heads how it is found.

    One forward and at most 16 backward passes.
    """
    for part in samples(
        model,
        examples,
        _of_heads(reduction),
        probes=PROBES,
        temperature=TEMPERATURE,
        metric=setting.metric,
        seed=setting.seed,
        batch_size=setting.batch_size,
    ):
        risks = part.effects.double().square().sum(0).cpu()
        shares = risks / risks.sum(1, keepdim=True).clamp_min(1e-300)
        logs = (shares + _FLOOR / shares.shape[1]).log()
        yield logs - logs.mean(1, keepdim=True)


def _of_heads(reduction: Reduction) -> Reduction:
    """The removal of heads alone, where there are at least two: neurons need no gradients."""
    some = [i for i, site in enumerate(reduction.units.sites) if site.kind == "head"]
    if sum(reduction.units.sites[i].size for i in some) < 2:
        return reduction
    units = Units(tuple(reduction.units.sites[i] for i in some))
    values = Values(units, tuple(reduction.values.tensors[i] for i in some), reduction.kind)
    return replace(reduction, circuit=Circuit.full(units), values=values, reference=None, mixing=None)
