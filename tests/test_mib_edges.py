"""Circuits of edges as the benchmark's graphs: names, shares by edges, and what they answer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import architectures
from helpers.graphs import names, slowly_joined
from helpers.models import NoCasts, bridge, examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparsify as tls
from tl_sparsify.formats.mib_scores import PERCENTAGES


@pytest.fixture(scope="module")
def small() -> Any:
    return bridge()


def drawn(units: tls.Units, seed: int, kept: float = 0.5) -> tls.Circuit:
    return tls.Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < kept)


def scored(units: tls.Units, seed: int = 0) -> tls.Scores:
    values = torch.randn(len(units), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tls.Scores(units, values, torch.zeros_like(values), "test", "nats", 0, 0)


def translated(name: str) -> str:
    """``L0H1->L1H0.q`` as the benchmark writes it."""
    name = re.sub(r"L(\d+)H(\d+)", r"a\1.h\2", name).replace("embed", "input")
    return re.sub(r"\.([qkv])$", r"<\1>", re.sub(r"L(\d+)MLP", r"m\1", name))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), kept=st.floats(0, 1))
def test_an_edge_is_the_one_of_that_name(seed: int, kept: float):
    model = bridge()
    circuit = drawn(tls.edges(model), seed, kept)
    graph = tls.mib.graph(model, circuit)
    assert names(graph.sizes.edges, graph.kept_edges) == set(map(translated, circuit.names))
    ends = {re.sub("<.>", "", end) for name in circuit.names for end in translated(name).split("->")}
    assert names(graph.sizes.nodes, graph.kept_nodes) == ends | {"logits"}
    assert torch.equal(graph.edge_scores, graph.kept_edges.double()) and bool(graph.node_scores.isnan().all())
    assert graph.edge_circuit(model) == circuit


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_scores_of_edges_go_into_files_and_come_back(small: Any, tmp_path: Path, suffix: str):
    scores = scored(tls.edges(small))
    graph = tls.mib.graph(small, scores.top(0.3), scores)
    of = dict(zip(graph.sizes.edges, graph.edge_scores.tolist(), strict=True))
    assert [of[translated(name)] for name in scores.units.names] == scores.scores.tolist()
    graph.save(tmp_path / f"graph{suffix}")
    assert tls.mib.load(tmp_path / f"graph{suffix}").edge_circuit(small) == scores.top(0.3)


@pytest.mark.parametrize("readers", ["head", "layer"])
def test_what_a_head_or_a_layer_reads_is_all_of_its_queries_keys_and_values(
    small: Any, readers: Literal["head", "layer"]
):
    circuit = drawn(tls.edges(small, readers), 3)
    graph = tls.mib.graph(small, circuit)
    heads = {f"L{layer}H{head}": [f"a{layer}.h{head}"] for layer in range(2) for head in range(2)}
    heads |= {f"L{layer}ATTN": [f"a{layer}.h0", f"a{layer}.h1"] for layer in range(2)}
    expected: set[str] = set()
    for name in circuit.names:
        writer, reader = name.split("->")
        into = [f"{head}<{part}>" for head in heads.get(reader, []) for part in "qkv"] or [translated(reader)]
        expected |= {f"{translated(writer)}->{one}" for one in into}
    assert names(graph.sizes.edges, graph.kept_edges) == expected


@pytest.mark.parametrize("name", ["Llama with biases", "Gemma 2"])
def test_what_a_group_reads_is_what_each_of_its_heads_reads(name: str):
    """Three groups of two heads: with either kind of edges the model computes the same."""
    model = architectures.bridge(name)
    grouped = drawn(tls.edges(model), 1)
    apart = tls.mib.graph(model, grouped).edge_circuit(model)
    assert apart.units == tls.edges(model, grouped=False) and len(apart.units) > len(grouped.units)
    kept = {"L1G2.k": ("L1H4.k", "L1H5.k"), "L0G0.v": ("L0H0.v", "L0H1.v"), "L1H3.q": ("L1H3.q",)}
    for group, single in kept.items():
        into = {edge.split("->")[0] for edge in grouped.names if edge.endswith(f"->{group}")}
        for one in single:
            assert {edge.split("->")[0] for edge in apart.names if edge.endswith(f"->{one}")} == into
    tokens = torch.randint(0, model.cfg.d_vocab, (2, 7), generator=torch.Generator().manual_seed(0))
    found: list[torch.Tensor] = []
    for circuit in (grouped, apart):
        width, most = model.cfg.d_model, max(site.rows for site in circuit.units.sites)
        table = torch.randn(most, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = tls.Values(circuit.units, tuple(table[: site.rows] for site in circuit.units.sites))
        ablation = tls.Intervention(circuit.units, circuit.mask.double(), values)
        with torch.no_grad(), NoCasts(), tls.intervened(model, ablation):
            found.append(model(tokens))
    assert (found[0] - found[1]).abs().max() <= 1e-9


def test_edges_that_the_circuit_is_not_about_stay(small: Any):
    units = tls.Units(tls.edges(small).sites[-1:])  # into the logits
    graph, scores = tls.mib.graph(small, tls.Circuit.empty(units)), scored(units)
    assert names(graph.sizes.edges, ~graph.kept_edges) == set(map(translated, units.names))
    assert float(tls.mib.graph(small, tls.Circuit.full(units), scores).edge_scores[0]) == float(scores.scores.max())


@pytest.mark.parametrize("seed", range(3))
def test_circuits_are_the_benchmark_s_best_edges(small: Any, seed: int):
    scores = scored(tls.edges(small), seed)
    whole = tls.mib.graph(small, tls.Circuit.full(scores.units), scores)
    sizes = [0.01, 0.1, 0.3, 0.6, 1.0]
    for size, found in zip(sizes, tls.mib.circuits(small, scores, sizes), strict=True):
        assert found == whole.top(int(size * 46), absolute=False)


def test_a_group_s_edge_counts_for_each_of_its_heads():
    model = architectures.bridge("Llama with biases")
    scores, every = scored(tls.edges(model)), len(tls.edges(model, grouped=False))
    best = scores.order.flip(0).tolist()
    count = [2 if re.search(r"G\d\.[kv]$", scores.units.names[i]) else 1 for i in best]
    for size, found in zip((0.2, 0.5), tls.mib.circuits(model, scores, [0.2, 0.5]), strict=True):
        most = max(n for n in range(len(best) + 1) if sum(count[:n]) <= size * every)
        mask = torch.zeros(len(best), dtype=torch.bool).index_fill(0, torch.tensor(best[:most]), True)
        graph = tls.mib.graph(model, tls.Circuit(scores.units, mask))
        nodes, edges = slowly_joined(set(graph.sizes.nodes), names(graph.sizes.edges, graph.kept_edges))
        assert names(graph.sizes.nodes, found.kept_nodes) == nodes and len(edges) > 20
        assert names(graph.sizes.edges, found.kept_edges) == edges


def test_standing_is_measured_as_the_benchmark_does(small: Any):
    """Slowly: each edge outside the circuit has its value of the counterfactual's run, one example at a time."""
    data, units = examples(3, seed=2), tls.edges(small)
    scores = scored(units, 5)
    assert data.counterfactual_tokens is not None and data.counterfactual_labels is not None

    def value(tokens: torch.Tensor, i: int) -> float:
        logits = small(tokens)[0, -1].detach()
        return float(logits[data.labels[i, -1]] - logits[data.counterfactual_labels[i, -1]])  # type: ignore[index]

    full = sum(value(data.tokens[i : i + 1], i) for i in range(3))
    empty = sum(value(data.counterfactual_tokens[i : i + 1], i) for i in range(3))
    graphs, f = tls.mib.circuits(small, scores), list[float]()
    for graph in graphs:
        total, keep = 0.0, graph.edge_circuit(small).mask.float()
        for i in range(3):
            far = tls.Examples(data.counterfactual_tokens[i : i + 1], data.labels[i : i + 1])
            with tls.intervened(small, tls.Intervention(units, keep, tls.run_values(small, far, units))):
                total += value(data.tokens[i : i + 1], i)
        f.append((total - empty) / (full - empty))
    found = tls.mib.standing(small, scores, data, batch_size=2)
    assert found.edges == (*(int(graph.kept_edges.sum()) for graph in graphs), 46) and len(set(found.edges)) == 4
    assert found.faithfulness == pytest.approx([*f, 1.0], abs=1e-8)


