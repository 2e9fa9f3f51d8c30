"""Plots: matplotlib figures of paths and circuits. Every function returns the figure and draws on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tl_sparsify.causal import CausalModel
from tl_sparsify.circuit import Circuit, Reduction
from tl_sparsify.score import Scores
from tl_sparsify.search import Path

_FLOOR = 1e-6  # nats; what a logarithmic axis shows for less


def risk_curve(path: Path, points: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Risk against units kept along a path, predicted and measured, on logarithmic axes.

    ``points`` adds named tables with columns ``kept``, ``risk`` and ``stderr`` (other constants, other methods).
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    frame = path.to_frame()
    measured = frame.measured.clip(lower=_FLOOR)
    axes.errorbar(frame.kept, measured, yerr=frame.measured_stderr, marker="o", ms=4, label="measured along the path")
    axes.plot(frame.kept, frame.predicted.clip(lower=_FLOOR), "--", marker="x", ms=4, label="predicted before removing")
    for name, table in (points or {}).items():
        axes.errorbar(table.kept, table.risk.clip(lower=_FLOOR), yerr=table.stderr, marker="s", ms=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel=f"units kept (of {len(path.units):,})", ylabel="risk (nats)")
    ticks = [kept for i, kept in enumerate(frame.kept) if i % 3 == 0 or i == len(frame) - 1]
    axes.set_xticks(ticks, [str(kept) for kept in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_title(f"risk along the path (values below {_FLOOR:g} nats are drawn there)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def unit_map(reduction: Reduction | Circuit, scores: Scores | None = None) -> Figure:
    """The kept heads and neurons of every layer: a cell for each unit, dark where it is kept.

    With ``scores``, removed units are shaded by their rank in them.
    """
    circuit = reduction.circuit if isinstance(reduction, Reduction) else reduction
    units = circuit.units
    rank = np.zeros(len(units))
    if scores is not None:
        rank[scores.order.cpu().numpy()] = np.linspace(0, 0.45, len(units))
    shade = np.where(circuit.mask.numpy(), 1.0, rank)
    kinds = list(dict.fromkeys(site.kind for site in units.sites))
    widths = [max(site.size for site in units.sites if site.kind == kind) for kind in kinds]
    ratios = [max(width, max(widths) / 6) for width in widths]
    layers = sorted({site.layer for site in units.sites})
    figure = Figure(figsize=(9, 1.5 + 0.42 * len(layers)), layout="constrained")
    for axes, kind, width in zip(
        figure.subplots(1, len(kinds), width_ratios=ratios, squeeze=False)[0], kinds, widths, strict=True
    ):
        grid = np.full((len(layers), width), np.nan)
        count = {layer: 0 for layer in layers}
        for site, part in zip(units.sites, units.slices, strict=True):
            if site.kind == kind:
                grid[layers.index(site.layer), : site.size] = shade[part]
                count[site.layer] += int(circuit.mask[part].sum())
        axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.6 if width < 100 else 0)
        axes.set_yticks(np.arange(len(layers)) + 0.5, [f"layer {layer}: {count[layer]}" for layer in layers])
        axes.set(xlabel=f"{kind} index", title=f"{sum(count.values())} {kind}s kept")
    return figure


def causal_graph(model: CausalModel) -> Figure:
    """A causal model's graph: inputs below, each variable above its parents, the output with a bold frame."""
    level = {name: 0 for name in model.inputs}
    for name in model.variables:
        level[name] = 1 + max((level[parent] for parent in model.parents[name]), default=0)
    rows = [[name for name in level if level[name] == height] for height in range(max(level.values()) + 1)]
    widest = max(map(len, rows))
    place = {
        name: ((i + 0.5) * widest / len(row), height) for height, row in enumerate(rows) for i, name in enumerate(row)
    }
    figure = Figure(figsize=(max(3.0, 1.4 * widest), 1.1 * len(rows) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    for name in model.variables:
        for parent in model.parents[name]:
            arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 14, "shrinkB": 14}
            axes.annotate("", xy=place[name], xytext=place[parent], arrowprops=arrow)
    for name, (x, y) in place.items():
        box = {
            "boxstyle": "square,pad=0.4" if name in model.inputs else "round,pad=0.4",
            "facecolor": "0.93" if name in model.inputs else "white",
            "edgecolor": "black" if name == model.output else "0.5",
            "linewidth": 2 if name == model.output else 1,
        }
        axes.text(x, y, name, ha="center", va="center", bbox=box)
    axes.set(xlim=(0, widest), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    return figure


def save(figure: Figure, path: FilePath) -> None:
    """Write a figure as PNG: complete, or not at all."""
    beside = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(beside, format="png", dpi=150)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
