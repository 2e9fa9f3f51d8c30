"""The command line: exit codes, sentences, the files that are written, and what is left after an interruption.

The fast tests run a task of their own with a model of 28 units; the slow ones the shipped task and real processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import QUICK, Outcome, command
from matplotlib.figure import Figure

from tl_sparsify import (
    Reduction,
    ablate,
    constants,
    evaluate,
    fingerprint,
    heads,
    intervened,
    list_tasks,
    load_folded,
    load_task,
    neurons,
    risk,
    score,
    sparsify,
)
from tl_sparsify import run as running
from tl_sparsify.search.joint import Refitting

TASK = """
import numpy as np
import torch
from transformer_lens import TransformerBridge, TransformerBridgeConfig
import tl_sparsify as tls

PARITY = tls.CausalModel(("x", "y"), {"odd": lambda x: x % 2, "answer": lambda odd, y: odd + 2 * (y > 2)}, "answer")

def model():
    config = dict(d_model=8, d_head=4, n_heads=2, n_layers=2, n_ctx=4, d_vocab=6, d_mlp=12, act_fn="relu",
                  normalization_type="LN", seed=0)
    with torch.random.fork_rng():
        made = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made.eval()

def side(n, rng):
    tokens = rng.integers(6, size=(n, 4))
    inputs = {"x": tokens[:, 1], "y": tokens[:, 2]}
    labels = np.full_like(tokens, -100)
    labels[:, 3] = PARITY.run(inputs)["answer"]
    return inputs, tls.Examples(torch.tensor(tokens), torch.tensor(labels), choices=torch.arange(4))

def examples(seed):
    rng = np.random.default_rng(seed)
    return tuple(side(n, rng)[1] for n in (48, 24, 32))

