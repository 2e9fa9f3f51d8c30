"""A bridge of a known architecture without its weights, from what json can hold, and giving it weights.

This is how a folded model is loaded without the model that it was made from: the full-sized modules are built
uninitialised, made smaller, and given the parameters of the file. Only classes named in this package are built.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformer_lens import TransformerBridge, TransformerBridgeConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers.initialization import no_init_weights

from tl_sparsify._internal.storage import check_size
from tl_sparsify.folding.checkpoint import ATTENTION_IMPLEMENTATIONS, CLASSES, check_attention

NATIVE = "TransformerLensNative"
HUGGING_FACE = tuple(CLASSES)
"""Classes of the transformers package, by the name that ``model.cfg.architecture`` has."""

_SETTINGS = ("model_name", "default_prepend_bos")  # what a user may have set on the bridge's own configuration
_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "quantization_config")
_PRECISIONS = ("float64", "float32", "bfloat16", "float16")


def describe(bridge: Any) -> dict[str, Any]:
    """What :func:`build` needs, as json holds it: architecture, configuration, dtype, and the bridge's own settings."""
    model = bridge.original_model
    if bridge.cfg.architecture == NATIVE:
        config, attention = {name: value for name, value in vars(model.cfg).items() if _is_json(value)}, None
    else:
        config = _without_code(json.loads(model.config.to_json_string(use_diff=False)))
        attention = model.config._attn_implementation
        attention = attention if attention in ATTENTION_IMPLEMENTATIONS else "eager"  # which a bridge runs anyway
    return {
        "architecture": bridge.cfg.architecture,
        "config": config,
        "attention": attention,
        "dtype": str(bridge.cfg.dtype).removeprefix("torch."),
        "settings": {name: getattr(bridge.cfg, name, None) for name in _SETTINGS},
    }


def build(description: Mapping[str, Any], tokenizer: Any, *, layers: int, numbers: int) -> Any:
    """A bridge of full size whose weights are not to be used. Global random state stays as it is.

    Args:
        layers, numbers: how many layers and numbers the file has in which the description stands.

    Raises:
        ValueError: an architecture that is not named here; a description that names code to run, or a model of other
            layers or far larger than the file.
    """
    _check(description, layers)
    check_size(lambda: _module(description), numbers)
    bridge = _built(description, tokenizer)
    for name in _SETTINGS:
        if name in description["settings"]:
            setattr(bridge.cfg, name, description["settings"][name])
    return bridge


def _check(description: Mapping[str, Any], layers: int) -> None:
    architecture, attention = description["architecture"], description["attention"]
    if architecture not in (NATIVE, *HUGGING_FACE):
        raise ValueError(f"models of architecture {architecture} cannot be loaded by this version")
    if description["dtype"] not in _PRECISIONS:
        raise ValueError(f"its precision is {description['dtype']!r}; it is one of {', '.join(_PRECISIONS)}")
    check_attention(attention)
    if architecture != NATIVE:
        found = sorted({name for name, value in _entries(description["config"]) if name in _CODE and value is not None})
        if found:
            raise ValueError(f"its configuration has {found[0]}, which may name code to run: no folded model has it")
        config = getattr(transformers, architecture).config_class
        named = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        if description["config"].get("architectures") not in (None, [architecture]):
            raise ValueError(
                f"it is said to be a {architecture}, its configuration a {description['config']['architectures']}"
            )
        kind = description["config"].get("model_type")
        if kind != config.model_type:
            raise ValueError(f"it is said to be a {architecture}, and its configuration is of type {kind!r}")
    else:
        named = "n_layers"
    if description["config"][named] != layers:
        raise ValueError(f"its configuration has {description['config'][named]} layers, the file {layers}")


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield str(name), value
            yield from _entries(value)
    elif isinstance(config, list):
        for value in config:
            yield from _entries(value)


def _without_code(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_code(value) for name, value in config.items() if name not in _CODE}
    return [_without_code(value) for value in config] if isinstance(config, list) else config


def _module(description: Mapping[str, Any]) -> Any:
    """The model that a bridge is put around; a native one with its bridge."""
    architecture, dtype = description["architecture"], getattr(torch, description["dtype"])
    if architecture == NATIVE:
        return _native(description, None).original_model
    model_class = getattr(transformers, architecture)
    config = model_class.config_class.from_dict(description["config"])
    config._attn_implementation = description["attention"]
    with no_init_weights():
        model = model_class(config).to(dtype)
    model.tie_weights()
    return model


def _native(description: Mapping[str, Any], tokenizer: Any) -> Any:
    dtype = getattr(torch, description["dtype"])
    config = TransformerBridgeConfig.from_dict(description["config"] | {"dtype": dtype, "init_weights": False})
    bridge_class: Any = TransformerBridge  # transformer_lens attaches boot_native when it is imported
    return bridge_class.boot_native(config, tokenizer=tokenizer, dtype=dtype)


def _built(description: Mapping[str, Any], tokenizer: Any) -> Any:
    architecture = description["architecture"]
    with torch.random.fork_rng(devices=[]):
        if architecture == NATIVE:
            return _native(description, tokenizer)
        model = _module(description)
        return build_bridge_from_module(model, architecture, hf_config=model.config, tokenizer=tokenizer)


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
        floats = leaf in owner._buffers and tensor.is_floating_point()  # a model's own tables keep their precision
        if before is not None and before.dtype != tensor.dtype and not (floats and before.is_floating_point()):
            raise ValueError(f"{name} is of type {tensor.dtype}, not {before.dtype}")
        if bool(tensor.isnan().any()):
            raise ValueError(f"{name} has NaN in it")
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor.clone()
            continue
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"parameter {name} has infinite numbers")
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
