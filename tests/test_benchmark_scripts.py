"""The scripts in ``benchmarks``: stored pages are those of the stored tables, and a script goes on where it stopped."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from helpers import architectures
from helpers.edges import by_hand, constants_of
from helpers.native import native
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify import list_tasks
from tl_sparsify.comparison.tables import table_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as it is when it is run: its folder comes first."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def table(name: str, **reading: Any) -> pd.DataFrame:
    return pd.read_csv(BENCHMARKS / "results" / f"{name}.csv", **reading)


@pytest.mark.parametrize(
    ("name", "function", "page"),
    [
        *((name, "markdown", name) for name in ("algorithms", "behaviours", "folding_speed", "neighbours")),
        *((name, "markdown", name) for name in ("other_methods", "overlap", "perceptron", "refit_rates")),
        *((name, "markdown", name) for name in ("score_speed", "sharpening", "stress", "truth", "variants")),
        ("algorithms", "alignments", "alignments"),
        ("feature_connections", "markdown", "feature_connections"),
        ("stress", "groups_markdown", "stress_mechanisms"),
        ("stress", "one_markdown", "stress_smollm2"),
        ("variants", "default_markdown", "variants_default"),
        ("prediction", "path_table", "prediction"),
        ("prediction", "units_table", "prediction_units"),
    ],
)
def test_a_stored_page_is_that_of_the_stored_table(name: str, function: str, page: str, script: Any):
    source = page if page in ("prediction_units", "stress_mechanisms", "stress_smollm2") else name
    assert getattr(script(name), function)(table(source)) == (BENCHMARKS / "results" / f"{page}.md").read_text()


@pytest.mark.parametrize("constants", ["mean", "refitted"])
def test_so_are_the_pages_of_the_orders(constants: str, script: Any):
    found = script("orders").markdown(table("orders"), constants)
    assert found == (BENCHMARKS / "results" / f"orders_{constants}.md").read_text()


@pytest.mark.parametrize("name", ["edge_truth", "few_passes"])
def test_so_are_the_pages_of_cells(name: str, script: Any):
    cells = pd.concat(map(pd.read_csv, sorted((BENCHMARKS / "results" / name).glob("*.csv"))))
    assert script(name).page(cells) == (BENCHMARKS / "results" / f"{name}.md").read_text()


def test_candidates_are_edges_with_two_true_ends(script: Any):
    found = script("edge_truth").candidates(tls.edges(native()), ("L0H1", "L2N3"))
    assert set(found.names) == {
        *(f"embed->{reader}" for reader in ("L0H1.q", "L0H1.k", "L0H1.v", "L2MLP", "logits")),
        *("L0H1->L2MLP", "L0H1->logits", "L2MLP->logits"),
    }


def test_an_edge_is_as_true_as_its_removal_from_the_circuit_changes_the_logits(script: Any):
    """Against the forward pass that is written out reader by reader."""
    model, units = native(), tls.edges(native())
    examples, values = architectures.batch(n=3), constants_of(model, units)
    circuit = tls.Circuit.of(units, ["embed->L0H1.v", "L0H1->L2MLP", "embed->L1H0.q", "L2MLP->logits"])
    constants = dict(zip(units.sites[-1].writers, values.tensors[-1], strict=True))

    def rows(kept: set[str]) -> Tensor:
        return by_hand(model, examples.tokens, kept, constants)[:, -1][:, examples.choices]

    whole = rows(set(circuit.names))
    found = script("edge_truth").changes(model, examples, circuit, values)
    for number, name in enumerate(units.names):
        expected = 0.0
        if name in circuit.names:
            expected = float((rows(set(circuit.names) - {name}) - whole).abs().max() / whole.abs().max())
        assert float(found[number]) == pytest.approx(expected, abs=1e-10)
    unread = units.names.index("embed->L1H0.q")  # nobody hears that head
    assert float(found[unread]) < script("edge_truth").ROUND_OFF < 1e-3 < float(found.max())


def test_so_is_the_page_of_features(script: Any):
    found = script("features").page(table("features"), table("features_removal"))
    assert found == (BENCHMARKS.parent / "docs" / "features.md").read_text()


def test_so_is_the_page_of_every_task(script: Any):
    verdicts = script("algorithms").verdicts(table("algorithms"))
    found = script("every_task").markdown(table("tasks", keep_default_na=False), verdicts)
    assert found == (BENCHMARKS / "results" / "tasks.md").read_text()


def test_a_script_does_the_tasks_that_lack_and_those_that_are_named(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shared = script("shared")
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    calls: list[str] = []

    def rows(name: str, value: float) -> dict[str, pd.DataFrame]:
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"one": pd.DataFrame({"task": [name, name], "value": [value, 0.1 + 0.2]})}

    tables = {"one": {"page": lambda frame: f"{len(frame)}\n"}}
    with pytest.raises(KeyboardInterrupt):
        shared.by_task(tables, None, partial(rows, value=1.0))
    first, second, third, *others = list_tasks()
    assert calls == [first, second, third] and (tmp_path / "page.md").read_text() == "4\n"
    done = shared.by_task(tables, None, partial(rows, value=2.0))["one"]
    assert calls[3:] == [third, *others] and list(done.task.unique()) == list(list_tasks())
    again = shared.by_task(tables, [second], partial(rows, value=3.0), in_order=True)["one"]
    assert calls[-1] == second and list(again.task.unique()) == sorted(list_tasks())
    assert again[again.task == second].value.tolist() == [3.0, 0.1 + 0.2]
    assert again[again.task == first].value.tolist() == [1.0, 0.1 + 0.2]  # the same number, digit by digit


def test_the_best_of_a_row_is_bold_and_what_is_not_there_a_dash(script: Any):
    shared = script("shared")
    assert shared.marked([0.5, float("nan"), 1e-9, 0.0]) == ["0.5", "-", "**< 1e-6**", "**< 1e-6**"]
    assert shared.marked([0.25, 0.75], "{:.1f}".format, max) == ["0.2", "**0.8**"]
    assert shared.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_a_row_of_another_length_is_refused():
    assert table_of(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"
    with pytest.raises(ValueError, match="a row has 1 cells, and the table 2 columns: 1"):
        table_of(["a", "b"], [["1"]])
