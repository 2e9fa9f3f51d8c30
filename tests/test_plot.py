"""Plots: figures hold the numbers that they claim to show, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from tl_sparsify import CausalModel, Circuit, Estimate, Path, Reduction, Scores, Site, Units, Values, plot
from tl_sparsify.search import Round

UNITS = Units(
    (
        Site("head", 0, "blocks.0.attn.hook_z", 3),
        Site("head", 2, "blocks.2.attn.hook_z", 2),
        Site("neuron", 0, "blocks.0.mlp.hook_post", 5),
        Site("neuron", 1, "blocks.1.mlp.hook_post", 4),
        Site("neuron", 2, "blocks.2.mlp.hook_post", 5),
    )
)
KEPT = ["L0H1", "L2H0", "L2H1", "L0N4", "L1N0", "L1N3"]
SIZES = (12, 7, 4, 2, 1)
MEASURED = (0.0, 1e-4, 0.02, 0.3, 0.7)  # a logarithm of the first is none
PREDICTED = (1e-9, 2e-4, 0.01, 0.5, 0.6)


def reduction_of(circuit: Circuit) -> Reduction:
    widths = {"head": 2, "neuron": 1}
    return Reduction(circuit, Values(UNITS, tuple(torch.zeros(s.size, widths[s.kind]) for s in UNITS.sites)))


def path() -> Path:
    rounds = []
    for size, measured, predicted in zip(SIZES, MEASURED, PREDICTED, strict=True):
        circuit = Circuit(UNITS, torch.arange(len(UNITS)) >= len(UNITS) - size)
        estimates = (Estimate(value, value / 10, 50, "nats") for value in (predicted, measured))
        rounds.append(Round(reduction_of(circuit), *estimates, additivity=0.0))
    return Path(UNITS, torch.arange(len(UNITS)), tuple(rounds))


def scores() -> Scores:
    values = torch.arange(len(UNITS)).double().flip(0)
    return Scores(UNITS, values, torch.zeros_like(values), "test", "nats", 0, 0)


def curves(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """The data of every line with points, over all axes."""
    lines = [line for axes in figure.axes for line in axes.lines if len(np.asarray(line.get_xdata())) > 1]
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in lines]


def meshes(figure: Figure) -> list[np.ndarray]:
    """Every map's cells, row by row; NaN where there is none."""
    found = [c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh)]
    return [np.ma.filled(np.ma.asarray(mesh.get_array()).astype(float), np.nan) for mesh in found]


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
    table = pd.DataFrame({"kept": [9, 3], "risk": [0.05, 0.6], "stderr": [0.01, 0.1]})
    figure = plot.risk_curve(path(), {"refitted": table})
    assert ([9, 3], [0.05, 0.6]) in curves(figure)
    [axes] = figure.axes
    legend = axes.get_legend()
    assert legend is not None and "refitted" in [text.get_text() for text in legend.get_texts()]
    assert len(curves(figure)) == len(curves(plot.risk_curve(path()))) + 1


@pytest.mark.parametrize("as_reduction", [True, False])
def test_the_map_has_a_dark_cell_for_every_kept_unit(as_reduction: bool):
    circuit = Circuit.of(UNITS, KEPT)
    heads, neurons = meshes(plot.unit_map(reduction_of(circuit) if as_reduction else circuit))
    nan = np.nan
    np.testing.assert_array_equal(heads, [[0, 1, 0], [nan, nan, nan], [1, 1, nan]])
    np.testing.assert_array_equal(neurons, [[0, 0, 0, 0, 1], [1, 0, 0, 1, nan], [0, 0, 0, 0, 0]])


def test_the_map_says_how_many_units_each_layer_keeps():
    figure = plot.unit_map(Circuit.of(UNITS, KEPT))
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in figure.axes]
    assert [[int(text.rpartition(" ")[2]) for text in column] for column in labels] == [[1, 0, 2], [1, 2, 0]]
    assert ["3" in axes.get_title() for axes in figure.axes] == [True, True]


def test_scores_shade_the_removed_units_by_rank_and_leave_the_kept_ones_dark():
    circuit = Circuit.of(UNITS, KEPT)
    cells = np.concatenate([mesh[~np.isnan(mesh)] for mesh in meshes(plot.unit_map(circuit, scores()))])
    kept = circuit.mask.numpy()
    assert (cells[kept] == 1).all() and (cells[~kept] < 0.5).all()
    assert (np.diff(cells[~kept]) < 0).all()  # the scores fall along the units


def test_the_map_of_one_kind_of_unit_is_one_map():
    units = Units(UNITS.sites[2:])
    [mesh] = meshes(plot.unit_map(Circuit.full(units)))
    assert mesh.shape == (3, 5) and np.nansum(mesh) == 14


def test_figures_are_not_left_with_pyplot(tmp_path: FilePath):
    before = plt.get_fignums()
    plot.save(plot.risk_curve(path()), tmp_path / "risk.png")
    plot.save(plot.unit_map(Circuit.full(UNITS), scores()), tmp_path / "map.png")
    assert plt.get_fignums() == before


def test_a_saved_figure_is_a_png_with_nothing_beside_it(tmp_path: FilePath):
    plot.save(plot.unit_map(Circuit.of(UNITS, KEPT)), tmp_path / "map.png")
    image = plt.imread(tmp_path / "map.png")
    assert image.shape[0] > 100 and image.shape[1] > 100 and image.std() > 0
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_the_same_figure_is_saved_as_the_same_bytes(tmp_path: FilePath):
    for name in ("a.png", "b.png"):
        plot.save(plot.risk_curve(path()), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(error: BaseException, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch):
    def torn(figure: Figure, target: Any, **options: Any) -> None:
        half = b"\x89PNG half"
        target.write(half) if hasattr(target, "write") else FilePath(target).write_bytes(half)
        raise error

    plot.save(plot.risk_curve(path()), tmp_path / "old.png")
    before = (tmp_path / "old.png").read_bytes()
    monkeypatch.setattr(Figure, "savefig", torn)
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
