"""Behaviours, found without being told: contexts grouped by what removing each head does to them, a circuit for each.

After the quanta of Michaud et al. (arXiv 2303.13506) and the unsupervised circuits of Marks et al. (arXiv 2403.19647,
section 5), who group contexts by gradients or by features of dictionaries. Here a context's profile is each head's
share of its single-unit risks, and whether a group is a behaviour is put to a test: a circuit found on half of its
contexts must do better on the other half than the circuit of all contexts, and those of random groups must not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify._internal.progress import step
from tl_sparsify.comparison.resampling import check_bootstrap
from tl_sparsify.core.circuit import Circuit, FirstToken, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call
from tl_sparsify.core.units import Model, Units
from tl_sparsify.discovery.found import Behaviour, Behaviours
from tl_sparsify.discovery.naming import named, shown
from tl_sparsify.discovery.risks import group_risks
from tl_sparsify.search.constants import mean, reduced
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.scores import kept_count
from tl_sparsify.search.settings import Probing
from tl_sparsify.stressing.measuring import Setting, halves
from tl_sparsify.stressing.profiles import grouped

_GROUPED = 1024  # contexts that are grouped: the distances between them are a matrix
_SHOWN = 3
_SAME = 1e-9  # rounding decides nothing


@checked
def behaviours(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    count: int = 8,
    size: float = 0.05,
    least: int = 16,
    rounds: int = 8,
    probing: Probing = Probing(probes=2),
    values: Values | None = None,
    first_token: FirstToken = "bos",
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Behaviours:
    """Group contexts by what removing each head does to the model's answers, and find the circuit of each group.

    Every other context is chosen on: these are grouped by their profiles (Ward's linkage), and every context, seen or
    held out, goes to the group whose mean profile is nearest. Circuits are found on the contexts chosen on, by joint
    risk, and judged on the others; where the circuit of all contexts does better on those of a group that are chosen
    on, the group has that one. All have one size and the same constants.

    Args:
        examples: the contexts with their answers: of :func:`tl_sparsify.contexts`, or of any kind.
        count: of groups.
        size: the fraction of units that each circuit keeps.
        least: contexts in each half; smaller groups are no behaviour, and their contexts are left over.
        rounds: of each search.
        values: what removed units are set to; their means over the contexts chosen on where not given.
        bootstrap: replicates of the intervals over contexts.

    Cost in passes over the contexts: profiles one and a half forward and at most 24 backward (16 probes); three
    searches (of all contexts, of the groups, of random groups) over half of them, as :func:`tl_sparsify.sparsify`;
    half a forward for the means, and ``2 count + 2`` forward for measured risks. Memory does not grow with the
    contexts but for their profiles, and a matrix of distances between at most 1,024 of them.

    Raises:
        ValueError: a model in training mode, fewer than two groups, a size outside (0, 1), fewer contexts than are
            needed for two groups, groups that are all too small.

    Example:
        >>> tls.behaviours(model, train, units, count=2, size=0.5, least=4, rounds=1, bootstrap=50)
        Behaviours(2 of 64 contexts: ...; gain ...)
    """
    check_call(model, examples, seed=seed, batch_size=batch_size)
    check_bootstrap(bootstrap, level)
    check_count("count", count, least=2, most=MOST)
    check_count("least", least, least=2)
    if kept_count(len(units), size, "size") == len(units):
        raise ValueError(f"size is {size}, which keeps all {len(units)} units: choose a smaller one")
    if len(examples) < 2 * max(count, 2 * least):
        raise ValueError(
            f"examples holds {len(examples)} contexts; {count} groups of at least {least} in each half need "
            f"{2 * max(count, 2 * least)} or more: lower count or least, or give more"
        )
    if any(isinstance(site.positions, Tensor) for site in units.sites):
        raise ValueError("units have positions of their own for each example: name them by a span, or by a number")
    setting = Setting(bootstrap=bootstrap, level=level, seed=seed, batch_size=batch_size)
    chosen, reported = halves(examples, None)
    even = torch.arange(len(examples)) % 2 == 0
    numbers = torch.arange(len(examples))[even]
    values = mean(model, chosen, units, batch_size=batch_size) if values is None else values
    plain = replace(reduced(model, Circuit.full(units), values), first_token=first_token)
    with step("grouping contexts", progress):
        _, nearest = grouped(model, plain, chosen.sample(_GROUPED, seed=seed), examples, count, setting)
    groups = _large(nearest[:, -1], even, least)
    many = int(groups.max()) + 1
    if many < 1:
        raise ValueError(f"no group has least={least} contexts in each half: lower least or count, or give more")
    at_random = groups.clone()  # of as many contexts in each half
    for part, half in enumerate((even, ~even)):
        at_random[half] = groups[half][_random.permutation(int(half.sum()), seed, 139, part)]
    members = [numbers] + [numbers[some[even] == group] for some in (groups, at_random) for group in range(many)]

    def circuit(some: Int[Tensor, "some"]) -> Circuit:
        shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": False}
        path = sparsify(
            model, examples[some], units, rounds=rounds, smallest=size, probing=probing, start=plain, **shared
        )
        return path.at(size).circuit

    together, *found = [circuit(some) for some in bar(members, "searching circuits", progress)]
    both, whole = torch.stack([groups, at_random]), 2 * many  # whole: of the circuits the one of all contexts
    with step("measuring risks", progress):
        seen = group_risks(model, plain, [*found, together], both[:, even], chosen, replace(setting, bootstrap=0)).mean
        better = (seen.diag() <= (1 + _SAME) * seen[:, whole]).tolist()
        found = [one if own else together for one, own in zip(found, better, strict=True)]
        risks = group_risks(model, plain, [*found, together], both[:, ~even], reported, setting)
    parts: list[Behaviour] = []
    for group in range(many):
        mine, random = (groups == group).nonzero().flatten(), many + group
        held_out = mine[~even[mine]]
        parts.append(
            Behaviour(
                name=named(model, examples[mine]),
                train=members[1 + group],
                held_out=held_out,
                shown=tuple(shown(model, examples[i : i + 1]) for i in held_out[:_SHOWN].tolist()),
                reduction=plain.with_circuit(found[group]),
                risk=risks.of(group, group),
                together=risks.of(group, whole),
                random=risks.of(group, random),
                gain=risks.of(group, whole, less=group),
                random_gain=risks.of(random, whole, less=random),
            )
        )
    own, others = range(many), range(many, whole)
    return Behaviours(
        examples=examples,
        groups=groups,
        found=tuple(parts),
        together=plain.with_circuit(together),
        cross=risks.mean[:many, :many],
        gain=risks.gain(own, [whole] * many, less=own),
        random_gain=risks.gain(others, [whole] * many, less=others),
        unit=setting.unit,
        level=level,
    )


def _large(groups: Int[Tensor, "n"], even: Bool[Tensor, "n"], least: int) -> Int[Tensor, "n"]:
    """The groups with at least so many examples in each half, the largest first; the others' examples are -1."""
    sizes = groups.bincount()
    smaller = torch.minimum(groups[even].bincount(minlength=len(sizes)), groups[~even].bincount(minlength=len(sizes)))
    order = sizes.argsort(descending=True, stable=True)
    order = order[smaller[order] >= least]
    number = torch.full_like(sizes, -1)
    number[order] = torch.arange(len(order))
    return number[groups]
