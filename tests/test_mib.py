"""The benchmark's circuit JSON: every name, which edges are in the graph, and the same read back as was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import bridge, unchanged
from helpers.native import native, removed

import tl_sparsify as tls
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.units import Units, heads, mlps, neurons
from tl_sparsify.search.scores import Scores


@pytest.fixture
def small() -> Any:
    """Two layers of two heads."""
    return bridge()


EDGES = """input->a0.h0<q> input->a0.h0<k> input->a0.h0<v> input->a0.h1<q> input->a0.h1<k> input->a0.h1<v>
input->m0 a0.h0->m0 a0.h1->m0
input->a1.h0<q> input->a1.h0<k> input->a1.h0<v> input->a1.h1<q> input->a1.h1<k> input->a1.h1<v>
a0.h0->a1.h0<q> a0.h0->a1.h0<k> a0.h0->a1.h0<v> a0.h0->a1.h1<q> a0.h0->a1.h1<k> a0.h0->a1.h1<v>
a0.h1->a1.h0<q> a0.h1->a1.h0<k> a0.h1->a1.h0<v> a0.h1->a1.h1<q> a0.h1->a1.h1<k> a0.h1->a1.h1<v>
m0->a1.h0<q> m0->a1.h0<k> m0->a1.h0<v> m0->a1.h1<q> m0->a1.h1<k> m0->a1.h1<v>
input->m1 a0.h0->m1 a0.h1->m1 m0->m1 a1.h0->m1 a1.h1->m1
input->logits a0.h0->logits a0.h1->logits m0->logits a1.h0->logits a1.h1->logits m1->logits""".split()


def scored(units: Units, scores: list[float]) -> Scores:
    values = torch.tensor(scores, dtype=torch.float64)
    return Scores(units, values, torch.zeros_like(values), "test", "nats", 0, 0)


def named(names: tuple[str, ...], kept: torch.Tensor) -> set[str]:
    return {name for name, yes in zip(names, kept.tolist(), strict=True) if yes}


def test_gpt2_small_has_158_nodes_and_32491_edges():
    sizes = tls.mib.Sizes(layers=12, heads=12, d_model=768)
    assert len(sizes.nodes) == len(set(sizes.nodes)) == 158
    assert len(sizes.edges) == len(set(sizes.edges)) == 32_491
    assert sizes.nodes[:2] == ("input", "a0.h0") and sizes.nodes[-2:] == ("m11", "logits")
    assert {"input->a0.h0<q>", "a0.h11->m0", "m0->a1.h0<k>", "a11.h11->m11", "m11->logits"} <= set(sizes.edges)
    assert not {"m0->a0.h0<q>", "a0.h0->a0.h1<v>", "a1.h0->m0", "input->a0.h0", "logits->m0"} & set(sizes.edges)


def test_gpt2_smalls_names_are_those_of_the_rule_and_come_back_from_a_file(tmp_path: Path):
    """Every node reads what was written before it: heads in three ways, all of a layer's heads before its MLP."""
    blocks = [([f"a{layer}.h{head}" for head in range(12)], f"m{layer}") for layer in range(12)]
    before, edges = ["input"], set[str]()
    for heads_of, mlp in blocks:
        edges |= {f"{source}->{head}<{way}>" for source in before for head in heads_of for way in "qkv"}
        before += heads_of
        edges |= {f"{source}->{mlp}" for source in before}
        before += [mlp]
    edges |= {f"{source}->logits" for source in before}
    sizes = tls.mib.Sizes(layers=12, heads=12, d_model=768)
    assert sizes.nodes == (*before, "logits") and set(sizes.edges) == edges
    drawn = torch.Generator().manual_seed(0)
    scores, kept = torch.randn(len(edges), generator=drawn), torch.rand(len(edges), generator=drawn) < 0.05
    nodes = torch.randn(len(sizes.nodes), generator=drawn), torch.rand(len(sizes.nodes), generator=drawn) < 0.5
    graph = tls.mib.Graph(sizes, nodes[1], kept, nodes[0].double(), scores.double())
    graph.save(tmp_path / "gpt2.json")
    assert tls.mib.load(tmp_path / "gpt2.json") == graph


