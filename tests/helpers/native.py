"""Small TransformerLens-native models of every variant, circuits of them, and how far folded is from ablated."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from helpers.models import NoCasts
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, neurons

VOCABULARY = 17
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, RMS, rotary, grouped": {
        "gated_mlp": True,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "n_key_value_heads": 2,
    },
    "RMSPre, one key/value head": {"normalization_type": "RMSPre", "final_rms": True, "n_key_value_heads": 1},
    "LNPre, ReLU, bidirectional": {"normalization_type": "LNPre", "act_fn": "relu", "attention_dir": "bidirectional"},
    "no norms, soft caps": {"normalization_type": None, "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 7.0},
    "attention only": {"attn_only": True},
}


def fresh(variant: str = "plain", dtype: torch.dtype = torch.float64) -> Any:
    """A small model with all parameters random (biases and norms too)."""
    config = {"d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 3, "n_ctx": 12, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 20, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config | VARIANTS[variant]), dtype=dtype)
    return randomised(model)


@cache
def native(variant: str = "plain", dtype: torch.dtype = torch.float64) -> Any:
    """The same model for all tests that do not change it."""
    return fresh(variant, dtype)


def randomised(model: Any, scale: float = 0.1) -> Any:
    """The same model in evaluation mode, with noise on every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model.eval()


def units_of(model: Any) -> Units:
    """The heads and neurons that a model has, of a kind of which it may have none."""
    sites: list[Site] = []
    for kind in (heads, neurons):
        try:
            sites += kind(model).sites
        except ValueError:
            continue
    return Units(tuple(sites))


def random_values(units: Units, model: Any, seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)
    widths = {"head": model.cfg.d_head, "neuron": 1}
    return Values(units, tuple(torch.randn(s.size, widths[s.kind], generator=generator) for s in units.sites))


def reduction_of(model: Any, kept: Tensor | list[str], seed: int = 0) -> Reduction:
    units = units_of(model)
    circuit = Circuit(units, kept) if isinstance(kept, Tensor) else Circuit.of(units, kept)
    return Reduction(circuit, random_values(units, model, seed), fingerprint=fingerprint(model))


def mask(units: Units, patterns: list[str], seed: int) -> Tensor:
    """Kept units: per site all, none, one or random ones."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i, site in enumerate(units.sites):
        chance = torch.rand(site.size, generator=generator)
        kept = {"all": chance >= 0, "none": chance < 0, "one": chance == chance.max(), "some": chance < 0.4}
        parts.append(kept[patterns[i % len(patterns)]])
    return torch.cat(parts)


def tokens(seed: int = 0, batch: int = 3, pos: int = 9) -> Tensor:
    return torch.randint(VOCABULARY, (batch, pos), generator=torch.Generator().manual_seed(seed))


def ablated(model: Any, reduction: Reduction, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad(), intervened(model, ablate(reduction)):
        return model(*args, **kwargs)


def distance(model: Any, reduction: Reduction, folded: Any, *args: Any, **kwargs: Any) -> float:
    """Largest difference of the logits, without casts in float64 models; both sides are finite."""
    casts = NoCasts() if next(model.parameters()).dtype == torch.float64 else nullcontext()
    with torch.no_grad(), casts:
        expected, found = ablated(model, reduction, *args, **kwargs), folded(*args, **kwargs)
    assert expected.isfinite().all() and found.isfinite().all() and found.dtype == expected.dtype
    return (expected - found).abs().max().item()


def bytes_of(model: Any) -> int:
    """Memory of the parameters, each storage once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


PATTERNS = st.lists(st.sampled_from(["all", "none", "one", "some"]), min_size=6, max_size=6)
SEEDS = st.integers(0, 2**31)


def projected(block: Any, heads: int, kv_heads: int, neurons: int) -> int:
    """How many parameters the projections of a block have with so many units, without output biases."""
    attention, d_head, d_model = block.attn, block.attn.config.d_head, block.attn.config.d_model
    maps = [block.mlp._modules[name].original_component for name in ("in", "gate") if name in block.mlp._modules]
    biases = [d_head * (heads + 2 * kv_heads)] * (attention.q.original_component.bias is not None)
    biases += [neurons * len(maps)] * (maps[0].bias is not None)
    return (2 * heads + 2 * kv_heads) * d_head * d_model + (len(maps) + 1) * neurons * d_model + sum(biases)


def check_sizes(model: Any, folded: Any, left: list[tuple[int, int, int]]) -> None:
    """A model folded to so many heads, key/value heads and neurons in each layer has no other parameters."""
    made = removed = 0
    for block, small, (h, kv, n) in zip(model.blocks, folded.blocks, left, strict=True):
        weights = [small.attn.W_Q, small.attn.W_K, small.attn.W_V, small.attn.W_O]
        assert [weight.shape[0] for weight in weights] == [h, kv, kv, h]
        assert small.mlp.W_in.shape[1] == small.mlp.W_out.shape[0] == n
        assert small.mlp.b_out.shape == small.attn.b_O.shape == (model.cfg.d_model,)
        full = (block.attn.W_Q.shape[0], block.attn.W_K.shape[0], block.mlp.W_out.shape[0])
        removed += projected(block, *full) - projected(block, h, kv, n)
        made += sum(part.original_component.bias is None for part in (block.attn.o, block.mlp.out)) * model.cfg.d_model
    assert folded.n_params_total == model.n_params_total - removed + made
    for name, parameter in folded.named_parameters():
        assert parameter.ndim < 2 or parameter.numel() == 0 or (parameter != 0).any(dim=1).all(), name


def removed(units: Units, width: int, value: float = 0.0) -> Reduction:
    """Every unit set to one value."""
    values = Values(units, tuple(torch.full((site.size, width), value) for site in units.sites))
    return Reduction(Circuit.empty(units), values)
