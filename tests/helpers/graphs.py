"""Graphs of the benchmark, slowly: which nodes and edges are joined to the input and the logits."""

from __future__ import annotations

import torch


def slowly_joined(nodes: set[str], edges: set[str]) -> tuple[set[str], set[str]]:
    """Take away what dangles, one after the other, until nothing does."""
    ends = {edge: (edge.split("->")[0], edge.split("->")[1].split("<")[0]) for edge in edges}
    while True:
        for edge in sorted(edges):
            if not set(ends[edge]) <= nodes:
                edges = edges - {edge}
                break
        else:
            out, into = {ends[e][0] for e in edges} | {"logits"}, {ends[e][1] for e in edges} | {"input"}
            loose = sorted(node for node in nodes if node != "logits" and (node not in out or node not in into))
            if not loose:
                return nodes, edges
            nodes = nodes - {loose[0]}


def names(all_names: tuple[str, ...], kept: torch.Tensor) -> set[str]:
    return {name for name, there in zip(all_names, kept.tolist(), strict=True) if there}
