"""Folding: a reduction becomes a physically smaller TransformerLens model.

Removed heads leave the weights Q, K, V and O, removed neurons leave W_in, W_gate and W_out, and their constants go
into the biases, which are made where the architecture has none:

    b_O += sum_h W_O[h]' c[h]        b_out += sum_n c[n] W_out[n]

For every input the folded model computes what the ablated one does, up to the order in which floating-point numbers
are added. It is a bridge with the same hook points, which carry the kept units only, and ``folded.units`` says which
original unit each of its own is. Nothing is masked and no zeroed row stays.

Only constants fold that are the same for every example and position. Layer norms are not folded into weights unless
the model's already were; compatibility mode is enabled before folding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens import TransformerBridge
from transformers.pytorch_utils import Conv1D

from tl_sparsify._folded import FoldedBridge, finish, load_folded, save_folded
from tl_sparsify._narrow import kv_index, n_neurons, narrow_attention, narrow_mlp
from tl_sparsify._skeleton import HUGGING_FACE, NATIVE
from tl_sparsify.circuit import Reduction, check_fingerprint
from tl_sparsify.intervene import check_model
from tl_sparsify.units import Site

__all__ = ["ARCHITECTURES", "FoldedBridge", "fold", "load_folded", "save_folded"]

ARCHITECTURES = (NATIVE, *HUGGING_FACE)
"""The architectures whose folding is tested (``model.cfg.architecture``)."""

_HOOK = {"head": "attn.hook_z", "neuron": "mlp.hook_post"}
_MIXING = ("solu", "solu_ln")  # activations of a neuron that depend on the other neurons


def fold(model: Any, reduction: Reduction) -> FoldedBridge:
    """Compile a reduction into a smaller model. No model pass; memory for the smaller model's weights.

    Args:
        model: the ``TransformerBridge`` that the reduction was made for; it is not changed.
        reduction: the circuit and the constants of its removed units (heads and neurons).

    Returns:
        A bridge with the kept units only, on the same devices, in the same dtype, in evaluation mode. A folded model
        can be folded again.

    Raises:
        ValueError: an architecture or a feature that does not fold exactly; units that the model lacks, of a kind that
            does not fold, or at named positions; constants that are not finite; a reduction of another model; a model
            in training mode, or with hooks on it.
    """
    _check_model(model)
    check_fingerprint(model, reduction)
    cuts = _cuts(model, reduction)
    _check_weights(model, cuts)

    replaced = {id(p): p for cut in cuts for module in _projections(model, cut).values() for p in module.parameters()}
    folded = copy.deepcopy(model, replaced | _left_behind(model))  # does not copy what is replaced below
    folded.__class__ = FoldedBridge
    for cut in cuts:
        kept = cut.keep.nonzero().flatten()
        if cut.site.kind == "head":
            narrow_attention(folded.blocks[cut.site.layer].attn, kept, cut.constants)
        else:
            narrow_mlp(folded.blocks[cut.site.layer].mlp, kept, cut.constants[:, 0])
    folded.units = _composed(model, cuts)
    finish(folded)
    return folded


@dataclass(frozen=True)
class _Cut:
    """What leaves one site: the kept units and everybody's constants."""

    site: Site
    keep: Bool[Tensor, "units"]
    constants: Float[Tensor, "units width"]


def _cuts(model: TransformerBridge, reduction: Reduction) -> list[_Cut]:
    """The sites that lose units, checked against the model."""
    cuts: list[_Cut] = []
    hooks = model.hook_dict
    seen: set[int] = set()
    masks = reduction.units.split(reduction.circuit.mask)
    for site, keep, constants in zip(reduction.units.sites, masks, reduction.values.tensors, strict=True):
        _check_site(model, hooks, site, constants)
        if id(hooks[site.hook]) in seen:
            raise ValueError(f"units hold {site.hook} twice; each head and neuron may stand once")
        seen.add(id(hooks[site.hook]))
        if bool(keep.all()):
            continue
        if not bool(torch.isfinite(constants[~keep.to(constants.device)]).all()):
            raise ValueError(f"values of removed units at {site.hook} are NaN or infinite")
        cuts.append(_Cut(site, keep.cpu(), constants))
    return cuts


