"""Causal scrubbing: does the answer survive when everything is resampled that a causal model says does not matter?

The network runs on another input, drawn at random, with each aligned variable's units taken from an input on which the
variable has the value that it has on the example. A causal model that says what matters gives the example's answer all
the same (Chan et al., *Causal Scrubbing*, 2022, Alignment Forum). It accepts every refinement of a right model too: a
variable that says more than the network uses only makes fewer inputs exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.certificates import confidence_sequence
from tl_sparsify.abstraction.controls import everything, others, random_units
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import Swap, TestedModel, logits, tokens
from tl_sparsify.abstraction.verdicts import GOAL
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.units import Model, Unit


@dataclass(frozen=True)
class ScrubbedRow:
    """What is left of the answers under one resampling.

    Attributes:
        resampled: ``nothing``, ``what does not matter``, ``the same, random units`` or ``everything``.
        accuracy: how often the answer is the causal model's; the mean over draws.
        lower, upper: a confidence sequence for it.
        loss: cross-entropy of that answer, nats.
        recovered: the share of the loss between ``everything`` and ``nothing`` that is recovered.
        n: examples.

    Example:
        >>> found = tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1)
        >>> found["nothing"].accuracy, found["everything"].n
        (1.0, 64)
    """

    resampled: str
    accuracy: float
    lower: float
    upper: float
    loss: float
    recovered: float
    n: int


@dataclass(frozen=True)
class Scrubbing:
    """The outcome of causal scrubbing, beside its controls.

    Attributes:
        rows: a line for each resampling.
        moved: the share of the examples' donors that are another input than the example; the fewer, the less is tested.

    Example:
        >>> tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1).moved > 0.9
        True
    """

    rows: tuple[ScrubbedRow, ...]
    moved: float

    def __getitem__(self, resampled: str) -> ScrubbedRow:
        return next(row for row in self.rows if row.resampled == resampled)

    @property
    def accepted(self) -> bool:
        """Whether the scrubbed accuracy is at least :data:`verdicts.GOAL`, and that of no control is."""
        reached = {row.resampled: row.accuracy >= GOAL for row in self.rows}
        return reached[SCRUBBED] and not (reached[EVERYTHING] or reached.get(RANDOM, False))

    def to_frame(self) -> pd.DataFrame:
        """One row a resampling; the columns are :class:`ScrubbedRow`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        row = self[SCRUBBED]
        found = f"accuracy {row.accuracy:.3f}, {row.recovered:.1%} of the loss recovered"
        return f"Scrubbing({'accepted' if self.accepted else 'rejected'}: {found}; n={row.n})"


NONE, SCRUBBED, RANDOM, EVERYTHING = "nothing", "what does not matter", "the same, random units", "everything"


