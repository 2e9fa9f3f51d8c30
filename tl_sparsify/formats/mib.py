"""The Mechanistic Interpretability Benchmark: its circuit files, its submissions, its scores and its tasks."""

from __future__ import annotations

from tl_sparsify.formats.mib_graph import Graph, graph, load, sizes
from tl_sparsify.formats.mib_names import Sizes
from tl_sparsify.formats.mib_scores import Standing, areas, circuits, standing, submission
from tl_sparsify.formats.mib_tasks import CircuitTask, causal_pairs, circuit_task

__all__ = [
    "CircuitTask",
    "Graph",
    "Sizes",
    "Standing",
    "areas",
    "causal_pairs",
    "circuit_task",
    "circuits",
    "graph",
    "load",
    "sizes",
    "standing",
    "submission",
]
