"""Polish: exchanges on measured risk."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from helpers.models import bridge, examples, unchanged, units_of

from tl_sparsify import constants
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.measure import risk
from tl_sparsify.core.units import attentions, heads, mlps
from tl_sparsify.search.exchanges import polish
from tl_sparsify.search.joint import sparsify


def test_with_a_large_budget_it_finds_the_best_circuit_of_a_few_units():
    model, batch = bridge(), examples(n=20)
    units = heads(model) + mlps(model)
    values = constants.mean(model, batch, units)

    def of(kept: tuple[int, ...]) -> float:
        mask = torch.zeros(len(units), dtype=torch.bool)
        mask[list(kept)] = True
        return risk(model, constants.reduced(model, Circuit(units, mask), values), batch).mean

    best = min(of(kept) for kept in combinations(range(len(units)), 3))
    worst = max(combinations(range(len(units)), 3), key=of)
    start = constants.reduced(model, Circuit.of(units, [units.names[i] for i in worst]), values)
    assert risk(model, polish(model, start, batch, passes=400), batch).mean == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("passes", [20, 60])
def test_it_is_never_worse_than_what_was_given_or_its_rivals(passes: int):
    model, batch = bridge(), examples(n=20)
    units = units_of(model)
    given = sparsify(model, batch, units, rounds=3, progress=False).at(0.5)
    rival = Circuit(units, torch.arange(len(units)) < len(given.circuit))
    with unchanged(model):
        found = polish(model, given, batch, passes=passes, rivals=[rival])
    assert len(found.circuit) == len(given.circuit)
    assert risk(model, found, batch).mean <= risk(model, given, batch).mean
    assert risk(model, found, batch).mean <= risk(model, given.with_circuit(rival), batch).mean
    assert found == polish(model, given, batch, passes=passes, rivals=[rival], batch_size=7)


def test_with_few_units_it_is_never_worse_than_removing_one_at_a_time():
    model, batch = bridge(), examples(n=20)
    units = attentions(model) + mlps(model)
    values = constants.mean(model, batch, units)
    alone = [risk(model, constants.reduced(model, ~Circuit.of(units, [n]), values), batch).mean for n in units.names]
    order = sorted(range(len(units)), key=alone.__getitem__)
    for count in (1, 2, 3):
        exact = Circuit.of(units, [units.names[i] for i in order[len(units) - count :]])
        other = constants.reduced(model, Circuit(units, torch.arange(len(units)) < count), values)
        found = polish(model, other, batch, passes=30)
        assert risk(model, found, batch).mean <= risk(model, other.with_circuit(exact), batch).mean


def test_bad_budgets_and_rivals_are_refused():
    model, batch = bridge(), examples(n=10)
    units = units_of(model)
    given = constants.reduced(model, Circuit.of(units, ["L0H0"]), constants.mean(model, batch, units))
    with pytest.raises(ValueError, match="passes is 3"):
        polish(model, given, batch, passes=3)
    with pytest.raises(ValueError, match="a rival keeps 14 units, the reduction 1"):
        polish(model, given, batch, rivals=[Circuit.full(units)])
