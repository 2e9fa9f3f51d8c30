"""The laws of the library, on small float64 models: its specification.

Law 3, that folding is ablating, is in test_folding.py and test_folding_architectures.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.models import (
    EXCLUSIVE_OR,
    NoCasts,
    bridge,
    examples,
    exclusive_or,
    exclusive_or_inputs,
    fresh,
    inputs,
    linear,
    planted,
    random_mask,
    random_values,
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
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import run_values
from tl_sparsify.core.intervene import Intervention, ablate, interchange, intervened
from tl_sparsify.core.measure import risk
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.probes import joint_moments, samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads
from tl_sparsify.folding.fold import fold
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.linearisation import linearise

SEEDS = st.integers(0, 2**31)


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    """Whether two tensors agree, relative to the largest number in them."""
    return bool((a - b).abs().max() <= relative * max(a.abs().max(), b.abs().max()))


# 1. Keeping everything changes nothing, bit for bit.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_law_1_keeping_everything_changes_nothing(dtype: torch.dtype):
    model = bridge(dtype=dtype)
    units, tokens = units_of(model), examples().tokens
    full = reduction_of(model, torch.ones(len(units), dtype=torch.bool))
    with torch.no_grad():
        expected = model(tokens)
        with intervened(model, ablate(full)):
            assert torch.equal(model(tokens), expected)
    written_out = Intervention(units, torch.ones(len(units)).requires_grad_(), full.values)  # is not skipped
    with intervened(model, written_out):
        assert torch.equal(model(tokens), expected)


@given(SEEDS)
@settings(max_examples=10)
def test_law_1_units_that_are_kept_stay_bit_for_bit(seed: int):
    model = bridge()
    reduction = reduction_of(model, random_mask(units_of(model), seed) | (units_of(model).layers == 0), seed)
    tokens = examples(4, seed).tokens
    with torch.no_grad():
        _, expected = model.run_with_cache(tokens)
        with intervened(model, ablate(reduction)):
            _, found = model.run_with_cache(tokens)
    for hook in ("blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre"):
        assert torch.equal(found[hook], expected[hook])
    kept = reduction.units.split(reduction.circuit.mask)[1]  # the heads of layer 1, whose inputs are those of before
    z = "blocks.1.attn.hook_z"
    assert torch.equal(found[z][:, :, kept], expected[z][:, :, kept])


# 2. Interventions nest, and leave no hook behind, also after an exception.


@given(SEEDS)
@settings(max_examples=10)
def test_law_2_nested_interventions_are_one_after_the_other(seed: int):
    model = bridge()
    units, tokens = units_of(model), examples(4, seed).tokens
    one, two = (reduction_of(model, random_mask(units, seed + i), seed + i) for i in range(2))
    with torch.no_grad(), unchanged(model):
        with intervened(model, ablate(one)):
            with intervened(model, ablate(two)):
                nested = model(tokens)
            outer = model(tokens)
        with intervened(model, ablate(one), ablate(two)):
            assert torch.equal(model(tokens), nested)
        with intervened(model, ablate(one)):
            assert torch.equal(model(tokens), outer)
        both = Reduction(one.circuit & two.circuit, one.values.where(two.circuit.mask, two.values))
        with intervened(model, ablate(both)):  # the inner one has the last word
            assert torch.equal(model(tokens), nested)


@pytest.mark.parametrize("make", [bridge, linear])
def test_law_2_no_hook_is_left_after_an_exception(make: Any):
    model = make()
    units = units_of(model) if make is bridge else model.units
    reduction = reduction_of(model, torch.zeros(len(units), dtype=torch.bool), units=units)
    wrong = torch.zeros(3, 4, 5, 6, dtype=torch.float64)
    with unchanged(model):
        with pytest.raises(KeyError, match="mine"), intervened(model, ablate(reduction)):
            with intervened(model, ablate(reduction)):
                raise KeyError("mine")
        with pytest.raises((ValueError, RuntimeError, IndexError)), intervened(model, ablate(reduction)):
            model(wrong)
        batched = Intervention(units, torch.zeros(3, len(units)), reduction.values)
        with pytest.raises(ValueError, match="keep is for 3 examples"), intervened(model, batched):
            model((examples(4) if make is bridge else inputs(4)).tokens)


def test_law_2_hooks_of_the_user_stay():
    model, seen = fresh(), []
    model.add_hook("blocks.0.mlp.hook_post", lambda value, hook: seen.append(value.clone()))
    tokens, reduction = examples(3).tokens, reduction_of(model)
    with torch.no_grad(), unchanged(model):
        with intervened(model, ablate(reduction)), intervened(model, ablate(reduction)):
            model(tokens)
        risk(model, reduction, examples(3))
        before = len(seen)
        model(tokens)
    assert len(seen) == before + 1


# 4. Batching never matters.

MODELS = [{}, {"normalization_type": "LN", "act_fn": "gelu"}]
N = 8


def padded(**settings: Any) -> Examples:
    """Examples with left padding and two answers each."""
    batch = examples(N, 3, answers=2, **settings)
    mask = torch.arange(5)[None, :] >= torch.randint(3, (N, 1), generator=seeded(5))
    return Examples(batch.tokens, batch.labels, mask, batch.counterfactual_tokens, choices=batch.choices)


@pytest.mark.parametrize("model_settings", MODELS, ids=["no norms", "LayerNorm"])
def test_law_4_batch_sizes_give_the_same_numbers(model_settings: dict[str, Any]):
    model, data = bridge(**model_settings), padded()
    units = units_of(model)
    casts = NoCasts() if model_settings else nullcontext()
    with casts:
        reduction = reduction_of(model)  # its fingerprint is taken in float32, which is no cast here
    drawn = InterventionDistribution.interchange(0.3)
    paired = InterventionDistribution.interchange(0.3, "counterfactual")

    def numbers(batch_size: int) -> list[Tensor]:
        size: dict[str, Any] = {"batch_size": batch_size}
        exact = score.risk(model, data, units, probes=10, seed=1, **size)
        sampled = score.risk(model, data, units, probes=3, temperature=2.0, seed=1, **size)
        variance = score.variance(model, data, units, **size)
        risks = [risk(model, reduction, data, interventions=i, seed=2, **size) for i in (drawn, paired)]
        risks.append(risk(model, reduction, data, **size))
        removed = random_mask(units, 7)
        here = {"current": reduction, "seed": 3, **size}
        predicted = joint_moments(samples(model, data, reduction, **here), removed)
        sketch = linearise(samples(model, data, reduction, **here), N, seed=4, height=16)
        assert sketch.projected
        return [
            *(tensor for scores in (exact, sampled) for tensor in (scores.scores, scores.stderr)),
            variance.scores,
            torch.tensor([(r.mean, r.stderr) for r in risks], dtype=torch.float64),
            torch.stack([predicted.mean, predicted.spread]),
            *constants.mean(model, data, units, **size).tensors,
            torch.tensor([sketch.offset, sketch.predicted(removed)], dtype=torch.float64),
            sketch.linear,
            sketch.matrix,
        ]

    with casts:
        expected = numbers(N)
        for size in (1, 7):
            assert all(close(a, b, 1e-10) for a, b in zip(numbers(size), expected, strict=True)), size


@pytest.mark.parametrize("model_settings", MODELS, ids=["no norms", "LayerNorm"])
def test_law_4_batch_sizes_give_the_same_selection(model_settings: dict[str, Any]):
    model, data = bridge(**model_settings), padded()
    settings: dict[str, Any] = {"rounds": 3, "smallest": 0.2, "seed": 5, "predict": True, "progress": False}
    with NoCasts() if model_settings else nullcontext():
        paths = [sparsify(model, data, units_of(model), batch_size=size, **settings) for size in (1, 7, N)]
    for path in paths[1:]:
        assert torch.equal(path.order, paths[0].order)
        found, expected = (
            torch.tensor([(r.predicted.mean, r.measured.mean, r.measured.stderr) for r in p.rounds])
            for p in (path, paths[0])
        )
        assert close(found, expected, 1e-10)


def test_law_4_every_example_has_its_own_draws():
    model, data = bridge(), examples(N)
    reduction = reduction_of(model)
    for probes in (3, 10):  # sampled and exact
        alone = [part.effects for part in samples(model, data, reduction, probes=probes, seed=1, batch_size=1)]
        [together] = samples(model, data, reduction, probes=probes, seed=1, batch_size=N)
        assert close(torch.cat(alone, 1), together.effects, 1e-10)


def test_law_4_partners_come_from_the_whole_split():
    data, drawn = examples(N), InterventionDistribution.interchange(0.5)
    together = source_batch(drawn, data, torch.arange(N), 3).tokens
    alone = torch.cat([source_batch(drawn, data, torch.tensor([i]), 3).tokens for i in range(N)])
    assert torch.equal(alone, together)
    assert sorted(together.tolist()) == sorted(data.tokens.tolist())
    assert (together != data.tokens).any(1).all()  # nobody's own


# 5. Moments are associative and commutative and equal the two-pass result.


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), SEEDS)
def test_law_5_moments_add_up(sizes: list[int], seed: int):
    data = torch.randn(sum(sizes), 4, generator=seeded(seed), dtype=torch.float64) * 3 + 100
    a, b, c = (Moments.of(part) for part in data.split(sizes))
    for total in (a + b + c, a + (b + c), c + a + b, Moments.merge([b, c, a])):
        assert torch.equal(total.count, torch.full((4,), float(len(data)), dtype=torch.float64))
        torch.testing.assert_close(total.mean, data.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(total.variance, data.var(0, correction=0), rtol=1e-9, atol=0)
        torch.testing.assert_close(total.stderr, data.std(0) / len(data) ** 0.5, rtol=1e-9, atol=0)


# 6. Circuits obey De Morgan; load(save(x)) == x.


@given(SEEDS, SEEDS)
def test_law_6_de_morgan(one: int, two: int):
    units = units_of(bridge())
    a, b = Circuit(units, random_mask(units, one)), Circuit(units, random_mask(units, two))
    assert ~(a & b) == ~a | ~b
    assert ~(a | b) == ~a & ~b
    assert ~~a == a


@given(SEEDS)
def test_law_6_a_reduction_is_what_was_saved(tmp_path_factory: pytest.TempPathFactory, seed: int):
    model = bridge()
    reduction = constants.reduced(model, Circuit(units_of(model), random_mask(units_of(model), seed)),
                                  random_values(units_of(model), seed), "mine")  # fmt: skip
    path = tmp_path_factory.mktemp("reduction") / "a.reduction"
    reduction.save(path)
    loaded = Reduction.load(path)
    assert loaded == reduction and loaded.units.names == reduction.units.names
    assert all(torch.equal(a, b) for a, b in zip(loaded.values.tensors, reduction.values.tensors, strict=True))


def test_padding_left_or_right_changes_no_draw():
    model = bridge()
    right = examples(N, answers=2)
    empty = torch.zeros(N, 2, dtype=torch.long)
    seen = torch.ones_like(right.tokens, dtype=torch.bool)

    def padded_by(tokens: torch.Tensor, fill: torch.Tensor, left: bool) -> torch.Tensor:
        return torch.cat([fill, tokens] if left else [tokens, fill], 1)

    found = []
    for left in (True, False):
        parts = ((right.tokens, empty), (right.labels, empty - 100), (seen, empty.bool()))
        tokens, labels, mask = (padded_by(tokens, fill, left) for tokens, fill in parts)
        data = Examples(tokens, labels, mask)
        for probes in (2, 10):  # sampled and exact
            found.append(score.risk(model, data, units_of(model), probes=probes, seed=1).scores)
    assert close(found[0], found[2], 1e-9) and close(found[1], found[3], 1e-9)


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
