"""All stress tests of a circuit, as one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify.comparison.resampling import check_bootstrap
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model, check_positions
from tl_sparsify.stressing.alternatives import alternatives
from tl_sparsify.stressing.hypotheses import hypotheses
from tl_sparsify.stressing.measuring import Setting
from tl_sparsify.stressing.mechanisms import Mechanisms, mechanisms
from tl_sparsify.stressing.minimality import minimality
from tl_sparsify.stressing.specificity import specificity
from tl_sparsify.stressing.table import Stress, StressRow
from tl_sparsify.stressing.templates import across_templates
from tl_sparsify.stressing.worst_case import worst_case

_OWN = "its affine replacements are fitted for this circuit alone: give a reduction with constants"
_NOTHING = "the circuit keeps no unit, or every one"
_PLACED = (
    "its units have a position for each example, and parts of the examples or other ones are run: name a span, which "
    "every split has of its own"
)
_OTHERS = "no examples of other tasks: give others={name: examples}"
_TEMPLATES = "no templates: give templates=[the template of each example]"


@dataclass(frozen=True)
class _Given:
    """What the tests are made of."""

    model: Model
    reduction: Reduction
    examples: Examples
    setting: Setting
    train: Examples | None
    others: Mapping[str, Examples] | None
    templates: Sequence[Any] | None


_Test = Callable[[_Given], "tuple[StressRow, ...] | Mechanisms | str"]
_WHOLE = ("hypotheses",)  # tests that run all examples as they are, and no others
_TESTS: dict[str, _Test] = {  # a test's lines (in what else it found), or why it is left out
    "worst case": lambda g: worst_case(g.model, g.reduction, g.examples, g.setting, train=g.train),
    "alternatives": lambda g: alternatives(g.model, g.reduction, g.examples, g.setting, train=g.train),
    "minimality": lambda g: (
        _OWN if g.reduction.mixing else minimality(g.model, g.reduction, g.examples, g.setting, train=g.train)
    ),
    "hypotheses": lambda g: _OWN if g.reduction.mixing else hypotheses(g.model, g.reduction, g.examples, g.setting),
    "mechanisms": lambda g: (
        _OWN if g.reduction.mixing else mechanisms(g.model, g.reduction, g.examples, g.setting, train=g.train)
    ),
    "specificity": lambda g: (
        _OTHERS
        if not g.others
        else _OWN
        if g.reduction.mixing
        else specificity(g.model, g.reduction, g.examples, g.others, g.setting)
    ),
    "templates": lambda g: (
        _TEMPLATES
        if g.templates is None
        else _OWN
        if g.reduction.mixing
        else across_templates(g.model, g.reduction, g.examples, g.templates, g.setting)
    ),
}
ROWS = tuple(_TESTS)


@checked
def stress(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    rows: Sequence[str] = ROWS,
    train: Examples | None = None,
    others: Mapping[str, Examples] | None = None,
    templates: Sequence[Any] | None = None,
    tolerance: float = 0.01,
    draws: int = 20,
    bootstrap: int = 1000,
    level: float = 0.95,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Stress:
    """Put a circuit through tests that it can fail, each beside a control that can fail, too.

    A line ``holds`` or ``fails`` where its interval lies on one side of the claim and its control behaved; everything
    else is ``cannot tell``. A test whose data are not given is left out and named in ``left_out`` with the reason. What
    each asks, how it can fail and what it costs: docs/stress.md.

    Args:
        reduction: the circuit and its constants. Where these were refitted, alternatives are refitted as well.
        examples: what is reported on; none of them should have been used to find the circuit.
        rows: the tests: ``worst case``, ``alternatives`` (arXiv 2605.12671), ``minimality``, ``hypotheses`` (arXiv
            2410.13032), ``mechanisms`` (arXiv 2605.09129; groups and cross-risks are in ``details``), ``specificity``
            (arXiv 2605.08348), ``templates``.
        train: what masks, units and alternatives are chosen on. Where not given, every other one of ``examples`` is,
            and the rest is reported on.
        others: examples of other tasks by name.
        templates: of each example, the template that it was made from.
        tolerance: in nats (half squared units of ``metric``); what counts as no difference.
        draws: random circuits of a control.
        bootstrap: replicates of an interval over examples.
        level: of the intervals.
        metric: half its squared error instead of the KL divergence.

    Cost: a few hundred forward and about two hundred backward passes in all; the table says what each line took. Memory
    does not grow with the examples, but for a number for each example and tested unit (``hypotheses``).

    Raises:
        ValueError: a model in training mode, a reduction of another model or of counterfactual values, an unknown test,
            a tolerance that is not positive, fewer than four examples without ``train``, templates that are not one for
            each example, positions of other examples.

    Example:
        >>> tls.stress(model, reduction, test, rows=("minimality",), draws=5, bootstrap=100)
        Stress(minimality (one unit) ..., minimality (a pair) ...)
    """
    check_call(model, examples, seed=seed, batch_size=batch_size)
    check_fingerprint(model, reduction)
    check_bootstrap(bootstrap, level)
    check_count("draws", draws, most=MOST)
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}; it must be positive: 0.01 nats, say")
    for row in rows:
        if row not in _TESTS:
            raise ValueError(f"rows holds {row!r}; there are {', '.join(_TESTS)}")
    if reduction.values.paired:
        raise ValueError(
            "reduction sets removed units to their values on counterfactual inputs, and the tests need constants: "
            "dataclasses.replace(reduction, values=tls.constants.mean(model, train, units))"
        )
    check_positions(reduction.units, len(examples))
    placed = any(isinstance(site.positions, Tensor) for site in reduction.units.sites)
    setting = Setting(tolerance, draws, bootstrap, level, metric, seed, batch_size)
    given = _Given(model, reduction, examples, setting, train, others, templates)
    lines: list[StressRow] = []
    left_out: dict[str, str] = {}
    details: dict[str, Any] = {}
    for row in dict.fromkeys(rows):
        found = _PLACED if placed and row not in _WHOLE else _TESTS[row](given)
        if isinstance(found, Mechanisms):
            found, details[row] = found.rows, found
        if isinstance(found, str) or not found:
            left_out[row] = found if isinstance(found, str) else _NOTHING
        else:
            lines.extend(found)
    return Stress(tuple(lines), left_out, details, tolerance, level)
