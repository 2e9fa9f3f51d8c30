"""Diagrams: matplotlib pictures of a model's units, layer by layer, and of a causal model's variables.

:mod:`tl_sparsify.presentation.plot` has all of them. Layers are drawn as data flows, the first one below.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from tl_sparsify._internal.arguments import checked
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units
from tl_sparsify.presentation.edge_map import edge_map
from tl_sparsify.search.scores import Scores

KEPT, FAINT, LINE = "#08306b", "#f3f5f8", "#b4bdc7"
_WIDE = 1e3  # scores that span more than this are shaded by their logarithm
_POWERS = 1e-6  # of the largest score: what a logarithmic shade shows for less
_STRIPES, _PARTS = 512, 64  # units a layer that get a cell each; parts of a layer where there are more
_PAGE, _LOWEST = 9.5, 0.2  # inches: of all rows of a circuit together, where they can, and of one
_HATCH = {"constant": "", "refitted constant": "/////", "affine in kept units": "....."}


@checked
def unit_map(reduction: Reduction | Circuit, scores: Scores | None = None) -> Figure:
    """The kept heads and neurons of every layer: a cell for each unit, dark where it is kept. Where a layer has units
    of a kind at several positions or hook points, each of these has a row.

    With ``scores``, removed units are shaded by their rank in them. Of a kind with more than 512 units a layer a cell
    is the share that is kept of one of 64 equal parts of the layer, dark where that share is largest. Edges have a map
    of their own, which is drawn where there is nothing else (:func:`edge_map`).

    Raises:
        ValueError: scores of other units.

    Example:
        >>> tls.plot.unit_map(reduction, scores)
        <Figure size ...>
    """
    circuit = _circuit(reduction)
    units = circuit.units
    rank = np.zeros(len(units))
    if scores is not None and scores.units != units:
        raise ValueError(f"scores are of {scores.units!r}, the circuit of {units!r}: give scores of its units")
    if scores is not None:
        rank[scores.order.cpu().numpy()] = np.linspace(0, 0.45, len(units))
    shade = np.where(circuit.mask.numpy(), 1.0, rank)
    kinds = [kind for kind in dict.fromkeys(site.kind for site in units.sites) if kind != "edge"]
    if not kinds:
        return edge_map(circuit)
    widths = [max(site.size for site in units.sites if site.kind == kind) for kind in kinds]
    cells = [_PARTS if width > _STRIPES else width for width in widths]
    ratios = [max(parts, max(cells) / 4) for parts in cells]
    places = _places(units)
    rows = sorted(set(places))
    figure = Figure(figsize=(9, 1.5 + _tall(len(rows))), layout="constrained")
    for axes, kind, width, parts in zip(
        figure.subplots(1, len(kinds), width_ratios=ratios, squeeze=False)[0], kinds, widths, cells, strict=True
    ):
        grid = np.full((len(rows), parts), np.nan)
        own = [(site, part) for site, part in zip(units.sites, units.slices, strict=True) if site.kind == kind]
        layers = {site.layer for site, _ in own}  # the rows of other kinds in one of these stay unnamed
        labels = ["" if layer in layers else f"layer {layer}: 0" for layer, _ in rows]
        for site, part, place in zip(units.sites, units.slices, places, strict=True):
            if site.kind != kind:
                continue
            row = grid[rows.index(place)]
            if parts == width:
                row[: site.size] = shade[part]
            else:
                row[:] = _shares(circuit.mask[part].numpy(), width, parts)
            labels[rows.index(place)] = f"layer {site.layer}{site.suffix}: {int(circuit.mask[part].sum()):,}"
        most = 1.0 if parts == width else max(float(np.nanmax(grid)), 1e-9)
        across, up = np.linspace(0, width, parts + 1), np.arange(len(rows) + 1)
        lines = 0.6 if parts < 100 else 0
        axes.pcolormesh(across, up, grid, cmap="Blues", vmin=0, vmax=most, edgecolors="white", linewidth=lines)
        axes.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=_small(len(rows)))
        mask = torch.cat([circuit.mask[part] for _, part in own])
        axes.set_title(f"{Units(tuple(site for site, _ in own)).describe(mask)} kept")
        said = f", in {parts} parts; strongest: {most:.0%} of a part kept" if parts != width else ""
        axes.set_xlabel(f"{kind} index{said}" if width > 1 else "")
        if width == 1:
            axes.set_xticks([])
        elif width <= 16:
            _index_ticks(axes, width)
    return figure


def _places(units: Units) -> list[tuple[int, int]]:
    """Of each site its layer, and how many of its kind come before it there; edges have no rows of their own."""
    seen: Counter[tuple[str, int]] = Counter()
    found: list[tuple[int, int]] = []
    for site in units.sites:
        found.append((site.layer, seen[site.kind, site.layer]))
        seen[site.kind, site.layer] += site.kind != "edge"
    return found


def _tall(layers: int, row: float = 0.42) -> float:
    """Inches for so many layers: at most nine of them."""
    return min(row * layers, 9.0)


def _small(layers: int) -> int:
    """The size of text beside so many layers."""
    return 9 if layers <= 24 else 7 if layers <= 60 else 5


def _shares(kept: Bool[np.ndarray, "size"], width: int, parts: int) -> Float[np.ndarray, "parts"]:
    """The share kept in each of equal parts of ``width``; NaN past the layer's own size."""
    edges = np.linspace(0, width, parts + 1).round().astype(int)
    cuts = [kept[start:stop] for start, stop in pairwise(edges.tolist())]
    return np.array([cut.mean() if len(cut) else np.nan for cut in cuts])


