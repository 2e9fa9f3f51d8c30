"""The bootstrap against a direct loop over replicates and against what it promises; stability against sets."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import bridge, examples, seeded, unchanged, unchecked, units_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import Circuit, CircuitPath, Scores, Stability, baselines, score, sparsify, stability
from tl_sparsify.comparison.resampling import Resampled, expected_jaccard, weights

# Weights


def test_weights_are_poisson_with_mean_one():
    found = weights(torch.arange(500), 400, seed=3)
    n = found.numel()
    for k in range(6):
        share = math.exp(-1) / math.factorial(k)
        assert abs(float((found == k).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert 5 <= found.max() <= 12 and torch.equal(found, found.round())


def test_weights_of_different_examples_and_replicates_are_uncorrelated():
    found = weights(torch.arange(300), 300, seed=1)
    for matrix in (found, found.T):
        correlation = torch.corrcoef(matrix)[~torch.eye(300, dtype=torch.bool)]
        assert abs(float(correlation.mean())) < 0.002 and abs(float(correlation.std()) * math.sqrt(300) - 1) < 0.05


@given(st.permutations(range(12)), st.integers(1, 9), st.integers(0, 2**40))
def test_weights_depend_on_seed_example_and_replicate_alone(order: list[int], replicates: int, seed: int):
    whole = weights(torch.arange(12), 9, seed)
    assert torch.equal(weights(torch.tensor(order), replicates, seed), whole[order][:, :replicates])
    assert not torch.equal(weights(torch.arange(12), 9, seed + 1), whole)


# The bootstrap


def slow_interval(numerator: Tensor, denominator: Tensor, replicates: int, seed: int, level: float) -> list[float]:
    """The percentile interval of a ratio of means, one replicate after the other."""
    counts = weights(torch.arange(len(numerator)), replicates, seed)
    ratios = []
    for r in range(replicates):
        top = bottom = 0.0
        for i in range(len(numerator)):
            top += float(counts[i, r] * numerator[i])
            bottom += float(counts[i, r] * denominator[i])
        ratios.append(top / bottom)
    return np.percentile(ratios, [50 * (1 - level), 50 * (1 + level)]).tolist()


def interval(numerator: Tensor, denominator: Tensor, replicates: int, seed: int, level: float = 0.95) -> Tensor:
    both = torch.stack([numerator, denominator], 1)
    resampled = Resampled.of(both, torch.arange(len(both)), replicates, seed)
    return resampled.interval(resampled.means[:, 0] / resampled.means[:, 1], level)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_a_ratio_of_means_is_that_of_the_direct_loop(level: float):
    top, bottom = torch.rand(2, 300, generator=seeded(0), dtype=torch.float64)
    expected = slow_interval(top, bottom + 1, 40, 7, level)
    assert interval(top, bottom + 1, 40, 7, level).tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[0] < float(top.mean() / (bottom + 1).mean()) < expected[1]


@given(st.integers(1, 39), st.integers(0, 2**31))
def test_batches_add_up(cut: int, seed: int):
    samples, index = torch.randn(40, 2, 3, generator=seeded(seed % 97), dtype=torch.float64), torch.arange(40)
    whole = Resampled.of(samples, index, 20, seed)
    parts = Resampled.of(samples[:cut], index[:cut], 20, seed) + Resampled.of(samples[cut:], index[cut:], 20, seed)
    assert parts.n == whole.n == 40 and torch.equal(parts.weight, whole.weight)
    assert torch.allclose(parts.total, whole.total, rtol=1e-12, atol=1e-13)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Ratios of means of skewed, correlated samples, whose true ratio is known."""
    generator, hits, runs = seeded(5), [0, 0], 400
    for seed in range(runs):
        shared, own, noise = torch.randn(3, 100, generator=generator, dtype=torch.float64)
        bottom = (0.5 * shared + 0.3 * own).exp()  # lognormal: mean exp(0.34 / 2)
        top = 0.6 * bottom + 0.4 * noise  # the ratio of the means is 0.6
        for number, level in enumerate((0.95, 0.8)):
            low, high = interval(top, bottom, 300, seed, level).tolist()
            hits[number] += low <= 0.6 <= high
    assert 0.92 <= hits[0] / runs <= 0.98
    assert 0.75 <= hits[1] / runs <= 0.85


