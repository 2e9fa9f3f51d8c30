"""Making the attention and MLP modules that a TransformerLens bridge wraps smaller, in place.

Every module keeps its class of weights, its bridge and its hook points; only sizes change. What a layer's sizes are is
read from its weights, never from ``cfg``, which fits no single layer of a folded model. Two cases need code of their
own: query heads that share key/value heads unevenly (one index per layer says who reads what), and a layer without
any head or neuron left (it adds its bias, and its hook points still fire).
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import AttentionBridge, LinearBridge, MLPBridge
from transformers.pytorch_utils import Conv1D

Shares = tuple[Int[Tensor, "entries"], Int[Tensor, "entries"], Float[Tensor, "entries"]]
"""Inputs that leave, inputs that stay, and how much of the latter the former are made of."""


def transposed(module: nn.Module) -> bool:
    """Whether a linear map stores its weight as ``[inputs, outputs]`` (GPT-2) and not ``[outputs, inputs]``."""
    return isinstance(module, Conv1D)


def inputs_of(module: Any) -> int:
    """How many inputs a linear map has, also where its weight is packed (quantised) or not here."""
    return module.nx if transposed(module) else module.in_features


def set_linear(module: Any, weight: Float[Tensor, "a b"], bias: Float[Tensor, "outputs"] | None) -> None:
    """Give a linear map new parameters of any size, in its own layout; gradients are wanted as they were."""
    wanted = module.weight.requires_grad
    module.weight = nn.Parameter(weight, requires_grad=wanted)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=wanted if module.bias is None else module.bias.requires_grad)
    if transposed(module):
        module.nx, module.nf = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def keep_outputs(module: Any, kept: Int[Tensor, "kept"]) -> None:
    """Keep the named outputs of a linear map."""
    kept = kept.to(module.weight.device)
    weight = module.weight.detach().index_select(1 if transposed(module) else 0, kept)
    set_linear(module, weight, None if module.bias is None else module.bias.detach().index_select(0, kept))


def keep_inputs(
    module: Any, kept: Int[Tensor, "kept"], constants: Float[Tensor, "inputs"] | None, shares: Shares | None = None
) -> None:
    """Keep the named inputs of a linear map. The others' ``constants`` go into its bias, which it may not have yet;
    what ``shares`` makes them of kept inputs goes into the weights of these.

    Sums are taken in float64 and rounded once.
    """
    dimension = 0 if transposed(module) else 1
    weight, bias = module.weight.detach(), module.bias
    if constants is not None:
        gone = torch.ones(len(constants), dtype=torch.bool).index_fill_(0, kept.cpu(), False).nonzero().flatten()
        columns = weight.index_select(dimension, gone.to(weight.device)).to("cpu", torch.float64)
        moved = constants.to("cpu", weight.dtype).double()[gone] @ (columns if dimension == 0 else columns.T)
        total = moved if bias is None else moved + bias.detach().to("cpu", torch.float64)
        bias = total.to(weight.device, weight.dtype)
    if shares is not None:
        leaving, staying, factors = (part.to("cpu") for part in shares)
        exact, factors = weight.to("cpu", torch.float64), factors.double()
        moved = exact.index_select(dimension, leaving) * (factors[:, None] if dimension == 0 else factors)
        weight = exact.index_add(dimension, staying, moved).to(weight)
    set_linear(module, weight.index_select(dimension, kept.to(weight.device)), None if bias is None else bias.detach())


def columns(heads: Int[Tensor, "heads"], d_head: int) -> Int[Tensor, "columns"]:
    """The places of some heads in a dimension that holds ``d_head`` numbers for each head."""
    return (heads[:, None] * d_head + torch.arange(d_head)).flatten()


def n_neurons(mlp: Any) -> int:
    """How many neurons an MLP bridge has."""
    return inputs_of(mlp.out.original_component)


def kv_index(attention: Any) -> Int[Tensor, "heads"]:
    """Which key/value head each query head reads, ``[heads]``."""
    for owner in (attention.original_component, attention.k.original_component):
        if "kv_index" in owner._buffers:  # uneven groups
            return owner._buffers["kv_index"].cpu()
    d_head = attention.config.d_head
    heads = inputs_of(attention.o.original_component) // d_head
    kv_heads = attention.k.original_component.out_features // d_head
    return torch.arange(heads) // max(heads // max(kv_heads, 1), 1)


def narrow_attention(
    attention: Any, kept: Int[Tensor, "kept"], constants: Float[Tensor, "heads d_head"] | None = None
) -> None:
    """Keep the named heads of an attention bridge. A key/value head leaves with the last query head that reads it.

    Args:
        attention: the bridge; changed in place.
        kept: the heads that stay, in ascending order.
        constants: what the other heads' outputs are from now on; they go into the output bias. ``None``: nothing.
    """
    kv_kept, index = torch.unique(kv_index(attention)[kept], return_inverse=True)
    resize_attention(attention, kept, kv_kept, index, constants)


def resize_attention(
    attention: Any,
    heads: Int[Tensor, "kept"],
    kv_heads: Int[Tensor, "kv"],
    index: Int[Tensor, "kept"],
    constants: Float[Tensor, "heads d_head"] | None = None,
) -> None:
    """Keep the named query heads and key/value heads, where kept head ``h`` reads the kept ``index[h]``. In place."""
    d_head = attention.config.d_head
    keep_outputs(attention.q.original_component, columns(heads, d_head))
    keep_outputs(attention.k.original_component, columns(kv_heads, d_head))
    keep_outputs(attention.v.original_component, columns(kv_heads, d_head))
    flat = None if constants is None else constants.flatten()
    keep_inputs(attention.o.original_component, columns(heads, d_head), flat)
    shape_attention(attention, index)


def narrow_mlp(
    mlp: Any,
    kept: Int[Tensor, "kept"],
    constants: Float[Tensor, "neurons"] | None = None,
    shares: Shares | None = None,
) -> None:
    """Keep the named neurons of an MLP bridge; the others' ``constants`` go into the output bias, and what they are
    of kept neurons (``shares``) into the output rows of these. In place."""
    for name in ("in", "gate"):
        projection = mlp._modules.get(name)
        if projection is not None:
            keep_outputs(projection.original_component, kept)
    keep_inputs(mlp.out.original_component, kept, constants, shares)
    mlp.__class__ = _with(_plain(mlp), _EmptiedMLP) if len(kept) == 0 else _plain(mlp)


def fuse(attention: Any) -> None:
    """Make the fused QKV map that some architectures keep next to q, k and v again from these, which are what runs.

    GPT-2's ``[d_model, 3 heads d_head]``: q, k and v become views of it. GPT-NeoX's ``[heads 3 d_head, d_model]``
    holds the same numbers in another order.
    """
    if "qkv" not in attention._modules:
        return
    fused = attention.qkv.original_component
    parts = [attention.q.original_component, attention.k.original_component, attention.v.original_component]
    weights, biases = [part.weight.detach() for part in parts], [part.bias.detach() for part in parts]
    if transposed(fused):
        set_linear(fused, torch.cat([weight.T for weight in weights], dim=1), torch.cat(biases))
        views = zip(parts, fused.weight.detach().chunk(3, dim=1), fused.bias.detach().chunk(3), strict=True)
        for part, weight, bias in views:
            set_linear(part, weight.T, bias)
    else:
        by_head = (len(biases[0]) // attention.config.d_head, attention.config.d_head)
        weight = torch.stack([weight.unflatten(0, by_head) for weight in weights], dim=1).flatten(0, 2)
        set_linear(fused, weight, torch.stack([bias.unflatten(0, by_head) for bias in biases], dim=1).flatten())


def shape_attention(attention: Any, index: Int[Tensor, "heads"]) -> None:
    """Make an attention bridge, whose weights are set, work with ``len(index)`` heads, where head ``h`` reads the
    key/value head ``index[h]``: head counts, hook shapes, and the code for uneven groups or for no head at all."""
    wrapped = attention.original_component
    heads, kv_heads = len(index), len(index.unique())
    group = max(heads // max(kv_heads, 1), 1)
    even = torch.equal(index, torch.arange(heads) // group)
    native = hasattr(wrapped, "kv_repeats")
    if not even:
        group = 1  # the index does what repeating did

    attention.config = _layer_config(attention.config, heads, kv_heads)
    counts = {"num_heads": heads, "num_attention_heads": heads, "n_heads": heads, "num_key_value_groups": group}
    counts |= {"n_kv_heads": kv_heads if even else heads, "kv_repeats": group, "num_key_value_heads": kv_heads}
    for name, count in counts.items():
        if hasattr(wrapped, name):
            setattr(wrapped, name, count)
    if hasattr(wrapped, "split_size"):
        wrapped.split_size = heads * attention.config.d_head

    owners = [attention.k.original_component, attention.v.original_component] if native else [wrapped]
    for owner in owners:
        owner._buffers.pop("kv_index", None)
        if not even:
            device = attention.o.original_component.weight.device
            owner.register_buffer("kv_index", index.to(device), persistent=False)
            owner.d_head = attention.config.d_head
    for projection in (attention.k, attention.v) if native else ():
        projection.__class__ = LinearBridge if even else _Gathering
    mixin = _Emptied if heads == 0 else _Uneven if not (even or native) else None
    attention.__class__ = _plain(attention) if mixin is None else _with(_plain(attention), mixin)
    attention._setup_qkv_hook_reshaping()


def _layer_config(config: Any, heads: int, kv_heads: int) -> Any:
    """The layer's own copy of the shared configuration, with the head counts that hold in this layer."""
    own = copy.copy(config)
    own.n_heads = heads
    if getattr(own, "n_key_value_heads", None) is not None:
        own.n_key_value_heads = kv_heads
    return own


