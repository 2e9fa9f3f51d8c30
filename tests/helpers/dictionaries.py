"""Random dictionaries for the tiny transformer, encoded and put back by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tl_sparsify as tls
from helpers.models import seeded
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits

STREAM, IN, OUT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
FEATURES = 14
NAMES = ("relu", "jumprelu", "topk", "transcoder")


def dictionary(name: str = "relu", seed: int = 5, **others: Any) -> tls.Dictionary:
    """In float64, of width 8; about half of the features are active at a position."""
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made: dict[str, Any] = {
        "W_enc": normal(8, FEATURES) * 0.5,
        "W_dec": normal(FEATURES, 8) * 0.4,
        "b_enc": normal(FEATURES) * 0.1,
        "b_dec": normal(8) * 0.2,
    }
    if name == "transcoder":
        made |= {"hook": OUT, "source": IN}
        return tls.Dictionary(**(made | others))
    made |= {"activation": name, "hook": STREAM, "centred": True}
    if name == "jumprelu":
        made["threshold"] = normal(FEATURES).abs() * 0.5
    if name == "topk":
        made["k"] = 4
    return tls.Dictionary(**(made | others))


def encoded(d: tls.Dictionary, x: Tensor) -> Tensor:
    """Feature by feature, number by number."""
    out = torch.zeros(*x.shape[:-1], len(d), dtype=x.dtype)
    flat, rows = x.reshape(-1, x.shape[-1]), out.view(-1, len(d))
    for row, values in zip(rows, flat, strict=True):
        before = [float((values - (d.b_dec if d.centred else 0)) @ d.W_enc[:, f] + d.b_enc[f]) for f in range(len(d))]
        largest = sorted(before, reverse=True)[: d.k]
        for f, value in enumerate(before):
            least = 0.0 if d.threshold is None else float(d.threshold[f])
            if value > max(0.0, least) and (d.k is None or value in largest):
                row[f] = value
    return out


def by_hand(
    model: Any, batch: Examples, d: tls.Dictionary, constants: Tensor, keep: Tensor, error: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The answers' logits with every feature at ``c + keep (a - c)``, ``keep`` of shape ``[features]`` or
    ``[batch, features]``, and the error, where given, at its constant by its own ``keep``; from nothing but hooks."""
    seen: dict[str, Tensor] = {}

    def see(x: Tensor, hook: Any) -> None:
        seen["x"] = x

    def write(x: Tensor, hook: Any) -> Tensor:
        a = d.encode(seen["x"])
        gone = (1 - keep) if keep.ndim == 1 else (1 - keep)[:, None]
        new = x + (gone * (constants - a)) @ d.W_dec
        if error is None:
            return new
        constant, kept = error
        return new + (1 - kept) * (constant - (x - d.decode(a)))

    with model.hooks(fwd_hooks=[(d.source or d.hook, see), (d.hook, write)]):
        return answer_logits(model, batch)
