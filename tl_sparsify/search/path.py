"""CircuitPath: what a search finds, as a value: nested circuits and how each was predicted and measured to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import remembering, risk
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.expansion.selection import ROUNDING
from tl_sparsify.search.scores import kept_count


@dataclass(frozen=True)
class Round:
    """One step of a path.

    Attributes:
        reduction: the circuit after the round.
        predicted: its second-order joint risk, linearised before the round's removals (nats, temperature 1).
        measured: its risk (nats), on the same examples.
        additivity: ``(R_joint - sum of R_u) / R_joint`` of what the round's removals add by prediction; far from 0, no
            one-unit score can be trusted.
    """

    reduction: Reduction
    predicted: Estimate
    measured: Estimate
    additivity: float


LEAST = 1e-3
"""Nats; no circuit is worse than another by less."""


def worse(larger: Estimate, smaller: Estimate) -> bool:
    """Whether the larger circuit measures worse than the smaller one, by more than the error of measuring it."""
    return larger.mean - smaller.mean > max(LEAST, larger.stderr)


def order_through(order: Int[Tensor, "units"], rounds: Sequence[Round]) -> Int[Tensor, "units"]:
    """An order of removal that passes through the nested circuits of these rounds, and else is the given one."""
    within = torch.stack([step.reduction.circuit.mask for step in rounds]).sum(0)
    return order[within[order].argsort(stable=True)]


@dataclass(frozen=True)
class CircuitPath:
    """A nested family of circuits: ``path.at(fraction)`` for any size, the rounds in ``path.rounds``.

    Attributes:
        units: all units.
        order: unit indices in order of removal; the last is kept longest.
        rounds: from the largest circuit to the smallest.
        costs: what each unit costs (its parameters, say) in a search by cost; ``None``: 1 each.
        values: constants for circuits between rounds; those of the rounds where not given.

    Example:
        >>> path.to_frame()["kept"].tolist()
        [9, 6]
        >>> path.at(0.5).circuit <= path.at(0.75).circuit
        True
    """

    units: Units
    order: Int[Tensor, "units"]
    rounds: tuple[Round, ...]
    costs: Float[Tensor, "units"] | None = None
    values: Values | None = None

    def at(self, fraction: float) -> Reduction:
        """The reduction that keeps ``fraction`` of the units (at least one).

        Raises:
            ValueError: a fraction outside (0, 1].
        """
        return self._keeping(kept_count(len(self.units), fraction))

    def within_budget(self, budget: float) -> Reduction:
        """The largest circuit whose units together cost at most ``budget`` (``costs``; 1 each where not given).

        Raises:
            ValueError: a budget that not even the last unit is within.
        """
        costs = torch.ones(len(self.units), device="cpu") if self.costs is None else self.costs
        kept = costs[self.order].double().flip(0).cumsum(0)  # the cost of the last, of the last two, ...
        count = int((kept <= budget * (1 + ROUNDING)).sum())
        if count == 0:
            raise ValueError(f"budget is {budget}; the smallest circuit of the path costs {float(kept[0]):g}")
        return self._keeping(count)

    def _keeping(self, count: int) -> Reduction:
        mask = torch.zeros(len(self.units), dtype=torch.bool, device="cpu")
        mask[self.order[len(self.units) - count :]] = True
        larger = [r for r in self.rounds if len(r.reduction.circuit) >= count]
        reduction = (larger[-1] if larger else self.rounds[0]).reduction
        if self.values is not None:
            reduction = replace(reduction, values=self.values, reference=None, mixing=None)
        return reduction.with_circuit(Circuit(self.units, mask))

    def within(self, model: Model, validation: Examples, nats: float, *, batch_size: int | None = None) -> Reduction:
        """The smallest round whose measured risk on ``validation`` is at most ``nats``; a forward pass for each round
        tried, from the smallest, and one for the original.

        Raises:
            ValueError: no round is within ``nats``.
        """
        lowest, recall = float("inf"), remembering()
        for step in reversed(self.rounds):
            found = risk(model, step.reduction, validation, batch_size=batch_size, recall=recall).mean
            lowest = min(lowest, found)
            if found <= nats:
                return step.reduction
        raise ValueError(f"no circuit of the path is within {nats} nats; the lowest risk is {lowest:.4g}")

    @property
    def scores(self) -> Float[Tensor, "units"]:
        """Each unit's place in the order of removal: the longer it is kept, the higher."""
        place = torch.empty(len(self.units), dtype=torch.float64, device="cpu")
        place[self.order] = torch.arange(len(self.units), dtype=torch.float64, device="cpu")
        return place

    def to_frame(self) -> pd.DataFrame:
        """One row a round: ``kept, fraction, predicted, predicted_stderr, measured, measured_stderr, additivity``."""
        return pd.DataFrame(
            [
                {
                    "kept": len(r.reduction.circuit),
                    "fraction": r.reduction.circuit.fraction,
                    "predicted": r.predicted.mean,
                    "predicted_stderr": r.predicted.stderr,
                    "measured": r.measured.mean,
                    "measured_stderr": r.measured.stderr,
                    "additivity": r.additivity,
                }
                for r in self.rounds
            ]
        )

    def __repr__(self) -> str:
        last = self.rounds[-1]
        return (
            f"CircuitPath({len(self.rounds)} rounds, {len(self.units):,} to {len(last.reduction.circuit):,} units, "
            f"risk at the end {last.measured!r})"
        )
