"""What stress tests share: divergences of many circuits with paired intervals, random circuits, the table."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.models import bridge, examples, random_mask, random_values, seeded, units_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparsify as tls
from tl_sparsify.stressing.measuring import Setting, alike, halves, measured, removing, sharing
from tl_sparsify.stressing.table import Stand, Stress, StressRow


@cache
def planted() -> tuple[Any, tls.Units, tls.Examples, tls.Reduction]:
    """The task with a backup: its model, units, test examples, and the circuit of the head that copies."""
    task = tls.load_task("planted_backup")
    model = task.model()
    units = tls.heads(model) + tls.neurons(model)
    train, _, test = task.examples(0)
    values = tls.constants.mean(model, train, units)
    return model, units, test[:128], tls.constants.reduced(model, tls.Circuit.of(units, ["L0H1"]), values)


def test_divergences_are_the_measured_risks_and_differences_are_paired():
    model, units, test, reduction = planted()
    backup = tls.Circuit.of(units, ["L1H2"])
    removals = [removing(reduction, circuit, test) for circuit in (reduction.circuit, backup, backup)]
    found = measured(model, removals, test, Setting(bootstrap=200))
    for number, circuit in enumerate((reduction.circuit, backup)):
        assert float(found.mean[number]) == pytest.approx(tls.risk(model, reduction.with_circuit(circuit), test).mean)
    value, (low, high) = found.rise(1, 0)
    assert 0 < low < value < high
    assert found.rise(2, 1) == (0.0, (0.0, 0.0))  # what two columns share drops out
    again = measured(model, removals, test, Setting(bootstrap=200, batch_size=7))
    torch.testing.assert_close(again.drawn, found.drawn, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 20), st.data())
def test_random_circuits_are_of_the_size_and_kinds_that_are_asked_for(seed: int, draw: int, data: st.DataObject):
    _, units, _, _ = planted()
    size = data.draw(st.integers(1, len(units) // 2))
    mask = torch.zeros(len(units), dtype=torch.bool)
    mask[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))[:size]] = True
    circuit = tls.Circuit(units, mask)
    other = alike(circuit, seed, draw)
    for part in units.slices:
        mine, theirs = circuit.mask[part], other.mask[part]
        assert int(mine.sum()) == int(theirs.sum())
        spare = len(mine) - int(mine.sum())
        assert int((mine & theirs).sum()) == max(0, int(mine.sum()) - spare)  # members only where others run out
    shared = data.draw(st.integers(0, size))
    found = sharing(circuit, shared, seed, draw)
    assert (len(found), len(found & circuit)) == (size, shared)


def test_halves_share_no_example_and_too_few_are_refused():
    _, _, test, _ = planted()
    chosen, reported = halves(test, None)
    assert torch.equal(torch.stack([chosen.tokens, reported.tokens], 1).flatten(0, 1), test.tokens)
    assert halves(test, chosen) == (chosen, test)
    with pytest.raises(ValueError, match="examples holds 3"):
        halves(test[:3], None)


def line(**changed: Any) -> StressRow:
    given: dict[str, Any] = {"row": "minimality", "case": "one unit", "claim": "none can leave", "value": 0.2}
    given |= {"low": 0.1, "high": 0.3, "control": 0.0, "control_low": 0.0, "control_high": 0.001, "unit": "nats"}
    given |= {"stand": Stand.HOLDS, "because": "L0H1 costs more", "n": 64, "forward": 9.0, "backward": 0.0}
    return StressRow(**given | changed)


def test_a_table_is_read_by_name_and_saved(tmp_path: Path):
    table = Stress((line(),), {"templates": "no label for each example"}, {}, 0.01)
    assert table["minimality"][0].stand == "holds"
    with pytest.raises(KeyError, match="no label for each example"):
        table["templates"]
    assert "Not made: templates (no label for each example)." in table.markdown()
    for ending in ("csv", "json", "md"):
        table.save(tmp_path / f"table.{ending}")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv"), table.frame(), check_dtype=False)
    assert json.loads((tmp_path / "table.json").read_text())["left_out"] == dict(table.left_out)
    with pytest.raises(ValueError, match=r"table\.xls"):
        table.save(tmp_path / "table.xls")


def test_positions_of_each_example_are_its_own_or_the_test_is_left_out():
    """The same places as a span, which every half has of its own, and as a position for each example."""
    model, data = bridge(), examples(12)
    where = torch.randint(0, 4, (12,), generator=seeded(5))
    data = replace(data, spans={"there": torch.stack([where, where + 1], 1)})
    kept = random_mask(units_of(model), 1)
    by_span, by_example = (
        tls.Reduction(tls.Circuit(units, kept), random_values(units))
        for units in (units_of(model).at("there"), units_of(model).at(where))
    )
    few: dict[str, Any] = {"draws": 3, "bootstrap": 20, "others": {"other": examples(9, 3)}, "templates": [0, 1] * 6}
    found = tls.stress(model, by_example, data, **few)
    assert {row.row for row in found.rows} == {"hypotheses"} and len(found.left_out) == 6
    assert all("a position for each example" in why for why in found.left_out.values())
    expected = tls.stress(model, by_span, data, rows=("hypotheses",), **few)
    frames = (one.frame().drop(columns="because") for one in (found, expected))  # which names the places
    pd.testing.assert_frame_equal(*frames)
    with pytest.raises(ValueError, match="places of 12 examples, and there are 6"):
        removing(by_example, by_example.circuit, data[torch.arange(6)])
    with pytest.raises(ValueError, match="places of 12 examples, and there are 6"):
        tls.stress(model, by_example, data[torch.arange(6)], **few)


def test_values_on_counterfactual_inputs_are_refused_by_name():
    model, data = bridge(), examples(12)
    paired = tls.constants.counterfactual(model, data, units_of(model))
    reduction = tls.constants.reduced(model, tls.Circuit(paired.units, random_mask(paired.units, 1)), paired)
    with pytest.raises(ValueError, match="values on counterfactual inputs, and the tests need constants"):
        tls.stress(model, reduction, data, rows=("minimality",))
