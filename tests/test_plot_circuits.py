"""Pictures of a circuit: maps of heads, densities of neurons, boxes of layers, and the causal graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.drawn import CIRCUIT, large_units, texts
from helpers.written import (
    UNITS,
    affine,
    reduction_of,
    scores,
)
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from tl_sparsify import CausalModel, Circuit, Reduction, Site, Units, plot
from tl_sparsify.presentation.diagrams import KEPT as DARK


def meshes(figure: Figure) -> list[np.ndarray]:
    """Every map's cells, row by row; NaN where there is none."""
    found = [c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh)]
    return [np.ma.filled(np.ma.asarray(mesh.get_array()).astype(float), np.nan) for mesh in found]


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


def test_a_wide_layers_units_are_shown_as_shares_of_its_parts():
    """30 layers of 1,536 neurons: 64 cells of 24 neurons each, and not a stripe a neuron."""
    units = large_units()
    mask = torch.zeros(len(units), dtype=torch.bool)
    first = 30 * 9 + 2 * 1536  # of layer 2
    mask[first : first + 12] = True
    mask[first + 24 : first + 30] = True
    heads, neurons = meshes(plot.unit_map(Circuit(units, mask)))
    assert heads.shape == (30, 9) and neurons.shape == (30, 64)
    expected = np.zeros((30, 64))
    expected[2, :2] = 12 / 24, 6 / 24
    np.testing.assert_allclose(neurons, expected)


def test_several_sites_of_one_kind_in_a_layer_have_a_row_each():
    first, last = (Units(UNITS.sites[:2]).at(place) for place in (3, 4))
    mask = torch.tensor([place == 3 for place in (3, 4) for _ in range(len(first))])
    figure = plot.unit_map(Circuit(first + last, mask))
    [mesh] = meshes(figure)
    np.testing.assert_array_equal(mesh, [[1, 1, 1], [0, 0, 0], [1, 1, np.nan], [0, 0, np.nan]])
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["layer 0@3: 3", "layer 0@4: 0", "layer 2@3: 2", "layer 2@4: 0"]


def test_a_kind_with_fewer_sites_in_a_layer_has_no_count_of_none():
    """Heads at two positions beside neurons everywhere: the second row of a layer has no neurons to count."""
    heads, neurons = Units(UNITS.sites[:1]), Units(tuple(site for site in UNITS.sites if site.kind == "neuron")[:1])
    assert heads.sites[0].layer == neurons.sites[0].layer
    figure = plot.unit_map(Circuit.full(heads.at(3) + heads.at(4) + neurons))
    labels = [[tick.get_text() for tick in axes.get_yticklabels()] for axes in figure.axes]
    assert labels == [["layer 0@3: 3", "layer 0@4: 3"], [f"layer 0: {len(neurons)}", ""]]


def test_the_head_map_tells_scores_that_are_no_number_from_heads_that_there_are_not():
    found = scores()
    values = found.scores.clone()
    values[0] = float("nan")
    both = plot.head_map(replace(found, scores=values)).axes[0].get_title()
    assert both.endswith("grey: no such head or no number")
    wide = Units((UNITS.sites[0],))
    one = replace(found, units=wide, scores=values[:3], stderr=found.stderr[:3])
    assert plot.head_map(one).axes[0].get_title().endswith("grey: no number")
