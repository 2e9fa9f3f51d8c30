"""Causal scrubbing: does the answer survive when everything is resampled that a causal model says does not matter?

The network runs on another input, drawn at random, with each aligned variable's units taken from an input on which the
variable has the value that it has on the example, and computed there from variables that are resampled in the same way.
A causal model that says what matters gives the example's answer all the same (Chan et al., *Causal Scrubbing*, 2022,
Alignment Forum). It accepts every refinement of a right model too: a variable that says more than the network uses only
makes fewer inputs exchangeable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.ranks import gathered
from tl_sparsify.abstraction.between import between
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.certificates import confidence_sequence
from tl_sparsify.abstraction.controls import everything, others, random_units
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, logits, selected_apart, tokens, values_of
from tl_sparsify.abstraction.verdicts import GOAL
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_model, shared_batches
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.units import Model, Unit


@dataclass(frozen=True)
class ScrubbedRow:
    """What is left of the answers under one resampling.

    Attributes:
        resampled: ``nothing``, ``what does not matter``, ``the same, random units`` or ``everything``.
        accuracy: how often the answer is the causal model's; the mean over draws.
        lower, upper: a confidence sequence for it.
        loss: cross-entropy of that answer, nats.
        recovered: the share of the loss between ``everything`` and ``nothing`` that is recovered; NaN where the network
            does not give the causal model's answers anyway.
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
        unaligned: the causal model's variables between inputs and output that no units are aligned with, of which
            nothing is tested.

    Example:
        >>> tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1).moved > 0.9
        True
    """

    rows: tuple[ScrubbedRow, ...]
    moved: float
    unaligned: tuple[str, ...] = ()

    def __getitem__(self, resampled: str) -> ScrubbedRow:
        return next(row for row in self.rows if row.resampled == resampled)

    @property
    def accepted(self) -> bool:
        """Whether the scrubbed accuracy is at least :data:`verdicts.GOAL`, as without resampling, and that of no
        control is."""
        reached = {row.resampled: row.accuracy >= GOAL for row in self.rows}
        return reached[NONE] and reached[SCRUBBED] and not (reached[EVERYTHING] or reached.get(RANDOM, False))

    def to_frame(self) -> pd.DataFrame:
        """One row a resampling; the columns are :class:`ScrubbedRow`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        row = self[SCRUBBED]
        found = f"accuracy {row.accuracy:.3f}, {row.recovered:.1%} of the loss recovered"
        untested = f", nothing said of {', '.join(self.unaligned)}" if self.unaligned else ""
        return f"Scrubbing({'accepted' if self.accepted else 'rejected'}{untested}: {found}; n={row.n})"


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

    The examples are the bases of ``pairs``, which are each other's donors. The answer is computed from the aligned
    variables that no other one separates from it: the units of each are set to what they are for a donor of its own
    with an equal value of that variable; these again are computed from the variables before them, each with donors of
    its own, and so on to the inputs. The network reads a random example with equal values of the inputs that matter on
    a way without an aligned variable, and all other heads and neurons, up to those that are computed, keep the values
    of that. A donor is the example itself only where no other fits (``moved``). Controls: as many random units of the
    same sites in the place of those that the answer is computed from, and everything resampled.

    Rejected is thus also an alignment that is right and not complete: where units that no variable is aligned with pass
    a variable on. :func:`tl_sparsify.verify` asks less. What no scrubbing can tell apart: models whose variables have
    other values, but are equal for the same inputs. :func:`tl_sparsify.contrast` asks that.

    Forward passes over the examples: one, and for each draw two for each variable, as often as another one (or the
    answer) is computed from it, and three for the control.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks, no draws, units with a position
            for each example, an alignment of the output alone.

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
    if set(alignment.variables) <= {causal_model.output}:
        raise ValueError(
            f"alignment names no variable besides the output {causal_model.output!r}: nothing that leads to it would "
            "be tested; align an inner variable"
        )
    subject, base, n = TestedModel("scrubbed", model), pairs.base, len(pairs)
    values = causal_model.run(pairs.base_inputs)
    expected = pairs.expected(causal_model, ())
    found: dict[str, list[Tensor]] = {NONE: logits(subject, base, batch_size=batch_size)}
    moved: list[Tensor] = []
    for draw in range(draws):
        tree = _tree(model, causal_model, alignment, values, base, (seed, draw), moved)
        found.setdefault(SCRUBBED, []).append(_answered(model, tree, base, batch_size))
        control = _at_random(subject, alignment, tree, base, seed, draw)
        if control is not None:
            found.setdefault(RANDOM, []).append(_answered(model, control, base, batch_size))
        other = _random.shifted_partner(n, seed, 72, draw)
        found.setdefault(EVERYTHING, []).append(found[NONE][0][other])
    made = {name: _judged(rows, expected, base) for name, rows in found.items()}
    worst, best = (float(made[name][1].mean()) for name in (EVERYTHING, NONE))
    meant = float(made[NONE][0].mean()) >= GOAL and worst > best
    lines: list[ScrubbedRow] = []
    for name in (NONE, SCRUBBED, RANDOM, EVERYTHING):
        if name in made:
            hits, losses = made[name]
            lower, upper = confidence_sequence(hits, level=level)
            loss = float(losses.mean())
            share = (worst - loss) / (worst - best) if meant else math.nan
            bounds = float(lower[-1]), float(upper[-1])
            lines.append(ScrubbedRow(name, float(hits.mean()), *bounds, loss, share, n))
    known = {*causal_model.inputs, *alignment.variables, causal_model.output}
    unaligned = tuple(name for name in causal_model.variables if name not in known)
    return Scrubbing(tuple(lines), float(torch.stack(moved).double().mean()), unaligned)


