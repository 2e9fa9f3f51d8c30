"""Learned masks: the gates against their definitions, and training against what is known to be needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import (
    EXCLUSIVE_OR,
    TwoLayers,
    bridge,
    examples,
    exclusive_or,
    exclusive_or_inputs,
    fresh,
    linear,
    planted,
    random_values,
    seeded,
    unchanged,
    unchecked,
    units_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import baselines, constants
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import run_values
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units, heads
from tl_sparsify.masking.gates import relative_to_size, soft_top_k
from tl_sparsify.masking.hard_concrete import hard_concrete
from tl_sparsify.masking.top_k_gate import top_k_gate
from tl_sparsify.search.scores import Scores

METHODS = pytest.mark.parametrize("method", [hard_concrete, top_k_gate], ids=lambda method: method.__name__)
Method = Callable[..., Scores]

# Gates


@given(st.integers(0, 2**31), st.integers(2, 40), st.floats(0.05, 4), st.lists(st.floats(0.01, 0.99), min_size=1))
def test_soft_gates_sum_to_k_and_keep_the_order(seed: int, n: int, temperature: float, shares: list[float]):
    logits = 3 * torch.randn(n, generator=seeded(seed), dtype=torch.float64)
    k = n * torch.tensor(shares, dtype=torch.float64)
    gates = soft_top_k(logits, k, temperature)
    assert gates.shape == (len(k), n) and bool(((gates >= 0) & (gates <= 1)).all())
    assert torch.allclose(gates.sum(1), k, rtol=1e-9, atol=1e-12)
    assert bool((gates[:, logits.argsort()].diff(dim=1) >= 0).all())
    steep = soft_top_k(logits, torch.tensor([float(n // 2)], dtype=torch.float64), 1e-4)[0]
    assert bool(((steep > 0.5) == (logits > logits.sort().values[n - n // 2 - 1])).all()) or n < 2


def test_all_gates_are_open_at_all_units_and_no_others_are_refused():
    logits = torch.randn(5, generator=seeded(0), dtype=torch.float64)
    assert torch.allclose(soft_top_k(logits, torch.tensor([5.0]), 0.5), torch.ones(1, 5, dtype=torch.float64))
    for k in (0.0, 5.1):
        with pytest.raises(ValueError, match="it must be positive and at most 5"):
            soft_top_k(logits, torch.tensor([k]), 0.5)


@given(st.integers(0, 2**31), st.floats(0.2, 3))
def test_the_gradient_goes_through_the_threshold(seed: int, temperature: float):
    logits = torch.randn(6, generator=seeded(seed), dtype=torch.float64).requires_grad_()
    k = torch.tensor([0.5, 2.0, 5.5], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_top_k(x, k, temperature), logits)
    for u in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[u] = 1e-5
        with torch.no_grad():
            slope = soft_top_k(logits + step, k, temperature) - soft_top_k(logits - step, k, temperature)
        assert torch.allclose(jacobian[..., u], slope / 2e-5, rtol=1e-4, atol=1e-7)
    assert bool((jacobian.sum(1).abs() < 1e-9).all())  # the sum stays k


def gates_of(method: Method, units: int = 40, n: int = 64, **settings: Any) -> Tensor:
    """The gates of the first step: units of value 1 that are replaced by 0 and read one by one."""
    eye = torch.eye(units, dtype=torch.float64)
    model = TwoLayers(torch.ones(1, units, dtype=torch.float64), eye)
    batch = Examples(torch.ones(n, 1, dtype=torch.float64), torch.zeros(n, 1, dtype=torch.long))
    zero = Values(model.units, (torch.zeros(units, 1, dtype=torch.float64),))
    seen: list[Tensor] = []

    def metric(logits: Tensor, batch: Examples) -> Tensor:
        seen.append(logits.detach())
        return logits.sum(1)

    method(model, batch, model.units, steps=1, per_step=n, values=zero, metric=metric, **settings)
    whole, gated = seen
    assert bool((whole == 1).all())
    return gated


def test_hard_concrete_gates_are_stretched_and_clipped_logistic_draws():
    gates = gates_of(hard_concrete, n=2000)  # 0.01 is five standard errors
    assert bool(((gates >= 0) & (gates <= 1)).all()) and len(gates.unique(dim=0)) == 2000
    beta, start = 2 / 3, 2.0

    def above(level: float) -> float:  # P(gate > level)
        inside = (level + 0.1) / 1.2
        return 1 / (1 + math.exp(beta * math.log(inside / (1 - inside)) - start))

    for level in (0.0, 0.3, 0.9):
        assert float((gates > level).double().mean()) == pytest.approx(above(level), abs=0.01)
    assert float((gates == 1).double().mean()) == pytest.approx(above(1.0), abs=0.01)  # exactly open
    assert float((gates == 0).double().mean()) == pytest.approx(1 - above(0.0), abs=0.01)  # exactly closed
    assert not torch.equal(gates, gates_of(hard_concrete, n=2000, seed=1))


def test_top_k_gates_have_sizes_from_the_smallest_to_all_evenly_by_logarithm():
    sizes = torch.cat([gates_of(top_k_gate, smallest=0.1, seed=seed).sum(1)[:8] for seed in range(40)])
    assert float(sizes.min()) >= 4 and float(sizes.max()) <= 40  # of 40 units
    place = (sizes / 4).log() / math.log(10)
    assert float(place.mean()) == pytest.approx(0.5, abs=0.02) and float(place.std()) == pytest.approx(0.289, abs=0.02)
    first = gates_of(top_k_gate)
    assert torch.equal(first[:8], first[8:16]) and len(first[:8].sum(1).unique()) == 8


@pytest.mark.parametrize(("n", "per_step"), [(12, 4), (64, 64), (16, 256)])
def test_examples_take_large_and_small_sizes_in_turn_whatever_their_number_in_a_step(n: int, per_step: int):
    """Where a step takes them all, each of them takes all eight sizes."""
    units = 40
    model = TwoLayers(torch.ones(1, units, dtype=torch.float64), torch.eye(units, dtype=torch.float64))
    inputs = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    batch = Examples(inputs, torch.zeros(n, 1, dtype=torch.long))
    zero = Values(model.units, (torch.zeros(units, 1, dtype=torch.float64),))
    sizes: dict[int, set[int]] = {}  # of each example, in eighths of the way from 4 to 40 by logarithm

    def metric(logits: Tensor, batch: Examples) -> Tensor:
        for gated, value in zip(logits.detach(), batch.tokens[:, 0].tolist(), strict=True):
            place = math.log(float(gated.sum()) / value / 4) / math.log(10)
            sizes.setdefault(round(value), set()).add(min(7, int(8 * place)))
        return logits.sum(1)

    settings: dict[str, Any] = {"values": zero, "metric": metric, "smallest": 0.1, "learning_rate": 1e-9}
    top_k_gate(model, batch, model.units, steps=60, per_step=per_step, **settings)
    assert len(sizes) == n and set.union(*sizes.values()) == set(range(8))
    assert per_step < n or all(len(found) == 8 for found in sizes.values())


def test_a_mask_may_be_trained_at_all_units_alone():
    for units in (3, 100):
        assert bool((gates_of(top_k_gate, units=units, n=8, smallest=1.0) > 1 - 1e-6).all())


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_relative_weights_are_those_of_the_logarithms(seed: int, n: int, scale: float):
    """Of a first step: examples take eight sizes in turn, and each size's mean counts by its logarithm."""
    found = torch.rand(n, generator=seeded(seed), dtype=torch.float64) * scale + 0.1 * scale
    found.requires_grad_()
    size = torch.arange(n) % 8
    logs = [(size == one).sum() * found[size == one].mean().log() for one in size.unique()]
    (slope,) = torch.autograd.grad(torch.stack(logs).sum(), found)
    assert torch.allclose(relative_to_size()(found, 0), slope, rtol=1e-12)


