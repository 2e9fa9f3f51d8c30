"""Plots: figures hold the numbers that they claim to show, and are written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.written import (
    BENCHED,
    KEPT,
    MEASURED,
    METHODS,
    PREDICTED,
    SIZES,
    UNITS,
    affine,
    evidence,
    path,
    reduction_of,
    scores,
    table,
)
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tl_sparsify import CausalModel, Circuit, Reduction, Scores, Site, Units, plot
from tl_sparsify.presentation.diagrams import KEPT as DARK

CIRCUIT = Circuit.of(UNITS, KEPT)


def curves(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """The data of every line with points, over all axes."""
    lines = [line for axes in figure.axes for line in axes.lines if len(np.asarray(line.get_xdata())) > 1]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def meshes(figure: Figure) -> list[np.ndarray]:
    """Every map's cells, row by row; NaN where there is none."""
    found = [c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh)]
    return [np.ma.filled(np.ma.asarray(mesh.get_array()).astype(float), np.nan) for mesh in found]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def printed(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is really drawn, with its box."""
    found: dict[Text, Bbox] = {}
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found[text] = Text.get_window_extent(text, renderer)  # without the line of an annotation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        FigureCanvasAgg(figure).draw()
    return [(text.get_text(), box) for text, box in found.items()]


def clipped(figure: Figure) -> list[str]:
    """Texts that are drawn (in part) outside of the figure."""
    page = figure.bbox.padded(1.0)
    return [
        text
        for text, box in printed(figure)
        if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)
    ]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over each other."""
    boxes = [(text, box.padded(-1.5)) for text, box in printed(figure)]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[:i] if one.overlaps(two)]


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


@pytest.mark.parametrize("measure", ["risk", "accuracy", "faithfulness"])
def test_the_frontier_has_a_line_of_means_over_seeds_for_every_method_in_every_tasks_panel(measure: str):
    frame = table()
    figure = plot.frontier(frame, measure)
    assert [axes.get_title().split(" (")[0] for axes in figure.axes] == list(dict.fromkeys(frame.task))
    for axes, (_, part) in zip(figure.axes, frame.groupby("task", sort=False), strict=True):
        lines = {line.get_label(): line for line in axes.lines if line.get_label() in METHODS}
        assert set(lines) == set(METHODS)
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
    [axes] = plot.frontier(table(tasks=("one",), sizes=BENCHED)).axes
    lines = {str(line.get_label()): line for line in axes.lines if line.get_label() in METHODS}
    ours = {name for name in METHODS if name.startswith(("joint", "compensating"))}
    assert min(lines[name].get_linewidth() for name in ours) > max(
        lines[n].get_linewidth() for n in set(METHODS) - ours
    )
    looks = {(to_hex(x.get_color()), x.get_linestyle(), x.get_marker(), x.get_linewidth()) for x in lines.values()}
    assert len(looks) == len(METHODS)


def test_kinds_of_ablation_never_share_a_panel():
    frame = table(ablations=("mean", "zero", "refitted"))
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


@pytest.mark.parametrize("as_reduction", [True, False])
def test_the_map_has_a_dark_cell_for_every_kept_unit(as_reduction: bool):
    heads, neurons = meshes(plot.unit_map(reduction_of(CIRCUIT) if as_reduction else CIRCUIT))
    nan = np.nan
    np.testing.assert_array_equal(heads, [[0, 1, 0], [nan, nan, nan], [1, 1, nan]])
    np.testing.assert_array_equal(neurons, [[0, 0, 0, 0, 1], [1, 0, 0, 1, nan], [0, 0, 0, 0, 0]])


def test_the_map_says_how_many_units_each_layer_keeps():
    figure = plot.unit_map(CIRCUIT)
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in figure.axes]
    assert [[int(text.rpartition(" ")[2]) for text in column] for column in labels] == [[1, 0, 2], [1, 2, 0]]
    assert ["3" in axes.get_title() for axes in figure.axes] == [True, True]


