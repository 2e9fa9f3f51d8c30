"""Edges of a model as those of the Mechanistic Interpretability Benchmark.

The benchmark has an edge for the query, key and value of every head. One of ours that more of them read (a group's key,
all that a head or a layer reads) is several of these.
"""

from __future__ import annotations

import re

import torch
from jaxtyping import Int
from torch import Tensor

from tl_sparsify.core.units import Units
from tl_sparsify.formats.mib_names import Sizes

_WRITER = re.compile(r"embed|L(?P<layer>\d+)(?:H(?P<head>\d+)|MLP)")
_READER = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)|G(?P<group>\d+)|ATTN)(?:\.(?P<part>[qkv]))?")


def owners(units: Units, sizes: Sizes, argument: str) -> Int[Tensor, "edges"]:
    """For each edge of the benchmark the number of the unit that it is, or is a part of; -1 where there is none.

    Raises:
        ValueError: other units than edges, edges at some positions only, of another model or with readers of which one
            is a part of another.
    """
    found: dict[str, int] = {}
    for site, part in zip(units.sites, units.slices, strict=True):
        if site.kind != "edge":
            raise ValueError(f"{argument} has units of kind {site.kind}: give edges alone")
        if site.positions is not None:
            raise ValueError(f"{argument} has edges at some positions only, {site.name(0)}: the format has none")
        columns = list(map(_writer, site.writers))
        for row, reader in enumerate(site.readers):
            for name in _readers(reader, sizes.heads, len(site.readers)):
                for column, writer in enumerate(columns):
                    edge = f"{writer}->{name}"
                    if edge in found:
                        raise ValueError(f"{argument} has the edge {edge} twice: name each by one kind of readers")
                    found[edge] = part.start + row * site.rows + column
    unknown = set(found) - set(sizes.edges)
    if unknown:
        raise ValueError(f"{argument} is of {units!r}, the model has {sizes}: is it of this model?")
    return torch.tensor([found.get(name, -1) for name in sizes.edges])


def _writer(name: str) -> str:
    match = _WRITER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no writer of the benchmark's")
    if match["layer"] is None:
        return "input"
    return f"m{match['layer']}" if match["head"] is None else f"a{match['layer']}.h{match['head']}"


def _readers(name: str, heads: int, many: int) -> list[str]:
    """The benchmark's readers that a reader is, one of so ``many`` in its layer: several for what heads share."""
    match = _READER.fullmatch(name)
    if match is None:
        return [name if name == "logits" else f"m{name.removeprefix('L').removesuffix('MLP')}"]
    if match["head"] is not None:
        own = [int(match["head"])]
    elif match["group"] is not None:
        shared = heads // many
        own = list(range(int(match["group"]) * shared, (int(match["group"]) + 1) * shared))
    else:
        own = list(range(heads))
    return [f"a{match['layer']}.h{head}<{part}>" for head in own for part in match["part"] or "qkv"]
