"""Curves against explicit loops over sizes and examples, with ablation by hand-written hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.by_hand import Fill, average, constant, measures, run, table
from helpers.curves import ASKED, KEPT, MEASURES, data, numbers, random_scores, scores_of
from helpers.models import bridge, random_values, unchanged, units_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify import Examples, Scores, Values, constants, evaluate, sparsify
from tl_sparsify.comparison.curves import SIZES
from tl_sparsify.comparison.resampling import weights
from tl_sparsify.core.metrics import log_probability
from tl_sparsify.core.units import heads
from tl_sparsify.search.compensating import sparsify_affine
from tl_sparsify.search.settings import Probing, Refitting

REPLICATES, SEED = 25, 3


def best(scores: Scores, k: int) -> list[str]:
    """The names of the ``k`` units with the highest scores."""
    return [name for _, name in sorted(zip(scores.scores.tolist(), scores.units.names, strict=True))[-k:]]


def fills(kind: str, batch: Examples, values: Values) -> list[Fill]:
    """What removed units are set to in each example."""
    model, units = bridge(), values.units
    if kind == "mean":
        return [constant(values)] * len(batch)
    if kind == "zero":
        return [{hook: torch.zeros_like(v) for hook, v in constant(values).items()}] * len(batch)
    assert batch.counterfactual_tokens is not None
    return [run(model, units, other)[1] for other in batch.counterfactual_tokens]


def slow_rows(names: Sequence[list[str]], here: list[Fill], batch: Examples) -> list[list[dict[str, float]]]:
    """The measures of each example in the model, the empty circuit and those that keep ``names``."""
    return table(bridge(), units_of(bridge()), batch, [None, [], *names], here.__getitem__)


def slow_curve(
    names: Sequence[list[str]], rows: list[list[dict[str, float]]], weighing: list[float] | None = None
) -> dict[str, list[float]]:
    """Every measure at each size, and both areas, by loops."""
    w = weighing or [1.0] * len(rows)
    found = {m: [average(rows, 2 + i, m, w) for i in range(len(names))] for m in MEASURES[:-1]}
    full, empty = average(rows, 0, "metric", w), average(rows, 1, "metric", w)
    found["faithfulness"] = [(here - empty) / (full - empty) for here in found["metric"]]
    x = [len(kept) / 14 for kept in names]
    f = found["faithfulness"]
    steps = [(b - a, g, h) for a, b, g, h in zip(x, x[1:], f, f[1:], strict=False)]
    found["cpr"] = [sum(step * (g + h) / 2 for step, g, h in steps)]
    found["cmd"] = [sum(step * (abs(1 - g) + abs(1 - h)) / 2 for step, g, h in steps)]
    return found


# Against the slow computation


@pytest.mark.parametrize("kind", ["mean", "zero", "counterfactual"])
def test_a_curve_is_that_of_a_loop_over_sizes(kind: Any):
    batch, scores = data(), random_scores()
    values = random_values(scores.units, 5)
    given_values = values if kind == "mean" else None
    with unchanged(bridge()):
        found = evaluate(bridge(), scores, batch, ablation=kind, sizes=ASKED, values=given_values, bootstrap=0)
    names = [best(scores, k) for k in KEPT]
    slow = slow_curve(names, slow_rows(names, fills(kind, batch, values), batch))
    assert (found.kept, found.sizes, found.ablation, found.n) == (KEPT, tuple(k / 14 for k in KEPT), kind, 10)
    for measure in MEASURES:
        assert list(getattr(found, measure)) == pytest.approx(slow[measure], rel=1e-10, abs=1e-13)
    assert (found.cpr, found.cmd) == pytest.approx((*slow["cpr"], *slow["cmd"]), rel=1e-10)
    assert found.risk[0] > 0.01 and found.cmd > 0.01
    assert found.original_metric == pytest.approx(slow["metric"][-1], rel=1e-10)
    assert found.original_accuracy == pytest.approx(slow["accuracy"][-1])


def test_intervals_are_those_of_a_loop_over_replicates():
    batch, scores = data(), random_scores(1)
    found = evaluate(bridge(), scores, batch, ablation="counterfactual", sizes=ASKED, bootstrap=REPLICATES, seed=SEED)
    names = [best(scores, k) for k in KEPT]
    rows = slow_rows(names, fills("counterfactual", batch, random_values(scores.units)), batch)
    counts = weights(torch.arange(len(batch)), REPLICATES, SEED).T.tolist()
    slow = [slow_curve(names, rows, row) for row in counts]
    for measure in MEASURES:
        for i in range(len(KEPT)):
            ends = np.percentile([part[measure][i] for part in slow], [2.5, 97.5])
            assert found.intervals[measure][i] == pytest.approx(tuple(ends), rel=1e-10, abs=1e-12)
    for ends, name in ((found.cpr_interval, "cpr"), (found.cmd_interval, "cmd")):
        assert ends == pytest.approx(tuple(np.percentile([part[name][0] for part in slow], [2.5, 97.5])), rel=1e-10)
        assert ends[0] < ends[1]


def test_intervals_narrow_with_the_level():
    wide, narrow = (
        evaluate(bridge(), random_scores(), data(), ablation="zero", sizes=ASKED, bootstrap=200, level=level)
        for level in (0.95, 0.5)
    )
    assert wide.cpr == narrow.cpr and wide.cpr_interval[0] < narrow.cpr_interval[0] < narrow.cpr_interval[1]
    assert wide.intervals["risk"][0][1] > narrow.intervals["risk"][0][1]


def test_a_path_brings_its_own_replacements():
    model, batch = bridge(), data()
    units = units_of(model)
    path = sparsify(
        model,
        data(16),
        units,
        sizes=(0.7, 0.4, 0.2),
        held_out=data(8),
        refitting=Refitting(3),
        progress=False,
        probing=Probing(temperature=1.0),
    )
    found = evaluate(model, path, batch, sizes=(0.2, 0.4, 0.7), bootstrap=0)
    assert found.kept == (3, 6, 10) and found.ablation == "refit"
    baseline = constants.mean(model, data(16), units)
    full = table(model, units, batch, [None, []], lambda i: constant(baseline))
    even = [1.0] * len(batch)
    whole, empty = average(full, 0, "metric", even), average(full, 1, "metric", even)
    f: list[float] = []
    for number, step in enumerate(reversed(path.rounds)):
        own = step.reduction
        rows = table(model, units, batch, [list(own.circuit.names)], lambda i, own=own: constant(own.values))
        for measure in MEASURES[:-1]:
            assert getattr(found, measure)[number] == pytest.approx(average(rows, 0, measure, even), rel=1e-10)
        f.append((average(rows, 0, "metric", even) - empty) / (whole - empty))
    assert found.faithfulness == pytest.approx(f, rel=1e-10) and found.empty_metric == pytest.approx(empty, rel=1e-10)
    x, f = [3 / 14, 6 / 14, 10 / 14, 1.0], [*f, 1.0]  # the area ends at the full model
    assert found.cpr == pytest.approx(np.trapezoid(f, x), rel=1e-10)
    assert found.cmd == pytest.approx(np.trapezoid([abs(1 - g) for g in f], x), rel=1e-10)


def test_a_path_under_another_ablation_is_its_order():
    model, batch = bridge(), data()
    path = sparsify(model, data(16), units_of(model), rounds=3, smallest=0.1, progress=False)
    same: dict[str, Any] = {"sizes": ASKED, "bootstrap": 20}
    by_order = scores_of(path.scores)
    for kind in ("zero", "counterfactual"):
        assert evaluate(model, path, batch, ablation=kind, **same) == evaluate(
            model, by_order, batch, ablation=kind, **same
        )
    values = random_values(path.units, 9)
    mine = evaluate(model, path, batch, ablation="mean", values=values, **same)
    assert mine == evaluate(model, by_order, batch, ablation="mean", values=values, **same)
    own = evaluate(model, path, batch, **same)
    assert own == evaluate(model, path, batch, ablation="mean", **same) != mine
    means = constants.mean(model, data(16), path.units)
    assert own == evaluate(model, by_order, batch, ablation="mean", values=means, **same)


def test_a_path_with_affine_rounds_is_measured_with_constants():
    model = bridge()
    path = sparsify_affine(model, data(16), units_of(model), sizes=(0.5, 0.2), progress=False)
    found = evaluate(model, path, data(), sizes=(0.2, 0.35), bootstrap=0)
    assert found.kept == (3, 5) and found.ablation == "mean"


def test_without_counterfactuals_removed_units_take_another_examples_values():
    model, two, scores = bridge(), data(2, paired=False), random_scores()  # each one's only partner is the other
    found = evaluate(model, scores, two, ablation="counterfactual", sizes=ASKED, bootstrap=0)
    seen = [run(model, scores.units, tokens)[1] for tokens in two.tokens]
    names = [best(scores, k) for k in KEPT]
    slow = slow_curve(names, slow_rows(names, seen[::-1], two))
    for measure in MEASURES:
        assert list(getattr(found, measure)) == pytest.approx(slow[measure], rel=1e-10, abs=1e-13)
    assert found.ablation == "shuffled" and found.risk[0] > 0.01
    many = data(10, paired=False)
    risks = [
        evaluate(model, scores, many, ablation="counterfactual", sizes=(0.1,), bootstrap=0, seed=seed).risk
        for seed in (0, 0, 1)
    ]
    assert risks[0] == risks[1] != risks[2]


def test_units_at_positions_are_removed_there_alone():
    model, batch, units = bridge(), data(), heads(bridge())
    assert batch.counterfactual_tokens is not None
    where, kept = torch.arange(10) % 5, ["L0H0", "L1H0"]
    scores = scores_of(torch.tensor([3.0, 1, 2, 0], dtype=torch.float64), units.at(where))
    found = evaluate(model, scores, batch, ablation="counterfactual", sizes=(0.5,), bootstrap=0, batch_size=3)
    metrics = []
    for i, position in enumerate(where.tolist()):
        other = run(model, units, batch.counterfactual_tokens[i])[1]
        at = slice(position, position + 1)
        full = run(model, units, batch.tokens[i])[0]
        reduced = run(model, units, batch.tokens[i], kept, other, at=at)[0]
        metrics.append(measures(full, reduced, batch.labels[i], [1, 4, 6, 9])["metric"])
    assert found.metric[0] == pytest.approx(sum(metrics) / 10, rel=1e-10) and found.kept == (2,)
    assert found.metric[0] != pytest.approx(found.original_metric, rel=1e-3)


# What must hold


@given(st.integers(0, 2**31), st.sampled_from(["zero", "counterfactual"]))
@settings(max_examples=10)
def test_keeping_everything_is_the_model(seed: int, kind: Any):
    batch = data(4)
    found = evaluate(bridge(), random_scores(seed), batch, ablation=kind, sizes=(1.0,), bootstrap=10, seed=seed)
    assert found.faithfulness == (1,) and found.risk == (0,) and found.agreement == (1,)
    assert found.accuracy == (found.original_accuracy,) and found.metric == (found.original_metric,)
    assert (found.cpr, found.cmd, found.cpr_interval, found.cmd_interval) == (0, 0, (0, 0), (0, 0))
    assert found.intervals["faithfulness"] == ((1, 1),) and found.intervals["risk"] == ((0, 0),)
    whole = evaluate(bridge(), random_scores(seed), batch, ablation=kind, sizes=(0.5, 1.0), bootstrap=0)
    half = evaluate(bridge(), random_scores(seed), batch, ablation=kind, sizes=(0.5,), bootstrap=0)
    assert (whole.cpr, whole.cmd) == (half.cpr, half.cmd)  # measured at 1 or known there
    assert whole.cmd == abs(1 - whole.faithfulness[0]) / 4


@given(st.integers(0, 2**31), st.sampled_from([torch.exp, torch.atan, lambda x: x**3, lambda x: 5 * x - 2]))
@settings(max_examples=10)
def test_the_order_alone_counts(seed: int, rescale: Any):
    scores, batch = random_scores(seed), data(4)
    again = scores_of(rescale(scores.scores))
    first, second = (
        evaluate(bridge(), part, batch, ablation="zero", sizes=ASKED, bootstrap=10) for part in (scores, again)
    )
    assert first == second


@given(st.integers(1, 11), st.sampled_from(["mean", "zero", "counterfactual", "shuffled"]), st.integers(0, 99))
@settings(max_examples=8)
def test_batches_do_not_matter(size: int, kind: str, seed: int):
    scores, values = random_scores(seed), random_values(units_of(bridge())) if kind == "mean" else None
    batch = data(11, paired=kind != "shuffled")
    name: Any = "counterfactual" if kind == "shuffled" else kind
    whole, parts = (
        evaluate(bridge(), scores, batch, ablation=name, values=values, sizes=ASKED, bootstrap=15, batch_size=b)
        for b in (None, size)
    )
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-10, abs=1e-12)
    assert parts.ablation == whole.ablation == kind


def test_sizes_that_come_to_the_same_number_of_units_count_once():
    found = evaluate(bridge(), random_scores(), data(), ablation="zero", bootstrap=0)
    assert len(SIZES) == 10 and found.kept == (1, 3, 7, 14) and found.sizes == (1 / 14, 3 / 14, 0.5, 1)
    again = evaluate(bridge(), random_scores(), data(), ablation="zero", sizes=(1.0, 0.5, 0.2, 0.05), bootstrap=0)
    assert numbers(again)[4:] == pytest.approx(numbers(found)[4:], nan_ok=True)


def test_absolute_scores_are_another_order():
    scores, batch = random_scores(), data()
    signed, absolute = (
        evaluate(bridge(), part, batch, ablation="zero", sizes=ASKED, bootstrap=0) for part in (scores, scores.absolute)
    )
    assert signed.metric[0] != absolute.metric[0]
    by_hand = scores_of(scores.scores.abs())
    assert absolute.metric == evaluate(bridge(), by_hand, batch, ablation="zero", sizes=ASKED, bootstrap=0).metric


def test_another_metric_changes_faithfulness_and_not_the_risk():
    odds, probability = (
        evaluate(bridge(), random_scores(), data(), ablation="zero", bootstrap=0, **settings)
        for settings in ({}, {"metric": log_probability})
    )
    assert odds.risk == probability.risk and odds.faithfulness[0] != probability.faithfulness[0]
    assert probability.faithfulness[-1] == 1
