"""Second-order risk against slow references: explicit Jacobians for every kind of unit, the order of its remainder, and
statistics that are streamed, projected or taken in half precision."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.kinds import KINDS
from helpers.models import bridge, examples, fisher, fresh, random_mask, reduction_of, softened, units_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify import constants, score
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import kl
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.expansion.linearisation import joint_moments, linearise

CHOICES = (1, 4, 7, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_risk_of_every_kind_of_unit_is_half_its_explicit_jacobian_under_the_fisher_matrix(kind: str):
    model, data = bridge(act_fn="gelu"), examples(6, 3, choices=CHOICES)
    units = KINDS[kind](model)
    values = constants.mean(model, data, units)
    found = score.risk(model, data, units, values=values)
    expected = torch.zeros(len(units), dtype=torch.float64)
    for i in range(len(data)):
        one, here = data[i : i + 1], units.for_examples(torch.tensor([i]))
        alone = Reduction(Circuit.full(here), type(values)(here, values.tensors))

        def logits(keep: torch.Tensor, one=one, alone=alone) -> torch.Tensor:
            return softened(model, one, alone, keep, None)[0]

        change = torch.func.jacrev(logits)(torch.ones(len(units), dtype=torch.float64))
        with torch.no_grad():
            f = fisher(answer_logits(model, one)[0])
        expected += torch.einsum("au,ab,bu->u", change, f, change) / 2 / len(data)
    torch.testing.assert_close(found.scores, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_fn", ["gelu", "relu"])
def test_the_estimate_converges_to_the_measured_risk_to_third_order(seed: int, act_fn: str):
    """Every removed unit goes the share ``s`` of its way: the estimate is ``s**2`` times the risk, and what is left is
    of the order of ``s**3``. A ReLU that is passed on the way bends the line; steps are small enough for none."""
    model, data = fresh(seed, act_fn=act_fn), examples(8, seed, choices=CHOICES)
    reduction = reduction_of(model, seed=seed)
    removed = random_mask(units_of(model), seed + 1)
    predicted = float(joint_moments(samples(model, data, reduction), removed).mean)
    steps = [2.0**-k for k in range(8, 13)] if act_fn == "relu" else [2.0**-k for k in range(3, 9)]
    left: list[float] = []
    with torch.no_grad():
        original = answer_logits(model, data)
        for step in steps:
            measured = kl(original, softened(model, data, reduction, 1 - step * removed.double(), None)).mean()
            left.append(abs(float(measured) - step**2 * predicted))
    x = torch.tensor([math.log(step) for step in steps], dtype=torch.float64)
    y = torch.tensor(left, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope > 2.7
    assert left[-1] < 0.2 * steps[-1] ** 2 * predicted


@given(st.integers(0, 2**31), st.integers(1, 11))
@settings(max_examples=6)
def test_statistics_are_exact_under_splitting(seed: int, batch_size: int):
    model, data = bridge(), examples(11, seed)
    reduction = reduction_of(model, seed=seed)
    whole = linearise(samples(model, data, reduction, seed=seed), len(data), seed=seed)
    split = linearise(samples(model, data, reduction, seed=seed, batch_size=batch_size), len(data), seed=seed)
    torch.testing.assert_close(split.matrix.T @ split.matrix, whole.matrix.T @ whole.matrix, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(split.linear, whole.linear, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32_or_better(dtype: torch.dtype):
    """A thousand times the same two examples: in half precision the sum of so many would stop growing."""
    model = bridge(dtype=dtype)
    few = examples(2, choices=CHOICES)
    many = few[torch.arange(2000) % 2]
    units = units_of(model)
    values = constants.mean(model, few, units)
    assert all(tensor.dtype == torch.float32 for tensor in values.tensors)
    once = score.risk(model, few, units, values=values).scores
    often = score.risk(model, many, units, values=values, batch_size=64).scores
    assert often.dtype == torch.float64
    torch.testing.assert_close(often, once, rtol=0.05, atol=1e-6)
    repeated = constants.mean(model, many, units, batch_size=64)
    for one, two in zip(values.tensors, repeated.tensors, strict=True):
        torch.testing.assert_close(one, two, rtol=0.02, atol=1e-3)
    sketch = linearise(samples(model, many, Reduction(Circuit.full(units), values), batch_size=64), 2000, seed=0)
    assert sketch.matrix.dtype == torch.float32 and sketch.projected


def test_what_the_projection_costs():
    """Beyond 1,024 rows: the relative error of joint risks of random sets, against the exact statistics."""
    model, data = bridge(), examples(700, choices=CHOICES)
    reduction = reduction_of(model)
    errors: list[float] = []
    exact = linearise(samples(model, data, reduction), len(data), seed=0, height=10_000)
    assert len(exact.matrix) == 2100 and not exact.projected
    for seed in range(20):
        sketch = linearise(samples(model, data, reduction), len(data), seed=seed)
        assert sketch.projected and len(sketch.matrix) == 1024
        removed = random_mask(units_of(model), seed)
        errors.append(abs(sketch.predicted(removed) / exact.predicted(removed) - 1))
    spread = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    assert 0 < spread < 2 * (2 / 1024) ** 0.5  # a Gaussian projection of this height has the root of 2 / 1024
    assert max(errors) < 0.2
