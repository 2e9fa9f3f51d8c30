"""What is checked, and what was found: pairs of inputs, variables aligned with units, and the table of evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked_fields
from tl_sparsify._internal.checks import check_count
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.verdicts import Role, Verdict, judged, verdicts
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_examples
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.units import Unit

NOTHING = "(none)"
"""Stands for the variable where units are interchanged that carry none: the answer should stay."""
ALIGNED_UNITS = "aligned units"
"""What the interchange of the alignment itself is called in tables."""
RANDOM_UNITS = "random units"
"""What that of as many others is called; how many these are stands wherever the line is shown."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source inputs for interchange interventions.

    Attributes:
        base_inputs, source_inputs: the causal model's inputs, an array of ``n`` values for each.
        base, source: the same as model inputs, with one label each.
        answers: the token of every value of the causal model's output.

    Example:
        >>> few = pairs[:8]
        >>> len(few), tuple(few.expected(task.causal_model, ("left",)).shape)
        (8, (8,))
    """

    base_inputs: Mapping[str, np.ndarray]
    source_inputs: Mapping[str, np.ndarray]
    base: Examples
    source: Examples
    answers: Mapping[Any, int]

    def __post_init__(self) -> None:
        check_examples(self.base, "base")
        check_examples(self.source, "source")
        n = len(self.base)
        if len(self.source) != n:
            raise ValueError(f"source has {len(self.source)} examples, base {n}: pairs need equal numbers")
        if self.base.tokens.shape != self.source.tokens.shape:
            shapes = tuple(self.base.tokens.shape), tuple(self.source.tokens.shape)
            raise ValueError(
                f"base has tokens of shape {shapes[0]}, source {shapes[1]}: pad both to one width (make the "
                "examples of both together)"
            )
        for side in ("base_inputs", "source_inputs"):
            if not isinstance(inputs := getattr(self, side), Mapping):
                raise ValueError(f"{side} is a {type(inputs).__name__}; it is a dictionary of arrays by input variable")
            for name, values in inputs.items():
                there = len(values) if np.ndim(values) and not isinstance(values, Mapping) else "no"
                if there != n:
                    raise ValueError(f"{side}[{name!r}] has {there} values for {n} pairs")
        if not isinstance(self.answers, Mapping):
            raise ValueError(f"answers is a {type(self.answers).__name__}; it is a dictionary of token ids by output")
        for output, token in self.answers.items():
            check_count(f"answers[{output!r}]", token, least=0)
        for side, examples in (("base", self.base), ("source", self.source)):
            if bool(((examples.labels != NO_LABEL).sum(1) != 1).any()):
                raise ValueError(f"{side} has examples with several labels; verify reads one answer for each input")

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: slice | Int[Tensor, "some"]) -> Pairs:
        """The pairs at ``index``."""
        at = index if isinstance(index, slice) else index.numpy()
        base, source = ({k: np.asarray(v)[at] for k, v in x.items()} for x in (self.base_inputs, self.source_inputs))
        return Pairs(base, source, self.base[index], self.source[index], self.answers)

    def with_sources_of(self, shift: int) -> Pairs:
        """The same bases, each with the source of the pair ``shift`` places on."""
        order = (torch.arange(len(self)) + shift) % len(self)
        inputs = {name: np.asarray(values)[order.numpy()] for name, values in self.source_inputs.items()}
        return replace(self, source_inputs=inputs, source=self.source[order])

    def expected(
        self,
        causal_model: CausalModel,
        variables: Sequence[str],
        sources: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> Int[Tensor, "n"]:
        """The token that the causal model answers for each base with ``variables`` taken from its source, or each from
        its own of ``sources``."""
        source = {variable: (sources or {}).get(variable, self.source_inputs) for variable in variables}
        output = causal_model.interchange(self.base_inputs, source)[causal_model.output]
        if np.ndim(output) != 1:
            raise ValueError(
                f"the causal model's output {causal_model.output!r} has several values for each pair; an answer is one"
            )
        unknown = set(np.asarray(output).tolist()) - set(self.answers)
        if unknown:
            raise ValueError(f"answers has no token for the causal model's output {sorted(map(str, unknown))}")
        return torch.tensor([self.answers[value] for value in np.asarray(output).tolist()])

    def tells_apart(self, causal_model: CausalModel, variables: Sequence[str]) -> Bool[Tensor, "n"]:
        """For each pair whether units that carry ``variables`` and units that carry the answer would act differently:
        whether the answer expected with ``variables`` from the source is another one than the source's own. No model
        pass.

        Example:
            >>> float(pairs.tells_apart(task.causal_model, ("left",)).double().mean())
            0.5
        """
        return self.expected(causal_model, variables) != self.source.labels[self.source.labels != NO_LABEL]


@checked_fields
@dataclass(frozen=True)
class Alignment:
    """Which units, at which positions, carry each variable: ``Alignment({"left": [units["L0H2"].at(1)]})``.

    Example:
        >>> tls.Alignment({"left": [units["L1H0"].at(4)], "right": [units["L1H1"].at(4)]})
        Alignment(left: 1 units, right: 1 units)
    """

    units: Mapping[str, Sequence[Unit]]

    def __post_init__(self) -> None:
        for variable, chosen in self.units.items():
            if not len(chosen):
                raise ValueError(f"alignment of {variable!r} is empty: name at least one unit, or leave it out")

    @property
    def variables(self) -> tuple[str, ...]:
        """The aligned variables."""
        return tuple(self.units)

    def __repr__(self) -> str:
        return f"Alignment({', '.join(f'{v}: {len(u)} units' for v, u in self.units.items())})"


@dataclass(frozen=True)
class Row:
    """One line of evidence: an intervention, a variable, a model.

    Attributes:
        model: ``original``, ``reduced`` or ``random weights``.
        intervention: ``aligned units`` or the control's name.
        variable: the variable whose value is interchanged; several joined by `` & ``; ``(none)`` where the answer
            should stay.
        accuracy: interchange intervention accuracy over the retained pairs (NaN where none is); with random weights
            over all pairs, since such a model is right by luck alone.
        stderr: its standard error. A random control counts for each pair with the mean of its draws.
        lower, upper: a confidence sequence (:func:`certificates.confidence_sequence`) for the accuracy that would be
            reached on ever more such pairs; now and then the one reached here lies outside.
        accuracy_changed: the same over pairs whose expected answer differs from the base's own.
        risk: in nats, where the row compares two models.
        margin_bound: there, how often at most their answers differ on these draws (:func:`certificates.margin_bound`).
        pairs: the pairs counted (once for each draw of a random control).
        retained: the share of pairs that the model answers right on all their inputs.
        units: units interchanged.
        removed: aligned units that this model no longer has.
        role: what the line is for.
        untrained: whether the model has random weights; its lines are controls of the other models'.
        sources_apart: whether each of several variables has a source of its own.
        tells_apart: the share of the counted pairs that tell the variable from the answer: units that carry the
            source's answer, and not the variable, would be wrong on just these. With a source each, for that source
            whose answer is told apart least. NaN where no variable is interchanged.
        is_answer: whether the variable is the causal model's output, or fixes it alone
            (:meth:`CausalModel.fixes_output`), so that no pair of right answers can tell the two apart.
        changes: the share of the counted pairs whose expected answer differs from the base's own; on the others
            units that carry nothing are right.
    """

    model: str
    intervention: str
    variable: str
    accuracy: float
    stderr: float
    lower: float
    upper: float
    accuracy_changed: float
    risk: float
    margin_bound: float
    pairs: int
    retained: float
    units: float
    removed: int
    role: Role
    untrained: bool = False
    sources_apart: bool = False
    tells_apart: float = float("nan")
    is_answer: bool = False
    changes: float = float("nan")


@dataclass(frozen=True)
class Evidence:
    """The interchange accuracies of an alignment with their controls, as one table.

    Attributes:
        rows: its lines.
        level: each line's bounds, taken alone, hold at all numbers of pairs at once with a probability of one minus
            this, for pairs drawn like these and in random order.

    Example:
        >>> evidence = tls.verify(model, task.causal_model, task.alignment, pairs, draws=1)
        >>> evidence.accuracy("left"), evidence.accuracy("left", intervention="do nothing")
        (1.0, 0.5)
    """

    rows: tuple[Row, ...]
    level: float = 0.05

    def to_frame(self) -> pd.DataFrame:
        """One row a line of evidence; the columns are :class:`Row`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def verdicts(self) -> pd.DataFrame:
        """Whether each aligned variable is accepted, in each trained model, and its controls: a row each; the
        columns are :class:`~tl_sparsify.abstraction.verdicts.Verdict`'s attributes. No model pass."""
        return verdicts(self.to_frame())

    def verdict(self, variable: str, model: str = "original") -> Verdict:
        """The judgement on one variable: ``evidence.verdict("left").accepted``. No model pass.

        Raises:
            KeyError: nothing was judged under these names; it says what was.
        """
        found = {(verdict.variable, verdict.model): verdict for verdict in judged(self.to_frame())}
        if (variable, model) not in found:
            raise KeyError(f"no verdict on {variable!r} in the {model} model; there is one on {sorted(found)}")
        return found[variable, model]

    def accuracy(self, variable: str, model: str = "original", intervention: str = ALIGNED_UNITS) -> float:
        """One accuracy of the table; a ``KeyError`` names what there is."""
        for row in self.rows:
            if (row.model, row.intervention, row.variable) == (model, intervention, variable):
                return row.accuracy
        known = sorted({(row.model, row.intervention, row.variable) for row in self.rows})
        raise KeyError(f"no evidence for {(model, intervention, variable)}; there is {known}")

    def __repr__(self) -> str:
        aligned = [row for row in self.rows if row.role is Role.ALIGNED and not row.sources_apart]
        found = [f"{row.variable} {row.accuracy:.3f} ({row.model})" for row in aligned]
        return f"Evidence({', '.join(found)}; {len(self.rows)} rows with controls)"
