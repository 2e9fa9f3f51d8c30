"""Exported checkpoints as bridges: what TransformerLens's own loader needs to load one.

``TransformerBridge.boot_transformers(folder)`` reads the configuration, whose class imports this module. It registers
an adapter for each class of folded models, which makes the loaded model one of the architecture's own class, with maps
of other sizes, and the bridge around it a :class:`FoldedBridge`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformers.pytorch_utils import Conv1D

from tl_sparsify.folding.bridge import FoldedBridge, finish
from tl_sparsify.folding.checkpoint import CLASSES, Gathered, NoMLP, layers_of
from tl_sparsify.folding.narrow import narrow_mlp, set_linear, shape_attention, transposed


def _adapter_class(architecture: str, model_class: Any) -> Any:
    """The adapter of folded models of an architecture."""
    plain = SUPPORTED_ARCHITECTURES[architecture]
    base = model_class.__base__

    def __init__(self: Any, cfg: Any) -> None:
        cfg.architecture = architecture  # the bridge folds, is saved and exported as any other
        plain.__init__(self, cfg)
        attention = self.component_mapping["blocks"].submodules["attn"]
        if hasattr(attention, "split_qkv_matrix"):
            attention.split_qkv_matrix = self.split_qkv_matrix

    def prepare_model(self: Any, hf_model: Any) -> None:
        self.folded_layers = hf_model.config.folded_layers
        _make_ordinary(hf_model, base)
        plain.prepare_model(self, hf_model)

    def setup_hook_compatibility(self: Any, bridge: Any) -> None:
        for name in ("setup_hook_compatibility", "setup_no_processing_hooks"):
            if hasattr(plain, name):
                getattr(plain, name)(self, bridge)
                break
        if not isinstance(bridge, FoldedBridge):
            _become_folded(bridge, self.folded_layers)

    def split_qkv_matrix(self: Any, attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return _split(attention, self.cfg.d_head)

    members: dict[str, Any] = {"__init__": __init__, "prepare_model": prepare_model, "__module__": __name__}
    members |= {"setup_hook_compatibility": setup_hook_compatibility, "split_qkv_matrix": split_qkv_matrix}
    return type(f"Folded{plain.__name__}", (plain,), members)


def _split(attention: Any, d_head: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The maps q, k and v of a layer's fused one, whatever number of heads the layer has."""
    if hasattr(attention, "c_attn"):  # GPT-2: queries of all heads, then keys, then values
        fused = attention.c_attn
        weights, biases = [part.T for part in fused.weight.chunk(3, dim=1)], list(fused.bias.chunk(3))
    else:  # GPT-NeoX: query, key and value of one head after the other
        fused = attention.query_key_value
        by_head = (fused.out_features // (3 * d_head), 3, d_head)
        weights = [part.flatten(0, 1) for part in fused.weight.unflatten(0, by_head).unbind(1)]
        biases = [part.flatten() for part in fused.bias.unflatten(0, by_head).unbind(1)]
    maps = [nn.Linear(1, 1, device="meta") for _ in range(3)]
    for linear, weight, bias in zip(maps, weights, biases, strict=True):
        set_linear(linear, weight.detach(), bias.detach())
    return maps[0], maps[1], maps[2]


def _become_folded(bridge: Any, layers: list[dict[str, Any]]) -> None:
    """Make a bridge whose layers have maps of their own sizes a folded one. In place."""
    bridge.__class__ = FoldedBridge
    bridge.units = {}
    for layer, (block, sizes) in enumerate(zip(bridge.blocks, layers, strict=True)):
        shape_attention(block.attn, torch.tensor(sizes["kv_index"], dtype=torch.long))
        if sizes["neurons"] == 0:
            narrow_mlp(block.mlp, torch.arange(0))
        for letter, originals in sizes["units"].items():
            bridge.units |= {f"L{layer}{letter}{new}": f"L{layer}{letter}{old}" for new, old in enumerate(originals)}
    finish(bridge)


def _make_ordinary(model: Any, base: Any) -> None:
    """Make a loaded folded model one of the architecture's own class ``base``, its maps of the folded sizes: parts
    without heads or neurons get maps without inputs, and keys and values are no longer gathered. In place."""
    settings = model.config.to_dict()
    for name in ("folded_layers", "model_type", "architectures"):
        settings.pop(name, None)
    config = base.config_class.from_dict(settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        plain = layers_of(base(config), base)
    for block, whole in zip(layers_of(model, base), plain, strict=True):
        for name, part in list(block.named_children()):
            if isinstance(part, NoMLP):
                setattr(block, name, _emptied(getattr(whole, name), part.name, part.output_bias))
        for part in block.modules():
            if isinstance(part, Gathered):
                plain_map: Any = part
                plain_map.__class__ = nn.Linear
    for part in model.modules():
        if getattr(part, "config", None) is not None:
            part.config = config
    model.__class__ = base


def _emptied(part: Any, output: str, bias: Tensor) -> Any:
    """An attention or MLP, on no device yet, with maps for no heads or neurons at all; it writes ``bias``."""
    for module in part.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            for name, parameter in module._parameters.items():
                if parameter is not None:  # a norm of queries: of nothing
                    module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device=bias.device).to(bias))
    for name, linear in part.named_children():
        if not isinstance(linear, nn.Linear | Conv1D):
            continue
        writes = name == output
        shape = (0, len(bias)) if writes == transposed(linear) else (len(bias), 0)
        set_linear(linear, bias.detach().new_zeros(shape), bias.detach() if writes else linear.bias)
        if not writes and linear.bias is not None:
            linear.bias = nn.Parameter(bias.detach().new_zeros(0))
    return part.eval()


for _architecture, _model_class in CLASSES.items():
    _adapter = _adapter_class(_architecture, _model_class)
    SUPPORTED_ARCHITECTURES[_model_class.__name__] = _adapter
    ArchitectureAdapterFactory.register_adapter(_model_class.__name__, _adapter)
