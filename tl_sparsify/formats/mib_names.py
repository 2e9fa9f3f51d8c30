"""Names of the Mechanistic Interpretability Benchmark: the nodes and edges of a model of given sizes.

Nodes are ``input``, every head (``a0.h1``), every MLP (``m2``) and ``logits``. An edge goes from whatever writes to the
residual stream to whatever reads it later: ``input->a0.h0<q>``, one each for the query, the key and the value of a
head, ``a0.h1->m0``, ``m0->logits``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


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
        return node_names(self.layers, self.heads)

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of all edges: 32,491 for GPT-2 small."""
        return tuple(name for name, _, _ in edge_table(self.layers, self.heads, self.parallel))


@cache
def node_names(layers: int, n: int) -> tuple[str, ...]:
    blocks = [[*(f"a{layer}.h{head}" for head in range(n)), f"m{layer}"] for layer in range(layers)]
    return ("input", *(name for block in blocks for name in block), "logits")


@cache
def edge_table(layers: int, n: int, parallel: bool) -> tuple[tuple[str, str, str], ...]:
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