@checked
def head_map(of: Scores | Reduction | Circuit) -> Figure:
    """Layers by heads, a cell for each head: its score, or dark where it is kept.

    Scores that span more than three powers of ten are shaded by their logarithm, down to a millionth of the largest;
    signed ones have a colour for each sign.

    Raises:
        ValueError: there is no head among the units.

    Example:
        >>> tls.plot.head_map(scores)
        <Figure size ...>
    """
    rows = _rows(of.units, "head")
    flat = of.scores.cpu().double().numpy() if isinstance(of, Scores) else _circuit(of).mask.double().numpy()
    grid = np.full((len(rows), max(site.size for site, _ in rows)), np.nan)
    for number, (site, part) in enumerate(rows):
        grid[number, : site.size] = flat[part]
    width = min(9.0, 2.6 + 0.42 * grid.shape[1])
    figure = Figure(figsize=(width, 1.3 + _tall(len(rows))), layout="constrained")
    axes = figure.add_subplot()
    norm, colours, note = _shades(grid) if isinstance(of, Scores) else (Normalize(0, 1), "Blues", "")
    shown = np.clip(grid, norm.vmin, norm.vmax)  # keeps NaN, where a layer has no such head
    mesh = axes.pcolormesh(shown, cmap=colours, norm=norm, edgecolors=LINE, linewidth=0.5)
    axes.set_facecolor("0.8")
    unknown = any(np.isnan(flat[part]).any() for _, part in rows)
    grey = {"no such head": any(site.size < grid.shape[1] for site, _ in rows), "no number": unknown}
    note += f"; grey: {' or '.join(why for why, there in grey.items() if there)}" if any(grey.values()) else ""
    if isinstance(of, Scores):
        axes.set_title(f"{of.name} by head{note}", fontsize=10)
        figure.colorbar(mesh, ax=axes, label=of.measured_in)
    else:
        axes.set_title(f"{int(np.nansum(grid))} of {np.isfinite(grid).sum()} heads kept: dark{note}", fontsize=10)
    _layer_ticks(axes, rows)
    _index_ticks(axes, grid.shape[1])
    axes.set_xlabel("head index")
    return figure


