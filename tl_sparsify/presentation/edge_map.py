"""Edges as a picture: writers across, readers up, a cell for each edge.

:mod:`tl_sparsify.presentation.plot` has it among the others. Both axes run as data flows, so that every edge lies right
of what it could not read.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.search.scores import Scores

_NAMED = 60  # readers or writers that get a name each


@checked
def edge_map(of: Scores | Reduction | Circuit) -> Figure:
    """Readers by writers, a cell for each edge: dark where it is kept, or shaded by the rank of its score.

    Raises:
        ValueError: there is no edge among the units.

    Example:
        >>> tls.plot.edge_map(tls.Circuit.full(tls.edges(model)))
        <Figure size ...>
    """
    units = of.units
    edges = [(site, part) for site, part in zip(units.sites, units.slices, strict=True) if site.kind == "edge"]
    if not edges:
        raise ValueError(f"of is of {units!r}, without edges: tls.edges(model) gives some")
    if isinstance(of, Scores):
        shade = np.empty(len(units))
        shade[of.order.cpu().numpy()] = np.linspace(0.02, 1, len(units))
        title = f"{sum(site.size for site, _ in edges):,} edges by rank of {of.name}"
    else:
        mask = (of.circuit if isinstance(of, Reduction) else of).mask
        shade = np.where(mask.numpy(), 1.0, 0.08)
        kept = sum(int(mask[part].sum()) for _, part in edges)
        title = f"{kept:,} of {sum(site.size for site, _ in edges):,} edges kept"
    writers = max((site.writers for site, _ in edges), key=len)
    readers = [name for site, _ in edges for name in site.readers]
    grid, row = np.full((len(readers), len(writers)), np.nan), 0
    for site, part in edges:
        many = len(site.readers)
        grid[row : row + many, : site.rows] = shade[part].reshape(many, site.rows)
        row += many
    wide, high = (min(14.0, max(4.0, 1.6 + 0.17 * count)) for count in (len(writers), len(readers)))
    figure = Figure(figsize=(wide, high), layout="constrained")
    axes = figure.subplots()
    lines = 0.4 if len(readers) <= _NAMED else 0
    axes.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=lines)
    named = [number for number, name in enumerate(writers) if len(writers) <= _NAMED or _begins(writers, number)]
    axes.set_xticks([n + 0.5 for n in named], [_label(writers, n) for n in named], rotation=90, fontsize=7)
    named = [number for number, name in enumerate(readers) if len(readers) <= _NAMED or _begins(readers, number)]
    axes.set_yticks([n + 0.5 for n in named], [_label(readers, n) for n in named], fontsize=7)
    axes.set(xlabel="writer", ylabel="reader", title=title)
    return figure


def _layer(name: str) -> str:
    return name[1:].split("H")[0].split("G")[0].split("M")[0].split("A")[0] if name.startswith("L") else name


def _begins(names: tuple[str, ...] | list[str], number: int) -> bool:
    """Whether a name is the first of its layer."""
    return number == 0 or _layer(names[number]) != _layer(names[number - 1])


def _label(names: tuple[str, ...] | list[str], number: int) -> str:
    """The name, or its layer where only the first of each is named."""
    name = names[number]
    return name if len(names) <= _NAMED or not name.startswith("L") else f"layer {_layer(name)}"
