"""Plots: matplotlib figures of scores and evidence, and those of :mod:`tl_sparsify.presentation.curves` and
:mod:`tl_sparsify.presentation.diagrams`.

Every function returns the figure and draws on nothing else.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.files import write_bytes
from tl_sparsify.abstraction.evidence import NOTHING, RANDOM_UNITS, Evidence
from tl_sparsify.abstraction.verdicts import Role
from tl_sparsify.presentation.curves import frontier, risk_curve
from tl_sparsify.presentation.diagrams import causal_graph, circuit, head_map, neuron_density, unit_map
from tl_sparsify.presentation.edge_graph import edge_graph
from tl_sparsify.presentation.edge_map import edge_map
from tl_sparsify.search.scores import Scores

__all__ = [
    "against",
    "causal_graph",
    "circuit",
    "edge_graph",
    "edge_map",
    "evidence",
    "frontier",
    "head_map",
    "neuron_density",
    "png",
    "risk_curve",
    "save",
    "unit_map",
]

_FINEST = 2400  # dots per inch
_WIDE = 100  # scores that span more are drawn on logarithmic axes
_MANY, _FIRST = 2000, 100  # units of a kind whose points are fainter the later in both orders, from the hundredth
_KINDS = {"head": "#d55e00", "neuron": "#0072b2", "mlp": "#009e73", "attention": "#cc79a7"}


@checked
def against(one: Scores, other: Scores, *, labels: int = 8) -> Figure:
    """One method's scores against another's, by rank (1: needed most) and by value, kinds of units by colour.

    Of a kind with thousands of units a point is fainter the less both methods need it, so that a cloud is the darker
    the more there are.
    ``labels`` units are named: those whose ranks differ by the largest factor. Spearman's rank correlation is in the
    title. Where values span more than a factor of a hundred axes are logarithmic (signed ones: linear up to 1e-4 of the
    largest).

    Raises:
        ValueError: scores of other units.

    Example:
        >>> tls.plot.against(scores, tls.score.variance(model, train, units), labels=3)
        <Figure size ...>
    """
    check_count("labels", labels, least=0)
    correlation = one.rank_correlation(other)
    frame = cast(Any, one.to_frame())[["unit", "kind", "score"]].rename(columns={"score": "x"})
    frame["y"] = other.to_frame().score
    for axis in ("x", "y"):
        frame[f"rank_{axis}"] = frame[axis].rank(ascending=False)
    apart = (np.log(frame.rank_x) - np.log(frame.rank_y)).abs()
    named = frame[apart > 0].loc[lambda some: apart[some.index].sort_values(ascending=False, kind="stable").index]
    named = named.head(labels)
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, (x, y) in ((left, ("rank_x", "rank_y")), (right, ("x", "y"))):
        for axis, column in (("x", x), ("y", y)):
            values = frame[column]
            sizes = values.abs()
            if (values > 0).all() and values.max() / values.min() > _WIDE:
                axes.set(**{f"{axis}scale": "log"})
            elif sizes.max() > _WIDE * sizes.median():
                getattr(axes, f"set_{axis}scale")("symlog", linthresh=1e-4 * sizes.max())
        parts = sorted(frame.groupby("kind", sort=False), key=lambda part: -len(part[1]))  # few lie on top of many
        for kind, part in parts:
            many = len(part) > _MANY
            place = part[["rank_x", "rank_y"]].min(axis=1)
            ink = np.clip((_FIRST / place) ** 0.6, 0.1, 1) if many else 1.0
            look = {"s": 26 if len(part) <= 200 else 7 if many else 12, "alpha": 0.75 * ink}
            axes.scatter(part[x], part[y], color=_KINDS.get(str(kind), "#777777"), linewidth=0, **look)
        axes.grid(alpha=0.3)
    left.set(xlabel=f"rank by {one.name}", ylabel=f"rank by {other.name}", title="ranks (1: needed most)")
    left.invert_xaxis()
    left.invert_yaxis()
    left.axline((1, 1), (2, 2), color="0.6", linewidth=0.8, zorder=0)
    right.set(xlabel=f"{one.name} ({one.measured_in})", ylabel=f"{other.name} ({other.measured_in})", title="scores")
    _named(left, named, "rank_x", "rank_y")
    _named(right, named, "x", "y")
    shown = {kind: _KINDS.get(str(kind), "#777777") for kind in dict.fromkeys(frame.kind)}
    dots = [Line2D([], [], linestyle="", marker="o", color=colour, label=f"{kind}s") for kind, colour in shown.items()]
    right.legend(handles=dots, fontsize=8, loc="upper left")
    figure.suptitle(f"{one.name} against {other.name}: Spearman's rank correlation {correlation:.3f}", fontsize=11)
    return figure


@checked
def evidence(found: Evidence | pd.DataFrame) -> Figure:
    """Interchange accuracies as a heat map: a row for each variable and intervention, a column for each model.

    Controls, which need not be good, stand apart: their rows below, untrained weights to the right.

    In a cell: the accuracy, and in brackets the accuracy on the pairs whose answer should change.

    Raises:
        ValueError: a table without the columns or rows of :meth:`Evidence.to_frame`.

    Example:
        >>> tls.plot.evidence(tls.verify(model, task.causal_model, task.alignment, pairs, draws=1))
        <Figure size ...>
    """
    frame = cast(Any, found.to_frame() if isinstance(found, Evidence) else found)
    needed = ("model", "intervention", "variable", "accuracy", "accuracy_changed", "role", "untrained")
    missing = [name for name in needed if name not in frame]
    if missing or frame.empty:
        raise ValueError(f"found has no {', '.join(missing) or 'rows'}: give Evidence, or its to_frame()")
    blocks: dict[str, list[tuple[str, str]]] = {
        "aligned units: the answer should be the causal model's": [],
        "no variable, or random ones: the answer should stay": [],
        "controls: need not be good": [],
    }
    for variable, name, role in dict.fromkeys(zip(frame.variable, frame.intervention, frame.role, strict=True)):
        block = 1 if variable == NOTHING else 0 if role == Role.ALIGNED else 2
        list(blocks.values())[block].append((variable, name))
    untrained = dict(zip(frame.model, frame.untrained, strict=True))
    models = sorted(untrained, key=lambda model: untrained[model])
    place = {model: i + 0.15 * untrained[model] for i, model in enumerate(models)}
    cells = {(row.variable, row.intervention, row.model): row for row in frame.itertuples()}
    height = sum(len(rows) + 1 for rows in blocks.values() if rows)
    figure = Figure(figsize=(2.9 + 1.65 * len(models), 0.9 + 0.27 * height), layout="constrained")
    axes = figure.add_subplot()
    shades = colormaps["Blues"]
    y, ticks = 0.0, {}
    for title, rows in blocks.items():
        if not rows:
            continue
        axes.text(0, y + 0.6, title, fontsize=8, style="italic", va="center", color="0.3")
        y += 1
        for variable, name in rows:
            ticks[y + 0.5] = name if variable == NOTHING else f"{variable}: {name}"
            for model, x in place.items():
                _cell(axes, cells.get((variable, name, model)), x, y, shades)
            y += 1
    axes.set(xlim=(0, max(place.values()) + 1), ylim=(y, 0))
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_xticks([x + 0.5 for x in place.values()], list(place), fontsize=9)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(
        "interchange accuracy\n(in brackets: where the answer should change; random units: how many)", fontsize=9
    )
    return figure


@checked
def png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file: the same for the same figure.

    Example:
        >>> tls.plot.png(tls.plot.risk_curve(path))[1:4]
        b'PNG'
    """
    if not 1 <= dpi <= _FINEST:
        raise ValueError(f"dpi is {dpi}; it must lie between 1 and {_FINEST:,}")
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=dpi)
    return target.getvalue()