@checked
def scrub(
    model: Model,
    causal_model: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    *,
    draws: int = 3,
    level: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scrubbing:
    """Scrub a hypothesis: resample all that it says does not matter, and see whether the answers stay.

    The examples are the bases of ``pairs``, which are each other's donors. The units of each variable that no other
    aligned variable is an ancestor of are taken from an example with an equal value of it; those of later variables
    are computed from these; heads and neurons that no variable is aligned with, up to the last that one is, keep the
    values of a random example, whose tokens the network reads. What follows them computes the output, where that is
    not aligned itself. Inputs that reach the output on a way without an aligned variable are equal in that random
    example. A donor is the example itself only where no other fits (``moved``). Controls: as many random units of the
    same sites in the place of the first variables', and everything resampled.

    Rejected is thus also an alignment that is right and not complete: where units that no variable is aligned with pass
    a variable on. :func:`tl_sparsify.verify` asks less.

    Forward passes over the examples: one, and for each draw four and two for each first variable.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks, no draws, units with a position
            for each example.

    Example:
        >>> found = tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1)
        >>> found.accepted, found["nothing"].accuracy  # here more carries left and right on than the alignment says
        (False, 1.0)
    """
    check_model(model)
    check_count("draws", draws, most=MOST)
    for variable in alignment.variables:
        if variable not in causal_model.variables:
            raise ValueError(f"alignment names {variable!r}; the causal model has {', '.join(causal_model.variables)}")
        if any(isinstance(unit.site.positions, Tensor) for unit in alignment.units[variable]):
            raise ValueError(f"units of {variable!r} have a position for each example; name positions that all share")
    subject, base, n = TestedModel("scrubbed", model), pairs.base, len(pairs)
    values = causal_model.run(pairs.base_inputs)
    expected = pairs.expected(causal_model, ())
    first = _first(causal_model, alignment.variables)
    direct = _direct(causal_model, alignment.variables)
    still = _still(model, causal_model, alignment, first, base)
    chosen = {variable: list(alignment.units[variable]) for variable in first}
    shape = (n, base.labels.shape[1])
    free = {v: others(subject, alignment, units, shape) for v, units in chosen.items()}
    found: dict[str, list[Tensor]] = {NONE: logits(subject, base, batch_size=batch_size)}
    moved: list[Tensor] = []
    for draw in range(draws):
        any_other = _random.shifted_partner(n, seed, 71, draw, group=_groups(values, direct, n))
        free_other = _random.shifted_partner(n, seed, 72, draw)
        donors = {
            variable: _random.shifted_partner(n, seed, 73, draw, number, group=_groups(values, (variable,), n))
            for number, variable in enumerate(first)
        }
        moved += [order != torch.arange(n) for order in (any_other, *donors.values())]
        run = base[any_other]
        kept: list[Swap] = [(still, run)] if still else []
        sources = {variable: base[order] for variable, order in donors.items()}
        right = [*kept, *((chosen[v], sources[v]) for v in first)]
        swaps = [right]
        if all(free.values()):
            swaps.append([*kept, *((random_units(chosen[v], free[v], seed, draw), sources[v]) for v in first)])
        given = logits(subject, run, swaps, batch_size=batch_size)
        for name, rows in zip((SCRUBBED, RANDOM), given, strict=False):
            found.setdefault(name, []).append(rows)
        found.setdefault(EVERYTHING, []).append(found[NONE][0][free_other])
    made = {name: _judged(rows, expected, base) for name, rows in found.items()}
    worst, best = (float(made[name][1].mean()) for name in (EVERYTHING, NONE))
    lines: list[ScrubbedRow] = []
    for name in (NONE, SCRUBBED, RANDOM, EVERYTHING):
        if name in made:
            hits, losses = made[name]
            lower, upper = confidence_sequence(hits, level=level)
            loss = float(losses.mean())
            share = (worst - loss) / (worst - best) if worst > best else math.nan
            bounds = float(lower[-1]), float(upper[-1])
            lines.append(ScrubbedRow(name, float(hits.mean()), *bounds, loss, share, n))
    return Scrubbing(tuple(lines), float(torch.stack(moved).double().mean()))


def _judged(
    draws: Sequence[Float[Tensor, "n choices"]], expected: Int[Tensor, "n"], base: Examples
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """For each example how often the answer is the expected one, and its cross-entropy; means over draws."""
    column = expected if base.choices is None else (expected[:, None] == base.choices.cpu()).int().argmax(1)
    hits = torch.stack([(tokens(rows, base) == expected).double() for rows in draws])
    losses = torch.stack([-rows.double().log_softmax(1).gather(1, column[:, None])[:, 0] for rows in draws])
    return hits.mean(0), losses.mean(0)


def _first(causal_model: CausalModel, aligned: Sequence[str]) -> tuple[str, ...]:
    """Those that no other aligned variable is an ancestor of."""
    below: dict[str, bool] = {}
    for name in causal_model.variables:  # parents before their children
        below[name] = any(p in aligned or below.get(p, False) for p in causal_model.parents[name])
    return tuple(variable for variable in aligned if not below[variable])


def _direct(causal_model: CausalModel, aligned: Sequence[str]) -> tuple[str, ...]:
    """The inputs from which some way leads to the output, or to an aligned variable that is not first, without passing
    through an aligned one."""
    first = set(_first(causal_model, aligned))
    reached = {causal_model.output} - set(aligned)
    for name in reversed(causal_model.variables):
        if name in reached or (name in aligned and name not in first):
            reached |= set(causal_model.parents[name]) - set(aligned)
    return tuple(name for name in causal_model.inputs if name in reached)


def _groups(values: Mapping[str, np.ndarray], names: Sequence[str], n: int) -> Int[Tensor, "n"]:
    """A number for each example; equal where the values of all names are."""
    columns = [np.unique(np.asarray(values[name]), axis=0, return_inverse=True)[1].reshape(n) for name in names]
    if not columns:
        return torch.zeros(n, dtype=torch.long)
    return torch.from_numpy(np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(n))


def _still(
    model: Any, causal_model: CausalModel, alignment: Alignment, first: Sequence[str], base: Examples
) -> list[Unit]:
    """The heads and neurons that are held at the values of the random example: all that no variable is aligned with,
    up to the last aligned one, or to the end where the output is aligned; elsewhere also units that one is."""
    every = everything(model, alignment)
    kinds = {unit.site.kind for unit in every}
    later = [unit for v in alignment.variables if v not in first for unit in alignment.units[v]]
    plain = all(unit.site.kind in kinds for unit in later)
    here = [unit for v in (alignment.variables if plain else first) for unit in alignment.units[v]]
    end = max(map(_stage, here))
    whole = plain and causal_model.output in alignment.variables
    aligned: dict[Unit, list[Any]] = {}
    for unit in (unit for v in alignment.variables for unit in alignment.units[v]):
        aligned.setdefault(unit.at(None), []).append(unit.site)
    padded = base.attention_mask is not None and not bool(base.attention_mask.all())
    width, found = base.labels.shape[1], []
    for unit in every:
        if not whole and _stage(unit) > end:
            continue
        if unit not in aligned:
            found.append(unit)
            continue
        masks = [site.position_mask(1, width) for site in aligned[unit]]
        if not padded and all(mask is not None for mask in masks):
            free = (~torch.stack([mask[0] for mask in masks if mask is not None]).any(0)).nonzero().flatten().tolist()
            found += [unit.at(tuple(free))] if free else []
    return found


def _stage(unit: Unit) -> tuple[int, bool]:
    """Where in the order of computation a unit is: its layer, and whether behind the attention."""
    early = unit.site.kind in ("head", "attention") or unit.site.hook.endswith(("hook_resid_pre", "hook_resid_mid"))
    return unit.site.layer, not early
