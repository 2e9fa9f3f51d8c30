"""What other packages found, read into ours: auto-circuit's prune scores, ACDC's edges, pyvene's rotations. EAP-IG's
graphs are the benchmark's own files (:func:`mib.load`).

Files are read if they hold tensors and plain values, and nothing else in them is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.core.basis import directions
from tl_sparsify.core.units import Units
from tl_sparsify.formats.mib_files import read_tensor_file
from tl_sparsify.formats.mib_graph import Graph, graph_of_edges
from tl_sparsify.formats.mib_graph import sizes as sizes_of
from tl_sparsify.formats.mib_names import Sizes

__all__ = ["acdc", "auto_circuit", "pyvene"]

_READER = re.compile(r"blocks\.(\d+)\.hook_(q_input|k_input|v_input|attn_in|mlp_in|resid_post)")
_WRITER = re.compile(r"blocks\.(\d+)\.(attn\.hook_result|hook_mlp_out|hook_resid_pre)|hook_embed|hook_pos_embed")
_INSIDE = re.compile(r"blocks\.\d+\.(attn\.hook_(result|q|k|v)|hook_([qkv]_input|mlp_in|mlp_out))")
_WHOLE = ("mlp_in", "resid_post")  # what reads the stream for no head
_COMPONENTS = {
    "block_output": "hook_resid_post",
    "block_input": "hook_resid_pre",
    "mlp_output": "hook_mlp_out",
    "attention_output": "hook_attn_out",
    "mlp_activation": "mlp.hook_post",
}
_WEIGHT = "rotate_layer.parametrizations.weight.original"


def auto_circuit(model: Any, source: str | Path | Mapping[str, Any], *, key: Sequence[str] = ()) -> Graph:
    """Scores of edges as auto-circuit keeps them, ``PruneScores``: for each module that reads the residual stream a
    tensor ``[heads, writers]`` or ``[writers]``. Every edge is in the graph; ``graph.top(n)`` takes the best.

    Args:
        source: the mapping, or a file in which ``torch.save`` put it.
        key: the way to it in a file of several, such as ``("ioi", "EAP")``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything but tensors and plain values; modules or shapes that the model does not
            have; scores by position.

    Example:
        >>> sizes = tls.mib.sizes(model)
        >>> scores = {f"blocks.{i}.hook_{part}_input": torch.rand(4, 1 + 5 * i) for i in range(3) for part in "qkv"}
        >>> scores |= {f"blocks.{i}.hook_mlp_in": torch.rand(5 + 5 * i) for i in range(3)}
        >>> scores |= {"blocks.2.hook_resid_post": torch.rand(16)}
        >>> tls.importers.auto_circuit(model, scores).top(20)
        Graph(... of 17 nodes, ... of 262 edges)
    """
    content: Any = source if isinstance(source, Mapping) else read_tensor_file(Path(source))
    for part in key:
        if part not in _mapping(content):
            raise ValueError(f"key is {tuple(key)}; there is no {part!r} among {', '.join(map(str, content))}")
        content = content[part]
    wrong = [name for name, value in _mapping(content).items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(
            f"source has no tensor for {wrong[0]}: name what is meant by key=, as in key=({wrong[0]!r}, ...)"
        )
    sizes = sizes_of(model)
    found: dict[str, float] = {}
    for module, value in content.items():
        match = _READER.fullmatch(str(module))
        if match is None:
            raise ValueError(f"source scores the module {module!r}, which reads no residual stream")
        layer, part = int(match[1]), match[2]
        writers = _writers(sizes, layer, part)
        shape = (sizes.heads, len(writers)) if part not in ("mlp_in", "resid_post") else (len(writers),)
        if value.shape != shape:
            raise ValueError(
                f"scores of {module} have shape {tuple(value.shape)}, the model needs {shape}: scores by position "
                "or of another model are not read"
            )
        for reader, row in zip(_reader_names(sizes, layer, part), value.reshape(-1, len(writers)), strict=False):
            for names in reader:
                found |= {f"{w}->{names}": score for w, score in zip(writers, row.tolist(), strict=True)}
    return _graph(sizes, found, dict.fromkeys(found, True))


def _mapping(content: Any) -> Mapping[Any, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"source holds a {type(content).__name__}; it must be a mapping from modules to tensors")
    return content


def acdc(model: Any, source: str | Path | Mapping[Any, Any] | Iterable[Any]) -> Graph:
    """Edges as ACDC keeps them, ``(reader, index, writer, index)`` by hook points: a mapping to whether each is there,
    or a list of those that are, alone or with their effects.

    Args:
        source: such edges, with indices as tuples (``(None, None, 3)`` is head 3); or a file in which
            ``save_subgraph`` put them. What ``save_edges`` writes is a pickle, which is not read: turn it into a list
            where it was made, ``[((a, tuple(i.hashable_tuple), b, tuple(j.hashable_tuple)), e) ...]``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds anything but tensors and plain values, edges or heads that the model does not
            have.

    Example:
        >>> edges = [("blocks.2.hook_resid_post", (None,), "blocks.1.attn.hook_result", (None, None, 3)),
        ...          ("blocks.1.hook_v_input", (None, None, 3), "blocks.0.hook_resid_pre", (None,))]
        >>> tls.importers.acdc(model, edges)
        Graph(3 of 17 nodes, 2 of 262 edges)
    """
    content: Any = read_tensor_file(Path(source)) if isinstance(source, str | Path) else source
    if isinstance(content, str | Tensor) or not isinstance(content, Iterable):
        raise ValueError(f"source holds a {type(content).__name__}; it must be a mapping or a list of edges")
    rows = content.items() if isinstance(content, Mapping) else [_with_effect(entry) for entry in content]
    sizes = sizes_of(model)
    known = set(sizes.edges)
    kept: dict[str, bool] = {}
    scores: dict[str, float] = {}
    for parts, value in rows:
        if not isinstance(parts, list | tuple) or len(parts) != 4:
            raise ValueError(f"source has the edge {parts!r}; it must be (reader, index, writer, index)")
        reader, at, writer, from_ = parts
        target, start = _READER.fullmatch(str(reader)), _WRITER.fullmatch(str(writer))
        if target is None or start is None:
            if not all(_INSIDE.fullmatch(str(end)) for end in (reader, writer)):
                raise ValueError(f"source has the edge from {writer} to {reader}, which ACDC does not have")
            continue  # edges within a head, which the graph does not have
        into = _reader_names(sizes, int(target[1]), target[2])
        into = into[0 if target[2] in _WHOLE else _head(sizes, str(reader), at)]
        out = "input" if start[2] in (None, "hook_resid_pre") else f"m{start[1]}"
        if start[2] == "attn.hook_result":
            out = f"a{start[1]}.h{_head(sizes, str(writer), from_)}"
        for name in into:
            edge = f"{out}->{name}"
            if edge not in known:
                raise ValueError(f"source has the edge {edge}, and a model of {sizes} has none: is it of this model?")
            said = isinstance(content, Mapping) or isinstance(value, bool | np.bool_)
            there = value is None or not said or bool(value)
            kept[edge] = kept.get(edge, False) or there
            effect = float(there if value is None else value)
            scores[edge] = max(scores.get(edge, 0.0), effect, key=abs)  # embedding and position are one input
    return _graph(sizes, scores, kept)


def pyvene(model: Any, path: str | Path, *, hook: str | None = None, rank: int | None = None) -> Units:
    """The directions of a rotation that pyvene trained, ``intkey_*.bin`` in a saved folder.

    Args:
        path: the file, or the folder where it has one such file.
        hook: the hook point; where not given what the file's name says of layer and component.
        rank: how many of the directions, the first ones, from 1 to all; those that pyvene interchanges where not given.

    Raises:
        FileNotFoundError: no such file, or several.
        ValueError: a file that holds anything but tensors and plain values, or no whole rotation; a ``rank`` that it
            does not have; a component without a hook point.

    Example:
        >>> rotation = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(0))).Q
        >>> torch.save({"rotate_layer.weight": rotation}, "intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin")
        >>> tls.importers.pyvene(model, ".").names
        ('L1POST0', 'L1POST1')
    """
    path = Path(path)
    files = sorted(path.glob("intkey_*.bin")) if path.is_dir() else [path]
    if len(files) != 1:
        raise FileNotFoundError(f"{path} has {len(files)} files intkey_*.bin: give one of them")
    state = read_tensor_file(files[0])
    basis = _rotation(files[0], state)
    if rank is None and basis.shape[0] == basis.shape[1]:
        dimension = state.get("interchange_dim")
        if dimension is None or int(dimension) >= len(basis):
            raise ValueError(f"{files[0].name} rotates all {len(basis)} directions: say how many are meant by rank=")
        rank = int(dimension)
    if rank is not None and not 1 <= rank <= basis.shape[1]:
        raise ValueError(f"rank is {rank}; {files[0].name} has {basis.shape[1]} directions: give 1 to {basis.shape[1]}")
    if hook is None:
        match = re.search(r"layer[._](\d+)[._]comp[._]([a-z_]+?)[._]unit", files[0].name)
        if match is None or match[2] not in _COMPONENTS:
            raise ValueError(
                f"{files[0].name} does not say at which of {', '.join(_COMPONENTS)} it is: name the hook point by hook="
            )
        hook = f"blocks.{match[1]}.{_COMPONENTS[match[2]]}"
    return directions(model, hook, basis[:, :rank])


def _rotation(path: Path, state: Any) -> Float[Tensor, "width directions"]:
    """The orthonormal columns, from the weight or from what PyTorch's parametrisation keeps of it."""
    if not isinstance(state, Mapping) or not ({"rotate_layer.weight", _WEIGHT} & set(state)):
        raise ValueError(f"{path} holds no rotation: it needs rotate_layer.weight, or its parametrisation")
    name = next(name for name in ("rotate_layer.weight", _WEIGHT) if name in state)
    weight = state[name]
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        found = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{path} holds no rotation: {name} is {found}; it must be a matrix of floating-point numbers")
    if name != _WEIGHT:
        return weight
    prefix = "rotate_layer."
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.eye(*weight.shape, dtype=weight.dtype))
    torch.nn.utils.parametrizations.orthogonal(layer)
    try:
        layer.load_state_dict({name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)})
    except RuntimeError as error:
        raise ValueError(
            f"{path} lacks parts of its parametrised rotation ({' '.join(str(error).split())}): save the whole "
            "state_dict of the rotation, with its base, or rotate_layer.weight itself"
        ) from error
    return layer.weight.detach()