def test_scores_shade_the_removed_units_by_rank_and_leave_the_kept_ones_dark():
    found = np.concatenate([mesh[~np.isnan(mesh)] for mesh in meshes(plot.unit_map(CIRCUIT, scores()))])
    kept = CIRCUIT.mask.numpy()
    assert (found[kept] == 1).all() and (found[~kept] < 0.5).all()
    assert (np.diff(found[~kept]) < 0).all()  # the scores fall along the units


def test_the_map_of_one_kind_of_unit_is_one_map():
    units = Units(UNITS.sites[2:])
    [mesh] = meshes(plot.unit_map(Circuit.full(units)))
    assert mesh.shape == (3, 5) and np.nansum(mesh) == 14


def test_the_head_map_shows_which_heads_are_kept():
    for of in (CIRCUIT, reduction_of(CIRCUIT)):
        figure = plot.head_map(of)
        [mesh] = meshes(figure)
        np.testing.assert_array_equal(mesh, [[0, 1, 0], [1, 1, np.nan]])
        assert figure.axes[0].get_title().startswith("3 of 5 heads kept")
        assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["layer 0", "layer 2"]


def test_the_head_map_shows_scores_in_their_unit():
    figure = plot.head_map(scores())
    np.testing.assert_array_equal(meshes(figure)[0], [[18, 17, 16], [15, 14, np.nan]])
    axes, bar = figure.axes
    assert "test" in axes.get_title() and bar.get_ylabel() == "nats"


def test_the_head_map_is_logarithmic_for_wide_scores_and_has_two_colours_for_signed_ones():
    def of(values: list[float]) -> QuadMesh:
        figure = plot.head_map(scores(values + [0.0] * (len(UNITS) - len(values))))
        [mesh] = [c for c in figure.axes[0].collections if isinstance(c, QuadMesh)]
        figure.canvas.draw()
        return mesh

    wide = of([1.0, 1e-2, 1e-4, 1e-9, 0.0])
    shade = [wide.norm(value) for value in (1.0, 1e-2, 1e-4)]
    assert shade[0] == 1 and shade[0] - shade[1] == pytest.approx(shade[1] - shade[2])
    assert np.nanmin(meshes_of(wide)) == 1e-6  # what is below stands there
    signed = of([-2.0, 1.0, 0.5, 0.0, -1.0])
    assert signed.norm(0.0) == 0.5 and signed.norm(-2.0) == 0 and signed.norm(2.0) == 1


def meshes_of(mesh: QuadMesh) -> np.ndarray:
    return np.ma.filled(np.ma.asarray(mesh.get_array()).astype(float), np.nan)


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_the_density_of_neurons_adds_up_to_the_neurons_kept(bins: int, sizes: list[int], seed: int):
    units = Units(tuple(Site("neuron", i, f"blocks.{i}.mlp.hook_post", size) for i, size in enumerate(sizes)))
    mask = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < 0.3
    figure = plot.neuron_density(Circuit(units, mask), bins)
    left = figure.axes[0]
    percent = [100 * float(part.double().mean()) for part in units.split(mask)]
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], percent)
    grid, *_bar = meshes(figure)
    assert grid.shape == (len(sizes), min(bins, *sizes))
    for row, size, part in zip(grid, sizes, units.split(mask), strict=True):
        lengths = [len(cut) for cut in np.array_split(np.arange(size), grid.shape[1])]
        assert float(row @ lengths / 100) == pytest.approx(float(part.sum()))
    assert [text.get_text() for text in left.texts] == [
        f" {int(part.sum())} of {len(part)}" for part in units.split(mask)
    ]


def test_pictures_of_units_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="holds no head"):
        plot.head_map(Circuit.full(Units(UNITS.sites[2:])))
    with pytest.raises(ValueError, match="holds no neuron"):
        plot.neuron_density(Circuit.full(Units(UNITS.sites[:2])))
    with pytest.raises(ValueError, match="bins is 0"):
        plot.neuron_density(CIRCUIT, 0)


