"""The picture of a circuit of edges: a cell for each edge, at its reader and writer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import architectures
from helpers.native import native

import tl_sparsify as tls


def mesh(figure: Any) -> np.ndarray:
    [axes] = figure.axes
    return np.asarray(axes.collections[0].get_array().filled(np.nan)).reshape(axes.collections[0].get_array().shape)


def test_a_kept_edge_is_dark_where_its_reader_and_writer_cross():
    units = tls.edges(native())
    names = ["embed->L0H0.q", "L0H1->L2H3.v", "L2MLP->logits"]
    grid = mesh(tls.plot.edge_map(tls.Circuit.of(units, names)))
    readers = [name for site in units.sites for name in site.readers]
    writers = units.sites[-1].writers
    dark = {f"{writers[w]}->{readers[r]}" for r, w in zip(*np.where(grid == 1), strict=True)}
    assert dark == set(names) and int((~np.isnan(grid)).sum()) == len(units)


def test_the_units_map_of_edges_alone_is_theirs_and_scores_are_ranks():
    model = native()
    units = tls.edges(model)
    circuit = tls.Circuit.of(units, units.names[::5])
    assert np.array_equal(mesh(tls.plot.unit_map(circuit)), mesh(tls.plot.edge_map(circuit)), equal_nan=True)
    scores = tls.score.gradient(model, architectures.batch(), units)
    grid = mesh(tls.plot.edge_map(scores))
    assert len(np.unique(grid[~np.isnan(grid)])) == len(units)
    mixed = units + tls.heads(model)
    assert len(tls.plot.unit_map(tls.Circuit.full(mixed)).axes) == 1


def test_many_layers_are_named_by_the_layer_and_fit():
    units = tls.edges(architectures.fresh("GPT-2", n_layer=12, n_head=12, n_embd=24, n_inner=8))
    figure = tls.plot.edge_map(tls.Circuit.full(units))
    [axes] = figure.axes
    assert max(figure.get_size_inches()) <= 14
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embed", *(f"layer {n}" for n in range(12))]
    with pytest.raises(ValueError, match=r"without edges: tls\.edges\(model\) gives some"):
        tls.plot.edge_map(tls.Circuit.full(tls.heads(native())))
