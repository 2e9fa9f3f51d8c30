"""A bridge of a known architecture without its weights, from what json can hold, and giving it weights.

This is how a folded model is loaded without the model that it was made from: the full-sized modules are built
uninitialised, made smaller, and given the parameters of the file. Only classes named in this package are built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources import native

NATIVE = "TransformerLensNative"


def describe(bridge: Any) -> dict[str, Any]:
    """What :func:`build` needs, as json holds it: architecture, configuration, dtype, and the bridge's own settings."""
    config = bridge.original_model.cfg
    return {
        "architecture": bridge.cfg.architecture,
        "config": {name: value for name, value in vars(config).items() if _is_json(value)},
        "dtype": str(bridge.cfg.dtype).removeprefix("torch."),
        "settings": {name: getattr(bridge.cfg, name, None) for name in ("model_name", "default_prepend_bos")},
    }


def build(description: Mapping[str, Any], tokenizer: Any) -> Any:
    """A bridge of full size whose weights are not to be used. Global random state stays as it is."""
    dtype = getattr(torch, description["dtype"])
    config = TransformerBridgeConfig.from_dict(description["config"] | {"dtype": dtype, "init_weights": False})
    with torch.random.fork_rng(devices=[]):
        bridge = native.boot(config, tokenizer=tokenizer, dtype=dtype)
    for name, value in description["settings"].items():
        setattr(bridge.cfg, name, value)
    return bridge


def numbers(bridge: Any) -> dict[str, Tensor]:
    """Every parameter, and every buffer of real numbers (tables of positions), once, by its path."""
    model = bridge.original_model
    fused = {id(p) for block in bridge.blocks for p in _fused(block)}  # made again from q, k and v
    tensors = {name: p for name, p in model.named_parameters() if id(p) not in fused}
    return tensors | {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def assign(bridge: Any, tensors: Mapping[str, Tensor], frozen: set[str]) -> None:
    """Give a bridge of the right sizes its parameters and buffers, by the paths of :func:`numbers`. Tied parameters
    stay tied.

    Raises:
        ValueError: a path that the bridge lacks, a parameter that is missing, or one of another shape.
    """
    model = bridge.original_model
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf, f"{path}.{leaf}"))
    missing = {name for name in numbers(bridge) if name not in tensors}
    if missing:
        raise ValueError(f"parameter {min(missing)} is missing")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"parameter {name} belongs to no module of the model") from error
        before = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if before is not None and before.shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(before.shape)}")
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor.clone()
            continue
        # A copy: in the file the numbers are not aligned, and then some processors add them in another order.
        parameter = nn.Parameter(tensor.clone(), requires_grad=name not in frozen)
        owner._parameters[leaf] = parameter
        for module, other, full in places.get(id(before), []) if before is not None else ():
            if full not in tensors:
                module._parameters[other] = parameter


def _fused(block: Any) -> list[nn.Parameter]:
    attention = block._modules.get("attn")
    return list(attention.qkv.parameters()) if attention is not None and "qkv" in attention._modules else []


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