def test_an_unknown_edge_among_many_is_named(tmp_path: Path):
    sizes = tls.mib.Sizes(layers=10, heads=8, d_model=64)
    n = len(sizes.nodes), len(sizes.edges)
    graph = tls.mib.Graph(sizes, *(torch.ones(size).bool() for size in n), *(torch.zeros(size).double() for size in n))
    graph.save(tmp_path / "graph.json")
    content = json.loads((tmp_path / "graph.json").read_text())
    content["edges"]["m0->m99"] = content["edges"]["m0->m1"]
    (tmp_path / "graph.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has unknown 1 edges for its sizes \(first: m0->m99\)"):
        tls.mib.load(tmp_path / "graph.json")


def test_two_layers_of_two_heads_by_hand(small: Any):
    sizes = tls.mib.sizes(small)
    assert sizes == tls.mib.Sizes(2, 2, 8, parallel=False)
    assert sizes.nodes == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits")
    assert sizes.edges == tuple(EDGES) and len(EDGES) == 46


def test_beside_its_attention_an_mlp_does_not_read_its_heads():
    sizes = tls.mib.Sizes(2, 2, 8, parallel=True)
    gone = {"a0.h0->m0", "a0.h1->m0", "a1.h0->m1", "a1.h1->m1"}
    assert set(sizes.edges) == set(EDGES) - gone


def test_an_edge_is_in_the_graph_if_both_its_ends_are(small: Any):
    units = heads(small) + mlps(small)
    graph = tls.mib.graph(small, Circuit.of(units, ["L0H1", "L1MLP"]))
    assert named(graph.sizes.nodes, graph.kept_nodes) == {"input", "a0.h1", "m1", "logits"}
    expected = {f"input->a0.h1<{part}>" for part in "qkv"}
    expected |= {"input->m1", "a0.h1->m1", "input->logits", "a0.h1->logits", "m1->logits"}
    assert named(graph.sizes.edges, graph.kept_edges) == expected
    assert named(graph.sizes.edges, graph.edge_scores == 1) == expected
    assert bool(((graph.edge_scores == 0) | (graph.edge_scores == 1)).all())


def test_units_that_a_circuit_is_not_about_stay(small: Any):
    graph = tls.mib.graph(small, Circuit.empty(heads(small)))
    assert named(graph.sizes.nodes, graph.kept_nodes) == {"input", "m0", "m1", "logits"}
    assert named(graph.sizes.edges, graph.kept_edges) == {
        "input->m0", "input->m1", "m0->m1", "input->logits", "m0->logits", "m1->logits"
    }  # fmt: skip


