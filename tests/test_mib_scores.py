"""Standing in the benchmark: sizes by edges, the folder that is sent, the areas by its own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.graphs import names, slowly_joined
from helpers.models import bridge, examples

import tl_sparsify as tls
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.metrics import mean_difference
from tl_sparsify.core.units import Units, heads, mlps
from tl_sparsify.formats.mib_scores import PERCENTAGES
from tl_sparsify.search.scores import Scores


@pytest.fixture
def small() -> Any:
    return bridge()


def scored(units: Units, seed: int = 0) -> Scores:
    values = torch.randn(len(units), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Scores(units, values, torch.zeros_like(values), "test", "nats", 0, 0)


def edge_graph(model: Any, seed: int) -> tls.mib.Graph:
    """Random scores for edges, not only for nodes."""
    graph = tls.mib.graph(model, Circuit.full(heads(model) + mlps(model)), scored(heads(model) + mlps(model), seed))
    scores = torch.randn(len(graph.edge_scores), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tls.mib.Graph(graph.sizes, graph.kept_nodes, graph.kept_edges, graph.node_scores, scores)


@pytest.mark.parametrize("n", [0, 1, 5, 12, 30, 46])
@pytest.mark.parametrize("absolute", [True, False])
def test_the_best_edges_are_those_that_are_joined(small: Any, n: int, absolute: bool):
    graph = edge_graph(small, n)
    values = graph.edge_scores.abs() if absolute else graph.edge_scores
    best = sorted(zip(values.tolist(), graph.sizes.edges, strict=True), reverse=True)[:n]
    nodes, edges = slowly_joined(set(graph.sizes.nodes), {name for _, name in best})
    found = graph.top(n, absolute=absolute)
    assert names(graph.sizes.edges, found.kept_edges) == edges
    assert names(graph.sizes.nodes, found.kept_nodes) == nodes


@pytest.mark.parametrize("n", [3, 7, 15, 29])
def test_of_equal_scores_the_first_writer_comes_first(small: Any, n: int):
    graph = edge_graph(small, 0)
    graph = tls.mib.Graph(
        graph.sizes, graph.kept_nodes, graph.kept_edges, graph.node_scores, (2 * graph.edge_scores).round()
    )
    columns = ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0"]
    columns += [name.replace("0.", "1.") for name in columns[:6]] + ["m1", "logits"]
    matrix = [f"{writer}->{reader}" for writer in graph.sizes.nodes[:-1] for reader in columns]
    scores = dict(zip(graph.sizes.edges, graph.edge_scores.abs().tolist(), strict=True))
    best = sorted((name for name in matrix if name in scores), key=lambda name: -scores[name])[:n]
    assert len(set(scores.values())) < len(scores) / 4
    _, edges = slowly_joined(set(graph.sizes.nodes), set(best))
    assert names(graph.sizes.edges, graph.top(n).kept_edges) == edges


def test_the_best_nodes_come_with_all_edges_between_them(small: Any):
    graph = edge_graph(small, 3)
    found = graph.top(2, of="nodes")
    scores = dict(zip(graph.sizes.nodes, graph.node_scores.abs().tolist(), strict=True))
    best = sorted((name for name in scores if name not in ("input", "logits")), key=lambda name: -scores[name])[:2]
    assert names(graph.sizes.nodes, found.kept_nodes) == {"input", "logits", *best}
    units = heads(small) + mlps(small)
    mask = torch.tensor([name in best for name in ("a0.h0", "a0.h1", "a1.h0", "a1.h1", "m0", "m1")])
    assert torch.equal(found.kept_edges, tls.mib.graph(small, Circuit(units, mask)).kept_edges)
    with pytest.raises(ValueError, match="n is 7; there are 6 nodes with a score"):
        graph.top(7, of="nodes")


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_files_of_both_forms_are_read_back_equal(small: Any, tmp_path: Path, suffix: str):
    graph = edge_graph(small, 1).top(20)
    single = tls.mib.Graph(
        graph.sizes, graph.kept_nodes, graph.kept_edges, graph.node_scores.float().double(),
        graph.edge_scores.float().double(),
    )  # fmt: skip
    single.save(tmp_path / f"graph{suffix}")
    assert tls.mib.load(tmp_path / f"graph{suffix}") == single
    assert [path.name for path in tmp_path.iterdir()] == [f"graph{suffix}"]


def test_a_file_of_tensors_is_what_the_benchmark_reads(small: Any, tmp_path: Path):
    graph = edge_graph(small, 1)
    graph.save(tmp_path / "graph.pt")
    found = torch.load(tmp_path / "graph.pt", weights_only=True)  # noqa: TID251
    assert found["src_nodes"] == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert found["dst_nodes"][:7] == ["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0"]
    assert found["edges_scores"].shape == found["edges_in_graph"].shape == (7, 15)
    scores = dict(zip(graph.sizes.edges, graph.edge_scores.tolist(), strict=True))
    row, column = found["src_nodes"].index("m0"), found["dst_nodes"].index("a1.h1<k>")
    assert float(found["edges_scores"][row, column]) == pytest.approx(scores["m0->a1.h1<k>"])
    assert not bool(found["edges_in_graph"][row, found["dst_nodes"].index("a0.h0<q>")])


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must never be printed",)


def test_a_file_that_could_run_code_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"cfg": Harmful()}, tmp_path / "graph.pt")
    with pytest.raises(ValueError, match="not read because it could run code"):
        tls.mib.load(tmp_path / "graph.pt")
    (tmp_path / "bad.pt").write_bytes(b"none")
    with pytest.raises(ValueError, match="damaged"):
        tls.mib.load(tmp_path / "bad.pt")
    assert "never be printed" not in capsys.readouterr().out


def test_the_largest_circuit_of_each_size(small: Any):
    scores = scored(heads(small) + mlps(small))
    sizes = [0.03, 0.1, 0.3, 0.6, 1.0]
    for size, found in zip(sizes, tls.mib.circuits(small, scores, sizes), strict=True):
        kept = len(found.circuit(small))
        assert int(found.kept_edges.sum()) <= size * 46
        if kept < len(scores.units):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[scores.order.flip(0)[: kept + 1]] = True
            assert int(tls.mib.graph(small, Circuit(scores.units, mask)).kept_edges.sum()) > size * 46
    with pytest.raises(ValueError, match=r"0.03 is 1 edges, .* have 6: score heads\(model\) \+ mlps\(model\)"):
        tls.mib.circuits(small, scored(heads(small)), [0.03])


def test_a_submission_has_nine_sizes(small: Any, tmp_path: Path):
    scores = scored(heads(small) + mlps(small))
    folder = tls.mib.submission(tmp_path, small, scores, task="arc_easy", name="gemma2")
    assert folder == tmp_path / "arc_easy_gemma2" and len(list(folder.iterdir())) == 9
    for size, expected in zip(PERCENTAGES, tls.mib.circuits(small, scores), strict=False):
        assert tls.mib.load(folder / f"{size}.json") == expected
    again = tls.mib.submission(tmp_path, small, scores, task="arc_easy", name="gemma2", suffix=".json")
    assert again == folder
    tensors = tls.mib.submission(tmp_path, small, scores, task="arc_easy", name="gemma2", suffix=".pt")
    assert tensors == folder and {path.suffix for path in folder.iterdir()} == {".pt"}
    tls.mib.submission(tmp_path, small, scores, task="arc_easy", name="gemma2")
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    with pytest.raises(ValueError, match="task is 'arc'; the benchmark knows ioi"):
        tls.mib.submission(tmp_path, small, scores, task="arc", name="gpt2")


def slow_areas(edges: list[float], f: list[float]) -> tuple[float, float]:
    """The benchmark's rule, written out: shares of the last count, trapezoids."""
    area = from_1 = 0.0
    for i in range(len(f) - 1):
        width = edges[i + 1] / edges[-1] - edges[i] / edges[-1]
        area += width * (f[i] + f[i + 1]) / 2
        from_1 += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    return area, from_1


