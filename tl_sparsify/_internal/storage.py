"""How many numbers a module holds, by where they are stored, and how many it may hold that a file describes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_TIMES, _LEAST = 256, 2**28
"""A model that a file describes may be so many times as large as the file, and of so many numbers in any case."""


def check_size(build: Callable[[], Any], there: int) -> Any:
    """What ``build`` makes, without memory for it, if a model of that size can belong to ``there`` numbers in a file.

    Raises:
        ValueError: one that is far too large.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build()
    numbers = sum(tensor.numel() for tensor in itertools.chain(model.parameters(), model.buffers()))
    if numbers > max(_LEAST, _TIMES * there):
        raise ValueError(f"the model that it describes has {numbers:,} numbers, the file {there:,}")
    return model


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
