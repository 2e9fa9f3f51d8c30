"""Readers: what takes the residual stream in, and the gradient of an output with respect to what each takes in.

A reader is the query, key or value of a head, an MLP, or the logits. Each is thought of as having a copy of the stream
of its own. No copy is made, and no setting of the model changed: the gradient at a head's query goes back through its
weights and the norm in front of attention; what an MLP adds to the stream's gradient is the difference between the
stream's gradients before and behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify.core.forward import frozen
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units


@dataclass(frozen=True)
class Reader:
    """What takes the stream in at one place of the model: the queries (or keys, or values) of a layer's heads, its MLP,
    or the logits.

    Attributes:
        layer, part: ``q``, ``k``, ``v``, ``mlp`` or ``logits``.
        names: one for each head, or one.
        place: what comes first is at a lower place; attention of layer ``l`` is at ``2 l``, its MLP at ``2 l + 1``
            (where it reads what attention reads, at ``2 l``), and the logits behind them all.
    """

    layer: int
    part: str
    names: tuple[str, ...]
    place: int


def _parallel(model: Any) -> bool:
    """Whether an MLP reads what its layer's attention reads."""
    return bool(getattr(model.cfg, "parallel_attn_mlp", False))


def readers_of(model: Any) -> tuple[Reader, ...]:
    """All readers of a ``TransformerBridge``, in order. No model pass.

    Raises:
        ValueError: grouped-query attention.
    """
    found: list[Reader] = []
    for layer, block in enumerate(model.blocks):
        if f"blocks.{layer}.attn.hook_q" in model.hook_dict:
            heads, shared = block.attn.W_O.shape[0], block.attn.W_K.shape[0]
            if heads != shared:
                raise ValueError(
                    f"block {layer} has {shared} key and value heads for {heads} heads (grouped-query attention): "
                    "edges into single heads are not defined; use attribution_patching"
                )
            for part in "qkv":
                names = tuple(f"L{layer}H{head}.{part}" for head in range(heads))
                found.append(Reader(layer, part, names, 2 * layer))
        if f"blocks.{layer}.hook_mlp_out" in model.hook_dict:
            found.append(Reader(layer, "mlp", (f"L{layer}MLP",), 2 * layer + (not _parallel(model))))
    last = len(model.blocks) - 1
    return (*found, Reader(last, "logits", ("logits",), 2 * last + 2))


def taps(model: Any, readers: tuple[Reader, ...]) -> Units:
    """Where gradients are taken: the stream before each block, before its MLP (where that comes after attention) and
    at the end; queries, keys and values. The layers of these sites are no layers: their names must differ."""
    parts = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v"}
    parts |= {} if _parallel(model) else {"mlp": "hook_resid_mid"}
    hooks = {_stream(model, layer): 0 for layer in range(len(model.blocks) + 1)}
    hooks |= {f"blocks.{r.layer}.{parts[r.part]}": len(r.names) * (r.part != "mlp") for r in readers if r.part in parts}
    kinds = ("residual", "head")
    return Units(tuple(Site(kinds[n > 0], i, hook, max(1, n)) for i, (hook, n) in enumerate(hooks.items())))


def _stream(model: Any, layer: int) -> str:
    """The hook point of the stream before a block, or after the last one."""
    last = len(model.blocks) - 1
    return f"blocks.{layer}.hook_resid_pre" if layer <= last else f"blocks.{last}.hook_resid_post"


@dataclass(frozen=True)
class Slopes:
    """Activations of one forward pass, and the metric's gradients with respect to them, by hook point; readers' are
    worked out from those of the stream and of queries, keys and values."""

    model: Any
    activations: dict[str, Float[Tensor, "..."]]
    gradients: dict[str, Float[Tensor, "..."]]

    def taken_in(self, reader: Reader, most: int) -> Iterator[Float[Tensor, "batch pos some d_model"]]:
        """The gradients with respect to what readers take in, for up to ``most`` of them at a time."""
        if reader.part in "qkv":
            for first in range(0, len(reader.names), most):
                yield self._normed(reader.layer, self._projected(reader.layer, reader.part, first, first + most))
            return
        after = self.gradients[_stream(self.model, reader.layer + 1)]
        if reader.part == "logits":
            yield after[:, :, None]
        elif not _parallel(self.model):  # the stream goes on past the MLP
            yield (self.gradients[f"blocks.{reader.layer}.hook_resid_mid"] - after)[:, :, None]
        else:
            heads = [self._projected(reader.layer, part, 0, None).sum(2, keepdim=True) for part in "qkv"]
            attention = self._normed(reader.layer, sum(heads[1:], heads[0]))
            yield (self.gradients[_stream(self.model, reader.layer)] - after)[:, :, None] - attention

    def _projected(
        self, layer: int, part: str, first: int, last: int | None
    ) -> Float[Tensor, "batch pos some d_model"]:
        attn = self.model.blocks[layer].attn
        weight = {"q": attn.W_Q, "k": attn.W_K, "v": attn.W_V}[part][first:last]
        gradient = self.gradients[f"blocks.{layer}.attn.hook_{part}"][:, :, first:last]
        return torch.einsum("bphe,hde->bphd", gradient, weight.detach().to(gradient))

    def _normed(
        self, layer: int, gradient: Float[Tensor, "batch pos some d_model"]
    ) -> Float[Tensor, "batch pos some d_model"]:
        """From after the norm in front of attention to before it: each reader has a copy of the stream of its own."""
        norm = getattr(self.model.blocks[layer], "ln1", None)
        if norm is None:
            return gradient
        stream = self.activations[_stream(self.model, layer)].detach()
        copies = stream[:, :, None].expand_as(gradient).flatten(1, 2).clone().requires_grad_()
        with frozen(self.model), torch.enable_grad():
            [found] = torch.autograd.grad(norm(copies), copies, gradient.flatten(1, 2))
        return found.view_as(gradient)
