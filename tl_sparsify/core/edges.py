"""Edges: what one writer gives to one reader, as a unit.

The residual stream is a sum, so that each reader's input can lose what one writer put into it and nothing else:

    x[r] -> x[r] - sum_u (1 - keep[u, r]) (w_u - c_u),

which is the one primitive ``value + keep * (v - value)`` for every edge, whose value ``v`` is what its writer writes.
Where a norm stands behind attention the heads of a layer are taken from that layer's sum, before its norm.
The readers' norms and projections are worked out from there, so that an ablation of any number of edges is one forward
pass, and all that takes units takes edges. Keeping every edge of some heads is keeping the heads; a removed edge alone
is path patching from writer to reader with everything else frozen at what it then computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.layouts import blocks_that_read, check_apart
from tl_sparsify._internal.readers import rows_first, rows_last, terms
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.site import Site, check_places
from tl_sparsify.core.units import Units, blocks_of
from tl_sparsify.reading.written import Written

Readers = Literal["qkv", "head", "layer"]
_READERS: tuple[Readers, ...] = ("qkv", "head", "layer")


@checked
def edges(model: Any, readers: Readers = "qkv", *, grouped: bool = True) -> Units:
    """Every edge from the embedding, a head or an MLP to a later reader: ``L0H1->L2H3.q``, ``embed->L0H0.k``,
    ``L3MLP->logits``; value what the writer writes, a ``d_model`` vector per position. No model pass.

    Args:
        readers: ``qkv``: the query, key and value of each head, each MLP, the logits. Where heads share keys and values
            (grouped queries) a group has one reader of each, ``L2G0.k``. ``head``: what a head (or, there, a group)
            reads for all three. ``layer``: what an attention layer reads, ``L2ATTN``. Edges of two of these are not
            removed or scored together: one reader is a part of another.
        grouped: whether heads that share keys and values share a reader. ``False``: each head has its own, ``L2H1.k``,
            as the Mechanistic Interpretability Benchmark counts edges; what it reads goes through the shared weights.

    Beside edges take heads, neurons and whole MLPs alone: where attention's output or the stream is set behind a writer
    (``attentions``, ``residuals``, directions), an edge from it still loses what was written, whatever is left of that.

    Edges do not fold: which part of the stream a weight sees is no property of the weight.

    Where norms stand behind attention and MLPs (Gemma 2 and 3, OLMo 2 and 3) a head writes into its layer's sum, and a
    reader hears the norm of what it keeps of that: its copies take memory for every earlier layer. An MLP writes what
    comes out of its norm.

    Raises:
        ValueError: another ``readers``; ``grouped=False`` where heads cannot be given keys and values of their own; a
            model of which it is not known that its stream is the sum of what heads and
            MLPs write (norms behind them, in another architecture), or whose attention and MLP read through one norm.

    Example:
        >>> found = tls.edges(model)
        >>> found, found.names[0], found.names[-1]
        (Units(262: 262 edges), 'embed->L0H0.q', 'L2MLP->logits')
    """
    if readers not in _READERS:
        raise ValueError(f"readers is {readers!r}; it is qkv, head or layer")
    blocks_of(model)
    writers: list[str] = ["embed"]
    sites: list[Site] = []

    def add(layer: int, hook: str, names: tuple[str, ...], from_: list[str]) -> None:
        size = len(names) * len(from_)
        sites.append(Site("edge", layer, f"{hook}.edges", size, writers=tuple(from_), readers=names))

    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    for layer, block in blocks_that_read(model):
        before = list(writers)
        if f"blocks.{layer}.attn.hook_z" in model.hook_dict:
            heads, groups = len(block.attn.W_O), len(block.attn.W_K)
            single = tuple(f"L{layer}H{head}" for head in range(heads))
            apart = groups != heads and not grouped
            if apart and readers != "layer":
                check_apart(layer, block.attn)
            each = groups == heads or apart
            shared = single if each else tuple(f"L{layer}G{group}" for group in range(groups))
            if readers == "qkv":
                points = {"q": "q", "k": "key", "v": "value"} if apart else {"q": "q", "k": "k", "v": "v"}
                for part, point in points.items():
                    names = tuple(f"{name}.{part}" for name in (single if part == "q" else shared))
                    add(layer, f"blocks.{layer}.attn.{point}", names, before)
            elif readers == "head":
                add(layer, f"blocks.{layer}.attn.{'each' if apart else 'heads'}", shared, before)
            else:
                add(layer, f"blocks.{layer}.attn", (f"L{layer}ATTN",), before)
            writers += single
        if f"blocks.{layer}.hook_mlp_out" in model.hook_dict:
            add(layer, f"blocks.{layer}.mlp", (f"L{layer}MLP",), before if parallel else list(writers))
            writers.append(f"L{layer}MLP")
    add(len(model.blocks) - 1, "unembed", ("logits",), writers)
    return Units(tuple(sites))


def apply_to_edges(
    site: Site,
    keep: Float[Tensor, "*batch some"],
    value: Float[Tensor, "..."],
    mixing: None,
    spared: Callable[[], Bool[Tensor, "batch pos"] | None],
    stream: Float[Tensor, "batch pos copies d_model"],
    hook: Written,
) -> Float[Tensor, "batch pos copies d_model"]:
    """A reader's stream less ``(1 - keep) (v - value)`` for everything written into it, and so each layer's sum where
    the reader has copies of these; ``v`` is what was written, or what earlier interventions made of that."""
    check_places(site, stream)
    gone = (1 - keep.to(stream)).unflatten(-1, (len(site.readers), site.rows))
    if gone.ndim == 3 and len(gone) != len(stream):
        raise ValueError(f"keep is for {len(gone)} examples, {site.hook} saw a batch of {len(stream)}")
    if sum(part.shape[2] for part in hook.parts) != site.rows:
        raise ValueError(f"{site.hook} has other writers than {site.rows}: are the units those of this model?")
    check_run(site, value, stream)
    if not gone.requires_grad and not bool((gone != 0).any()):
        return stream
    value = rows_first(value.to(stream)) if value.ndim == 4 else value.to(stream)[:, None, None]
    starts = list(accumulate((part.shape[2] for part in hook.parts), initial=0))[:-1]
    groups = terms(site.writers) if stream.shape[2] > len(site.readers) else (slice(None),)
    where, first = site.position_mask(stream.shape[0], stream.shape[1]), spared()
    # what is noted lives as long as the pass: without the stream, and without a way back to itself
    like, earlier, written = stream.new_empty(0), tuple(hook.removed), replace(hook, removed=[])

    def change(share: Float[Tensor, "*batch readers rows"]) -> Float[Tensor, "copies batch pos d_model"] | None:
        """What this share of each edge becomes, less what it is by now."""
        lost = gone * share
        if not lost.requires_grad and not bool((lost != 0).any()):
            return None  # other edges
        changes: list[Tensor] = []
        for term, some in enumerate(groups):
            numbers = [number for number, start in enumerate(starts) if isinstance(some, slice) or start in some]
            part = lost[..., some]
            changes.append(_shared(part, value[some]) - written.sums(part, like, term, numbers))
        made = changes[0] if len(changes) == 1 else torch.cat(changes)
        for before in earlier:
            if (gone_before := before(lost)) is not None:
                made = made - gone_before
        if where is not None:
            made = made * where.to(made)[..., None]
        if first is not None:
            made = made.masked_fill(first.to(made.device)[..., None], 0)
        return made

    hook.removed.append(change)
    made = change(torch.ones_like(gone))
    return stream if made is None else rows_last(rows_first(stream) + made)


def check_run(site: Site, value: Float[Tensor, "..."], here: Float[Tensor, "batch pos ..."]) -> None:
    """Refuse the values of a run of another shape than this one's.

    Raises:
        ValueError: values of other numbers of examples or positions.
    """
    if value.ndim == 4 and value.shape[:2] != here.shape[:2]:
        raise ValueError(
            f"values of {site.hook} are those of a run of shape {tuple(value.shape[:2])}, this one has "
            f"{tuple(here.shape[:2])}: base and source need equal shapes (pad both to one width)"
        )


def _shared(
    share: Float[Tensor, "*batch readers rows"], x: Float[Tensor, "rows #batch #pos d_model"]
) -> Float[Tensor, "readers #batch #pos d_model"]:
    """Each reader's sum of rows, by its own shares of them."""
    if share.ndim == 2:
        return (share @ x.flatten(1)).view(-1, *x.shape[1:])
    return torch.einsum("brw,wbpd->rbpd", share, x.expand(-1, len(share), -1, -1))


