"""How many numbers a module holds, by where they are stored."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


def parameter_count(module: nn.Module) -> int:
    """How many numbers a module's parameters hold. What several of them share counts once: tied weights, and parts of a
    joint projection (GPT-2's queries, keys and values). So does a joint projection of which a bridge has its parts as
    copies (GPT-NeoX's). No pass."""
    joint = {id(parameter) for part in module.modules() for parameter in _joint(part)}
    apart = [parameter for parameter in module.parameters() if parameter.numel() and id(parameter) not in joint]
    spans = sorted({_span(parameter) for parameter in apart})
    total, end = 0.0, 0
    for start, stop, size in spans:
        total += max(0, stop - max(start, end)) / size
        end = max(end, stop)
    return round(total)


def _joint(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a joint projection that a module also has in parts."""
    parts = module._modules
    return (
        list(parts["qkv"].parameters()) if parts.keys() >= {"qkv", "q", "k", "v"} and parts["qkv"] is not None else []
    )


def _span(parameter: Float[Tensor, "..."]) -> tuple[int, int, int]:
    """Where a parameter begins and ends in memory, and the bytes of one number."""
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    size = parameter.element_size()
    return parameter.data_ptr(), parameter.data_ptr() + (last + 1) * size, size