def test_the_spread_is_the_standard_error():
    samples = torch.rand(400, 1, generator=seeded(2), dtype=torch.float64)
    resampled = Resampled.of(samples, torch.arange(400), 4000, 0)
    assert float(resampled.means.std()) == pytest.approx(float(samples.std()) / 20, rel=0.05)
    assert float(resampled.means.mean()) == pytest.approx(float(samples.mean()), abs=0.002)


def test_without_replicates_or_with_one_example_there_is_no_interval():
    samples = torch.rand(5, 2, dtype=torch.float64)
    none = Resampled.of(samples, torch.arange(5), 0, 0)
    assert none.means.shape == (0, 2) and bool(none.interval(none.means, 0.95).isnan().all())
    one = Resampled.of(samples[:1], torch.arange(1), 50, 0)
    assert one.interval(one.means, 0.95).shape == (2, 2) and bool(one.interval(one.means, 0.95).isnan().all())


def test_replicates_in_which_no_example_counts_are_left_out():
    samples = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    resampled = Resampled.of(samples, torch.arange(2), 200, 0)
    empty = (weights(torch.arange(2), 200, 0).sum(0) == 0).sum()
    assert empty > 0 and resampled.means.isnan().sum() == empty
    assert resampled.interval(resampled.means, 0.99).flatten().tolist() == [1, 3]


# Expected Jaccard index


def exact_jaccard(n: int, k: int) -> Fraction:
    ways = [math.comb(k, i) * math.comb(n - k, k - i) for i in range(k + 1)]
    return sum((Fraction(w * i, 2 * k - i) for i, w in enumerate(ways)), Fraction(0)) / math.comb(n, k)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_expected_jaccard_is_that_of_all_pairs_of_sets(n: int):
    for k in range(1, n + 1):
        sets = [set(chosen) for chosen in itertools.combinations(range(n), k)]
        every = [Fraction(len(a & b), len(a | b)) for a in sets for b in sets]
        assert expected_jaccard(n, k) == pytest.approx(float(sum(every) / len(every)), rel=1e-12)


@given(st.integers(1, 300), st.floats(0, 1))
def test_expected_jaccard_is_that_of_whole_numbers(n: int, share: float):
    k = max(1, round(share * n))
    assert expected_jaccard(n, k) == pytest.approx(float(exact_jaccard(n, k)), rel=1e-10)


def test_expected_jaccard_of_many_units_is_that_of_independent_ones():
    assert expected_jaccard(458_752, 45_875) == pytest.approx(0.1 / 1.9, rel=1e-4)
    for n, k in ((5, 0), (5, 6)):
        with pytest.raises(ValueError, match=f"k is {k}; it lies between 1 and the number of units, 5"):
            expected_jaccard(n, k)


# Stability


def scores_of(units: Any, numbers: Tensor) -> Scores:
    return Scores(units, numbers, torch.zeros_like(numbers), "made up", "no unit", 0, 0)


def test_overlap_is_that_of_sets():
    model = bridge()
    units = units_of(model)
    found = stability(baselines.random, model, examples(), units, fraction=0.3, draws=4, seed=2)
    sets = [set(circuit.names) for circuit in found.circuits]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    assert len(pairs) == 6 and found.jaccard.tolist() == pytest.approx(pairs)
    assert (found.mean, found.min, found.max) == pytest.approx((sum(pairs) / 6, min(pairs), max(pairs)))
    assert found.frequency.tolist() == [sum(name in chosen for chosen in sets) / 4 for name in units.names]
    assert {len(chosen) for chosen in sets} == {4} and found.chance == expected_jaccard(14, 4)
    frame = found.to_frame()
    assert list(frame.columns) == ["unit", "kind", "layer", "index", "frequency"] and list(frame.unit) == [*units.names]
    assert frame.frequency.sum() == pytest.approx(4)