def test_relative_weights_follow_a_running_level_and_stay_finite():
    weights = relative_to_size()
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.0])
    assert torch.allclose(1 / weights(levels, 0), torch.cat([levels[:7], torch.tensor([8e-5])]))
    assert torch.allclose(1 / weights(2 * levels, 1)[:7], 1.1 * levels[:7])
    assert bool((relative_to_size()(torch.zeros(3), 0) * 0 == 0).all())


# Training


@METHODS
def test_what_is_needed_is_kept(method: Method):
    """Also where units that are needed only beside each other cost more, alone, than one that is needed."""
    model, batch = exclusive_or(), exclusive_or_inputs()
    settings = {"penalty": 3.0} if method is hard_concrete else {}
    found = method(model, batch, model.units, steps=150, learning_rate=0.2, progress=False, **settings)
    assert set(found.top(2 / 8).names) == set(EXCLUSIVE_OR)
    assert found.scores.shape == (8,) and bool(found.stderr.isnan().all())


@METHODS
@pytest.mark.parametrize("kept", [("L0H0", "L1N2"), ("L0N1", "L1H1")])
def test_the_planted_units_have_the_greatest_logits(method: Method, kept: tuple[str, ...]):
    model, batch = planted(kept), examples(32)
    found = method(model, batch, units_of(model), steps=50, learning_rate=0.2)
    assert set(found.top(2 / 14).names) == set(kept)


