"""Readers: hook points for what each reader takes in, which TransformerLens does not have.

A *writer* adds to the residual stream: the embedding, a head (its value times its block of ``W_O``), an MLP. A *reader*
takes the stream in: the query, key or value of a head, an attention layer, an MLP, the logits. Here every reader has a
copy of the stream of its own, ``x[r]``, which a hook may change; the norm in front of the reader and the reader's
projection are worked out from that copy, so that readers of one layer may be given different things.

The hook points are ``blocks.{l}.attn.q.edges`` (and ``k``, ``v``), ``blocks.{l}.attn.heads.edges`` (queries, keys and
values of a head together), ``blocks.{l}.attn.edges`` (the layer as one reader), ``blocks.{l}.mlp.edges`` and
``unembed.edges``. Their activation is ``[batch, pos, readers, d_model]``, and their hook also knows what has been
written so far.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

_POINT = re.compile(r"(?:blocks\.(\d+)\.(attn\.q|attn\.k|attn\.v|attn\.heads|attn|mlp)|(unembed))\.edges")
_READS = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.heads": "qkv"}


def reads(hook: str) -> bool:
    """Whether this is the hook point of a reader."""
    return _POINT.fullmatch(hook) is not None


def rows_first(x: Float[Tensor, "batch pos rows d_model"]) -> Float[Tensor, "rows batch pos d_model"]:
    """A view: in memory rows come first, so that products over readers, writers and positions take nothing apart."""
    return x.permute(2, 0, 1, 3)


def rows_last(x: Float[Tensor, "rows batch pos d_model"]) -> Float[Tensor, "batch pos rows d_model"]:
    """As hook points have it, a view."""
    return x.permute(1, 2, 0, 3)


@dataclass(frozen=True)
class Written:
    """What a reader's hook is told: its name, and what has been written into the stream before it; ``stacks``: what
    readers share that are told the same."""

    name: str
    parts: tuple[Float[Tensor, "batch pos _ d_model"], ...]
    stacks: dict[int, Float[Tensor, "batch pos writers d_model"]]

    @property
    def stack(self) -> Float[Tensor, "batch pos writers d_model"]:
        """All that was written, one beside the other."""
        if len(self.parts) not in self.stacks:
            self.stacks.clear()  # of what earlier readers were told none is needed again
            self.stacks[len(self.parts)] = rows_last(torch.cat([rows_first(part) for part in self.parts]))
        return self.stacks[len(self.parts)]


@dataclass
class _Pass:
    """What one forward pass has left so far: what was written, by hook point, and for each reader its own copies of the
    stream (where somebody gave it some), these behind the norm, and which of them are projected."""

    written: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    taken: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    normed: dict[str, Float[Tensor, "batch pos _ d_model"]] = field(default_factory=dict)
    projected: set[tuple[str, str]] = field(default_factory=set)
    stacks: dict[int, Float[Tensor, "batch pos writers d_model"]] = field(default_factory=dict)


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
"""The pass that is under way, which nested interventions share."""


def blocks_that_read(model: Any) -> Iterator[tuple[int, Any]]:
    """Every block with its number.

    Raises:
        ValueError: a model in which the stream is not the sum of what heads and MLPs write, or in which a reader cannot
            be given an input of its own.
    """
    for layer, block in enumerate(model.blocks):
        for norm in ("ln1_post", "ln2_post"):
            if isinstance(getattr(block, norm, None), nn.Module):
                raise ValueError(
                    f"block {layer} has a norm behind its attention or MLP ({norm}): what a head writes is no part of "
                    "the stream by itself, and edges from it are not defined here; use heads() and mlps()"
                )
        points = model.hook_dict
        if f"blocks.{layer}.attn.hook_z" not in points and f"blocks.{layer}.hook_attn_out" in points:
            raise ValueError(f"block {layer} has attention without heads (no hook_z): use attentions() and mlps()")
        both = f"blocks.{layer}.hook_mlp_out" in points and hasattr(block, "attn")
        if both and getattr(model.cfg, "parallel_attn_mlp", False) and not _of_its_own(block):
            raise ValueError(
                f"block {layer}'s attention and MLP read through one norm, so that they cannot be given inputs of "
                "their own: use heads() and mlps()"
            )
        yield layer, block


def _of_its_own(block: Any) -> bool:
    return getattr(block, "ln2", None) is not None or getattr(block, "ln1", None) is None


def reader_hooks(model: Any, hooks: list[tuple[str, Callable[..., Any]]]) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks of TransformerLens that call these functions, in their order, with each reader's copies of the stream;
    what one returns takes their place."""
    acts: dict[str, list[Callable[..., Any]]] = defaultdict(list)
    for name, act in hooks:
        acts[name].append(act)
    made: list[tuple[str, Callable[..., Any]]] = [("blocks.0.hook_in", partial(_begin, model))]
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
        if f"blocks.{layer}.attn.hook_z" in model.hook_dict:
            made.append((f"blocks.{layer}.attn.hook_z", partial(_note_heads, model, layer, block.attn)))
        if f"blocks.{layer}.hook_mlp_out" in model.hook_dict:
            name = f"blocks.{layer}.mlp.edges"
            if name in acts:
                point = "mlp.hook_in" if getattr(block, "ln2", None) is None else "ln2.hook_in"
                made.append((f"blocks.{layer}.{point}", partial(_take_whole, model, name, acts[name])))
            made.append((f"blocks.{layer}.hook_mlp_out", partial(_note_mlp, model, layer)))
    if "unembed.edges" in acts:
        last = f"blocks.{len(model.blocks) - 1}.hook_out"
        point = last if getattr(model, "ln_final", None) is None else "ln_final.hook_in"
        made.append((point, partial(_take_whole, model, "unembed.edges", acts["unembed.edges"])))
    return made


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


