"""Probes against explicit Jacobians, explicit Fisher matrices and finite differences, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import (
    bridge,
    examples,
    fisher,
    fresh,
    inputs,
    jacobian,
    linear,
    random_mask,
    reduction_of,
    seeded,
    softened,
    unchanged,
    units_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.metrics import divergence, fisher_probes, kl, log_odds, metric_probe
from tl_sparsify.core.probes import Derivatives, Samples, output_derivatives, samples, vectors_of
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.expansion.linearisation import joint_moments, linearise

CHOICES = (1, 4, 7, 8)
SEEDS = st.integers(0, 2**31)


def original(model: Any, data: Examples) -> Tensor:
    with torch.no_grad():
        return answer_logits(model, data)


def ablated(model: Any, data: Examples, reduction: Reduction) -> Tensor:
    with torch.no_grad(), intervened(model, ablate(reduction)):
        return answer_logits(model, data)


def one(batches: Any) -> Samples:
    [batch] = batches
    return batch


def rows_of(batch: Examples) -> Tensor:
    return torch.arange(len(batch))


# The probes on the logits


@given(st.integers(2, 6), st.floats(0.1, 300), st.floats(0.5, 4), SEEDS)
def test_exact_probes_factor_the_fisher_matrix(k: int, scale: float, temperature: float, seed: int):
    batch = inputs(4, choices=k)
    logits = torch.randn(4, k, generator=seeded(seed), dtype=torch.float64) * scale
    found = fisher_probes(logits, batch, rows_of(batch), probes=k - 1, temperature=temperature, seed=seed)
    assert len(found) == k - 1
    total = sum(xi[:, :, None] * xi[:, None, :] for xi in found)
    torch.testing.assert_close(total, fisher(logits, temperature), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", list(itertools.permutations([0.0, -200.0, -800.0])))
def test_exact_probes_of_a_certain_model_are_finite(dtype: torch.dtype, order: tuple[float, ...]):
    batch, logits = inputs(1), torch.tensor([order], dtype=dtype)
    found = fisher_probes(logits, batch, rows_of(batch), probes=4, temperature=1.0, seed=0)
    assert all(xi.isfinite().all() for xi in found)
    total = sum(xi[:, :, None] * xi[:, None, :] for xi in found)
    torch.testing.assert_close(total, fisher(logits), rtol=1e-5, atol=1e-30)


def test_sampled_probes_are_gradients_of_log_probabilities():
    batch = inputs(200, choices=9)
    logits = torch.randn(200, 9, generator=seeded(0), dtype=torch.float64)
    p = (logits / 2).softmax(1)
    found = fisher_probes(logits, batch, rows_of(batch), probes=4, temperature=2.0, seed=0)
    drawn = torch.stack([(2 * xi + p).argmax(1) for xi in found])
    for xi, answer in zip(found, drawn, strict=True):
        torch.testing.assert_close(2 * xi, torch.nn.functional.one_hot(answer, 9).double() - p)
    assert (drawn[0] != drawn[1]).any()  # probes are drawn one by one


def test_second_moments_of_sampled_probes_are_the_fisher_matrix_on_average():
    batch = inputs(3000, choices=7)
    logits = torch.randn(1, 7, generator=seeded(1), dtype=torch.float64).expand(3000, 7)
    found = fisher_probes(logits, batch, rows_of(batch), probes=3, temperature=1.0, seed=0)
    moments = torch.cat([xi[:, :, None] * xi[:, None, :] * 3 for xi in found])
    error = (moments.mean(0) - fisher(logits[0])).abs() / (moments.std(0) / len(moments) ** 0.5)
    assert error.max() < 5


def test_sampled_answers_have_a_probability():
    batch = inputs(50, choices=9)
    logits = torch.full((50, 9), -1000.0, dtype=torch.float32)
    logits[:, [2, 5]] = 3.0
    found = fisher_probes(logits, batch, rows_of(batch), probes=2, temperature=1.0, seed=0)
    assert {int(xi.argmax()) for probe in found for xi in probe} == {2, 5}


# The slope and the Hessian in as few vectors as hold both


def held(found: Derivatives, batch: Examples) -> Tensor:
    """The slope that the vectors add up to, one row for each labelled position."""
    example, _ = answer_rows(batch)
    return sum(w[example, None] * v.double() for w, v in zip(found.slope, found.vectors, strict=True))


def derivatives(z: Tensor, here: Tensor, batch: Examples, probes: int, temperature: float = 1.0, **more: Any) -> Any:
    settings: dict[str, Any] = {"temperature": temperature, "metric": None, "seed": 3} | more
    return output_derivatives(z, here, batch, rows_of(batch), probes=probes, **settings)


@given(st.integers(2, 9), st.integers(1, 5), st.floats(0.1, 3), st.floats(0.5, 4), SEEDS)
def test_the_vectors_hold_the_slope(k: int, probes: int, scale: float, temperature: float, seed: int):
    batch = inputs(4, choices=k)
    z, here = scale * torch.randn(2, 4, k, generator=seeded(seed), dtype=torch.float64)
    found = derivatives(z, here, batch, probes, temperature)
    slope = temperature * ((here / temperature).softmax(1) - (z / temperature).softmax(1))
    torch.testing.assert_close(held(found, batch), slope, rtol=1e-9, atol=1e-12)
    assert len(found.vectors) == (k - 1 if k - 1 <= probes else max(2, probes)) == vectors_of(k, probes)
    assert found.probes == (1 if k - 1 > probes == 1 else len(found.vectors))


@pytest.mark.parametrize("shift", [1.0, 1e-3, 0.0])
def test_a_sampled_round_has_the_slope_as_a_probe_and_the_fisher_matrix_on_average(shift: float):
    batch, n = inputs(4000, choices=7), 4000
    one_z, one_here = torch.randn(2, 1, 7, generator=seeded(1), dtype=torch.float64)
    here = one_here.expand(n, 7)
    found = derivatives(one_here + shift * (one_z - one_here), here, batch, 3)
    first, *others = found.vectors
    f = fisher(one_here[0])
    part = first[0][:, None] * first[0][None]
    assert float(torch.linalg.eigvalsh(f - part)[0]) > -1e-12  # a part of the Fisher matrix, and no more
    assert (first == first[0]).all() and len(others) == 2
    moments = sum(xi[:, :, None] * xi[:, None, :] for xi in found.vectors)
    error = (moments.mean(0) - f).abs() / (moments.std(0) / n**0.5).clamp_min(1e-12)
    assert error.max() < 5
    dual = torch.linalg.pinv(f)
    whole = float(first[0] @ dual @ first[0])
    assert whole == pytest.approx(1.0 if shift else 0.0, abs=1e-5 if shift != 1e-3 else 0.9)
    assert all((xi @ dual @ first[0]).abs().max() < 1e-2 for xi in others) or shift == 1e-3


def test_a_slope_of_rounding_is_no_direction():
    batch = inputs(50, choices=9)
    z = torch.randn(50, 9, generator=seeded(0))
    plain = fisher_probes(z, batch, rows_of(batch), probes=3, temperature=1.0, seed=3)
    found = derivatives(z, z + 1e-7 * torch.randn(50, 9, generator=seeded(1)), batch, 4)
    for xi, expected in zip(found.vectors[1:], plain, strict=True):
        torch.testing.assert_close(xi, expected, rtol=1e-5, atol=1e-6)
    assert float(found.vectors[0].abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("probes", [2, 4])
def test_vanishing_probabilities_take_a_vector_for_the_slope(dtype: torch.dtype, probes: int):
    batch = inputs(2, choices=3)
    here = torch.tensor([[0.0, -300.0, -900.0], [0.0, 1.0, 2.0]], dtype=dtype)
    z = here.flip(1)
    found = derivatives(z, here, batch, probes)
    assert (len(found.vectors), found.probes) == (3, 2)
    torch.testing.assert_close(held(found, batch), (here.softmax(1) - z.softmax(1)).double(), rtol=1e-6, atol=1e-7)
    many = derivatives(z.repeat(1, 3), here.repeat(1, 3), inputs(2, choices=9), probes)  # sampled
    assert all(xi.isfinite().all() for xi in many.vectors)
    expected = here.repeat(1, 3).double().softmax(1) - z.repeat(1, 3).double().softmax(1)
    torch.testing.assert_close(held(many, batch), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("probes", "vectors"), [(2, 3), (3, 3), (9, 3)])
@pytest.mark.parametrize("metric", [None, log_odds])
def test_several_answers_hold_the_slope(probes: int, vectors: int, metric: Any):
    data = examples(12, answers=3, choices=(3, 6))
    z, here = torch.randn(2, 36, 2, generator=seeded(2), dtype=torch.float64)
    found = derivatives(z, here, data, probes, metric=metric, most=3)
    slope = (here.softmax(1) - z.softmax(1)) / 3
    if metric is not None:
        change = log_odds(here, data) - log_odds(z, data)
        slope = torch.autograd.functional.jacobian(lambda logits: (change * log_odds(logits, data)).sum() / 3, here)
    torch.testing.assert_close(held(found, data), slope)
    assert (len(found.vectors), found.probes) == (vectors, min(probes, 3))
    assert vectors == vectors_of(2, probes, 3)


# Effects, linear terms and predicted risks against the explicit Jacobian


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("choices", [CHOICES, None], ids=["choices", "every token"])
def test_exact_effects_are_the_jacobian_under_the_fisher_matrix(temperature: float, choices: Any):
    model, data = bridge(), examples(5, choices=choices)
    reduction = reduction_of(model)
    found = one(samples(model, data, reduction, probes=10, temperature=temperature, seed=1)).effects
    assert len(found) == (3 if choices else 10)
    j, f = jacobian(model, data, reduction), fisher(original(model, data), temperature)
    expected = torch.einsum("nau,nab,nbw->nuw", j, f, j)
    torch.testing.assert_close(torch.einsum("knu,knw->nuw", found, found), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_samples_at_an_ablated_model_are_the_expansion_there(temperature: float):
    model, data, t = bridge(), examples(6, choices=CHOICES), temperature
    current = reduction_of(model, random_mask(units_of(model), 2, 0.6))
    z, here = original(model, data), ablated(model, data, current)
    found = one(samples(model, data, current, current=current, temperature=t, seed=1))
    j, f = jacobian(model, data, current, current), fisher(here, t)
    slope = t * ((here / t).softmax(1) - (z / t).softmax(1))  # of t^2 KL at temperature t
    torch.testing.assert_close(found.offset, t * t * kl(z / t, here / t))
    torch.testing.assert_close(found.linear, torch.einsum("na,nau->nu", slope, j))
    expected = torch.einsum("nau,nab,nbw->nuw", j, f, j)
    torch.testing.assert_close(torch.einsum("knu,knw->nuw", found.effects, found.effects), expected)
    gone = ~current.circuit.mask
    assert found.offset.min() > 0 and (found.linear[:, gone] == 0).all() and (found.effects[..., gone] == 0).all()


@given(SEEDS)
@settings(max_examples=8)
def test_joint_moments_are_the_expansion_of_every_set(seed: int):
    model, data = bridge(), examples(4, seed, choices=CHOICES)
    current = reduction_of(model, random_mask(units_of(model), seed, 0.7), seed)
    removed = random_mask(units_of(model), seed + 1)
    z, here = original(model, data), ablated(model, data, current)
    step = jacobian(model, data, current, current)[..., removed].sum(2)
    slope = here.softmax(1) - z.softmax(1)
    expected = kl(z, here) + (slope * step).sum(1) + torch.einsum("na,nab,nb->n", step, fisher(here), step) / 2
    batches = list(samples(model, data, current, current=current, seed=seed))
    found = joint_moments(iter(batches), removed)
    assert float(found.mean) == pytest.approx(float(expected.mean()), rel=1e-10)
    assert float(found.stderr) == pytest.approx(float(expected.std() / 2), rel=1e-8)
    sketch = linearise(iter(batches), len(data), seed=0)
    assert not sketch.projected and sketch.predicted(removed) == pytest.approx(float(expected.mean()), rel=1e-10)


def test_several_answers_are_kept_apart_by_random_signs():
    model, data = bridge(), examples(40, answers=2, choices=(3, 6))
    reduction = reduction_of(model)
    found = one(samples(model, data, reduction, probes=1, seed=1)).effects
    p = original(model, data).softmax(1).reshape(40, 2, 2)
    alone = jacobian(model, data, reduction).reshape(40, 2, 2, -1)
    each = p.prod(2).sqrt()[..., None] * (alone[:, :, 0] - alone[:, :, 1])  # one probe is exact for two answers
    same = torch.isclose(found[0].abs(), (each[:, 0] + each[:, 1]).abs() / 2**0.5).all(1)
    opposite = torch.isclose(found[0].abs(), (each[:, 0] - each[:, 1]).abs() / 2**0.5).all(1)
    assert len(found) == 1 and (same | opposite).all()
    assert same.sum() > 8 and opposite.sum() > 8


@pytest.mark.parametrize(("probes", "passes"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_more_probes_keep_several_answers_further_apart_and_as_many_as_answers_are_exact(probes: int, passes: int):
    model, data = bridge(), examples(40, answers=3, choices=(3, 6))
    reduction = reduction_of(model)
    found = one(samples(model, data, reduction, probes=probes, seed=1)).effects
    p = original(model, data).softmax(1).reshape(40, 3, 2)
    alone = jacobian(model, data, reduction).reshape(40, 3, 2, -1)
    each = p.prod(2).sqrt()[..., None] * (alone[:, :, 0] - alone[:, :, 1])  # one probe is exact for two answers
    exact = each.square().sum(1) / 3
    assert len(found) == passes
    wrong = (found.square().sum(0) - exact).abs().mean() / exact.mean()
    assert float(wrong) < 1e-12 if probes >= 3 else 0.01 < float(wrong)
    fewer = one(samples(model, data, reduction, probes=1, seed=1)).effects.square().sum(0)
    assert float(wrong) < float((fewer - exact).abs().mean() / exact.mean()) or probes == 1


def test_examples_with_few_and_with_many_answers_have_as_many_probes_in_every_batch():
    model, data = bridge(), examples(12, answers=3, choices=(3, 6))
    labels = data.labels.clone()
    for row in labels[:6]:
        row[(row != -100).nonzero()[1:]] = -100
    data = replace(data, labels=labels)
    reduction = reduction_of(model)
    whole = one(samples(model, data, reduction, probes=2, seed=1)).effects
    parts = list(samples(model, data, reduction, probes=2, seed=1, batch_size=5))
    torch.testing.assert_close(torch.cat([part.effects for part in parts], 1), whole, rtol=1e-10, atol=1e-14)
    assert not whole[1, :6].any() and whole[1, 6:].any()  # one answer: one probe says all


def test_the_linear_term_is_a_finite_difference():
    model, data, step = bridge(act_fn="gelu"), examples(5, choices=CHOICES), 1e-5
    current = reduction_of(model, random_mask(units_of(model), 2, 0.6))
    z = original(model, data)
    found = one(samples(model, data, current, current=current)).linear
    for unit in range(0, len(current.units), 3):
        keep = torch.ones(len(current.units), dtype=torch.float64)
        values = []
        for change in (step, -step):
            with torch.no_grad():
                keep[unit] = 1 - change
                values.append(kl(z, softened(model, data, current, keep, current)))
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), found[:, unit], rtol=1e-6, atol=1e-9)


@given(SEEDS)
@settings(max_examples=5)
def test_a_small_joint_step_makes_its_predicted_divergence(seed: int):
    model, data, step = bridge(act_fn="gelu"), examples(4, seed, choices=CHOICES), 1e-4
    reduction = reduction_of(model, seed=seed)
    removed = random_mask(units_of(model), seed + 1) | (torch.arange(len(reduction.units)) == 0)
    predicted = one(samples(model, data, reduction)).effects[..., removed].sum(2).square().sum(0) / 2
    with torch.no_grad():
        measured = kl(original(model, data), softened(model, data, reduction, 1 - step * removed.double(), None))
    torch.testing.assert_close(measured / step**2, predicted, rtol=0.02, atol=1e-6)


def test_a_scalar_metric_has_one_probe():
    model, data = bridge(), examples(6, choices=CHOICES)
    current = reduction_of(model, random_mask(units_of(model), 2, 0.6))
    z, here = original(model, data), ablated(model, data, current)
    found = one(samples(model, data, current, current=current, metric=log_odds, seed=4))
    gradient = torch.autograd.functional.jacobian(lambda logits: log_odds(logits, data).sum(), here)
    expected = torch.einsum("na,nau->nu", gradient, jacobian(model, data, current, current))
    assert len(found.effects) == 1
    torch.testing.assert_close(found.effects[0].abs(), expected.abs())
    deviation = log_odds(here, data) - log_odds(z, data)
    torch.testing.assert_close(found.offset, deviation.square() / 2)
    torch.testing.assert_close(found.linear, deviation[:, None] * expected)
    [probe] = metric_probe(here, data, rows_of(data), metric=log_odds, seed=4)
    torch.testing.assert_close(probe.abs(), gradient.abs())


def test_units_at_positions_count_there_only():
    model, data = bridge(), examples(6, choices=CHOICES)
    where = torch.tensor([0, 3, 1, 4, 4, 2])
    everywhere = units_of(model)
    by_position = [
        jacobian(model, data, reduction_of(model, units=everywhere.at(position), mask=random_mask(everywhere)))
        for position in range(5)
    ]
    f = fisher(original(model, data))
    for units, j in [
        (everywhere.at(2), by_position[2]),
        (everywhere.at((1, 4)), by_position[1] + by_position[4]),
        (everywhere.at(slice(0, 3)), by_position[0] + by_position[1] + by_position[2]),
        (everywhere.at(where), torch.stack([by_position[p][i] for i, p in enumerate(where.tolist())])),
    ]:
        reduction = reduction_of(model, units=units, mask=random_mask(units))
        found = torch.cat([part.effects for part in samples(model, data, reduction, batch_size=4)], 1)
        torch.testing.assert_close(found.square().sum(0), torch.einsum("nau,nab,nbu->nu", j, f, j))


# The matrix of a split


def made_up(n: int, k: int, units: int, seed: int) -> list[Samples]:
    generator = seeded(seed)
    effects = torch.randn(k, n, units, generator=generator, dtype=torch.float64)
    linear = torch.randn(n, units, generator=generator, dtype=torch.float64)
    offset = torch.rand(n, generator=generator, dtype=torch.float64)
    parts = torch.arange(n).split(7)
    return [Samples(part, offset[part], linear[part], effects[:, part], offset[part]) for part in parts]


def test_a_projection_keeps_joint_risks_on_average():
    parts, removed = made_up(60, 3, 8, 0), torch.arange(8) % 3 > 0
    exact = linearise(iter(parts), 60, seed=0)
    projected = [linearise(iter(parts), 60, seed=seed, height=64) for seed in range(50)]
    assert exact.matrix.shape == (180, 8) and not exact.projected
    assert all(sketch.projected and sketch.matrix.shape == (64, 8) for sketch in projected)
    found = torch.tensor([sketch.predicted(removed) for sketch in projected], dtype=torch.float64)
    assert (found.mean() - exact.predicted(removed)).abs() < 5 * found.std() / 50**0.5
    assert 0 < found.std() < 0.5 * exact.predicted(removed)
    assert all(torch.equal(sketch.linear, exact.linear) for sketch in projected[:3])


def test_the_expansion_of_a_split_is_the_mean_of_its_samples():
    parts = made_up(20, 2, 5, 3)
    sketch = linearise(iter(parts), 20, seed=0)
    offset = torch.cat([part.offset for part in parts])
    linear = torch.cat([part.linear for part in parts])
    effects = torch.cat([part.effects for part in parts], 1)
    for bits in itertools.product([False, True], repeat=5):
        gone = torch.tensor(bits)
        each = offset + linear[:, gone].sum(1) + effects[..., gone].sum(2).square().sum(0) / 2
        assert sketch.predicted(gone) == pytest.approx(float(each.mean()), rel=1e-12)
        assert float(joint_moments(iter(parts), gone).mean) == pytest.approx(float(each.mean()), rel=1e-12)


# What is refused, and what is left behind


@pytest.mark.parametrize("name, value", [("probes", 0), ("temperature", 0.0), ("temperature", float("nan"))])
def test_wrong_settings_are_refused(name: str, value: float):
    model = bridge()
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        next(samples(model, examples(), reduction_of(model), **settings))


def test_the_model_leaves_as_it_came_in():
    model, data = fresh(), examples(4)
    model.embed.requires_grad_(False)
    reduction = reduction_of(model)
    with unchanged(model):
        list(samples(model, data, reduction, current=reduction, batch_size=3))
    with unchanged(model):
        batches = samples(model, data, reduction, batch_size=1)
        next(batches)  # and no more of them
        assert all(p.requires_grad for p in model.unembed.parameters())
        batches.close()

    def broken(logits: Tensor, batch: Examples) -> Tensor:
        raise RuntimeError("no such metric")

    with unchanged(model), pytest.raises(RuntimeError, match="no such metric"):
        next(samples(model, data, reduction, current=reduction, metric=broken))


def test_samples_need_no_gradients_of_the_caller():
    model, data = linear(), inputs()
    reduction = reduction_of(model, units=model.units)
    expected = one(samples(model, data, reduction)).effects
    with torch.no_grad():
        assert torch.equal(one(samples(model, data, reduction)).effects, expected)
    assert not expected.requires_grad


def test_divergence_is_zero_at_the_original_model():
    model, data = bridge(), examples(4, choices=CHOICES)
    full = Reduction(Circuit.full(units_of(model)), reduction_of(model).values)
    found = one(samples(model, data, full, current=full))
    z = original(model, data)
    assert divergence(z, z, data).abs().max() == 0
    torch.testing.assert_close(found.offset, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found.linear, torch.zeros_like(found.linear))
    torch.testing.assert_close(found.effects, one(samples(model, data, full)).effects)
