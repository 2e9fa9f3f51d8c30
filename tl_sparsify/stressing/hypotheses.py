"""Hypothesis tests: equivalence, independence and minimality of Shi et al. (arXiv 2410.13032), each beside a control.

With ``s`` an example's score, ``M`` the model and ``C`` the circuit, the null hypotheses are

    equivalence    |Pr(s(C) > s(M)) - 1/2| <= 0.1: the circuit outperforms the model as often as the other way round;
    independence   s(M) is independent of s(the model without C), by the Hilbert-Schmidt criterion and permutations;
    minimality     each unit of C changes the score by more than a unit added at random does, nine times in ten.

A small p-value refutes the circuit. A large one says nothing by itself: the control shows what the test can refute.

Where they go wrong, we say so instead of repairing them in silence. Equivalence asks who wins and not by how much, so
that a circuit which is worse by a millionth of a nat on every example is refuted: the line "equivalence beyond the
tolerance" counts differences within it as half a win. Independence fails where both scores depend on which answer is
right, whatever the circuit (the true circuits of two planted tasks are refuted): the line "independence, given the
answer" permutes within the examples of one answer. Neither says whether what is left can do the task: a silent backup
that takes over is independent of the model's score, given the answer.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import gathered
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_index, answer_logits, answer_rows, check_call, shared_batches
from tl_sparsify.core.intervene import intervened
from tl_sparsify.core.metrics import by_example, log_odds, measured_by
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.stressing.measuring import Removal, Setting, added, alike, removing, without
from tl_sparsify.stressing.minimality import with_idle
from tl_sparsify.stressing.table import Stand, StressRow

EPSILON, QUANTILE, LEVEL = 0.1, 0.9, 0.05
"""The paper's: how far from a half equivalence may be, how often a unit must beat a random one, and the level."""
_PERMUTATIONS, _MOST = 1000, 512  # of the independence test, and examples that it takes (its memory is their square)
_ROUND_OFF = 1e-6


def hypotheses(
    model: Model, reduction: Reduction, examples: Examples, setting: Setting, *, most: int = 64
) -> tuple[StressRow, ...]:
    """The three tests with their p-values. The score is ``setting.metric``, or the log odds of the right answer.

    A test fails where its null hypothesis is refuted at level 0.05. It holds where it is not, *and* its control is: a
    random circuit of as many units of each kind in each layer (equivalence), what is left without such a circuit
    (independence), the circuit with an idle unit added on purpose (minimality).

    Args:
        most: units of the circuit that minimality tests, drawn at random; p-values are Bonferroni's for so many.

    Cost: one forward pass for each unit tested, and about ``2 setting.draws + 7`` more. Memory: a number for each
    example and tested unit; the square of at most 512 examples.
    """
    check_call(model, examples, seed=setting.seed, batch_size=setting.batch_size)
    circuit = reduction.circuit
    if not 0 < len(circuit) < len(circuit.units):
        return ()
    other = alike(circuit, setting.seed, 0)
    kept = circuit.mask.nonzero().flatten()
    tested = kept[_random.uniform(setting.seed, 127, kept).argsort(stable=True)[:most].sort().values].tolist()
    gone = (~circuit.mask).nonzero().flatten()
    drawn = gone[_random.uniform(setting.seed, 131, gone).argsort(stable=True)[: max(1, setting.draws)]].tolist()
    with counted(model) as passes:
        padded = with_idle(model, reduction, examples, 1, setting).circuit
        removals = [removing(reduction, part, examples) for part in (circuit, other, ~circuit, ~other)]
        removals += [removing(reduction, without(circuit, [unit]), examples) for unit in tested]
        removals += [removing(reduction, added(circuit, [unit]), examples) for unit in drawn]
        removals += [removing(reduction, padded, examples)]
        scores, answers = _scored(model, removals, examples, setting)
    whole, mine, theirs, rest, other_rest = scores[:, :5].T
    changes = (scores[:, 5:] - mine[:, None]).abs().mean(0)
    of_units, of_random, of_idle = changes[: len(tested)], changes[len(tested) : -1], changes[-1:]
    cost = (len(scores), passes["forward"] / len(scores))
    rows: list[StressRow] = []
    for beyond, case in ((_ROUND_OFF, "equivalence"), (setting.tolerance, "equivalence beyond the tolerance")):
        share, p = equivalence(mine - whole, beyond)
        there, q = equivalence(theirs - whole, beyond)
        claim = "circuit and model outperform each other equally often"
        rows.append(_row(case, claim, share, there, p, q, "share", cost))
    for given, case in ((None, "independence"), (answers, "independence, given the answer")):
        found, p = independence(whole, rest, setting.seed, given)
        there, q = independence(whole, other_rest, setting.seed, given)
        claim = "without the circuit, the score does not depend on the model's"
        rows.append(_row(case, claim, found, there, p, q, "HSIC", cost))
    p, least = minimal(of_units, of_random)
    q, idle = minimal(of_idle, of_random)
    name = circuit.units.names[tested[least]]
    claim = "every unit changes more than one added at random"
    value, control = float(of_units[least]), float(of_idle[idle])
    row = _row("minimality", claim, value, control, p, q, "score", cost, f"least of all {name}")
    return (*rows, row)


