"""Alignment search: which units, at which position, carry each variable of a causal model?

A gradient pass ranks: for a pair of base and source the first-order effect of taking unit ``u`` at position ``t`` from
the source, on the log-odds of the answer that the causal model expects, is ``g[u, t] . (v_source - v_base)``. Summed
over pairs it is high for units that carry the variable and low for those that carry another one, whose interchange is
wrong where the answer should stay. What ranks high is then tried by exact interchange, and grown and pruned by its
accuracy on pairs that the ranking has not seen.

A search looks at many candidates, so its own accuracy is optimistic: the one to report is ``held_out``, beside the
controls of :func:`tl_sparsify.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    Intervention,
    ablate,
    answer_logits,
    answer_rows,
    batch_size_for,
    check_model,
    frozen,
    intervened,
    recorded,
    run_values,
)
from tl_sparsify.subjects import Subject, answers
from tl_sparsify.units import Model, Unit, Units, directions, heads, neurons, residuals

_LEVELS = (1.0, 0.5)  # gradients are taken at the base, and half way to the source, where a dead ReLU may be alive


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        alignment: the units of each variable.
        held_out: interchange accuracy of each variable on the held-out pairs.
        held_out_changed: the same where the answer should change.
        searched: its accuracy in the search (optimistic).
        forward, backward: passes over the pairs that the search took, those on held-out pairs not counted.
        exhaustive: the forward passes that trying every unit at every position alone would take.
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
        units: where to look, at each position apart; all heads and neurons where not given.
        variables: all but the output where not given.
        reduction: look only among its kept units, in the model with the others ablated.
        trials: exact interchanges for each variable; where not given about a sixth of what trying every unit takes, and
            at most 32.
        tolerance: a smaller set is preferred when its accuracy is lower by at most this.
        subspace: also learn a direction set of this rank (TransformerLens's ``fit_das``) in the residual stream, at the
            place where gradients say that the variable passes, and take it for a variable that it carries better.

    Forward passes over half of the pairs: two for each of the gradients' two points, three for sources, and ``trials``
    for each variable; two backward passes for each variable (with ``subspace`` 20 of each more, and one more forward).

    Raises:
        ValueError: a model in training mode, a variable that the causal model lacks or whose interchange changes no
            answer, a reduction of another model, pairs that the model answers wrong.
    """
    check_model(model)
    wanted = tuple(v for v in causal_model.variables if v != causal_model.output) if variables is None else variables
    for variable in wanted:
        if variable not in causal_model.variables:
            raise ValueError(f"variables names {variable!r}; there are {', '.join(causal_model.variables)}")
    if reduction is not None:
        check_fingerprint(model, reduction)
    subject = Subject("searched", model, removal=reduction)
    everywhere = heads(model) + neurons(model) if units is None else units
    usable = _usable(subject, pairs, batch_size)
    ranking, trying = usable[: len(usable) // 2], usable[len(usable) // 2 :]
    maps = _effects(subject, causal_model, ranking, everywhere, wanted, batch_size)
    positions = maps[wanted[0]][0].shape[0]
    exhaustive = len([u for u in everywhere if subject.has(u)]) * positions + 1
    share = max(6, min(32, (exhaustive // 6 - 8) // len(wanted) - 3)) if trials is None else trials
    chosen: dict[str, list[Unit]] = {}
    searched: dict[str, float] = {}
    forward, backward = 2 * len(_LEVELS), len(_LEVELS) * len(wanted)
    for variable in wanted:
        search = _Search(subject, causal_model, trying, variable, tolerance, batch_size)
        chosen[variable], searched[variable], spent = search.run(_groups(everywhere, maps[variable], subject), share)
        forward += spent
        if subspace is not None:
            learnt, score = _learnt(search, ranking, subspace, seed)
            forward, backward = forward + 22, backward + 20
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
) -> dict[str, list[Float[Tensor, "pos some"]]]:
    """For each variable, per site, the mean first-order effect of interchanging each unit at each position on the
    log-odds of the expected answer."""
    model = subject.model
    expected = {v: pairs.expected(causal_model, (v,)) for v in variables}
    totals: dict[str, list[Tensor]] = {}
    for index, batch in pairs.base.batches(batch_size_for(model, pairs.base, batch_size)):
        removed = () if subject.removal is None else (ablate(subject.removal.for_examples(index)),)
        with intervened(model, *removed):
            source = run_values(model, pairs.source[index], units)
        with torch.no_grad(), intervened(model, *removed), recorded(model, units) as recording:
            answer_logits(model, batch)
        steps = [s.to(v) - v for s, v in zip(source.tensors, recording.read(), strict=True)]
        for level in _LEVELS:
            mixed = Intervention(units, torch.full((len(units),), level), source)
            with frozen(model), torch.enable_grad(), intervened(model, *removed, mixed):
                with recorded(model, units, gradients=True) as recording:
                    logits = answer_logits(model, batch)
            hooks = list(recording.activations)
            for number, variable in enumerate(variables):
                odds = _log_odds(logits, batch, expected[variable][index]).sum()
                gradients = torch.autograd.grad(
                    odds,
                    [recording.activations[hook] for hook in hooks],
                    retain_graph=number < len(variables) - 1,
                    allow_unused=True,
                )
                full = {
                    hook: torch.zeros_like(recording.activations[hook]) if g is None else g
                    for hook, g in zip(hooks, gradients, strict=True)
                }
                parts = [
                    (g.to(step) * step).sum((0, 3)).double().cpu() / len(pairs)
                    for g, step in zip(recording.pull(full), steps, strict=True)
                ]
                old = totals.get(variable)
                totals[variable] = parts if old is None else [a + b for a, b in zip(old, parts, strict=True)]
    return totals


def _log_odds(logits: Float[Tensor, "n choices"], batch: Examples, answer: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The logit of ``answer`` minus the log-sum-exp of the others."""
    column = answer if batch.choices is None else (answer[:, None] == batch.choices.cpu()).int().argmax(1)
    column = column.to(logits.device)[:, None]
    return logits.gather(1, column)[:, 0] - logits.scatter(1, column, float("-inf")).logsumexp(1)


Group = list[Unit]
"""Units of one site at one position, the most promising first; all with a positive effect."""


def _groups(units: Units, effects: Sequence[Float[Tensor, "pos some"]], subject: Subject) -> list[Group]:
    """Sites at positions, in the order of what their promising units promise together."""
    found: list[tuple[float, Group]] = []
    for site, effect in zip(units.sites, effects, strict=True):
        have = torch.tensor([subject.has(Unit(site, i)) for i in range(site.size)])
        for position, row in enumerate(effect):
            row = torch.where(have, row, 0.0)
            order = row.argsort(descending=True, stable=True)[: int((row > 0).sum())]
            if len(order):
                where = site.positions if len(effect) == 1 else position
                found.append((float(row[order].sum()), [Unit(site, int(i)).at(where) for i in order]))
    return [group for _, group in sorted(found, key=lambda pair: -pair[0])]


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
        if not groups:
            raise ValueError(f"no unit has a positive effect on {self.variable!r}: is it a variable of this model?")
        first: list[Group] = []
        for group in groups:
            prefixes = [group[:size] for size in _sizes(len(group))]
            if len(first) + len(prefixes) > max(1, trials // 2):
                prefixes = prefixes[: max(0, trials // 2 - len(first))]
            first += prefixes
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
        smaller = _between(best, max(0, left))
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
    """Directions that carry the variable in the residual stream, trained on the ranking pairs where the gradients of
    the whole stream are largest, and their accuracy on the others."""
    subject, variable = search.subject, search.variable
    stream = residuals(subject.model)
    maps = _effects(subject, search.causal_model, ranking, stream, (variable,), search.batch_size)[variable]
    layer, position = max(
        ((layer, p) for layer, effect in enumerate(maps) for p in range(len(effect))),
        key=lambda place: float(maps[place[0]][place[1]].sum()),
    )
    hook, base = stream.sites[layer].hook, ranking.base
    known = torch.tensor(sorted(set(ranking.answers.values()))) if base.choices is None else base.choices.cpu()
    targets = (ranking.expected(search.causal_model, (variable,))[:, None] == known).int().argmax(1)

    def task_logits(batch: Tensor) -> Tensor:
        some = Examples(batch, base.labels[: len(batch)], choices=known)
        return answer_logits(subject.model, some)

    places = torch.full((len(base),), position)
    removed: tuple[Any, ...] = () if subject.removal is None else (ablate(subject.removal),)
    with intervened(subject.model, *removed):
        result = fit_das(
            subject.model,
            hook,
            base.tokens,
            ranking.source.tokens,
            targets,
            task_logits,
            rank=rank,
            base_positions=places,
            source_positions=places,
            seed=seed,
        )
    found = [unit.at(position) for unit in directions(subject.model, hook, result.basis.cpu())]
    return found, search.scores([found])[0]


def _labels(examples: Examples) -> Int[Tensor, "n"]:
    example, position = answer_rows(examples)
    return examples.labels[example, position]
