"""Methods side by side: what a cell measures, that finished cells are kept, and that settings are chosen honestly."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import unchanged
from typer.testing import CliRunner

import tl_sparsify as tls
from tl_sparsify import baselines, cli, score
from tl_sparsify.comparison.benchmark import cell_file, compare_tasks, gathered, write_comparison
from tl_sparsify.comparison.cost import cost_of, counted
from tl_sparsify.comparison.methods import METHODS, Method, named, run
from tl_sparsify.comparison.tables import markdown

SMALL: dict[str, Any] = {"examples": 64, "refit_patience": 4, "bootstrap": 20, "progress": False}


@cache
def task() -> tls.Task:
    return tls.load_task("planted_backup")


@cache
def model() -> Any:
    return task().model()


@cache
def table() -> pd.DataFrame:
    """Two methods, two seeds."""
    return tls.compare(model(), task(), [score.variance, baselines.random], seeds=2, **SMALL)


def of(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame


def test_a_row_for_each_method_seed_ablation_and_size():
    frame = table()
    assert set(frame.method) == {"variance", "random"} and set(frame.seed) == {0, 1}
    assert set(frame.ablation) == {"zero", "mean", "counterfactual", "refitted"}
    for kind in ("mean", "refitted"):
        here = of(frame, method="variance", seed=1, ablation=kind)
        assert {0.2, 0.1, 0.05, 0.03} <= set(here["size"])
        assert here.kept.is_unique and (here.risk_low <= here.risk_high).all()
    assert of(frame, ablation="refitted").cmd.isna().all()
    assert of(frame, ablation="mean").cmd.between(0, 2).all()


def test_a_row_is_what_evaluate_measures():
    train, _, test = task().examples(1)
    units = tls.heads(model()) + tls.neurons(model())
    scores = score.variance(model(), train.sample(64, seed=1), units)
    values = tls.constants.mean(model(), train.sample(64, seed=1), units)
    row = of(table(), method="variance", seed=1, ablation="mean", size=0.1).iloc[0]
    expected = tls.evaluate(model(), tls.constants.reduced(model(), scores.top(0.1), values), test)
    assert row.kept == expected.kept == 7
    assert row.risk == pytest.approx(expected.risk.mean, rel=1e-6)
    assert row.accuracy == pytest.approx(expected.accuracy)
    assert row.faithfulness == pytest.approx(expected.faithfulness, rel=1e-5)
    whole = tls.evaluate(model(), scores, test, ablation="mean", values=values)
    assert row.cmd == pytest.approx(whole.cmd, rel=1e-6) and row.cpr == pytest.approx(whole.cpr, rel=1e-6)


def test_every_circuit_gets_the_same_refit_to_its_end():
    train, validation, test = task().examples(0)
    train, validation = train.sample(64, seed=0), validation.sample(64, seed=0)
    units = tls.heads(model()) + tls.neurons(model())
    values = tls.constants.mean(model(), train, units)
    start = tls.constants.reduced(model(), baselines.random(model(), train, units, seed=0).top(0.2), values)
    fitted = tls.refit_until_converged(model(), start, train, validation, patience=4)
    row = of(table(), method="random", seed=0, ablation="refitted", size=0.2).iloc[0]
    assert row.risk == pytest.approx(tls.evaluate(model(), fitted, test).risk.mean, rel=1e-5)


def test_the_setting_is_chosen_on_validation():
    train, _, _ = task().examples(0)
    right = score.exact(model(), train[:64], tls.heads(model()) + tls.neurons(model()), progress=False)

    def good(model: Any, examples: Any, units: Any, *, seed: int) -> tls.Scores:
        return right

    def bad(model: Any, examples: Any, units: Any, *, seed: int) -> tls.Scores:
        return replace(right, scores=-right.scores)

    frame = tls.compare(model(), task(), [Method("both", {"bad": bad, "good": good})], seeds=1, **SMALL)
    assert set(frame.setting) == {"good"} and set(frame.settings) == {2}


def test_signed_scores_are_also_tried_by_size():
    method = Method("gradient", {"one shot": score.gradient}, signed=True)
    frame = tls.compare(model(), task(), [method], seeds=1, **SMALL)
    assert set(frame.settings) == {2} and set(frame.setting) <= {"one shot, signed", "one shot, by size"}
    assert (frame.all_forward == frame.forward).all()  # one run for both


def test_costs_are_those_that_were_made():
    frame = table()
    assert set(of(frame, method="random").forward) == {0} and set(of(frame, method="variance").forward) == {2}
    exact = tls.compare(model(), task(), [score.exact], seeds=1, **SMALL | {"refit_patience": 0})
    assert set(exact.forward) == {72 + 1} and "refitted" not in set(exact.ablation)  # the values are given
    risk = tls.compare(model(), task(), [partial(score.risk, probes=3)], seeds=1, **SMALL)
    assert set(risk.forward) == {1} and set(risk.backward) == {3}


def test_passes_and_memory_of_a_call():
    examples = task().examples(0)[0][:40]

    def call() -> torch.Tensor:
        return score.risk(model(), examples, tls.heads(model()), probes=2).scores

    found, cost = cost_of(model(), 20, call)
    assert torch.equal(found, call())
    assert (cost.forward, cost.backward) == (2, 4) and cost.seconds > 0  # 40 examples are two passes over 20
    assert cost.peak_mb != cost.peak_mb or cost.peak_mb >= 0
    with unchanged(model()), pytest.raises(RuntimeError, match="stop"), counted(model()):
        raise RuntimeError("stop")
    assert "forward" not in vars(model())


def test_finished_cells_are_not_run_again(tmp_path: Path):
    calls = []

    def once(model: Any, examples: Any, units: Any, *, seed: int) -> tls.Scores:
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return baselines.random(model, examples, units, seed=seed)

    again = {"seeds": 3, "out": tmp_path, "sizes": (0.2,), **SMALL}
    with pytest.raises(KeyboardInterrupt):
        tls.compare(model(), task(), [once], **again)
    assert cell_file(tmp_path, "planted_backup", "once", 0).is_file()
    frame = tls.compare(model(), task(), [once], **again)
    assert calls == [0, 1, 1, 2]
    stored = tls.compare(model(), task(), [once], **again)
    assert calls == [0, 1, 1, 2]
    pd.testing.assert_frame_equal(frame, stored, check_dtype=False)
    pd.testing.assert_frame_equal(gathered(tmp_path), stored, check_dtype=False)
    with pytest.raises(ValueError, match=r"refit_patience = 4, and this comparison has 5: name another folder"):
        tls.compare(model(), task(), [once], **again | {"refit_patience": 5})


def test_processes_do_not_change_the_numbers(tmp_path: Path):
    settings = {"seeds": 2, "sizes": (0.1,), **SMALL}
    frames = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        frames.append(compare_tasks(["planted_backup"], ["variance", "random"], out=out, workers=workers, **settings))
    timed = ["seconds", "peak_mb"]
    pd.testing.assert_frame_equal(frames[0].drop(columns=timed), frames[1].drop(columns=timed), rtol=1e-6)
    assert frames[0].method.tolist() == sorted(frames[0].method, key=["variance", "random"].index)
    files = write_comparison(frames[0], tmp_path)
    assert [file.name for file in files] == ["table.csv", "table.parquet", "table.md"]
    pd.testing.assert_frame_equal(pd.read_parquet(files[1]), frames[0].reset_index(drop=True))
    assert files[2].read_text().startswith("## planted_backup\n\n| method (setting) |")


def test_the_order_is_held_against_the_truth():
    units = tls.heads(model()) + tls.neurons(model())
    truth = tls.Circuit.of(units, list(task().truth["weights"]))

    def perfect(model: Any, examples: Any, units: Any, *, seed: int) -> tls.Scores:
        found = baselines.random(model, examples, units)
        return replace(found, scores=truth.mask.double())

    frame = tls.compare(model(), task(), [perfect], seeds=1, **SMALL)
    assert set(frame.auroc) == {1.0} and set(frame.average_precision) == {1.0}
    assert of(table(), method="random").auroc.between(0.1, 0.9).all()


def test_the_table_marks_the_best():
    lines = markdown(table(), "planted_backup").splitlines()
    assert len(lines) == 4 and "mean, 10%" in lines[0] and "refitted, 3%" in lines[0] and "AUROC" in lines[0]
    assert lines[2].startswith("| variance |") and "**" in lines[2]
    risks = of(table(), ablation="mean", size=0.1).groupby("method").risk.mean()
    assert risks["variance"] < risks["random"] and f"{risks['random']:.2g} (" in lines[3]
    with pytest.raises(ValueError, match="task is 'x'; the table has planted_backup"):
        markdown(table(), "x")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_of_the_benchmark_runs(method: Method):
    data = task().examples(0)[0][:32]
    units = tls.heads(model()) + tls.neurons(model())
    values = tls.constants.mean(model(), data, units)
    for name, scorer in method.settings.items():
        quick = {"rounds": 2} if name.endswith("in rounds") else {"steps": 3} if "mask" in method.name else {}
        if method.name.startswith("joint"):
            quick = {"rounds": 2}
        with unchanged(model()):
            found = run(partial(scorer, **quick), model(), data, units, 0, values=values, held_out=data, progress=False)
        assert found.units == units and torch.isfinite(found.scores).all()


def test_a_refusal_is_a_line_and_other_errors_are_not(tmp_path: Path):
    def picky(model: Any, examples: Any, units: Any, *, seed: int) -> tls.Scores:
        raise ValueError("these units are not for it")

    settings: dict[str, Any] = {"units": tls.heads(model()), "sizes": (0.5,), "seeds": 1, "out": tmp_path}
    settings |= SMALL | {"refit_patience": 0, "bootstrap": 0}
    methods = [Method("picky", {"one": picky, "two": picky}, refuses=True), baselines.random]
    methods.append(Method("half", {"one": picky, "two": baselines.random}, refuses=True))
    for frame in (tls.compare(model(), task(), methods, **settings), gathered(tmp_path)):
        [line] = of(frame, method="picky").to_dict("records")
        assert line["setting"] == "refused: these units are not for it" and line["risk"] != line["risk"]
        assert set(of(frame, method="half").setting) == {"two"}
        assert "| picky (refused: these units are not for it) |" in markdown(frame, "planted_backup")
        assert tls.plot.frontier(frame, ablation="mean").axes
    with pytest.raises(ValueError, match="these units are not for it"):
        tls.compare(model(), task(), [picky], **settings | {"out": None})


def test_what_is_for_units_alone_is_a_line_where_edges_are_compared():
    names = ("compensating", "activation patching", "attribution patching", "AtP*", "edge attribution", "random")
    settings: dict[str, Any] = {"units": tls.edges(model(), "layer"), "sizes": (0.5,), "seeds": np.int64(1)}
    settings |= {"examples": 8, "refit_patience": 0, "bootstrap": 0, "progress": False}
    frame = tls.compare(model(), task(), named(names), **settings)
    refused = frame[frame.setting.str.startswith("refused: ")]
    assert set(refused.method) == {"activation patching", "AtP*", "edge attribution"} and refused.risk.isna().all()
    assert set(frame.method) == set(names)
    assert of(frame[~frame.method.isin(refused.method)], ablation="mean").risk.notna().all()


def test_wrong_arguments_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown method 'x'; the methods are: joint risk, "):
        named(["x"])
    with pytest.raises(ValueError, match="give at least one, each once"):
        tls.compare(model(), task(), [score.risk, score.risk], **SMALL)
    with pytest.raises(ValueError, match="give at least one, each once"):
        tls.compare(model(), task(), [], **SMALL)
    with pytest.raises(ValueError, match="settings of method 'x' is empty"):
        Method("x", {})
    with pytest.raises(ValueError, match="unknown task 'hierarchical_equalit'"):
        compare_tasks(["hierarchical_equalit"], out=tmp_path)
    with pytest.raises(ValueError, match="workers is 0"):
        compare_tasks(["planted_backup"], out=tmp_path, workers=0)
    with pytest.raises(FileNotFoundError, match="no finished cells in"):
        gathered(tmp_path)


@pytest.mark.slow
def test_the_smoke_benchmark_and_its_report(tmp_path: Path):
    outcome = CliRunner().invoke(cli.app, ["bench", "--smoke", "--out", str(tmp_path), "--quiet"])
    assert outcome.exit_code == 0, outcome.output
    names = {"settings.json", "table.csv", "table.parquet", "table.md"}
    names |= {f"methods_{measure}.png" for measure in ("risk", "accuracy", "faithfulness")}
    assert names <= {path.name for path in tmp_path.iterdir()}
    frame = pd.read_csv(tmp_path / "table.csv")
    risks = of(frame, ablation="mean", size=0.05).set_index("method").risk
    assert risks["joint risk"] < 1e-3 < risks["random"]
    assert "planted_backup" in tls.report.write(tmp_path).read_text()


def test_methods_say_whether_they_are_ours_and_names_do_not(tmp_path: Path):
    ours = {method.name for method in METHODS if method.ours}
    assert ours == {"joint risk", "joint risk, 60 rounds", "joint risk, refitted inside", "compensating"}
    plain, mine = (
        Method(name, {"default": baselines.random}, ours=ours) for name, ours in (("joint luck", False), ("luck", True))
    )
    frame = tls.compare(model(), task(), [plain, mine], seeds=1, out=tmp_path, **SMALL | {"refit_patience": 0})
    for found in (frame, gathered(tmp_path)):  # from the cells as well
        assert found[found.ours].method.unique().tolist() == ["luck"]
        assert found[~found.ours].method.unique().tolist() == ["joint luck"]
    assert not Method.of(baselines.random).ours


def test_cells_of_other_units_or_of_another_model_are_refused(tmp_path: Path):
    given: dict[str, Any] = {"sizes": (0.5,), "seeds": 1, "out": tmp_path, **SMALL, "refit_patience": 0, "bootstrap": 0}
    few, all_of_them = tls.heads(model()), tls.heads(model()) + tls.neurons(model())
    first = tls.compare(model(), task(), [baselines.random], units=few, **given)
    with pytest.raises(ValueError, match=r"out has cells of planted_backup made with units = Units\(.* heads\)"):
        tls.compare(model(), task(), [baselines.random], units=all_of_them, **given)
    with pytest.raises(ValueError, match=r"made with units = .*: name another folder"):
        tls.compare(model(), task(), [baselines.random], units=few.at(1), **given)
    weight = next(iter(model().parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    try:
        with pytest.raises(ValueError, match=r"out has cells of planted_backup made with model = "):
            tls.compare(model(), task(), [baselines.random], units=few, **given)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    again = tls.compare(model(), task(), [baselines.random], units=few, **given)
    pd.testing.assert_frame_equal(again, first, check_dtype=False)
    (tmp_path / "cells" / "planted_backup" / "settings.json").unlink()
    with pytest.raises(ValueError, match="do not say of which model and units they are, as those of older versions"):
        tls.compare(model(), task(), [baselines.random], units=few, **given)


def test_methods_whose_names_make_one_file_are_refused(tmp_path: Path):
    given: dict[str, Any] = {"sizes": (0.5,), "seeds": 1, **SMALL, "refit_patience": 0, "bootstrap": 0}
    one, other = (Method(name, {"default": baselines.random}) for name in ("of mine", "of-mine"))
    with pytest.raises(ValueError, match=r"'of mine' and 'of-mine', whose cells would both be of_mine-0\.csv"):
        tls.compare(model(), task(), [one, other], out=tmp_path, **given)
    assert len(set(tls.compare(model(), task(), [one, other], **given).method)) == 2
    tls.compare(model(), task(), [one], out=tmp_path, **given)
    with pytest.raises(ValueError, match=r"of_mine-0\.csv is the cell of method 'of mine', and 'of-mine' makes"):
        tls.compare(model(), task(), [other], out=tmp_path, **given)


def test_of_few_units_every_size_has_its_row():
    units = tls.heads(model())
    some = replace(task(), truth={"removal": (units.names[0], "L1N3")})
    frame = tls.compare(model(), some, [baselines.random], units=units, seeds=1, **SMALL)
    for kind in ("zero", "mean", "refitted"):
        here = of(frame, ablation=kind)
        assert {0.2, 0.1, 0.05, 0.03} <= set(here["size"]) and here["size"].is_unique
        assert of(here, kept=1).risk.nunique() == 1 < len(of(here, kept=1))
    assert frame.auroc.isna().all() and frame.average_precision.isna().all()  # not all true units are among these
    assert all(f"refitted, {size}%" in markdown(frame, "planted_backup") for size in (20, 10, 5, 3))


def test_the_table_has_a_column_for_every_size_however_small():
    frame = table().assign(size=table()["size"].replace({0.1: 0.005, 0.05: 0.002, 0.03: 0.001}))
    head = markdown(frame, "planted_backup").splitlines()[0]
    assert [head.count(f"| mean, {size}% |") for size in (20, 0.5, 0.2, 0.1)] == [1] * 4
    plain = markdown(of(table(), ablation="mean"), "planted_backup").splitlines()[0]
    assert "| mean, 20% |" in plain and "| mean, 3% |" in plain and "refitted" not in plain