@dataclass(frozen=True, eq=False)
class _Node:
    """How the value of a variable's units, or the answer (no units), comes about on each example.

    Attributes:
        units: what is read there.
        run: the example that the network reads for each example.
        still: units that keep the values of that.
        parents: for each variable that this one is computed from a donor for each example, and its own node.
    """

    units: tuple[Unit, ...]
    run: Int[Tensor, "n"]
    still: tuple[Unit, ...] = ()
    parents: tuple[tuple[Int[Tensor, "n"], _Node], ...] = ()


def _tree(
    model: Any,
    causal_model: CausalModel,
    alignment: Alignment,
    values: Mapping[str, np.ndarray],
    base: Examples,
    draw: tuple[int, int],
    moved: list[Tensor],
) -> _Node:
    """The answer's node, and below it that of every aligned variable, as often as something is computed from it; notes
    which donors are another example."""
    n, numbers = len(base), itertools.count()

    def donors(names: Sequence[str]) -> Int[Tensor, "n"]:
        order = _random.shifted_partner(n, draw[0], 73, draw[1], next(numbers), group=_groups(values, names, n))
        moved.append(order != torch.arange(n))
        return order

    def node(variable: str | None) -> _Node:
        units = () if variable is None else tuple(alignment.units[variable])
        above, direct = _before(causal_model, alignment.variables, variable)
        if variable is not None and not above:
            return _Node(units, torch.arange(n))
        parents = tuple((donors((parent,)), node(parent)) for parent in above)
        return _Node(units, donors(direct), _still(model, causal_model, alignment, variable, above, base), parents)

    return node(None)


def _at_random(
    subject: TestedModel, alignment: Alignment, tree: _Node, base: Examples, seed: int, draw: int
) -> _Node | None:
    """The same with as many random units in the place of those that the answer is computed from, where these have
    others beside them; ``None`` where none has."""
    shape, changed = (len(base), base.labels.shape[1]), False
    parents: list[tuple[Int[Tensor, "n"], _Node]] = []
    for order, parent in tree.parents:
        free = others(subject, alignment, list(parent.units), shape)
        changed |= bool(free)
        units = tuple(random_units(list(parent.units), free, seed, draw))
        parents.append((order, _Node(units, torch.arange(len(base))) if free else parent))
    return replace(tree, parents=tuple(parents)) if changed else None


def _answered(model: Any, tree: _Node, base: Examples, batch_size: int | None) -> Float[Tensor, "n choices"]:
    """The logits that a tree ends in, for each example."""

    def parts() -> Iterator[Float[Tensor, "batch choices"]]:
        for index, _ in shared_batches(model, base, batch_size):
            run, made = _set(model, tree, base, index)
            with intervened(model, *made):
                yield answer_logits(model, run).cpu()

    with torch.no_grad():
        return torch.cat(gathered(parts(), len(base)))


