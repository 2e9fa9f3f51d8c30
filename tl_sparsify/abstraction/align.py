"""Alignment search: which units, at which position, carry each variable of a causal model?

Gradients rank: for a pair of base and source the first-order effect of taking unit ``u`` at position ``t`` from the
source, on the log-odds of the answer that the causal model expects, is ``g[u, t] . (v_source - v_base)``, with the
gradient ``g`` taken at several points between the two runs. Summed over pairs it is high for units that carry the
variable and low for those that carry another one, whose interchange is wrong where the answer should stay. What ranks
high is then tried by exact interchange, and joined and pruned by its accuracy on pairs that the ranking has not seen:
a variable may sit at several positions at once, and sets that are right on different pairs are tried together.

Units that carry the source's answer, and not the variable, are right on every pair that does not tell the two apart.
Where fewer than half of the pairs do, these count for one half of a set's accuracy in the search.

A search looks at many candidates, so its own accuracy is optimistic: the one to report is ``held_out``, next to the
controls of :func:`tl_sparsify.verify`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.ranks import agreed, summed
from tl_sparsify.abstraction.candidates import candidates, every_place, grouped, prefixes, unions
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.das import EPOCHS, LEVELS, das_directions
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, answers, families, interchange_gradients, right_answers
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Unit, Units

_STAGES = 6  # looks at what was tried so far


@dataclass(frozen=True)
class AlignmentResult:
    """What a search found.

    Attributes:
        alignment: the units of each variable.
        held_out: interchange accuracy of each variable on the held-out pairs.
        held_out_changed: the same where the answer should change.
        searched: its accuracy in the search (optimistic), in which pairs that tell the variable from the answer count
            for at least one half.
        tells_apart: the share of the held-out pairs that do (:meth:`Pairs.tells_apart`): where it is small, units that
            carry the answer are found as well, and :func:`tl_sparsify.verify` cannot tell.
        forward, backward: passes over half of the pairs that the search took (one over all of them counts as two;
            those over held-out pairs are not counted).
        exhaustive: the forward passes that trying every unit at every position alone would take: over half of the
            pairs, for all variables together.

    Example:
        >>> found = tls.align(
        ...     model, task.causal_model, pairs, pairs, units=units.at(4), variables=["left"], trials=2
        ... )
        >>> found.to_frame()["variable"].tolist()
        ['left']
    """

    alignment: Alignment
    held_out: Mapping[str, float]
    held_out_changed: Mapping[str, float]
    searched: Mapping[str, float]
    tells_apart: Mapping[str, float]
    forward: int
    backward: int
    exhaustive: int

    def to_frame(self) -> pd.DataFrame:
        """One row a variable: ``variable, units, names`` (the first six), ``held_out, held_out_changed, searched,
        tells_apart``."""
        return pd.DataFrame(
            [
                {
                    "variable": variable,
                    "units": len(units),
                    "names": " ".join(unit.name for unit in units[:6]) + (" ..." if len(units) > 6 else ""),
                    "held_out": self.held_out[variable],
                    "held_out_changed": self.held_out_changed[variable],
                    "searched": self.searched[variable],
                    "tells_apart": self.tells_apart[variable],
                }
                for variable, units in self.alignment.units.items()
            ]
        )

    def __repr__(self) -> str:
        found = ", ".join(f"{v}: {len(u)} units {self.held_out[v]:.3f}" for v, u in self.alignment.units.items())
        return f"AlignmentResult({found}; {self.forward} + {self.backward} passes, every unit alone {self.exhaustive})"


@checked
def align(
    model: Model,
    causal_model: CausalModel,
    pairs: Pairs,
    held_out: Pairs,
    *,
    units: Units | None = None,
    variables: Sequence[str] | None = None,
    reduction: Reduction | None = None,
    trials: int | None = None,
    tolerance: float = 0.005,
    subspace: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> AlignmentResult:
    """Find the units that carry each variable of ``causal_model``, in the whole model or inside a circuit.

    What carries a variable may be a few units at one position, or at several at once: up to five sets are joined.

    Args:
        pairs: half of them rank by gradients, the other half try by interchange.
        held_out: other pairs, on which the result is judged.
        units: where to look, at each of their positions apart; all heads' outputs and neurons where not given. A
            variable that says where attention looks sits in queries or keys, and is found only there: give their sites,
            as ``Units((Site("head", 0, "blocks.0.attn.hook_k", 4),))``. One that needs both at once is not found.
        variables: all but the output where not given.
        reduction: look only among its kept units, in the model with the others ablated.
        trials: exact interchanges for each variable; where not given as many as a fifth of what trying every unit takes
            allows, and at most 32.
        tolerance: a smaller set is preferred when its accuracy is lower by at most this.
        subspace: also learn a direction set of this rank (TransformerLens's ``fit_das``) in the residual stream, at the
            place where gradients say that the variable passes, and take it for a variable that it carries better.

    Forward passes over half of the pairs: four for the model's own answers, five for the gradients, at most ``trials``
    for each variable and two for its sources, and six for sources more; four backward passes for each variable. With
    ``subspace`` for each variable 28 forward and 24 backward passes more.

    Raises:
        ValueError: a model in training mode, no variables, one that the causal model lacks or whose interchange changes
            no answer, a reduction of another model or without any of the units, pairs of which the model answers fewer
            than four right, units (or a reduction) at a span or with a position for each example, fewer than two
            trials, a negative ``tolerance``, a ``subspace`` that the stream does not hold, or in a reduction of
            counterfactual values.

    Example:
        >>> found = tls.align(
        ...     model, task.causal_model, pairs, task.pairs(64, seed=1), units=units.at(4), variables=["left"]
        ... )
        >>> found.alignment
        Alignment(left: 1 units)
    """
    check_model(model)
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must not be negative")
    if subspace is not None:
        check_count("subspace", subspace)
        if reduction is not None and reduction.values.paired:
            raise ValueError(
                "subspace is given, and the reduction's removed units take their values on counterfactual inputs, on "
                "which nothing is learnt: leave subspace out, or give a reduction with constants"
            )
    wanted = tuple(v for v in causal_model.variables if v != causal_model.output) if variables is None else variables
    everywhere = families(model) if units is None else units
    _check(causal_model, wanted, everywhere, reduction, trials)
    if reduction is not None:
        check_fingerprint(model, reduction)
    subject = TestedModel("searched", model, removal=reduction)
    usable = _usable(subject, pairs, batch_size)
    ranking, trying = usable[: len(usable) // 2], usable[len(usable) // 2 :]
    for variable, part in itertools.product(wanted, (ranking, trying)):
        if bool((part.expected(causal_model, (variable,)) == right_answers(part.base)).all()):
            raise ValueError(f"interchanging {variable!r} changes the answer of no pair: give pairs in which it does")
    maps = effects(subject, causal_model, ranking, everywhere, wanted, batch_size)
    exhaustive = every_place(subject, everywhere, maps[wanted[0]])
    forward, backward = 5 + len(LEVELS), len(LEVELS) * len(wanted)
    share = max(6, min(32, (exhaustive // 5 - forward - _STAGES) // len(wanted) - 2)) if trials is None else trials
    searches = {v: _Search(subject, causal_model, trying, v, tolerance, batch_size) for v in wanted}
    held = _held(pairs, held_out)
    groups = {v: grouped(everywhere, maps[v], subject, held) for v in wanted}
    tried, spent = _tried(searches, {v: candidates(groups[v]) for v in wanted}, share * len(wanted) * 2 // 3)
    forward += spent
    chosen: dict[str, list[Unit]] = {}
    searched: dict[str, float] = {}
    for variable, search in searches.items():
        chosen[variable], searched[variable], spent = search.run(tried[variable], share // 3)
        forward += spent
        if subspace is not None:
            wishes = ranking.expected(causal_model, (variable,))
            learnt = das_directions(subject, ranking, wishes, subspace, held, seed=seed, batch_size=batch_size)
            score = search.score(search.hits([learnt])[0])
            forward, backward = forward + len(LEVELS) + EPOCHS + 4, backward + len(LEVELS) + EPOCHS
            if score > searched[variable] + tolerance:
                chosen[variable], searched[variable] = learnt, score
    judged = _usable(subject, held_out, batch_size)
    found = {v: _Search(subject, causal_model, judged, v, tolerance, batch_size).judge(chosen[v]) for v in wanted}
    return AlignmentResult(
        Alignment(chosen),
        {v: accuracy for v, (accuracy, _) in found.items()},
        {v: changed for v, (_, changed) in found.items()},
        searched,
        {v: float(judged.tells_apart(causal_model, (v,)).double().mean()) for v in wanted},
        forward,
        backward,
        exhaustive,
    )


def _check(
    causal_model: CausalModel, wanted: Sequence[str], units: Units, reduction: Reduction | None, trials: int | None
) -> None:
    for variable in wanted:
        if variable not in causal_model.variables:
            raise ValueError(f"variables names {variable!r}; there are {', '.join(causal_model.variables)}")
    if not wanted:
        raise ValueError("variables is empty: name at least one, other than the output")
    if trials is not None and trials < 2:
        raise ValueError(f"trials is {trials}; a search takes at least two")
    for site in (*units.sites, *(() if reduction is None else reduction.units.sites)):
        if isinstance(site.positions, Tensor | str):
            raise ValueError(
                f"units of {site.hook} have a position for each example or are at a span; name positions that all share"
            )


def _held(*several: Pairs) -> Bool[Tensor, "#pos"]:
    """The positions that are input in every pair: elsewhere a unit has no value that means anything."""
    sides = [side.attention_mask for pairs in several for side in (pairs.base, pairs.source)]
    masks = [mask.cpu() for mask in sides if mask is not None]
    if len({mask.shape[1:] for mask in masks}) > 1:
        raise ValueError("pairs and held_out are of different widths: pad both to one")
    return torch.cat(masks).all(0) if masks else torch.ones(1, dtype=torch.bool)


def _usable(subject: TestedModel, pairs: Pairs, batch_size: int | None) -> Pairs:
    """The pairs that the model answers right on both inputs."""
    [base], [source] = (answers(subject, side, batch_size=batch_size) for side in (pairs.base, pairs.source))
    right = ((base == right_answers(pairs.base)) & (source == right_answers(pairs.source))).nonzero().flatten()
    if len(right) < 4:
        raise ValueError(f"the model answers {len(right)} of {len(pairs)} pairs right on both inputs: nothing to align")
    return pairs[right]


def effects(
    subject: TestedModel,
    causal_model: CausalModel,
    pairs: Pairs,
    units: Units,
    variables: Sequence[str],
    batch_size: int | None,
) -> dict[str, list[Float[Tensor, "pos _"]]]:
    """For each variable, per site, the mean first-order effect of interchanging each unit at each position on the
    log-odds of the expected answer."""
    totals: dict[str, list[Tensor]] = {}
    expected = {v: pairs.expected(causal_model, (v,)) for v in variables}
    with agreed(f"the gradients of {len(pairs)} pairs"):
        for variable, found in interchange_gradients(
            subject, pairs.base, pairs.source, expected, units, LEVELS, batch_size=batch_size
        ):
            parts = [
                _by_position(site, g.to(step), step).double().cpu() / len(pairs)
                for site, (g, step) in zip(units.sites, found, strict=True)
            ]
            old = totals.get(variable)
            totals[variable] = parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
    return {variable: list(summed([parts], len(pairs))) for variable, parts in totals.items()}


def _by_position(
    site: Site, gradient: Float[Tensor, "batch pos _ width"], step: Float[Tensor, "batch pos rows width"]
) -> Float[Tensor, "pos units"]:
    """What a step of each unit's value comes to along its gradient, summed over examples and entries."""
    batch, positions = step.shape[:2]
    along = site.along(gradient.flatten(0, 1)[:, None], step.flatten(0, 1)[:, None])
    return along.view(batch, positions, -1).sum(0)


@dataclass(frozen=True)
class _Search:
    """One variable's exact interchanges."""

    subject: TestedModel
    causal_model: CausalModel
    pairs: Pairs
    variable: str
    tolerance: float
    batch_size: int | None

    def hits(self, sets: Sequence[Sequence[Unit]]) -> list[Bool[Tensor, "n"]]:
        """Whether each pair is right under the interchange of each set; one pass for each, one for the sources."""
        expected = self.pairs.expected(self.causal_model, (self.variable,))
        swaps = [[(units, self.pairs.source)] for units in sets]
        given = answers(self.subject, self.pairs.base, swaps, batch_size=self.batch_size)
        return [answer == expected for answer in given]

    def judged(
        self, searches: Mapping[str, _Search], sets: Sequence[Sequence[Unit]]
    ) -> dict[str, list[Bool[Tensor, "n"]]]:
        """Whether each pair is right, for every variable; one pass for each set, one for the sources."""
        swaps = [[(units, self.pairs.source)] for units in sets]
        given = answers(self.subject, self.pairs.base, swaps, batch_size=self.batch_size)
        expected = {v: self.pairs.expected(self.causal_model, (v,)) for v in searches}
        return {v: [answer == right for answer in given] for v, right in expected.items()}

    @cached_property
    def told(self) -> Bool[Tensor, "n"]:
        """Which pairs tell the variable from the answer."""
        return self.pairs.tells_apart(self.causal_model, (self.variable,))

    def score(self, hit: Bool[Tensor, "n"]) -> float:
        """The accuracy, of which the pairs that tell the variable from the answer are at least one half."""
        told = self.told
        if 0 < int(told.sum()) < len(told) / 2:
            return float(hit[told].double().mean() + hit[~told].double().mean()) / 2
        return float(hit.double().mean())

    @cached_property
    def weights(self) -> Float[Tensor, "n"]:
        """What each pair counts for in :meth:`score`."""
        told, some = self.told, int(self.told.sum())
        if 0 < some < len(told) / 2:
            return torch.where(told, 0.5 / some, 0.5 / (len(told) - some)).double()
        return torch.full((len(told),), 1 / len(told), dtype=torch.float64)

    def judge(self, units: Sequence[Unit]) -> tuple[float, float]:
        """Accuracy over all pairs and over those whose answer should change."""
        [hit] = self.hits([units])
        changed = self.pairs.expected(self.causal_model, (self.variable,)) != right_answers(self.pairs.base)
        return float(hit.double().mean()), float(hit[changed].double().mean())

    def run(self, tried: Tried, trials: int) -> tuple[list[Unit], float, int]:
        """The best set, its accuracy, and the passes made: unions of those tried, twice, then parts of the best."""
        left, spent = trials, 0
        for share in (3, 2):
            wanting = self.score(tried[self.best(tried)]) < 1 - self.tolerance
            # what is right on no pair that tells it from the answer carries the answer, with anything else as without
            parts = {
                units: hit for units, hit in tried.items() if not bool(self.told.any()) or bool(hit[self.told].any())
            }
            joined = unions(parts, self.weights, left // share) if wanting and parts else []
            tried, spent, left = self.more(tried, joined), spent + len(joined) + bool(joined), left - len(joined)
        smaller = prefixes(self.best(tried), left)  # sizes between the best prefix and the next smaller one
        tried, spent = self.more(tried, smaller), spent + len(smaller) + bool(smaller)
        best = self.best(tried)
        return list(best), self.score(tried[best]), spent

    def more(self, tried: Tried, sets: Sequence[Sequence[Unit]]) -> Tried:
        """With what these sets get right."""
        return tried | (dict(zip(map(tuple, sets), self.hits(sets), strict=True)) if sets else {})

    def best(self, tried: Tried) -> tuple[Unit, ...]:
        """The smallest set whose accuracy is within the tolerance of the highest."""
        scores = {units: self.score(hit) for units, hit in tried.items()}
        top = max(scores.values()) - self.tolerance
        return min((units for units in tried if scores[units] >= top), key=lambda s: (len(s), -scores[s]))


Tried = dict[tuple[Unit, ...], Bool[Tensor, "n"]]
"""Sets of units, and the pairs that are right under their interchange for one variable."""


def _tried(
    searches: Mapping[str, _Search], candidates: Mapping[str, list[list[Unit]]], budget: int
) -> tuple[dict[str, Tried], int]:
    """What the most promising sets get right, for each variable, and the passes made.

    One interchange serves all variables, so what is tried for one is judged for each; a variable that a set carries
    wholly asks for no more, which leaves the others more of the budget.
    """
    tried: dict[str, Tried] = {variable: {} for variable in searches}
    queues = {variable: iter(candidates[variable]) for variable in searches}
    left, passes, search = budget, 0, next(iter(searches.values()))
    for stage in range(_STAGES):
        tops = {v: max(map(searches[v].score, tried[v].values()), default=0.0) for v in searches}
        wanting = [v for v in searches if tops[v] < 1 - search.tolerance]
        each = max(1, left // ((_STAGES - stage) * max(1, len(wanting))))
        known = next(iter(tried.values()))
        new = [tuple(units) for v in wanting for units in itertools.islice(queues[v], each)]
        pool = [units for units in dict.fromkeys(new) if units not in known][:left]
        if pool:
            for variable, hits in search.judged(searches, pool).items():
                tried[variable] |= dict(zip(pool, hits, strict=True))
            left, passes = left - len(pool), passes + len(pool) + 1
    return tried, passes
