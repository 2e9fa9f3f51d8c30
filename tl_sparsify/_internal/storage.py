"""Numbers as they are stored: how many a module holds, how many one may hold that a file describes, and a checksum.

For the checksum the bits of a tensor's values (in float32, so that a float64 copy has the same) are taken in rows of a
fixed width, without a copy of the tensor. A row's sum is that of its bits times odd random weights, modulo 2**32 for
each, so that one value cannot change without it; the sum of the rows has odd random weights again. Integer sums do not
depend on their order, hence on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tl_sparsify._internal import random as _random

_TIMES, _LEAST = 256, 2**28
"""A model that a file describes may be so many times as large as the file, and of so many numbers in any case."""
_WIDTH = 2**16
_TOGETHER = 2**22  # values whose bits are there at once
_ROWS = 4  # of them whose products are: what stays in the processor's cache


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


def checksum(tensor: Shaped[Tensor, "..."]) -> int:
    """64 bits of the values, in order; 0 where they are not there (offloaded)."""
    if tensor.is_meta:
        return 0
    flat, total = tensor.detach().reshape(-1), 0
    for number, start in enumerate(range(0, flat.numel(), _TOGETHER)):
        bits = _bits(flat[start : start + _TOGETHER])
        whole = len(bits) // _WIDTH * _WIDTH
        for place, part in enumerate((bits[:whole].view(-1, _WIDTH), bits[whole:][None])):
            weights = _weights(_WIDTH)[: part.shape[1]].to(part.device, torch.int32)
            rows = torch.cat([(some * weights).sum(1) for some in part.split(_ROWS)])
            more = _weights(_TOGETHER // _WIDTH + 1, number, place)[: len(rows)].to(part.device)
            total += int((rows * more).sum())
    return total % 2**64


def _bits(values: Shaped[Tensor, "n"]) -> Int[Tensor, "bits"]:
    if values.is_floating_point() or values.is_complex():
        values = torch.view_as_real(values).flatten() if values.is_complex() else values
        return values.to(torch.float32).view(torch.int32)
    return values.to(torch.int32)


@cache
def _weights(n: int, *counters: int) -> Int[Tensor, "n"]:
    return _random.bits(0, 101, *counters, torch.arange(n)) | 1
