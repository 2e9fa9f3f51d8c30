"""The graph of a circuit of edges: an arrow for each kept edge, from its writer to who reads."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import architectures
from helpers.native import native
from matplotlib.patches import FancyArrowPatch

import tl_sparsify as tls


def arrows(figure: Any) -> set[tuple[str, str]]:
    """From and to, by the names that stand where arrows begin and end."""
    [axes] = figure.axes
    names = {text.get_position(): text.get_text() for text in axes.texts}
    found = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    ends: list[Any] = []
    for patch in found:
        start, end = patch._posA_posB  # type: ignore[attr-defined]
        ends.append((names[tuple(map(float, start))], names[tuple(map(float, end))]))
    assert len(ends) == len(set(ends))
    return set(ends)


def test_an_arrow_goes_from_each_writer_to_who_reads():
    units = tls.edges(native())
    names = ["embed->L0H0.q", "L0H1->L2H3.v", "L1MLP->L2H3.k", "L2MLP->logits"]
    figure: Any = tls.plot.edge_graph(tls.Circuit.of(units, names))
    assert arrows(figure) == {("embed", "L0H0"), ("L0H1", "L2H3"), ("L1MLP", "L2H3"), ("L2MLP", "logits")}
    [axes] = figure.axes
    assert {text.get_text() for text in axes.texts} == {*units.sites[-1].writers, "logits"}
    assert axes.get_title() == "4 of 262 edges kept"
    height = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert height["embed"] < height["L0H0"] < height["L0MLP"] < height["L1H3"] < height["logits"]
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {
        *("into a query", "into a key", "into a value", "into an MLP, the logits or a whole head"),
    }


def test_what_several_heads_read_goes_to_each_of_them():
    model = architectures.bridge("Llama")  # six heads, two to a group
    group = tls.Circuit.of(tls.edges(model), ["L0MLP->L1G2.v"])
    assert arrows(tls.plot.edge_graph(group)) == {("L0MLP", "L1H4"), ("L0MLP", "L1H5")}
    layer = tls.Circuit.of(tls.edges(model, "layer"), ["embed->L1ATTN"])
    assert arrows(tls.plot.edge_graph(layer)) == {("embed", f"L1H{head}") for head in range(6)}
    single = tls.Circuit.of(tls.edges(model, grouped=False), ["embed->L1H3.k"])
    assert arrows(tls.plot.edge_graph(single)) == {("embed", "L1H3")}


def test_of_a_large_model_only_what_kept_edges_touch_is_drawn():
    model = architectures.fresh("GPT-2", n_layer=5, n_head=12)
    names = ["embed->L1ATTN", "L1H3->L4MLP", "L1H7->logits", "L4MLP->logits"]
    figure: Any = tls.plot.edge_graph(tls.Circuit.of(tls.edges(model, "layer"), names))
    onward = {("embed", "L1H3"), ("embed", "L1H7")}  # the other ten heads of layer 1 hear it and are not heard
    assert arrows(figure) == onward | {("L1H3", "L4MLP"), ("L1H7", "logits"), ("L4MLP", "logits")}
    assert {text.get_text() for text in figure.axes[0].texts} == {"embed", "L1H3", "L1H7", "L4MLP", "logits"}


def test_no_edges_and_too_many_are_refused():
    units = tls.edges(native())
    assert arrows(tls.plot.edge_graph(~tls.Circuit.full(units))) == set()
    with pytest.raises(ValueError, match="of keeps 262 edges, more than can be told apart"):
        tls.plot.edge_graph(tls.Circuit.full(units))
    with pytest.raises(ValueError, match="without edges"):
        tls.plot.edge_graph(tls.Circuit.full(tls.heads(native())))


def test_readers_that_write_to_no_other_have_a_place():
    """Of edges into one layer's queries alone that layer's heads are no writers."""
    found = tls.edges(native())
    into = tls.Units(tuple(site for site in found.sites if site.readers[0] == "L1H0.q"))
    figure = tls.plot.edge_graph(tls.Circuit.of(into, ["embed->L1H0.q", "L0MLP->L1H2.q"]))
    assert arrows(figure) == {("embed", "L1H0"), ("L0MLP", "L1H2")}
    place = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert place["L0MLP"][1] < place["L1H0"][1] == place["L1H2"][1] < place["logits"][1]