def test_areas_are_those_of_the_benchmark_s_rule():
    edges, f = [32.0, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491], [-0.2, 0, 0.1, 0.3, 0.7, 1.1, 1.2, 1, 0.9, 1]
    assert tls.mib.areas(edges, f) == pytest.approx(slow_areas(edges, f), abs=1e-12)
    for bad in ([1.0], [2.0, 1.0]):
        with pytest.raises(ValueError, match="edges"):
            tls.mib.areas(bad, [1.0] * len(bad))


def paired(n: int = 3) -> Examples:
    return examples(n, seed=2)


def test_standing_is_measured_as_the_benchmark_does(small: Any):
    """Slowly: each node outside the circuit has its value of the counterfactual's run, one example at a time."""
    data = paired()
    units = heads(small) + mlps(small)
    scores = scored(units, 5)
    assert data.counterfactual_tokens is not None and data.counterfactual_labels is not None
    sizes = tls.mib.circuits(small, scores)

    def value(tokens: torch.Tensor, i: int) -> float:
        logits = small(tokens)[0, -1].detach()
        return float(logits[data.labels[i, -1]] - logits[data.counterfactual_labels[i, -1]])  # type: ignore[index]

    full = sum(value(data.tokens[i : i + 1], i) for i in range(len(data)))
    empty = sum(value(data.counterfactual_tokens[i : i + 1], i) for i in range(len(data)))
    f: list[float] = []
    for graph in sizes:
        total = 0.0
        for i in range(len(data)):
            far = Examples(data.counterfactual_tokens[i : i + 1], data.labels[i : i + 1])
            values = tls.run_values(small, far, units)
            keep = graph.circuit(small).mask.float()
            with tls.intervened(small, tls.Intervention(units, keep, values)):
                total += value(data.tokens[i : i + 1], i)
        f.append((total - empty) / (full - empty))
    edges = [float(graph.kept_edges.sum()) for graph in sizes] + [46.0]
    found = tls.mib.standing(small, scores, data, batch_size=2)
    assert found.faithfulness == pytest.approx([*f, 1.0], abs=1e-8)
    assert (found.area, found.area_from_1) == pytest.approx(slow_areas(edges, [*f, 1.0]), abs=1e-8)
    assert found.edges == tuple(edges)


def test_standing_of_a_path_and_by_another_metric(small: Any):
    data = paired()
    path = tls.sparsify(small, data, heads(small) + mlps(small), sizes=(0.5, 0.2), progress=False)
    found = tls.mib.standing(small, path, data)
    assert found == tls.mib.standing(small, path, data, metric=mean_difference) and found.edges[-1] == 46
    with pytest.raises(ValueError, match="no counterfactual_tokens"):
        tls.mib.standing(small, path, Examples(data.tokens, data.labels))
