"""The laws of the library, 7 to 12: risk on a linear model, rescaling, interchange with oneself, refusals, search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kinds import close
from helpers.models import (
    EXCLUSIVE_OR,
    bridge,
    examples,
    exclusive_or,
    exclusive_or_inputs,
    fresh,
    inputs,
    linear,
    planted,
    random_mask,
    reduction_of,
    seeded,
    unchanged,
    units_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import constants, score
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import run_values
from tl_sparsify.core.intervene import Intervention, interchange, intervened
from tl_sparsify.core.measure import risk
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads
from tl_sparsify.expansion.linearisation import Linearisation, joint_moments, linearise
from tl_sparsify.expansion.selection import greedy
from tl_sparsify.folding.fold import fold
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.settings import Probing

SEEDS = st.integers(0, 2**31)
N = 8


# 7. For a linear model and a quadratic divergence, predicted risks equal the measured ones.


def difference(logits: Tensor, batch: Examples) -> Tensor:
    return logits[:, 0] - 2 * logits[:, 1] + 0.5 * logits[:, 2]


def without(reduction: Reduction, mask: Tensor) -> Reduction:
    return reduction.with_circuit(Circuit(reduction.units, reduction.circuit.mask & ~mask))


def test_law_7_risk_of_one_unit_is_measured_risk_on_a_linear_model():
    model, data = linear(), inputs()
    values = constants.mean(model, data, model.units)
    scores = score.risk(model, data, model.units, metric=difference)
    full = Reduction(Circuit.full(model.units), values)
    for unit, predicted, stderr in zip(model.units.names, scores.scores, scores.stderr, strict=True):
        alone = without(full, Circuit.of(model.units, [unit]).mask)
        measured = risk(model, alone, data, metric=difference)
        assert (measured.mean, measured.stderr) == pytest.approx((float(predicted), float(stderr)), rel=1e-12)


@given(SEEDS)
@settings(max_examples=10)
def test_law_7_joint_risk_is_measured_risk_on_a_linear_model(seed: int):
    model, data = linear(seed=seed % 1000), inputs(seed=seed)
    current = reduction_of(model, random_mask(model.units, seed, 0.7), seed, model.units)
    removed = random_mask(model.units, seed + 1)
    predicted = joint_moments(samples(model, data, current, current=current, metric=difference), removed)
    sketch = linearise(samples(model, data, current, current=current, metric=difference), len(data), seed=0)
    measured = risk(model, without(current, removed), data, metric=difference)
    assert float(predicted.mean) == pytest.approx(measured.mean, rel=1e-10, abs=1e-12)
    assert float(predicted.stderr) == pytest.approx(measured.stderr, rel=1e-9, abs=1e-12)
    assert sketch.predicted(removed) == pytest.approx(measured.mean, rel=1e-10, abs=1e-12)


def test_law_7_every_round_predicts_what_is_measured_on_a_linear_model():
    model, data = linear(12), inputs(30)
    path = sparsify(model, data, model.units, rounds=6, smallest=0.1, metric=difference, progress=False)
    assert len(path.rounds) >= 4 and path.rounds[-1].measured.mean > 0.1
    for step in path.rounds:
        assert step.predicted.mean == pytest.approx(step.measured.mean, rel=1e-10)
        assert step.predicted.stderr == pytest.approx(step.measured.stderr, rel=1e-9)


# 8. Rescaling a ReLU neuron and its reader changes no risk and no selection.


def rescaled(model: Any, factors: Tensor) -> Any:
    """The same function: each neuron times its factor, its reader divided by it."""
    with torch.no_grad():
        for block, factor in zip(model.blocks, factors, strict=True):
            getattr(block.mlp, "in").original_component.weight.mul_(factor[:, None])
            getattr(block.mlp, "in").original_component.bias.mul_(factor)
            block.mlp.out.original_component.weight.div_(factor)
    return model


def test_law_8_rescaling_a_neuron_changes_no_risk_and_no_selection():
    factors = torch.exp(torch.randn(2, 5, generator=seeded(0), dtype=torch.float64) * 3)
    data, answers = examples(N), []
    for model in (fresh(), rescaled(fresh(), factors)):
        units = units_of(model)
        path = sparsify(model, data, units, rounds=4, smallest=0.2, progress=False)
        refitted = constants.refit(model, path.at(0.4), data, data, steps=5, progress=False)
        answers.append(
            {
                "logits": model(data.tokens),
                "risk": score.risk(model, data, units).scores,
                "measured": torch.tensor([r.measured.mean for r in path.rounds], dtype=torch.float64),
                "refitted": torch.tensor(risk(model, refitted, data).mean, dtype=torch.float64),
                "order": path.order,
                "variance": score.variance(model, data, units).order,
            }
        )
    one, two = answers
    assert torch.equal(one["order"], two["order"])
    for name, tolerance in (("logits", 1e-12), ("risk", 1e-11), ("measured", 1e-10), ("refitted", 1e-6)):
        assert close(one[name], two[name], tolerance), name
    assert not torch.equal(one["variance"], two["variance"])  # which is what variance is fooled by


# 9. Interchanging with oneself changes nothing, in both models.


def test_law_9_interchange_with_oneself_changes_nothing():
    model, data = bridge(), examples()
    small: Any = fold(model, reduction_of(model, random_mask(units_of(model), 4)))
    for one in (model, small):
        units = units_of(one)
        with torch.no_grad(), unchanged(one):
            expected = one(data.tokens)
            source = run_values(one, data, units)
            with intervened(one, interchange(Circuit.full(units), source)):
                assert torch.equal(one(data.tokens), expected)
            softly = torch.rand(len(data), len(units), generator=seeded(1))
            with intervened(one, Intervention(units, softly, source)):
                torch.testing.assert_close(one(data.tokens), expected, rtol=1e-12, atol=1e-12)
            with intervened(one, interchange(Circuit.full(units), run_values(one, examples(seed=9), units))):
                assert not torch.allclose(one(data.tokens), expected)


def test_law_9_an_example_that_is_its_own_partner_has_its_plain_risk():
    model, data = bridge(), examples(1)
    reduction = reduction_of(model)
    certain = InterventionDistribution.interchange(1.0)
    itself = Examples(data.tokens, data.labels, counterfactual_tokens=data.tokens)
    plain = risk(model, reduction, data).mean
    assert plain > 1e-3
    assert risk(model, reduction, data, interventions=certain).mean == pytest.approx(plain, rel=1e-12)
    paired = InterventionDistribution.interchange(1.0, "counterfactual")
    assert risk(model, reduction, itself, interventions=paired).mean == pytest.approx(plain, rel=1e-12)


# 10. A cycle, a missing mechanism, an unknown unit: refused by name.


def test_law_10_unknown_units_are_refused_by_name():
    units = units_of(bridge())
    for name, says in [
        ("L7H0", "layer 7 has 0"),
        ("L1H2", "layer 1 has 2 of kind head"),
        ("third head", "no unit name"),
    ]:
        for look_up in (lambda name: units[name], lambda name: Circuit.of(units, [name]), units.index):
            with pytest.raises(KeyError, match=f"{name}.*{says}"):
                look_up(name)
    with pytest.raises(KeyError, match="L2H1"):
        Circuit.of(units, [heads(bridge(n_layers=3))["L2H1"]])  # a unit of another model


def test_law_10_cycles_and_missing_mechanisms_are_refused_by_name():
    with pytest.raises(ValueError, match="left"):
        CausalModel(("a",), {"left": lambda right: right, "right": lambda left: left}, "left")
    with pytest.raises(ValueError, match="missing"):
        CausalModel(("a",), {"left": lambda missing: missing}, "left")


# 11. On a hand-built network whose circuit is known, search returns exactly that circuit.


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_law_11_search_finds_exclusive_or(rounds: int):
    model, data = exclusive_or(), exclusive_or_inputs(64)
    known = Circuit.of(model.units, EXCLUSIVE_OR)
    path = sparsify(model, data, model.units, rounds=rounds, smallest=0.25, progress=False)
    assert path.at(0.25).circuit == known
    assert path.within(model, data, 1e-12).circuit == known
    assert score.risk(model, data, model.units).top(0.25) != known  # no order by single units finds it
    assert score.variance(model, data, model.units).top(0.25) != known


@pytest.mark.parametrize(
    "kept", [("L0H1", "L0N3", "L1H0", "L1N2"), ("L1H1",), ("L0N0", "L0N4", "L1N0", "L1N1", "L1N3")]
)
def test_law_11_search_finds_planted_units(kept: tuple[str, ...]):
    model, data = planted(kept), examples(24)
    units = units_of(model)
    path = sparsify(model, data, units, rounds=5, smallest=len(kept) / len(units), progress=False)
    assert path.at(len(kept) / len(units)).circuit == Circuit.of(units, kept)
    assert path.within(model, data, 1e-12).circuit == Circuit.of(units, kept)
    assert path.rounds[-1].measured.mean <= 1e-12


# 12. Size never matters to the order; no predicted divergence is negative; more examples never make a path worse.


@given(SEEDS, st.integers(2, 300), st.sampled_from([1, 3, 16, 2048]))
def test_law_12_any_number_of_units_and_any_pool_leave_one_at_a_time(seed: int, units: int, pool: int):
    generator = seeded(seed)
    matrix = torch.randn(9, units, generator=generator, dtype=torch.float64)
    matrix *= (2 * torch.randn(units, generator=generator, dtype=torch.float64)).exp()
    sketch = Linearisation(1.0, torch.randn(9, generator=generator, dtype=torch.float64) @ matrix, matrix, False)
    total, alive = torch.zeros(9, dtype=torch.float64), list(range(units))
    slowly: list[int] = []
    for _ in range(units // 2):
        rises = torch.stack([sketch.linear[u] + (total + matrix[:, u]).square().sum() / 2 for u in alive])
        slowly.append(alive.pop(int(rises.argmin())))
        total = total + matrix[:, slowly[-1]]
    found = greedy(sketch, torch.ones(units, dtype=torch.bool), units // 2, pool=pool)
    assert found.tolist() == slowly


@settings(max_examples=10)
@given(SEEDS)
def test_law_12_no_predicted_divergence_is_negative(seed: int):
    model, few = bridge(), examples(5, seed)
    asked: dict[str, Any] = {"rounds": 5, "smallest": 0.1, "probing": Probing(1), "predict": True, "progress": False}
    path = sparsify(model, few, units_of(model), seed=seed % 1000, **asked)
    assert all(step.predicted.mean >= 0 and step.measured.mean >= 0 for step in path.rounds)


def test_law_12_more_training_examples_never_make_the_path_worse():
    model, test = bridge(), examples(300, 77, choices=(1, 4, 7, 8))
    units, asked = units_of(model), {"sizes": (0.7, 0.4), "probing": Probing(1), "progress": False}
    draws = torch.arange(8)

    def risks(n: int) -> Tensor:
        """For each draw of so many training examples the test risk of the smaller circuit."""
        paths = [sparsify(model, examples(n, 5 + int(draw), choices=(1, 4, 7, 8)), units, **asked) for draw in draws]
        return torch.tensor([risk(model, path.at(0.4), test).mean for path in paths], dtype=torch.float64)

    fewer, some, more = risks(3), risks(12), risks(96)
    for before, after in ((fewer, some), (some, more)):
        error = ((before.var() + after.var()) / len(draws)).sqrt()
        assert after.mean() <= before.mean() + 2 * error
    assert more.mean() < fewer.mean()