@checked
def neuron_density(reduction: Reduction | Circuit, bins: int = 32) -> Figure:
    """Where the kept neurons are: their share by layer, and in equal parts of each layer's index.

    Raises:
        ValueError: there is no neuron among the units, or fewer than one part.

    Example:
        >>> tls.plot.neuron_density(tls.score.variance(model, train, tls.neurons(model)).top(0.1))
        <Figure size ...>
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; at least one is needed")
    circuit = _circuit(reduction)
    rows = _rows(circuit.units, "neuron")
    mask = circuit.mask.numpy()
    widest = max(site.size for site, _ in rows)
    bins = min(bins, min(site.size for site, _ in rows))
    share = np.array([mask[part].mean() for _, part in rows])
    grid = np.stack([[cut.mean() for cut in np.array_split(mask[part].astype(float), bins)] for _, part in rows])
    figure = Figure(figsize=(9, 1.5 + _tall(len(rows), 0.36)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    middle = np.arange(len(rows)) + 0.5
    left.barh(middle, 100 * share, height=0.7, color=KEPT)
    for y, (_, part), percent in zip(middle, rows, 100 * share, strict=True):
        text = f" {mask[part].sum():,} of {mask[part].size:,}"
        left.text(percent, y, text, va="center", fontsize=8 if len(rows) <= 24 else 6)
    left.set(xlim=(0, max(1e-9, 100 * share.max()) * 1.9), ylim=(0, len(rows)), xlabel="neurons kept (%)")
    left.set_title("kept neurons by layer", fontsize=10)
    end = widest if all(site.size == widest for site, _ in rows) else 1.0
    across = np.linspace(0, end, bins + 1)
    mesh = right.pcolormesh(across, np.arange(len(rows) + 1), 100 * grid, cmap="Blues", vmin=0, edgecolors="white")
    mesh.set_linewidth(0.4)
    figure.colorbar(mesh, ax=right, label="kept (%)")
    right.set_xlabel("neuron index" if end == widest else "neuron index, as a share of the layer's")
    right.set_title(f"and by index, in {bins} equal parts", fontsize=10)
    for axes in (left, right):
        _layer_ticks(axes, rows)
    return figure


@checked
def circuit(reduction: Reduction) -> Figure:
    """The circuit as a layered graph: the input below, a row for each layer with its attention heads and a box for its
    MLP (or for other units), the output on top, and the residual stream, which they read and write, between them.

    Kept units are dark, and what a removed one is replaced by is marked: a constant, a refitted constant, or (with an
    arrow from the kept ones) an affine map of kept units. Arrows in both directions: something is kept that reads and
    writes; in one: only constants are written. Edges between units are not drawn, because a reduction says nothing
    about them.

    Example:
        >>> tls.plot.circuit(reduction)
        <Figure size ...>
    """
    units, mask = reduction.units, reduction.circuit.mask.numpy()
    marks = _replacements(reduction)
    layers = sorted({site.layer for site in units.sites})
    sides = {True: [], False: []}  # heads to the left of the stream, all else to its right
    place: dict[int, float] = {}
    sites = [(i, site.layer, site.kind == "head") for i, site in enumerate(units.sites)]
    found = {layer: [[i for i, *at in sites if at == [layer, side]] for side in sides] for layer in layers}
    deep = {layer: max(map(len, both)) for layer, both in found.items()}
    step = max(_LOWEST, min(0.62, _PAGE / sum(deep.values())))
    high = min(0.3, 0.7 * step)
    top = 0.0
    for layer, both in found.items():
        place[layer] = top
        for side, chosen in zip(sides, both, strict=True):
            sides[side] += [(i, top + number * step) for number, i in enumerate(chosen)]
        top += deep[layer] * step
    widest = max((units.sites[i].size for i, _ in sides[True]), default=0)
    cell = min(0.42, 5.6 / max(widest, 1))
    stream = widest * cell + 0.55
    bar = stream + 0.55
    page = Figure(figsize=(bar + 4.6, top + 2.05))
    axes = page.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.85, bar + 3.75), ylim=(-1.3, top + 0.75))
    axes.axis("off")
    _arrow(axes, (stream, -0.42), (stream, top + 0.1), width=5.0, colour="#c9d3de", style="-|>")
    for text, y in (("input", -0.6), ("output", top + 0.28)):
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.3"}
        axes.text(stream, y, text, ha="center", va="center", fontsize=9, bbox=box)
    for layer, y in place.items():
        axes.text(-0.15, y, f"layer {layer}", ha="right", va="center", fontsize=8, color="0.25")
    for i, y in sides[True]:
        kept = mask[units.slices[i]]
        _cells(axes, kept, y, (cell, high), marks[i])
        start = (kept.size * cell + 0.03, y)
        _linked(axes, start, (stream - 0.04, y), bool(kept.any()))
    for i, y in sides[False]:
        up = y + 0.4 * step if widest else y  # an MLP reads what its layer's heads have written
        _bar(axes, units.sites[i], mask[units.slices[i]], (bar, up), high, marks[i])
        _linked(axes, (bar - 0.03, up), (stream + 0.04, up), bool(mask[units.slices[i]].any()))
    title = f"{len(reduction.circuit):,} of {len(units):,} units kept: {units.describe(reduction.circuit.mask)}"
    axes.text(-0.8, top + 0.62, title, va="center", fontsize=10)
    present = dict.fromkeys(mark for i, mark in enumerate(marks) if not mask[units.slices[i]].all())
    handles = [Patch(facecolor=KEPT, edgecolor=KEPT, label="kept")]
    faint = {"facecolor": FAINT, "edgecolor": LINE, "linewidth": 0.8}
    handles += [Patch(hatch=_HATCH[mark], label=f"removed: {mark}", **faint) for mark in present]
    axes.legend(handles=handles, loc="lower left", ncols=2, fontsize=8, frameon=False, bbox_to_anchor=(0.0, 0.0))
    return page


@checked
def causal_graph(model: CausalModel) -> Figure:
    """A causal model's graph: inputs below, each variable above its parents, the output with a bold frame.

    Example:
        >>> tls.plot.causal_graph(task.causal_model)
        <Figure size ...>
    """
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


def _circuit(of: Reduction | Circuit) -> Circuit:
    return of.circuit if isinstance(of, Reduction) else of


def _rows(units: Units, kind: str) -> list[tuple[Site, slice]]:
    """The sites of one kind, by layer, each with its range in the flat index."""
    rows = [(site, part) for site, part in zip(units.sites, units.slices, strict=True) if site.kind == kind]
    if not rows:
        raise ValueError(f"{units!r} holds no {kind}: there is nothing to draw; give units with {kind}s")
    return sorted(rows, key=lambda row: row[0].layer)


def _layer_ticks(axes: Axes, rows: list[tuple[Site, slice]]) -> None:
    labels = [f"layer {site.layer}{site.suffix}" for site, _ in rows]
    axes.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=_small(len(rows)))


def _index_ticks(axes: Axes, width: int) -> None:
    every = 1 if width <= 16 else 4
    axes.set_xticks(np.arange(0, width, every) + 0.5, [str(i) for i in range(0, width, every)])


def _shades(grid: Float[np.ndarray, "layers heads"]) -> tuple[Normalize, str, str]:
    """How scores are coloured, and what the title has to say of it."""
    values = grid[np.isfinite(grid)]
    largest = float(np.abs(values).max(initial=0)) or 1.0
    if (values < 0).any():
        return Normalize(-largest, largest), "PuOr", ""
    positive = values[values > 0]
    if positive.size and largest / positive.min() > _WIDE:
        floor = max(float(positive.min()), largest * _POWERS)
        return LogNorm(floor, largest), "Blues", f"; less than {floor:.0e} as that" if values.min() < floor else ""
    return Normalize(0, largest), "Blues", ""


def _replacements(reduction: Reduction) -> list[str]:
    """For each site what its removed units are replaced by."""
    constant = "refitted constant" if reduction.refitted else "constant"
    mixing = reduction.mixing or (None,) * len(reduction.units.sites)
    return [constant if part is None else "affine in kept units" for part in mixing]


def _cells(axes: Axes, kept: Bool[np.ndarray, "heads"], y: float, size: tuple[float, float], mark: str) -> None:
    """A row of heads, each of that width and height, with their numbers where there is room."""
    cell, high = size
    for index, here in enumerate(kept):
        fill, edge, hatch = (KEPT, KEPT, "") if here else (FAINT, LINE, _HATCH[mark])
        corner = (index * cell + 0.02, y - high / 2)
        shape = Rectangle(corner, cell - 0.04, high, hatch=hatch, linewidth=0.8, facecolor=fill, edgecolor=edge)
        axes.add_patch(shape)
        if cell >= 0.24 and here:
            axes.text((index + 0.5) * cell, y, str(index), ha="center", va="center", fontsize=8, color="white")


def _bar(
    axes: Axes, site: Site, kept: Bool[np.ndarray, "units"], at: tuple[float, float], high: float, mark: str
) -> None:
    """A box for a site's units: the kept share dark, the rest marked by what replaces it, and the number kept."""
    (x, y), width, high = at, 1.9, 0.8 * high
    share = 0.0 if not kept.any() else max(0.015, float(kept.mean()))
    corner, hatch = (x, y - high / 2), _HATCH[mark] if share < 1 else ""
    axes.add_patch(Rectangle(corner, width, high, hatch=hatch, linewidth=0.8, facecolor=FAINT, edgecolor=LINE))
    if share:
        axes.add_patch(Rectangle(corner, width * share, high, linewidth=0.8, facecolor=KEPT, edgecolor=KEPT))
    if mark == "affine in kept units" and 0 < share < 1:
        ends = [(x + width * share / 2, y), (x + width * (share + min(1, share + 0.35)) / 2 + 0.1, y)]
        ends = [(across, up + high / 2) for across, up in ends]
        bent = {"connectionstyle": "arc3,rad=-0.3", "color": "0.25", "linewidth": 0.9, "mutation_scale": 7}
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", shrinkA=0, shrinkB=0, **bent))
    names = {"mlp": "MLP", "attention": "attention", "residual": "residual stream"}
    if kept.size == 1 and site.kind in names:
        text = f"{names[site.kind]}{site.suffix} {'kept' if kept.all() else 'removed'}"
    else:
        text = f"{kept.sum():,} of {kept.size:,} {site.kind}s{site.suffix}"
    axes.text(x + width + 0.08, y, text, va="center", fontsize=8, color="0.25" if kept.any() else "0.5")


def _linked(axes: Axes, start: tuple[float, float], end: tuple[float, float], alive: bool) -> None:
    """Between units and the stream: in both directions where one is kept, else the constants that are written."""
    if alive:
        _arrow(axes, start, end, width=1.1, colour="0.3", style="<|-|>")
    else:
        _arrow(axes, start, end, width=0.7, colour=LINE, style="-|>")


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], width: float, colour: str, style: str
) -> None:
    size = 6 if width < 2 else 16
    shape = {"arrowstyle": style, "mutation_scale": size, "linewidth": width, "color": colour}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, zorder=0.5, **shape))
