"""Subjects: the models that are held against a causal model, and what they answer under interchange interventions.

A subject is the original, an ablated or folded model of it, or a control; the original's units are looked up in it
under its own names, and units that it no longer has are not interchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify import _random
from tl_sparsify.circuit import Circuit, Reduction, Values
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import (
    Intervention,
    ablate,
    answer_logits,
    batch_size_for,
    interchange,
    intervened,
    output,
    recorded,
    run_values,
)
from tl_sparsify.units import Site, Unit, Units, heads, neurons, select

Swap = tuple[Sequence[Unit], Examples]
"""Units, and the source inputs that they take their values from."""
_FAMILIES = {"head": heads, "neuron": neurons}


@dataclass(frozen=True)
class Subject:
    """A model under test, with what it needs to interchange the original's units.

    Attributes:
        removal: what is ablated in it.
        own_names: its own unit name for each original unit that it still has; ``None``: the original's names.
    """

    name: str
    model: Any
    removal: Reduction | None = None
    own_names: Mapping[str, str] | None = None

    @cached_property
    def _gone(self) -> frozenset[str]:
        return frozenset() if self.removal is None else frozenset((~self.removal.circuit).names)

    def has(self, unit: Unit) -> bool:
        """Whether this model still has the unit; what no reduction removes is there."""
        if self.own_names is not None:
            return unit.site.kind not in _FAMILIES or bare(unit) in self.own_names
        return self._gone.isdisjoint((unit.name, bare(unit)))

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


def bare(unit: Unit) -> str:
    """A unit's name without positions."""
    return unit.at(None).name


def logits(
    subject: Subject, base: Examples, swaps: Sequence[Sequence[Swap]] = ((),), *, batch_size: int | None = None
) -> list[Float[Tensor, "rows choices"]]:
    """The logits at the labelled positions of ``base`` for each list of swaps, whose units are taken from their source.

    For each batch one forward pass for each source (shared by all lists that name it) and one for each list.
    """
    found: list[list[Tensor]] = [[] for _ in swaps]
    model = subject.model
    with torch.no_grad():
        for index, batch in base.batches(batch_size_for(model, base, batch_size)):
            removed = () if subject.removal is None else (ablate(subject.removal.for_examples(index)),)
            taken = _taken(model, swaps, index, removed)
            for number, some in enumerate(swaps):
                swapped = [taken(units, source) for units, source in some if len(units)]
                with intervened(model, *swapped, *removed):
                    found[number].append(answer_logits(model, batch).cpu())
    return [torch.cat(parts) for parts in found]


def _taken(
    model: Any, swaps: Sequence[Sequence[Swap]], index: Int[Tensor, "batch"], removed: tuple[Intervention, ...]
) -> Callable[[Sequence[Unit], Examples], Intervention]:
    """How to interchange some units on one batch; every source is run once, with all that is taken from it."""
    sources: dict[int, tuple[Examples, dict[Site, None]]] = {}
    for units, source in (swap for some in swaps for swap in some):
        sites = sources.setdefault(id(source), (source, {}))[1]
        sites.update(dict.fromkeys(unit.site for unit in units))
    values: dict[int, dict[Site, Tensor]] = {}
    for key, (source, sites) in sources.items():
        groups = [group.for_examples(index) for group in _named_apart(sites)]
        with intervened(model, *removed), ExitStack() as stack:
            recordings = [stack.enter_context(recorded(model, group)) for group in groups]
            if groups:
                output(model, source[index])
        read = (value for recording in recordings for value in recording.read())
        here = (site for group in _named_apart(sites) for site in group.sites)
        values[key] = dict(zip(here, read, strict=True))

    def swap(units: Sequence[Unit], source: Examples) -> Intervention:
        sites, mask = select(units)
        here = sites.for_examples(index)
        tensors = tuple(values[id(source)][site] for site in sites.sites)
        return interchange(Circuit(here, mask), Values(here, tensors))

    return swap


def _named_apart(sites: Iterable[Site]) -> list[Units]:
    """The sites in groups without two units of one name: two bases at one hook point name theirs alike."""
    groups: list[dict[str, Site]] = []
    for site in sites:
        free = next((group for group in groups if site.name(0) not in group), None)
        if free is None:
            groups.append(free := {})
        free[site.name(0)] = site
    return [Units(tuple(group.values())) for group in groups]


def answers(
    subject: Subject, base: Examples, swaps: Sequence[Sequence[Swap]] = ((),), *, batch_size: int | None = None
) -> list[Int[Tensor, "n"]]:
    """For each list of swaps the token that the model answers for each base; passes as :func:`logits`."""
    return [tokens(part, base) for part in logits(subject, base, swaps, batch_size=batch_size)]


def tokens(rows: Float[Tensor, "n choices"], base: Examples) -> Int[Tensor, "n"]:
    """The answer of each row of logits, as a token."""
    best = rows.argmax(1)
    return best if base.choices is None else base.choices.cpu()[best]


def randomly_interchanged(
    subject: Subject,
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
    sites, _ = select(own)
    flat = torch.tensor([sites.offsets[sites.sites.index(unit.site)] + unit.index for unit in own])
    found: list[Tensor] = []
    with torch.no_grad():
        for index, batch in base.batches(batch_size_for(subject.model, base, batch_size)):
            removed = () if subject.removal is None else (ablate(subject.removal.for_examples(index)),)
            with intervened(subject.model, *removed):
                values = run_values(subject.model, source[index], sites)
            draw = _random.uniform(seed, 61, index[:, None], torch.arange(len(own)))
            keep = torch.ones(len(index), len(sites))
            keep[:, flat] = (draw >= probability).float()
            with intervened(subject.model, Intervention(sites, keep, values), *removed):
                found.append(answer_logits(subject.model, batch).cpu())
    return torch.cat(found)