def _row(
    case: str,
    claim: str,
    value: float,
    control: float,
    p: float,
    q: float,
    unit: str,
    cost: tuple[int, float],
    told: str = "",
) -> StressRow:
    stand, why = Stand.HOLDS, "not refuted, and the control is"
    if p < LEVEL:
        stand, why = Stand.FAILS, "refuted"
    elif q >= LEVEL:
        stand, why = Stand.UNKNOWN, "not refuted, but nor is the control"
    nan = math.nan
    return StressRow(
        row="hypotheses",
        case=case,
        claim=claim,
        value=value,
        low=nan,
        high=nan,
        control=control,
        control_low=nan,
        control_high=nan,
        unit=unit,
        stand=stand,
        because=f"{why}; {told}" if told else why,
        n=cost[0],
        forward=cost[1],
        backward=0.0,
        p_value=p,
        control_p_value=q,
    )


def _scored(
    model: Model, removals: list[Removal], examples: Examples, setting: Setting
) -> tuple[Float[Tensor, "n columns"], Int[Tensor, "n"]]:
    """Each example's score in the model and under each removal, and its (first) right answer."""
    metric = log_odds if setting.metric is None else setting.metric
    found: list[Tensor] = []
    with torch.no_grad():
        for index, batch in shared_batches(model, examples, setting.batch_size):
            columns = [by_example(measured_by(metric, answer_logits(model, batch), batch), batch)]
            for removal in removals:
                with intervened(model, removal(index)):
                    columns.append(by_example(measured_by(metric, answer_logits(model, batch), batch), batch))
            example, _ = answer_rows(batch)
            first = torch.searchsorted(example.contiguous(), torch.arange(len(batch)))
            found.append(torch.cat([torch.stack(columns, 1).double().cpu(), answer_index(batch)[first, None].cpu()], 1))
    both = torch.cat(gathered(found, len(examples)))
    return both[:, :-1], both[:, -1].long()


def equivalence(difference: Float[Tensor, "n"], beyond: float) -> tuple[float, float]:
    """The share of examples on which a circuit outperforms the model (differences up to ``beyond`` are half a win), and
    the p-value of ``|share - 1/2| <= 0.1``: of at least so uneven a count at its edge, by the binomial distribution."""
    n = len(difference)
    wins = (difference > beyond).double() + (difference.abs() <= beyond).double() / 2
    share = float(wins.mean())
    k = torch.arange(n + 1, dtype=torch.float64)
    extreme = (k / n - 0.5).abs() >= abs(share - 0.5) - 1e-12
    return share, float(_binomial(n, 0.5 + EPSILON)[extreme].sum().clamp_max(1))


def _binomial(n: int, p: float) -> Float[Tensor, "counts"]:
    """The probability of each count from 0 to ``n``."""
    k = torch.arange(n + 1, dtype=torch.float64)
    total = torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))
    return (total - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)).exp()


def independence(
    one: Float[Tensor, "n"], two: Float[Tensor, "n"], seed: int, group: Int[Tensor, "n"] | None = None
) -> tuple[float, float]:
    """The Hilbert-Schmidt independence criterion of two scores (Gretton et al., 2007; Gaussian kernels as wide as each
    score's median distance) and its p-value by 1,000 permutations, within the ``group`` of each example where given. Of
    more than 512 examples the first 512.
    """
    one, two = (_levelled(score[:_MOST]) for score in (one, two))
    n, group = len(one), None if group is None else group[:_MOST]
    mine, theirs = _features(one), _features(two)
    mine = mine - mine.mean(0)
    orders = _random.bits(seed, 137, torch.arange(_PERMUTATIONS)[:, None], torch.arange(n)).argsort(dim=1, stable=True)
    if group is not None:
        by_group = orders.gather(1, group[orders].argsort(dim=1, stable=True))
        orders = torch.empty_like(orders)
        orders[:, group.argsort(stable=True)] = by_group
    found = float((mine.T @ theirs).square().sum())
    parts = (torch.einsum("nr,bns->brs", mine, theirs[some]).square().sum((1, 2)) for some in orders.split(50))
    drawn = torch.cat(list(parts))
    least = int((drawn >= found - _ROUND_OFF * abs(found)).sum())
    return found / max(1, n - 1) ** 2, (1 + least) / (1 + _PERMUTATIONS)


def _levelled(score: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Without differences that are round-off."""
    return (score / _ROUND_OFF).round() * _ROUND_OFF if float(score.std()) > _ROUND_OFF else torch.zeros_like(score)


def _features(score: Float[Tensor, "n"]) -> Float[Tensor, "n features"]:
    """Features whose inner products are the Gaussian kernel of a score: few, as its eigenvalues fall fast."""
    apart = (score[:, None] - score).abs()
    positive = apart[apart > 0]
    width = float(positive.median()) if len(positive) else 1.0
    size, vectors = torch.linalg.eigh((-apart.square() / (2 * width**2)).exp())
    enough = size > 1e-10 * size.max()
    return vectors[:, enough] * size[enough].sqrt()


def minimal(effects: Float[Tensor, "units"], at_random: Float[Tensor, "draws"]) -> tuple[float, int]:
    """The least p-value, times the number of units (Bonferroni), that a unit's effect exceeds nine in ten of those at
    random: of at most so many exceeded, by the binomial distribution; and which unit's."""
    beaten = (effects[:, None] > at_random * (1 + _ROUND_OFF) + _ROUND_OFF).sum(1)
    below = _binomial(len(at_random), QUANTILE).cumsum(0)[beaten] * len(effects)
    worst = int(torch.where(below == below.min(), effects, torch.inf).argmin())
    return float(below[worst].clamp_max(1)), worst
