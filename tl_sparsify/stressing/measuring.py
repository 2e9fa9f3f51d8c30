"""Measured divergences of many circuits at once, with intervals over examples; random circuits to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import totalled
from tl_sparsify.comparison.resampling import Resampled
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, shared_batches
from tl_sparsify.core.intervene import Intervention, ablate, intervened
from tl_sparsify.core.metrics import Metric, divergence
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units, check_positions

Interval = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """What all tests have in common.

    Attributes:
        tolerance: nats; what counts as no difference.
        draws: random circuits, masks or resamples of a control.
        bootstrap: replicates of an interval.
        level: of the interval.
        metric: half its squared error instead of the KL divergence.
        seed: of all that is random.
        batch_size: examples at a time; as many as fit where ``None``.
    """

    tolerance: float = 0.01
    draws: int = 20
    bootstrap: int = 1000
    level: float = 0.95
    metric: Metric | None = None
    seed: int = 0
    batch_size: int | None = None

    @property
    def unit(self) -> str:
        """What a divergence is measured in."""
        return "nats" if self.metric is None else "squared units"


@dataclass(frozen=True, eq=False)
class Measured:
    """The mean of some columns over examples, and the same in every replicate of the bootstrap.

    Attributes:
        mean: of each column.
        drawn: of each column, in each replicate.
        n: examples.
        level: of the intervals.
    """

    mean: Float[Tensor, "columns"]
    drawn: Float[Tensor, "replicates columns"]
    n: int
    level: float

    def interval(self, weights: Float[Tensor, "columns"]) -> tuple[float, Interval]:
        """A linear combination of the columns, with its interval: paired, so that what the columns share drops out."""
        weights = weights.double()
        low, high = ends(self.drawn @ weights, self.level, self.n)
        return float(self.mean @ weights), (low, high)

    def column(self, number: int) -> tuple[float, Interval]:
        """One column with its interval."""
        return self.interval(_one(len(self.mean), number))

    def rise(self, number: int, base: int) -> tuple[float, Interval]:
        """One column less another one, with its interval."""
        return self.interval(_one(len(self.mean), number) - _one(len(self.mean), base))


def _one(n: int, number: int) -> Float[Tensor, "columns"]:
    weights = torch.zeros(n, dtype=torch.float64)
    weights[number] = 1
    return weights


def ends(values: Float[Tensor, "replicates"], level: float, n: int = 2) -> Interval:
    """The middle ``level`` of some values; NaN where there are none, or of a single example."""
    if not len(values) or n < 2:
        return float("nan"), float("nan")
    both = values.double().nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(both[0]), float(both[1])


Removal = Callable[[Int[Tensor, "batch"]], Intervention]
"""For the examples of a batch, what is done to the model."""


def removing(reduction: Reduction, circuit: Circuit, examples: Examples) -> Removal:
    """Set what is outside a circuit to the reduction's replacements."""
    return softened(reduction, circuit.mask.float(), examples)


def softened(reduction: Reduction, keep: Float[Tensor, "*n units"], examples: Examples) -> Removal:
    """The reduction's replacements with ``keep`` for its circuit: one for all examples, or one for each.

    Raises:
        ValueError: units whose positions are those of other examples.
    """
    check_positions(reduction.units, len(examples))

    def of(index: Int[Tensor, "batch"]) -> Intervention:
        here = ablate(reduction.for_examples(index, examples.spans))
        return replace(here, keep=keep if keep.ndim == 1 else keep[index])

    return of


def measured(model: Model, removals: Sequence[Removal], examples: Examples, setting: Setting) -> Measured:
    """The divergence from the original output under each of the removals, over the examples.

    One forward pass, and one for each removal.
    """

    def column(batch: Examples, index: Int[Tensor, "batch"]) -> Float[Tensor, "batch columns"]:
        return divergences(model, removals, batch, index, setting)

    return averaged(model, column, examples, setting)


