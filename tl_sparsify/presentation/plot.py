"""Plots: matplotlib figures of paths, methods, scores and evidence, and those of
:mod:`tl_sparsify.presentation.diagrams`.

Every function returns the figure and draws on nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.files import write_bytes
from tl_sparsify.abstraction.evidence import NOTHING, RANDOM_UNITS, Evidence
from tl_sparsify.abstraction.verdicts import Role
from tl_sparsify.presentation.diagrams import causal_graph, circuit, head_map, neuron_density, unit_map
from tl_sparsify.presentation.sentences import kind as said_of
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

__all__ = [
    "against",
    "causal_graph",
    "circuit",
    "evidence",
    "frontier",
    "head_map",
    "neuron_density",
    "png",
    "risk_curve",
    "save",
    "unit_map",
]

_FLOOR = 1e-6  # nats; what a logarithmic axis shows for less
_MEASURES = {
    "risk": "risk (nats)",
    "accuracy": "accuracy (share right)",
    "faithfulness": "faithfulness (share of the metric)",
}
_FINEST = 2400  # dots per inch
_WIDE = 100  # scores that span more are drawn on logarithmic axes
_SEEN = (-0.5, 1.5)  # of faithfulness, which has no bounds
_BOLD = ("#d55e00", "#0072b2", "#009e73", "#000000")  # Okabe and Ito's colours; then Tol's
_THIN = ("#56b4e9", "#e69f00", "#cc79a7", "#882255", "#999933", "#44aa99", "#777777")
_MARKERS = "os^vDPX*<>hp"
_KINDS = {"head": "#d55e00", "neuron": "#0072b2", "mlp": "#009e73", "attention": "#cc79a7"}


@checked
def risk_curve(path: CircuitPath, points: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Risk against units kept along a path, predicted and measured, on logarithmic axes.

    ``points`` adds named tables with columns ``kept``, ``risk`` and ``stderr`` (other constants, other methods).

    Example:
        >>> tls.plot.risk_curve(path)
        <Figure size ...>
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    frame = path.to_frame()
    measured = frame.measured.clip(lower=_FLOOR)
    ends = [(measured + sign * frame.measured_stderr).clip(lower=_FLOOR) for sign in (-1, 1)]
    bars = [measured - ends[0], ends[1] - measured]  # none below the floor
    axes.errorbar(frame.kept, measured, yerr=bars, marker="o", ms=4, label="measured along the path")
    axes.plot(frame.kept, frame.predicted.clip(lower=_FLOOR), "--", marker="x", ms=4, label="predicted before removing")
    for name, table in (points or {}).items():
        axes.errorbar(table.kept, table.risk.clip(lower=_FLOOR), yerr=table.stderr, marker="s", ms=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel=f"units kept (of {len(path.units):,})", ylabel="risk (nats)")
    ticks = [kept for i, kept in enumerate(frame.kept) if i % 3 == 0 or i == len(frame) - 1]
    axes.set_xticks(ticks, [str(kept) for kept in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_ylim(top=max(axes.get_ylim()[1], 1e3 * _FLOOR))  # also where all is on the floor
    axes.set_title(f"risk along the path (values below {_FLOOR:g} nats are drawn there)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


@checked
def frontier(
    table: pd.DataFrame,
    measure: str = "risk",
    *,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    ablation: str | None = None,
) -> Figure:
    """A measure against the number of units kept: a panel for each task and kind of ablation, a line for each method.

    Lines are means over seeds, bands go from the lowest seed to the highest (with one seed: bars, its own intervals).
    This package's methods (``ours``) are drawn bolder. Risk below 1e-6 nats is drawn there, and the axis of
    faithfulness ends at -0.5 and 1.5.

    Args:
        table: the benchmark's, one row for each task, method, seed, ablation and size.
        measure: ``risk``, ``accuracy`` or ``faithfulness``.
        tasks, methods: only these; all where not given.
        ablation: only this kind; where not given every kind has its own panel, as they are not comparable.

    Raises:
        ValueError: an unknown measure, task, method or ablation, a table without the columns, or without rows.

    Example:
        >>> tls.plot.frontier(table, "accuracy")
        <Figure size ...>
    """
    if measure not in _MEASURES:
        raise ValueError(f"measure is {measure!r}; it is {', '.join(list(_MEASURES)[:-1])} or {list(_MEASURES)[-1]}")
    needed = ("task", "method", "ours", "seed", "ablation", "size", "kept")
    needed = (*needed, measure, f"{measure}_low", f"{measure}_high")
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(f"table has no column {', '.join(missing)}: give the benchmark's table")
    rows = cast(Any, table)  # pandas names every type that a cell may have
    for column, wanted in (("task", tasks), ("method", methods), ("ablation", [ablation] if ablation else None)):
        known = list(dict.fromkeys(rows[column]))
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise ValueError(f"{column} {', '.join(unknown)} is not in the table, which has {', '.join(known)}")
        rows = rows if wanted is None else rows[rows[column].isin(list(wanted))]
    if rows.empty:
        raise ValueError("table has no rows: there is nothing to draw")
    rows = rows.assign(line=_names(rows))
    styles = _styles(dict(zip(rows.line, rows.ours, strict=True)))
    panels = list(dict.fromkeys(zip(rows.task, rows.ablation, strict=True)))
    kinds = rows.ablation.nunique()
    across = kinds if 1 < kinds <= 4 else 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    columns = max(1, int((4.1 * across + 1.5) / (0.55 + 0.075 * max(map(len, styles)))))
    size = (4.1 * across + 1.5 * (across == 1), 3.3 * down + 0.7 + 0.2 * -(-len(styles) // columns))
    figure = Figure(figsize=size, layout="constrained")
    drawn = figure.subplots(down, across, squeeze=False).flat
    for axes, (task, kind) in zip(drawn, panels, strict=False):
        part = rows[(rows.task == task) & (rows.ablation == kind)]
        for name, style in styles.items():
            _curve(axes, part[part.line == name], measure, style)
        _panel(axes, part, measure)
        axes.set_title(f"{task} ({said_of(kind)})", fontsize=10)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    shown = [name for name in styles if name in handles]
    legend = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend([handles[name] for name in shown], shown, **legend)
    figure.suptitle(_heading(rows, measure), fontsize=10)
    return figure


@checked
def against(one: Scores, other: Scores, *, labels: int = 8) -> Figure:
    """One method's scores against another's, by rank (1: needed most) and by value, kinds of units by colour.

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
        for kind, part in frame.groupby("kind", sort=False):
            size = 26 if len(part) <= 200 else 9
            colour = _KINDS.get(str(kind), "#777777")
            axes.scatter(part[x], part[y], s=size, color=colour, alpha=0.75, linewidth=0, label=f"{kind}s")
        axes.grid(alpha=0.3)
    left.set(xlabel=f"rank by {one.name}", ylabel=f"rank by {other.name}", title="ranks (1: needed most)")
    left.invert_xaxis()
    left.invert_yaxis()
    left.axline((1, 1), (2, 2), color="0.6", linewidth=0.8, zorder=0)
    right.set(xlabel=f"{one.name} ({one.measured_in})", ylabel=f"{other.name} ({other.measured_in})", title="scores")
    _named(left, named, "rank_x", "rank_y")
    _named(right, named, "x", "y")
    right.legend(fontsize=8, loc="upper left")
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


