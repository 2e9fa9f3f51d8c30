"""Verification: does the network compute what a high-level causal model says, variable by variable?

For base ``b``, source ``s`` and variable ``V``, the units aligned with ``V`` take, in ``b``'s run, their values from
``s``'s run; the network should then answer what the causal model answers for ``b`` under ``do(V = V(s))``. The
fraction of pairs for which it does is the interchange intervention accuracy (Geiger et al., 2021). An accuracy is not
evidence on its own: it stands beside controls that need not be good, and only pairs that the model answers right
without intervention count.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import reinitialized

from tl_sparsify import _random
from tl_sparsify.causal import CausalModel
from tl_sparsify.circuit import Circuit, Reduction, check_fingerprint
from tl_sparsify.examples import NO_LABEL, Examples
from tl_sparsify.intervene import (
    Intervention,
    ablate,
    answer_logits,
    batch_size_for,
    check_model,
    interchange,
    intervened,
    run_values,
)
from tl_sparsify.units import Model, Site, Unit, heads, neurons, residuals, select


@dataclass(frozen=True, eq=False)
class Pairs:
    """Base and source inputs for interchange interventions.

    Attributes:
        base_inputs, source_inputs: the causal model's inputs, an array of ``n`` values for each.
        base, source: the same as model inputs, with one label each.
        answers: the token of every value of the causal model's output.
    """

    base_inputs: Mapping[str, np.ndarray]
    source_inputs: Mapping[str, np.ndarray]
    base: Examples
    source: Examples
    answers: Mapping[Any, int]

    def __post_init__(self) -> None:
        n = len(self.base)
        if len(self.source) != n:
            raise ValueError(f"source has {len(self.source)} examples, base {n}: pairs need equal numbers")
        for side in ("base_inputs", "source_inputs"):
            for name, values in getattr(self, side).items():
                if len(values) != n:
                    raise ValueError(f"{side}[{name!r}] has {len(values)} values for {n} pairs")
        for side, examples in (("base", self.base), ("source", self.source)):
            if bool(((examples.labels != NO_LABEL).sum(1) != 1).any()):
                raise ValueError(f"{side} has examples with several labels; verify reads one answer for each input")

    def __len__(self) -> int:
        return len(self.base)

    def expected(self, causal_model: CausalModel, variables: Sequence[str]) -> Int[Tensor, "n"]:
        """The token that the causal model answers for each base with ``variables`` taken from its source."""
        source = {variable: self.source_inputs for variable in variables}
        output = causal_model.interchange(self.base_inputs, source)[causal_model.output]
        unknown = set(np.asarray(output).tolist()) - set(self.answers)
        if unknown:
            raise ValueError(f"answers has no token for the causal model's output {sorted(map(str, unknown))}")
        return torch.tensor([self.answers[value] for value in np.asarray(output).tolist()])


@dataclass(frozen=True)
class Alignment:
    """Which units, at which positions, carry each variable: ``Alignment({"left": [units["L0H2"].at(1)]})``."""

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
        variable: the variable whose value is interchanged.
        accuracy: interchange intervention accuracy over the retained pairs (NaN where none is); with random weights
            over all pairs, since such a model is right by luck alone.
        stderr: its standard error.
        accuracy_changed: the same over pairs whose expected answer differs from the base's own.
        pairs: the pairs counted (once for each draw of a random control).
        retained: the share of pairs that the model answers right on both inputs.
        units: units interchanged.
        removed: aligned units that this model no longer has.
    """

    model: str
    intervention: str
    variable: str
    accuracy: float
    stderr: float
    accuracy_changed: float
    pairs: int
    retained: float
    units: float
    removed: int


