"""Figures at a real model's size (30 layers of 9 heads and 1,536 neurons) and of seventeen methods: readable, in
bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.drawn import clipped, large, large_units, overlapping, printed
from helpers.written import METHODS, affine, reduction_of, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_sparsify import Circuit, CircuitPath, Estimate, Scores, plot
from tl_sparsify.search.path import Round

SEVENTEEN = (*METHODS, "exchanges of single units")
SIZES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
UNITS = large_units()


def scores(seed: int) -> Scores:
    values = torch.randn(len(UNITS), generator=torch.Generator().manual_seed(seed)).double().mul(3).exp()
    return Scores(UNITS, values, torch.zeros_like(values), f"score {seed}", "nats", 0, 0)


def path() -> CircuitPath:
    """Twenty rounds, from all units to one in a hundred."""
    rounds = []
    for size in np.geomspace(len(UNITS), len(UNITS) / 100, 20).round().astype(int).tolist():
        found = reduction_of(Circuit(UNITS, torch.arange(len(UNITS)) < size))
        risk = 100 / size
        rounds.append(Round(found, Estimate(risk, risk / 9, 9, "nats"), Estimate(risk, risk / 9, 9, "nats"), 0.0))
    return CircuitPath(UNITS, torch.arange(len(UNITS)), tuple(rounds))


def points() -> dict[str, pd.DataFrame]:
    kept = [9270, 2318, 464]
    return {
        name: pd.DataFrame({"kept": kept, "risk": [0.01 * 1.3**i * k for k in (1, 4, 20)], "stderr": 1e-3})
        for i, name in enumerate(SEVENTEEN)
    }


def methods(tasks: int = 1, ablations: tuple[str, ...] = ("counterfactual", "refitted", "as found")) -> pd.DataFrame:
    names = ("subject_verb_agreement", "ioi", "docstring", "greater_than", "gendered_pronoun")[:tasks]
    return table(names, SEVENTEEN, ablations=ablations, sizes=SIZES)


DRAWN: dict[str, Callable[[], Figure]] = {
    "unit map": lambda: plot.unit_map(large(share=0.05), scores(0)),
    "head map": lambda: plot.head_map(scores(0)),
    "neurons": lambda: plot.neuron_density(large(share=0.05)),
    "circuit": lambda: plot.circuit(reduction_of(large(share=0.05), "refit")),
    "circuit, affine": lambda: plot.circuit(affine(large(share=0.05))),
    "path": lambda: plot.risk_curve(path()),
    "path and methods": lambda: plot.risk_curve(path(), points()),
    "against": lambda: plot.against(scores(0), scores(1)),
    "methods": lambda: plot.frontier(methods()),
    "methods, five tasks": lambda: plot.frontier(methods(5, ("counterfactual",)), "faithfulness"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_legible_and_no_larger_than_a_page_can_show(name: str):
    figure = DRAWN[name]()
    assert clipped(figure) == []
    assert overlapping(figure) == []
    width, height = figure.get_size_inches()
    assert width <= 13.5 and height <= (15 if name.endswith("tasks") else 12)
    assert len(printed(figure)) >= 10


def lines(axes: Axes) -> dict[str, list[float]]:
    drawn = [line for line in axes.lines if line.get_label() in SEVENTEEN]
    return {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in drawn if len(line.get_xdata())}  # type: ignore[arg-type]


def test_seventeen_methods_are_small_multiples_that_share_axes_and_repeat_this_packages():
    frame = methods()
    figure = plot.frontier(frame)
    rows = np.array(figure.axes).reshape(3, -1)
    assert rows.shape[1] > 1
    ours = {name for name in SEVENTEEN if name.startswith(("joint", "compensating"))}
    for row, kind in zip(rows, ("counterfactual", "refitted", "as found"), strict=True):
        shown = [lines(axes) for axes in row]
        assert max(map(len, shown)) <= 9 and all(set(some) >= ours for some in shown)
        others = [name for some in shown for name in some if name not in ours]
        assert sorted(others) == sorted(set(SEVENTEEN) - ours)  # each once
        assert len({axes.get_ylim() for axes in row}) == 1
        part = frame[frame.ablation == kind]
        for name, values in (pair for some in shown for pair in some.items()):
            means = part[part.method == name].groupby("size").risk.mean()
            np.testing.assert_allclose(values, means)
    for top, below in zip(rows[0], rows[1], strict=True):
        legend = top.get_legend()
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == list(lines(below))


def test_nine_methods_share_a_panel_and_many_of_our_own_are_divided():
    assert len(plot.frontier(table(("ioi",), METHODS[:9])).axes) == 1
    mine = table(("ioi",), SEVENTEEN).assign(ours=True)
    shown = [lines(axes) for axes in plot.frontier(mine).axes]
    assert max(map(len, shown)) <= 9 and sorted(name for some in shown for name in some) == sorted(SEVENTEEN)


def test_the_path_stands_beside_all_methods():
    shown = [[str(line.get_label()) for line in axes.lines] for axes in plot.risk_curve(path(), points()).axes]
    assert len(shown) == 3 and len(plot.risk_curve(path(), dict(list(points().items())[:7])).axes) == 1
    assert all("predicted before removing" in some for some in shown)
    legends = [axes.get_legend() for axes in plot.risk_curve(path(), points()).axes]
    named = [text.get_text() for legend in legends if legend is not None for text in legend.get_texts()]
    assert sorted(set(named) & set(SEVENTEEN)) == sorted(SEVENTEEN)


@pytest.mark.parametrize("layers", [12, 30, 80])
def test_a_circuit_has_a_box_for_each_heads_and_each_layers_neurons_whatever_the_depth(layers: int):
    figure = plot.circuit(reduction_of(large(layers, 9, 1536, share=0.05)))
    [axes] = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert layers * 10 < len(boxes) <= layers * 11  # and a dark part of each layer's neurons
    ends = sorted({(round(box.get_y(), 6), round(box.get_y() + box.get_height(), 6)) for box in boxes[: layers * 9]})
    assert all(one[1] < two[0] for one, two in pairwise(ends))  # rows of heads do not touch
    assert figure.get_size_inches()[1] <= max(12, 0.2 * layers + 2.5)


def test_a_share_of_one_percent_looks_smaller_than_one_of_ten():
    circuit = large(2, 1, 1000)
    mask = torch.zeros(len(circuit.units), dtype=torch.bool)
    mask[2:22] = mask[1002:1102] = True
    [axes] = plot.circuit(replace(reduction_of(circuit), circuit=Circuit(circuit.units, mask))).axes
    dark = [p.get_width() for p in axes.patches if isinstance(p, Rectangle) and p.get_facecolor()[0] < 0.1]
    assert max(dark) / min(dark) == pytest.approx(5)


def test_few_heads_lie_on_top_of_many_neurons_and_a_cloud_is_faint():
    right = plot.against(scores(0), scores(1)).axes[1]
    below, above = right.collections
    assert (len(np.asarray(below.get_offsets())), len(np.asarray(above.get_offsets()))) == (30 * 1536, 270)
    ink = np.asarray(below.get_alpha())
    assert np.median(ink) < 0.15 and ink.max() == 0.75 and (ink == 0.75).sum() < 300
    assert np.asarray(above.get_alpha()).min() == 0.75
