"""Risks of circuits on groups of examples, each the mean over a group, with intervals over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.discovery.found import Ranged
from tl_sparsify.stressing.measuring import Measured, Setting, averaged, divergences, ends, removing


@dataclass(frozen=True, eq=False)
class GroupRisks:
    """The risk of each circuit on each group, in the sample and in every replicate of the bootstrap.

    Attributes:
        mean: ``[group, circuit]``.
        drawn: the same of every replicate.
        weight: of each group its share of the examples, and ``drawn_weight`` of every replicate.
        n: examples of each group.
        level: of the intervals.
    """

    mean: Float[Tensor, "groups circuits"]
    drawn: Float[Tensor, "replicates groups circuits"]
    weight: Float[Tensor, "groups"]
    drawn_weight: Float[Tensor, "replicates groups"]
    n: Int[Tensor, "groups"]
    level: float

    def of(self, group: int, circuit: int, less: int | None = None) -> Ranged:
        """A circuit's risk on a group; or its risk less another one's, paired."""
        value, drawn = self.mean[group, circuit], self.drawn[:, group, circuit]
        if less is not None:
            value, drawn = value - self.mean[group, less], drawn - self.drawn[:, group, less]
        return Ranged(float(value), *ends(drawn, self.level, int(self.n[group])))

    def gain(self, groups: Sequence[int], circuits: Sequence[int], less: Sequence[int]) -> Ranged:
        """By how much each group's risk falls from one circuit to another one, over all examples of the groups."""
        rows = list(groups)

        def total(risks: Float[Tensor, "*run groups circuits"], weight: Float[Tensor, "*run groups"]) -> Tensor:
            change = risks[..., rows, list(circuits)] - risks[..., rows, list(less)]
            some = weight[..., rows]
            return torch.where(some > 0, change * some, 0).sum(-1) / some.sum(-1)

        value, drawn = total(self.mean, self.weight), total(self.drawn, self.drawn_weight)
        return Ranged(float(value), *ends(drawn, self.level, int(self.n[rows].sum())))


def group_risks(
    model: Model,
    reduction: Reduction,
    circuits: Sequence[Circuit],
    groups: Int[Tensor, "kinds n"],
    examples: Examples,
    setting: Setting,
) -> GroupRisks:
    """The risk of every circuit, with the reduction's constants, on every group of every kind of grouping (of one kind
    after the other); an example of group -1 is in none.

    One forward pass, and one for each circuit.
    """
    many = int(groups.max()) + 1
    removals = [removing(reduction, circuit, examples) for circuit in circuits]

    def columns(batch: Examples, index: Int[Tensor, "batch"]) -> Float[Tensor, "batch columns"]:
        found = divergences(model, removals, batch, index, setting)
        inside = (groups[:, index, None] == torch.arange(many)).double().permute(1, 0, 2).flatten(1)
        return torch.cat([(inside[:, :, None] * found[:, None]).flatten(1), inside], 1)

    measured: Measured = averaged(model, columns, examples, setting)
    cells = len(groups) * many

    def apart(values: Float[Tensor, "*run columns"]) -> tuple[Tensor, Tensor]:
        weight = values[..., -cells:]
        sums = values[..., :-cells].reshape(*weight.shape, len(circuits))
        return sums / weight[..., None], weight  # NaN in a replicate without an example of the group

    (mean, weight), (drawn, drawn_weight) = apart(measured.mean), apart(measured.drawn)
    n = torch.cat([some[some >= 0].bincount(minlength=many) for some in groups])
    return GroupRisks(mean, drawn, weight, drawn_weight, n, setting.level)
