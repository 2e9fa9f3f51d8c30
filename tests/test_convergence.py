"""A refit to its end, and a comparison that tells a circuit from its replacements."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

import tl_sparsify as tls
from tl_sparsify.comparison import baselines
from tl_sparsify.comparison.cost import cost_of
from tl_sparsify.comparison.methods import Method
from tl_sparsify.comparison.tables import markdown
from tl_sparsify.core.measure import known_of, known_risk

SMALL: dict[str, Any] = {"examples": 64, "refit_patience": 5, "bootstrap": 0, "progress": False}


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


def judged(reduction: tls.Reduction) -> float:
    model, _, validation, _ = parts()
    return tls.risk(model, reduction, validation).mean


@pytest.mark.parametrize("most", [7, 400])
def test_it_is_two_refits_the_first_of_which_ends_by_itself(most: int):
    model, train, validation, start = parts()
    found = tls.refit_until_converged(model, start, train, validation, patience=20, most=most)
    shared: dict[str, Any] = {"per_step": 128, "progress": False}
    first = tls.constants.refit(model, start, train, validation, steps=most, patience=20, seed=0, **shared)
    last = tls.constants.refit(model, first, train, validation, steps=min(most, 20) // 2, seed=1, **shared)
    assert found == last and judged(last) <= judged(first) < judged(start)


def test_what_refits_have_in_common_is_worked_out_once():
    model, train, validation, start = parts()
    settings: dict[str, Any] = {"patience": 20, "most": 7, "per_step": 64}

    def fitted(**known: Any) -> tls.Reduction:
        return tls.refit_until_converged(model, start, train, validation, **settings, **known)

    expected, alone = cost_of(model, len(train), fitted)
    known = known_of(model, train, start.units, clean=True, many=True, batch_size=None)
    known_risk(model, start, validation, recall=known.recall)
    found, together = cost_of(model, len(train), lambda: fitted(known=known))
    assert found == expected and together.backward == alone.backward
    # deviations, logits, and the original's answers on validation examples
    assert alone.forward - together.forward == pytest.approx(2 + len(validation) / len(train))
    other = replace(start, fingerprint="0" * len(start.fingerprint or ""))
    with pytest.raises(ValueError, match="made for the model 000"):
        tls.refit_until_converged(model, other, train, validation, known=known, **settings)


def test_a_fit_with_patience_stops_where_nothing_falls_and_goes_on_where_it_does(monkeypatch: pytest.MonkeyPatch):
    model, train, validation, start = parts()
    steps: list[int] = []
    original = torch.optim.Adam.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    shared: dict[str, Any] = {"steps": 200, "patience": 20, "progress": False}
    tls.constants.refit(model, start, train, validation, learning_rate=1e-9, **shared)
    assert len(steps) == 20  # nothing moves
    steps.clear()
    tls.constants.refit(model, start, train, validation, **shared)
    assert 20 < len(steps) <= 200


@pytest.mark.parametrize("name", ["patience", "most"])
def test_no_step_is_refused(name: str):
    model, train, validation, start = parts()
    none: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        tls.refit_until_converged(model, start, train, validation, **none)


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
    fitted = tls.refit_until_converged(model, plain, train, validation, patience=5)
    assert rows.risk["refitted"] == pytest.approx(tls.risk(model, fitted, test).mean, rel=1e-5)
    mapped = tls.constants.neighbours(model, plain, train)
    fitted = tls.refit_until_converged(model, mapped, train, validation, patience=5)
    assert rows.risk["maps"] == pytest.approx(tls.risk(model, fitted, test).mean, rel=1e-5)


def test_the_table_has_a_column_for_each():
    text = markdown(table(), "planted_backup")
    for head in ("mean, 30%", "refitted, 30%", "maps, 30%", "as found, 30%"):
        assert head in text.splitlines()[0]
    without = table()[table().ablation != "maps"]
    assert "maps" not in markdown(without, "planted_backup").splitlines()[0]
