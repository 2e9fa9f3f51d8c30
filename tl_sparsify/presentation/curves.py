"""Curves: matplotlib figures of a measure against the number of units kept, along a path and for many methods.

:mod:`tl_sparsify.presentation.plot` has both. Nine lines can be told apart in one panel; where there are more each
panel becomes small multiples beside each other, on the same axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_sparsify._internal.arguments import checked
from tl_sparsify.presentation.sentences import kind as said_of
from tl_sparsify.search.path import CircuitPath

_FLOOR = 1e-6  # nats; what a logarithmic axis shows for less
_MEASURES = {
    "risk": "risk (nats)",
    "accuracy": "accuracy (share right)",
    "faithfulness": "faithfulness (share of the metric)",
}
_SEEN = (-0.5, 1.5)  # of faithfulness, which has no bounds
_BOLD = ("#d55e00", "#0072b2", "#009e73", "#000000")  # Okabe and Ito's colours; then Tol's
_THIN = ("#56b4e9", "#e69f00", "#cc79a7", "#882255", "#999933", "#44aa99", "#777777")
_MARKERS = "os^vDPX*<>hp"
_MOST = 9  # lines in one panel
_LONGEST = 44  # characters of a title over one panel


@checked
def risk_curve(path: CircuitPath, points: Mapping[str, pd.DataFrame] | None = None) -> Figure:
    """Risk against units kept along a path, predicted and measured, on logarithmic axes.

    ``points`` adds named tables with columns ``kept``, ``risk`` and ``stderr`` (other constants, other methods); with
    more than seven there are small multiples, the path in each.

    Example:
        >>> tls.plot.risk_curve(path)
        <Figure size ...>
    """
    frame = path.to_frame()
    measured = frame.measured.clip(lower=_FLOOR)
    ends = [(measured + sign * frame.measured_stderr).clip(lower=_FLOOR) for sign in (-1, 1)]
    bars = [measured - ends[0], ends[1] - measured]  # none below the floor
    points = points or {}
    known = bool(frame.predicted.notna().any())  # a search need not predict
    own = ["measured along the path", *["predicted before removing"][:known]]
    groups = _groups(own, list(points))
    single = len(groups) == 1
    below = 0.18 * max(map(len, groups)) * (len(points) > 2)
    size = (6.4, 4.2 + below) if single else (0.6 + 4.2 * len(groups), 4.0 + below)
    figure = Figure(figsize=size, layout="constrained")
    styles = _styles(dict.fromkeys(points, False))
    for axes, group in zip(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0], groups, strict=True):
        axes.errorbar(frame.kept, measured, yerr=bars, marker="o", ms=4, label=group[0])
        if known:
            axes.plot(frame.kept, frame.predicted.clip(lower=_FLOOR), "--", marker="x", ms=4, label=group[1])
        for name in group[len(own) :]:
            table = points[name]
            axes.errorbar(table.kept, table.risk.clip(lower=_FLOOR), yerr=table.stderr, **styles[name])
        axes.set(xscale="log", yscale="log", xlabel=f"units kept (of {len(path.units):,})")
        _sizes_below(axes, frame.kept.tolist(), inches=5.4 if single else 3.7)
        if below:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8, frameon=False)
        else:
            axes.legend()
    first = figure.axes[0]
    first.set(ylabel="risk (nats)")
    first.set_ylim(top=max(first.get_ylim()[1], 1e3 * _FLOOR))  # also where all is on the floor
    title = f"risk along the path (values below {_FLOOR:g} nats are drawn there)"
    (first.set_title if single else figure.suptitle)(title, fontsize=10)
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
    This package's methods (``ours``) are drawn bolder. With more than nine methods a row of small multiples stands for
    each panel: this package's methods in every one of them, and a few of the others in each, on the same axes. Risk
    below 1e-6 nats is drawn there, and the axis of faithfulness ends at -0.5 and 1.5.

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
    rows = rows.assign(line=_names(rows).str.replace("$", r"\$", regex=False))  # a name is no formula
    found = rows[rows[measure].notna()]
    lines = dict(zip(found.line, found.ours, strict=True))
    ours, others = ([name for name, mine in lines.items() if mine == side] for side in (True, False))
    groups = _groups(ours, others)
    draw = _multiples if len(groups) > 1 else _overlaid
    figure = draw(rows, measure, _styles(lines), groups)
    figure.suptitle(_heading(rows, measure), fontsize=10)
    return figure


def _overlaid(rows: Any, measure: str, styles: dict[str, dict[str, Any]], groups: list[list[str]]) -> Figure:
    """A panel for each task and kind of ablation, all lines in each."""
    panels = list(dict.fromkeys(zip(rows.task, rows.ablation, strict=True)))
    kinds = rows.ablation.nunique()
    across = kinds if 1 < kinds <= 4 else 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    columns = max(1, int((4.1 * across + 1.5) / (0.55 + 0.075 * max(map(len, styles), default=0))))
    size = (4.1 * across + 1.5 * (across == 1), 3.3 * down + 0.7 + 0.2 * -(-len(styles) // columns))
    figure = Figure(figsize=size, layout="constrained")
    drawn = figure.subplots(down, across, squeeze=False).flat
    for axes, (task, kind) in zip(drawn, panels, strict=False):
        part = rows[(rows.task == task) & (rows.ablation == kind)]
        for name in groups[0]:
            _curve(axes, part[part.line == name], measure, styles[name])
        _panel(axes, part, measure, inches=3.2)
        axes.set(xlabel="units kept", ylabel=_MEASURES[measure])
        title = f"{task} ({said_of(kind)})"
        axes.set_title(title if len(title) <= _LONGEST else title.replace(" (", "\n(", 1), fontsize=10)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    shown = [name for name in styles if name in handles]
    legend = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend([handles[name] for name in shown], shown, **legend)
    return figure


def _multiples(rows: Any, measure: str, styles: dict[str, dict[str, Any]], groups: list[list[str]]) -> Figure:
    """A row for each task and kind of ablation, a column for each group of lines, named above the column."""
    panels = list(dict.fromkeys(zip(rows.task, rows.ablation, strict=True)))
    size = (0.5 + 3.7 * len(groups), 0.8 + 2.5 * len(panels) + 0.18 * max(map(len, groups)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(panels), len(groups), sharey="row", squeeze=False)
    for row, (task, kind) in zip(grid, panels, strict=True):
        part = rows[(rows.task == task) & (rows.ablation == kind)]
        for axes, group in zip(row, groups, strict=True):
            for name in group:
                _curve(axes, part[part.line == name], measure, styles[name])
            _panel(axes, part, measure, inches=3.0)
        row[0].set_title(f"{task} ({said_of(kind)})", fontsize=10, loc="left")
        row[0].set_ylabel(_MEASURES[measure])
    for axes, group in zip(grid[0], groups, strict=True):
        handles = [axes.plot([], [], **styles[name])[0] for name in group]
        axes.legend(handles, group, loc="lower left", bbox_to_anchor=(0, 1.12), fontsize=8, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("units kept")
    return figure


def _groups(always: list[str], others: list[str]) -> list[list[str]]:
    """The lines of each small multiple: all in one where they are few, else ``always`` and some others in each."""
    if len(always) + len(others) <= _MOST:
        return [[*always, *others]]
    if len(always) > _MOST // 2:
        always, others = [], [*always, *others]
    number = -(-len(others) // (_MOST - len(always)))
    return [[*always, *(others[i] for i in part)] for part in np.array_split(np.arange(len(others)), number)]


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


def _panel(axes: Axes, part: Any, measure: str, inches: float) -> None:
    """Axes of one panel, from large circuits to small."""
    axes.set(xscale="log")
    if measure == "risk":
        axes.set_yscale("log")
    if measure == "faithfulness":
        means = part.groupby(["line", "size"])[measure].mean()
        axes.set_ylim(max(means.min() - 0.05, _SEEN[0]), min(max(means.max(), 1) + 0.05, _SEEN[1]))
        axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    _sizes_below(axes, part.groupby("size").kept.mean().tolist(), inches)


def _sizes_below(axes: Axes, kept: Sequence[int | float], inches: float) -> None:
    """The numbers kept along the axis, from large to small: the ends, and of the others those that have room."""
    sizes = sorted({round(size) for size in kept}, reverse=True)
    span = np.log(sizes[0] / max(sizes[-1], 1))
    room = span * (0.075 * len(f"{sizes[0]:,}") + 0.08) / inches
    ticks: list[int] = []
    for size in sizes:
        if not ticks or np.log(ticks[-1] / size) >= room:
            ticks.append(size)
    ticks[-1] = sizes[-1] if len(ticks) > 1 else ticks[0]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.xaxis.set_inverted(True)
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
