"""A checksum of a tensor's values that sees every one of them, and needs no copy of the tensor.

The bits of the values (in float32, so that a float64 copy has the same) are taken in rows of a fixed width. A row's sum
is that of its bits times odd random weights, modulo 2**32 for each, so that one value cannot change without it; the sum
of the rows has odd random weights again. Integer sums do not depend on their order, hence on the device.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_sparsify._internal import random as _random

_WIDTH = 2**16
_TOGETHER = 2**22  # values whose bits are there at once


def checksum(tensor: Shaped[Tensor, "..."]) -> int:
    """64 bits of the values, in order; 0 where they are not there (offloaded)."""
    if tensor.is_meta:
        return 0
    flat, total = tensor.detach().reshape(-1), 0
    for number, start in enumerate(range(0, flat.numel(), _TOGETHER)):
        bits = _bits(flat[start : start + _TOGETHER])
        whole = len(bits) // _WIDTH * _WIDTH
        for place, part in enumerate((bits[:whole].view(-1, _WIDTH), bits[whole:][None])):
            weights = _weights(_WIDTH)[: part.shape[1]].to(part.device)
            rows = (part * weights.to(torch.int32)).sum(1)
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
