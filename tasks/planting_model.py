"""What is planted where, and how the weights are kept to it: closed dimensions, loud idle units, a rotation."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.units import select

CLOSED = 16  # dimensions of the residual stream that neither true units nor the unembedding read


@dataclass(frozen=True)
class Plan:
    """What is planted where: a task's module and its true units."""

    module: ModuleType
    units: tls.Units

    @cached_property
    def alignment(self) -> tls.Alignment:
        """The variables and their units."""
        return self.module.alignment()

    @cached_property
    def causal_model(self) -> tls.CausalModel:
        """The task's algorithm."""
        return self.module.task().causal_model

    @cached_property
    def backup(self) -> tuple[str, str] | None:
        """A head and its backup, where the task has one."""
        return getattr(self.module, "BACKUP", None)

    @cached_property
    def planted(self) -> Bool[Tensor, "units"]:
        """Which units are true."""
        aligned = {unit.at(None).name for units in self.alignment.units.values() for unit in units}
        return torch.tensor([name in aligned | set(self.backup or ()) for name in self.units.names])

    @cached_property
    def idle(self) -> tuple[tls.Units, Bool[Tensor, "some"]]:
        """Units that must have no effect: the other units anywhere, and the aligned ones at their other positions."""
        chosen = [unit for unit, planted in zip(self.units, self.planted.tolist(), strict=True) if not planted]
        for units in self.alignment.units.values():
            for unit in units:
                positions = unit.site.positions
                assert isinstance(positions, tuple)  # noqa: S101
                others = tuple(set(range(self.module.LENGTH)) - set(positions))
                chosen.append(unit.at(others))
        return select(chosen)


def plan(name: str) -> tuple[Plan, dict[str, Any]]:
    """The plan of a task, and its model's settings."""
    module = importlib.import_module(f"tasks.{name}.task")
    shape = module.SHAPE
    settings = {"vocabulary": module.VOCABULARY, "length": module.LENGTH, "normalization_type": None, "act_fn": "gelu"}
    sites: list[tls.Site] = []
    for layer in range(shape["layers"]):
        sites.append(tls.Site("head", layer, f"blocks.{layer}.attn.hook_z", shape["heads"]))
    for layer in range(shape["layers"]):
        sites.append(tls.Site("neuron", layer, f"blocks.{layer}.mlp.hook_post", shape["mlp"]))
    return Plan(module, tls.Units(tuple(sites))), {**shape, **settings}


def blocks(model: Any) -> Iterator[tuple[Any, Any]]:
    """Each layer's attention and MLP."""
    for block in model.blocks:
        yield block.attn, block.mlp


def weight(part: Any) -> Tensor:
    """The weights ``[out, in]`` of a linear part."""
    return part.original_component.weight


@torch.no_grad()
def start(model: Any, plan: Plan) -> None:
    """A better start than noise, where the task says so, for what noise learns late.

    ``MATCHING``: heads that begin by attending to their own symbol. ``NUMBERS``: the first so many tokens begin on a
    line, in their order.
    """
    for name in getattr(plan.module, "MATCHING", ()):
        attention, rows = _rows(model, plan.units[name])
        weight(attention.q)[rows] *= 4
        weight(attention.k)[rows] = weight(attention.q)[rows]
    if hasattr(plan.module, "MATCHING"):
        weight(model.embed).mul_(2.5)
    numbers = getattr(plan.module, "NUMBERS", 0)
    if numbers:
        line = weight(model.embed)[-1].clone()
        line[-CLOSED:] = 0
        weight(model.embed)[:numbers] += torch.linspace(-1, 1, numbers)[:, None] * line / line.norm()


def _rows(model: Any, head: tls.Unit) -> tuple[Any, slice]:
    """A head's attention, and its rows of the query, key and value weights."""
    attention, _ = list(blocks(model))[head.site.layer]
    width = len(weight(attention.q)) // head.site.size
    return attention, slice(head.index * width, (head.index + 1) * width)


@torch.no_grad()
def close(model: Any, plan: Plan, silence: bool) -> None:
    """True units and unembedding stop reading the closed dimensions; with ``silence`` the others write only there."""
    parts = iter(plan.units.split(plan.planted))
    heads = [next(parts) for _ in model.blocks]
    neurons = [next(parts) for _ in model.blocks]
    weight(model.unembed)[:, -CLOSED:] = 0
    for (attention, mlp), head, neuron in zip(blocks(model), heads, neurons, strict=True):
        rows = head.repeat_interleave(len(weight(attention.q)) // len(head))
        for part in (attention.q, attention.k, attention.v):
            weight(part)[rows, -CLOSED:] = 0
        weight(getattr(mlp, "in"))[neuron, -CLOSED:] = 0
        if silence:
            weight(attention.o)[:-CLOSED, ~rows] = 0
            weight(mlp.out)[:-CLOSED, ~neuron] = 0


@torch.no_grad()
def loud(model: Any, plan: Plan, examples: tls.Examples) -> None:
    """Let every other unit that varies write as much (standard deviation) as the median true unit does."""
    wanted = float(written(model, plan, examples)[plan.planted].median())
    for number, (site, part) in enumerate(zip(plan.units.sites, plan.units.split(plan.planted), strict=True)):
        # site by site, since what one layer writes the next one's other units read
        here = plan.units.split(written(model, plan, examples))[number]
        factor = torch.where(~part & (here > 1e-6), wanted / here.clamp_min(1e-6), 1.0)
        attention, mlp = list(blocks(model))[site.layer]
        writer = weight(attention.o if site.kind == "head" else mlp.out)
        writer *= factor.repeat_interleave(writer.shape[1] // site.size)


@torch.no_grad()
def written(model: Any, plan: Plan, examples: tls.Examples, answer: bool = False) -> Float[Tensor, "units"]:
    """The standard deviation (over examples and positions, all dimensions together) of what each unit writes; with
    ``answer`` at the last position only."""
    values = tls.run_values(model, examples, plan.units).tensors
    found: list[Tensor] = []
    for site, value in zip(plan.units.sites, values, strict=True):
        attention, mlp = list(blocks(model))[site.layer]
        writer = weight(attention.o if site.kind == "head" else mlp.out).unflatten(1, (site.size, -1))
        value = value[:, -1:] if answer else value
        outputs = torch.einsum("bpuw,muw->bpum", value, writer).flatten(0, 1)
        found.append(outputs.var(0, correction=0).sum(1).sqrt())
    return torch.cat(found)


@torch.no_grad()
def rotate(model: Any, seed: int) -> None:
    """Rotate the residual stream: every writer and every reader turns, and no logit changes but by round-off."""
    generator = torch.Generator().manual_seed(seed)
    width = weight(model.embed).shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))

    def turn(tensor: Tensor, axis: int) -> None:
        turned = tensor.double() @ rotation if axis else rotation.T @ tensor.double()
        tensor.copy_(turned)

    for reader in (model.embed, model.pos_embed, model.unembed):  # rows are vectors of the stream in all three
        turn(weight(reader), 1)
    for attention, mlp in blocks(model):
        for part in (attention.q, attention.k, attention.v, getattr(mlp, "in")):
            turn(weight(part), 1)
        for part in (attention.o, mlp.out):
            turn(weight(part), 0)
            turn(part.original_component.bias, 0)