def pairs(n, seed):
    rng = np.random.default_rng(seed)
    (base_inputs, base), (source_inputs, source) = side(n // 8, rng), side(n // 8, rng)
    return tls.Pairs(base_inputs, source_inputs, base, source, {i: i for i in range(4)})

def task():
    head = tls.Site(kind="head", layer=0, hook="blocks.0.attn.hook_z", size=2, positions=3)
    return tls.Task(
        name="tiny", description="a random model", model=model, dataset=lambda seed: {}, examples=examples,
        causal_model=PARITY, alignment=tls.Alignment({"odd": [tls.Unit(head, 0)]}), pairs=pairs, chance=0.25,
    )
"""
FILES = (
    "baselines.csv", "causal.png", "circuit.reduction", "evaluation.csv", "evidence.csv", "fold.csv",
    "folded/folded.safetensors", "map.png", "path.csv", "risk.png", "run.json", "scores.csv",
)  # fmt: skip
AT_LAST = ("causal.png", "map.png", "risk.png", "run.json")  # written after everything is computed
UNITS = 28


def task_folder(parent: Path, code: str = TASK) -> Path:
    folder = parent / "tiny"
    folder.mkdir()
    (folder / "task.py").write_text(code)
    (folder / "README.md").write_text("# Tiny\n")
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_folder(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def done(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A complete run that keeps a quarter of the units, with a short refit."""
    out = tmp_path_factory.mktemp("done") / "new" / "folder"
    return out, command("run", tiny, "--keep", "0.25", "--rounds", "2", "--steps", "15", "--out", out)


@pytest.fixture(scope="module")
def quick(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with ``QUICK``, to hold interrupted ones against."""
    out = tmp_path_factory.mktemp("quick")
    assert command("run", tiny, *QUICK, "--out", out).code == 0
    return out


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
    pairs = [(name, kind, steps) for name in orders for kind, steps in (("mean", 0.0), ("refit", 15.0))]
    assert list(zip(frame.method, frame.replacements, frame.steps, strict=True))[:-1] == pairs
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
        settings = {"steps": 15, "per_step": 128, "progress": False}
        for kind, reduction in (
            ("mean", plain),
            ("refit", constants.refit(model, plain, train, validation, **settings)),
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
    assert about["baseline_refit"] == {"steps": 15, "batch_size": 128}
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
    options = ("--keep", "0.5", "--rounds", "1", "--steps", "15", "--batch-size", "8")
    assert command("run", tiny, *options, "--quiet", "--out", tmp_path).code == 0
    assert {name: [size for size, _ in calls if size != 8] for name, calls in seen.items()} == {
        name: [] for name in seen
    }
    assert seen["refit"] == [(8, 15)] * 5 and len(seen) == 10  # the last one, and four orders


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


def test_the_version_is_told():
    from tl_sparsify import __version__

    assert command("--version") == Outcome(0, f"tl-sparsify {__version__}\n", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_for_those_who_look_and_want_them(quiet: bool, tiny: Path, tmp_path: Path):
    outcome = command("run", tiny, *QUICK, "--out", tmp_path, *(["--quiet"] if quiet else []), terminal=True)
    assert outcome.code == 0
    assert bool(outcome.err) == ("removing units" in outcome.err) == (not quiet)
    assert bool(outcome.out) == (not quiet)


def test_there_are_no_bars_where_nobody_looks(done: tuple[Path, Outcome]):
    assert done[1].err == "" and "removing units" not in done[1].out and "\r" not in done[1].out


def test_tasks_lists_the_shipped_tasks_with_a_line_each():
    outcome = command("tasks")
    assert (outcome.code, outcome.err) == (0, "")
    heading, *lines = outcome.out.splitlines()
    assert heading.split()[:4] == ["task", "accuracy", "chance", "units"]
    assert [line.split()[0] for line in lines] == list(list_tasks())
    found = {line.split()[0]: re.split(r"\s{2,}", line) for line in lines}
    assert found["hierarchical_equality"][1:] == [
        "1.000", "0.500", "780", "-", "is (a == b) the same as (c == d), over 32 symbols",
    ]  # fmt: skip
    assert found["planted_gate"][4] == "weights, removal" and found["tracr_sort"][4] == "weights, removal"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["tasks", "--help"]])
def test_help_is_no_error(arguments: list[str]):
    outcome = command(*arguments)
    assert (outcome.code, outcome.err) == (0, "") and "Usage" in outcome.out


def sentence(outcome: Outcome) -> str:
    """The one sentence of a wrong argument."""
    assert outcome.code == 2 and outcome.out == ""
    [line] = outcome.err.splitlines()
    assert line.startswith("tl-sparsify: ")
    return line


@pytest.fixture(scope="module")
def untouchable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that must not be worked on."""
    code = TASK.replace("def model():", "def model():\n    raise RuntimeError('the work has started')")
    return task_folder(tmp_path_factory.mktemp("untouchable"), code)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "0"], "0.0"),
        (["--keep", "1.5"], "1.5"),
        (["--keep", "-0.1"], "-0.1"),
        (["--keep", "nan"], "nan"),
        (["--keep", "much"], "--keep"),
        (["--rounds", "0"], "rounds is 0; at least one"),
        (["--rounds", "-3"], "rounds is -3"),
        (["--rounds", "2.5"], "--rounds"),
        (["--seed", "x"], "--seed"),
        (["--seed", "-1"], "--seed is -1; it must lie in [0, 2147483647]"),
        (["--seed", "9223372036854775808"], "--seed"),
        (["--effort", "much"], "--effort is 'much'; it is one of quick, standard, thorough"),
        (["--first-token", "any"], "--first-token is 'any'"),
        (["--units", "heads,wings"], "--units has 'wings'"),
        (["--batch-size", "0"], "--batch-size is 0; at least one"),
        (["--prepend-bos"], "prepend_bos is given, but the task"),
        (["--nothing"], "--nothing"),
        (["and", "more"], "and"),
    ],
)
def test_a_wrong_option_gets_one_sentence_before_the_work_starts(
    options: list[str], said: str, untouchable: Path, tmp_path: Path
):
    assert said in sentence(command("run", untouchable, "--out", tmp_path / "out", *options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "said"), [(["run"], "task"), (["frobnicate"], "frobnicate")])
def test_a_wrong_command_gets_one_sentence(arguments: list[str], said: str):
    assert said in sentence(command(*arguments)).lower()


@pytest.mark.parametrize("wrong", ["hierarchical_equalty", "hierarchical"])
def test_an_unknown_task_gets_the_near_ones(wrong: str, tmp_path: Path):
    line = sentence(command("run", wrong, "--out", tmp_path / "out"))
    assert f"unknown task '{wrong}': did you mean hierarchical_equality?" in line
    assert list(tmp_path.iterdir()) == []


def test_a_task_folder_without_its_parts_gets_one_sentence(tmp_path: Path):
    assert "has no task.py" in sentence(command("run", tmp_path, "--out", tmp_path / "out"))


def test_an_output_folder_that_is_a_file_is_said_before_the_work_starts(untouchable: Path, tmp_path: Path):
    file = tmp_path / "thesis.txt"
    file.write_text("all of it")
    for out in (file, file / "below", file / "far" / "below"):
        line = sentence(command("run", untouchable, "--out", out))
        assert f"--out {out} is not writable" in line
    assert file.read_text() == "all of it"