@dataclass(frozen=True)
class LooseEnds:
    """Which heads and MLPs a circuit of edges leaves without a way in, and which without a way out.

    Attributes:
        unfed: no edge into them is kept, and yet what they write is read on the way to the logits.
        unread: some edge into them is kept, and nothing that they write is read on a way to the logits; of heads that
            share a reader, where this is so of all of them.

    Example:
        >>> tls.loose_ends(tls.Circuit.full(tls.edges(model)))
        LooseEnds(unfed=(), unread=())
    """

    unfed: tuple[str, ...]
    unread: tuple[str, ...]


@checked
def loose_ends(circuit: Circuit) -> LooseEnds:
    """Heads and MLPs that a circuit of edges leaves without input, or without a way to the logits. No model pass.

    Raises:
        ValueError: a circuit without edges.

    Example:
        >>> found = tls.edges(model)
        >>> tls.loose_ends(tls.Circuit.of(found, ["embed->L0H0.q", "L1H1->logits"]))
        LooseEnds(unfed=('L1H1',), unread=('L0H0',))
    """
    ways = _Ways.of(circuit)
    leads = ways.leading()
    inner = [w for w in ways.writers if w != "embed"]
    unread: set[str] = set()
    for site, kept in ways.sites:
        for reader, there in zip(site.readers, kept.any(1).tolist(), strict=True):
            behind = ways.behind(reader)
            if there and not any(leads.get(w, True) for w in behind):
                unread |= set(behind)
    unfed = tuple(w for w in inner if leads[w] and not ways.fed(w))
    return LooseEnds(unfed, tuple(w for w in inner if w in unread))