@dataclass(frozen=True)
class Evidence:
    """The interchange accuracies of an alignment beside their controls: one table."""

    rows: tuple[Row, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row a line of evidence; the columns are :class:`Row`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def accuracy(self, variable: str, model: str = "original", intervention: str = "aligned units") -> float:
        """One accuracy of the table; a ``KeyError`` names what there is."""
        for row in self.rows:
            if (row.model, row.intervention, row.variable) == (model, intervention, variable):
                return row.accuracy
        known = sorted({(row.model, row.intervention, row.variable) for row in self.rows})
        raise KeyError(f"no evidence for {(model, intervention, variable)}; there is {known}")

    def __repr__(self) -> str:
        found = [f"{r.variable} {r.accuracy:.3f} ({r.model})" for r in self.rows if r.intervention == "aligned units"]
        return f"Evidence({', '.join(found)}; {len(self.rows)} rows with controls)"


@dataclass(frozen=True)
class _Subject:
    """A model under test, with what it needs to interchange the original's units.

    Attributes:
        removal: what is ablated in it.
        own_names: its own unit name for each original unit that it still has; ``None``: the original's names.
    """

    name: str
    model: Any
    removal: Reduction | None = None
    own_names: Mapping[str, str] | None = None

    def own(self, chosen: Iterable[Unit]) -> list[Unit]:
        """The chosen units that this model still has, under its own names; what no reduction removes is there."""
        if self.removal is not None:
            gone = set((~self.removal.circuit).names)
            return [unit for unit in chosen if gone.isdisjoint((unit.name, _bare(unit)))]
        if self.own_names is None:
            return list(chosen)
        families = {"head": heads, "neuron": neurons}
        kept = [unit for unit in chosen if unit.site.kind not in families or _bare(unit) in self.own_names]
        units = {kind: families[kind](self.model) for kind in {unit.site.kind for unit in kept} & set(families)}
        own: list[Unit] = []
        for unit in kept:
            if unit.site.kind in units:
                here = units[unit.site.kind][self.own_names[_bare(unit)]]
                unit = Unit(replace(unit.site, size=here.site.size), here.index)
            own.append(unit)
        return own


def _bare(unit: Unit) -> str:
    return unit.at(None).name


def verify(
    model: Model,
    causal_model: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    *,
    reduced: Any | None = None,
    draws: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
) -> Evidence:
    """Interchange intervention accuracy of every aligned variable, on the original and on a reduced model, beside
    its controls.

    Args:
        reduced: a folded model, or a :class:`Reduction` of ``model`` (run ablated). An aligned unit that it no longer
            has is not interchanged, and is counted.
        draws: random sets of units for the random control.

    Controls, each under the same rule: ``do nothing`` (the base's own answer), ``random units`` (as many units of the
    same sites at the same positions, outside the alignment), ``whole residual stream`` (the best layer's, at the
    alignment's positions: the ceiling; for models with blocks), and the alignment on a model with ``random weights``.

    Forward passes over the pairs: two for each model, and for each variable two for the alignment, two for each draw
    and two for each layer.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks, units that the model lacks, an
            output without a token.
    """
    check_model(model)
    for variable in alignment.variables:
        if variable not in causal_model.variables:
            raise ValueError(f"alignment names {variable!r}; the causal model has {', '.join(causal_model.variables)}")
    subjects = [_Subject("original", model)]
    if isinstance(reduced, Reduction):
        check_fingerprint(model, reduced)
        subjects.append(_Subject("reduced", model, removal=reduced))
    elif reduced is not None:
        check_model(reduced)
        origin = getattr(reduced, "units", None)
        if not isinstance(origin, Mapping):
            raise ValueError("reduced has no units: give a model made by fold(), or a Reduction")
        subjects.append(_Subject("reduced", reduced, own_names={old: new for new, old in origin.items()}))
    with redirect_stdout(io.StringIO()):  # it says on which device it puts the copy
        subjects.append(_Subject("random weights", reinitialized(cast(Any, model), seed)))
    rows = [
        row
        for subject in subjects
        for variable in alignment.variables
        for row in _tested(subject, variable, causal_model, alignment, pairs, draws, seed, batch_size)
    ]
    return Evidence(tuple(rows))


def _tested(
    subject: _Subject,
    variable: str,
    causal_model: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    draws: int,
    seed: int,
    batch_size: int | None,
) -> list[Row]:
    """The evidence for one variable on one model."""
    plain = _answers(subject, pairs.base, [], None, batch_size)
    right = plain == _labels(pairs.base)
    retained = right & (_answers(subject, pairs.source, [], None, batch_size) == _labels(pairs.source))
    share = float(retained.double().mean())
    counts = torch.ones_like(retained) if subject.name == "random weights" else retained
    expected = pairs.expected(causal_model, (variable,))
    changed = expected != _labels(pairs.base)

    def swapped(units: list[Unit]) -> Bool[Tensor, "n"]:
        return _answers(subject, pairs.base, units, pairs.source, batch_size) == expected

    def row(intervention: str, hits: list[Bool[Tensor, "n"]], units: float, removed: int = 0) -> Row:
        accuracy, stderr = _mean(torch.cat([hit[counts] for hit in hits]))
        flipped, _ = _mean(torch.cat([hit[counts & changed] for hit in hits]))
        judged = int(counts.sum()) * len(hits)
        return Row(subject.name, intervention, variable, accuracy, stderr, flipped, judged, share, units, removed)

    chosen = list(alignment.units[variable])
    own = subject.own(chosen)
    aligned = row("aligned units", [swapped(own)], float(len(own)), len(chosen) - len(own))
    rows = [aligned, row("do nothing", [plain == expected], 0.0)]
    if subject.name == "random weights":
        return rows
    sets = [subject.own(_random_units(chosen, seed, draw)) for draw in range(draws)]
    if sets:
        rows.append(row("random units", [swapped(units) for units in sets], sum(map(len, sets)) / draws))
    ceilings: list[Row] = []
    for site in _streams(subject.model):
        places = dict.fromkeys(Unit(site, 0).at(unit.site.positions) for unit in chosen)
        ceilings.append(row("whole residual stream", [swapped(list(places))], 1.0))
    if ceilings:
        rows.append(max(ceilings, key=lambda found: -1.0 if math.isnan(found.accuracy) else found.accuracy))
    return rows


def _streams(model: Any) -> tuple[Site, ...]:
    """The residual stream after each layer; none for a model without blocks."""
    return residuals(model).sites if hasattr(model, "blocks") else ()


def _labels(examples: Examples) -> Int[Tensor, "n"]:
    return examples.labels[examples.labels != NO_LABEL]


def _mean(hits: Bool[Tensor, "n"]) -> tuple[float, float]:
    if not len(hits):
        return float("nan"), float("nan")
    p = float(hits.double().mean())
    return p, math.sqrt(p * (1 - p) / len(hits))


def _answers(
    subject: _Subject, base: Examples, units: list[Unit], source: Examples | None, batch_size: int | None
) -> Int[Tensor, "n"]:
    """The token that the model answers for each base, with ``units`` taken from ``source``'s run. One forward pass
    over the data; two with units."""
    answers: list[Tensor] = []
    model = subject.model
    with torch.no_grad():
        for index, batch in base.batches(batch_size_for(model, base, batch_size)):
            removed = () if subject.removal is None else (ablate(subject.removal.for_examples(index)),)
            swap: tuple[Intervention, ...] = ()
            if units and source is not None:
                sites, mask = select(units)
                sites = sites.for_examples(index)
                with intervened(model, *removed):
                    swap = (interchange(Circuit(sites, mask), run_values(model, source[index], sites)),)
            with intervened(model, *swap, *removed):
                best = answer_logits(model, batch).argmax(1).cpu()
            answers.append(best if batch.choices is None else batch.choices[best])
    return torch.cat(answers)


def _random_units(chosen: Sequence[Unit], seed: int, draw: int) -> list[Unit]:
    """As many units of the same sites (and positions), outside ``chosen`` while there are any."""
    sites, mask = select(chosen)
    picked: list[Unit] = []
    for number, (site, taken) in enumerate(zip(sites.sites, sites.split(mask), strict=True)):
        order = _random.permutation(site.size, seed, 53, draw, number)
        outside = torch.cat([order[~taken[order]], order[taken[order]]])
        picked += [Unit(site, int(i)) for i in outside[: int(taken.sum())]]
    return picked
