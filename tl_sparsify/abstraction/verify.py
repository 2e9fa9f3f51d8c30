"""Verification: does the network compute what a high-level causal model says, variable by variable?

For base ``b``, source ``s`` and variable ``V``, the units aligned with ``V`` take, in ``b``'s run, their values from
``s``'s run; the network should then answer what the causal model answers for ``b`` under ``do(V = V(s))``. The
fraction of pairs for which it does is the interchange intervention accuracy (Geiger et al., 2021). An accuracy is not
evidence on its own: it stands beside controls that need not be good, only pairs that the model answers right without
intervention count, and units that no variable is aligned with are interchanged too: that should change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify.abstraction.causal_model import CausalModel, ancestors
from tl_sparsify.abstraction.certificates import confidence_sequence, decided, margin_bound
from tl_sparsify.abstraction.controls import (
    everything,
    made_up,
    others,
    outside,
    placebo,
    random_units,
    random_weights,
    streams,
)
from tl_sparsify.abstraction.evidence import ALIGNED_UNITS, NOTHING, RANDOM_UNITS, Alignment, Evidence, Pairs, Row
from tl_sparsify.abstraction.interchange import (
    Swap,
    TestedModel,
    answers,
    bare,
    randomly_interchanged,
    right_answers,
    tokens,
)
from tl_sparsify.abstraction.verdicts import Role
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.metrics import kl
from tl_sparsify.core.reduction import Reduction, check_fingerprint, check_origin
from tl_sparsify.core.units import Model, Unit

__all__ = ["Alignment", "Evidence", "Pairs", "Row", "verify"]

_CHUNK = 64  # pairs between two looks at the bounds
_PROBABILITY = 0.1  # of interchanging each kept unit, where original and reduced model are compared


@checked
def verify(
    model: Model,
    causal_model: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    *,
    reduced: Any | None = None,
    draws: int = 5,
    goal: float | None = None,
    level: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
) -> Evidence:
    """Interchange intervention accuracy of every aligned variable, alone and jointly, on the original and on a reduced
    model, beside its controls.

    Each row of a variable says which share of its pairs tell the variable from the answer (``tells_apart``): units that
    carry the source's answer are right on all others. A verdict needs :data:`verdicts.TOLD_APART` of them.

    Args:
        reduced: a folded model, or a :class:`Reduction` of ``model`` (run ablated). An aligned unit that it no longer
            has is not interchanged, and is counted. One of counterfactual values needs pairs whose base and source have
            counterfactuals.
        draws: random sets of units for the random controls.
        goal: stop taking pairs as soon as it is certain, for each model and variable, whether the accuracy of the
            aligned units is at least this (all pairs are taken where it stays uncertain). The pairs must be in random
            order.
        level: of the confidence sequences.

    Jointly: all variables that no other aligned variable is an ancestor of, from one source and (unless units have a
    position for each pair) from a source each: of as many pairs as there are variables one draw is made.

    Controls, each under the same rule: ``do nothing`` (the base's own answer), ``random units`` (as many units of the
    same sites at the same positions, of those that the model has and no variable is aligned with there; fewer where
    there are fewer, no line where there are none), ``norm-matched random subspace`` (for directions at one position:
    TransformerLens's placebo), ``arbitrary labels`` (the aligned units held against made-up answers), ``whole residual
    stream`` (the best of its layers', or of twelve evenly spaced ones of a deeper model, at the alignment's positions;
    for models with blocks; it takes whatever else is there along, so that it is no ceiling for one variable of
    several), and the alignment on a model with ``random weights``.
    With the variable ``(none)`` the answer should stay: ``unaligned units, at random`` (as many as the alignment has,
    at all positions) and ``all unaligned units`` (what feeds an aligned unit is among them: only a model whose every
    step is aligned passes). ``random kept units`` holds the reduced model against the original's own answers, with risk
    in nats and the margin bound, when every unit that both have is interchanged with probability 0.1. Units at all
    positions are taken where both inputs have one, counted from the end.

    Forward passes over the pairs, for the original and the reduced model each: two; for each variable two, one for each
    draw and each of these layers, and for directions at one position one more and one for each draw; jointly two, and
    with a source each, over one pair for as many as there are variables, one and one for each variable; for unaligned
    units two and one for each draw; two to compare the models. For random weights: two, two for each variable, and
    jointly as before. With ``goal``, for the original and the reduced model, three and one for each variable come
    first.

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks, units that the model lacks, an
            output without a token, a negative number of ``draws``, a ``goal`` outside (0, 1].

    Example:
        >>> evidence = tls.verify(model, task.causal_model, task.alignment, pairs, reduced=reduction, draws=1)
        >>> evidence.to_frame()["model"].unique().tolist()
        ['original', 'reduced', 'random weights']
    """
    check_model(model)
    check_count("draws", draws, least=0, most=MOST)
    for variable in alignment.variables:
        if variable not in causal_model.variables:
            raise ValueError(f"alignment names {variable!r}; the causal model has {', '.join(causal_model.variables)}")
    if goal is not None and not 0 < goal <= 1:
        raise ValueError(f"goal is {goal}; an accuracy lies in (0, 1]")
    tested = _tested(model, reduced)
    unaligned = outside(model, alignment)
    checks = [
        _Check(subject, causal_model, alignment, unaligned, draws, level, seed, batch_size)
        for subject in (*tested, TestedModel("random weights", random_weights(model, seed), untrained=True))
    ]
    if goal is not None:
        pairs = _enough(checks[: len(tested)], pairs, goal)
        checks = [check.on(torch.arange(len(pairs))) for check in checks]
    rows = [row for check in checks for row in _rows(check, pairs)]
    if reduced is not None:
        rows.append(_agreement(checks[0], checks[1], everything(model, alignment), pairs))
    return Evidence(tuple(rows), level)


def _tested(model: Model, reduced: Any | None) -> list[TestedModel]:
    if reduced is None:
        return [TestedModel("original", model)]
    if isinstance(reduced, Reduction):
        check_fingerprint(model, reduced)
        return [TestedModel("original", model), TestedModel("reduced", model, removal=reduced)]
    origin = getattr(reduced, "units", None)
    if not isinstance(origin, Mapping):
        raise ValueError("reduced has no units: give a model made by fold(), or a Reduction")
    check_model(reduced)
    check_origin(model, getattr(reduced, "origin", None), "reduced")
    names = {old: new for new, old in cast(Mapping[str, str], origin).items()}
    return [TestedModel("original", model), TestedModel("reduced", reduced, own_names=names)]


@dataclass(frozen=True)
class _Check:
    """What one model is held against, and how."""

    subject: TestedModel
    causal_model: CausalModel
    alignment: Alignment
    outside: Sequence[Unit]
    draws: int
    level: float
    seed: int
    batch_size: int | None

    def answers(self, base: Examples, swaps: Sequence[Sequence[Swap]] = ((),)) -> list[Int[Tensor, "n"]]:
        return answers(self.subject, base, swaps, batch_size=self.batch_size)

    def on(self, index: Int[Tensor, "some"]) -> _Check:
        """The same for the pairs ``index``, where units have a position for each pair."""
        here = {v: [replace(u, site=u.site.for_examples(index)) for u in us] for v, us in self.alignment.units.items()}
        return replace(self, subject=self.subject.on(index), alignment=Alignment(here))

    @property
    def together(self) -> tuple[str, ...]:
        """The aligned variables that no other aligned variable is an ancestor of, where there are several."""
        aligned = self.alignment.variables
        first = tuple(v for v in aligned if not ancestors(self.causal_model, v) & set(aligned))
        return first if len(first) > 1 else ()


@dataclass(frozen=True)
class _Plain:
    """The answers of one model without interventions."""

    base: Int[Tensor, "n"]
    right: Bool[Tensor, "n"]
    source_right: Bool[Tensor, "n"]


@dataclass(frozen=True)
class _Apart:
    """Which pairs tell some variables from the answer of each of their sources, and whether none ever can."""

    told: Sequence[Bool[Tensor, "n"]] = ()
    is_answer: bool = False

    def share(self, counts: Bool[Tensor, "n"]) -> float:
        """Of the pairs that count, for the source whose answer is told apart least."""
        shares = [float(told[counts].double().mean()) for told in self.told]
        return min(shares, default=float("nan"))


_NOTHING_CARRIED = _Apart()


def _rows(check: _Check, pairs: Pairs) -> Iterator[Row]:
    """All lines of one model."""
    [base], [source] = check.answers(pairs.base), check.answers(pairs.source)
    plain = _Plain(base, base == right_answers(pairs.base), source == right_answers(pairs.source))
    for variable in check.alignment.variables:
        yield from _of_variable(check, pairs, plain, variable)
    if check.together:
        yield from _jointly(check, pairs, plain)
    if not check.subject.untrained:
        yield from _unaligned(check, pairs, plain)


def _row(
    check: _Check,
    names: tuple[str, str, Role],
    plain: _Plain,
    pairs: Pairs,
    given: Sequence[Int[Tensor, "n"]],
    expected: Int[Tensor, "n"],
    units: float,
    *,
    removed: int = 0,
    right: Bool[Tensor, "n"] | None = None,
    sources_apart: bool = False,
    apart: _Apart = _NOTHING_CARRIED,
) -> Row:
    """The line of some interventions (one, or the draws of a random one) by the answers ``given`` to them."""
    right = plain.right & plain.source_right if right is None else right
    counts = torch.ones_like(right) if check.subject.untrained else right
    # the draws of a random control share their pairs: a pair is one draw of their mean, not several
    right_share = torch.stack([answer == expected for answer in given]).double().mean(0)
    hits, changed = right_share[counts], counts & (expected != right_answers(pairs.base))
    lower, upper = confidence_sequence(hits, level=check.level)
    some = len(hits) > 0
    return Row(
        *(check.subject.name, *names[:2]),
        accuracy=float(hits.mean()),
        stderr=float(hits.std(correction=0)) / math.sqrt(len(hits)) if some else float("nan"),
        lower=float(lower[-1]) if some else 0.0,
        upper=float(upper[-1]) if some else 1.0,
        accuracy_changed=float(right_share[changed].mean()),
        risk=float("nan"),
        margin_bound=float("nan"),
        pairs=len(hits) * len(given),
        retained=float(right.double().mean()),
        units=units,
        removed=removed,
        role=names[2],
        untrained=check.subject.untrained,
        sources_apart=sources_apart,
        tells_apart=apart.share(counts),
        is_answer=apart.is_answer,
        changes=float((expected != right_answers(pairs.base))[counts].double().mean()),
    )


def _of_variable(check: _Check, pairs: Pairs, plain: _Plain, variable: str) -> Iterator[Row]:
    """The alignment of one variable, and its controls."""
    subject, expected = check.subject, pairs.expected(check.causal_model, (variable,))
    apart = _apart(check.causal_model, pairs, (variable,))
    chosen = list(check.alignment.units[variable])
    own = subject.own(chosen)
    trained = not subject.untrained
    kept = [unit for unit in chosen if subject.has(unit)]
    shape, spans = (len(pairs), pairs.base.labels.shape[1]), pairs.base.spans
    free = others(subject, check.alignment, kept, shape, spans) if trained else {}
    draws = check.draws if free else 0
    random = [subject.own(random_units(kept, free, check.seed, draw)) for draw in range(draws)]
    everywhere = any(unit.site.positions is None for unit in chosen)
    places = [None] if everywhere else [unit.site.positions for unit in chosen]
    whole = [
        list(dict.fromkeys(Unit(site, 0).at(where) for where in places)) for site in streams(subject.model) if trained
    ]
    given = check.answers(pairs.base, [[(units, pairs.source)] for units in (own, *random, *whole)])

    def row(name: str, some: Sequence[Int[Tensor, "n"]], units: float, role: Role = Role.CONTROL) -> Row:
        removed = len(chosen) - len(own) if role is Role.ALIGNED else 0
        names = (name, variable, role)
        return _row(check, names, plain, pairs, some, expected, units, removed=removed, apart=apart)

    yield row(ALIGNED_UNITS, given[:1], float(len(own)), Role.ALIGNED)
    yield row("do nothing", [plain.base], 0.0)
    if not trained:
        return
    if random:
        yield row(RANDOM_UNITS, given[1 : 1 + len(random)], sum(map(len, random)) / len(random))
    moved = placebo(subject, pairs, own, draws=check.draws, seed=check.seed, batch_size=check.batch_size)
    if moved:
        yield row("norm-matched random subspace", moved, float(len(own)))
    arbitrary = made_up(pairs, check.seed)
    names = ("arbitrary labels", variable, Role.CONTROL)
    yield _row(check, names, plain, pairs, given[:1], arbitrary, float(len(own)), apart=apart)
    ceilings = [
        row("whole residual stream", [answer], float(len(units)), Role.CEILING)
        for units, answer in zip(whole, given[1 + len(random) :], strict=True)
    ]
    if ceilings:
        yield max(ceilings, key=lambda found: -1.0 if math.isnan(found.accuracy) else found.accuracy)


def _jointly(check: _Check, pairs: Pairs, plain: _Plain) -> Iterator[Row]:
    """All first variables at once, from one source and (at places that do not depend on the pair) from a source each,
    which no two draws share."""
    variables = check.together
    names = " & ".join(variables)
    chosen = [unit for variable in variables for unit in check.alignment.units[variable]]
    own = {variable: check.subject.own(check.alignment.units[variable]) for variable in variables}
    given = check.answers(pairs.base, [[(own[variable], pairs.source) for variable in variables]])
    units = sum(map(len, own.values()))
    settings: dict[str, Any] = {"units": float(units), "removed": len(chosen) - units}
    expected = pairs.expected(check.causal_model, variables)
    apart = _apart(check.causal_model, pairs, variables)
    yield _row(check, (ALIGNED_UNITS, names, Role.ALIGNED), plain, pairs, given[:1], expected, **settings, apart=apart)
    first = torch.arange(0, len(pairs) - len(variables) + 1, len(variables))
    if any(isinstance(unit.site.positions, Tensor) for unit in chosen) or not len(first):
        return
    # one base and its sources from as many pairs of their own: no pair is in two draws, so that draws are independent
    some, check = pairs[first], check.on(first)
    givers = {variable: pairs[first + number] for number, variable in enumerate(variables)}
    each = [(own[variable], givers[variable].source) for variable in variables]
    given = check.answers(some.base, [each])
    inputs = {variable: other.source_inputs for variable, other in givers.items()}
    expected = some.expected(check.causal_model, variables, inputs)
    told = [expected != right_answers(other.source) for other in givers.values()]
    settings |= {"apart": _Apart(told, any(check.causal_model.fixes_output((v,)) for v in variables))}
    right = plain.right[first] & torch.stack([plain.source_right[first + n] for n in range(len(variables))]).all(0)
    name = (f"{ALIGNED_UNITS}, a source each", names, Role.ALIGNED)
    yield _row(check, name, plain, some, given, expected, **settings, right=right, sources_apart=True)


def _apart(causal_model: CausalModel, pairs: Pairs, variables: Sequence[str]) -> _Apart:
    return _Apart([pairs.tells_apart(causal_model, variables)], causal_model.fixes_output(variables))


def _unaligned(check: _Check, pairs: Pairs, plain: _Plain) -> Iterator[Row]:
    """Units that carry no variable: interchanging them should change no answer."""
    pool = check.subject.own(check.outside)
    if not pool:
        return
    count = min(len(pool), len({bare(u) for units in check.alignment.units.values() for u in units}))
    draws = [
        [pool[int(i)] for i in _random.permutation(len(pool), check.seed, 59, draw)[:count]]
        for draw in range(check.draws)
    ]
    given = check.answers(pairs.base, [[(units, pairs.source)] for units in (pool, *draws)])
    if draws:
        name = ("unaligned units, at random", NOTHING, Role.CHECK)
        yield _row(check, name, plain, pairs, given[1:], plain.base, float(count))
    name = ("all unaligned units", NOTHING, Role.UNALIGNED)
    yield _row(check, name, plain, pairs, given[:1], plain.base, float(len(pool)))


def _agreement(original: _Check, reduced: _Check, every: Sequence[Unit], pairs: Pairs) -> Row:
    """Original and reduced model against each other while random units that both have are interchanged."""
    kept = [unit for unit in every if reduced.subject.has(unit)]
    one, two = (
        randomly_interchanged(check.subject, kept, pairs.base, pairs.source, _PROBABILITY, check.seed, check.batch_size)
        for check in (original, reduced)
    )
    same, everywhere = tokens(one, pairs.base), torch.ones(len(pairs), dtype=torch.bool)
    names = (f"random kept units, p = {_PROBABILITY:g}", NOTHING, Role.CHECK)
    plain = _Plain(same, everywhere, everywhere)
    row = _row(reduced, names, plain, pairs, [tokens(two, pairs.base)], same, _PROBABILITY * len(kept))
    best = torch.nn.functional.pad(one, (0, 1), value=-math.inf).topk(2, 1).values  # of a single choice, too
    distance = float((one - two).double().square().sum(1).mean())
    return replace(row, risk=float(kl(one, two).mean()), margin_bound=margin_bound(best[:, 0] - best[:, 1], distance))


def _enough(checks: Sequence[_Check], pairs: Pairs, goal: float) -> Pairs:
    """As many pairs as it takes to be certain, for each model and variable, whether the accuracy is at least
    ``goal``."""
    hits = {(check.subject.name, v): torch.zeros(0) for check in checks for v in check.alignment.variables}
    for start in range(0, len(pairs), _CHUNK):
        some = pairs[start : start + _CHUNK]
        for check in [check.on(torch.arange(start, start + len(some))) for check in checks]:
            [base], [source] = check.answers(some.base), check.answers(some.source)
            right = (base == right_answers(some.base)) & (source == right_answers(some.source))
            units = check.alignment.units.items()
            swaps = [[(check.subject.own(chosen), some.source)] for _, chosen in units]
            for (variable, _), given in zip(units, check.answers(some.base, swaps), strict=True):
                new = (given == some.expected(check.causal_model, (variable,)))[right].float()
                hits[check.subject.name, variable] = torch.cat([hits[check.subject.name, variable], new])
        if all(decided(found, goal, level=checks[0].level)[0] for found in hits.values()):
            return pairs[: start + _CHUNK]
    return pairs