def _set(
    model: Any, node: _Node, base: Examples, index: Int[Tensor, "batch"]
) -> tuple[Examples, tuple[Intervention, ...]]:
    """The input that the network reads for the examples ``index``, and what is set in it."""
    run = base[node.run[index]]
    made = _given(model, node.still, run, (), run)
    for order, parent in node.parents:
        source, before = _set(model, parent, base, order[index])
        made += _given(model, parent.units, source, before, run)
    return run, tuple(made)


def _given(
    model: Any, units: Sequence[Unit], source: Examples, before: tuple[Intervention, ...], run: Examples
) -> list[Intervention]:
    """The units at the values that they have on ``source`` with ``before`` set there, for a run on others. One forward
    pass, none for no units."""
    parts = selected_apart(units)
    taken = values_of(model, source, [group for group, _ in parts], before)
    return [
        made
        for (group, mask), values in zip(parts, taken, strict=True)
        for made in between(group, (~mask).float(), values, run, source)
    ]


def _judged(
    draws: Sequence[Float[Tensor, "n choices"]], expected: Int[Tensor, "n"], base: Examples
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """For each example how often the answer is the expected one, and its cross-entropy; means over draws."""
    column = expected if base.choices is None else (expected[:, None] == base.choices.cpu()).int().argmax(1)
    hits = torch.stack([(tokens(rows, base) == expected).double() for rows in draws])
    losses = torch.stack([-rows.double().log_softmax(1).gather(1, column[:, None])[:, 0] for rows in draws])
    return hits.mean(0), losses.mean(0)


def _before(causal_model: CausalModel, aligned: Sequence[str], variable: str | None) -> tuple[tuple[str, ...], ...]:
    """The aligned variables that a variable is computed from with no other aligned one between them (the answer,
    ``None``, is computed from the output), and the inputs that reach it on a way without any."""
    reached = {causal_model.output} if variable is None else set(causal_model.parents[variable])
    for name in reversed(causal_model.variables):
        if name in reached and name not in aligned:
            reached |= set(causal_model.parents[name])
    parents = tuple(name for name in aligned if name in reached)
    return parents, tuple(name for name in causal_model.inputs if name in reached and name not in aligned)


def _groups(values: Mapping[str, np.ndarray], names: Sequence[str], n: int) -> Int[Tensor, "n"]:
    """A number for each example; equal where the values of all names are."""
    columns = [np.unique(np.asarray(values[name]), axis=0, return_inverse=True)[1].reshape(n) for name in names]
    if not columns:
        return torch.zeros(n, dtype=torch.long)
    return torch.from_numpy(np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(n))


def _still(
    model: Any,
    causal_model: CausalModel,
    alignment: Alignment,
    variable: str | None,
    above: Sequence[str],
    base: Examples,
) -> tuple[Unit, ...]:
    """The heads and neurons that keep the values of the input that the network reads while a variable, or the answer,
    is computed from those ``above``: all others up to the variable's own (to the end where the output is aligned; where
    it is not the answer is computed behind the last aligned ones). Of directions, which heads and neurons write and
    read, all up to those of the variables ``above``."""
    every = everything(model, alignment)
    kinds = {unit.site.kind for unit in every}
    own = [] if variable is None else list(alignment.units[variable])
    given = [unit for v in above for unit in alignment.units[v]]
    plain = all(unit.site.kind in kinds for unit in [*own, *given])
    whole = plain and variable is None and causal_model.output in alignment.variables
    if not plain:
        end = max(map(_stage, given))
    elif variable is None:
        end = max(_stage(unit) for v in alignment.variables for unit in alignment.units[v])
    else:
        end = max(map(_stage, own))
    aligned: dict[Unit, list[Any]] = {}
    for unit in [*own, *given]:
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
    return tuple(found)


def _stage(unit: Unit) -> tuple[int, bool]:
    """Where in the order of computation a unit is: its layer, and whether behind the attention."""
    early = unit.site.kind in ("head", "attention") or unit.site.hook.endswith(("hook_resid_pre", "hook_resid_mid"))
    return unit.site.layer, not early
