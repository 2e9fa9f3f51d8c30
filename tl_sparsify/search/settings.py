"""Settings of a search, grouped by what they are about."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked_fields
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.gradients.backward import Name, Rules, rules_of


@checked_fields
@dataclass(frozen=True)
class Probing:
    """How the divergence is probed, in the search only.

    Attributes:
        probes: for each example and round; where drawn, the slope is one (:func:`probes.output_derivatives`).
        temperature: of the output, for the probes.
        examples: of ``train`` in a round, drawn anew for each; all where not given. Where there are many, fresh ones
            in every round find better circuits for the same passes than always the same ones: what one round took from
            the noise of its samples, the next one sees.

        backward: how probes are differentiated (:mod:`tl_sparsify.gradients.backward`). Predictions and measured risks
            are the true ones.

    Example:
        >>> tls.sparsify(model, train, units, sizes=(0.5,), probing=tls.Probing(probes=1), progress=False).at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), mean values)
    """

    probes: int = 4
    temperature: float = 3.0
    examples: int | None = None
    backward: Name | Rules = "true"

    def __post_init__(self) -> None:
        rules_of(self.backward)
        check_count("probing.probes", self.probes, most=MOST)
        check_temperature(self.temperature)
        if self.examples is not None and self.examples < 2:
            raise ValueError(f"probing.examples is {self.examples}; a round needs at least two")


@checked_fields
@dataclass(frozen=True)
class Refitting:
    """Whether constants are refitted after each round.

    Attributes:
        steps: of each refit, early-stopped on ``held_out``; where not given 20 with ``held_out`` (best at small sizes,
            ``benchmarks/variants.py``) and none without.
        per_step: examples in a step; ``None``: all of ``train``.

    Example:
        >>> few = tls.Refitting(steps=2)
        >>> tls.sparsify(model, train, units, sizes=(0.5,), held_out=validation, refitting=few, progress=False).at(0.5)
        Reduction(Circuit(6 of 12 units: 6 heads), refit values)
    """

    steps: int | None = None
    per_step: int | None = 512

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count("refitting.steps", self.steps, least=0, most=MOST)
        if self.per_step is not None:
            check_count("refitting.per_step", self.per_step)


@checked_fields
@dataclass(frozen=True, eq=False)
class Constraints:
    """What a search has to respect.

    Attributes:
        always_keep: units that are never removed.
        costs: what each unit costs (:func:`units.parameters`); the schedule's fractions are then of the total cost,
            and ``path.within_budget`` gives a circuit for a budget.

    Example:
        >>> keep = tls.Constraints(always_keep=tls.Circuit.of(units, ["L2H3"]))
        >>> "L2H3" in tls.sparsify(model, train, units, sizes=(0.5,), constraints=keep, progress=False).at(0.5).circuit
        True
    """

    always_keep: Circuit | None = None
    costs: Float[Tensor, "units"] | None = None
