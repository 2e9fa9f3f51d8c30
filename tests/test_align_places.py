"""Alignment search for variables that sit at several positions at once, in a compiled program."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import tl_sparsify as tls
from tl_sparsify.abstraction.candidates import unions

TASK = tls.load_task("tracr_frac_prevs")
VOWELS = (0, 4, 5)
THREE_AND_ONE = replace(
    TASK.causal_models["halves"],
    mechanisms={
        "three": lambda t1, t2, t4: sum(np.isin(t, VOWELS).astype(int) for t in (t1, t2, t4)),
        "one": lambda t3: np.isin(t3, VOWELS).astype(int),
        "share": lambda three, one: (three + one) / 4,
    },
)


def found(causal_model: tls.CausalModel, **settings: object) -> tls.AlignmentResult:
    return tls.align(TASK.model(), causal_model, TASK.pairs(512, 0), TASK.pairs(512, 50), **settings)  # type: ignore[arg-type]


def names(result: tls.AlignmentResult) -> dict[str, set[str]]:
    return {variable: {unit.name for unit in units} for variable, units in result.alignment.units.items()}


def test_a_variable_at_two_positions_is_found_and_accepted():
    halves = TASK.causal_models["halves"]
    result = found(halves)
    assert names(result) == {"first": {"L0N0@1", "L0N0@2"}, "second": {"L0N0@3", "L0N0@4"}}
    assert result.held_out == result.held_out_changed == {"first": 1.0, "second": 1.0}
    assert result.forward <= 4 + 5 + 2 * (32 + 4) and result.backward == 8
    evidence = tls.verify(TASK.model(), halves, result.alignment, TASK.pairs(256, 99), draws=2)
    assert all(evidence.verdict(variable).accepted for variable in ("first", "second", "first & second"))
    assert not any(evidence.verdict(variable).passing for variable in ("first", "second"))


def test_a_variable_at_three_positions_is_found():
    result = found(THREE_AND_ONE)
    assert names(result) == {"three": {"L0N0@1", "L0N0@2", "L0N0@4"}, "one": {"L0N0@3"}}
    assert result.held_out == {"three": 1.0, "one": 1.0}


@pytest.mark.parametrize("name", TASK.wrong)
def test_wrong_models_find_no_place_at_several_positions_either(name: str):
    result = found(TASK.causal_models[name])
    assert all(accuracy < 0.4 for accuracy in result.held_out.values())


def test_of_all_unions_those_that_cover_most_come_first():
    """Against the cover of every pair of sets, counted one by one."""
    site = tls.Site("neuron", 0, "hook_hidden", 6)
    rng = np.random.default_rng(0)
    tried = {(tls.Unit(site, i),): torch.tensor(rng.random(40) < 0.4) for i in range(6)}
    weights = torch.tensor(rng.random(40))

    def cover(pair: tuple[tls.Unit, ...]) -> float:
        hits = [tried[(unit,)] for unit in pair]
        return sum(float(w) for w, *each in zip(weights, *hits, strict=True) if any(each))

    [first] = unions(tried, weights, 1)
    best = max(itertools.combinations([units[0] for units in tried], 2), key=cover)
    assert set(first) == set(best)
    several = unions(tried, weights, 20)
    assert len({frozenset(units) for units in several}) == len(several) == 20
    assert max(map(len, several)) <= 5 and not any(tuple(units) in tried for units in several)


def test_what_contains_another_set_is_not_joined_with_it():
    site = tls.Site("neuron", 0, "hook_hidden", 3)
    a, b = (tls.Unit(site, i) for i in range(2))
    tried = {(a,): torch.tensor([True, False]), (a, b): torch.tensor([False, True])}
    assert unions(tried, torch.ones(2).double(), 5) == []


def test_a_variable_that_sits_in_keys_is_found_where_keys_are_looked_at():
    """Which number is greatest decides where attention looks; what heads bring, and neurons, do not carry it."""
    task = tls.load_task("greatest_of_list")
    keys = tls.Units((tls.Site("head", 0, "blocks.0.attn.hook_k", 4),))
    some: dict[str, object] = {"variables": ["where"]}
    here, there = (
        tls.align(task.model(), task.causal_model, task.pairs(256, 1), task.pairs(256, 0), **some, **units)  # type: ignore[arg-type]
        for units in ({"units": keys}, {})
    )
    assert here.held_out["where"] > 0.98 and {u.site.hook for u in here.alignment.units["where"]} == {
        keys.sites[0].hook
    }
    assert there.held_out["where"] < 0.6
