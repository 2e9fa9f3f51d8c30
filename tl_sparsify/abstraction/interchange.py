"""Interchange: the models that are held against a causal model, and what they answer under interchange interventions.

A tested model is the original, an ablated or folded model of it, or a control; the original's units are looked up in it
under its own names, and units that it no longer has are not interchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import gathered
from tl_sparsify.abstraction.between import between, step
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.distributions import removal
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, frozen, output, shared_batches
from tl_sparsify.core.intervene import Intervention, ablate, intervened, recorded
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Unit, Units, heads, neurons, select

Swap = tuple[Sequence[Unit], Examples]
"""Units, and the source inputs that they take their values from."""
_FAMILIES = {"head": heads, "neuron": neurons}
_WHOLE = {"head": "attention", "neuron": "mlp"}


def families(model: Model) -> Units:
    """All heads and neurons that the model has. No model pass.

    Raises:
        ValueError: a model with neither, or without blocks.
    """
    found: list[Site] = []
    for family in _FAMILIES.values():
        with suppress(ValueError):  # it has none of them
            found += family(model).sites
    return Units(tuple(found)) if found else heads(model)


@dataclass(frozen=True)
class TestedModel:
    """A model under test, with what it needs to interchange the original's units.

    Attributes:
        removal: what is ablated in it.
        own_names: its own unit name for each original unit that it still has; ``None``: the original's names.
        untrained: whether it has random weights, and so is a control.
    """

    name: str
    model: Any
    removal: Reduction | None = None
    own_names: Mapping[str, str] | None = None
    untrained: bool = False
    __test__: ClassVar[bool] = False  # pytest takes a class of such a name for a test

    @cached_property
    def _gone(self) -> set[str]:
        if self.removal is None:
            return set()
        units, mask = self.removal.units, self.removal.circuit.mask
        parts = zip(units.sites, units.split(mask), strict=True)
        empty = {
            _layer(site) for site, keep in parts if site.kind in _WHOLE and site.positions is None and not keep.any()
        }
        return empty.union((~self.removal.circuit).names)

    def has(self, unit: Unit) -> bool:
        """Whether this model still has the unit; what no reduction removes is there. Whole layers without heads or
        neurons, and these in whole layers that are removed, are gone, too."""
        if self.own_names is None:
            return self._gone.isdisjoint((unit.name, bare(unit), _layer(unit.site)))
        if unit.site.kind in _FAMILIES:
            return bare(unit) in self.own_names
        part = next((part for part, whole in _WHOLE.items() if whole == unit.site.kind), None)
        prefix = "" if part is None else Site(part, unit.site.layer, unit.site.hook, 1).prefix
        return part is None or any(name.startswith(prefix) for name in self.own_names)

    def own(self, chosen: Iterable[Unit]) -> list[Unit]:
        """The chosen units that this model still has, under its own names."""
        kept = [unit for unit in chosen if self.has(unit)]
        if self.own_names is None:
            return kept
        units = {kind: _FAMILIES[kind](self.model) for kind in {unit.site.kind for unit in kept} & set(_FAMILIES)}
        own: list[Unit] = []
        for unit in kept:
            if unit.site.kind in units:
                here = units[unit.site.kind][self.own_names[bare(unit)]]
                unit = Unit(replace(unit.site, size=here.site.size), here.index)
            own.append(unit)
        return own

    def on(self, index: Int[Tensor, "some"]) -> TestedModel:
        """The same for the examples ``index``, where it is ablated at a position for each example."""
        return self if self.removal is None else replace(self, removal=self.removal.for_examples(index))


def _layer(site: Site) -> str:
    """The name of the whole layer that heads or neurons are parts of, or that it is; empty for other units."""
    kind = _WHOLE.get(site.kind, site.kind)
    return Site(kind, site.layer, site.hook, 1).name(0) if kind in _WHOLE.values() else ""


def bare(unit: Unit) -> str:
    """A unit's name without positions."""
    return unit.at(None).name


def logits(
    subject: TestedModel, base: Examples, swaps: Sequence[Sequence[Swap]] = ((),), *, batch_size: int | None = None
) -> list[Float[Tensor, "rows choices"]]:
    """The logits at the labelled positions of ``base`` for each list of swaps, whose units are taken from their source.

    For each batch one forward pass for each source (shared by all lists that name it) and one for each list.
    """
    model = subject.model

    def parts() -> Iterator[list[Tensor]]:
        for index, batch in shared_batches(model, base, batch_size):
            removed = ablation(subject, base, index, base)
            taken = _taken(subject, swaps, base, index)
            found: list[Tensor] = []
            for some in swaps:
                swapped = [part for units, source in some if len(units) for part in taken(units, source)]
                with intervened(model, *swapped, *removed):
                    found.append(answer_logits(model, batch).cpu())
            yield found

    with torch.no_grad():
        return [torch.cat(found) for found in zip(*gathered(parts(), len(base)), strict=True)]