def dark(figure: Figure) -> list[Rectangle]:
    [axes] = figure.axes
    return [p for p in axes.patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()) == DARK]


def test_the_circuit_has_a_row_for_each_layer_between_input_and_output():
    figure = plot.circuit(reduction_of(CIRCUIT))
    [axes] = figure.axes
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    order = [height[name] for name in ("input", "layer 0", "layer 1", "layer 2", "output")]
    assert order == sorted(order) and len(set(order)) == 5
    assert height["layer 0"] < height["1 of 5 neurons"] < height["layer 1"]  # an MLP reads what its heads write
    assert {"2 of 4 neurons", "0 of 5 neurons"} <= set(height)
    assert any(text.startswith("6 of 19 units kept: 3 heads, 3 neurons") for text in height)
    numbers = sorted(text for text in texts(figure) if text.isdigit())
    assert numbers == ["0", "1", "1"]  # L0H1, L2H0 and L2H1


def test_the_dark_part_of_a_box_is_the_share_kept():
    circuit = Circuit.of(UNITS, [f"L1N{i}" for i in range(3)])
    [inside] = dark(plot.circuit(reduction_of(circuit)))
    [axes] = plot.circuit(reduction_of(circuit)).axes
    boxes = {p.get_width() for p in axes.patches if isinstance(p, Rectangle) and p.get_y() == inside.get_y()}
    assert inside.get_width() == pytest.approx(0.75 * max(boxes))


@pytest.mark.parametrize(
    ("reduction", "label", "arrows"),
    [
        (reduction_of(CIRCUIT, "mean"), ["removed: constant"], 0),
        (reduction_of(CIRCUIT, "refit"), ["removed: refitted constant"], 0),
        (affine(CIRCUIT), ["removed: refitted constant", "removed: affine in kept units"], 2),
        (reduction_of(Circuit.full(UNITS), "refit"), [], 0),
    ],
)
def test_the_circuit_marks_what_replaces_removed_units(reduction: Reduction, label: list[str], arrows: int):
    [axes] = plot.circuit(reduction).axes
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["kept", *label]
    hatches = {patch.get_hatch() for patch in axes.patches if isinstance(patch, Rectangle)} - {None, ""}
    assert len(hatches) == len([name for name in label if name != "removed: constant"])
    bent = [p for p in axes.patches if isinstance(p, FancyArrowPatch) and "Arc3" in str(p.get_connectionstyle())]
    assert len([p for p in bent if p.get_connectionstyle().rad != 0]) == arrows  # type: ignore[attr-defined]


def test_a_layer_of_which_nothing_is_kept_only_writes():
    circuit = Circuit.of(UNITS, ["L0H1"])
    [axes] = plot.circuit(reduction_of(circuit)).axes
    arrows = [p.get_arrowstyle() for p in axes.patches if isinstance(p, FancyArrowPatch)]
    both = [style for style in arrows if type(style).__name__ == "CurveFilledAB"]
    assert len(both) == 1 and len(arrows) == 1 + len(UNITS.sites)  # and the stream


def test_the_circuit_of_whole_layers_and_directions_has_a_box_for_each():
    basis = torch.eye(4)[:, :3]
    units = Units(
        (
            Site("attention", 0, "blocks.0.hook_attn_out", 1),
            Site("mlp", 0, "blocks.0.hook_mlp_out", 1),
            Site("direction", 1, "blocks.1.hook_resid_post", 3, positions=4, basis=basis),
        )
    )
    circuit = Circuit.of(units, ["L0MLP", "L1POST2@4"])
    assert {"attention removed", "MLP kept", "1 of 3 directions@4"} <= set(texts(plot.circuit(reduction_of(circuit))))


