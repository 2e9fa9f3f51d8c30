"""What is done to the residual stream, put into the weights that write to it, or kept as an explicit step.

A removed whole layer writes a constant. Removed directions make an activation ``x`` into

    x + basis (coordinates - reader' x)

which is affine in ``x``: where weights write ``x`` it goes into them (the output projections of attention and MLP,
the embeddings), elsewhere it stays, as a few numbers at the hook point of ``x``, which computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from tl_sparsify.folding.narrow import narrow_attention, narrow_mlp, set_linear, transposed

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
        # what this step reads of x through the first one: R2' (x + B1 (c1 - R1' x)), sorted by x
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


def describe_points(bridge: Any) -> dict[str, int | None]:
    """The hook points that compute something, by name: the rank of a step, ``None`` for a constant."""
    description: dict[str, int | None] = {}
    for point in bridge.hook_dict.values():
        if isinstance(point, StepPoint | FixedPoint):
            description[str(point.name)] = point.basis.shape[1] if isinstance(point, StepPoint) else None
    return description


def make_points(bridge: Any, description: Mapping[str, int | None]) -> None:
    """Hook points of the kinds that :func:`describe_points` named, their numbers yet to be set. In place."""
    width = bridge.cfg.d_model
    for name, rank in description.items():
        point = bridge.hook_dict[name]
        if rank is None:
            put_fixed(point, torch.zeros(width), _near(bridge, point))
        else:
            columns, numbers = torch.zeros(width, rank).double(), torch.zeros(rank).double()
            put_step(point, Step(columns, columns, numbers), _near(bridge, point))


def _near(bridge: Any, point: Any) -> Tensor:
    """A parameter of the block that a hook point is in: its device and precision."""
    return next(bridge.blocks[int(point.name.split(".")[1])].parameters())


def fix_layer(bridge: Any, point: Any, value: Float[Tensor, "d_model"]) -> None:
    """Make the whole attention or MLP whose output has the hook point ``point`` write a constant. In place."""
    none = torch.zeros(0, dtype=torch.long)
    for block in bridge.blocks:
        for part, norm, narrow in (("attn", "ln1_post", narrow_attention), ("mlp", "ln2_post", narrow_mlp)):
            module = block._modules.get(part)
            if module is None or point not in (module.hook_out, _output(block._modules.get(norm))):
                continue
            narrow(module, none)
            linear = _projection(module).original_component
            if point is module.hook_out:
                set_linear(linear, linear.weight.detach(), value.to(linear.weight))
            else:  # a norm stands in between, and no bias can make it write a constant
                put_fixed(point, value, linear.weight)


def writers(bridge: Any, point: Any) -> list[Any]:
    """The bridges of the weights that write the activation at a hook point: a projection, the embeddings, or none."""
    if point is bridge.blocks[0].hook_in and not isinstance(point, StepPoint):
        return [bridge._modules[name] for name in ("embed", "pos_embed") if name in bridge._modules]
    parts = [block._modules.get(part) for block in bridge.blocks for part in ("attn", "mlp")]
    return [_projection(part) for part in parts if part is not None and part.hook_out is point]


def step_writer(bridge: Any, point: Any, step: Step) -> None:
    """Make a step of the activation at a hook point, in the weights that write it where there are some. In place."""
    modules = [part.original_component for part in writers(bridge, point)]
    if not modules:
        put_step(point, step, _near(bridge, point))
    elif isinstance(modules[0], nn.Embedding):
        _step_embeddings(bridge, modules, step)
    else:
        linear = modules[0]
        bias = step.affine(linear.bias, linear.weight)
        rows = step.linear(linear.weight if transposed(linear) else linear.weight.T)
        set_linear(linear, rows if transposed(linear) else rows.T.contiguous(), bias)


def _step_embeddings(bridge: Any, tables: list[Any], step: Step) -> None:
    """Make a step of the sum of one row of each table. A tied unembedding keeps its weights."""
    for table in tables:
        weight = table.weight
        new = torch.cat([step.linear(rows) for rows in weight.detach().split(_ROWS)])
        if table is tables[-1]:  # one row of each table is summed, so the constant goes into a single one
            scale = float(getattr(table, "embed_scale", 1.0))  # Gemma's embedding is multiplied by it
            new = (new.double() + step.constant.to(new.device) / scale).to(new)
        table.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    config: Any = getattr(bridge.original_model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _projection(part: Any) -> Any:
    """The bridge of the linear map that an attention or MLP bridge writes with."""
    return part._modules["o" if "o" in part._modules else "out"]


def _output(norm: Any) -> Any:
    return None if norm is None else norm.hook_out
