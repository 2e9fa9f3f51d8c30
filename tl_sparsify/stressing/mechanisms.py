"""Mechanisms: whether one circuit mixes several, each of which serves some of the examples only (arXiv 2605.09129).

Examples are grouped by their profiles: what removing each head does to each of them. If the groups have mechanisms of
their own, circuits of the same size that are found for each group do better on unseen examples of that group than one
circuit for all. Random groups of the same sizes go through the same: they must gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.expansion.linearisation import linearise
from tl_sparsify.expansion.selection import greedy
from tl_sparsify.stressing.measuring import Interval, Measured, Setting, alike, assigned, halves, measured, removing
from tl_sparsify.stressing.profiles import PROBES, TEMPERATURE, grouped
from tl_sparsify.stressing.table import Stand, StressRow

MOST_GROUPS = 6
_LEAST = 16  # examples for each group, on average
_GROUPED = 512  # examples that are grouped: the distances between them are a matrix


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """What the test of mechanisms found.

    Attributes:
        rows: its line.
        groups: of each example that is reported on, by its profile.
        risks: with one group, two, ...: the mean risk where each example has its group's circuit.
        count: the number of groups chosen.
        circuits: one for each group.
        cross: ``[i, j]``, the risk of group ``j``'s circuit on the examples of group ``i``; NaN where it has none.
        random: the same of random groups; where one was chosen, of as many as did best.
    """

    rows: tuple[StressRow, ...]
    groups: Int[Tensor, "n"]
    risks: Float[Tensor, "most"]
    count: int
    circuits: tuple[Circuit, ...]
    cross: Float[Tensor, "groups groups"]
    random: Float[Tensor, "random random"]


def mechanisms(
    model: Model, reduction: Reduction, examples: Examples, setting: Setting, *, train: Examples | None = None
) -> Mechanisms | str:
    """By how much circuits for groups of the examples, each as large as the reduction's, lower the risk of the best one
    circuit for all, beside random groups. Or why nothing can be told.

    The number of groups is the least that no larger one undercuts by more than the tolerance and one standard error on
    the examples reported on. The claim, one mechanism, holds where that is one and random circuits are worse than the
    one for all. It fails where groups gain more than the tolerance and random groups do not.

    A group's circuit is the best on its own half of the examples of: the joint greedy choice and the units of the
    highest single-unit risk, each in one shot; what was found for larger groups that hold it; the reduction's own. All
    of them have the reduction's constants, those before a refit.

    Cost: for each number of groups up to six a search over the groups that are new: one forward and at most 16
    backward passes and 3 to 8 measured ones over their examples.
    """
    if reduction.mixing is not None:
        raise ValueError("reduction has affine replacements, which are fitted for its own circuit: give its constants")
    size = len(reduction.circuit)
    if not 0 < size < len(reduction.units):
        return "the circuit keeps no unit, or every one"
    chosen, reported = halves(examples, train)
    chosen = chosen.sample(_GROUPED, seed=setting.seed)
    most = min(MOST_GROUPS, len(chosen) // _LEAST, len(reported) // 2)
    if most < 2:
        return f"{len(chosen)} examples to group; at least {2 * _LEAST} are needed"
    plain = replace(reduction, values=reduction.baseline, reference=None)
    with counted(model) as passes:
        labels, groups = grouped(model, plain, chosen, reported, most, setting)
        pools = _circuits(model, plain, chosen, labels, setting)
        circuits = list(dict.fromkeys(one for found in pools for one in found))
        drawn = [alike(reduction.circuit, setting.seed, draw) for draw in range(setting.draws)]
        number = {circuit: i for i, circuit in enumerate(circuits)}
        own = torch.stack(
            [torch.tensor([number[one] for one in found])[groups[:, i]] for i, found in enumerate(pools)], 1
        )
        at_random = torch.arange(len(drawn)).expand(len(reported), -1) + len(circuits)
        removals = [removing(plain, one, reported) for one in (*circuits, *drawn)]
        found = assigned(model, removals, torch.cat([own, at_random], 1), reported, setting)
        count = _fewest(found, most, setting.tolerance)
        shown = count if count > 1 else 2 + int(found.mean[1:most].argmin())
        cross, _, _ = _cross(model, plain, pools[shown - 1], groups[:, shown - 1], pools[0][0], reported, setting)
        mixed, others = (
            column[_random.permutation(len(column), setting.seed, 127, part)]
            for part, column in enumerate((labels[:, shown - 1], groups[:, shown - 1]))
        )
        theirs = tuple(_best(model, plain, chosen[mixed == group], [pools[0][0]], setting) for group in range(shown))
        random, control, around = _cross(model, plain, theirs, others, pools[0][0], reported, setting)
    one = torch.zeros(len(found.mean))
    one[0], one[shown - 1] = 1, -1
    gain, (low, high) = found.interval(one)
    worse = torch.zeros(len(found.mean))
    worse[0], worse[most:] = -1, 1 / max(1, len(drawn))
    useful = found.interval(worse)[1][0] > setting.tolerance
    sizes = torch.bincount(groups[:, shown - 1], minlength=shown).tolist()
    alone = f"{float(found.mean[0]):.3g} with one circuit, {float(found.mean[shown - 1]):.3g} with {shown}"
    stand, why = Stand.UNKNOWN, f"{alone}: about the tolerance"
    if count > 1 and around[0] > setting.tolerance:
        why = f"random groups gain, too: {control:.3g}"
    elif count > 1 and low > setting.tolerance:
        stand, why = Stand.FAILS, f"{count} groups, of {', '.join(map(str, sizes))} examples: {alone}"
    elif count == 1 and not useful:
        why = "random circuits do as well as the one found for all"
    elif count == 1:
        stand, why = Stand.HOLDS, f"one group: {alone}"
    line = StressRow(
        row="mechanisms",
        case="groups of examples",
        claim=f"no grouping gains more than {setting.tolerance:g} {setting.unit} by circuits of its own",
        value=gain,
        low=low,
        high=high,
        control=control,
        control_low=around[0],
        control_high=around[1],
        unit=setting.unit,
        stand=stand,
        because=why,
        n=found.n,
        forward=passes["forward"] / found.n,
        backward=passes["backward"] / found.n,
    )
    if count == 1:
        cross = found.mean[:1, None]
    return Mechanisms((line,), groups[:, count - 1], found.mean[:most], count, pools[count - 1], cross, random)


def _circuits(
    model: Model, reduction: Reduction, chosen: Examples, labels: Int[Tensor, "n most"], setting: Setting
) -> list[tuple[Circuit, ...]]:
    """The circuits of the groups in each column. A group that comes again keeps its own."""
    known: dict[tuple[int, ...], Circuit] = {}
    found: list[tuple[Circuit, ...]] = []
    for column in labels.T:
        members = [tuple((column == group).nonzero().flatten().tolist()) for group in range(int(column.max()) + 1)]
        for some in [some for some in members if some not in known]:
            parents = [circuit for whole, circuit in known.items() if set(some) <= set(whole)]
            known[some] = _best(model, reduction, chosen[torch.tensor(some)], [*parents, reduction.circuit], setting)
        found.append(tuple(known[some] for some in members))
    return found


def _best(
    model: Model, reduction: Reduction, examples: Examples, known: Sequence[Circuit], setting: Setting
) -> Circuit:
    """The circuit with the least risk on these examples: of the known ones and the two that one shot finds."""
    n, size = len(reduction.units), len(reduction.circuit)
    parts = samples(
        model,
        examples,
        reduction,
        probes=PROBES,
        temperature=TEMPERATURE,
        metric=setting.metric,
        seed=setting.seed,
        batch_size=setting.batch_size,
    )
    expansion = linearise(parts, len(examples), seed=setting.seed)
    joint: Int[Tensor, "gone"] = greedy(expansion, torch.ones(n, dtype=torch.bool), n - size).cpu()
    alone = expansion.matrix.double().square().sum(0).argsort(stable=True)[: n - size].cpu()
    candidates = list(known)
    for gone in (joint, alone):
        mask = torch.ones(n, dtype=torch.bool)
        mask[gone] = False
        candidates.append(Circuit(reduction.units, mask))
    removals = [removing(reduction, one, examples) for one in candidates]
    risks = measured(model, removals, examples, replace(setting, bootstrap=0)).mean
    return candidates[int(risks.argmin())]


def _fewest(found: Measured, most: int, tolerance: float) -> int:
    """The least number of groups that no larger one undercuts by more than the tolerance and one standard error."""
    for count in range(1, most):
        gains = found.mean[count - 1] - found.mean[count:most]
        errors = (found.drawn[:, count - 1, None] - found.drawn[:, count:most]).std(0)
        if bool((gains - errors.nan_to_num() <= tolerance).all()):
            return count
    return most


def _cross(
    model: Model,
    reduction: Reduction,
    circuits: Sequence[Circuit],
    groups: Int[Tensor, "n"],
    whole: Circuit,
    examples: Examples,
    setting: Setting,
) -> tuple[Float[Tensor, "groups groups"], float, Interval]:
    """The mean risk of every circuit on the examples of every group (NaN where it has none), and by how much each
    group's own circuit lowers the risk of ``whole``, over all examples."""
    many = len(circuits)
    choices = torch.full((len(groups), many * many + 2), -1)
    for group in range(many):
        choices[groups == group, group * many : (group + 1) * many] = torch.arange(many)
    choices[:, -2], choices[:, -1] = groups, many
    removals = [removing(reduction, one, examples) for one in (*circuits, whole)]
    found = assigned(model, removals, choices, examples, setting)
    shares = torch.bincount(groups, minlength=many).double() / len(groups)
    gain, interval = found.rise(len(found.mean) - 1, len(found.mean) - 2)
    return found.mean[:-2].reshape(many, many) / torch.where(shares > 0, shares, torch.nan)[:, None], gain, interval
