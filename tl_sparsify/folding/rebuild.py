"""A bridge of a known architecture without its weights, from what json can hold, and giving it weights.

This is how a folded model is loaded without the model that it was made from: the full-sized modules are built
uninitialised, made smaller, and given the parameters of the file. Only classes named in this package are built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformer_lens import TransformerBridge, TransformerBridgeConfig
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers.initialization import no_init_weights

from tl_sparsify.folding.checkpoint import ATTENTION_IMPLEMENTATIONS, check_attention

NATIVE = "TransformerLensNative"
HUGGING_FACE = (
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
"""Classes of the transformers package, by the name that ``model.cfg.architecture`` has."""

_SETTINGS = ("model_name", "default_prepend_bos")  # what a user may have set on the bridge's own configuration


def describe(bridge: Any) -> dict[str, Any]:
    """What :func:`build` needs, as json holds it: architecture, configuration, dtype, and the bridge's own settings."""
    model = bridge.original_model
    if bridge.cfg.architecture == NATIVE:
        config, attention = {name: value for name, value in vars(model.cfg).items() if _is_json(value)}, None
    else:
        config = json.loads(model.config.to_json_string(use_diff=False))
        attention = model.config._attn_implementation
        attention = attention if attention in ATTENTION_IMPLEMENTATIONS else "eager"  # which a bridge runs anyway
    return {
        "architecture": bridge.cfg.architecture,
        "config": config,
        "attention": attention,
        "dtype": str(bridge.cfg.dtype).removeprefix("torch."),
        "settings": {name: getattr(bridge.cfg, name, None) for name in _SETTINGS},
    }


def build(description: Mapping[str, Any], tokenizer: Any) -> Any:
    """A bridge of full size whose weights are not to be used. Global random state stays as it is.

    Raises:
        ValueError: an architecture that is not named here, or an attention implementation that no file may name.
    """
    architecture, dtype = description["architecture"], getattr(torch, description["dtype"])
    if architecture not in (NATIVE, *HUGGING_FACE):
        raise ValueError(f"models of architecture {architecture} cannot be loaded by this version")
    with torch.random.fork_rng(devices=[]):
        if architecture == NATIVE:
            config = TransformerBridgeConfig.from_dict(description["config"] | {"dtype": dtype, "init_weights": False})
            bridge_class: Any = TransformerBridge  # transformer_lens attaches boot_native when it is imported
            bridge = bridge_class.boot_native(config, tokenizer=tokenizer, dtype=dtype)
        else:
            model_class = getattr(transformers, architecture)
            for name in ("attn_implementation", "_attn_implementation"):
                check_attention(description["config"].get(name))
            check_attention(description["attention"])
            config = model_class.config_class.from_dict(description["config"])
            config._attn_implementation = description["attention"]
            with no_init_weights():
                model = model_class(config).to(dtype)
            model.tie_weights()
            bridge = build_bridge_from_module(model, architecture, hf_config=config, tokenizer=tokenizer)
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