@checked
def prune(circuit: Circuit) -> Circuit:
    """The circuit without the edges from which nothing leads to the logits: the model computes the same without them.
    No model pass.

    What is read at other positions, or through edges that are not among the units, counts as read. Numbers change all
    the same where attention looks both ways and a first token is left alone, which may read what nothing else does.

    Raises:
        ValueError: a circuit without edges.

    Example:
        >>> found = tls.edges(model)
        >>> tls.prune(tls.Circuit.of(found, ["embed->L0H0.q", "embed->L1H1.v", "L1H1->logits"])).names
        ('embed->L1H1.v', 'L1H1->logits')
    """
    ways = _Ways.of(circuit)
    leads = ways.leading()
    mask = circuit.mask.clone()
    for site, part in zip(circuit.units.sites, circuit.units.slices, strict=True):
        if site.kind == "edge":
            read = torch.tensor([any(leads.get(w, True) for w in ways.behind(r)) for r in site.readers])
            mask[part] &= read.repeat_interleave(site.rows)
    return replace(circuit, mask=mask)


@dataclass(frozen=True)
class _Ways:
    """The kept edges by site ``[readers, writers]``, all writers in order, and how many heads share a group's keys."""

    sites: tuple[tuple[Site, Bool[Tensor, "_ _"]], ...]
    writers: tuple[str, ...]

    @staticmethod
    def of(circuit: Circuit) -> _Ways:
        units = circuit.units
        found = [
            (site, circuit.mask[part].view(len(site.readers), -1))
            for site, part in zip(units.sites, units.slices, strict=True)
            if site.kind == "edge"
        ]
        if not found:
            raise ValueError(f"circuit is of {units!r}, without edges: tls.edges(model) gives some")
        return _Ways(tuple(found), max((site.writers for site, _ in found), key=len))

    def behind(self, reader: str) -> list[str]:
        """Who reads through this reader: writers, the logits, or, where no edge of the units is from its heads, the
        reader itself."""
        name, _, _ = reader.partition(".")
        layer, kind, number = _parts(name)
        if kind not in ("G", "ATTN"):
            return [name]
        heads = [w for w in self.writers if w.startswith(f"L{layer}H")]
        if kind == "ATTN" or not heads:
            return heads or [name]
        groups = max(len(site.readers) for site, _ in self.sites if site.readers[0].startswith(f"L{layer}G"))
        many = len(heads) // groups
        return heads[number * many : (number + 1) * many]

    def into(self, owner: str) -> Iterator[tuple[Site, Bool[Tensor, "writers"]]]:
        """The kept edges into each of the readers of a head, an MLP or the logits."""
        for site, kept in self.sites:
            for number, reader in enumerate(site.readers):
                if owner in self.behind(reader):
                    yield site, kept[number]

    def whole(self, owner: str) -> bool:
        """Whether all that it reads goes through these edges, at every position."""
        there = {site.hook.removesuffix(".edges").rpartition(".")[2] for site, _ in self.into(owner)}
        everywhere = all(site.positions is None for site, _ in self.into(owner))
        parts = bool("q" in there and there & {"k", "key"} and there & {"v", "value"})
        return everywhere and (parts or bool(there & {"attn", "heads", "each", "mlp", "unembed"}))

    def fed(self, owner: str) -> bool:
        """Whether it reads anything but constants."""
        return not self.whole(owner) or any(bool(kept.any()) for _, kept in self.into(owner))

    def leading(self) -> dict[str, bool]:
        """Whether what each writer writes is read on a way to the logits."""
        leads = {"logits": True}
        read: set[str] = set()
        everything = False
        for owner in ("logits", *reversed(self.writers)):
            leads[owner] = owner == "logits" or everything or owner in read
            if not leads[owner]:
                continue
            everything |= owner != "embed" and not self.whole(owner)
            for site, kept in self.into(owner):
                read |= {writer for writer, there in zip(site.writers, kept.tolist(), strict=True) if there}
        return leads


def _parts(name: str) -> tuple[int, str, int]:
    """Layer, kind and number of a writer or reader: of ``L2G0`` 2, ``G`` and 0."""
    match = re.fullmatch(r"L(\d+)(H|G|MLP|ATTN)(\d*)", name)
    return (int(match[1]), match[2], int(match[3] or 0)) if match else (0, name, 0)
