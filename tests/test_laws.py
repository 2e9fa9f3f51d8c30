"""The laws of the library, on small float64 models: its specification. Laws 1 to 6: interventions, batches, moments.

Law 3, that folding is ablating, is in test_folding.py and test_folding_architectures.py; laws 7 to 12 are in
test_laws_of_search.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.kinds import close
from helpers.models import (
    NoCasts,
    bridge,
    examples,
    fresh,
    inputs,
    linear,
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
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution, source_batch
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.intervene import Intervention, ablate, intervened
from tl_sparsify.core.measure import risk
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.expansion.linearisation import joint_moments, linearise
from tl_sparsify.search.joint import sparsify

SEEDS = st.integers(0, 2**31)


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
