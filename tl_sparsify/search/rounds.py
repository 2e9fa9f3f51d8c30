"""Rounds: how a search goes from one circuit to the next.

A round expands the divergence around the circuit that the last one left, and chooses what changes: units that leave, or
an exchange of kept units for removed ones; or the last round did much worse than it promised, and half of what it
removed comes back. The state after a round is a value (:class:`checkpoint.State`), and every step makes a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import NONE
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import Recall, computed, remembered
from tl_sparsify.core.moments import Estimate, Moments
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units
from tl_sparsify.expansion.linearisation import Linearisation, linearise_folds, merged, noting
from tl_sparsify.expansion.selection import NO_SHRINKAGE, ROUNDING, Shrinkage, after, exchange, greedy
from tl_sparsify.expansion.shrinkage import START, Trade, chosen, traded
from tl_sparsify.gradients.backward import modified
from tl_sparsify.search.checkpoint import State
from tl_sparsify.search.path import LEAST, CircuitPath, Round, order_through, worse
from tl_sparsify.search.settings import Probing

_FAR = 3.0  # times the predicted divergence: more than that, and half of the round is taken back
_WORTH, _WORTH_LAST = 0.1, 0.02  # the share of the divergence that an exchange must promise to take away
_LITTLE = 1e-6
_NOTHING = torch.zeros(0, dtype=torch.long)
Measure = Callable[[Reduction], Estimate]
Change = tuple[Int[Tensor, "removed"], Int[Tensor, "restored"]]


@dataclass(frozen=True, eq=False)
class Expansion:
    """The divergence around a circuit: halves of its samples, both together, the divergence already made at temperature
    1, and the examples (all where ``None``)."""

    halves: tuple[Linearisation, ...]
    sketch: Linearisation
    made: Moments
    index: Int[Tensor, "some"] | None


def expanding(
    model: Model,
    train: Examples,
    probing: Probing,
    carry_deviation: bool,
    seed: int,
    of_train: Recall,
    shared: dict[str, Any],
) -> Callable[[Reduction, int], Expansion]:
    """The function that expands the divergence around a reduction, with a number of its own for what is random.

    It takes one forward pass over the examples of a round, and ``probes`` backward."""
    some = None if probing.examples is None or probing.examples >= len(train) else probing.examples
    clean = shared["interventions"] == NONE
    known = remembered(model, train, batch_size=shared["batch_size"]) if some is not None and clean else None

    def expand(current: Reduction, number: int) -> Expansion:
        examples, here, recall, index = train, current, of_train, None
        if some is not None:
            index = _random.permutation(len(train), seed, 97, number)[:some].sort().values
            examples, here, recall = train[index], current.for_examples(index), _for_some(known, index)
        made: list[Moments] = []
        settings = {"temperature": probing.temperature, "probes": probing.probes, "seed": seed + number}
        before = None if len(current.circuit) == len(current.units) else here
        parts = samples(model, examples, here, current=before, restorable=True, recall=recall, **settings, **shared)
        with modified(model, probing.backward):
            halves = linearise_folds(noting(parts, made), len(examples), seed=seed + number)
        if not carry_deviation:
            halves = tuple(replace(half, linear=torch.zeros_like(half.linear), deviation=None) for half in halves)
        return Expansion(halves, merged(halves), Moments.over(made, len(examples)), index)

    return expand


def _for_some(known: Callable[[Int[Tensor, "batch"]], Tensor] | None, some: Int[Tensor, "some"]) -> Recall:
    """From logits that are known for all examples those of some."""
    return computed if known is None else lambda index, _: known(some[index])


@dataclass(frozen=True, eq=False)
class Search:
    """What stays as it is in all rounds.

    Attributes:
        first: the circuit that the search starts from.
        targets: what each round leaves, in units or, where they have ``costs``, in these.
        free: the units that may leave.
        weight: what each unit counts for.
        most: rounds that may be made again.
        unknown: the estimate of a risk that nobody has measured.
        seen: whether the pass of a prediction, or else of the next round, also measures a round's risk.
        expand, foretell, measuring, refit: the passes over the data: the divergence around a reduction; a predicted
            risk, its additivity, and the divergence before the change; a function that measures risk on some examples;
            other constants after a round. ``None``: not asked for.
    """

    units: Units
    first: Circuit
    targets: tuple[int | float, ...]
    free: Bool[Tensor, "units"]
    weight: Float[Tensor, "units"]
    costs: Float[Tensor, "units"] | None
    shrinkage: Shrinkage | None
    most: int
    unknown: Estimate
    seen: bool
    expand: Callable[[Reduction, int], Expansion]
    foretell: Callable[[Reduction, Change, int], tuple[Estimate, float, Moments]] | None
    measuring: Callable[[Int[Tensor, "some"] | None], Measure]
    refit: Callable[[Reduction], Reduction] | None

    @property
    def trading(self) -> bool:
        """Whether units may be exchanged."""
        return self.shrinkage is None and self.costs is None

    def size(self, circuit: Circuit) -> float:
        """Of its units, or what they cost."""
        return float(self.weight[circuit.mask].sum())


def starting(search: Search, current: Reduction) -> State:
    """The state before the first round, at this reduction."""
    n = len(search.units)
    return State(
        step=0,
        pending=(),
        left=torch.where(search.first.mask, torch.inf, torch.arange(-n, 0, dtype=torch.float64)),
        clock=0,
        number=0,
        found=(),
        believed=START if search.shrinkage is None else search.shrinkage,
        promised=float("inf"),
        trade=Trade(),
        spare=search.most,
        picks=_NOTHING,
        restored=_NOTHING,
        before=current,
        current=current,
    )


def all_rounds(
    search: Search, state: State, saved: Callable[[State], State], progress: bool
) -> tuple[State, Expansion | None]:
    """The state after all rounds that are still to be made, and the last expansion, if there was one."""
    expansion: Expansion | None = None
    goals = (*search.targets, search.targets[-1])  # at the last size once more, for exchanges alone
    for step, target in enumerate(bar(goals, "removing units", progress)):
        if step < state.step:
            continue
        if step > state.step or not state.pending:
            state = replace(state, step=step, pending=(target,))
        last = step == len(search.targets)
        while state.pending:
            excess = search.size(state.current.circuit) - state.pending[-1]
            there = excess <= ROUNDING * state.pending[-1]  # costs do not add up exactly
            settling = there and last and search.trading and state.spare > 0 and bool(state.found)
            if there and not settling:
                state = replace(state, pending=state.pending[:-1])
                continue
            expansion = search.expand(state.current, state.number)
            state = replace(state, before=state.current, number=state.number + 1)
            reached = bool(state.found) and state.found[-1].reduction.circuit == state.current.circuit
            if search.seen and search.foretell is None and reached:
                state = _measured(search, state, expansion.made)
            far = expansion.sketch.offset > max(LEAST, _FAR * state.promised)
            if state.spare > 0 and far and len(state.picks) > 1:
                state = _half_taken_back(search, state)
                continue
            state = replace(state, picks=_NOTHING, restored=_NOTHING)
            reserved = search.most * (1 - 0.5 * step / len(search.targets))  # most where few units are left
            if search.trading and reached and (settling or state.spare > reserved):
                state = _with_exchange(search, state, expansion, _WORTH_LAST if settling else _WORTH)
            exchanged = len(state.restored) > 0
            if settling and not exchanged:
                state = replace(state, pending=())
                continue
            if not exchanged:
                state = _with_removal(search, state, expansion, excess)
            state = saved(_made(search, state, reached))
    return state, expansion


def _measured(search: Search, state: State, made: Moments) -> State:
    """The last round's risk is the divergence that a later pass has met."""
    measured = Estimate.of(made, search.unknown.unit)
    return replace(state, found=(*state.found[:-1], replace(state.found[-1], measured=measured)))


