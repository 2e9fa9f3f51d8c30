"""Experts: a hook point for what each expert of a mixture adds to its layer, which TransformerLens does not have.

All experts of a layer are one module, which is given the tokens, the experts that the router chose for each, and their
weights, and returns the sum of what they add. Here that sum is taken apart, an expert at a time and with its own tokens
alone, and put together again. The router stays as it is, and so do experts that every token goes through.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_POINT = re.compile(r"blocks\.(\d+)\.mlp\.hook_experts")
_PARTS = "_added_by_experts"


def experts_of(model: Any, hook: str) -> tuple[nn.Module, nn.Module] | None:
    """The mixture and the module of its experts behind ``blocks.{l}.mlp.hook_experts``; ``None`` for other hook points
    and where the layer is no mixture whose experts are given tokens, choices and weights."""
    match, blocks = _POINT.fullmatch(hook), getattr(model, "blocks", ())
    if match is None or int(match[1]) >= len(blocks):
        return None
    mixture = _inside(getattr(blocks[int(match[1])], "mlp", None))
    experts = _inside(getattr(mixture, "experts", None))
    if not isinstance(mixture, nn.Module) or not isinstance(experts, nn.Module) or not hasattr(experts, "num_experts"):
        return None
    return (mixture, experts) if len(inspect.signature(experts.forward).parameters) == 3 else None


def _inside(bridge: Any) -> Any:
    """The module that a bridge's component wraps."""
    while isinstance(getattr(bridge, "original_component", None), nn.Module):
        bridge = bridge.original_component
    return bridge


def added(
    experts: Any,
    tokens: Float[Tensor, "tokens d_model"],
    chosen: Int[Tensor, "tokens choices"],
    weights: Float[Tensor, "tokens choices"],
) -> Float[Tensor, "tokens experts d_model"]:
    """What each expert adds at each token: 0 where the router does not choose it. As many operations as one pass."""
    parts: list[Tensor] = []
    for number in range(experts.num_experts):
        rows, slots = (chosen == number).nonzero(as_tuple=True)
        part = torch.zeros_like(tokens)
        if len(rows):
            here = experts.forward(tokens[rows], chosen[rows, slots][:, None], weights[rows, slots][:, None])
            part = part.index_add(0, rows, here.to(part))
        parts.append(part)
    return torch.stack(parts, 1)


@contextmanager
def hooked_experts(model: Any, hooks: list[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Call these functions, as TransformerLens calls hooks, with ``[batch, pos, experts, d_model]``; what one returns
    takes its place. Nested, the inner ones see what the outer ones left."""
    acts: dict[str, list[Callable[..., Any]]] = defaultdict(list)
    for name, act in hooks:
        acts[name].append(act)
    with ExitStack() as stack:
        for name, here in acts.items():
            found = experts_of(model, name)
            if found is None:
                raise ValueError(f"the model has no experts at {name}: are the units those of this model?")
            mixture, experts = found
            shape: list[int] = []
            noted = mixture.register_forward_pre_hook(partial(_noted, shape), with_kwargs=True)
            taken = experts.register_forward_hook(partial(_taken, shape, here, name), with_kwargs=True)
            stack.callback(noted.remove)
            stack.callback(taken.remove)
        yield


def _noted(shape: list[int], module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    [stream] = inputs or tuple(named.values())[:1]
    shape[:] = stream.shape[:2]


def _taken(
    shape: list[int],
    acts: list[Callable[..., Any]],
    name: str,
    experts: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    output: Tensor,
) -> Tensor:
    parts = getattr(output, _PARTS, None)  # what an outer context left
    if parts is None:
        parts = added(experts, *inspect.signature(experts.forward).bind(*inputs, **named).args)
    now = parts.reshape(*shape, *parts.shape[1:])
    changed = False
    for act in acts:
        new = act(now, hook=SimpleNamespace(name=name))
        changed |= new is not None
        now = now if new is None else new
    result = now.flatten(0, 1).sum(1).reshape(output.shape).to(output) if changed else output
    setattr(result, _PARTS, now.flatten(0, 1))
    return result
