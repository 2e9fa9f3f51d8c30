"""Intervention distributions: what both models are under while they are compared, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked, checked_fields
from tl_sparsify.core.circuit import COUNTERFACTUAL, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call, run_values
from tl_sparsify.core.intervene import Intervention, ablate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units


@checked_fields
@dataclass(frozen=True)
class InterventionDistribution:
    """From what the interventions are drawn under which two models are compared.

    Attributes:
        kind: ``none`` (the observational case), ``interchange`` (each unit takes, with ``probability``, its value on a
            paired source input: each model its own value), ``mean`` (it takes its mean), or ``mixture``.
        probability: of each unit, independently, for each example.
        source: ``counterfactual`` pairs each example with its counterfactual input, ``shuffled`` with another
            example of the whole split that is as long.
        of: the units of ``kept`` ones only, or of ``all``: the reduced model then gets the interventions on the
            units that it still has.
        parts: of a mixture, each with its weight; every example draws one of them.

    Example:
        >>> often = tls.InterventionDistribution.interchange(0.5)
        >>> tls.risk(model, reduction, test, interventions=often).n
        64
    """

    kind: Literal["none", "interchange", "mean", "mixture"] = "none"
    probability: float = 0.0
    source: Literal["counterfactual", "shuffled"] = "shuffled"
    of: Literal["kept", "all"] = "kept"
    parts: tuple[tuple[float, InterventionDistribution], ...] = ()

    def __post_init__(self) -> None:
        known = ("none", "interchange", "mean", "mixture")
        if self.kind not in known:
            raise ValueError(f"kind is {self.kind!r}; the known distributions are {', '.join(known)}")
        for name, choices in (("source", ("counterfactual", "shuffled")), ("of", ("kept", "all"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is {' or '.join(choices)}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}; it lies in [0, 1]")
        if (self.kind == "mixture") != bool(self.parts):
            raise ValueError(f"a distribution of kind {self.kind} has {len(self.parts)} parts")
        if any(weight <= 0 or part.kind == "mixture" for weight, part in self.parts):
            raise ValueError("parts of a mixture need positive weights, and are no mixtures themselves")

    @staticmethod
    def interchange(
        probability: float,
        source: Literal["counterfactual", "shuffled"] = "shuffled",
        of: Literal["kept", "all"] = "kept",
    ) -> InterventionDistribution:
        """Random interchange of units."""
        return InterventionDistribution("interchange", probability, source, of)

    @staticmethod
    def mean(probability: float, of: Literal["kept", "all"] = "kept") -> InterventionDistribution:
        """Random units set to the reduction's mean values."""
        return InterventionDistribution("mean", probability, of=of)

    @staticmethod
    def mixture(*parts: tuple[float, InterventionDistribution]) -> InterventionDistribution:
        """Each example draws one of the distributions, by weight."""
        return InterventionDistribution("mixture", parts=parts)

    @property
    def components(self) -> tuple[tuple[float, InterventionDistribution], ...]:
        """The parts of a mixture, or the one distribution, with weights that sum to 1."""
        parts = self.parts or ((1.0, self),)
        total = sum(weight for weight, _ in parts)
        return tuple((weight / total, part) for weight, part in parts)


NONE = InterventionDistribution()
_PAIRED = InterventionDistribution.interchange(1.0, "counterfactual")


def partners(examples: Examples, seed: int, counter: int) -> Int[Tensor, "n"]:
    """For each example another one of the split with input at the same positions (equally long, padded on the same
    side), itself where there is none (:func:`lone`): in each such group one random cycle. What pads, and how far, does
    not change it. No model pass."""
    return _random.shifted_partner(len(examples), seed, counter, group=_lengths(examples))


def lone(examples: Examples) -> Bool[Tensor, "n"]:
    """The examples that have input at positions where no other has it: without an interchange partner. The only
    example of a split is its own."""
    kind = _lengths(examples)
    if len(kind) == 1:  # the whole split: its own partner
        return torch.zeros(1, dtype=torch.bool)
    return torch.bincount(kind)[kind] == 1


def _lengths(examples: Examples) -> Int[Tensor, "n"]:
    """The same number for examples with input at the same positions, from 0 on."""
    mask = examples.attention_mask
    if mask is None:
        return torch.zeros(len(examples), dtype=torch.long)
    mask, places = mask.cpu(), torch.arange(mask.shape[1])
    first, count = mask.int().argmax(1), mask.sum(1)
    whole = (places >= first[:, None]) & (places < (first + count)[:, None])
    if torch.equal(mask, whole):  # padded at an end, or at both: two numbers say where
        return (first * (len(places) + 1) + count).unique(return_inverse=True)[1]
    return mask.unique(dim=0, return_inverse=True)[1]


def checked_partners(examples: Examples, seed: int, counter: int) -> Int[Tensor, "n"]:
    """:func:`partners`, where every example has one.

    Raises:
        ValueError: an example that has none: at padding, and beyond the end of a shorter input, there is nothing to
            take a unit's value from.
    """
    alone = lone(examples).nonzero().flatten()
    if len(alone):
        first, mask = int(alone[0]), examples.attention_mask
        length = examples.labels.shape[1] if mask is None else int(mask[first].sum())
        raise ValueError(
            f"examples: {len(alone)} of {len(examples)} have no partner of their own length to be interchanged with "
            f"(first: number {first}, {length} positions): give another one of that length, leave them out "
            "(examples[index]), or pair each example yourself (counterfactual_tokens)"
        )
    return partners(examples, seed, counter)