def _half_taken_back(search: Search, state: State) -> State:
    """The last round did much worse than it promised: half of its units come back, and its size is made again."""
    half = len(state.picks) // 2
    left = state.left.index_fill(0, state.picks[half:], torch.inf)
    return replace(
        state,
        left=left,
        pending=(*state.pending, search.size(state.current.circuit)),
        current=state.current.with_circuit(Circuit(search.units, left.isinf())),
        found=state.found[:-1],
        picks=state.picks[:half],
        spare=state.spare - 1,
        promised=float("inf"),
    )


def _with_exchange(search: Search, state: State, expansion: Expansion, worth: float) -> State:
    """An exchange is the next change, if it promises to take away such a share of the divergence."""
    mask = state.current.circuit.mask
    kept, gone = mask & search.free, search.first.mask & ~mask & search.free
    if not bool(gone.any()) or not bool(kept.any()):
        return state
    trade, promise = traded(expansion.halves, kept, gone, near=state.trade)
    state = replace(state, trade=trade)
    if not promise < (1 - worth) * expansion.sketch.offset:
        return state
    count = min(trade.count(int(kept.sum())), int(gone.sum()))
    restored, picks = exchange(expansion.sketch, kept, gone, 0, count, shrinkage=trade.shrinkage)
    return replace(state, restored=restored, picks=picks, spare=state.spare - 1, promised=float("inf"))


def _with_removal(search: Search, state: State, expansion: Expansion, excess: float) -> State:
    """The units whose removal is the next change."""
    kept, sketch = state.current.circuit.mask & search.free, expansion.sketch
    believed, promised = state.believed, state.promised
    if search.shrinkage is None:
        near = NO_SHRINKAGE if state.number == 1 and sketch.samples >= int(kept.sum()) else believed
        slopes = state.number % 2 == 0
        believed, promised = chosen(expansion.halves, kept, excess, near=near, slopes=slopes, costs=search.costs)
    picks = greedy(sketch, kept, excess, shrinkage=believed, costs=search.costs)
    return replace(state, picks=picks, believed=believed, promised=promised)


