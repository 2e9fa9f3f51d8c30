"""A search that is interrupted goes on where it was, and ends in the same path bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tl_sparsify as tls
from tl_sparsify.comparison.cost import counted
from tl_sparsify.search import checkpoint as checkpoints
from tl_sparsify.search import joint


@cache
def parts() -> tuple[Any, tls.Examples, tls.Examples, tls.Units]:
    task = tls.load_task("planted_backup")
    model = task.model()
    train, validation, _ = task.examples(0)
    return model, train[:24], validation[:48], tls.heads(model) + tls.neurons(model)


VARIANTS: dict[str, dict[str, Any]] = {
    "means alone, with exchanges": {"probing": tls.Probing(probes=1), "exchanges": 4},
    "some examples in a round": {"probing": tls.Probing(probes=1, examples=12), "exchanges": 4},
    "refitted inside": {"held_out": True, "refitting": tls.Refitting(steps=2)},
    "predicted": {"predict": True},
    "under interventions": {"interventions": tls.InterventionDistribution.interchange(0.3)},
    "by cost": {"constraints": "costs"},
}


def search(folder: Path | None, variant: str, **changes: Any) -> tls.CircuitPath:
    model, train, validation, units = parts()
    given = {"rounds": 5, "smallest": 0.1, "seed": 3} | VARIANTS[variant] | changes
    if given.get("held_out") is True:
        given["held_out"] = validation
    if given.get("constraints") == "costs":
        given["constraints"] = tls.Constraints(
            costs=torch.rand(len(units), generator=torch.Generator().manual_seed(0)) + 0.5
        )
    return tls.sparsify(model, train, units, checkpoint=folder, progress=False, **given)


def same(one: tls.CircuitPath, other: tls.CircuitPath) -> bool:
    rounds = zip(one.rounds, other.rounds, strict=True)
    return torch.equal(one.order, other.order) and all(
        a.reduction == b.reduction
        and repr((a.predicted, a.measured, a.additivity)) == repr((b.predicted, b.measured, b.additivity))
        for a, b in rounds
    )


def first_logit(logits: torch.Tensor, batch: tls.Examples, times: float = 1.0) -> torch.Tensor:
    return times * logits[:, 0]


class Column:
    """A metric that is an object."""

    def __init__(self, number: int) -> None:
        self.number = number

    def of(self, logits: torch.Tensor, batch: tls.Examples) -> torch.Tensor:
        return logits[:, self.number]

    __call__ = of


def through(metric: Any) -> Any:
    return lambda logits, batch: metric(logits, batch)


def test_metrics_of_one_name_are_other_searches(tmp_path: Path):
    def times(factor: float) -> Any:
        return lambda logits, batch: factor * logits[:, 0]

    pairs = [
        (partial(first_logit, times=1.0), partial(first_logit, times=2.0)),
        (times(1.0), times(2.0)),
        (lambda logits, batch: logits[:, 0], lambda logits, batch: logits[:, 1]),
        (Column(0), Column(3)),
        (Column(0).of, Column(3).of),
        (through(Column(0).of), through(Column(3).of)),
        (through(lambda logits, batch: logits[:, 0]), through(lambda logits, batch: logits[:, 3])),
        (times(np.int64(1)), times(np.int64(2))),
        (through(partial(first_logit, times=1.0)), through(partial(first_logit, times=2.0))),
    ]
    for number, (one, other) in enumerate(pairs):
        folder = tmp_path / str(number)
        path = search(folder, "predicted", metric=one, sizes=(0.5,))
        assert same(path, search(folder, "predicted", metric=one, sizes=(0.5,)))
        with pytest.raises(ValueError, match="belongs to a search with another metric"):
            search(folder, "predicted", metric=other, sizes=(0.5,))


def test_units_that_no_file_holds_are_refused_before_a_pass(tmp_path: Path):
    model, train, _, units = parts()
    with counted(model) as passes, pytest.raises(ValueError, match="such units cannot be saved"):
        tls.sparsify(model, train, units.at(slice(0, 1)), checkpoint=tmp_path, progress=False)
    assert passes["forward"] == passes["backward"] == 0


class Stopped(BaseException):
    """What no search catches."""


def stopped_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writing a state that raises once so many are there."""
    left = [writes]

    def write(*arguments: Any) -> None:
        checkpoints.write(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise Stopped

    monkeypatch.setattr(joint, "write", write)
    return write


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_search_stopped_after_a_round_ends_in_the_same_path(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = search(None, variant)
    for writes in (1, 4):
        folder = tmp_path / str(writes)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stopped_after(writes, patch)
            search(folder, variant)
        assert same(search(folder, variant), expected), f"stopped after {writes}"
    assert same(search(folder, variant), expected)  # of a search that is complete


@pytest.mark.parametrize("writes", [2, None])
def test_circuits_that_a_killed_search_left_behind_go(
    writes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    variant, folder = "means alone, with exchanges", tmp_path / "killed"
    search(tmp_path / "whole", variant)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    if writes is None:
        search(folder, variant)
    else:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stopped_after(writes, patch)
            search(folder, variant)
    # a kill after the last state was renamed leaves the circuits of the one before
    shutil.copy(next(folder.glob("*.reduction")), folder / "0123456789abcdef.reduction")
    search(folder, variant)
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.slow
def test_a_search_killed_at_ten_moments_ends_in_the_same_path(tmp_path: Path):
    variant = "some examples in a round"
    search(None, variant)
    begun = time.perf_counter()
    expected = search(tmp_path / "whole", variant)
    whole = time.perf_counter() - begun
    draw, reached = random.Random(0), []
    for number in range(10):
        folder = tmp_path / str(number)
        child = os.fork()
        if not child:
            try:
                search(folder, variant)
            finally:
                os._exit(0)
        time.sleep(draw.random() * whole)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached.append((folder / "state.search").is_file())
        assert same(search(folder, variant), expected)
        names = {path.name for path in folder.iterdir()}
        assert names == {path.name for path in (tmp_path / "whole").iterdir()}, "something was left behind"
    assert any(reached)


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 4},
    "sizes": {"rounds": 4},
    "probing": {"probing": tls.Probing(probes=2)},
    "interventions": {"interventions": tls.InterventionDistribution.interchange(0.5)},
    "held_out": {"held_out": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_search_with_other_arguments_does_not_go_on_from_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopped_after(1, patch)
        search(tmp_path, "means alone, with exchanges")
    with pytest.raises(ValueError, match=f"belongs to a search with another {name}: give the same arguments"):
        search(tmp_path, "means alone, with exchanges", **OTHERS[name])


def test_other_examples_and_another_model_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, train, _, units = parts()
    given: dict[str, Any] = {"sizes": (0.5,), "checkpoint": tmp_path, "progress": False}
    tls.sparsify(model, train, units, **given)
    with pytest.raises(ValueError, match="a search with another train: "):
        tls.sparsify(model, train[:20], units, **given)
    with pytest.raises(ValueError, match="a search with another units: "):
        tls.sparsify(model, train, tls.heads(model), **given)


def test_a_damaged_state_is_refused_by_name(tmp_path: Path):
    search(tmp_path, "means alone, with exchanges")
    state = tmp_path / "state.search"
    content = state.read_bytes()
    for damaged in (content[:-1], content[:40], b"", content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state\.search"):
            search(tmp_path, "means alone, with exchanges")
    state.write_bytes(content)
    [*rounds] = tmp_path.glob("*.reduction")
    rounds[0].write_bytes(rounds[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"\.reduction is damaged"):
        search(tmp_path, "means alone, with exchanges")
