"""The command line on a task with a model of 28 units: the files of a run and their numbers, and the report of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import QUICK, Outcome, command
from helpers.tiny_task import FILES, TASK, files_in, sentence, task_folder

from tl_sparsify import (
    Reduction,
    ablate,
    constants,
    evaluate,
    fingerprint,
    heads,
    intervened,
    load_folded,
    load_task,
    neurons,
    refit_until_converged,
    risk,
    score,
)
from tl_sparsify import run as running

UNITS = 28


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A complete run that keeps a quarter of the units, with a short refit."""
    out = tmp_path_factory.mktemp("done") / "new" / "folder"
    return out, command("run", tiny, "--keep", "0.25", "--rounds", "2", "--steps", "15", "--out", out)


def test_a_complete_run_ends_with_status_zero_and_writes_every_file(done: tuple[Path, Outcome]):
    out, outcome = done
    assert (outcome.code, outcome.err) == (0, "")
    assert tuple(files_in(out)) == FILES


def test_the_tables_are_printed(done: tuple[Path, Outcome]):
    printed = done[1].out
    assert all(word in printed for word in ("tiny", "a random model", "odd", "layer 1", "do nothing", str(done[0])))


def test_scores_are_sorted_and_name_every_unit(done: tuple[Path, Outcome]):
    frame = pd.read_csv(done[0] / "scores.csv")
    assert list(frame.columns) == ["unit", "kind", "layer", "index", "score", "stderr"]
    assert len(set(frame.unit)) == len(frame) == UNITS
    assert frame.score.is_monotonic_decreasing and frame.score.iloc[0] > 0


def test_the_path_has_predicted_and_measured_risk_for_every_round(done: tuple[Path, Outcome]):
    frame = pd.read_csv(done[0] / "path.csv")
    wanted = ["kept", "fraction", "predicted", "predicted_stderr", "measured", "measured_stderr"]
    assert list(frame.columns)[: len(wanted)] == wanted
    assert len(frame) == 2 and frame.kept.is_monotonic_decreasing and frame.kept.iloc[-1] == 1
    assert (frame.fraction == frame.kept / UNITS).all()
    assert bool(frame[wanted].notna().all(axis=None)) and bool((frame.measured >= 0).all())


def test_the_reduction_is_of_the_tasks_model_and_keeps_what_was_asked_for(tiny: Path, done: tuple[Path, Outcome]):
    reduction, task = Reduction.load(done[0] / "circuit.reduction"), load_task(tiny)
    model = task.model()
    assert len(reduction.circuit) == 7 and reduction.kind == "refit"
    assert reduction.fingerprint == fingerprint(model)
    found = pd.read_csv(done[0] / "evaluation.csv").iloc[0]
    assert found.risk == pytest.approx(risk(model, reduction, task.examples(0)[2]).mean, rel=1e-10)
    assert (found.kept, found.fraction, found.kind) == (7, 0.25, "refit")