def _made(search: Search, state: State, reached: bool) -> State:
    """The change is made, and a round of it; a round that is an exchange takes the place of the one before."""
    picks, restored = state.picks, state.restored
    left = _leaving(state.left.index_fill(0, restored, torch.inf), picks, state.clock)
    predicted, additivity = search.unknown, float("nan")
    if search.foretell is not None:
        predicted, additivity, made = search.foretell(state.current, (picks, restored), state.number - 1)
        if search.seen and reached:
            state = _measured(search, state, made)
    current = state.current.with_circuit(Circuit(search.units, left.isinf()))
    current = current if search.refit is None else search.refit(current)
    measured = search.unknown if search.seen else search.measuring(None)(current)
    before = state.found[:-1] if len(restored) else state.found
    found = (*before, Round(current, predicted, measured, additivity))
    return replace(state, left=left, clock=state.clock + len(picks), current=current, found=found)


def _leaving(left: Float[Tensor, "units"], picks: Int[Tensor, "picks"], clock: int) -> Float[Tensor, "units"]:
    """When each unit left, once these have left one after the other."""
    return left.index_copy(0, picks, clock + torch.arange(len(picks), dtype=torch.float64))


def path_of(search: Search, state: State, expansion: Expansion) -> CircuitPath:
    """The rounds as nested circuits, each of them measured, and the order in which the units that are left would go."""
    # what interactions add to slopes is counted however little slopes are believed
    believed = replace(state.believed, slope=max(state.believed.slope, _LITTLE))
    sketch = after(expansion.sketch, state.picks, believed, state.restored)
    alive = state.current.circuit.mask & search.free
    rest = greedy(sketch, alive, float("inf"), shrinkage=believed, costs=search.costs)
    order = _leaving(state.left, rest, state.clock).argsort(stable=True)  # units that are always kept have not left
    # where nothing else is asked for, risk is measured on the examples of a round
    index = expansion.index if search.seen and search.foretell is None else None
    measure = search.measuring(index)
    found: list[Round] = []
    for step in state.found:  # a unit that was taken back is in every larger circuit, too
        mask = torch.zeros(len(search.units), dtype=torch.bool)
        mask[order[len(order) - len(step.reduction.circuit) :]] = True
        same = bool((mask == step.reduction.circuit.mask).all())
        unmeasured = step.measured.mean != step.measured.mean
        found.append(step if same and not unmeasured else _remeasured(step, mask, step.reduction, measure))
    if search.trading:
        found = _grown(search, state, found, measure, on_other_examples=index is not None)
    return CircuitPath(search.units, order_through(order, found), tuple(found), search.costs)


def _grown(
    search: Search, state: State, rounds: Sequence[Round], measure: Measure, *, on_other_examples: bool
) -> list[Round]:
    """No larger circuit does worse than a smaller one: else it is grown from that one, where that measures lower.
    Rounds that were each measured on other examples are first measured on the same."""
    found, number = list(rounds), state.number
    for place in reversed(range(len(found) - 1)):
        if worse(*(step.measured for step in found[place : place + 2])) and on_other_examples:
            for at in (place, place + 1):
                found[at] = _remeasured(found[at], found[at].reduction.circuit.mask, found[at].reduction, measure)
        larger, smaller = found[place : place + 2]
        if not worse(larger.measured, smaller.measured):
            continue
        around = found[place - 1].reduction.circuit.mask if place else search.first.mask
        inside, missing = smaller.reduction.circuit.mask, len(larger.reduction.circuit) - len(smaller.reduction.circuit)
        sketch = search.expand(smaller.reduction, number).sketch
        backs = [  # what helps most, or what does least of all
            exchange(sketch, inside, around & ~inside, -missing, missing, shrinkage=belief)[0]
            for belief in (state.believed, Shrinkage(0.0, 0.0))
        ]
        grown = [_remeasured(larger, inside.index_fill(0, back, True), smaller.reduction, measure) for back in backs]
        best, back = min(zip(grown, backs, strict=True), key=lambda pair: pair[0].measured.mean)
        if best.measured.mean < larger.measured.mean:
            predicted, additivity = search.unknown, float("nan")
            if search.foretell is not None:
                predicted, additivity, _ = search.foretell(smaller.reduction, (_NOTHING, back), number)
            found[place] = replace(best, predicted=predicted, additivity=additivity)
        number += 1
    return found


def _remeasured(step: Round, mask: Bool[Tensor, "units"], reduction: Reduction, measure: Measure) -> Round:
    """The round with this circuit in place of its own."""
    made = reduction.with_circuit(Circuit(reduction.units, mask))
    return replace(step, reduction=made, measured=measure(made))