def _taken(
    subject: TestedModel,
    swaps: Sequence[Sequence[Swap]],
    base: Examples,
    index: Int[Tensor, "batch"],
) -> Callable[[Sequence[Unit], Examples], list[Intervention]]:
    """How to interchange some units on one batch; every source is run once, with all that is taken from it."""
    sources: dict[int, tuple[Examples, dict[Site, None]]] = {}
    for units, source in (swap for some in swaps for swap in some):
        sites = sources.setdefault(id(source), (source, {}))[1]
        sites.update(dict.fromkeys(unit.site for unit in units))
    values: dict[int, dict[Site, Tensor]] = {}
    for key, (source, sites) in sources.items():
        groups = _named_apart(sites)
        here = [group.for_examples(index, base.spans) for group in groups]
        removed = ablation(subject, source, index, base) if here else ()
        taken = values_of(subject.model, source[index], here, removed)
        read = (value for part in taken for value in part.tensors)
        values[key] = dict(zip((site for group in groups for site in group.sites), read, strict=True))

    def swap(units: Sequence[Unit], source: Examples) -> list[Intervention]:
        made: list[Intervention] = []
        for sites, mask in selected_apart(units):
            here = sites.for_examples(index, base.spans)
            tensors = tuple(values[id(source)][site] for site in sites.sites)
            made += between(here, (~mask).float(), Values(here, tensors), base[index], source[index])
        return made

    return swap


def ablation(
    subject: TestedModel, examples: Examples, index: Int[Tensor, "batch"], base: Examples
) -> tuple[Intervention, ...]:
    """What is ablated while the examples ``index`` run, with units at the base's spans; where removed units take their
    values on counterfactual inputs those of these examples' own, for a forward pass more."""
    if subject.removal is None:
        return ()
    if subject.removal.values.paired:
        return (removal(subject.model, subject.removal, replace(examples, spans=base.spans), index),)
    return (ablate(subject.removal.for_examples(index, base.spans)),)


def selected_apart(units: Iterable[Unit]) -> list[tuple[Units, Bool[Tensor, "units"]]]:
    """As :func:`units.select`, in groups where two bases at one hook point have units of one name."""
    units = list(units)
    groups = [set(group.sites) for group in _named_apart(dict.fromkeys(unit.site for unit in units))]
    return [select(unit for unit in units if unit.site in group) for group in groups]


def _named_apart(sites: Iterable[Site]) -> list[Units]:
    """The sites in groups without two units of one name: two bases at one hook point name theirs alike, and so do two
    spans once they are placed."""
    groups: list[dict[str, Site]] = []
    for site in sites:
        somewhere = torch.zeros(1, dtype=torch.long)
        name = (replace(site, positions=somewhere) if isinstance(site.positions, str) else site).name(0)
        free = next((group for group in groups if name not in group), None)
        if free is None:
            groups.append(free := {})
        free[name] = site
    return [Units(tuple(group.values())) for group in groups]


def answers(
    subject: TestedModel, base: Examples, swaps: Sequence[Sequence[Swap]] = ((),), *, batch_size: int | None = None
) -> list[Int[Tensor, "n"]]:
    """For each list of swaps the token that the model answers for each base; passes as :func:`logits`."""
    return [tokens(part, base) for part in logits(subject, base, swaps, batch_size=batch_size)]


def tokens(rows: Float[Tensor, "n choices"], base: Examples) -> Int[Tensor, "n"]:
    """The answer of each row of logits, as a token."""
    best = rows.argmax(1)
    return best if base.choices is None else base.choices.cpu()[best]


def columns_of(answers: Int[Tensor, "n"], choices: Int[Tensor, "k"] | None) -> Int[Tensor, "n"]:
    """Where each answer stands among the choices.

    Raises:
        ValueError: an answer that is none of them.
    """
    if choices is None:
        return answers
    same = answers[:, None] == choices.cpu()
    if not bool((there := same.any(1)).all()):
        raise ValueError(
            f"the causal model's answer {int(answers[~there][0])} (a token) is not among the choices of the pairs: "
            "give choices that hold every answer"
        )
    return same.int().argmax(1)


def right_answers(examples: Examples) -> Int[Tensor, "n"]:
    """The one label of each example."""
    return examples.labels[examples.labels != NO_LABEL]


