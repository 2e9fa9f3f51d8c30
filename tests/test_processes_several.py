"""Several processes: each runs its share of the passes, and all find what one finds."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import several, tiny_task
from hypothesis import given
from hypothesis import strategies as st

import tl_sparsify as tls
from tl_sparsify._internal import ranks
from tl_sparsify._internal.ranks import apart, gathered, is_main, share, summed, totalled

GROUPS = tuple(several.GROUPS)
TOLERANCE = 1e-10  # float64 and small models: sums in another order


@cache
def alone() -> Any:
    return several.found_by(GROUPS)


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal names and whole numbers, close other numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), where
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("size", (2, 4))
def test_several_processes_find_what_one_finds(size: int, tmp_path: Path):
    found = several.together(size, tmp_path, *GROUPS)
    expected = json.loads(json.dumps(alone()))
    for process in found:
        assert json.dumps(process["results"]) == json.dumps(found[0]["results"])  # bit for bit the same in each
    assert_close(found[0]["results"], expected["results"])
    for call, whole in expected["passes"].items():
        for direction in (0, 1):
            shares = [process["passes"][call][direction] for process in found]
            assert sum(shares) == whole[direction], call  # no example twice
            assert max(shares) <= 1.4 * whole[direction] / size, call  # 9 examples among 4


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[str]]:
    """What each of two processes finds of files and errors, and what it says."""
    folder = tmp_path_factory.mktemp("two")
    done = several.launched(2, [sys.executable, "-m", "helpers.several_files", str(folder)])
    assert [code for code, _ in done] == [0, 0], done
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], [out for _, out in done]


@pytest.mark.slow
def test_files_are_of_the_first_process_and_all_can_read_them(two: tuple[list[Any], list[str]]):
    mine, other = (found["files"] for found in two[0])
    assert mine == other
    names, units, same, there = mine
    assert len(names) == units and same
    assert there == ["a.reduction", "search", "small"]


@pytest.mark.slow
def test_progress_is_of_the_first_process(two: tuple[list[Any], list[str]]):
    first, second = two[1]
    assert "removing units: 1 of" in first
    assert "removing units" not in second


@pytest.mark.slow
def test_an_error_in_one_process_is_one_in_all(two: tuple[list[Any], list[str]]):
    first, second = (found["wrong_in_one"] for found in two[0])
    said = "the model's output is NaN or infinite, first at hook point embed.hook_out"
    assert second == f"ValueError: {said}"
    assert first == f"ValueError: process 1 of 2: {said}"


@pytest.mark.slow
def test_after_an_error_in_one_process_all_go_on_together(two: tuple[list[Any], list[str]]):
    (first, mine), (second, other) = (found["wrong_between"] for found in two[0])
    assert (first, second) == ("ValueError: process 1 of 2: only here", "ValueError: only here")
    assert mine == other


@pytest.mark.slow
def test_other_calls_in_each_end_with_a_sentence(two: tuple[list[Any], list[str]]):
    first, second = (found["other_calls"] for found in two[0])
    assert first.startswith("RuntimeError: process 0 of 2 is at a pass over 12 examples, process 1 at a pass over 13")
    assert second.startswith("RuntimeError: process 1 of 2 is at a pass over 13 examples, process 0 at a pass over 12")


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_an_error_in_all(two: tuple[list[Any], list[str]]):
    first, second = (found["no_folder"] for found in two[0])
    assert first.startswith("FileNotFoundError: ") and "missing" in first
    assert second.startswith("FileNotFoundError: process 0 of 2: ")


@pytest.mark.slow
def test_a_batch_that_does_not_fit_one_process_is_halved_in_all(two: tuple[list[Any], list[str]]):
    mine, other = (found["out_of_memory"] for found in two[0])
    means = tls.constants.mean(several.bridge(), several.examples(12), several.units_of(several.bridge()))
    assert mine == other
    assert_close(mine, several.numbers(means))


@pytest.mark.slow
def test_fewer_examples_than_processes(two: tuple[list[Any], list[str]]):
    scores = tls.score.risk(several.bridge(), several.examples(1), several.units_of(several.bridge()))
    assert [found["few"] for found in two[0]] == [several.numbers(scores)] * 2


@pytest.mark.slow
def test_the_command_line_under_torchrun(tiny: Path, tmp_path: Path):
    arguments = [str(tiny), "--out", str(tmp_path / "out"), "--keep", "0.5", "--rounds", "2", "--steps", "5"]
    start = [sys.executable, "-c", "from tl_sparsify.cli import main; main()", "run"]
    (code, out), (other, silence) = several.launched(2, [*start, *arguments])
    assert (code, other) == (0, 0), out + silence
    assert "written to" in out and not silence.strip()
    assert set(tiny_task.results_in(tmp_path / "out")) == set(tiny_task.FILES)


@pytest.mark.slow
def test_a_group_joined_here_is_left_before_the_interpreter_ends():
    # what is registered first runs last at exit
    script = """if True:
        import atexit
        from torch import distributed
        atexit.register(lambda: print("at exit:", distributed.is_initialized()))
        from tl_sparsify._internal.ranks import ranks
        print("joined:", ranks()[1], distributed.is_initialized())"""
    for code, out in several.launched(2, [sys.executable, "-c", script]):
        assert code == 0 and "joined: 2 True" in out and "at exit: False" in out, out


@given(st.integers(1, 40), st.integers(1, 8))
def test_shares_are_even_and_cover_all_examples(n: int, size: int):
    with pytest.MonkeyPatch.context() as patch:
        found: list[int] = []
        for rank in range(size):
            patch.setattr(ranks, "ranks", lambda rank=rank: (rank, size))
            mine = list(range(n))[share(n)]
            assert n // size <= len(mine) <= n // size + 1 if n >= size else len(mine) == n
            found += mine
        assert found == list(range(n)) * (1 if n >= size else size)


def test_one_process_changes_nothing():
    assert ranks.ranks() == (0, 1) and is_main()
    parts = [torch.arange(3.0), torch.ones(3)]
    assert all(a is b for a, b in zip(gathered(parts, 2), parts, strict=True))
    assert torch.equal(totalled(parts, torch.add, 2), parts[0] + parts[1])
    assert torch.equal(summed(([part] for part in parts), 2)[0], parts[0] + parts[1])
    with apart():
        assert ranks.ranks() == (0, 1)


def test_an_environment_of_a_launch_is_not_that_of_what_it_starts(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.multiprocessing, "parent_process", lambda: object())
    assert ranks.ranks() == (0, 1)
