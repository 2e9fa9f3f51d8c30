"""What is on a figure: its lines, its maps, its texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from helpers.written import (
    KEPT,
    UNITS,
)
from tl_sparsify import Circuit, Site, Units

CIRCUIT = Circuit.of(UNITS, KEPT)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def large_units(layers: int = 30, heads: int = 9, neurons: int = 1536) -> Units:
    """Heads and neurons of SmolLM2's shape, or of another."""
    sites = [Site("head", i, f"blocks.{i}.attn.hook_z", heads) for i in range(layers)]
    sites += [Site("neuron", i, f"blocks.{i}.mlp.hook_post", neurons) for i in range(layers)]
    return Units(tuple(sites))


def large(layers: int = 30, heads: int = 9, neurons: int = 1536, share: float = 0.1) -> Circuit:
    """A random circuit of that shape."""
    units = large_units(layers, heads, neurons)
    return Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < share)


def printed(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is really drawn, with its box."""
    found: dict[Text, Bbox] = {}
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found[text] = Text.get_window_extent(text, renderer)  # without the line of an annotation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        FigureCanvasAgg(figure).draw()
    return [(text.get_text(), box) for text, box in found.items()]


def clipped(figure: Figure) -> list[str]:
    """Texts that are drawn (in part) outside of the figure."""
    page = figure.bbox.padded(1.0)
    return [
        text
        for text, box in printed(figure)
        if not (page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)
    ]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that are drawn over each other."""
    boxes = [(text, box.padded(-1.5)) for text, box in printed(figure)]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[:i] if one.overlaps(two)]
