"""Circuit files of the Mechanistic Interpretability Benchmark: JSON with every name, or tensors (``.pt``).

A JSON file has ``cfg`` (the model's sizes), ``nodes`` and ``edges``. A file of tensors has ``cfg``, the names of what
writes and of what reads, and matrices over them: of what reads the queries of a layer's heads come first, then their
keys, their values and the MLP.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.files import reading, write_bytes, write_text
from tl_sparsify.formats.mib_names import Sizes, edge_table


@dataclass(frozen=True)
class Parts:
    """What a file says: of each node and edge of the sizes whether it is in the graph, and its score."""

    sizes: Sizes
    kept_nodes: Bool[Tensor, "nodes"]
    kept_edges: Bool[Tensor, "edges"]
    node_scores: Float[Tensor, "nodes"]
    edge_scores: Float[Tensor, "edges"]


def write_parts(path: Path, parts: Parts) -> None:
    """Write a file, complete or not at all: JSON, or tensors where its name ends in ``.pt``."""
    if path.suffix == ".pt":
        _write_tensors(path, parts)
        return
    nodes: dict[str, dict[str, Any]] = {}
    sizes = parts.sizes
    for name, kept, score in zip(sizes.nodes, parts.kept_nodes.tolist(), parts.node_scores.tolist(), strict=True):
        nodes[name] = {"in_graph": kept} | ({"score": score} if math.isfinite(score) else {})
    rows = zip(sizes.edges, parts.edge_scores.tolist(), parts.kept_edges.tolist(), strict=True)
    edges = {name: {"score": score, "in_graph": kept} for name, score, kept in rows}
    write_text(path, json.dumps({"cfg": _cfg(sizes), "nodes": nodes, "edges": edges}))


def read_parts(path: Path) -> Parts:
    """Read a file of either form.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such file's content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no circuit file at {path}")
    with reading(path, "circuit file of the benchmark"):
        return _read_tensors(path) if path.suffix == ".pt" else _read_json(path)


def read_tensor_file(path: Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values: nothing else in the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything else, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum in it does not match")
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  nothing but weights
    except Exception as error:  # a damaged file raises whatever its bytes stand for
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read because it could run "
            f"code ({(str(error).splitlines() or [type(error).__name__])[0][:200]})"
        ) from error


def _cfg(sizes: Sizes) -> dict[str, Any]:
    return {
        "n_layers": sizes.layers,
        "n_heads": sizes.heads,
        "parallel_attn_mlp": sizes.parallel,
        "d_model": sizes.d_model,
    }


def _sizes(path: Path, content: Any, edges: int) -> Sizes:
    """The sizes that a file says, which cannot be far from its number of edges: all their names would fill memory."""
    try:
        cfg = content["cfg"]
        parallel = bool(cfg.get("parallel_attn_mlp", False))
        layers, heads = int(cfg["n_layers"]), int(cfg["n_heads"])
        if layers < 1 or heads < 1 or (layers * heads) ** 2 > 16 * edges + 10_000:
            raise ValueError(f"{layers:,} layers of {heads:,} heads, and {edges:,} edges")
        return Sizes(int(cfg["n_layers"]), int(cfg["n_heads"]), int(cfg["d_model"]), parallel)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no circuit file of the benchmark ({error!r}): it needs cfg (n_layers, n_heads, d_model), nodes "
            "and edges"
        ) from error


def _read_json(path: Path) -> Parts:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        nodes, edges = content["nodes"], content["edges"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no circuit file of the benchmark ({error!r}): it needs cfg (n_layers, n_heads, d_model), nodes "
            "and edges"
        ) from error
    found = _sizes(path, content, len(edges))
    _check_names(path, "node", nodes, found.nodes)
    _check_names(path, "edge", edges, found.edges)
    within = [name for name in found.nodes if nodes[name].get("neurons") is not None]
    if within:
        raise ValueError(
            f"{path} is a circuit of neurons within nodes (first: {within[0]}): give one of nodes or edges"
        )
    return Parts(
        found,
        torch.tensor([name == "logits" or _flag(path, name, nodes[name]) for name in found.nodes]),
        torch.tensor([_flag(path, name, edges[name]) for name in found.edges]),
        torch.tensor([_score(nodes[name]) for name in found.nodes], dtype=torch.float64),
        torch.tensor([_score(edges[name]) for name in found.edges], dtype=torch.float64),
    )


@cache
def cells(sizes: Sizes) -> tuple[Int[Tensor, "edges"], Int[Tensor, "edges"]]:
    """Row (the writer) and column (the reader) of each edge in EAP-IG's matrices."""
    writer = {name: i for i, name in enumerate(sizes.nodes)}
    reader = {name: i for i, name in enumerate(_readers(sizes))}
    rows, columns = [], []
    for name, start, end in edge_table(sizes.layers, sizes.heads, sizes.parallel):
        rows.append(writer[start])
        columns.append(reader[f"{end}{name[-3:]}" if name.endswith(">") else end])
    return torch.tensor(rows), torch.tensor(columns)


def _readers(sizes: Sizes) -> list[str]:
    found: list[str] = []
    for layer in range(sizes.layers):
        found += [f"a{layer}.h{head}<{part}>" for part in "qkv" for head in range(sizes.heads)]
        found.append(f"m{layer}")
    return [*found, "logits"]


def _write_tensors(path: Path, parts: Parts) -> None:
    sizes = parts.sizes
    rows, columns = cells(sizes)
    scores = torch.zeros(len(sizes.nodes) - 1, len(_readers(sizes)))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    scores[rows, columns], kept[rows, columns] = parts.edge_scores.float(), parts.kept_edges
    content: dict[str, Any] = {
        "cfg": _cfg(sizes),
        "src_nodes": list(sizes.nodes[:-1]),
        "dst_nodes": _readers(sizes),
        "edges_scores": scores,
        "edges_in_graph": kept,
        "nodes_in_graph": parts.kept_nodes[:-1].clone(),
    }
    if bool(parts.node_scores[:-1].isfinite().any()):
        content["nodes_scores"] = parts.node_scores[:-1].float()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def _read_tensors(path: Path) -> Parts:
    content = read_tensor_file(path)
    scores = content.get("edges_scores") if isinstance(content, Mapping) else None
    sizes = _sizes(path, content, scores.numel() if isinstance(scores, Tensor) else 0)
    shapes = {"edges_scores": (len(sizes.nodes) - 1, len(_readers(sizes))), "nodes_in_graph": (len(sizes.nodes) - 1,)}
    shapes["edges_in_graph"] = shapes["edges_scores"]
    for name, shape in shapes.items():
        value = content.get(name)
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {name} is {found}; for {sizes} it must be a tensor of shape {shape}")
    if content.get("neurons_in_graph") is not None:
        raise ValueError(f"{path} is a circuit of neurons within nodes: give one of nodes or edges")
    rows, columns = cells(sizes)
    scores = content.get("nodes_scores")
    scores = torch.full((len(sizes.nodes) - 1,), math.nan) if scores is None else scores
    return Parts(
        sizes,
        torch.cat([content["nodes_in_graph"].bool(), torch.ones(1, dtype=torch.bool)]),
        content["edges_in_graph"].bool()[rows, columns],
        torch.cat([scores.double(), torch.full((1,), math.nan, dtype=torch.float64)]),
        content["edges_scores"].double()[rows, columns],
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
    missing, known = [name for name in wanted if name not in found], set(wanted)
    more = [name for name in found if name not in known]
    for what, names in [("lacks", missing), ("has unknown", more)]:
        if names:
            raise ValueError(f"{path} {what} {len(names):,} {kind}s for its sizes (first: {names[0]})")
