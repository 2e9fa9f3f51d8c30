"""A forward pass with edges, written out reader by reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import tl_sparsify as tls


def constants_of(model: Any, units: tls.Units, seed: int = 0) -> tls.Values:
    """Random constants, the same for a writer wherever it is read."""
    width, most = model.cfg.d_model, max(site.rows for site in units.sites)
    table = torch.randn(most, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tls.Values(units, tuple(table[: site.rows] for site in units.sites))


def by_hand(model: Any, tokens: Tensor, kept: set[str], constants: Mapping[str, Tensor]) -> Tensor:
    """The forward pass of a native model with layer norms, each reader with a sum of its own of what is written."""
    return run_by_hand(model, tokens, kept, constants)[0]


def run_by_hand(
    model: Any,
    tokens: Tensor,
    kept: set[str],
    constants: Mapping[str, Tensor],
    writes: Mapping[str, Tensor] | None = None,
    gives: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and what each writer writes; where ``writes`` names the writer it writes that, and where ``gives``
    names an edge its reader is given that."""
    writes, gives = writes or {}, gives or {}

    def normed(norm: Any, x: Tensor) -> Tensor:
        inner = norm.original_component
        return torch.nn.functional.layer_norm(x, x.shape[-1:], inner.weight, inner.bias, model.cfg.eps)

    with torch.no_grad():
        with tls.recorded(model, tls.Units((tls.Site("residual", 0, "blocks.0.hook_resid_pre", 1),))) as first:
            model(tokens)
        written = {"embed": first.read()[0][:, :, 0]}
        biases = torch.zeros(model.cfg.d_model, dtype=torch.float64)

        def read(reader: str) -> Tensor:
            parts = [
                gives.get(f"{u}->{reader}", w) if f"{u}->{reader}" in kept else constants[u].expand_as(w)
                for u, w in written.items()
            ]
            return torch.stack(parts).sum(0) + biases

        pos = tokens.shape[1]
        future = torch.ones(pos, pos).triu(1).bool()
        for layer, block in enumerate(model.blocks):
            attn, new = block.attn, {}
            for h in range(model.cfg.n_heads):
                q, k, v = (
                    normed(block.ln1, read(f"L{layer}H{h}.{part.lower()}")) @ getattr(attn, f"W_{part}")[h]
                    + getattr(attn, f"b_{part}")[h]
                    for part in "QKV"
                )
                scores = (q @ k.transpose(1, 2) / model.cfg.d_head**0.5).masked_fill(future, -torch.inf)
                new[f"L{layer}H{h}"] = writes.get(f"L{layer}H{h}", scores.softmax(-1) @ v @ attn.W_O[h])
            written |= new
            biases = biases + attn.b_O
            hidden = normed(block.ln2, read(f"L{layer}MLP")) @ block.mlp.W_in + block.mlp.b_in
            written[f"L{layer}MLP"] = torch.nn.functional.gelu(hidden) @ block.mlp.W_out
            written[f"L{layer}MLP"] += block.mlp.b_out
            written[f"L{layer}MLP"] = writes.get(f"L{layer}MLP", written[f"L{layer}MLP"])
        return normed(model.ln_final, read("logits")) @ model.unembed.W_U + model.unembed.b_U, written
