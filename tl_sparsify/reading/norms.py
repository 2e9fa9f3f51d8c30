"""Norms: how what goes into one moves what comes out of it, in closed form.

For layer norm and RMS norm with weight ``w``, ``x' = rho (x - m mean(x))`` the normalised stream (``m`` is 1 or 0),

    d norm / d x = rho diag(w) (C - x' x'' / d_model),      C s = s - m mean(s),

a scale and two directions that are taken out: no autograd, and nothing of the size of readers times the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class NormSlope:
    """The derivative of a norm at each token.

    Attributes:
        scale: ``rho``; 1 where there is no norm.
        direction: ``x'``; ``None`` where there is no norm.
        weight, bias: of the norm, ``None`` where it has none.
        centred: whether the norm takes away the mean.
    """

    scale: Float[Tensor, "batch pos one"]
    direction: Float[Tensor, "batch pos d_model"] | None
    weight: Float[Tensor, "d_model"] | None = None
    bias: Float[Tensor, "d_model"] | None = None
    centred: bool = False

    def to(self, like: Tensor) -> NormSlope:
        """On another device, in another precision."""
        direction, weight, bias = (
            None if part is None else part.to(like) for part in (self.direction, self.weight, self.bias)
        )
        return NormSlope(self.scale.to(like), direction, weight, bias, self.centred)

    def through(
        self, weight: Float[Tensor, "readers some d_model"], added: Float[Tensor, "readers some"]
    ) -> tuple[Float[Tensor, "readers some d_model"], Float[Tensor, "readers some"]]:
        """A linear map of what comes out of the norm as one of ``x'``: its weights, which see no mean where the norm
        takes it away, and what is added."""
        added = added if self.bias is None else added + weight @ self.bias
        made = weight if self.weight is None else weight * self.weight
        return made - made.mean(-1, keepdim=True) if self.centred else made, added


def norm_slope(norm: Any, x: Float[Tensor, "batch pos d_model"]) -> NormSlope | None:
    """The slope of a norm (a bridge's, or a module) at ``x``; ``None`` where it is neither layer norm nor RMS norm, or
    does not give what these do, or somebody changes what it gives."""
    x = x.detach() if x.dtype == torch.float64 else x.detach().float()
    inner = getattr(norm, "original_component", None) or norm
    if norm is None or isinstance(inner, torch.nn.Identity):
        return NormSlope(torch.ones_like(x[..., :1]), None)
    points = (getattr(norm, name, None) for name in ("hook_out", "hook_normalized", "hook_scale"))
    if any(getattr(point, "fwd_hooks", None) for point in points):
        return None
    centred = isinstance(inner, torch.nn.LayerNorm)
    if not centred and not type(inner).__name__.endswith("RMSNorm"):
        return None
    weight, bias = (None if part is None else part.detach().to(x) for part in affine_of(norm, inner))
    with torch.no_grad():
        y = inner(x.to(next(inner.parameters(), x).dtype)).to(x)
        flat = y if bias is None else y - bias
        moved = x - x.mean(-1, keepdim=True) if centred else x
        seen = moved if weight is None else moved * weight
        size = (seen * seen).sum(-1, keepdim=True)
        scale = (flat * seen).sum(-1, keepdim=True) / torch.where(size == 0, 1, size)
        allowed = 5e-2 if torch.finfo(next(inner.parameters(), x).dtype).bits < 32 else 1e-5
        if not bool(((flat - scale * seen).abs() <= allowed * (1 + y.abs())).all()):
            return None
    return NormSlope(scale, moved * scale, weight, bias, centred)


def affine_of(norm: Any, inner: Any) -> tuple[Tensor | None, Tensor | None]:
    """What a norm multiplies by, and what it adds; ``inner``: the module that has its weights."""
    weight = getattr(inner, "weight", None)
    offset = weight is not None and getattr(norm, "uses_weight_offset", False)
    return 1 + weight if offset else weight, getattr(inner, "bias", None)  # type: ignore[operator]