def _with_effect(entry: Any) -> tuple[Any, Any]:
    return (entry[0], entry[1]) if isinstance(entry, list | tuple) and len(entry) == 2 else (entry, None)


def _head(sizes: Sizes, hook: str, index: Any) -> int:
    """The head that an index of ACDC's names: its last part."""
    head = index[-1] if isinstance(index, list | tuple) and index else None
    if head is None or head not in range(sizes.heads):
        raise ValueError(
            f"source has the index {index!r} at {hook}, and a model of {sizes} has heads 0 to {sizes.heads - 1}: name "
            "one as in (None, None, 0)"
        )
    return int(head)


def _writers(sizes: Sizes, layer: int, part: str) -> list[str]:
    """What a reader of a layer reads, in order."""
    count = 1 + layer * (sizes.heads + 1)
    if part == "mlp_in" and not sizes.parallel:
        count += sizes.heads
    return list(sizes.nodes[:-1] if part == "resid_post" else sizes.nodes[:count])


def _reader_names(sizes: Sizes, layer: int, part: str) -> list[list[str]]:
    """For each row of a reader's scores the ends of its edges: ``a0.h1<q>``; for all of a head's input the three."""
    if part in _WHOLE:
        return [["logits" if part == "resid_post" else f"m{layer}"]]
    letters = "qkv" if part == "attn_in" else part[0]
    return [[f"a{layer}.h{head}<{letter}>" for letter in letters] for head in range(sizes.heads)]


def _graph(sizes: Sizes, scores: Mapping[str, float], kept: Mapping[str, bool]) -> Graph:
    there = torch.tensor([kept.get(name, False) for name in sizes.edges])
    found = torch.tensor([scores.get(name, 0.0) for name in sizes.edges], dtype=torch.float64)
    return graph_of_edges(sizes, there, found)
