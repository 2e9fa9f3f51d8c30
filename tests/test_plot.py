"""Plots: figures hold the numbers that they claim to show: risks, frontiers, scores, evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.drawn import clipped, overlapping, texts
from helpers.written import (
    BENCHED,
    MEASURED,
    METHODS,
    PREDICTED,
    SIZES,
    UNITS,
    evidence,
    path,
    scores,
    table,
)
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_sparsify import Estimate, Scores, Units, plot


def curves(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """The data of every line with points, over all axes."""
    lines = [line for axes in figure.axes for line in axes.lines if len(np.asarray(line.get_xdata())) > 1]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def test_the_risk_curve_has_a_point_for_every_round():
    found = curves(plot.risk_curve(path()))
    for values in (MEASURED, PREDICTED):
        [line] = [y for x, y in found if x == list(SIZES) and y[1:] == list(values[1:])]
        assert len(line) == 5 and line[0] > 0 and line[0] < min(values[1:])


def test_the_risk_curve_has_logarithmic_axes_from_large_to_small():
    [axes] = plot.risk_curve(path()).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    left, right = axes.get_xlim()
    assert left >= max(SIZES) > min(SIZES) >= right
    assert "nats" in axes.get_ylabel() and str(len(UNITS)) in axes.get_xlabel()


def test_the_risk_curve_takes_further_points():
    extra = pd.DataFrame({"kept": [9, 3], "risk": [0.05, 0.6], "stderr": [0.01, 0.1]})
    figure = plot.risk_curve(path(), {"refitted": extra})
    assert ([9, 3], [0.05, 0.6]) in curves(figure)
    [axes] = figure.axes
    legend = axes.get_legend()
    assert legend is not None and "refitted" in [text.get_text() for text in legend.get_texts()]
    assert len(curves(figure)) == len(curves(plot.risk_curve(path()))) + 1


def test_a_search_that_did_not_predict_has_no_line_of_predictions():
    found, nothing = path(), Estimate(float("nan"), float("nan"), 50, "nats")
    silent = replace(found, rounds=tuple(replace(step, predicted=nothing) for step in found.rounds))
    [axes] = plot.risk_curve(silent).axes
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["measured along the path"]
    assert len(curves(plot.risk_curve(silent))) == len(curves(plot.risk_curve(found))) - 1


@pytest.mark.parametrize("measure", ["risk", "accuracy", "faithfulness"])
def test_the_frontier_has_a_line_of_means_over_seeds_for_every_method_in_every_tasks_panel(measure: str):
    few = METHODS[:9]
    frame = table(methods=few)
    figure = plot.frontier(frame, measure)
    assert [axes.get_title().split(" (")[0] for axes in figure.axes] == list(dict.fromkeys(frame.task))
    for axes, (_, part) in zip(figure.axes, frame.groupby("task", sort=False), strict=True):
        lines = {line.get_label(): line for line in axes.lines if line.get_label() in METHODS}
        assert set(lines) == set(few)
        for method, rows in part.groupby("method"):
            means = rows.groupby("size")[["kept", measure]].mean()
            np.testing.assert_allclose(lines[method].get_xdata(), means.kept)
            np.testing.assert_allclose(lines[method].get_ydata(), means[measure])
    assert measure in figure.axes[0].get_ylabel() and "3 seeds" in figure.get_suptitle()


def bands(figure: Figure, panel: int = 0) -> list[tuple[float, float]]:
    """The lowest and the highest value of every band, in the order of the methods."""
    filled = [c for c in figure.axes[panel].collections if not isinstance(c, PathCollection)]
    return [(float(p.vertices[:, 1].min()), float(p.vertices[:, 1].max())) for c in filled for p in c.get_paths()]


def test_bands_go_from_the_lowest_seed_to_the_highest():
    frame = table(tasks=("one",), methods=METHODS[:2])
    expected = frame.groupby("method", sort=False).risk.agg(["min", "max"])
    np.testing.assert_allclose(bands(plot.frontier(frame)), expected.to_numpy())


def test_one_seed_has_its_own_intervals_as_bars():
    frame = table(tasks=("one",), methods=METHODS[:2], seeds=1)
    figure = plot.frontier(frame)
    bars = [c.get_segments() for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    for method, found in zip(METHODS, bars, strict=False):
        part = frame[frame.method == method].sort_values("kept")
        np.testing.assert_allclose([bar[:, 1] for bar in found], part[["risk_low", "risk_high"]])
        np.testing.assert_allclose([bar[0, 0] for bar in found], part.kept)
    assert len(bars) == 2
    assert "one seed" in figure.get_suptitle()


def test_this_packages_methods_are_bolder_and_no_two_lines_look_alike():
    drawn = plot.frontier(table(tasks=("one",), sizes=BENCHED)).axes
    lines = {str(line.get_label()): line for axes in drawn for line in axes.lines if line.get_label() in METHODS}
    ours = {name for name in METHODS if name.startswith(("joint", "compensating"))}
    assert min(lines[name].get_linewidth() for name in ours) > max(
        lines[n].get_linewidth() for n in set(METHODS) - ours
    )
    looks = {(to_hex(x.get_color()), x.get_linestyle(), x.get_marker(), x.get_linewidth()) for x in lines.values()}
    assert len(looks) == len(METHODS)


def test_kinds_of_ablation_never_share_a_panel():
    frame = table(methods=METHODS[:9], ablations=("mean", "zero", "refitted"))
    figure = plot.frontier(frame)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == len(set(titles)) == 6 and "hierarchical_equality (refitted constants)" in titles
    [one] = plot.frontier(frame, ablation="zero", tasks=["planted_backup"], methods=METHODS[:3]).axes
    assert one.get_title() == "planted_backup (zero ablation)"
    assert [line.get_label() for line in one.lines] == list(METHODS[:3])


def test_small_risks_stand_on_the_floor_and_the_title_says_so():
    frame = table(tasks=("one",), methods=METHODS[:1])
    frame.loc[frame["size"] == 0.2, ["risk", "risk_low", "risk_high"]] = 0.0
    figure = plot.frontier(frame)
    [(_, risks)] = curves(figure)
    assert risks[-1] == 1e-6 < min(risks[:-1]) and "1e-06" in figure.get_suptitle()


def test_a_method_without_a_measure_has_no_line_and_one_with_settings_has_several():
    frame = table(tasks=("one",), methods=METHODS[:3])
    frame.loc[frame.method == METHODS[2], "faithfulness"] = np.nan
    assert len([x for x in plot.frontier(frame, "faithfulness").axes[0].lines if x.get_label() in METHODS]) == 2
    twice = pd.concat([frame.assign(setting="steps=5"), frame[frame.method == METHODS[1]].assign(setting="steps=9")])
    labels = [str(line.get_label()) for line in plot.frontier(twice).axes[0].lines]
    assert labels == [METHODS[0], f"{METHODS[1]}, steps=5", f"{METHODS[1]}, steps=9", METHODS[2]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measure": "speed"}, "measure is 'speed'; it is risk, accuracy or faithfulness"),
        ({"tasks": ["none"]}, "task none is not in the table, which has hierarchical_equality, planted_backup"),
        ({"methods": ["none"]}, "method none is not in the table"),
        ({"ablation": "none"}, "ablation none is not in the table, which has mean"),
        ({"table": table().drop(columns=["kept", "risk_low"])}, "table has no column kept, risk_low"),
        ({"table": table().head(0)}, "table has no rows"),
    ],
)
def test_the_frontier_refuses_by_name(change: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        plot.frontier(**({"table": table()} | change))


def test_against_has_every_unit_by_rank_and_by_value_and_names_those_that_disagree_most():
    values = [float(len(UNITS) - i) for i in range(len(UNITS))]
    changed = values.copy()
    changed[1], changed[12] = 0.5, 18.5  # ranks 2 and 13 become 19 and 2
    one, other = scores(values, "one"), scores(changed, "other")
    figure = plot.against(one, other, labels=2)
    assert f"{one.rank_correlation(other):.3f}" in figure.get_suptitle()
    left, right = figure.axes
    points = np.concatenate([np.asarray(c.get_offsets()) for c in right.collections])
    expected = zip(values, changed, strict=True)
    assert sorted(map(tuple, points.tolist())) == sorted(expected)
    ranks = np.concatenate([np.asarray(c.get_offsets()) for c in left.collections])
    assert sorted(ranks[:, 0].tolist()) == sorted(ranks[:, 1].tolist()) == list(range(1, 20))
    named = [[t.get_text() for t in axes.texts] for axes in (left, right)]
    assert all(set(names) == {UNITS.names[1], UNITS.names[12]} for names in named)
    assert left.xaxis_inverted() and left.yaxis_inverted()
    assert len({to_hex(np.asarray(c.get_facecolor())[0]) for c in right.collections}) == 2  # heads and neurons
    assert overlapping(figure) == [] == clipped(figure)


def test_equal_scores_disagree_nowhere_and_other_units_are_refused():
    assert texts(plot.against(scores(), scores())) == []
    fewer = Units(UNITS.sites[:2])
    values = torch.zeros(len(fewer))
    with pytest.raises(ValueError, match="ranks need the same units"):
        plot.against(scores(), Scores(fewer, values, values, "few", "nats", 0, 0))


def cells(figure: Figure) -> dict[tuple[int, float], str]:
    """The text of every cell by its column and height."""
    [axes] = figure.axes
    found = [text for text in axes.texts if text.get_text()[:1].isdigit() or text.get_text().startswith("none")]
    return {(int(text.get_position()[0]), float(text.get_position()[1])): text.get_text() for text in found}


@pytest.mark.parametrize("as_frame", [False, True])
def test_evidence_has_a_cell_for_every_row_with_both_accuracies(as_frame: bool):
    found = evidence()
    figure = plot.evidence(found.to_frame() if as_frame else found)
    [axes] = figure.axes
    columns = [tick.get_text() for tick in axes.get_xticklabels()]
    rows = {float(y): tick.get_text() for y, tick in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    assert columns == ["original", "reduced", "random weights"]
    shown = {(rows[y], columns[x]): text for (x, y), text in cells(figure).items()}
    for row in found.rows:
        name = row.intervention if row.variable == "(none)" else f"{row.variable}: {row.intervention}"
        wanted = "none retained" if np.isnan(row.accuracy) else f"{row.accuracy:.3f}"
        wanted += "" if np.isnan(row.accuracy_changed) else f" ({row.accuracy_changed:.3f})"
        wanted += f", {row.units:g}" if row.intervention == "random units" else ""  # how many were interchanged
        assert shown.pop((name, row.model)) == wanted
    assert shown == {}


def test_evidence_keeps_its_controls_apart():
    [axes] = plot.evidence(evidence()).axes
    height = {tick.get_text(): y for y, tick in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    [title] = [text.get_position()[1] for text in axes.texts if text.get_text().startswith("controls")]
    controls = [y for name, y in height.items() if name.split(": ")[-1] in ("do nothing", "random units")]
    assert all(y > title for y in controls) and all(y < title for name, y in height.items() if "aligned units" in name)
    places = sorted({patch.get_x() for patch in axes.patches if isinstance(patch, Rectangle)})
    assert places[2] - places[1] > places[1] - places[0]  # untrained weights stand apart


def test_evidence_without_its_columns_is_refused():
    with pytest.raises(ValueError, match="found has no accuracy: give Evidence"):
        plot.evidence(evidence().to_frame().drop(columns="accuracy"))
    with pytest.raises(ValueError, match="found has no rows"):
        plot.evidence(evidence().to_frame().head(0))


def test_a_dollar_in_a_method_s_name_is_a_dollar():
    figure = plot.frontier(table(methods=("cost $a_{$ b", "joint risk")))
    [legend] = figure.legends
    assert {text.get_text() for text in legend.texts} == {r"cost \$a_{\$ b", "joint risk"}
    assert len(plot.png(figure)) > 1000
