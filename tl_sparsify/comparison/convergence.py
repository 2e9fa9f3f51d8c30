"""Convergence: the refit that a comparison gives every circuit, from the same start until it gains nothing more.

A fixed number of steps favours circuits whose constants were fitted on the way; run to its end, the refit leaves only
the circuits to differ.
"""

from __future__ import annotations

from typing import Any

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import Known, known_of
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model
from tl_sparsify.search import constants

_MOST = 10**5


@checked
def refit_until_converged(
    model: Model,
    reduction: Reduction,
    train: Examples,
    validation: Examples,
    *,
    patience: int = 300,
    most: int = 6000,
    per_step: int | None = 128,
    batch_size: int | None = None,
    seed: int = 0,
    known: Known | None = None,
    progress: bool = False,
) -> Reduction:
    """Refit all replacements (:func:`constants.refit`) until ``patience`` steps have not lowered the validation risk by
    two percent, at a constant learning rate; then half as many steps in which it falls to zero.

    A circuit of few units starts from a network that answers at random, and may stay there for hundreds of steps
    before its constants find a way out: a circuit of 5 % of ``hierarchical_equality`` is at .691 nats after the usual
    300 steps, and at .029 with a patience of 300 (.014 with 600).

    Args:
        most: steps before the learning rate falls, converged or not.
        per_step: examples in a step; ``None``: all of ``train``.
        known: what such refits of the same model, on the same examples and units, have in common
            (:func:`measure.known_of`); worked out here where not given.

    Raises:
        ValueError: no step, and what :func:`constants.refit` raises.

    Passes: those of the steps that were taken (a forward and a backward pass over ``per_step`` examples), one forward
    pass over ``validation`` for every tenth of ``patience`` steps, and where nothing is ``known`` two over ``train``.

    Example:
        >>> fitted = tls.refit_until_converged(model, reduction, train, validation, patience=2, most=20)
        >>> tls.risk(model, fitted, validation).mean < tls.risk(model, reduction, validation).mean
        True
    """
    check_count("patience", patience, most=_MOST)
    check_count("most", most, most=_MOST)
    check_fingerprint(model, reduction)
    if known is None:
        known = known_of(model, train, reduction.units, clean=True, many=True, batch_size=batch_size)
    shared: dict[str, Any] = {"per_step": per_step, "batch_size": batch_size, "known": known, "progress": progress}
    found = constants.refit(model, reduction, train, validation, steps=most, patience=patience, seed=seed, **shared)
    last = max(1, min(patience, most) // 2)
    return constants.refit(model, found, train, validation, steps=last, seed=seed + 1, **shared)