def test_an_edge_has_the_lesser_score_of_its_ends(small: Any):
    units = heads(small) + mlps(small)  # a0.h0, a0.h1, a1.h0, a1.h1, m0, m1
    scores = scored(units, [5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    graph = tls.mib.graph(small, scores.top(0.5), scores)
    found = dict(zip(graph.sizes.edges, graph.edge_scores.tolist(), strict=True))
    assert found["a0.h0->a1.h0<q>"] == 4.0 and found["a0.h1->m1"] == 1.0 and found["m0->a1.h1<v>"] == 2.0
    assert found["input->a0.h0<k>"] == 5.0 and found["m1->logits"] == found["input->logits"] == 6.0
    assert named(graph.sizes.edges, graph.edge_scores >= 4) == named(graph.sizes.edges, graph.kept_edges)


def test_read_back_equal(tmp_path: Path):
    model = native()
    units = heads(model) + mlps(model)
    scores = scored(units, torch.randn(len(units), generator=torch.Generator().manual_seed(0)).tolist())
    circuit = scores.top(0.4)
    with unchanged(model):
        graph = tls.mib.graph(model, circuit, scores)
        graph.save(tmp_path / "circuit.json")
        back = tls.mib.load(tmp_path / "circuit.json")
        assert back == graph and back.circuit(model) == circuit
    assert back != tls.mib.graph(model, circuit)


def test_the_file_is_what_the_benchmark_reads(small: Any, tmp_path: Path):
    tls.mib.graph(small, Circuit.of(heads(small), ["L1H0"])).save(tmp_path / "circuit.json")
    found = json.loads((tmp_path / "circuit.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert found["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert set(found) == {"cfg", "nodes", "edges"} and set(found["edges"]) == set(EDGES)
    assert all(set(edge) == {"score", "in_graph"} for edge in found["edges"].values())
    assert found["nodes"]["a1.h0"] == {"in_graph": True, "score": 1.0}
    assert found["nodes"]["a0.h0"] == {"in_graph": False, "score": 0.0}
    assert found["nodes"]["m0"] == found["nodes"]["input"] == found["nodes"]["logits"] == {"in_graph": True}
    assert found["edges"]["a1.h0->m1"] == {"score": 1.0, "in_graph": True}


def changed(path: Path, change: Any) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["edges"].pop("m0->m1"), r"lacks 1 edges for its sizes \(first: m0->m1\)"),
        (lambda c: c["edges"].update({"m1->m0": {"score": 0, "in_graph": True}}), r"unknown 1 edges .*m1->m0"),
        (lambda c: c["nodes"].pop("m0"), r"lacks 1 nodes for its sizes \(first: m0\)"),
        (lambda c: c["nodes"]["m0"].update(neurons=[True] * 8), r"neurons within nodes \(first: m0\)"),
        (lambda c: c["edges"]["m0->m1"].pop("score"), r"not finite for 1 edges \(first: m0->m1\)"),
        (lambda c: c["edges"]["m0->m1"].update(in_graph="yes"), r"in_graph of m0->m1 is 'yes'"),
        (lambda c: c.pop("cfg"), "no circuit file of the benchmark"),
        (lambda c: c["cfg"].pop("n_heads"), "no circuit file of the benchmark"),
        (lambda c: c.update(nodes=[]), "nodes must be objects by name"),
    ],
)
def test_what_is_no_such_file_is_refused(small: Any, tmp_path: Path, change: Any, message: str):
    tls.mib.graph(small, Circuit.full(heads(small))).save(tmp_path / "circuit.json")
    with pytest.raises(ValueError, match=message):
        tls.mib.load(changed(tmp_path / "circuit.json", change))


def test_files_of_others_are_read(small: Any, tmp_path: Path):
    """An edge circuit whose configuration says more, and whose input is not in the graph."""
    tls.mib.graph(small, Circuit.full(heads(small))).save(tmp_path / "circuit.json")

    def change(content: Any) -> None:
        content["cfg"] |= {"model_name": "small", "act_fn": "gelu"}
        content["nodes"]["logits"] = {"in_graph": True}
        content["nodes"]["a0.h0"]["in_graph"] = False
        content["edges"]["m0->m1"] |= {"in_graph": False, "score": -0.25}

    graph = tls.mib.load(changed(tmp_path / "circuit.json", change))
    found = dict(
        zip(graph.sizes.edges, zip(graph.edge_scores.tolist(), graph.kept_edges.tolist(), strict=True), strict=True)
    )
    assert found["m0->m1"] == (-0.25, False) and found["input->m1"] == (1.0, True)
    assert graph.circuit(small).names == ("L0H1", "L1H0", "L1H1", "L0MLP", "L1MLP")


def test_no_file_and_no_json(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no circuit file"):
        tls.mib.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="no circuit file of the benchmark"):
        tls.mib.load(tmp_path / "bad.json")


def test_what_the_format_does_not_have_is_refused(small: Any):
    with pytest.raises(ValueError, match="kind neuron"):
        tls.mib.graph(small, Circuit.full(heads(small) + neurons(small)))
    with pytest.raises(ValueError, match="some positions only, L0H0@-1"):
        tls.mib.graph(small, Circuit.full(heads(small).at(-1)))
    with pytest.raises(ValueError, match="is it of this model"):
        tls.mib.graph(small, Circuit.full(heads(native())))
    with pytest.raises(ValueError, match=r"not finite \(first: a0.h1\)"):
        tls.mib.graph(small, Circuit.full(heads(small)), scored(heads(small), [1.0, float("nan"), 1.0, 1.0]))
    with pytest.raises(ValueError, match="it is a circuit of another model"):
        tls.mib.graph(small, Circuit.full(heads(small))).circuit(native())
    with pytest.raises(ValueError, match="mlp"):
        tls.mib.sizes(native("attention only"))


def test_a_folded_model_is_refused():
    model = native()
    units = heads(model)
    circuit = Circuit.full(units) - Circuit.of(units, ["L1H0"])
    folded = tls.fold(model, removed(units, 4).with_circuit(circuit))
    with pytest.raises(ValueError, match=r"\[4, 3, 4\] heads in its blocks.*before it was folded"):
        tls.mib.sizes(folded)