def _by_head(
    x: Float[Tensor, "batch pos heads some"], weight: Float[Tensor, "heads some others"]
) -> Float[Tensor, "batch pos heads others"]:
    """Each head's own product; nothing is copied on the way in."""
    made = torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.to(x))
    return made.transpose(0, 1).unflatten(0, x.shape[:2])


def _note_mlp(model: Any, layer: int, out: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
    _PASSES[model].written[f"mlp.{layer}"] = out[:, :, None]


def _acted(
    model: Any, name: str, acts: list[Callable[..., Any]], stream: Float[Tensor, "batch pos readers d_model"]
) -> Float[Tensor, "batch pos readers d_model"]:
    """A reader's copies of the stream after all that is done to them here."""
    state = _PASSES[model]
    there = before(name, bool(getattr(model.cfg, "parallel_attn_mlp", False)))
    hook = Written(name, tuple(part for key, part in state.written.items() if there(key)), state.stacks)
    for act in acts:
        new = act(stream, hook=hook)
        if new is not None:
            stream = state.taken[name] = new
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
    state, whole = _PASSES[model], None
    for name, here in acts.items():
        if name.endswith("attn.edges"):
            whole = _take_whole(model, name, here, stream, hook)
            continue
        copies = state.taken.get(name)
        if copies is None:
            copies = stream[:, :, None].expand(-1, -1, _readers(model, name), -1)
        taken = _acted(model, name, here, copies)
        if name in state.taken:
            inner = getattr(norm, "original_component", None) or norm  # itself: hooks of its own see the stream alone
            state.normed[name] = taken if inner is None else rows_last(_normed(model, norm, inner, rows_first(taken)))
    return whole


def _normed(
    model: Any, norm: Any, inner: Any, copies: Float[Tensor, "readers batch pos d_model"]
) -> Float[Tensor, "readers batch pos d_model"]:
    y, act = inner(copies), _NORMS.get(model)
    return y if act is None else act(norm, copies, y)


def _readers(model: Any, name: str) -> int:
    """How many readers a hook point of attention has."""
    _, layer, _, part, _ = name.split(".")
    attn = model.blocks[int(layer)].attn
    return len(attn.W_Q if part == "q" else attn.W_K)


def _project(
    model: Any, attn: Any, part: str, name: str, own: Float[Tensor, "batch pos heads width"], hook: Any
) -> Float[Tensor, "batch pos heads width"] | None:
    """Queries, keys or values of copies of the stream, where these are no longer what they were."""
    state = _PASSES[model]
    normed = state.normed.get(name)
    if normed is None or (name, part) in state.projected:
        return None
    state.projected.add((name, part))
    weight, bias = getattr(attn, f"W_{part.upper()}").detach(), getattr(attn, f"b_{part.upper()}", None)
    if normed.shape[2] != len(weight):  # several heads share a reader
        normed = normed.repeat_interleave(len(weight) // normed.shape[2], 2)
    made = _by_head(normed, weight)
    return (made if bias is None else made + bias.detach().to(made)).to(own)