def test_all_edges_between_kept_units_answer_as_the_units_do(small: Any):
    data, nodes = examples(4, seed=1), tls.heads(small) + tls.mlps(small)
    far = data.counterfactuals
    for seed in range(4):
        graph = tls.mib.graph(small, drawn(nodes, seed))
        found: list[torch.Tensor] = []
        for circuit in (graph.circuit(small), graph.edge_circuit(small)):
            values = tls.run_values(small, far, circuit.units)
            with torch.no_grad(), tls.intervened(small, tls.Intervention(circuit.units, circuit.mask.float(), values)):
                found.append(small(data.tokens)[:, -1])
        assert (found[0] - found[1]).abs().max() <= 1e-9


def test_a_search_over_edges_is_submitted(small: Any, tmp_path: Path):
    data = examples(8, seed=2)
    path = tls.sparsify(small, data, tls.edges(small), sizes=(0.5, 0.2), progress=False)
    folder = tls.mib.submission(tmp_path, small, path, task="ioi", name="gpt2")
    expected = tls.mib.circuits(small, path)
    assert [tls.mib.load(folder / f"{size}.json") for size in PERCENTAGES[:-1]] == expected
    half = tls.prune(path.at(0.5).circuit)
    assert expected[-1].edge_circuit(small) <= half


def test_what_the_format_has_no_words_for_is_refused(small: Any):
    units = tls.edges(small)
    mixed = units + tls.heads(small)
    with pytest.raises(ValueError, match="circuit has units of kind head: give edges alone"):
        tls.mib.graph(small, tls.Circuit.full(mixed))
    with pytest.raises(ValueError, match="scores has units of kind head: give edges alone"):
        tls.mib.graph(small, tls.Circuit.full(units), scored(tls.heads(small)))
    with pytest.raises(ValueError, match="edges at some positions only"):
        tls.mib.graph(small, tls.Circuit.full(units.at(-1)))
    with pytest.raises(ValueError, match=r"circuit has the edge input->a0.h0<q> twice: name each by one"):
        tls.mib.graph(
            small, tls.Circuit.full(tls.Units(units.sites[:1]) + tls.Units(tls.edges(small, "head").sites[:1]))
        )
    with pytest.raises(ValueError, match="is it of this model"):
        tls.mib.graph(small, tls.Circuit.full(tls.edges(bridge(n_layers=3))))
    broken = scored(units)
    broken.scores[3] = float("inf")
    with pytest.raises(ValueError, match="scores of 1 edges are not finite"):
        tls.mib.graph(small, tls.Circuit.full(units), broken)
    with pytest.raises(ValueError, match="is a circuit of another model"):
        tls.mib.graph(small, tls.Circuit.full(units)).edge_circuit(bridge(n_layers=3))
    part = tls.Units(units.sites[-1:])
    with pytest.raises(ValueError, match=r"have 39: score edges\(model\)"):
        tls.mib.circuits(small, scored(part), [0.1])
