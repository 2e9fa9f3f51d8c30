"""Alignment search: which units, at which position, carry each variable of a causal model?

Gradients rank: for a pair of base and source the first-order effect of taking unit ``u`` at position ``t`` from the
source, on the log-odds of the answer that the causal model expects, is ``g[u, t] . (v_source - v_base)``, with the
gradient ``g`` taken at several points between the two runs. Summed over pairs it is high for units that carry the
variable and low for those that carry another one, whose interchange is wrong where the answer should stay. What ranks
high is then tried by exact interchange, and joined and pruned by its accuracy on pairs that the ranking has not seen.

A search looks at many candidates, so its own accuracy is optimistic: the one to report is ``held_out``, beside the
controls of :func:`tl_sparsify.verify`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import fit_das

from tl_sparsify.causal import CausalModel
from tl_sparsify.circuit import Reduction, check_fingerprint
from tl_sparsify.evidence import Alignment, Pairs
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import (
    ablate,
    answer_logits,
    answer_rows,
    check_model,
    intervened,
)
from tl_sparsify.subjects import Subject, answers, families, interchange_gradients
from tl_sparsify.units import Model, Site, Unit, Units, directions, residuals

# Of the base, in the points where gradients are taken: an answer that is certain, or a ReLU that is dead, at the base
# has no gradient there, but has one somewhere on the way to the source.
_LEVELS = (1.0, 0.75, 0.5, 0.25)
_EPOCHS, _PAIRS = 20, 32  # of learning a subspace: passes, and pairs for each step


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        alignment: the units of each variable.
        held_out: interchange accuracy of each variable on the held-out pairs.
        held_out_changed: the same where the answer should change.
        searched: its accuracy in the search (optimistic).
        forward, backward: passes over half of the pairs that the search took (one over all of them counts as two;
            those over held-out pairs are not counted).
        exhaustive: the forward passes that trying every unit at every position alone would take: over half of the
            pairs, for all variables together.
    """

    alignment: Alignment
    held_out: Mapping[str, float]
    held_out_changed: Mapping[str, float]
    searched: Mapping[str, float]
    forward: int
    backward: int
    exhaustive: int

    def to_frame(self) -> pd.DataFrame:
        """One row a variable: ``variable, units, names`` (the first six), ``held_out, held_out_changed, searched``."""
        return pd.DataFrame(
            [
                {
                    "variable": variable,
                    "units": len(units),
                    "names": " ".join(unit.name for unit in units[:6]) + (" ..." if len(units) > 6 else ""),
                    "held_out": self.held_out[variable],
                    "held_out_changed": self.held_out_changed[variable],
                    "searched": self.searched[variable],
                }
                for variable, units in self.alignment.units.items()
            ]
        )

    def __repr__(self) -> str:
        found = ", ".join(f"{v}: {len(u)} units {self.held_out[v]:.3f}" for v, u in self.alignment.units.items())
        return f"Found({found}; {self.forward} + {self.backward} passes, every unit alone {self.exhaustive})"


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
) -> Found:
    """Find the units that carry each variable of ``causal_model``, in the whole model or inside a circuit.

    Args:
        pairs: half of them rank by gradients, the other half try by interchange.
        held_out: other pairs, on which the result is judged.
        units: where to look, at each of their positions apart; all heads and neurons where not given.
        variables: all but the output where not given.
        reduction: look only among its kept units, in the model with the others ablated.
        trials: exact interchanges for each variable; where not given about a sixth of what trying every unit takes, and
            at most 32.
        tolerance: a smaller set is preferred when its accuracy is lower by at most this.
        subspace: also learn a direction set of this rank (TransformerLens's ``fit_das``) in the residual stream, at the
            place where gradients say that the variable passes, and take it for a variable that it carries better.

    Forward passes over half of the pairs: four for the model's own answers, five for the gradients, and for each
    variable at most ``trials`` and three for sources; four backward passes for each variable. With ``subspace`` for
    each variable 28 forward and 24 backward passes more.

    Raises:
        ValueError: a model in training mode, no variables, one that the causal model lacks or whose interchange changes
            no answer, a reduction of another model or without any of the units, pairs of which the model answers fewer
            than four right, units (or a reduction) with a position for each example, fewer than two trials.
    """
    check_model(model)
    wanted = tuple(v for v in causal_model.variables if v != causal_model.output) if variables is None else variables
    everywhere = families(model) if units is None else units
    _check(causal_model, wanted, everywhere, reduction, trials)
    if reduction is not None:
        check_fingerprint(model, reduction)
    subject = Subject("searched", model, removal=reduction)
    usable = _usable(subject, pairs, batch_size)
    ranking, trying = usable[: len(usable) // 2], usable[len(usable) // 2 :]
    for variable, part in itertools.product(wanted, (ranking, trying)):
        if bool((part.expected(causal_model, (variable,)) == _labels(part.base)).all()):
            raise ValueError(f"interchanging {variable!r} changes the answer of no pair: give pairs in which it does")
    maps = _effects(subject, causal_model, ranking, everywhere, wanted, batch_size)
    exhaustive = _exhaustive(subject, everywhere, maps[wanted[0]])
    share = max(6, min(32, (exhaustive // 6 - 9) // len(wanted) - 3)) if trials is None else trials
    chosen: dict[str, list[Unit]] = {}
    searched: dict[str, float] = {}
    forward, backward = 5 + len(_LEVELS), len(_LEVELS) * len(wanted)
    for variable in wanted:
        search = _Search(subject, causal_model, trying, variable, tolerance, batch_size)
        chosen[variable], searched[variable], spent = search.run(_groups(everywhere, maps[variable], subject), share)
        forward += spent
        if subspace is not None:
            learnt, score = _learnt(search, ranking, subspace, seed)
            forward, backward = forward + len(_LEVELS) + _EPOCHS + 4, backward + len(_LEVELS) + _EPOCHS
            if score > searched[variable] + tolerance:
                chosen[variable], searched[variable] = learnt, score
    judged = _usable(subject, held_out, batch_size)
    found = {v: _Search(subject, causal_model, judged, v, tolerance, batch_size).judge(chosen[v]) for v in wanted}
    return Found(
        Alignment(chosen),
        {v: accuracy for v, (accuracy, _) in found.items()},
        {v: changed for v, (_, changed) in found.items()},
        searched,
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
        if isinstance(site.positions, Tensor):
            raise ValueError(f"units of {site.hook} have a position for each example; name positions that all share")


def _exhaustive(subject: Subject, units: Units, effects: Sequence[Float[Tensor, "pos _"]]) -> int:
    """One pass for each unit at each of its positions, and one over the sources."""
    had = [(_places(site, len(effect)), site) for site, effect in zip(units.sites, effects, strict=True)]
    return 1 + sum(len(places) * sum(subject.has(Unit(site, i)) for i in range(site.size)) for places, site in had)


def _places(site: Site, length: int) -> list[int]:
    """The positions at which a site's units are meant, of ``length``."""
    mask = site.position_mask(1, length)
    return list(range(length)) if mask is None else mask[0].nonzero().flatten().tolist()


def _usable(subject: Subject, pairs: Pairs, batch_size: int | None) -> Pairs:
    """The pairs that the model answers right on both inputs."""
    [base], [source] = (answers(subject, side, batch_size=batch_size) for side in (pairs.base, pairs.source))
    right = ((base == _labels(pairs.base)) & (source == _labels(pairs.source))).nonzero().flatten()
    if len(right) < 4:
        raise ValueError(f"the model answers {len(right)} of {len(pairs)} pairs right on both inputs: nothing to align")
    return pairs[right]


def _effects(
    subject: Subject,
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
    for variable, found in interchange_gradients(
        subject, pairs.base, pairs.source, expected, units, _LEVELS, batch_size=batch_size
    ):
        parts = [(g.to(step) * step).sum((0, 3)).double().cpu() / len(pairs) for g, step in found]
        old = totals.get(variable)
        totals[variable] = parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
    return totals


Group = list[Unit]
"""Units of one site at one position, the most promising first."""


def _groups(units: Units, effects: Sequence[Float[Tensor, "pos _"]], subject: Subject) -> list[Group]:
    """Sites at positions with their units of positive effect, in the order of what these promise together; the one unit
    of the highest effect where there is none."""
    found: list[tuple[float, Group]] = []
    best: list[tuple[float, Group]] = []
    for site, effect in zip(units.sites, effects, strict=True):
        have = torch.tensor([subject.has(Unit(site, i)) for i in range(site.size)])
        for position in _places(site, len(effect)):
            row = torch.where(have, effect[position], -torch.inf)
            order = row.argsort(descending=True, stable=True)
            where = site.positions if len(effect) == 1 else position
            group = [Unit(site, int(i)).at(where) for i in order[: max(1, int((row > 0).sum()))]]
            promise = float(row[order[: len(group)]].sum())
            (found if promise > 0 else best).append((promise, group))
    best = [pair for pair in best if pair[0] > -torch.inf]
    if not found and not best:
        raise ValueError("the reduction keeps none of the units: nothing to align with")
    return [group for _, group in sorted(found or [max(best, key=lambda pair: pair[0])], key=lambda pair: -pair[0])]


@dataclass(frozen=True)
class _Search:
    """One variable's exact interchanges."""

    subject: Subject
    causal_model: CausalModel
    pairs: Pairs
    variable: str
    tolerance: float
    batch_size: int | None

    def hits(self, sets: Sequence[Group]) -> list[Bool[Tensor, "n"]]:
        """Whether each pair is right under the interchange of each set; one pass for each, one for the sources."""
        expected = self.pairs.expected(self.causal_model, (self.variable,))
        swaps = [[(units, self.pairs.source)] for units in sets]
        given = answers(self.subject, self.pairs.base, swaps, batch_size=self.batch_size)
        return [answer == expected for answer in given]

    def scores(self, sets: Sequence[Group]) -> list[float]:
        return [float(hit.double().mean()) for hit in self.hits(sets)]

    def judge(self, units: Group) -> tuple[float, float]:
        """Accuracy over all pairs and over those whose answer should change."""
        [hit] = self.hits([units])
        changed = self.pairs.expected(self.causal_model, (self.variable,)) != _labels(self.pairs.base)
        return float(hit.double().mean()), float(hit[changed].double().mean())

    def run(self, groups: Sequence[Group], trials: int) -> tuple[Group, float, int]:
        """The best set, its accuracy, and the passes made: try prefixes of promising groups, join the best, prune."""
        prefixes = [group[:size] for group in groups for size in _sizes(len(group))]
        first = prefixes[: trials // 2]
        tried = dict(zip(map(tuple, first), self.scores(first), strict=True))
        best = self.best(tried)
        spent, left = len(first) + 1, trials - len(first)
        # join: the best set with what other groups do best
        others = [group for group in groups if group[0].site != best[0].site]
        joined = [[*best, *group] for group in others[: left // 2]]
        tried |= dict(zip(map(tuple, joined), self.scores(joined), strict=True)) if joined else {}
        best = self.best(tried)
        spent, left = spent + len(joined) + bool(joined), left - len(joined)
        # prune: sizes between the best prefix and the next smaller one, and without the least promising
        smaller = _between(best, left)
        tried |= dict(zip(map(tuple, smaller), self.scores(smaller), strict=True)) if smaller else {}
        best = self.best(tried)
        return list(best), tried[best], spent + len(smaller) + bool(smaller)

    def best(self, tried: Mapping[tuple[Unit, ...], float]) -> tuple[Unit, ...]:
        """The smallest set whose accuracy is within the tolerance of the highest."""
        top = max(tried.values())
        return min((s for s in tried if tried[s] >= top - self.tolerance), key=lambda s: (len(s), -tried[s]))


def _sizes(n: int) -> list[int]:
    """All of them, and a quarter, a sixteenth, ... of them, down to one."""
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // 4))
    return sizes


def _between(best: Sequence[Unit], count: int) -> list[Group]:
    """Prefixes of the best set, evenly spaced, above a quarter of it."""
    low, high = len(best) // 4, len(best)
    sizes = {low + round((high - low) * (i + 1) / (count + 1)) for i in range(count)} - {0, low, high}
    return [list(best[:size]) for size in sorted(sizes)]


def _learnt(search: _Search, ranking: Pairs, rank: int, seed: int) -> tuple[Group, float]:
    """Directions that carry the variable in the residual stream, trained on the ranking pairs at the place where the
    gradients promise most, and their accuracy on the others."""
    subject, base, n = search.subject, ranking.base, len(ranking)
    expected = ranking.expected(search.causal_model, (search.variable,))
    hook, position = _promising(search, ranking, expected, rank)
    known = torch.tensor(sorted(set(ranking.answers.values()))) if base.choices is None else base.choices.cpu()
    targets = (expected[:, None] == known).int().argmax(1)

    def task_logits(numbers: Tensor) -> Tensor:  # of bases, or of sources from n on: their answers and masks go along
        side = base if int(numbers[0]) < n else ranking.source
        return answer_logits(subject.model, replace(side[numbers % n], choices=known))

    places = torch.full((n,), position)
    removed: tuple[Any, ...] = () if subject.removal is None else (ablate(subject.removal),)
    with intervened(subject.model, *removed):
        result = fit_das(
            subject.model,
            hook,
            torch.arange(n),
            torch.arange(n, 2 * n),
            targets,
            task_logits,
            rank=rank,
            base_positions=places,
            source_positions=places,
            epochs=_EPOCHS,
            batch_size=_PAIRS,
            seed=seed,
        )
    found = [unit.at(position) for unit in directions(subject.model, hook, result.basis.cpu())]
    return found, search.scores([found])[0]


def _promising(search: _Search, ranking: Pairs, expected: Int[Tensor, "n"], rank: int) -> tuple[str, int]:
    """The hook point and position of the residual stream where the best subspace promises most, to first order.

    Interchanging the coordinates along orthonormal ``B`` promises ``trace(B' M B)`` with ``M = E[g (v_source -
    v_base)']``: at best the sum of the greatest eigenvalues of ``M``'s symmetric part. (That of the whole stream is
    its trace, in which other variables at the same place cancel this one.)
    """
    stream = residuals(search.subject.model)
    parts = interchange_gradients(
        search.subject, ranking.base, ranking.source, {"": expected}, stream, _LEVELS, batch_size=search.batch_size
    )
    batches = [found for _, found in parts]
    promises: dict[tuple[str, int], float] = {}
    for layer, site in enumerate(stream.sites):
        g, step = (torch.cat([found[layer][k][:, :, 0].double().cpu() for found in batches]) for k in range(2))
        for position in range(g.shape[1]):
            both = torch.cat([g[:, position], step[:, position]])
            basis = torch.linalg.qr(both.T).Q  # nothing happens outside of it
            m = (g[:, position] @ basis).T @ (step[:, position] @ basis)
            promises[site.hook, position] = float(torch.linalg.eigvalsh(m + m.T)[-rank:].clamp_min(0).sum())
    return max(promises, key=lambda place: promises[place])


def _labels(examples: Examples) -> Int[Tensor, "n"]:
    example, position = answer_rows(examples)
    return examples.labels[example, position]