def interchange_gradients(
    subject: TestedModel,
    base: Examples,
    source: Examples,
    expected: Mapping[str, Int[Tensor, "n"]],
    units: Units,
    levels: Sequence[float],
    *,
    batch_size: int | None = None,
) -> Iterator[tuple[str, list[tuple[Float[Tensor, "batch pos _ _"], Float[Tensor, "batch pos _ _"]]]]]:
    """For each batch of this process's share and variable, per site, the gradient of the log-odds of the variable's
    ``expected`` answers, and the step from base to source: their product is the first-order effect of interchange.

    The gradient is the sum over ``levels``, the base's share in the point where it is taken, of which the first is 1.
    One forward pass for the sources and one for each level, one backward pass for each level and variable.
    """
    model, gone = subject.model, _removed_edges(subject, units)
    for index, batch in shared_batches(model, base, batch_size):
        with torch.no_grad():
            removed = ablation(subject, base, index, base)
            [taken] = values_of(model, source[index], (units,), ablation(subject, source, index, base))
        steps: list[Tensor] = []
        totals: dict[str, list[Tensor]] = {}
        for level in levels:
            keep = torch.full((len(units),), level).masked_fill(gone, 1)
            mixed = between(units, keep, taken, batch, source[index])
            with frozen(model), torch.enable_grad(), intervened(model, *removed, *mixed):
                with recorded(model, units, gradients=True) as recording:
                    found = answer_logits(model, batch)
            steps = steps or step(units, recording.read(), taken, batch, source[index])
            activations = list(recording.activations.values())
            for number, (variable, answer) in enumerate(expected.items()):
                odds = _log_odds(found, batch, answer[index]).sum()
                more = number < len(expected) - 1
                gradients = torch.autograd.grad(odds, activations, retain_graph=more, allow_unused=True)
                filled = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, activations, strict=True)]
                parts = recording.pull(dict(zip(recording.activations, filled, strict=True)))
                old = totals.get(variable, parts)
                totals[variable] = [a if a is b else a + b for a, b in zip(old, parts, strict=True)]
        for variable, parts in totals.items():
            yield variable, list(zip(parts, steps, strict=True))


def _removed_edges(subject: TestedModel, units: Units) -> Bool[Tensor, "units"]:
    """Edges that this model no longer has: they carry nothing, whatever their writer writes."""
    parts = [
        torch.tensor([not subject.has(Unit(site, i)) for i in range(site.size)])
        if site.kind == "edge"
        else torch.zeros(site.size, dtype=torch.bool)
        for site in units.sites
    ]
    return torch.cat(parts)


def _log_odds(logits: Float[Tensor, "n choices"], batch: Examples, answer: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """The logit of ``answer`` minus the log-sum-exp of the others."""
    column = columns_of(answer, batch.choices).to(logits.device)[:, None]
    return logits.gather(1, column)[:, 0] - logits.scatter(1, column, float("-inf")).logsumexp(1)


def randomly_interchanged(
    subject: TestedModel,
    units: Sequence[Unit],
    base: Examples,
    source: Examples,
    probability: float,
    seed: int,
    batch_size: int | None,
) -> Float[Tensor, "rows choices"]:
    """The logits at the labelled positions of ``base`` with each of ``units`` (the original's, all of which this model
    has) taken from ``source`` with ``probability``; the same draws for every model. Two forward passes."""
    own = subject.own(units)
    groups = _named_apart(dict.fromkeys(unit.site for unit in own))
    offsets = [{site: at for site, at in zip(group.sites, group.offsets, strict=False)} for group in groups]
    places = [[(i, at[u.site] + u.index) for i, u in enumerate(own) if u.site in at] for at in offsets]

    def parts() -> Iterator[Tensor]:
        for index, batch in shared_batches(subject.model, base, batch_size):
            removed = ablation(subject, base, index, base)
            draw = _random.uniform(seed, 61, index[:, None], torch.arange(len(own)))
            swapped: list[Intervention] = []
            values = values_of(subject.model, source[index], groups, ablation(subject, source, index, base))
            for group, place, taken in zip(groups, places, values, strict=True):
                keep = torch.ones(len(index), len(group))
                keep[:, [flat for _, flat in place]] = (draw[:, [i for i, _ in place]] >= probability).to(keep)
                swapped += between(group, keep, taken, batch, source[index])
            with intervened(subject.model, *swapped, *removed):
                yield answer_logits(subject.model, batch).cpu()

    with torch.no_grad():
        return torch.cat(gathered(parts(), len(base)))


def values_of(
    model: Any, source: Examples, groups: Sequence[Units], removed: tuple[Intervention, ...]
) -> tuple[Values, ...]:
    """The units' values on a batch of sources, for each group; one forward pass, none for no units."""
    with intervened(model, *removed), ExitStack() as stack:
        recordings = [stack.enter_context(recorded(model, group)) for group in groups]
        if groups:
            output(model, source)
    return tuple(Values(group, recording.read()) for group, recording in zip(groups, recordings, strict=True))
