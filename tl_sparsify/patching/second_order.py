"""Attribution to second order, by Hessian-vector products.

With ``m(keep)`` the metric, ``g`` its gradient and ``H`` its Hessian with respect to ``keep`` at the clean run,
removing the set ``S`` lowers the metric by about ``sum_S g - 1/2 sum_SS H``. A Hessian-vector product is a
second backward pass through the first:

    joint[u] = g[u] - 1/2 (H 1)[u]        its share of removing all units (the direction from clean to ablated);
    alone[u] = g[u] - 1/2 H[u, u]         removing it alone; ``H[u, u]`` is the mean of ``z[u] (H z)[u]`` over signs.

After Zhang and Wang (arXiv 2606.09899), who correct attribution patching by a Hessian-vector product along the patch.
Their exact estimator was not at hand: these two are the second-order term itself, not a copy of their code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, frozen, shared_batches
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.memory import device_of, keep_dtype_of
from tl_sparsify.core.metrics import Metric, by_example, log_odds, measured_by
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.attribution import Source, replaced_by
from tl_sparsify.search.scores import Scores


@checked
def second_order(
    model: Model,
    examples: Examples,
    units: Units,
    *,
    direction: Literal["joint", "alone"] = "joint",
    draws: int = 4,
    values: Values | None = None,
    source: Source = "constant",
    metric: Metric = log_odds,
    seed: int = 0,
    batch_size: int | None = None,
) -> Scores:
    """The drop of ``metric`` when a unit is removed, to second order: :func:`score.gradient` less half the Hessian
    along the removal (after arXiv 2606.09899): signed, in units of the metric. Any units, edges too.

    Args:
        direction: ``joint``: each unit's share of removing all of them, which sum to that drop to second order.
            ``alone``: removing each by itself, its own curvature estimated from random signs.
        draws: of signs, for ``alone``.
        values, source, metric: as in :func:`score.gradient`.

    One forward and two backward passes over the data (``1 + draws`` for ``alone``); one forward more for the means or
    the other run. Memory: twice that of a gradient.

    Raises:
        ValueError: as :func:`score.gradient`; another ``direction``, or ``draws`` below one.

    Example:
        >>> found = tls.baselines.second_order(model, train, units)
        >>> found.forward_passes, found.backward_passes
        (2, 2)
    """
    check_count("draws", draws, most=MOST)
    if direction not in ("joint", "alone"):
        raise ValueError(f"direction is {direction!r}; it is joint or alone")
    replacement, passes = replaced_by(model, examples, units, values, source, seed, batch_size)
    products = 1 if direction == "joint" else draws

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, examples, batch_size, units):
            here = units.for_examples(index, examples.spans)
            constants = Values(here, replacement(index).tensors)
            signs = _signs(direction, products, index, len(units), seed)
            yield Moments.of(_drops(model, batch, here, constants, metric, signs))

    total = Moments.over(parts(), len(examples))
    name = f"second order, {direction}"
    return Scores(units, total.mean, total.stderr, name, "units of the metric", 1 + passes, 1 + products)


def _signs(
    direction: str, products: int, index: Int[Tensor, "batch"], n: int, seed: int
) -> Float[Tensor, "products batch units"]:
    """The directions of Hessian-vector products: all units at once, or random signs for each example."""
    if direction == "joint":
        return torch.ones(1, len(index), n, dtype=torch.float64)
    return torch.stack(
        [_random.signs(seed, 71, index[:, None], torch.arange(n)[None], draw) for draw in range(products)]
    )


def _drops(
    model: Model,
    batch: Examples,
    units: Units,
    values: Values,
    metric: Metric,
    signs: Float[Tensor, "products batch units"],
) -> Float[Tensor, "batch units"]:
    """The gradient of each example's metric less half its mean products with the Hessian, by sign."""
    keep = torch.ones(len(batch), len(units), dtype=keep_dtype_of(model), device=device_of(model)).requires_grad_()
    with frozen(model), torch.enable_grad():
        with intervened(model, Intervention(units, keep, values, first_token="bos")):
            logits = answer_logits(model, batch)
        value = by_example(measured_by(metric, logits, batch), batch).sum()
        (slopes,) = torch.autograd.grad(value, keep, create_graph=True)
        bend = torch.zeros_like(slopes, dtype=torch.float64)
        for number, sign in enumerate(signs.to(slopes)):
            again = number < len(signs) - 1
            (product,) = torch.autograd.grad(
                (slopes * sign).sum(), keep, retain_graph=again, allow_unused=True, materialize_grads=True
            )
            bend += (sign * product).double() / len(signs)
    return slopes.detach().double() - bend / 2