def test_an_output_folder_without_the_right_to_write_is_said_before_the_work_starts(
    untouchable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refused)
    line = sentence(command("run", untouchable, "--out", tmp_path))
    assert f"--out {tmp_path} is not writable: Permission denied" in line


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_wrong_device_gets_one_sentence_before_the_work_starts(device: str, untouchable: Path, tmp_path: Path):
    assert f"--device {device} cannot be used here" in sentence(
        command("run", untouchable, "--device", device, "--out", tmp_path)
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_wrong_argument_is_not_hidden(untouchable: Path, tmp_path: Path):
    with pytest.raises(RuntimeError, match="the work has started"):
        command("run", untouchable, "--out", tmp_path)


def torn_write(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ctrl-C when half of the file of this name has been written."""
    whole = Path.write_bytes

    def write_bytes(path: Path, content: Any) -> int:
        if name in path.name:
            whole(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def torn_figure(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def savefig(figure: Figure, target: Any, **options: Any) -> None:
        target.write(b"half") if hasattr(target, "write") else Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", savefig)


def torn_work(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def stopped(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, name, stopped)


@pytest.mark.parametrize(
    ("tear", "name", "whole"),
    [
        (torn_work, "sparsify", ["scores.csv"]),
        (torn_write, "path.csv", ["scores.csv"]),
        (torn_write, "circuit.reduction", ["path.csv", "scores.csv"]),
        (torn_write, "folded.safetensors", ["circuit.reduction", "path.csv", "scores.csv"]),
        (torn_work, "beside", [name for name in FILES if name not in ("baselines.csv", "evidence.csv", *AT_LAST)]),
        (torn_work, "verify", [name for name in FILES if name not in ("evidence.csv", *AT_LAST)]),
        (torn_figure, "risk.png", [name for name in FILES if name not in AT_LAST]),
        (torn_write, "run.json", [name for name in FILES if name != "run.json"]),
    ],
)
def test_an_interruption_leaves_complete_files_only(
    tear: Any, name: str, whole: list[str], tiny: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tear(monkeypatch, name)
    outcome = command("run", tiny, *QUICK, "--quiet", "--out", tmp_path)
    assert outcome.code not in (0, 2) and outcome.out == ""
    assert "interrupted" in outcome.err and "Traceback" not in outcome.err
    left, complete = files_in(tmp_path), files_in(quick)
    assert sorted(left) == whole  # no .part file either
    assert all(left[file] == complete[file] for file in left)


def test_an_interruption_leaves_older_files_whole(
    tiny: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(quick, tmp_path, dirs_exist_ok=True)
    torn_write(monkeypatch, "folded.safetensors")
    assert command("run", tiny, *QUICK, "--quiet", "--out", tmp_path).code not in (0, 2)
    assert files_in(tmp_path) == files_in(quick)


def process(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    script = Path(sys.executable).with_name("tl-sparsify")
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(script), *map(str, arguments)], cwd=cwd, env=environ, text=True, **pipes)


@pytest.mark.slow
def test_a_real_process_writes_the_same_files(tiny: Path, quick: Path, tmp_path: Path):
    running = process("run", tiny, *QUICK, "--out", tmp_path / "out", cwd=tmp_path)
    out, err = running.communicate()
    assert (running.returncode, err) == (0, "") and "written to" in out
    written = files_in(tmp_path / "out")
    assert tuple(written) == FILES and written["scores.csv"] == files_in(quick)["scores.csv"]


@pytest.mark.slow
def test_a_real_process_refuses_in_one_sentence(tmp_path: Path):
    running = process("run", "hierarchical_equalty", cwd=tmp_path)
    out, err = running.communicate()
    assert (running.returncode, out, len(err.splitlines())) == (2, "", 1)
    assert "did you mean hierarchical_equality" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_real_process_that_is_interrupted_leaves_complete_files_only(tmp_path: Path):
    running = process("run", "hierarchical_equality", "--out", tmp_path / "out", cwd=tmp_path)
    while running.poll() is None and not (tmp_path / "out" / "scores.csv").exists():
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert running.returncode not in (0, 2)
    assert "interrupted" in err and "Traceback" not in out + err
    assert list(files_in(tmp_path / "out")) == ["scores.csv"]
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 780


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The main job on the shipped task with default options, and the path that it found."""
    out, found = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            running, "sparsify", lambda *args, **options: found.append(sparsify(*args, **options)) or found[0]
        )
        assert command("run", "hierarchical_equality", "--out", out).code == 0
    assert tuple(files_in(out)) == FILES
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
