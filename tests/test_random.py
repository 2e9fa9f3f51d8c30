"""Random draws are functions of a seed and counters, whatever batch they are made in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify._internal import random as _random

INTEGERS = st.integers(-(2**40), 2**40)
COUNTERS = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


@given(INTEGERS, COUNTERS, st.integers(0, 100))
def test_a_draw_is_a_function_of_seed_example_and_probe(seed: int, examples: list[int], probe: int):
    index = torch.tensor(examples)
    for draw in (_random.bits, _random.uniform, _random.signs):
        together = draw(seed, index, probe)
        alone = [draw(seed, torch.tensor(example), probe).item() for example in examples]
        assert together.tolist() == alone
        assert torch.equal(draw(seed, index.flip(0), probe), together.flip(0))
        assert torch.equal(draw(seed, index[:, None], torch.arange(3))[:, 2], draw(seed, index, 2))


@given(INTEGERS, st.integers(0, 2**40), st.integers(0, 2**40))
def test_seed_and_each_counter_matter(seed: int, example: int, probe: int):
    drawn = [
        _random.bits(*counters).item()
        for counters in [(seed, example, probe), (seed + 1, example, probe), (seed, example + 1, probe)]
    ]
    drawn += [_random.bits(seed, example, probe + 1).item(), _random.bits(seed, example).item()]
    assert len(set(drawn)) == 5


def test_global_random_state_is_neither_read_nor_written():
    with torch.random.fork_rng(devices=[]):
        before = torch.random.get_rng_state()
        first = _random.permutation(20, 3, 4)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(5)
        assert torch.equal(_random.permutation(20, 3, 4), first)


def test_the_draws_are_those_of_every_machine():
    assert _random.bits(0, 1, 2).item() == 6768782832058643234
    assert _random.permutation(8, 0).tolist() == [0, 3, 2, 1, 4, 5, 7, 6]


def test_uniform_draws_are_uniform():
    u = _random.uniform(7, torch.arange(200)[:, None], torch.arange(200)).flatten()
    assert 0 <= u.min() and u.max() < 1
    share = torch.histc(u, 10, 0, 1) / len(u)
    assert (share - 0.1).abs().max() < 0.01
    pairs = torch.stack([u[:-1], u[1:]]) - 0.5
    assert (pairs[0] * pairs[1]).mean().abs() < 5 / 12 / len(u) ** 0.5


def test_signs_are_fair_and_independent():
    s = _random.signs(3, torch.arange(300)[:, None], torch.arange(100))
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert s.mean().abs() < 5 / s.numel() ** 0.5
    correlations = s.T @ s / 300 - torch.eye(100)
    assert correlations.abs().max() < 6 / 300**0.5


@given(st.integers(1, 50), INTEGERS, st.integers(0, 5))
def test_a_permutation_holds_every_number_once(n: int, seed: int, counter: int):
    assert sorted(_random.permutation(n, seed, counter).tolist()) == list(range(n))


@given(st.integers(1, 50), INTEGERS)
def test_partners_are_one_cycle_through_all_examples(n: int, seed: int):
    partner = _random.shifted_partner(n, seed).tolist()
    visited, here = set(), 0
    while here not in visited:
        visited.add(here)
        here = partner[here]
    assert len(visited) == n and here == 0
    assert n == 1 or all(other != i for i, other in enumerate(partner))
