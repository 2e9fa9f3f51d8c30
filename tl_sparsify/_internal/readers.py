"""Readers: hook points for what each reader takes in, which TransformerLens does not have.

A *writer* adds to the residual stream: the embedding, a head (its value times its block of ``W_O``), an MLP. A *reader*
takes the stream in: the query, key or value of a head, an attention layer, an MLP, the logits. Here every reader has a
copy of the stream of its own, ``x[r]``, which a hook may change; the norm in front of the reader and the reader's
projection are worked out from that copy, so that readers of one layer may be given different things.

The hook points are ``blocks.{l}.attn.q.edges`` (and ``k``, ``v``), ``blocks.{l}.attn.heads.edges`` (queries, keys and
values of a head together), ``blocks.{l}.attn.edges`` (the layer as one reader), ``blocks.{l}.mlp.edges`` and
``unembed.edges``. Where heads share keys and values, ``k``, ``v`` and ``heads`` have a reader for each group, and
``key``, ``value`` and ``each`` one for each head. Their activation is ``[batch, pos, readers, d_model]``, and their
hook also knows what has been written so far.

Where a norm stands behind attention (Gemma 2 and 3, OLMo 2), what heads write is summed and passes it before it joins
the stream: ``post(y)``. A reader then has copies of each earlier layer's sum ``y`` as well, and takes in
``x[r] + post(y[r]) - post(y)``: it hears the norm of what it keeps. The activation is ``[batch, pos, terms * readers,
d_model]``, the stream for all readers and then each layer's sum for all of them (:func:`terms`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.layouts import post_norm
from tl_sparsify.reading.heard import Behind, Heard, Ways
from tl_sparsify.reading.written import Ledger, Written

_POINT = re.compile(r"(?:blocks\.(\d+)\.(attn\.(?:q|k|v|heads|key|value|each)|attn|mlp)|(unembed))\.edges")
_READS = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.heads": "qkv"}
_SINGLE = {"attn.key": "k", "attn.value": "v", "attn.each": "qkv"}  # of each head, where heads share keys and values
_READS |= _SINGLE
_KINDS = {"attn": "layer", "attn.heads": "head", "attn.each": "head"}  # all others are the parts of a head
_HEAD = re.compile(r"L(\d+)H\d+")


def reads(hook: str) -> bool:
    """Whether this is the hook point of a reader."""
    return _POINT.fullmatch(hook) is not None


def rows_first(x: Float[Tensor, "batch pos rows d_model"]) -> Float[Tensor, "rows batch pos d_model"]:
    """A view: in memory rows come first, so that products over readers, writers and positions take nothing apart."""
    return x.permute(2, 0, 1, 3)


def rows_last(x: Float[Tensor, "rows batch pos d_model"]) -> Float[Tensor, "batch pos rows d_model"]:
    """As hook points have it, a view."""
    return x.permute(1, 2, 0, 3)


@cache
def terms(writers: tuple[str, ...]) -> tuple[list[int], ...]:
    """Where each writer writes, if norms stand behind attention: first the numbers of those that write into the stream,
    then for each layer those of its heads."""
    layers = [int(match[1]) if (match := _HEAD.fullmatch(name)) else -1 for name in writers]
    return tuple([i for i, layer in enumerate(layers) if layer == one] for one in sorted({-1, *layers}))


def term_count(model: Any, writers: tuple[str, ...]) -> int:
    """How many copies of ``d_model`` numbers a reader of these writers has."""
    return len(terms(writers)) if any(post_norm(block) is not None for block in model.blocks) else 1


def along_edges(
    gradient: Float[Tensor, "batch pos _ d_model"],
    step: Float[Tensor, "batch pos writers d_model"],
    writers: tuple[str, ...],
    readers: int,
) -> Float[Tensor, "batch edges"]:
    """What each writer's step comes to along each reader's gradient: the sum over positions and entries."""

    def along(term: int, columns: slice | list[int]) -> Float[Tensor, "batch readers some"]:
        here = gradient[:, :, term * readers : (term + 1) * readers]
        slopes, ways = (part.transpose(1, 2).flatten(2) for part in (here, step[:, :, columns]))
        return torch.bmm(slopes, ways.transpose(1, 2))

    if gradient.shape[2] == readers:
        return along(0, slice(None)).flatten(1)
    found = step.new_empty(len(step), readers, step.shape[2])
    for term, columns in enumerate(terms(writers)):
        found[:, :, columns] = along(term, columns)
    return found.flatten(1)


@dataclass
class _Pass:
    """What one forward pass has left so far: what was written, by hook point; what goes into the norm behind attention,
    by layer; and for each reader its own copies of the stream (where somebody gave it some) and of these, the former
    behind the reader's norm, and which of them are projected, and what they have lost; and what readers that need no
    copies project."""

    written: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    sums: dict[int, Float[Tensor, "batch pos one d_model"]] = field(default_factory=dict)
    kept: dict[str, tuple[Float[Tensor, "batch pos _ d_model"], ...]] = field(default_factory=dict)
    taken: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    normed: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    projected: set[tuple[str, str]] = field(default_factory=set)
    heard: dict[str, Heard] = field(default_factory=dict)
    ways: Ways = field(default_factory=dict)
    ledgers: dict[int, Ledger] = field(default_factory=dict)
    removed: dict[str, list[Callable[[Tensor], Tensor | None]]] = field(default_factory=dict)


Norm = Callable[[Any, Float[Tensor, "..."], Float[Tensor, "..."]], Float[Tensor, "..."]]
_NORMS: WeakKeyDictionary[Any, Norm] = WeakKeyDictionary()
"""What becomes of a norm's output where its input is a reader's copies, ``act(norm, x, y)``."""


@contextmanager
def norms_of_copies(model: Any, act: Norm) -> Iterator[None]:
    """Change what norms of readers' copies give, where hooks do not see them."""
    before = _NORMS.get(model)
    _NORMS[model] = act
    try:
        yield
    finally:
        del _NORMS[model]
        if before is not None:
            _NORMS[model] = before


