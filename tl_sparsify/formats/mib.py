"""Circuits as the Mechanistic Interpretability Benchmark has them: its circuit JSON, in and out.

A file has ``cfg`` (the model's sizes), ``nodes`` and ``edges``. Nodes are ``input``, every head (``a0.h1``), every MLP
(``m2``) and ``logits``. An edge goes from whatever writes to the residual stream to whatever reads it later:
``input->a0.h1<q>``, one each for the query, the key and the value of a head, ``a0.h1->m0``, ``m0->logits``. All of them
are listed, in the graph or not.

A circuit of units says nothing of edges: one is in the graph if both its ends are. Its score is the lesser of its ends'
scores, so that edges above a threshold are those between units above it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.files import write_text
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.units import Units, heads, mlps
from tl_sparsify.search.scores import Scores


@dataclass(frozen=True)
class Sizes:
    """What the benchmark says of a model.

    Attributes:
        layers: how many blocks.
        heads: in each of them.
        d_model: the width of the residual stream.
        parallel: whether a block's MLP reads what its attention reads, and so has no edge from its heads.

    Example:
        >>> tls.mib.Sizes(layers=12, heads=12, d_model=768)
        Sizes(layers=12, heads=12, d_model=768, parallel=False)
    """

    layers: int
    heads: int
    d_model: int
    parallel: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of all nodes, in the order of the forward pass: 158 for GPT-2 small."""
        return _nodes(self.layers, self.heads)

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of all edges: 32,491 for GPT-2 small."""
        return tuple(name for name, _, _ in _edges(self.layers, self.heads, self.parallel))


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

    def circuit(self, model: Any) -> Circuit:
        """The circuit of ``heads(model) + mlps(model)`` that are nodes of this graph. Which edges are in the graph is
        lost where that is more than which nodes are. No model pass.

        Raises:
            ValueError: a model of other sizes.
        """
        found = sizes(model)
        if found != self.sizes:
            raise ValueError(f"model has {found}, the graph {self.sizes}: it is a circuit of another model")
        kept = {name for name, kept in zip(self.sizes.nodes, self.kept_nodes.tolist(), strict=True) if kept}
        units = heads(model) + mlps(model)
        return Circuit(units, torch.tensor([name in kept for name in _names(units)]))

    def save(self, path: str | Path) -> None:
        """Write the JSON file: complete, or not at all."""
        cfg = {
            "n_layers": self.sizes.layers,
            "n_heads": self.sizes.heads,
            "parallel_attn_mlp": self.sizes.parallel,
            "d_model": self.sizes.d_model,
        }
        nodes: dict[str, dict[str, Any]] = {}
        for name, kept, score in zip(
            self.sizes.nodes, self.kept_nodes.tolist(), self.node_scores.tolist(), strict=True
        ):
            nodes[name] = {"in_graph": kept} | ({"score": score} if math.isfinite(score) else {})
        rows = zip(self.sizes.edges, self.edge_scores.tolist(), self.kept_edges.tolist(), strict=True)
        edges = {name: {"score": score, "in_graph": kept} for name, score, kept in rows}
        write_text(Path(path), json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}))

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


def sizes(model: Any) -> Sizes:
    """The sizes of a model, from its weights. No model pass.

    Raises:
        ValueError: a model without attention or MLP in some block, or with other numbers of heads in its blocks (a
            folded one): the format has no words for it.

    Example:
        >>> tls.mib.sizes(model)
        Sizes(layers=3, heads=4, d_model=64, parallel=False)
    """
    layers = len(model.blocks)
    attention, whole = heads(model), mlps(model)
    counts = [site.size for site in attention.sites]
    if len(counts) != layers or len(whole) != layers or len(set(counts)) != 1:
        raise ValueError(
            f"model has {layers} blocks, {len(whole)} MLPs and {counts} heads in its blocks: the benchmark's format "
            "needs an MLP and as many heads in each; give the model as it was before it was folded"
        )
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return Sizes(layers, counts[0], int(model.blocks[0].attn.W_O.shape[-1]), parallel)


def graph(model: Any, circuit: Circuit, scores: Scores | None = None) -> Graph:
    """A circuit of heads, whole MLPs or both as the benchmark's graph. No model pass.

    Units that the circuit is not about (the MLPs, for a circuit of heads) are in the graph, because they are not
    removed.

    Args:
        scores: for the nodes: the scores of these units, or of some of them; where not given, 1 for a unit that is kept
            and 0 for one that is not. Readers of the format compare absolute values: give ``scores.absolute`` where
            some are negative.

    Raises:
        ValueError: neurons and other units that the format does not have, units at some positions only, of another
            model, or a score that is NaN.

    Example:
        >>> tls.mib.graph(model, scores.top(0.5), scores)
        Graph(11 of 17 nodes, 85 of 262 edges)
    """
    found = sizes(model)
    kept = dict.fromkeys(found.nodes, True)
    kept |= dict(zip(_checked(circuit.units, found, "circuit"), circuit.mask.tolist(), strict=True))
    if scores is None:
        known = dict(zip(_names(circuit.units), circuit.mask.double().tolist(), strict=True))
    else:
        known = dict(zip(_checked(scores.units, found, "scores"), scores.scores.double().tolist(), strict=True))
    wrong = [name for name, score in known.items() if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"scores of {len(wrong)} units are not finite (first: {wrong[0]}): the format needs numbers")
    most = max(known.values(), default=1.0)
    ends = _edges(found.layers, found.heads, found.parallel)
    return Graph(
        found,
        torch.tensor([kept[name] for name in found.nodes]),
        torch.tensor([kept[a] and kept[b] for _, a, b in ends]),
        torch.tensor([known.get(name, math.nan) for name in found.nodes], dtype=torch.float64),
        torch.tensor([min(known.get(a, most), known.get(b, most)) for _, a, b in ends], dtype=torch.float64),
    )


def load(path: str | Path) -> Graph:
    """Read a circuit file of the benchmark, as :meth:`Graph.save` or EAP-IG write it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON of this form; nodes or edges that the sizes do not have, or that are missing; an edge
            without score; circuits of neurons within nodes.

    Example:
        >>> tls.mib.graph(model, scores.top(0.5)).save("circuit.json")
        >>> tls.mib.load("circuit.json").circuit(model)
        Circuit(9 of 15 units: 6 heads, 3 MLPs)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no circuit file at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cfg, nodes, edges = content["cfg"], content["nodes"], content["edges"]
        parallel = bool(cfg.get("parallel_attn_mlp", False))
        found = Sizes(int(cfg["n_layers"]), int(cfg["n_heads"]), int(cfg["d_model"]), parallel)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no circuit file of the benchmark ({error!r}): it needs cfg (n_layers, n_heads, d_model), nodes "
            "and edges"
        ) from error
    _check_names(path, "node", nodes, found.nodes)
    _check_names(path, "edge", edges, found.edges)
    within = [name for name in found.nodes if nodes[name].get("neurons") is not None]
    if within:
        raise ValueError(
            f"{path} is a circuit of neurons within nodes (first: {within[0]}): give one of nodes or edges"
        )
    return Graph(
        found,
        torch.tensor([name == "logits" or _flag(path, name, nodes[name]) for name in found.nodes]),
        torch.tensor([_flag(path, name, edges[name]) for name in found.edges]),
        torch.tensor([_score(nodes[name]) for name in found.nodes], dtype=torch.float64),
        torch.tensor([_score(edges[name]) for name in found.edges], dtype=torch.float64),
    )


