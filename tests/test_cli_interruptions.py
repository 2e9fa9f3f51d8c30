"""What is left after an interruption, torn by hand and in real processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.commands import QUICK, command, started
from helpers.tiny_task import FILES, TASK, files_in, results_in, task_folder
from matplotlib.figure import Figure

from tl_sparsify import run as running

AT_LAST = ("causal.png", "map.png", "risk.png", "run.json")  # written after everything is computed


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
    left, complete = results_in(tmp_path), files_in(quick)
    assert sorted(left) == whole  # no .part file either
    assert all(left[file] == complete[file] for file in left)


def test_a_search_that_was_interrupted_is_gone_on_with(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ("--keep", "0.25", "--rounds", "3", "--steps", "2", "--no-baselines", "--no-align")
    assert command("run", tiny, *options, "--out", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch:
        torn_write(patch, "path.csv")
        assert command("run", tiny, *options, "--out", tmp_path / "torn").code not in (0, 2)
    assert any(name.endswith("state.search") for name in files_in(tmp_path / "torn"))
    other = command("run", tiny, *options, "--seed", "1", "--out", tmp_path / "torn")
    assert other.code == 0 and "going on with" not in other.out
    with monkeypatch.context() as patch:
        torn_write(patch, "path.csv")
        assert command("run", tiny, *options, "--out", tmp_path / "torn").code not in (0, 2)
    again = command("run", tiny, *options, "--out", tmp_path / "torn")
    assert again.code == 0 and "going on with the search that was interrupted" in again.out
    assert files_in(tmp_path / "torn") == files_in(tmp_path / "whole")


SHORT = ("--keep", "0.25", "--rounds", "3", "--steps", "2", "--no-baselines", "--no-align")


def searches_in(folder: Path) -> set[str]:
    return {name.split("/")[1] for name in files_in(folder) if name.endswith("state.search")}


def test_other_searches_that_were_interrupted_stay(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        torn_write(patch, "path.csv")
        for seed in ("0", "1"):
            assert command("run", tiny, *SHORT, "--seed", seed, "--out", tmp_path).code not in (0, 2)
    assert len(searches_in(tmp_path)) == 2
    first = command("run", tiny, *SHORT, "--seed", "1", "--out", tmp_path)
    assert first.code == 0 and "going on with" in first.out and len(searches_in(tmp_path)) == 1
    second = command("run", tiny, *SHORT, "--seed", "0", "--out", tmp_path)
    assert second.code == 0 and "going on with" in second.out and not (tmp_path / "search").exists()


def edited(task: Path, search: Path) -> None:
    (task / "task.py").write_text(TASK.replace("(48, 24, 32)", "(40, 24, 32)"))


def damaged(task: Path, search: Path) -> None:
    search.write_bytes(search.read_bytes()[:-5])


@pytest.mark.parametrize("change", [edited, damaged])
def test_a_search_that_no_longer_fits_starts_afresh(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task, out = task_folder(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        torn_write(patch, "path.csv")
        assert command("run", task, *SHORT, "--out", out).code not in (0, 2)
    [search] = out.rglob("state.search")
    change(task, search)
    again = command("run", task, *SHORT, "--out", out)
    assert (again.code, again.err) == (0, "") and again.out.count("it starts afresh") == 1
    assert command("run", task, *SHORT, "--out", tmp_path / "whole").code == 0
    assert files_in(out) == files_in(tmp_path / "whole")


def test_what_is_wrong_with_a_search_that_goes_on_is_not_hidden(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        torn_write(patch, "path.csv")
        assert command("run", tiny, *SHORT, "--out", tmp_path).code not in (0, 2)

    def refused(*arguments: Any, **options: Any) -> None:
        raise ValueError("another fault")

    monkeypatch.setattr(running, "sparsify", refused)
    outcome = command("run", tiny, *SHORT, "--out", tmp_path)
    assert outcome.code == 2 and "another fault" in outcome.err and len(searches_in(tmp_path)) == 1


def test_an_interruption_leaves_older_files_whole(
    tiny: Path, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(quick, tmp_path, dirs_exist_ok=True)
    torn_write(monkeypatch, "folded.safetensors")
    assert command("run", tiny, *QUICK, "--quiet", "--out", tmp_path).code not in (0, 2)
    assert results_in(tmp_path) == files_in(quick)


def process(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return started([Path(sys.executable).with_name("tl-sparsify"), *arguments], cwd)


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
    assert list(results_in(tmp_path / "out")) == ["scores.csv"]
    assert len(pd.read_csv(tmp_path / "out" / "scores.csv")) == 780
