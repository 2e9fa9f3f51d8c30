"""Processes that are killed while they write: nothing half written, nothing finished lost, nothing left for good."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICK, as_in_a_terminal, started
from helpers.native import native, reduction_of
from helpers.tiny_task import files_in, results_in, task_folder

from tl_sparsify._internal.directory import results, settle
from tl_sparsify._internal.files import write_text
from tl_sparsify._internal.processes import Ended, ending
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.folding.bridge import load_folded, save_folded
from tl_sparsify.folding.fold import fold

NAMES = ("run.json", "a.csv", "b.csv", "c.csv", "folded")


def killed(work: Callable[[int], None], after: float, how: signal.Signals, first: int = 0) -> int:
    """Do ``work`` again and again in a child, which gets a signal after so many seconds; its exit status."""
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            as_in_a_terminal()
            number = first
            with ending():
                os.write(begun, b"x")
                until = time.monotonic() + 300  # a signal that never comes ends in a failure, not in a hang
                while time.monotonic() < until:
                    work(number)
                    number += 1
        except Ended as ended:
            status = 128 + ended.args[0]
        except BaseException:  # noqa: BLE001 (said before the child ends)
            traceback.print_exc()
        finally:
            os._exit(status)
    os.read(ready, 1)
    time.sleep(after)
    os.kill(child, how)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    os.close(begun)
    return os.waitstatus_to_exitcode(status)


def killed_at_a_renaming(work: Callable[[], None], stop: int, counts: Callable[[Path], bool]) -> int:
    """Do ``work`` in a child that is killed at the renaming of this number, of those that count; its exit status."""
    child = os.fork()
    if not child:
        try:
            rename, moves = Path.replace, 0

            def replace(path: Path, target: Path) -> Path:
                nonlocal moves
                if counts(path):
                    if moves == stop:
                        os.kill(os.getpid(), signal.SIGKILL)
                    moves += 1
                return rename(path, target)

            Path.replace = replace  # type: ignore[method-assign]
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def moments(number: int, seed: int, longest: float) -> list[float]:
    draw = random.Random(seed)
    return [draw.random() * longest for _ in range(number)]


SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP]


def drawn(number: int, work: Callable[[int], None], after: float, first: int = 0) -> None:
    """A child that gets the signal of a number, and ends as that signal says."""
    sent = SIGNALS[number % len(SIGNALS)]
    assert killed(work, after, sent, first) == (-sent if sent is signal.SIGKILL else 128 + sent)


@pytest.mark.slow
def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path):
    both = [reduction_of(native(), ["L0H1"], seed) for seed in (0, 1)]
    file = tmp_path / "one.reduction"
    both[0].save(file)
    for number, after in enumerate(moments(12, 0, 0.1)):
        drawn(number, lambda i: both[i % 2].save(file), after)
        assert Reduction.load(file) in both
        both[0].save(file)
        assert hidden(tmp_path) == [] and Reduction.load(file) == both[0]


@pytest.mark.slow
def test_a_folded_model_is_the_old_one_or_the_new_one(tmp_path: Path):
    both = [fold(native(), reduction_of(native(), units)) for units in (["L0H1"], ["L0H1", "L1N2"])]
    save_folded(both[0], tmp_path / "small")
    for number, after in enumerate(moments(12, 1, 0.2)):
        drawn(number, lambda i: save_folded(both[i % 2], tmp_path / "small"), after)
        assert load_folded(tmp_path / "small").units in [one.units for one in both]
        save_folded(both[0], tmp_path / "small")
        assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("stop", [0, 1])
def test_a_folded_model_whose_replacement_stopped_between_its_renamings_is_found(stop: int, tmp_path: Path):
    one = fold(native(), reduction_of(native(), ["L0H1"]))
    save_folded(one, tmp_path / "small")
    assert killed_at_a_renaming(lambda: save_folded(one, tmp_path / "small"), stop, Path.is_dir) == -signal.SIGKILL
    assert (tmp_path / "small").exists() == (stop == 0) and len(hidden(tmp_path)) >= 1
    assert load_folded(tmp_path / "small").units == one.units
    save_folded(one, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def written(folder: Path, number: int) -> None:
    with results(folder, NAMES, "run.json") as into:
        for name in ("a.csv", "b.csv", *(["c.csv"] if number % 2 else [])):
            write_text(into / name, str(number) * 5000)
        (into / "folded").mkdir(exist_ok=True)
        write_text(into / "folded" / "weights", str(number) * 5000)
        write_text(into / "run.json", str(number) * 5000)


@pytest.mark.slow
def test_results_are_of_one_run(tmp_path: Path):
    written(tmp_path, 0)
    seen: set[str] = set()
    for number, after in enumerate(moments(16, 2, 0.05)):
        drawn(number, lambda i: written(tmp_path, i % 10), after, number)
        for path in tmp_path.glob("*.*"):  # nothing is half written, with or without what follows
            if path.is_file() and not path.name.startswith("."):
                assert len(path.read_text()) == 5000
        settle(tmp_path, NAMES, "run.json")
        there = {name: content.decode() for name, content in files_in(tmp_path).items()}
        [content] = set(there.values())
        seen.add(content)
        assert set(there) == {"run.json", "a.csv", "b.csv", "folded/weights"} | (
            {"c.csv"} if int(content[0]) % 2 else set()
        )
        assert hidden(tmp_path) == []
    assert len(seen) > 1


@pytest.mark.parametrize("stop", range(10))
def test_results_that_are_killed_at_any_renaming_are_of_one_run(stop: int, tmp_path: Path):
    written(tmp_path, 1)
    code = killed_at_a_renaming(lambda: written(tmp_path, 2), stop, lambda path: ".part" not in path.name)
    assert code == (-signal.SIGKILL if stop < 9 else 1)  # five older ones go, four newer come
    settle(tmp_path, NAMES, "run.json")
    there = {name: content[:1] for name, content in files_in(tmp_path).items()}
    assert there == dict.fromkeys(["a.csv", "b.csv", "folded/weights", "run.json"], b"2")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("stop", range(10))
def test_a_signal_just_after_any_renaming_leaves_the_results_of_one_run(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(tmp_path, 1)
    rename, moves = Path.replace, 0

    def replace(path: Path, target: Path) -> None:
        nonlocal moves
        rename(path, target)
        if ".part" not in path.name:
            moves += 1
            if moves == stop + 1:
                raise Ended(signal.SIGTERM)

    monkeypatch.setattr(Path, "replace", replace)
    with nullcontext() if stop == 9 else pytest.raises(Ended):  # five older ones go, four newer come
        written(tmp_path, 2)
    there = {name: content[:1] for name, content in files_in(tmp_path).items()}
    older = dict.fromkeys(["a.csv", "b.csv", "c.csv", "folded/weights", "run.json"], b"1")
    assert there == (older if stop < 9 else dict.fromkeys(["a.csv", "b.csv", "folded/weights", "run.json"], b"2"))
    assert hidden(tmp_path) == []


class Finalised:
    """What takes its time to go: a signal that comes meanwhile cannot be raised."""

    def __del__(self) -> None:
        time.sleep(0.05)


def finalise(_: int) -> None:
    Finalised()
    time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_in_a_finaliser_ends_the_process(sent: signal.Signals):
    assert killed(finalise, 0.2, sent) == 128 + sent


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path):
    with results(tmp_path, NAMES, "run.json"):
        with pytest.raises(ValueError, match=r"another run is writing into .*: wait until it ends, or name another"):
            written(tmp_path, 1)
    written(tmp_path, 1)


def process(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    code = "from tl_sparsify.cli import main; main()"
    return started([sys.executable, "-c", code, *arguments], cwd, PYTHONPATH=os.pathsep.join(sys.path))


def until(there: Callable[[], Any], seconds: float = 240) -> bool:
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(there())


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_a_run_that_gets_a_signal_says_what_is_whole(sent: signal.Signals, code: int, tmp_path: Path):
    out = tmp_path / "out"
    running = process("run", "hierarchical_equality", "--out", out, cwd=tmp_path)
    assert until(lambda: (out / "scores.csv").exists() or running.poll() is not None)
    running.send_signal(sent)
    _, err = running.communicate()
    assert running.returncode == code and "Traceback" not in err
    assert (code < 0) != ("interrupted; the files written so far are complete" in err)
    assert "run.json" not in files_in(out) and len((out / "scores.csv").read_text().splitlines()) == 781
    if code < 0:
        return
    assert hidden(out) == []


@pytest.mark.slow
def test_a_run_over_an_older_one_that_is_killed_leaves_the_older_one(tmp_path: Path):
    tiny, out = task_folder(tmp_path), tmp_path / "out"
    first = process("run", tiny, *QUICK, "--quiet", "--out", out, cwd=tmp_path)
    assert first.communicate(timeout=600) and first.returncode == 0
    before = files_in(out)
    again = process("run", tiny, *QUICK, "--quiet", "--seed", "1", "--out", out, cwd=tmp_path)
    assert until(lambda: list(out.glob(".new*.part/scores.csv")) or again.poll() is not None)
    again.kill()
    again.communicate()
    settle(out, NAMES, "run.json")
    assert results_in(out) == before and hidden(out) == []


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_of_a_comparison_end_with_it(sent: signal.Signals, tmp_path: Path):
    arguments = ("planted_backup", "--smoke", "--workers", "2", "--out", tmp_path / "out", "--quiet")
    running = process("bench", *arguments, cwd=tmp_path)
    assert until(lambda: list(tmp_path.glob("out/cells/*/*.csv")) or running.poll() is not None)
    workers = children(running.pid)
    assert len(workers) >= 2
    running.send_signal(sent)
    running.communicate()
    assert until(lambda: not any(map(alive, workers)), 20)
    before = files_in(tmp_path / "out")
    time.sleep(1)
    assert files_in(tmp_path / "out") == before