_PASSES: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()
"""The pass that is under way, which nested interventions share; there while a context with readers is open."""

Hook = tuple[str, Callable[..., Any]]


@contextmanager
def noting(model: Any, reading: bool, changed: Container[Any]) -> Iterator[list[Hook]]:
    """Hooks that note what is written, for a context to add after its own: all of them for the outermost one with
    readers, and what the last pass left goes when it is left. For one within it those at hook points that are changed
    there, so that what is noted is what is written in the end."""
    if model in _PASSES:
        yield [(name, note) for name, note in _note_hooks(model) if name in changed]
    elif reading:
        _PASSES[model] = _Pass()
        try:
            yield _note_hooks(model)
        finally:
            del _PASSES[model]
    else:
        yield []


def _note_hooks(model: Any) -> list[Hook]:
    """By the hook points' own names."""
    points: Mapping[str, Any] = model.hook_dict  # a bridge makes it anew each time that it is asked
    made: list[Hook] = [("blocks.0.hook_in", partial(_begin, model))]
    for layer, block in enumerate(model.blocks):
        if f"blocks.{layer}.attn.hook_z" in points:
            made.append((f"blocks.{layer}.attn.hook_z", partial(_note_heads, model, layer, block.attn)))
            if post_norm(block) is not None:
                made.append((f"blocks.{layer}.ln1_post.hook_in", partial(_note_sum, model, layer)))
        if f"blocks.{layer}.hook_mlp_out" in points:
            made.append((f"blocks.{layer}.hook_mlp_out", partial(_note_mlp, model, layer)))
    return [(points[name].name or name, note) for name, note in made]


def reader_hooks(model: Any, hooks: list[Hook]) -> list[Hook]:
    """Hooks of TransformerLens that call these functions, in their order, with each reader's copies of the stream;
    what one returns takes their place."""
    acts: dict[str, list[Callable[..., Any]]] = defaultdict(list)
    for name, act in hooks:
        acts[name].append(act)
    made: list[Hook] = []
    for layer, block in enumerate(model.blocks):
        attention = {name: here for name, here in acts.items() if name.startswith(f"blocks.{layer}.attn.")}
        if attention:
            norm = getattr(block, "ln1", None)
            point = f"blocks.{layer}.attn.hook_in" if norm is None else f"blocks.{layer}.ln1.hook_in"
            made.append((point, partial(_take_attention, model, norm, attention)))
            for name in attention:
                for part in _READS.get(name.removeprefix(f"blocks.{layer}.").removesuffix(".edges"), ""):
                    project = partial(_project, model, block.attn, part, name)
                    made.append((f"blocks.{layer}.attn.{part}.hook_out", project))
            if _single(layer, attention):
                many = partial(_repeated, model, layer, len(block.attn.W_Q))
                made += [(f"blocks.{layer}.attn.{point}", many) for point in ("k.hook_out", "v.hook_out", "hook_rot_q")]
        if (name := f"blocks.{layer}.mlp.edges") in acts:
            point = "mlp.hook_in" if getattr(block, "ln2", None) is None else "ln2.hook_in"
            made.append((f"blocks.{layer}.{point}", partial(_take_whole, model, name, acts[name])))
    if "unembed.edges" in acts:
        last = f"blocks.{len(model.blocks) - 1}.hook_out"
        point = last if getattr(model, "ln_final", None) is None else "ln_final.hook_in"
        made.append((point, partial(_take_whole, model, "unembed.edges", acts["unembed.edges"])))
    return made