class _Gathering(LinearBridge):
    """The key or value projection of a TransformerLens-native model whose query heads share unevenly: one output per
    query head. Its hook sees the key/value heads. (There is no cache whose entries would be repeated.)"""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wrapped: Any = self.original_component
        heads = super().forward(input, *args, **kwargs).unflatten(-1, (-1, wrapped.d_head))
        return heads.index_select(-2, wrapped.kv_index).flatten(-2)


class _Uneven(AttentionBridge):
    """Query heads that share key/value heads unevenly: keys and values are gathered for each query head, after the
    cache, so that this holds each key/value head once."""

    def _update_kv_cache(self, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = super()._update_kv_cache(k, v, **kwargs)
        wrapped: Any = self.original_component
        return k.index_select(1, wrapped.kv_index), v.index_select(1, wrapped.kv_index)


class _Emptied(AttentionBridge):
    """Attention without heads: it adds its bias. Its hook points fire (with no heads), and it writes one number per
    position to the key/value cache, from which other layers read how long the input is."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x = self.hook_in(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        batch, pos = x.shape[:2]
        for projection in (self.q, self.k, self.v):
            projection.hook_out(projection.hook_in(x).new_zeros(batch, pos, 0))
        length, _ = self._update_kv_cache(x.new_zeros(batch, 1, pos, 1), x.new_zeros(batch, 1, pos, 1), **kwargs)
        pattern = self.hook_pattern(self.hook_attn_scores(x.new_zeros(batch, 0, pos, length.shape[2])))
        return self.hook_out(_from_nothing(self.o, x)), pattern

    def _reshape_weight_to_3d(
        self, weight: Tensor, n_heads: int, pattern: str = "qkv", in_out_layout: bool | None = None
    ) -> Tensor:
        config: Any = self.config
        inner = (config.d_head, config.d_model) if pattern == "o" else (config.d_model, config.d_head)
        return weight.new_zeros(0, *inner)

    def _reshape_bias(self, bias: Tensor | None, use_kv: bool = False) -> Tensor | None:
        config: Any = self.config
        return None if bias is None else bias.new_zeros(0, config.d_head)


class _EmptiedMLP(MLPBridge):
    """An MLP without neurons: it adds its bias, and its hook points fire (with no neurons)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = self.hook_in(args[0])
        for name in ("in", "gate"):
            projection: Any = self._modules.get(name)
            if projection is not None:
                projection.hook_out(projection.hook_in(x).new_zeros(*x.shape[:-1], 0))
        return self.hook_out(_from_nothing(self.out, x))


def _from_nothing(projection: Any, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    """The output of a projection that has no inputs left, its hooks fired (``Conv1D`` cannot take such an input)."""
    module = projection.original_component
    weight = module.weight if transposed(module) else module.weight.T
    output = projection.hook_in(x.new_zeros(*x.shape[:-1], 0)) @ weight
    return projection.hook_out(output if module.bias is None else output + module.bias)


def _plain(bridge: Any) -> type:
    """The bridge's own class, without what this file has mixed in."""
    return getattr(type(bridge), "_plain_class", type(bridge))


@cache
def _with(plain: type, mixin: type) -> type:
    return type(f"{mixin.__name__.lstrip('_')}{plain.__name__}", (mixin, plain), {"_plain_class": plain})