def source_batch(
    distribution: InterventionDistribution, examples: Examples, index: Int[Tensor, "batch"], seed: int
) -> Examples:
    """The source inputs of the examples ``index``; partners come from the whole split, and are equally long.

    Raises:
        ValueError: no counterfactuals where they are the source; where it is another example, one without a partner.
    """
    if distribution.source == "counterfactual":
        if examples.counterfactual_tokens is None:
            raise ValueError("examples have no counterfactual_tokens: use source='shuffled', or give them")
        check_pairs(examples)
        return examples[index].counterfactuals
    return examples[checked_partners(examples, seed, 17)[index]]


def check_pairs(examples: Examples) -> None:
    """Refuse pairs of other length, by row, where positions of the one take values of the other.

    Raises:
        ValueError: such pairs.
    """
    if examples.counterfactual_mask is None:
        return
    own = examples.attention_mask
    own = torch.ones_like(examples.counterfactual_mask) if own is None else own
    rows = (own != examples.counterfactual_mask).any(1).nonzero().flatten().tolist()
    if rows:
        some = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise ValueError(
            f"counterfactual_tokens of {len(rows)} examples have another length, so that positions do not match (rows "
            f"{some}): leave these out, load_examples(..., pairs='equal', unusable='drop')"
        )


def removal(
    model: Model, reduction: Reduction, examples: Examples, index: Int[Tensor, "batch"], source: Values | None = None
) -> Intervention:
    """What sets the removed units for the examples ``index`` to their constants or, where the reduction says so, to
    what they are on each one's counterfactual input, in the model as it is now: ``source``, or one forward pass.

    Raises:
        ValueError: no counterfactuals where they are asked for, or pairs of other length.
    """
    here = reduction.for_examples(index, examples.spans)
    if not here.values.paired:
        return ablate(here)
    if source is None and bool(here.circuit.mask.all()):  # nothing is set to anything
        return Intervention(here.units, here.circuit.mask.float(), here.values)
    return ablate(here, paired_values(model, examples, index, here.units) if source is None else source)


def paired_values(model: Model, examples: Examples, index: Int[Tensor, "batch"], units: Units) -> Values:
    """The units' values on the counterfactual inputs of the examples ``index``. One forward pass.

    Raises:
        ValueError: as :func:`source_batch`.
    """
    if examples.counterfactual_tokens is None:
        raise ValueError(
            "examples have no counterfactual_tokens, and removed units are set to their values on these: give them, or "
            "pair the examples with one another (examples.with_partners)"
        )
    return run_values(model, source_batch(_PAIRED, examples, index, 0), units)


@checked
def counterfactual(model: Model, examples: Examples, units: Units) -> Values:
    """No constants: every removed unit takes the value that it has on its example's counterfactual input (resample
    ablation), in scores, searches, risk and evaluation. What is made with them runs on examples with counterfactuals
    only, costs a forward pass more, and neither folds nor is refitted. One forward pass of one example.

    Raises:
        ValueError: ``examples`` without counterfactuals, or with pairs of other length.

    Example:
        >>> paired = tls.constants.counterfactual(model, train, units)
        >>> tls.sparsify(model, train, units, values=paired, rounds=3, progress=False).at(0.5).kind
        'counterfactual'
    """
    check_call(model, examples, units)
    first = torch.zeros(1, dtype=torch.long)
    found = paired_values(model, examples, first, units.for_examples(first, examples.spans))
    return Values(units, tuple(torch.full_like(v[0, 0], float("nan")) for v in found.tensors), COUNTERFACTUAL)


def drawn_interventions(
    distribution: InterventionDistribution,
    model: Model,
    reduction: Reduction,
    examples: Examples,
    index: Int[Tensor, "batch"],
    seed: int,
) -> tuple[Intervention, ...]:
    """The interventions on the reduction's units for the examples ``index``, source values taken from ``model`` as it
    is now. The same units and sources for every model given the same seed. One forward pass for each part of kind
    ``interchange``."""
    drawn: list[Intervention] = []
    reduction = reduction.for_examples(index, examples.spans)
    lottery = _random.uniform(seed, 31, index)
    low = 0.0
    for number, (share, part) in enumerate(distribution.components):
        mine = (lottery >= low) & (lottery < low + share)
        low += share
        if part.kind == "none" or part.probability == 0:
            continue
        draw = _random.uniform(seed, 29 + number, index[:, None], torch.arange(len(reduction.units)))
        chosen = (draw < part.probability) & mine[:, None]
        if part.of == "kept":
            chosen &= reduction.circuit.mask
        if part.kind == "mean":
            values = reduction.baseline
            if values.paired:
                raise ValueError(
                    "interventions of kind 'mean' need means, and the reduction has none: give interchange"
                )
        else:
            values = run_values(model, source_batch(part, examples, index, seed), reduction.units)
        drawn.append(Intervention(reduction.units, (~chosen).float(), values))
    return tuple(drawn)
