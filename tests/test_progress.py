"""Progress: where it is shown, how often, and that it can be turned off."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tl_sparsify._internal import progress as module
from tl_sparsify._internal.progress import duration, progress, step


class Clock:
    """Seconds that pass only when somebody lets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found


class Said:
    """All that was written to standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.text = capsys, ""

    def getvalue(self) -> str:
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def err(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: a shell that has a kernel."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))


def worked(items: Iterator[int], clock: Clock, seconds: float) -> list[int]:
    """Take this long over each item."""
    found: list[int] = []
    for item in items:
        clock.now += seconds
        found.append(item)
    return found


def test_a_log_has_a_line_at_most_every_thirty_seconds_with_what_is_left(clock: Clock, err: Said):
    assert worked(progress(range(8), "removing", True), clock, 12) == list(range(8))
    assert err.getvalue().splitlines() == [
        "removing: 3 of 8, about 60 s left",  # 36 seconds for three; five are left
        "removing: 6 of 8, about 24 s left",  # after 72, the next at 66 or later
    ]


def test_what_is_short_leaves_no_line(clock: Clock, err: Said):
    assert worked(progress(range(9), "removing", True), clock, 3) == list(range(9))
    assert err.getvalue() == ""


@pytest.mark.usefixtures("kernel")
def test_a_notebook_has_a_bar_on_one_line_that_goes_away(clock: Clock, err: Said):
    assert worked(progress(range(4), "removing", True), clock, 10) == list(range(4))
    drawn = err.getvalue().split("\r")
    assert "\n" not in err.getvalue() and drawn[0] == ""
    assert [text.strip() for text in drawn[1:4]] == [
        "[#######                       ] removing: 1 of 4, about 30 s left",
        "[###############               ] removing: 2 of 4, about 20 s left",
        "[######################        ] removing: 3 of 4, about 10 s left",
    ]
    assert drawn[-2].strip() == "" and len(drawn[-2]) >= len(drawn[3]) and drawn[-1] == ""


@pytest.mark.usefixtures("kernel")
def test_it_can_be_turned_off(clock: Clock, err: Said):
    assert worked(progress(range(4), "removing", False), clock, 100) == list(range(4))
    with step("scoring", False):
        pass
    assert err.getvalue() == ""


def test_a_long_step_is_said_in_a_log_and_a_short_one_is_not(err: Said, monkeypatch: pytest.MonkeyPatch):
    with step("scoring", True):
        pass
    assert err.getvalue() == ""
    monkeypatch.setattr(module, "SILENCE", 0.01)
    with step("scoring", True):
        until = time.monotonic() + 10
        while not err.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert err.getvalue() == "scoring: not done after 0 s\n"


@pytest.mark.parametrize(("seconds", "said"), [(4.4, "4 s"), (99.0, "99 s"), (720.0, "12 min"), (12600.0, "3.5 h")])
def test_durations_are_told_in_a_word(seconds: float, said: str):
    assert duration(seconds) == said