def _names(rows: Any) -> pd.Series:
    """What a line is called: the method, with its setting where one was run with several at the same point."""
    point = ["task", "method", "seed", "ablation", "size"]
    if "setting" not in rows or not rows.duplicated(point).any():
        return rows.method
    twice = rows.method.isin(rows.method[rows.duplicated(point)])
    return rows.method.where(~twice, rows.method + ", " + rows.setting.astype(str))


def _styles(lines: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """A line style for each method, this package's (those that are true) first."""
    ours, others = ([name for name, mine in lines.items() if mine == side] for side in (True, False))
    styles: dict[str, dict[str, Any]] = {}
    for part, colours, width, layer in ((ours, _BOLD, 2.4, 3), (others, _THIN, 1.1, 2)):
        for i, name in enumerate(part):
            dash = ("-", "--", ":", "-.")[i // len(colours) % 4]
            marker = _MARKERS[i % len(_MARKERS)]
            shape = {"linestyle": dash, "marker": marker, "markersize": 5.5 if layer == 3 else 4}
            styles[name] = {"color": colours[i % len(colours)], "linewidth": width, "zorder": layer} | shape
    return {name: style | {"label": name} for name, style in styles.items()}


def _curve(axes: Axes, part: Any, measure: str, style: dict[str, Any]) -> None:
    """One method's line in one panel, with its band."""
    part = part[part[measure].notna()]
    if part.empty:
        return
    groups = part.groupby("size")
    columns = {"kept": groups.kept.mean(), "mean": groups[measure].mean()}
    frame = cast(Any, pd.DataFrame(columns | {"low": groups[measure].min(), "high": groups[measure].max()}))
    alone = part.seed.nunique() == 1
    if alone:
        frame["low"], frame["high"] = groups[f"{measure}_low"].mean(), groups[f"{measure}_high"].mean()
    frame = frame.groupby("kept", as_index=False).mean()  # several small sizes may keep the same number
    if measure == "risk":
        frame[["mean", "low", "high"]] = frame[["mean", "low", "high"]].clip(lower=_FLOOR)
    axes.plot(frame.kept, frame["mean"], **style)
    bold = style["zorder"] == 3
    if alone:
        axes.vlines(frame.kept, frame.low, frame.high, color=style["color"], alpha=0.5, linewidth=2.4 if bold else 1)
        return
    band = {"color": style["color"], "alpha": 0.22 if bold else 0.08, "linewidth": 0, "zorder": style["zorder"] - 1}
    axes.fill_between(frame.kept, frame.low, frame.high, **band)


def _panel(axes: Axes, part: Any, measure: str) -> None:
    """Axes of one panel, from large circuits to small."""
    axes.set(xscale="log", xlabel="units kept", ylabel=_MEASURES[measure])
    if measure == "risk":
        axes.set_yscale("log")
    if measure == "faithfulness":
        means = part.groupby(["line", "size"])[measure].mean()
        axes.set_ylim(max(means.min() - 0.05, _SEEN[0]), min(max(means.max(), 1) + 0.05, _SEEN[1]))
        axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    sizes = sorted(part.groupby("size").kept.mean().round().astype(int).unique(), reverse=True)
    room = np.log(sizes[0] / sizes[-1]) * (0.075 * len(f"{sizes[0]:,}") + 0.08) / 3.2  # of the inches that there are
    ticks: list[int] = []
    for size in sizes:
        if not ticks or np.log(ticks[-1] / size) >= room:
            ticks.append(int(size))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.grid(alpha=0.3)


def _heading(rows: Any, measure: str) -> str:
    seeds = rows.groupby(["task", "line"]).seed.nunique()
    few, many = int(seeds.min()), int(seeds.max())
    number = f"{many}" if few == many else f"{few} to {many}"
    what = "one seed, bars: its intervals" if many == 1 else f"mean over {number} seeds, band: lowest to highest"
    end = {
        "risk": f"; below {_FLOOR:g} nats drawn there",
        "faithfulness": f"; axis from {_SEEN[0]} to {_SEEN[1]} at most",
    }
    return f"{measure} against units kept\n({what}{end.get(measure, '')})"


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
