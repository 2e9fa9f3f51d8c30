"""What is done to the residual stream, put into the weights that write to it, or kept as an explicit step.

A removed whole layer writes a constant. Removed directions make an activation ``x`` into

    x + basis (coordinates - reader' x)

which is affine in ``x``: where weights write ``x`` it goes into them (the output projections of attention and MLP,
the embeddings), elsewhere it stays, as a few numbers at the hook point of ``x``, which computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparsify._narrow import narrow_attention, narrow_mlp, set_linear, transposed

_ROWS = 8192  # of an embedding, changed at a time in float64


@dataclass(frozen=True)
class Step:
    """``x + basis (coordinates - reader' x)``, in float64 on the CPU."""

    basis: Float[Tensor, "width r"]
    reader: Float[Tensor, "width r"]
    coordinates: Float[Tensor, "r"]

    @property
    def constant(self) -> Float[Tensor, "width"]:
        """What is added whatever ``x`` is."""
        return self.basis @ self.coordinates

    def linear(self, rows: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """The step without its constant, of each row ``x``; rounded once, to the rows' precision."""
        exact = rows.detach().to("cpu", torch.float64)
        return (exact - (exact @ self.reader) @ self.basis.T).to(rows)

    def affine(self, row: Float[Tensor, "width"] | None, like: Tensor) -> Float[Tensor, "width"]:
        """The step of one row, or of nothing; in the precision and on the device of ``like``."""
        exact = torch.zeros(len(self.basis)) if row is None else row.detach()
        exact = exact.to("cpu", torch.float64)
        return (exact - (exact @ self.reader) @ self.basis.T + self.constant).to(like)

    def after(self, first: Step) -> Step:
        """One step that does ``first`` and then this one."""
        reader = self.reader - first.reader @ (first.basis.T @ self.reader)
        coordinates = self.coordinates - self.reader.T @ first.constant
        return Step(
            torch.cat([first.basis, self.basis], dim=1),
            torch.cat([first.reader, reader], dim=1),
            torch.cat([first.coordinates, coordinates]),
        )


class FixedPoint(HookPoint):
    """A hook point whose activation is a constant, ``value``."""

    value: nn.Parameter

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        return self.value.to(x).expand_as(x)


class StepPoint(HookPoint):
    """A hook point that makes a :class:`Step` of its activation."""

    basis: nn.Parameter
    reader: nn.Parameter
    coordinates: nn.Parameter

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        exact = x.to(torch.promote_types(x.dtype, self.basis.dtype))  # a coordinate is a sum of many products
        return (x + ((self.coordinates - exact @ self.reader) @ self.basis.T).to(x)).to(x)

    @property
    def step(self) -> Step:
        """The numbers as they are."""
        return Step(*(p.detach().to("cpu", torch.float64) for p in (self.basis, self.reader, self.coordinates)))


def put_fixed(point: Any, value: Float[Tensor, "width"], like: Tensor) -> None:
    """Make a hook point write a constant; a step that it made is gone. In place."""
    for name in list(point._parameters):
        del point._parameters[name]
    point.__class__ = FixedPoint
    point.value = nn.Parameter(value.detach().to(like), requires_grad=like.requires_grad)


def put_step(point: Any, step: Step, like: Tensor) -> None:
    """Make a hook point make a step, after what it already does. In place.

    Half-precision models get float32 numbers here, since coordinates lose too much otherwise.
    """
    if isinstance(point, FixedPoint):
        point.value.data = step.affine(point.value, point.value)
        return
    step = step.after(point.step) if isinstance(point, StepPoint) else step
    dtype = torch.promote_types(like.dtype, torch.float32)
    point.__class__ = StepPoint
    for name in ("basis", "reader", "coordinates"):
        number = getattr(step, name).to(like.device, dtype)
        point._parameters[name] = nn.Parameter(number, requires_grad=like.requires_grad)


def fix_layer(bridge: Any, point: Any, value: Float[Tensor, "d_model"]) -> None:
    """Make the whole attention or MLP whose output has the hook point ``point`` write a constant. In place."""
    none = torch.zeros(0, dtype=torch.long)
    for block in bridge.blocks:
        for part, norm, narrow in (("attn", "ln1_post", narrow_attention), ("mlp", "ln2_post", narrow_mlp)):
            module = block._modules.get(part)
            if module is None or point not in (module.hook_out, _output(block._modules.get(norm))):
                continue
            projection = _projection(module)
            narrow(module, none)
            if point is module.hook_out:
                _set_bias(module, value.to(projection.weight))
            else:  # a norm stands in between, and no bias can make it write a constant
                put_fixed(point, value, projection.weight)


def step_writer(bridge: Any, point: Any, step: Step) -> None:
    """Make a step of the activation at a hook point, in the weights that write it where there are some. In place."""
    first = bridge.blocks[0]
    if point is first.hook_in and not isinstance(point, StepPoint):
        _step_embeddings(bridge, step)
        return
    for block in bridge.blocks:
        for module in (block._modules.get("attn"), block._modules.get("mlp")):
            if module is not None and point is module.hook_out:
                linear = _projection(module)
                weight = step.linear(linear.weight if transposed(linear) else linear.weight.T)
                set_linear(linear, weight if transposed(linear) else weight.T.contiguous(), None)
                _set_bias(module, step.affine(linear.bias, linear.weight))
                return
    put_step(point, step, next(first.parameters()))


def _step_embeddings(bridge: Any, step: Step) -> None:
    """Every row of the embedding of tokens gets the step, every row of that of positions its linear part; without
    positions the constant goes into the tokens. A tied unembedding keeps its weights."""
    tokens, positions = bridge.embed.original_component, bridge._modules.get("pos_embed")
    tables = [tokens] if positions is None else [tokens, positions.original_component]
    for table in tables:
        weight = table.weight
        new = torch.cat([step.linear(rows) for rows in weight.detach().split(_ROWS)])
        if table is tables[-1]:
            scale = float(getattr(table, "embed_scale", 1.0))  # Gemma's embedding is multiplied by it
            new = (new.double() + step.constant.to(new.device) / scale).to(new)
        table.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    config = getattr(bridge.original_model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _projection(module: Any) -> Any:
    """The linear map that an attention or MLP bridge writes with."""
    return module._modules["o" if "o" in module._modules else "out"].original_component


def _output(norm: Any) -> Any:
    return None if norm is None else norm.hook_out


def _set_bias(module: Any, bias: Float[Tensor, "d_model"]) -> None:
    linear = _projection(module)
    set_linear(linear, linear.weight.detach(), bias)
