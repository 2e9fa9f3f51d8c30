"""A circuit of edges as a graph: parts of the model up the page as data flows, an arrow for each kept edge.

:mod:`tl_sparsify.presentation.plot` has it among the others.
"""

from __future__ import annotations

import re

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site

_MOST = 200  # arrows that can be told apart
_FEW = 60  # parts of a model that is drawn whole
_COLOURS = {"q": "#0072b2", "k": "#d55e00", "v": "#009e73", "": "0.45"}
_NAMES = {"q": "into a query", "k": "into a key", "v": "into a value", "": "into an MLP, the logits or a whole head"}
_BEND = {"q": -0.12, "k": 0.0, "v": 0.12, "": -0.1}


@checked
def edge_graph(of: Reduction | Circuit) -> Figure:
    """The kept edges as arrows from writer to reader, the embedding at the bottom and the logits at the top; coloured
    by what they go into. Parts that no kept edge touches are faint; of a model of more than 60 parts they are left out,
    and rows stand closer. What a group of heads or a whole layer reads goes to each of its heads: of those from which a
    kept edge leads on, where there are such.

    Raises:
        ValueError: there is no edge among the units, or more than 200 are kept (:func:`edge_map` has room for them).

    Example:
        >>> found = tls.edges(model)
        >>> tls.plot.edge_graph(tls.Circuit.of(found, ["embed->L0H1.v", "L0H1->L1H2.k", "L1H2->logits"]))
        <Figure size ...>
    """
    circuit = of.circuit if isinstance(of, Reduction) else of
    sites = [
        (site, circuit.mask[part].view(len(site.readers), -1))
        for site, part in zip(circuit.units.sites, circuit.units.slices, strict=True)
        if site.kind == "edge"
    ]
    if not sites:
        raise ValueError(f"of is of {circuit.units!r}, without edges: tls.edges(model) gives some")
    many = sum(int(kept.sum()) for _, kept in sites)
    if many > _MOST:
        raise ValueError(f"of keeps {many:,} edges, more than can be told apart: draw {_MOST} or fewer, or edge_map")
    writers = max((site.writers for site, _ in sites), key=len)
    sending = {w for site, kept in sites for w, there in zip(site.writers, kept.any(0).tolist(), strict=True) if there}
    links = [link for site, kept in sites for link in _links(site, kept.tolist(), writers, sending)]
    beyond = dict.fromkeys(owner for _, owner, _ in links if owner not in (*writers, "logits"))
    used = {name for writer, owner, _ in links for name in (writer, owner)}
    shown = writers if len(writers) <= _FEW else tuple(name for name in writers if name in used)
    places = _places((*shown, *beyond))
    wide, high = max(x for x, _ in places.values()), max(y for _, y in places.values())
    tall = min(14.0, 1.4 + 1.05 * high) if len(writers) <= _FEW else min(24.0, 1.4 + 0.6 * high)
    figure = Figure(figsize=(min(14.0, 2.5 + 1.1 * wide), tall), layout="constrained")
    axes = figure.subplots()
    for writer, owner, part in links:
        _arrow(axes, places[writer], places[owner], part)
    for name, (x, y) in places.items():
        here = name in used
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "0.2" if here else "0.85"}
        axes.text(
            x, y, name, ha="center", va="center", fontsize=8, color="black" if here else "0.8", bbox=box, zorder=3
        )
    parts = [part for part in _COLOURS if any(link[2] == part for link in links)]
    handles = [Line2D([], [], color=_COLOURS[part], label=_NAMES[part]) for part in parts]
    if handles:
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=8)
    total = sum(site.size for site, _ in sites)
    axes.set(xlim=(-0.7, wide + 0.7), ylim=(-0.5, high + 0.5), title=f"{many:,} of {total:,} edges kept")
    axes.axis("off")
    return figure


def _places(writers: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Where each part stands: a row for each layer's heads, and its MLP above them at the right."""
    rows: dict[str, list[str]] = {}
    for name in (*writers, "logits"):
        rows.setdefault(re.sub(r"[HG]\d+$", "", name), []).append(name)
    wide = max(len(names) for names in rows.values())
    return {
        name: ((wide + 0.2 if "MLP" in row else (wide - len(names)) / 2 + number), float(height))
        for height, (row, names) in enumerate(rows.items())
        for number, name in enumerate(names)
    }


def _links(
    site: Site, kept: list[list[bool]], writers: tuple[str, ...], sending: set[str]
) -> list[tuple[str, str, str]]:
    """Writer, who reads, and through what, of each kept edge."""
    found: list[tuple[str, str, str]] = []
    for reader, there in zip(site.readers, kept, strict=True):
        name, _, part = reader.partition(".")
        shared = re.fullmatch(r"(L\d+)(?:G(\d+)|ATTN)", name)
        heads = [w for w in writers if shared is not None and re.fullmatch(rf"{shared[1]}H\d+", w)]
        if shared is not None and shared[2] is not None:
            each = len(heads) // len(site.readers)
            heads = heads[int(shared[2]) * each : (int(shared[2]) + 1) * each]
        owners = [head for head in heads if head in sending] or heads or [name]
        found += [(w, owner, part) for w, here in zip(site.writers, there, strict=True) if here for owner in owners]
    return found


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], part: str) -> None:
    """From one part's box to another's, bent by what it goes into, so that several stay apart."""
    style = f"arc3,rad={_BEND[part]}"
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "alpha": 0.75, "color": _COLOURS[part]}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=style, shrinkA=9, shrinkB=10, zorder=2, **look))