def test_the_folded_model_is_the_reduction_made_smaller(tiny: Path, done: tuple[Path, Outcome]):
    model, folded = load_task(tiny).model(), load_folded(done[0] / "folded")
    reduction = Reduction.load(done[0] / "circuit.reduction")
    tokens = torch.randint(6, (50, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small = folded(tokens)
        with intervened(model, ablate(reduction)):
            assert float((model(tokens) - small).abs().max()) <= 1e-4
    assert set(folded.units.values()) == set(reduction.circuit.names)
    frame = pd.read_csv(done[0] / "fold.csv").set_index("part")
    assert list(frame.index) == ["layer 0", "layer 1", "whole model"]
    assert frame.loc["whole model", "heads_kept"] + frame.loc["whole model", "neurons_kept"] == 7
    assert frame.loc["whole model", "heads"] + frame.loc["whole model", "neurons"] == UNITS
    assert frame.loc["whole model", "parameters"] == sum(p.numel() for p in model.parameters())
    assert frame.loc["whole model", "parameters_kept"] == sum(p.numel() for p in folded.parameters())
    for layer in range(2):
        kept = [name for name in reduction.circuit.names if name.startswith(f"L{layer}")]
        here: Any = frame.loc[f"layer {layer}"]
        assert (here.heads_kept, here.neurons_kept) == (sum("H" in n for n in kept), sum("N" in n for n in kept))
        assert here.parameters_kept == sum(p.numel() for p in folded.blocks[layer].parameters())


def test_the_evidence_has_both_models_beside_the_controls(done: tuple[Path, Outcome]):
    frame = pd.read_csv(done[0] / "evidence.csv")
    assert {"model", "intervention", "variable", "accuracy", "stderr", "accuracy_changed", "retained"} <= set(frame)
    found = set(zip(frame.model, frame.intervention, strict=True))
    both = {"aligned units", "do nothing", "random units", "arbitrary labels", "whole residual stream"}
    both |= {"unaligned units, at random", "all unaligned units"}
    assert found == {(model, name) for model in ("original", "reduced") for name in both} | {
        *(("random weights", name) for name in ("aligned units", "do nothing")),
        ("reduced", "random kept units, p = 0.1"),
    }
    assert set(frame.variable) == {"odd", "(none)"}


def test_other_orders_have_circuits_of_the_same_size_with_the_same_constants_and_refit(
    tiny: Path, done: tuple[Path, Outcome]
):
    frame = pd.read_csv(done[0] / "baselines.csv")
    orders = ["random", "activation variance", "gradient attribution", "found circuit"]
    pairs = [(name, kind, steps) for name in orders for kind, steps in (("mean", False), ("refit", True))]
    assert list(zip(frame.method, frame.replacements, frame.refitted, strict=True))[:-1] == pairs
    assert (frame.kept == 7).all() and bool(frame.risk.gt(0).all())
    task = load_task(tiny)
    model, (train, validation, test) = task.model(), task.examples(0)
    units = heads(model) + neurons(model)
    means = constants.mean(model, train, units)
    gradient = score.gradient(model, train, units, values=means).absolute
    circuits = {
        "activation variance": score.variance(model, train, units).top(0.25),
        "gradient attribution": gradient.top(0.25),
        "found circuit": Reduction.load(done[0] / "circuit.reduction").circuit,
    }
    for name, circuit in circuits.items():
        plain = constants.reduced(model, circuit, means)
        settings = {"patience": 15, "most": 15, "per_step": 128}
        for kind, reduction in (
            ("mean", plain),
            ("refit", refit_until_converged(model, plain, train, validation, **settings)),
        ):
            [row] = frame[(frame.method == name) & (frame.replacements == kind)].itertuples()
            expected = evaluate(model, reduction, test)
            assert row.risk == pytest.approx(expected.risk.mean, rel=1e-6)
            assert row.risk_stderr == pytest.approx(expected.risk.stderr, rel=1e-6)
            assert row.accuracy == expected.accuracy
    saved, found = frame.iloc[-1], pd.read_csv(done[0] / "evaluation.csv").iloc[0]
    assert saved.method == "found circuit, as saved" and (saved.risk, saved.accuracy) == (found.risk, found.accuracy)


def test_the_run_says_how_it_was_made(tiny: Path, done: tuple[Path, Outcome]):
    about = json.loads((done[0] / "run.json").read_text())
    assert (about["task"], about["description"], about["seed"], about["keep"]) == ("tiny", "a random model", 0, 0.25)
    assert about["examples"] == {"train": 48, "validation": 24, "test": 32, "pairs": 64}
    assert about["baseline_refit"] == {"patience": 15, "most": 15, "batch_size": 128}
    assert about["refitted_in_rounds"] is True
    assert about["versions"]["torch"] == torch.__version__ and str(tiny) not in json.dumps(about)
    difference = pd.read_csv(done[0] / "evaluation.csv").folded_difference.iloc[0]
    assert 0 <= difference <= 1e-4


def test_a_report_of_a_run_is_one_file_with_its_numbers(done: tuple[Path, Outcome], tmp_path: Path):
    outcome = command("report", done[0], "--out", tmp_path / "tiny.html")
    assert outcome == Outcome(0, f"written to {tmp_path / 'tiny.html'}\n", "")
    text = (tmp_path / "tiny.html").read_text()
    found = pd.read_csv(done[0] / "evaluation.csv").iloc[0]
    assert f"is {found.risk:.3g} nats" in text and "7 of 28 units (25.0%)" in text and "a random model" in text
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.html"]


def test_a_report_stands_beside_the_results_by_default(quick: Path, tmp_path: Path):
    shutil.copytree(quick, tmp_path, dirs_exist_ok=True)
    assert command("report", tmp_path) == Outcome(0, f"written to {tmp_path / 'report.html'}\n", "")
    assert set(files_in(tmp_path)) == {*FILES, "report.html"}  # a model of which everything is kept


def test_runs_in_folders_of_one_folder_have_one_report(done: tuple[Path, Outcome], quick: Path, tmp_path: Path):
    for name, source in (("1_quarter", done[0]), ("2_all", quick)):
        shutil.copytree(source, tmp_path / name)
    assert command("report", tmp_path).code == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<h1>") == 2 and text.index("7 of 28 units") < text.index("28 of 28 units")
    assert "Settings and versions of the run in 1_quarter" in text


def test_a_report_of_nothing_gets_one_sentence(quick: Path, tmp_path: Path):
    line = sentence(command("report", tmp_path))
    assert "holds no results" in line and f"tl-sparsify run TASK --out {tmp_path}" in line
    for name in ("scores.csv", "path.csv"):
        shutil.copy(quick / name, tmp_path)
    line = sentence(command("report", tmp_path))
    assert "unfinished run" in line and "evidence.csv" in line
    assert "there is no folder" in sentence(command("report", quick, "--out", tmp_path / "far" / "report.html"))


def test_the_figures_are_png_files(done: tuple[Path, Outcome]):
    for name in ("risk.png", "map.png", "causal.png"):
        content = (done[0] / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")


def test_the_same_seed_gives_the_same_files_byte_for_byte_over_older_ones(tiny: Path, done: tuple[Path, Outcome]):
    before = files_in(done[0])
    options = ("--keep", "0.25", "--rounds", "2", "--steps", "15", "--seed", "0", "--quiet")
    outcome = command("run", tiny, *options, "--out", done[0])
    assert outcome == Outcome(0, "", "")
    after = files_in(done[0])
    assert tuple(after) == FILES and [name for name in FILES if after[name] != before[name]] == []


def test_another_seed_gives_other_files_by_default_under_the_tasks_name(
    tiny: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert command("run", tiny, *QUICK, "--seed", "1").code == 0
    other, first = files_in(tmp_path / "results" / "tiny"), files_in(quick)
    assert tuple(other) == tuple(first) == FILES
    assert other["scores.csv"] != first["scores.csv"] and other["evidence.csv"] != first["evidence.csv"]


def test_older_results_are_replaced_as_a_whole(tiny: Path, done: tuple[Path, Outcome], tmp_path: Path):
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.html").write_text("of the older run")
    before = files_in(tmp_path)
    outcome = command("run", tiny, *QUICK, "--no-baselines", "--seed", "1", "--out", tmp_path)
    assert outcome.code == 0
    after = files_in(tmp_path)
    assert sorted(after) == sorted({*FILES, "notes.txt"} - {"baselines.csv"}) and after["notes.txt"] == b"mine"
    assert all(after[name] != before[name] for name in ("scores.csv", "path.csv", "run.json", "evidence.csv"))


def test_parts_are_left_out_and_the_report_says_so(tiny: Path, tmp_path: Path):
    code = TASK.replace('tls.Alignment({"odd": [tls.Unit(head, 0)]})', "tls.Alignment({})")
    outcome = command(
        "run", task_folder(tmp_path, code), *QUICK, "--no-baselines", "--no-align", "--units", "heads,mlps",
        "--examples", "20", "--batch-size", "7", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    assert set(files_in(tmp_path / "out")) == {*FILES} - {"baselines.csv", "evidence.csv"}
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["left_out"] == ["baselines.csv", "evidence.csv"] and about["units"] == ["heads", "mlps"]
    assert about["examples"]["train"] == 20 and "baseline_refit" not in about
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 4 + 2  # heads, and a whole layer each
    assert command("report", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "has not been put to the test" in text and "Beside other circuits" not in text
    (tmp_path / "out" / "fold.csv").unlink()
    assert "without fold.csv" in sentence(command("report", tmp_path / "out"))


def test_units_that_do_not_fold_have_no_smaller_model(tiny: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = command(
        "run", tiny, "--rounds", "2", "--effort", "quick", "--no-baselines", "--units", "edges", "--out", out
    )
    assert found.code == 0, found.err
    assert "these units do not fold: there is no smaller model" in found.out
    about = json.loads((out / "run.json").read_text())
    assert "fold.csv" in about["left_out"] and not (out / "folded").exists() and not (out / "fold.csv").exists()
    assert set(pd.read_csv(out / "evidence.csv").model) >= {"original", "reduced"}
    assert command("report", out).code == 0
    assert "the circuit does not fold" in (out / "report.html").read_text()


MODELS_THAT_DO_NOT_FOLD = {
    "models of architecture Olmo2ForCausalLM do not fold": ("helpers.architectures", "fresh('OLMo 2')", 6),
    "models of architecture MixtralForCausalLM do not fold": ("helpers.mixtures", "mixture('Mixtral')", 6),
    "the activation solu_ln mixes neurons": ("helpers.models", "fresh(act_fn='solu_ln')", 2),
}


@pytest.mark.parametrize("why", MODELS_THAT_DO_NOT_FOLD)
def test_a_model_that_does_not_fold_is_said_before_the_search_and_has_no_smaller_one(why: str, tmp_path: Path):
    module, made, size = MODELS_THAT_DO_NOT_FOLD[why]
    name = made.split("(")[0]
    code = TASK.replace("def model():", f"def model():\n    from {module} import {name}\n    return {made}\n\ndef _():")
    task, out = task_folder(tmp_path, code.replace("size=2", f"size={size}")), tmp_path / "out"
    units = "heads,neurons" if "solu" in why else "heads"
    options = ("--keep", "0.5", "--rounds", "1", "--effort", "quick", "--steps", "2", "--no-baselines")
    found = command("run", task, *options, "--units", units, "--out", out)
    assert (found.code, found.err) == (0, "")
    said, _, after = found.out.partition("Path: risk")
    assert "there will be no smaller model: " in said and why in said
    assert "do not fold: there is no smaller model" in after
    about = json.loads((out / "run.json").read_text())
    assert "fold.csv" in about["left_out"] and not (out / "folded").exists() and not (out / "fold.csv").exists()
    assert (out / "evaluation.csv").is_file()
    assert command("report", out).code == 0


def test_the_batch_size_and_the_steps_reach_every_part(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[Any]] = {}

    def noting(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            seen.setdefault(name, []).append((options.get("batch_size"), options.get("steps")))
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    for owner, names in ((running, ("sparsify", "evaluate", "verify", "compared", "accuracy")),
                         (constants, ("refit", "mean")), (score, ("risk", "variance", "gradient"))):  # fmt: skip
        for name in names:
            noting(owner, name)
    options = ("--keep", "0.5", "--rounds", "1", "--steps", "2", "--batch-size", "8")
    assert command("run", tiny, *options, "--quiet", "--out", tmp_path).code == 0
    assert {name: [size for size, _ in calls if size != 8] for name, calls in seen.items()} == {
        name: [] for name in seen
    }
    assert seen["refit"] == [(8, 2), *[(8, 2), (8, 1)] * 4] and len(seen) == 10  # the last one, and four orders


def test_the_models_accuracy_and_the_time_are_said_before_the_search(done: tuple[Path, Outcome], tiny: Path):
    printed = done[1].out
    task = load_task(tiny)
    model, (_, validation, _) = task.model(), task.examples(0)
    with torch.no_grad():
        logits = model(validation.tokens)[:, -1]
    right = validation.labels[:, -1]
    among = float((logits[:, :4].argmax(1) == right).double().mean())
    every = float((logits.argmax(1) == right).double().mean())
    assert f"{among:.3f}" in printed.split("accuracy on validation examples:")[1].splitlines()[0]
    about = json.loads((done[0] / "run.json").read_text())
    assert about["model_accuracy"] == {"vocabulary": every, "choices": among, "n": 24}
    head = printed.split("Path: risk")[0]
    assert among < 0.7 and "warning: below 0.7" in head and "effort standard: about" in head


def test_a_description_is_printed_as_it_is(tmp_path: Path):
    code = TASK.replace('description="a random model"', 'description="[INST] which one? [/INST] [bold]x"')
    outcome = command("run", task_folder(tmp_path, code), *QUICK, "--no-baselines", "--out", tmp_path / "[out]")
    assert outcome.code == 0 and "tiny: [INST] which one? [/INST] [bold]x\n" in outcome.out
    assert f"written to {tmp_path / '[out]'}" in outcome.out


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_for_those_who_look_and_want_them(quiet: bool, tiny: Path, tmp_path: Path):
    outcome = command("run", tiny, *QUICK, "--out", tmp_path, *(["--quiet"] if quiet else []), terminal=True)
    assert outcome.code == 0
    assert bool(outcome.err) == ("removing units" in outcome.err) == (not quiet)
    assert bool(outcome.out) == (not quiet)


def test_there_are_no_bars_where_nobody_looks(done: tuple[Path, Outcome]):
    assert done[1].err == "" and "removing units" not in done[1].out and "\r" not in done[1].out
