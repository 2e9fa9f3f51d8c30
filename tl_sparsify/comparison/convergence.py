"""Convergence: the refit that a comparison gives every circuit, from the same start until it gains nothing more.

A fixed number of steps favours circuits whose constants were fitted on the way; run to its end, the refit leaves only
the circuits to differ.
"""

from __future__ import annotations

from typing import Any

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.search import constants

FALL = 0.02  # a block that lowers the validation risk by a smaller share has converged
_NOTHING = 1e-6  # nats: a risk as low as that is at its end
_MANY = 10_000


@checked
def refit_until_converged(
    model: Model,
    reduction: Reduction,
    train: Examples,
    validation: Examples,
    *,
    block: int = 100,
    most: int = 20,
    per_step: int | None = 128,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Reduction, int, bool]:
    """Refit all replacements (:func:`constants.refit`) in blocks of steps, until a block lowers the validation risk by
    less than two percent (or that risk is below a millionth of a nat).

    Args:
        block: steps in a block; each has a learning rate that falls to zero.
        most: blocks, converged or not.
        per_step: examples in a step; ``None``: all of ``train``.

    Returns:
        The reduction, how many steps were taken, and whether it has converged.

    Raises:
        ValueError: no step or block, and what :func:`constants.refit` raises.

    Passes: those of :func:`constants.refit` for each block, and one forward pass of each model over ``validation``.

    Example:
        >>> fitted, steps, converged = tls.refit_until_converged(model, reduction, train, validation, block=10, most=2)
        >>> steps, tls.risk(model, fitted, validation).mean < tls.risk(model, reduction, validation).mean
        (20, True)
    """
    check_count("block", block, most=_MANY)
    check_count("most", most, most=_MANY)
    judging: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    before = risk(model, reduction, validation, **judging).mean
    for number in range(most):
        fitting: dict[str, Any] = {"steps": block, "per_step": per_step, "batch_size": batch_size, "progress": progress}
        reduction = constants.refit(model, reduction, train, validation, seed=seed + number, **fitting)
        now = risk(model, reduction, validation, **judging).mean
        if now > before * (1 - FALL) or now < _NOTHING:
            return reduction, (number + 1) * block, True
        before = now
    return reduction, most * block, False