def test_random_circuits_overlap_by_chance():
    model = bridge()
    found = stability(baselines.random, model, examples(), units_of(model), fraction=0.3, draws=60)
    assert found.mean == pytest.approx(found.chance, abs=0.02)


def test_each_draw_has_its_own_examples_and_seed():
    model, data = bridge(), examples(40)
    seen: list[tuple[list[int], int, str]] = []
    lookup = {tuple(row.tolist()): i for i, row in enumerate(data.tokens)}

    def method(model: Any, some: Any, units: Any, *, seed: int, flavour: str) -> Scores:
        index = [lookup[tuple(row.tolist())] for row in some.tokens]
        assert torch.equal(some.labels, data.labels[index])
        seen.append((index, seed, flavour))
        return scores_of(units, torch.arange(float(len(units))))

    found = [stability(method, model, data, units_of(model), draws=3, seed=seed, flavour="mild") for seed in (0, 0, 1)]
    assert seen[:3] == seen[3:6] and seen[:3] != seen[6:]
    assert len({tuple(index) for index, _, _ in seen[:3]}) == len({seed for _, seed, _ in seen[:3]}) == 3
    for index, _, flavour in seen:
        assert flavour == "mild" and len(index) == 40
        assert 18 <= len(set(index)) <= 32  # with replacement: 63 % of them in the mean
    assert (found[0].mean, found[0].min, found[0].max) == (1, 1, 1)
    assert found[0].frequency.sum() == 1


def test_positions_of_units_go_with_their_examples():
    model, data = bridge(), examples(6)
    where = torch.arange(6) % 5
    units = units_of(model).at(where)
    lookup = {tuple(row.tolist()): i for i, row in enumerate(data.tokens)}

    def method(model: Any, some: Any, units: Any, *, seed: int) -> Scores:
        index = [lookup[tuple(row.tolist())] for row in some.tokens]
        assert torch.equal(units.sites[0].positions, where[index])
        return scores_of(units, torch.arange(float(len(units))))

    assert stability(method, model, data, units, draws=2).circuits[0].units == units


@pytest.mark.parametrize("searched", [True, False])
def test_scorers_and_searches_serve(searched: bool):
    model, data = bridge(), examples(200)
    method, settings = (sparsify, {"rounds": 2, "smallest": 0.2, "progress": False}) if searched else (score.risk, {})
    with unchanged(model):
        found = stability(method, model, data, units_of(model), fraction=0.2, draws=3, **settings)
    assert [len(circuit) for circuit in found.circuits] == [3, 3, 3]
    assert found.chance < found.mean <= 1
    text = repr(found)
    assert text.startswith("Stability(3 of 14 units, 3 draws: Jaccard ") and "\n" not in text


def test_a_path_serves_by_its_circuit():
    model = bridge()
    units = units_of(model)
    path = sparsify(model, examples(), units, rounds=2, smallest=0.2, progress=False)

    def method(model: Any, some: Any, units: Any, *, seed: int) -> CircuitPath:
        return path

    assert stability(method, model, examples(), units, fraction=0.3).circuits[0] == path.at(0.3).circuit


def test_what_cannot_be_compared_is_refused():
    model, data = bridge(), examples()
    units = units_of(model)
    with pytest.raises(ValueError, match="draws is 1; circuits are compared in pairs"):
        stability(baselines.random, model, data, units, draws=1)
    with pytest.raises(ValueError, match=r"fraction is 0\.0; it must lie in \(0, 1\]"):
        stability(baselines.random, model, data, units, fraction=0.0)
    with unchecked(), pytest.raises(ValueError, match="method returned Circuit; stability needs"):
        stability(lambda *_, **__: Circuit.full(units), model, data, units)
    with unchanged(model), pytest.raises(ValueError, match="probes is 0"):
        stability(score.risk, model, data, units, probes=0)


def test_stability_of_given_circuits():
    units = units_of(bridge())
    circuits = tuple(Circuit.of(units, names) for names in (["L0H0", "L0H1"], ["L0H1", "L0N0"], ["L0H0", "L0H1"]))
    found = Stability(circuits)
    assert found.jaccard.tolist() == [1 / 3, 1, 1 / 3] and (found.min, found.max) == (1 / 3, 1)