def _flag(path: Path, name: str, entry: Mapping[str, Any]) -> bool:
    kept = entry.get("in_graph")
    if not isinstance(kept, bool):
        raise ValueError(f"{path}: in_graph of {name} is {kept!r}; it must be true or false")
    return kept


def _score(entry: Mapping[str, Any]) -> float:
    score = entry.get("score")
    return math.nan if score is None else float(score)


def _check_names(path: Path, kind: str, found: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(found, Mapping) or not all(isinstance(entry, Mapping) for entry in found.values()):
        raise ValueError(f"{path}: the {kind}s must be objects by name, with in_graph and score")
    missing = [name for name in wanted if name not in found]
    more = [name for name in found if name not in set(wanted)] if len(found) + len(missing) > len(wanted) else []
    for what, names in [("lacks", missing), ("has unknown", more)]:
        if names:
            raise ValueError(f"{path} {what} {len(names):,} {kind}s for its sizes (first: {names[0]})")


def _names(units: Units) -> list[str]:
    """The node of each unit."""
    return [
        f"a{site.layer}.h{i}" if site.kind == "head" else f"m{site.layer}"
        for site in units.sites
        for i in range(site.size)
    ]


def _checked(units: Units, found: Sizes, argument: str) -> list[str]:
    for site in units.sites:
        if site.kind not in ("head", "mlp"):
            raise ValueError(f"{argument} has units of kind {site.kind}: the format has heads and whole MLPs only")
        if site.positions is not None:
            raise ValueError(f"{argument} has units at some positions only, {site.name(0)}: the format has none")
    names, known = _names(units), set(found.nodes)
    unknown = [name for name in names if name not in known]
    if unknown or any(site.kind == "head" and site.size != found.heads for site in units.sites):
        raise ValueError(f"{argument} is of {units!r}, the model has {found}: is it of this model?")
    return names


@cache
def _nodes(layers: int, n: int) -> tuple[str, ...]:
    blocks = [[*(f"a{layer}.h{head}" for head in range(n)), f"m{layer}"] for layer in range(layers)]
    return ("input", *(name for block in blocks for name in block), "logits")


@cache
def _edges(layers: int, n: int, parallel: bool) -> tuple[tuple[str, str, str], ...]:
    """Each edge's name, and the nodes that it joins."""
    found: list[tuple[str, str, str]] = []
    writers = ["input"]
    for layer in range(layers):
        attention = [f"a{layer}.h{head}" for head in range(n)]
        found += [(f"{w}->{head}<{part}>", w, head) for w in writers for head in attention for part in "qkv"]
        before = writers if parallel else writers + attention
        found += [(f"{w}->m{layer}", w, f"m{layer}") for w in before]
        writers = [*writers, *attention, f"m{layer}"]
    return (*found, *((f"{w}->logits", w, "logits") for w in writers))
