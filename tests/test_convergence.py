"""A refit to its end, and a comparison that tells a circuit from its replacements."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest

import tl_sparsify as tls
from tl_sparsify.comparison import baselines
from tl_sparsify.comparison.methods import Method
from tl_sparsify.comparison.tables import markdown

SMALL: dict[str, Any] = {"examples": 64, "refit_steps": 5, "refit_blocks": 2, "bootstrap": 0, "progress": False}


@cache
def task() -> tls.Task:
    return tls.load_task("planted_backup")


@cache
def parts() -> tuple[Any, tls.Examples, tls.Examples, tls.Reduction]:
    model = task().model()
    train, validation, _ = task().examples(0)
    train, validation = train[:64], validation[:64]
    units = tls.heads(model) + tls.neurons(model)
    means = tls.constants.mean(model, train, units)
    circuit = baselines.random(model, train, units, seed=0).top(0.5)
    return model, train, validation, tls.constants.reduced(model, circuit, means)


@pytest.mark.parametrize("most", [1, 3, 20])
def test_blocks_follow_one_another_until_one_gains_less_than_two_percent(most: int):
    model, train, validation, start = parts()
    found, steps, converged = tls.refit_until_converged(model, start, train, validation, block=6, most=most)
    by_hand, risks = start, [tls.risk(model, start, validation).mean]
    for number in range(most):
        again: dict[str, Any] = {"steps": 6, "per_step": 128, "seed": number, "progress": False}
        by_hand = tls.constants.refit(model, by_hand, train, validation, **again)
        risks.append(tls.risk(model, by_hand, validation).mean)
        if risks[-1] > 0.98 * risks[-2] or risks[-1] < 1e-6:
            break
    assert found == by_hand and steps == 6 * (len(risks) - 1)
    assert converged == (risks[-1] > 0.98 * risks[-2] or risks[-1] < 1e-6)
    assert risks == sorted(risks, reverse=True) and risks[-1] < risks[0]


def test_one_block_that_still_gains_has_not_converged():
    model, train, validation, start = parts()
    _, steps, converged = tls.refit_until_converged(model, start, train, validation, block=6, most=1)
    assert (steps, converged) == (6, False)


@pytest.mark.parametrize("name", ["block", "most"])
def test_no_block_and_no_step_are_refused(name: str):
    model, train, validation, start = parts()
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        tls.refit_until_converged(model, start, train, validation, **{name: 0})


@cache
def table() -> Any:
    search = partial(tls.sparsify, rounds=3, refitting=tls.Refitting(steps=2))
    methods = [Method("inside", {"default": search}, ours=True), tls.baselines.random]
    return tls.compare(parts()[0], task(), methods, seeds=1, sizes=(0.3,), maps=True, **SMALL)


def test_a_search_that_refits_has_its_own_figures_beside_those_from_the_means():
    frame = table()
    assert set(frame.ablation[frame.method == "random"]) == {"zero", "mean", "counterfactual", "refitted", "maps"}
    assert set(frame.ablation[frame.method == "inside"]) >= {"refitted", "maps", "as found"}
    model, train, validation, _ = parts()
    train, validation = (part.sample(64, seed=0) for part in task().examples(0)[:2])
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.mean(model, train, units)
    settings: dict[str, Any] = {"rounds": 3, "refitting": tls.Refitting(steps=2), "seed": 0, "progress": False}
    path = tls.sparsify(model, train, units, values=values, held_out=validation, **settings)
    own, test = path.at(0.3), task().examples(0)[2]
    rows = frame[(frame.method == "inside") & (frame["size"] == 0.3)].set_index("ablation")
    assert rows.risk["as found"] == pytest.approx(tls.risk(model, own, test).mean, rel=1e-5)
    plain = tls.constants.reduced(model, own.circuit, values)
    fitting: dict[str, Any] = {"block": 5, "most": 2}
    fitted, steps, _ = tls.refit_until_converged(model, plain, train, validation, **fitting)
    assert rows.risk["refitted"] == pytest.approx(tls.risk(model, fitted, test).mean, rel=1e-5)
    assert rows.refit_steps["refitted"] == steps
    mapped = tls.constants.neighbours(model, plain, train)
    fitted, _, _ = tls.refit_until_converged(model, mapped, train, validation, **fitting)
    assert rows.risk["maps"] == pytest.approx(tls.risk(model, fitted, test).mean, rel=1e-5)


def test_the_table_has_a_column_for_each():
    text = markdown(table(), "planted_backup")
    for head in ("mean, 30%", "refitted, 30%", "maps, 30%", "as found, 30%"):
        assert head in text.splitlines()[0]
    without = table()[table().ablation != "maps"]
    assert "maps" not in markdown(without, "planted_backup").splitlines()[0]
