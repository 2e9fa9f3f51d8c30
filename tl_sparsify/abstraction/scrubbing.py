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
from typing import Any, Literal, NamedTuple

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
from tl_sparsify.abstraction.controls import others, random_units
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, columns_of, logits, selected_apart, tokens, values_of
from tl_sparsify.abstraction.verdicts import GOAL, TOLD_APART, accepted
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
        told: the same on the examples where the network reads an input whose answer is another one; NaN where all is
            read as it is, or everything resampled.
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
    told: float
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
        moved: for each aligned variable that something is computed from, the share of its donors that are another input
            than the example: where it is small, few examples share the variable's value, and little is tested.
        tells: for the output, and each aligned variable that is computed from others, the share of the examples for
            which the network reads an input where its value is another one: nothing to be got right on the rest.
        unaligned: the causal model's variables between inputs and output that no units are aligned with, of which
            nothing is tested.

    Example:
        >>> found = tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1)
        >>> min(found.moved.values()) > 0.9, found.unaligned
        (True, ())
    """

    rows: tuple[ScrubbedRow, ...]
    moved: Mapping[str, float]
    tells: Mapping[str, float]
    unaligned: tuple[str, ...] = ()

    def __getitem__(self, resampled: str) -> ScrubbedRow:
        return next(row for row in self.rows if row.resampled == resampled)

    @property
    def verdict(self) -> Literal["accepted", "rejected", "cannot tell"]:
        """Rejected: without resampling or with it the accuracy is below :data:`verdicts.GOAL`, or that on the examples
        that can tell below :data:`verdicts.GOAL_CHANGED`. Accepted: it is not, and :attr:`reservation` is empty."""
        if not all(accepted(self[name].accuracy, self[name].told) for name in (NONE, SCRUBBED)):
            return "rejected"
        return "cannot tell" if self.reservation else "accepted"

    @property
    def accepted(self) -> bool:
        """Whether the verdict is accepted."""
        return self.verdict == "accepted"

    @property
    def reservation(self) -> str:
        """Why what was found cannot tell the causal model from others, with the mend; empty where it can."""
        said: list[str] = []
        if self.unaligned:
            names = ", ".join(self.unaligned)
            said.append(f"no units are aligned with {names}: align them, or judge a causal model without them")
        for name, share in self.moved.items():
            if share < TOLD_APART:
                said.append(f"{share:.1%} of the examples share their value of {name} with another: give more pairs")
        for name, share in self.tells.items():
            if share < TOLD_APART:
                said.append(f"{share:.1%} of the inputs that are read have another {name}: give pairs of other inputs")
        for name in (RANDOM, EVERYTHING):
            rows = [row for row in self.rows if row.resampled == name]
            if any(row.accuracy >= GOAL for row in rows):
                said.append(f"the control {name!r} is as accurate: give pairs with more different answers")
        return "; ".join(said)

    def to_frame(self) -> pd.DataFrame:
        """One row a resampling; the columns are :class:`ScrubbedRow`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        row = self[SCRUBBED]
        recovered = "" if math.isnan(row.recovered) else f", {row.recovered:.1%} of the loss recovered"
        why = f" ({self.reservation})" if self.verdict == "cannot tell" else ""
        return f"Scrubbing({self.verdict}{why}: accuracy {row.accuracy:.3f}{recovered}; n={row.n})"


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
    a way without an aligned variable; all other units are what they are there, and what comes after the units that are
    set is computed from them. A donor is the example itself only where no other fits (``moved``). Controls: as many
    random units of the same sites in the place of those that the answer is computed from, and everything resampled.

    Rejected is thus also an alignment that is right and not complete: where units that no variable is aligned with pass
    a variable on by the side. :func:`tl_sparsify.verify` asks less. A causal model of which not all is aligned, or that
    the examples cannot tell from another, is not accepted: the verdict is then "cannot tell", and ``reservation`` says
    why. What no scrubbing can tell apart: models whose variables have other values, but are equal for the same inputs.
    :func:`tl_sparsify.contrast` asks that.

    Forward passes over the examples: one, and for each draw two for each variable, as often as another one (or the
    answer) is computed from it, and three for the control.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks, no draws, units at a span or with
            a position for each example, an alignment of the output alone, an answer that is not among the choices.

    Example:
        >>> found = tls.scrub(model, task.causal_model, task.alignment, pairs, draws=1)
        >>> found.verdict, found["nothing"].accuracy
        ('rejected', 1.0)
    """
    check_model(model)
    check_count("draws", draws, most=MOST)
    for variable in alignment.variables:
        if variable not in causal_model.variables:
            raise ValueError(f"alignment names {variable!r}; the causal model has {', '.join(causal_model.variables)}")
        if any(isinstance(unit.site.positions, Tensor | str) for unit in alignment.units[variable]):
            raise ValueError(
                f"units of {variable!r} have a position for each example or are at a span; name positions that "
                "all share"
            )
    if set(alignment.variables) <= {causal_model.output}:
        raise ValueError(
            f"alignment names no variable besides the output {causal_model.output!r}: nothing that leads to it would "
            "be tested; align an inner variable"
        )
    subject, base, n = TestedModel("scrubbed", model), pairs.base, len(pairs)
    values = causal_model.run(pairs.base_inputs)
    expected = pairs.expected(causal_model, ())
    found: dict[str, list[Tensor]] = {NONE: logits(subject, base, batch_size=batch_size)}
    noted = _Noted({}, {})
    apart: list[Tensor] = []
    for draw in range(draws):
        tree = _tree(causal_model, alignment, values, n, (seed, draw), noted)
        apart.append(expected[tree.run] != expected)
        found.setdefault(SCRUBBED, []).append(_answered(model, tree, base, batch_size))
        control = _at_random(subject, alignment, tree, base, seed, draw)
        if control is not None:
            found.setdefault(RANDOM, []).append(_answered(model, control, base, batch_size))
        other = _random.shifted_partner(n, seed, 72, draw)
        found.setdefault(EVERYTHING, []).append(found[NONE][0][other])
    made = {name: _judged(rows, expected, base) for name, rows in found.items()}
    worst, best = (float(made[name][1].mean()) for name in (EVERYTHING, NONE))
    meant = float(made[NONE][0].mean()) >= GOAL and worst > best
    told = torch.stack(apart)
    lines: list[ScrubbedRow] = []
    for name in (NONE, SCRUBBED, RANDOM, EVERYTHING):
        if name in made:
            hits, losses = made[name]
            lower, upper = confidence_sequence(hits.mean(0), level=level)
            loss = float(losses.mean())
            lines.append(
                ScrubbedRow(
                    name,
                    float(hits.mean()),
                    float(hits[told].mean()) if name in (SCRUBBED, RANDOM) else math.nan,
                    float(lower[-1]),
                    float(upper[-1]),
                    loss,
                    (worst - loss) / (worst - best) if meant else math.nan,
                    n,
                )
            )
    known = {*causal_model.inputs, *alignment.variables, causal_model.output}
    unaligned = tuple(name for name in causal_model.variables if name not in known)
    moved, tells = ({v: float(torch.cat(some).double().mean()) for v, some in part.items()} for part in noted)
    return Scrubbing(tuple(lines), moved, tells, unaligned)


class _Noted(NamedTuple):
    """What was drawn, by variable: which donors are another input, which inputs that are read have another value."""

    moved: dict[str, list[Tensor]]
    tells: dict[str, list[Tensor]]


@dataclass(frozen=True, eq=False)
class _Node:
    """How the value of a variable's units, or the answer (no units), comes about on each example.

    Attributes:
        units: what is read there.
        run: the example that the network reads for each example.
        parents: for each variable that this one is computed from a donor for each example, and its own node.
    """

    units: tuple[Unit, ...]
    run: Int[Tensor, "n"]
    parents: tuple[tuple[Int[Tensor, "n"], _Node], ...] = ()


def _tree(
    causal_model: CausalModel,
    alignment: Alignment,
    values: Mapping[str, np.ndarray],
    n: int,
    draw: tuple[int, int],
    noted: _Noted,
) -> _Node:
    """The answer's node, and below it that of every aligned variable, as often as something is computed from it."""
    numbers = itertools.count()

    def donors(names: Sequence[str]) -> Int[Tensor, "n"]:
        return _random.shifted_partner(n, draw[0], 73, draw[1], next(numbers), group=_groups(values, names, n))

    def node(variable: str | None) -> _Node:
        units = () if variable is None else tuple(alignment.units[variable])
        above, direct = _before(causal_model, alignment.variables, variable)
        if variable is not None and not above:
            return _Node(units, torch.arange(n))
        parents: list[tuple[Tensor, _Node]] = []
        for parent in above:
            order = donors((parent,))
            noted.moved.setdefault(parent, []).append(order != torch.arange(n))
            parents.append((order, node(parent)))
        run, name = donors(direct), causal_model.output if variable is None else variable
        value = _groups(values, (name,), n)
        noted.tells.setdefault(name, []).append(value[run] != value)
        return _Node(units, run, tuple(parents))

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
    made: list[Intervention] = []
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
) -> tuple[Float[Tensor, "draws n"], Float[Tensor, "draws n"]]:
    """For each draw and example whether the answer is the expected one, and its cross-entropy."""
    column = columns_of(expected, base.choices)
    hits = torch.stack([(tokens(rows, base) == expected).double() for rows in draws])
    losses = torch.stack([-rows.double().log_softmax(1).gather(1, column[:, None])[:, 0] for rows in draws])
    return hits, losses


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
    columns = [_numbered(np.asarray(values[name])).reshape(n) for name in names]
    if not columns:
        return torch.zeros(n, dtype=torch.long)
    return torch.from_numpy(np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(n))


def _numbered(values: np.ndarray) -> np.ndarray:
    """A number for each value, the same for equal ones."""
    if values.dtype != object:
        return np.unique(values, axis=0, return_inverse=True)[1]
    number: dict[Any, int] = {}  # None and 1 have no order
    return np.array([number.setdefault(value, len(number)) for value in values.tolist()])