def first_hooks(model: Any, names: list[str]) -> list[Hook]:
    """Hooks that must come before all others: attention's output as others know it, where each head had keys and values
    of its own. TransformerLens repeats these once more for each head of a group, and so are queries: all are equal."""
    found = (re.fullmatch(rf"blocks\.(\d+)\.(?:{'|'.join(_SINGLE)})\.edges", name) for name in names)
    layers = sorted({int(match[1]) for match in found if match})
    return [
        (f"blocks.{layer}.attn.hook_z", partial(_once, model, layer, len(model.blocks[layer].attn.W_Q)))
        for layer in layers
    ]


def _single(layer: int, names: Iterable[str]) -> bool:
    return any(f"blocks.{layer}.{reader}.edges" in names for reader in _SINGLE)


def _repeated(
    model: Any, layer: int, heads: int, own: Float[Tensor, "batch pos ..."], hook: Any
) -> Float[Tensor, "batch pos ..."] | None:
    """Keys and values as often as there are heads, and queries as often as TransformerLens then has keys."""
    width = model.blocks[layer].attn.W_K.shape[2]
    many = heads // len(model.blocks[layer].attn.W_K)
    apart = own if own.ndim == 4 else own.unflatten(2, (-1, width))
    queries = hook.name.endswith("hook_rot_q")
    if not _single(layer, _PASSES[model].taken) or apart.shape[2] != (heads if queries else heads // many):
        return None
    return apart.repeat_interleave(many, 2) if queries else apart.repeat_interleave(many, 2).flatten(2)


def _once(
    model: Any, layer: int, heads: int, z: Float[Tensor, "batch pos ..."], hook: Any
) -> Float[Tensor, "batch pos heads width"] | None:
    if z.ndim == 4 or not _single(layer, _PASSES[model].taken):
        return None
    return z.unflatten(2, (heads, -1, model.blocks[layer].attn.W_V.shape[2]))[:, :, :, 0]


def before(name: str, parallel: bool) -> Callable[[str], bool]:
    """Whether what was written under a key is there when the reader of this hook point takes the stream in."""
    match = _POINT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no hook point of a reader")
    if match[3]:
        return lambda key: True
    layer, mlp = int(match[1]), match[2] == "mlp"

    def earlier(key: str) -> bool:
        kind, _, where = key.partition(".")
        beside = mlp and kind == "heads" and not parallel
        return kind == "embed" or int(where) < layer + beside

    return earlier


def _begin(model: Any, stream: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
    _PASSES[model] = _Pass({"embed.0": stream[:, :, None]})


def _note_heads(model: Any, layer: int, attn: Any, z: Float[Tensor, "batch pos heads width"], hook: Any) -> None:
    _PASSES[model].written[f"heads.{layer}"] = _by_head(z, attn.W_O.detach())


def _note_sum(model: Any, layer: int, out: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
    _PASSES[model].sums[layer] = out[:, :, None]


def _by_head(
    x: Float[Tensor, "batch pos heads some"], weight: Float[Tensor, "heads some others"]
) -> Float[Tensor, "batch pos heads others"]:
    """Each head's own product; nothing is copied on the way in."""
    made = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.to(x))
    return made.transpose(0, 1).unflatten(0, x.shape[:2])


def _note_mlp(model: Any, layer: int, out: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
    _PASSES[model].written[f"mlp.{layer}"] = out[:, :, None]


def _acted(
    model: Any,
    name: str,
    acts: list[Callable[..., Any]],
    stream: Float[Tensor, "batch pos readers d_model"],
    heard: Heard | None = None,
) -> Float[Tensor, "batch pos readers d_model"]:
    """A reader's copies of the stream after all that is done to them here."""
    state = _PASSES[model]
    there = before(name, bool(getattr(model.cfg, "parallel_attn_mlp", False)))
    parts = tuple(part for key, part in state.written.items() if there(key))
    hook = Written(name, parts, state.ledgers, state.removed.setdefault(name, []), heard)
    layers = [layer for layer in state.sums if there(f"heads.{layer}")]
    had = state.kept.get(name) or tuple(state.sums[layer] for layer in layers)
    copies = rows_last(torch.cat([rows_first(part.expand_as(stream)) for part in (stream, *had)])) if had else stream
    changed = False
    for act in acts:
        new = act(copies, hook=hook)
        if isinstance(new, Heard):
            state.heard[name] = new
        elif new is not None:
            copies, changed = new, True
    if not changed:
        return stream
    if state.heard.pop(name, None) is not None:
        raise ValueError(f"{name} is recorded without copies, and then changed")
    stream, *kept = copies.split(stream.shape[2], 2)
    state.kept[name] = tuple(kept)
    for layer, old, new in zip(layers, had, kept, strict=True):
        block = model.blocks[layer]
        new, old = (_normed(model, block.ln1_post, post_norm(block), rows_first(part)) for part in (new, old))
        stream = stream + rows_last(new - old)
    state.taken[name] = stream
    return stream


def _take_whole(
    model: Any, name: str, acts: list[Callable[..., Any]], stream: Float[Tensor, "batch pos d_model"], hook: Any
) -> Float[Tensor, "batch pos d_model"]:
    return _acted(model, name, acts, stream[:, :, None])[:, :, 0]


def _take_attention(
    model: Any,
    norm: Any,
    acts: dict[str, list[Callable[..., Any]]],
    stream: Float[Tensor, "batch pos d_model"],
    hook: Any,
) -> Float[Tensor, "batch pos d_model"] | None:
    state, whole, behind = _PASSES[model], None, Behind(norm, stream)
    for name, here in acts.items():
        if name.endswith("attn.edges"):
            whole = _take_whole(model, name, here, stream, hook)
            continue
        copies, heard = state.taken.get(name), None
        if copies is None:
            attn, many = model.blocks[int(name.split(".")[1])].attn, _readers(model, name)
            copies = stream[:, :, None].expand(-1, -1, many, -1)
            if not (state.sums or whole is not None or name.split(".", 2)[2].removesuffix(".edges") in _SINGLE):
                heard = Heard(name, attn, many, behind) if model not in _NORMS else None
        taken = _acted(model, name, here, copies, heard)
        if name in state.taken:
            inner = getattr(norm, "original_component", None) or norm  # itself: hooks of its own see the stream alone
            state.normed[name] = taken if inner is None else rows_last(_normed(model, norm, inner, rows_first(taken)))
    _check_apart(int(next(iter(acts)).split(".")[1]), {*state.taken, *state.heard})
    return whole


def _check_apart(layer: int, names: Container[str]) -> None:
    """Refuse readers of which one is a part of another: what each takes in is worked out from its own copy alone."""
    there = {part for part in ("attn", *_READS) if f"blocks.{layer}.{part}.edges" in names}
    if there & _SINGLE.keys() and there & {"attn.k", "attn.v", "attn.heads"}:
        raise ValueError(
            f"edges into the shared keys and values of block {layer} are removed, and edges into single ones"
        )
    kinds = sorted({_KINDS.get(part, "qkv") for part in there})
    if len(kinds) > 1:
        raise ValueError(
            f"units have edges into readers of block {layer} of the kinds {' and '.join(kinds)}, of which one is a "
            "part of the other: remove or score those of one kind alone, tls.edges(model, readers=...)"
        )


def _normed(
    model: Any, norm: Any, inner: Any, copies: Float[Tensor, "readers batch pos d_model"]
) -> Float[Tensor, "readers batch pos d_model"]:
    y, act = inner(copies), _NORMS.get(model)
    return y if act is None else act(norm, copies, y)


def _readers(model: Any, name: str) -> int:
    """How many readers a hook point of attention has."""
    _, layer, _, part, _ = name.split(".")
    attn = model.blocks[int(layer)].attn
    return len(attn.W_Q if part == "q" or f"attn.{part}" in _SINGLE else attn.W_K)


def _project(
    model: Any, attn: Any, part: str, name: str, own: Float[Tensor, "batch pos ..."], hook: Any
) -> Float[Tensor, "batch pos ..."] | None:
    """Queries, keys or values of copies of the stream, where these are no longer what they were."""
    state = _PASSES[model]
    if name in state.heard:
        return state.heard[name].note(part, own, state.ways)
    normed = state.normed.get(name)
    if normed is None or (name, part) in state.projected:
        return None
    state.projected.add((name, part))
    weight, bias = getattr(attn, f"W_{part.upper()}").detach(), getattr(attn, f"b_{part.upper()}", None)
    shared, more = len(weight) < normed.shape[2], normed.shape[2] // len(weight)
    if shared:  # several readers, one for each head, have keys or values in common
        weight = weight.repeat_interleave(more, 0)
        bias = None if bias is None else bias.repeat_interleave(more, 0)
    elif not more:  # several heads share a reader
        normed = normed.repeat_interleave(len(weight) // normed.shape[2], 2)
    made = _by_head(normed, weight)
    made = (made if bias is None else made + bias.detach().to(made)).to(own)
    return made.flatten(2) if shared else made