def assigned(
    model: Model,
    removals: Sequence[Removal],
    choices: Int[Tensor, "n columns"],
    examples: Examples,
    setting: Setting,
) -> Measured:
    """The divergence where each example has a removal of its own: in column ``c`` example ``i`` has that numbered
    ``choices[i, c]``; where this is -1 it counts as 0.

    One forward pass, and one for each removal.
    """

    def column(batch: Examples, index: Int[Tensor, "batch"]) -> Float[Tensor, "batch columns"]:
        found = divergences(model, removals, batch, index, setting)
        mine = choices[index]
        return found.gather(1, mine.clamp_min(0)).where(mine >= 0, 0.0)

    return averaged(model, column, examples, setting)


def divergences(
    model: Model, removals: Sequence[Removal], batch: Examples, index: Int[Tensor, "batch"], setting: Setting
) -> Float[Tensor, "batch removals"]:
    """Each example's divergence from the original output under each of the removals. One forward pass, and one for each
    removal."""
    original = answer_logits(model, batch)
    found: list[Float[Tensor, "batch"]] = []
    for removal in removals:
        with intervened(model, removal(index)):
            found.append(divergence(original, answer_logits(model, batch), batch, setting.metric).double().cpu())
    return torch.stack(found, 1)


def averaged(
    model: Model,
    columns: Callable[[Examples, Int[Tensor, "batch"]], Float[Tensor, "batch columns"]],
    examples: Examples,
    setting: Setting,
    differentiated: Units | None = None,
) -> Measured:
    """Means and replicates of what ``columns`` gives for each batch. Memory does not grow with the examples;
    ``differentiated`` are units whose gradients ``columns`` takes, which need smaller batches."""
    check_call(model, examples, seed=setting.seed, batch_size=setting.batch_size)

    def parts() -> Iterator[tuple[Tensor, Resampled]]:
        for index, batch in shared_batches(model, examples, setting.batch_size, differentiated):
            found = columns(batch, index)
            yield found.sum(0), Resampled.of(found, index, setting.bootstrap, setting.seed)

    def plus(one: Any, other: Any) -> Any:
        return one[0] + other[0], one[1] + other[1]

    with torch.no_grad():
        total, drawn = totalled(parts(), plus, len(examples))
    return Measured(total / len(examples), drawn.means, len(examples), setting.level)


def halves(examples: Examples, train: Examples | None) -> tuple[Examples, Examples]:
    """What masks and circuits are chosen on, and what is reported on: ``train`` and the examples, or where there is no
    ``train`` the even and the odd ones of the examples.

    Raises:
        ValueError: fewer than four examples, and no ``train``.
    """
    if train is not None:
        return train, examples
    if len(examples) < 4:
        raise ValueError(
            f"examples holds {len(examples)}: without train at least four are needed, half of them to choose on"
        )
    index = torch.arange(len(examples))
    return examples[index[::2]], examples[index[1::2]]


def alike(circuit: Circuit, seed: int, draw: int) -> Circuit:
    """A random circuit with as many units of each kind in each layer, of units outside the circuit as far as there are
    enough of them."""
    mask = torch.zeros(len(circuit.units), dtype=torch.bool)
    draws = _random.uniform(seed, 101, draw, torch.arange(len(circuit.units))) + circuit.mask.cpu().double()
    for part in circuit.units.slices:
        count = int(circuit.mask[part].sum())
        mask[part.start + draws[part].argsort(stable=True)[:count]] = True
    return Circuit(circuit.units, mask)


def without(circuit: Circuit, gone: Sequence[int]) -> Circuit:
    """The circuit less some units, given by number."""
    mask = circuit.mask.clone()
    mask[list(gone)] = False
    return Circuit(circuit.units, mask)


def added(circuit: Circuit, back: Sequence[int]) -> Circuit:
    """The circuit and some more units, given by number."""
    mask = circuit.mask.clone()
    mask[list(back)] = True
    return Circuit(circuit.units, mask)


def sharing(circuit: Circuit, shared: int, seed: int, draw: int) -> Circuit:
    """A random circuit of the same size that shares exactly so many of its units."""
    draws = _random.uniform(seed, 103, draw, torch.arange(len(circuit.units)))
    mine, others = circuit.mask.nonzero().flatten(), (~circuit.mask).nonzero().flatten()
    chosen = [mine[draws[mine].argsort()[:shared]], others[draws[others].argsort()[: len(mine) - shared]]]
    mask: Bool[Tensor, "units"] = torch.zeros(len(circuit.units), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return Circuit(circuit.units, mask)
