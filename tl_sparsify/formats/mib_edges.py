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

_SHARED = re.compile(r"L(?P<layer>\d+)(?:G(?P<group>\d+)|ATTN)")


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
        columns = list(map(_node, site.writers))
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


def _node(name: str) -> str:
    """``L0H1`` is ``a0.h1``, ``L0MLP`` is ``m0``, and ``embed`` the ``input``."""
    head = re.sub(r"L(\d+)H(\d+)", r"a\1.h\2", name.replace("embed", "input"))
    return re.sub(r"L(\d+)MLP", r"m\1", head)


def _readers(name: str, heads: int, many: int) -> list[str]:
    """The benchmark's readers that a reader is, one of so ``many`` in its layer: several for what heads share."""
    whole, _, part = name.partition(".")
    shared = _SHARED.fullmatch(whole)
    if shared is None:
        nodes = [_node(whole)]
    else:
        each = heads // many
        first = int(shared["group"] or 0) * each
        nodes = [f"a{shared['layer']}.h{head}" for head in range(first, first + each)]
    if not nodes[0].startswith("a"):
        return nodes
    return [f"{node}<{letter}>" for node in nodes for letter in part or "qkv"]
