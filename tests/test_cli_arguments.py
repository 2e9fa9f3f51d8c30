"""The command line's arguments: what a wrong one is told, before the work starts, and what needs no task at all."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Outcome, command
from helpers.tiny_task import TASK, sentence, task_folder
from helpers.written import table

from tl_sparsify import (
    list_tasks,
)
from tl_sparsify.comparison import benchmark


def test_the_version_is_told():
    from tl_sparsify import __version__

    assert command("--version") == Outcome(0, f"tl-sparsify {__version__}\n", "")


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


def test_help_waits_for_no_torch():
    heavy = "{'torch', 'transformers', 'transformer_lens', 'pandas'}"
    code = f"import sys, tl_sparsify.cli; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


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


@pytest.mark.parametrize("option", ["--seeds", "--examples"])
def test_what_a_small_benchmark_chooses_is_not_given(option: str, tmp_path: Path):
    line = sentence(command("bench", "--smoke", option, "5", "--out", tmp_path / "out"))
    assert f"{option} is 5, and --smoke chooses it itself: leave one of the two out" in line
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_no_number_that_the_effort_chooses():
    said = " ".join(command("run", "--help").out.replace("│", " ").split())
    for name in ("rounds of removing units", "of the last refit of constants", "the most training examples"):
        assert f"{name}; by default what --effort chooses" in said


def test_names_in_brackets_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "runs [bold] [" / "old]"
    out.mkdir(parents=True)
    made = table(tasks=("[/odd]",), methods=("joint risk [/x]", "EAP"), seeds=1)
    made = made.assign(own_ablation="mean", all_forward=40, all_backward=80)
    monkeypatch.setattr(benchmark, "compare_tasks", lambda *args, **settings: made)
    monkeypatch.setattr(benchmark, "write_comparison", lambda table, folder: [folder / "table [x].csv"])
    outcome = command("bench", "--out", out)
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "table [x].csv" in said and "[/odd]" in said and "joint risk [/x]" in said