def large(layers: int, heads: int, neurons: int) -> Circuit:
    sites = [Site("head", i, f"blocks.{i}.attn.hook_z", heads) for i in range(layers)]
    sites += [Site("neuron", i, f"blocks.{i}.mlp.hook_post", neurons) for i in range(layers)]
    units = Units(tuple(sites))
    return Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.1)


MANY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
OTHER = [float((7 * i) % 19) for i in range(19)]


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: plot.circuit(reduction_of(CIRCUIT, "refit")),
        lambda: plot.circuit(reduction_of(large(12, 12, 3072), "refit")),
        lambda: plot.circuit(reduction_of(large(32, 32, 11008))),
        lambda: plot.circuit(affine(large(3, 4, 16))),
        lambda: plot.head_map(large(12, 12, 1)),
        lambda: plot.head_map(scores([10.0**-i for i in range(19)], "single-unit risk")),
        lambda: plot.neuron_density(large(12, 1, 3072)),
        lambda: plot.evidence(evidence()),
        lambda: plot.frontier(table(tasks=("a", "b", "c", "d")), "accuracy"),
        lambda: plot.frontier(table(tasks=("a",), methods=METHODS[:3])),
        lambda: plot.frontier(table(tasks=("a",), sizes=MANY)),
        lambda: plot.against(scores(), scores(OTHER, "other")),
    ],
)
def test_no_text_is_clipped_or_over_another(drawn: Callable[[], Figure]):
    figure = drawn()
    assert clipped(figure) == []
    assert overlapping(figure) == []


def test_figures_are_not_left_with_pyplot(tmp_path: FilePath):
    before = plt.get_fignums()
    plot.save(plot.risk_curve(path()), tmp_path / "risk.png")
    plot.save(plot.unit_map(Circuit.full(UNITS), scores()), tmp_path / "map.png")
    plot.save(plot.frontier(table(seeds=1, methods=METHODS[:2])), tmp_path / "frontier.png")
    plot.save(plot.evidence(evidence()), tmp_path / "evidence.png")
    assert plt.get_fignums() == before


def test_a_saved_figure_is_a_png_with_nothing_beside_it(tmp_path: FilePath):
    plot.save(plot.unit_map(CIRCUIT), tmp_path / "map.png")
    image = plt.imread(tmp_path / "map.png")
    assert image.shape[0] > 100 and image.shape[1] > 100 and image.std() > 0
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_the_same_figure_is_saved_as_the_same_bytes(tmp_path: FilePath):
    for name in ("a.png", "b.png"):
        plot.save(plot.risk_curve(path()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert plot.png(plot.circuit(reduction_of(CIRCUIT))) == plot.png(plot.circuit(reduction_of(CIRCUIT)))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(error: BaseException, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch):
    whole = FilePath.write_bytes

    def torn(target: FilePath, content: bytes) -> int:
        whole(target, content[: len(content) // 2])
        raise error

    plot.save(plot.risk_curve(path()), tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    monkeypatch.setattr(FilePath, "write_bytes", torn)
    for name in ("old.png", "new.png"):
        with pytest.raises(type(error)):
            plot.save(plot.unit_map(Circuit.full(UNITS)), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == before


def test_a_causal_graph_shows_every_variable_above_its_parents():
    model = CausalModel(
        ("a", "b", "c"),
        {"ab": lambda a, b: a + b, "again": lambda ab, c: ab + c, "all": lambda ab, again: again},
        "all",
    )
    [axes] = plot.causal_graph(model).axes
    height = {text.get_text(): text.get_position()[1] for text in axes.texts if text.get_text()}
    assert set(height) == {"a", "b", "c", "ab", "again", "all"}
    assert all(height[parent] < height[name] for name in model.variables for parent in model.parents[name])
    arrows = [text for text in axes.texts if not text.get_text()]
    assert len(arrows) == sum(map(len, model.parents.values()))
    bold = [t.get_text() for t in axes.texts if t.get_bbox_patch() and t.get_bbox_patch().get_linewidth() == 2]
    assert bold == ["all"]
