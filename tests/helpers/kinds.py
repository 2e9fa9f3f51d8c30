"""Units of every kind on the tiny transformer, and examples for them: with two answers each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.models import examples, seeded
from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.units import Units, attentions, heads, mlps, neurons, residuals

N = 6
HOOK = "blocks.0.hook_resid_post"


def data(n: int = N, seed: int = 0, **settings: Any) -> Examples:
    return examples(n, seed, answers=2, **settings)


def padded(n: int = N) -> Examples:
    """Left padding: from no position to two of five."""
    return replace(data(n), attention_mask=torch.arange(5)[None, :] >= (torch.arange(n) % 3)[:, None])


def basis(r: int, seed: int = 0, orthonormal: bool = True) -> Tensor:
    columns = torch.randn(8, r, generator=seeded(seed), dtype=torch.float64)
    return torch.linalg.qr(columns)[0] if orthonormal else columns


EACH = torch.tensor([4, 1, 3, 1, 2, 4])  # input in `padded` too
KINDS: dict[str, Callable[[Any], Units]] = {
    "heads": heads,
    "neurons": neurons,
    "mlps": mlps,
    "attentions": attentions,
    "residuals": residuals,
    "directions": lambda model: directions(model, HOOK, basis(3)),
    "overlapping directions": lambda model: directions(model, HOOK, basis(4, orthonormal=False)),
    "stream directions": lambda model: stream_directions(model, basis(3)),
    "heads at positions": lambda model: heads(model).at((2, 3)),
    "neurons at a position": lambda model: neurons(model).at(2),
    "neurons at one position per example": lambda model: neurons(model).at(EACH),
    "several kinds": lambda model: heads(model).at(slice(2, 4)) + neurons(model) + directions(model, HOOK, basis(2)),
}


def close(found: Tensor, expected: Tensor, relative: float = 1e-10) -> bool:
    return bool((found - expected).abs().max() <= relative * expected.abs().max())