@checked
def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG: complete, or not at all.

    Example:
        >>> tls.plot.save(tls.plot.risk_curve(path), "risk.png")
    """
    write_bytes(Path(path), png(figure))


def _named(axes: Axes, named: Any, x: str, y: str) -> None:
    """Names in a column next to the axes, in the order of their points, with a line to each: none can overlap."""
    rising = named.sort_values(y, ascending=not axes.yaxis_inverted(), kind="stable")
    for i, (_, row) in enumerate(rising.iterrows()):
        height = (i + 0.5) / len(named)
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        text = {"xycoords": "data", "textcoords": "axes fraction", "va": "center", "fontsize": 8}
        axes.annotate(row.unit, (row[x], row[y]), (1.03, height), arrowprops=line, **text)


def _cell(axes: Axes, row: Any, x: float, y: float, shades: Any) -> None:
    """One accuracy, shaded; an empty frame where there is none."""
    value = float("nan") if row is None else float(row.accuracy)
    colour = "white" if np.isnan(value) else shades(0.85 * value)
    axes.add_patch(Rectangle((x + 0.01, y + 0.03), 0.98, 0.94, facecolor=colour, edgecolor="0.85", linewidth=0.6))
    if row is None:
        return
    changed = float(row.accuracy_changed)
    text = "none retained" if np.isnan(value) else f"{value:.3f}"
    text += "" if np.isnan(changed) else f" ({changed:.3f})"
    text += f", {row.units:g}" if row.intervention == RANDOM_UNITS and "units" in row._fields else ""
    ink = "white" if value > 0.65 else "0.1"
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=ink)
