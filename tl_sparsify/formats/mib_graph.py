"""Circuits as the Mechanistic Interpretability Benchmark has them.

A circuit of edges is one of its graphs. A circuit of heads and MLPs says nothing of edges: one is in the graph if both
its ends are. Its score is the lesser of its ends' scores, so that edges above a threshold are those between units above
it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.files import reading
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.edges import edges
from tl_sparsify.core.units import Model, Units, heads, mlps
from tl_sparsify.formats.mib_edges import owners
from tl_sparsify.formats.mib_files import Parts, cells, read_parts, write_parts
from tl_sparsify.formats.mib_names import Sizes, edge_table
from tl_sparsify.search.scores import Scores


@dataclass(frozen=True, eq=False)
class Graph:
    """The content of a circuit file.

    Attributes:
        sizes: the model's, from which the names follow.
        kept_nodes: whether each of ``sizes.nodes`` is in the graph (``input`` and ``logits`` too).
        kept_edges: whether each of ``sizes.edges`` is.
        node_scores: NaN where a node has none.
        edge_scores: every edge has one.

    Raises:
        ValueError: tensors of other lengths, an edge's score that is no finite number.

    Example:
        >>> units = tls.heads(model) + tls.mlps(model)
        >>> graph = tls.mib.graph(model, tls.Circuit.of(units, ["L0H1", "L1MLP"]))
        >>> [name for name, kept in zip(graph.sizes.nodes, graph.kept_nodes.tolist()) if kept]
        ['input', 'a0.h1', 'm1', 'logits']
    """

    sizes: Sizes
    kept_nodes: Bool[Tensor, "nodes"]
    kept_edges: Bool[Tensor, "edges"]
    node_scores: Float[Tensor, "nodes"]
    edge_scores: Float[Tensor, "edges"]

    def __post_init__(self) -> None:
        for name, kind, value in [
            ("kept_nodes", "nodes", self.kept_nodes),
            ("node_scores", "nodes", self.node_scores),
            ("kept_edges", "edges", self.kept_edges),
            ("edge_scores", "edges", self.edge_scores),
        ]:
            n = len(getattr(self.sizes, kind))
            if value.shape != (n,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; {self.sizes} has {n:,} {kind}")
        unknown = ~self.edge_scores.isfinite()
        if bool(unknown.any()):
            first = self.sizes.edges[int(unknown.nonzero()[0])]
            raise ValueError(
                f"edge_scores is not finite for {int(unknown.sum()):,} edges (first: {first}): the format needs a "
                "score for every edge"
            )

    @checked
    def circuit(self, model: Model) -> Circuit:
        """The circuit of ``heads(model) + mlps(model)`` that are nodes of this graph. Which edges are in the graph is
        lost where that is more than which nodes are (:meth:`edge_circuit`). No model pass.

        Raises:
            ValueError: a model of other sizes.
        """
        self._check_of(model)
        kept = {name for name, kept in zip(self.sizes.nodes, self.kept_nodes.tolist(), strict=True) if kept}
        units = heads(model) + mlps(model)
        return Circuit(units, torch.tensor([name in kept for name in node_of_units(units)]))

    @checked
    def edge_circuit(self, model: Model) -> Circuit:
        """The circuit of ``tls.edges(model, grouped=False)`` that are edges of this graph. No model pass.

        Raises:
            ValueError: a model of other sizes, or whose edges are not known (:func:`edges`).

        Example:
            >>> graph = tls.mib.graph(model, tls.Circuit.of(tls.edges(model), ["embed->L1MLP", "L1MLP->logits"]))
            >>> graph.edge_circuit(model).names
            ('embed->L1MLP', 'L1MLP->logits')
        """
        self._check_of(model)
        units = edges(model, grouped=False)
        owner, mask = owners(units, self.sizes, "model"), torch.zeros(len(units), dtype=torch.bool)
        mask[owner] = self.kept_edges
        return Circuit(units, mask)

    def _check_of(self, model: Any) -> None:
        found = sizes(model)
        if found != self.sizes:
            raise ValueError(f"model has {found}, the graph {self.sizes}: it is a circuit of another model")

    @checked
    def top(self, n: int, *, of: Literal["edges", "nodes"] = "edges", absolute: bool = True) -> Graph:
        """The graph of the ``n`` best edges, or of the ``n`` best nodes and all edges between them, as the benchmark
        takes it: without what is not joined to both the input and the logits.

        Nodes without a score are kept. Of equal scores the first counts: of nodes in the order of the forward pass, of
        edges writer by writer, as in EAP-IG where its sort is stable (on most CPUs it is not).

        Args:
            absolute: whether scores count without their sign.

        Raises:
            ValueError: ``n`` that is negative or more than there are, another ``of``.
        """
        if of not in ("edges", "nodes"):
            raise ValueError(f"of is {of!r}; it is edges or nodes")
        scores = self.edge_scores if of == "edges" else self.node_scores
        scored = int((~scores.isnan()).sum())
        if not 0 <= n <= scored:
            raise ValueError(f"n is {n}; there are {scored:,} {of} with a score")
        ranked = (scores.abs() if absolute else scores).nan_to_num(nan=-math.inf)
        first = torch.arange(len(ranked))
        if of == "edges":
            rows, columns = cells(self.sizes)
            first = (rows * len(ranked) + columns).argsort()  # there are fewer columns than edges
        order = first[ranked[first].argsort(descending=True, stable=True)]
        best = torch.zeros(len(scores), dtype=torch.bool)
        best[order[:n]] = True
        every = torch.ones(len(self.node_scores if of == "edges" else self.edge_scores), dtype=torch.bool)
        nodes, kept = (every, best) if of == "edges" else (best | scores.isnan(), every)
        return joined(replace(self, kept_nodes=nodes, kept_edges=kept))

    @checked
    def save(self, path: str | Path) -> None:
        """Write a JSON file, or one of tensors in float32 where its name ends in ``.pt``: complete, or not at all."""
        parts = Parts(self.sizes, self.kept_nodes, self.kept_edges, self.node_scores, self.edge_scores)
        write_parts(Path(path), parts)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Graph)
            and self.sizes == other.sizes
            and torch.equal(self.kept_nodes, other.kept_nodes)
            and torch.equal(self.kept_edges, other.kept_edges)
            and torch.equal(self.edge_scores, other.edge_scores)
            and torch.equal(self.node_scores.isnan(), other.node_scores.isnan())
            and torch.equal(self.node_scores.nan_to_num(), other.node_scores.nan_to_num())
        )

    def __hash__(self) -> int:
        return hash((self.sizes, int(self.kept_nodes.sum()), int(self.kept_edges.sum())))

    def __repr__(self) -> str:
        nodes, edges = int(self.kept_nodes.sum()), int(self.kept_edges.sum())
        return f"Graph({nodes:,} of {len(self.kept_nodes):,} nodes, {edges:,} of {len(self.kept_edges):,} edges)"


@cache
def _ends(sizes: Sizes) -> tuple[Int[Tensor, "edges"], Int[Tensor, "edges"]]:
    """The node at which each edge starts, and the one at which it ends."""
    place = {name: i for i, name in enumerate(sizes.nodes)}
    table = edge_table(sizes.layers, sizes.heads, sizes.parallel)
    return torch.tensor([place[a] for _, a, _ in table]), torch.tensor([place[b] for _, _, b in table])


def joined(graph: Graph) -> Graph:
    """The graph without what is not joined: an edge needs both its nodes, a node an edge on either side, but for input
    and logits."""
    start, end = _ends(graph.sizes)
    nodes, edges = graph.kept_nodes, graph.kept_edges
    while True:
        kept = edges & nodes[start] & nodes[end]
        out, into = torch.zeros_like(nodes), torch.zeros_like(nodes)
        out[start[kept]], into[end[kept]] = True, True
        into[0], out[-1] = True, True  # the input reads nothing, the logits write nothing
        left = nodes & out & into
        left[-1] = True
        if torch.equal(left, nodes) and torch.equal(kept, edges):
            return replace(graph, kept_nodes=nodes, kept_edges=edges)
        nodes, edges = left, kept


def graph_of_edges(sizes: Sizes, kept: Bool[Tensor, "edges"], scores: Float[Tensor, "edges"]) -> Graph:
    """A graph of edges; a node is in it if an edge is."""
    start, end = _ends(sizes)
    nodes = torch.zeros(len(sizes.nodes), dtype=torch.bool)
    nodes[start[kept]], nodes[end[kept]], nodes[-1] = True, True, True
    return Graph(sizes, nodes, kept, torch.full((len(nodes),), math.nan, dtype=torch.float64), scores)


@checked
def sizes(model: Any) -> Sizes:
    """The sizes of a model, from its weights. No model pass.

    Raises:
        ValueError: a model without attention or MLP in some block, or with other numbers of heads in its blocks (a
            folded one): the format has no words for it.

    Example:
        >>> tls.mib.sizes(model)
        Sizes(layers=3, heads=4, d_model=64, parallel=False)
    """
    attention, whole = heads(model), mlps(model)
    layers = len(model.blocks)
    counts = [site.size for site in attention.sites]
    if len(counts) != layers or len(whole) != layers or len(set(counts)) != 1:
        raise ValueError(
            f"model has {layers} blocks, {len(whole)} MLPs and {counts} heads in its blocks: the benchmark's format "
            "needs an MLP and as many heads in each; give the model as it was before it was folded"
        )
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return Sizes(layers, counts[0], int(model.blocks[0].attn.W_O.shape[-1]), parallel)


@checked
def graph(model: Model, circuit: Circuit, scores: Scores | None = None) -> Graph:
    """A circuit of edges, or of heads, whole MLPs or both, as the benchmark's graph. No model pass.

    Units that the circuit is not about (the MLPs, for a circuit of heads) are in the graph, because they are not
    removed. An edge into what several heads share (a group's keys and values, a layer) is one into each of them.

    Args:
        scores: for the nodes or edges: the scores of these units, or of some of them; where not given, 1 for a unit
            that is kept and 0 for one that is not. Readers of the format compare absolute values: give
            ``scores.absolute`` where some are negative.

    Raises:
        ValueError: neurons and other units that the format does not have, edges beside others, units at some positions
            only, of another model, or a score that is NaN.

    Example:
        >>> tls.mib.graph(model, scores.top(0.5), scores)
        Graph(11 of 17 nodes, 85 of 262 edges)
        >>> tls.mib.graph(model, tls.Circuit.of(tls.edges(model), ["embed->L1H1.v", "L1H1->logits"]))
        Graph(3 of 17 nodes, 2 of 262 edges)
    """
    found = sizes(model)
    if of_edges(circuit.units):
        return _from_edges(found, circuit, scores)
    kept = dict.fromkeys(found.nodes, True)
    kept |= dict(zip(_checked(circuit.units, found, "circuit"), circuit.mask.tolist(), strict=True))
    if scores is None:
        known = dict(zip(node_of_units(circuit.units), circuit.mask.double().tolist(), strict=True))
    else:
        known = dict(zip(_checked(scores.units, found, "scores"), scores.scores.double().tolist(), strict=True))
    wrong = [name for name, score in known.items() if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"scores of {len(wrong)} units are not finite (first: {wrong[0]}): the format needs numbers")
    most = max(known.values(), default=1.0)
    ends = edge_table(found.layers, found.heads, found.parallel)
    return Graph(
        found,
        torch.tensor([kept[name] for name in found.nodes]),
        torch.tensor([kept[a] and kept[b] for _, a, b in ends]),
        torch.tensor([known.get(name, math.nan) for name in found.nodes], dtype=torch.float64),
        torch.tensor([min(known.get(a, most), known.get(b, most)) for _, a, b in ends], dtype=torch.float64),
    )


def of_edges(units: Units) -> bool:
    """Whether edges are among the units."""
    return any(site.kind == "edge" for site in units.sites)


def _from_edges(found: Sizes, circuit: Circuit, scores: Scores | None) -> Graph:
    owner = owners(circuit.units, found, "circuit")
    kept = (owner < 0) | circuit.mask[owner]
    if scores is None:
        return graph_of_edges(found, kept, kept.double())
    by = owner if scores.units == circuit.units else owners(scores.units, found, "scores")
    known = scores.scores.double().cpu()
    wrong = [name for name, score in zip(scores.units.names, known.tolist(), strict=True) if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"scores of {len(wrong)} edges are not finite (first: {wrong[0]}): the format needs numbers")
    return graph_of_edges(found, kept, torch.where(by < 0, known.max(), known[by]))


@checked
def load(path: str | Path) -> Graph:
    """Read a circuit file of the benchmark, JSON or ``.pt`` (of which nothing but tensors and plain values is read), as
    :meth:`Graph.save` or EAP-IG write it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of this form; nodes or edges that the sizes do not have, or that are missing; an edge
            without score; circuits of neurons within nodes.

    Example:
        >>> tls.mib.graph(model, scores.top(0.5)).save("circuit.json")
        >>> tls.mib.load("circuit.json").circuit(model)
        Circuit(9 of 15 units: 6 heads, 3 MLPs)
    """
    parts = read_parts(Path(path))
    with reading(Path(path), "circuit file of the benchmark"):
        return Graph(parts.sizes, parts.kept_nodes, parts.kept_edges, parts.node_scores, parts.edge_scores)


def node_of_units(units: Units) -> list[str]:
    """The node of each unit."""
    return [
        f"a{site.layer}.h{i}" if site.kind == "head" else f"m{site.layer}"
        for site in units.sites
        for i in range(site.size)
    ]


def _checked(units: Units, found: Sizes, argument: str) -> list[str]:
    for site in units.sites:
        if site.kind not in ("head", "mlp"):
            raise ValueError(f"{argument} has units of kind {site.kind}: give heads and whole MLPs")
        if site.positions is not None:
            raise ValueError(f"{argument} has units at some positions only, {site.name(0)}: the format has none")
    names, known = node_of_units(units), set(found.nodes)
    unknown = [name for name in names if name not in known]
    if unknown or any(site.kind == "head" and site.size != found.heads for site in units.sites):
        raise ValueError(f"{argument} is of {units!r}, the model has {found}: is it of this model?")
    return names