def _check_site(
    model: TransformerBridge, hooks: Mapping[str, Any], site: Site, constants: Float[Tensor, "units width"]
) -> None:
    if site.hook not in hooks:
        raise ValueError(f"the model has no hook point {site.hook!r}: are the units those of this model?")
    if site.kind not in _HOOK:
        raise ValueError(f"units of kind {site.kind!r} do not fold; those of kind {' and '.join(_HOOK)} do")
    if site.positions is not None:
        raise ValueError(f"units at positions {site.suffix[1:]} of {site.hook} do not fold: weights act everywhere")
    name = f"blocks.{site.layer}.{_HOOK[site.kind]}"
    if hooks.get(name) is not hooks[site.hook]:
        raise ValueError(f"{site.kind} units of {site.hook} do not fold; those of {name} do")
    block = model.blocks[site.layer]
    size = len(kv_index(block.attn)) if site.kind == "head" else n_neurons(block.mlp)
    width = block.attn.config.d_head if site.kind == "head" else 1
    if site.size != size or constants.shape[-1] != width:
        raise ValueError(
            f"{site.hook} has {size} {site.kind} units of width {width}, the reduction's {site.size} of width "
            f"{constants.shape[-1]}: is it a reduction of this model?"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, TransformerBridge):
        raise ValueError(f"fold needs a TransformerBridge, not a {type(model).__name__}")
    architecture = getattr(model.cfg, "architecture", None)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"models of architecture {architecture} do not fold; these do: {', '.join(ARCHITECTURES)}")
    check_model(model)
    hooked = [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    if hooked:
        raise ValueError(f"model has hooks, first at {hooked[0]}, which would not fold: call model.reset_hooks()")


def _check_weights(model: TransformerBridge, cuts: list[_Cut]) -> None:
    """Refuse what would not fold exactly in the layers that lose units."""
    for cut in cuts:
        where = f"blocks.{cut.site.layer}.{'attn' if cut.site.kind == 'head' else 'mlp'}"
        activation = (getattr(model.cfg, "act_fn", None) or "").lower()
        if cut.site.kind == "neuron" and activation in _MIXING:
            raise ValueError(f"neurons of {where} do not fold: the activation {activation} mixes neurons")
        for name, bridge in _projections(model, cut).items():
            module = bridge.original_component
            if type(module) not in (nn.Linear, Conv1D) or not module.weight.is_floating_point():
                raise ValueError(f"{where}.{name} is a {type(module).__name__}, which does not fold (quantised?)")
            if module.weight.is_meta:
                raise ValueError(f"{where}.{name} is offloaded and has no weights here: load the model without")


def _projections(model: TransformerBridge, cut: _Cut) -> dict[str, Any]:
    """The bridges of the linear maps that change size with a cut."""
    block = model.blocks[cut.site.layer]
    part, names = (block.attn, "q k v o qkv") if cut.site.kind == "head" else (block.mlp, "in gate out")
    return {name: part._modules[name] for name in names.split() if name in part._modules}


def _left_behind(model: TransformerBridge) -> dict[int, None]:
    """Activations that the last forward pass left on the model, which may be part of a graph: not to be copied."""
    names = ("_captured_pre_ln_residual", "_pattern", "_attn_scores")
    attentions = [block.attn for block in model.blocks if "attn" in block._modules]
    return {id(getattr(attention, name, None)): None for attention in attentions for name in names}


def _composed(model: TransformerBridge, cuts: list[_Cut]) -> dict[str, str]:
    """The original name of every unit that is left, by its new name."""
    before = getattr(model, "units", None) if isinstance(model, FoldedBridge) else None
    keeps = {(cut.site.kind, cut.site.layer): cut.keep.nonzero().flatten().tolist() for cut in cuts}
    names: dict[str, str] = {}
    for layer, block in enumerate(model.blocks):
        for kind, letter, part in (("head", "H", "attn"), ("neuron", "N", "mlp")):
            if part not in block._modules:
                continue
            size = len(kv_index(block.attn)) if kind == "head" else n_neurons(block.mlp)
            for new, old in enumerate(keeps.get((kind, layer), range(size))):
                name = f"L{layer}{letter}{old}"
                names[f"L{layer}{letter}{new}"] = name if before is None else before[name]
    return names