@METHODS
def test_the_same_seed_trains_the_same_mask(method: Method):
    model, batch = bridge(), examples(20)
    first, again, other = (method(model, batch, units_of(model), steps=6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.scores, again.scores) and not torch.equal(first.scores, other.scores)


def test_one_step_follows_the_gradient():
    """Adam's first step moves every logit by the learning rate, against its gradient."""
    model, batch = bridge(), examples(16)
    units = units_of(model)
    found = top_k_gate(model, batch, units, steps=1, per_step=16, learning_rate=0.01).scores
    assert torch.allclose(found.abs(), torch.full_like(found, 0.01), rtol=1e-3)
    more, less = (
        hard_concrete(model, batch, units, steps=1, per_step=16, learning_rate=0.01, penalty=penalty).scores - 2
        for penalty in (1e6, 0.0)
    )
    assert bool((more < 0).all()) and bool((less > 0).any())  # the penalty closes gates


def test_divergence_relative_to_its_size_is_another_training_and_finds_the_same_planted_units():
    model, batch = planted(("L0H0", "L1N2")), examples(32)
    units, settings = units_of(model), {"steps": 50, "learning_rate": 0.2}
    plain, relative = (top_k_gate(model, batch, units, relative=given, **settings) for given in (False, True))
    assert plain.top(2 / 14) == relative.top(2 / 14) and not torch.equal(plain.scores, relative.scores)


def test_the_penalty_sets_how_many_gates_close():
    model, batch = bridge(), examples(32)
    low, high = (
        hard_concrete(model, batch, units_of(model), steps=30, learning_rate=0.1, penalty=penalty).scores
        for penalty in (0.01, 3.0)
    )
    assert bool((high < low).all())


@METHODS
def test_the_best_on_held_out_examples_is_returned(method: Method):
    model, batch, held_out = bridge(), examples(24), examples(40, seed=5)
    units = units_of(model)
    values = constants.mean(model, batch, units)
    settings: dict[str, Any] = {"learning_rate": 0.5, "values": values, "per_step": 8, "steps": 20}

    def judged(scores: Scores) -> float:
        circuits = [scores.top(fraction) for fraction in (0.5, 0.2, 0.1, 0.05, 0.02)]
        return sum(risk(model, Reduction(circuit, values), held_out).mean for circuit in circuits)

    last = method(model, batch, units, **settings)
    best = method(model, batch, units, held_out=held_out, **settings)
    assert judged(best) <= judged(last)
    alone, judged_alone = (
        method(model, batch, units, **settings | {"steps": 1}, held_out=given) for given in (None, held_out)
    )
    assert torch.equal(alone.scores, judged_alone.scores)


@METHODS
def test_a_metric_takes_the_place_of_the_divergence(method: Method):
    """Units 0 and 1 speak of the first answer, the others of the second."""
    w_out = torch.zeros(4, 2, dtype=torch.float64)
    w_out[:2, 0], w_out[2:, 1] = 1, 1
    model = TwoLayers(torch.randn(3, 4, generator=seeded(0), dtype=torch.float64), w_out)
    batch = Examples(torch.randn(64, 3, generator=seeded(1), dtype=torch.float64), torch.zeros(64, 1, dtype=torch.long))
    settings = {"steps": 60, "learning_rate": 0.2, "metric": lambda logits, batch: logits[:, 1]}
    assert set(method(model, batch, model.units, **settings).top(0.5).names) == {"L0N2", "L0N3"}


# Passes, and the model


@METHODS
@pytest.mark.parametrize(("steps", "per_step"), [(None, 20), (7, 6), (3, 100)])
def test_passes_are_counted_as_they_were_made(method: Method, steps: int | None, per_step: int):
    model, batch = fresh(), examples(20)
    rows = {"fwd": 0, "bwd": 0}

    def count(tensor: Tensor, hook: Any, direction: str) -> None:
        rows[direction] += len(tensor)

    for direction in rows:
        model.add_hook(
            "blocks.1.hook_resid_post",
            lambda tensor, hook, direction=direction: count(tensor, hook, direction),
            dir=direction,
        )
    found = method(model, batch, units_of(model), steps=steps, per_step=per_step)
    assert math.ceil(rows["fwd"] / 20) == found.forward_passes
    assert math.ceil(rows["bwd"] / 20) == found.backward_passes
    if steps is None:
        assert (found.forward_passes, found.backward_passes) == (82, 80)
    given = method(model, batch, units_of(model), steps=1, per_step=20, values=random_values(units_of(model)))
    assert given.forward_passes == 2


@METHODS
def test_the_model_is_left_as_it_came_in(method: Method):
    model, batch = fresh(), examples(10)
    state = torch.get_rng_state()
    with unchanged(model):
        method(model, batch, units_of(model), steps=2)
    with unchanged(model), pytest.raises(ValueError, match="NaN or infinite"):
        nothing = random_values(units_of(model))
        broken = Values(nothing.units, tuple(tensor * float("nan") for tensor in nothing.tensors))
        method(model, batch, units_of(model), steps=2, values=broken)
    assert torch.equal(torch.get_rng_state(), state)


@METHODS
def test_units_at_positions_are_masked_there(method: Method):
    model, batch = bridge(), examples(10, answers=2)
    each = torch.arange(10) % 5
    for units in (heads(model).at(4), heads(model).at(each)):
        found = method(model, batch, units, steps=3)
        assert found.units == units and bool(found.scores.isfinite().all())


@METHODS
def test_what_cannot_be_trained_is_refused_by_name(method: Method):
    model, batch = bridge(), examples(10)
    units = units_of(model)
    for settings, message in [
        ({"steps": 0}, "steps is 0; at least one is needed"),
        ({"per_step": 0}, "per_step is 0; at least one is needed"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        ({"values": run_values(model, batch, units)}, "give constants for"),
        ({"values": constants.mean(model, batch, heads(model))}, r"give constants for Units\(14"),
    ]:
        with pytest.raises(ValueError, match=message), unchecked():
            method(model, batch, units, **settings)
    with pytest.raises(ValueError, match="training mode"):
        method(fresh().train(), batch, units)


def test_settings_of_one_method_are_checked():
    network = linear()
    batch = replace(examples(4), tokens=torch.ones(4, 4, dtype=torch.float64), counterfactual_tokens=None)
    for method, settings, message in [
        (hard_concrete, {"penalty": -1.0}, "penalty is -1.0; it must not be negative"),
        (top_k_gate, {"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        (top_k_gate, {"smallest": 0.0}, r"smallest is 0.0; it must lie in \(0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            method(network, batch, Units(network.units.sites), **settings)


def test_the_names_are_reached_from_baselines():
    assert (baselines.hard_concrete, baselines.top_k_gate) == (hard_concrete, top_k_gate)
