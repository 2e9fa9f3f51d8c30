"""The command line's main job on a shipped task with default options, without the orders that it is set against (slow;
those are looked at on a tiny task)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import command
from helpers.tiny_task import FILES, files_in

from tl_sparsify import (
    Reduction,
    ablate,
    constants,
    evaluate,
    heads,
    intervened,
    load_folded,
    load_task,
    neurons,
    risk,
    score,
    sparsify,
)
from tl_sparsify import run as running
from tl_sparsify.search.settings import Refitting


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The main job on the shipped task with default options, and the path that it found."""
    out, found = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            running, "sparsify", lambda *args, **options: found.append(sparsify(*args, **options)) or found[0]
        )
        assert command("run", "hierarchical_equality", "--no-baselines", "--out", out).code == 0
    assert {"baselines.csv", *files_in(out)} == set(FILES)
    return out, found[0]


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    task = load_task("hierarchical_equality")
    return task.model(), task.examples(0)


@pytest.mark.slow
def test_a_tenth_of_the_units_with_refitted_constants_answers_as_the_model_does(demo: Any, shipped: Any):
    model, (train, validation, test) = shipped
    reduction = constants.refit(model, demo[1].at(0.1), train, validation, progress=False)
    found = evaluate(model, reduction, test)
    assert found.kept == 78 and found.kind == "refit"
    assert found.accuracy >= 0.97
    assert found.risk.mean <= 0.1


@pytest.mark.slow
def test_the_order_of_variance_with_the_same_refit_does_not(shipped: Any):
    model, (train, validation, test) = shipped
    found = score.variance(model, train, heads(model) + neurons(model))
    start = constants.reduced(model, found.top(0.1), constants.mean(model, train, found.units))
    assert risk(model, constants.refit(model, start, train, validation, progress=False), test).mean > 0.1


@pytest.mark.slow
def test_the_demos_folded_model_is_the_ablated_one_on_every_test_input(demo: Any, shipped: Any):
    model, (_, _, test) = shipped
    folded, reduction = load_folded(demo[0] / "folded"), Reduction.load(demo[0] / "circuit.reduction")
    assert len(reduction.circuit) == 39
    with torch.no_grad():
        small = folded(test.tokens)
        with intervened(model, ablate(reduction)):
            assert float((model(test.tokens) - small).abs().max()) <= 1e-4
    assert sum(p.numel() for p in folded.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_the_demos_files_agree_with_each_other(demo: Any, shipped: Any):
    model, (_, _, test) = shipped
    out, path = demo
    reduction = Reduction.load(out / "circuit.reduction")
    found = pd.read_csv(out / "evaluation.csv").iloc[0]
    assert found.accuracy == evaluate(model, reduction, test).accuracy
    frame = pd.read_csv(out / "path.csv")
    assert len(frame) == len(path.rounds) == 20
    assert frame.measured.tolist() == [step.measured.mean for step in path.rounds]
    evidence = pd.read_csv(out / "evidence.csv")
    assert set(evidence.variable) == {"left", "right", "same", "left & right", "(none)"}
    alignment = load_task("hierarchical_equality").alignment
    kept = evidence[(evidence.model == "reduced") & (evidence.intervention == "aligned units")]
    kept = kept[kept.variable.isin(alignment.variables)]
    for row in kept.itertuples():
        units = alignment.units[str(row.variable)]
        assert row.removed == sum(unit.at(None).name not in reduction.circuit for unit in units)


@pytest.mark.slow
def test_the_search_is_the_same_byte_for_byte(shipped: Any, tmp_path: Path):
    model, (train, validation, _) = shipped
    for name in ("one", "two"):
        path = sparsify(
            model,
            train,
            heads(model) + neurons(model),
            rounds=2,
            held_out=validation,
            refitting=Refitting(5),
            seed=4,
            progress=False,
        )
        constants.refit(model, path.at(0.1), train, validation, steps=5, seed=4, progress=False).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
