"""TransformerLens-native models as a folder: ``config.json``, ``model.safetensors`` and a checksum of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native

from tl_sparsify._internal.files import reading, write_bytes, write_text
from tl_sparsify._internal.storage import check_size

_PARTS = ("config.json", "model.safetensors")
_CHECKSUM = "model.sha256"


def load_native(folder: str | Path) -> TransformerBridge:
    """The native model that :func:`save_native` wrote, on the CPU and in evaluation mode. Global random state stays as
    it is.

    Raises:
        ValueError: a folder without ``config.json`` or ``model.safetensors``, or with parts that are damaged or do not
            belong together (a folder without a checksum, which older versions wrote, is loaded all the same).

    Example:
        >>> folder = tls.task.own_language_model().parents[1] / "hierarchical_equality" / "model"
        >>> tls.heads(tls.task.load_native(folder))
        Units(12: 12 heads)
    """
    folder = Path(folder)
    for part in _PARTS:
        if not (folder / part).is_file():
            raise ValueError(f"{folder} has no {part}: give a folder that save_native wrote")
    config, weights = ((folder / part).read_bytes() for part in _PARTS)
    known = folder / _CHECKSUM
    if known.is_file() and known.read_bytes().strip() != checksum_of(config, weights).encode():
        raise ValueError(f"{folder} is damaged: its checksum does not match {' and '.join(_PARTS)}. Save it again.")
    with reading(folder, "model whose parts fit together"):
        settings, tensors = json.loads(config), from_bytes(weights)
        if int(settings["n_layers"]) > len(tensors):
            raise ValueError(f"config.json has {settings['n_layers']} layers, model.safetensors {len(tensors)} tensors")
        empty = check_size(
            lambda: boot_native(TransformerBridgeConfig(**settings)), sum(map(Tensor.numel, tensors.values()))
        )
        empty.load_state_dict(tensors, assign=True)  # refuses other shapes before there is memory for them
        wrong = [name for name, tensor in tensors.items() if tensor.is_floating_point() and bool(tensor.isnan().any())]
        if wrong:
            raise ValueError(f"{wrong[0]} has NaN in it")
        with torch.random.fork_rng(devices=[]):
            model = boot_native(TransformerBridgeConfig(**settings))
        model.load_state_dict(tensors)
    return model.eval()


def save_native(model: TransformerBridge, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write the model's weights, the settings of its ``TransformerBridgeConfig`` and a checksum of both.

    Raises:
        ValueError: weights that do not fit the settings.

    Example:
        >>> from transformer_lens import TransformerBridge, TransformerBridgeConfig
        >>> config = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "d_mlp": 8, "n_ctx": 3, "d_vocab": 5}
        >>> config |= {"act_fn": "relu", "seed": 0}
        >>> tls.task.save_native(TransformerBridge.boot_native(TransformerBridgeConfig(**config)), config, "model")
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        empty = boot_native(TransformerBridgeConfig(**config)).state_dict()
    if {name: value.shape for name, value in empty.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError("the model's weights do not have the shapes that config gives")
    weights, settings = to_bytes(tensors), json.dumps(dict(config), indent=1) + "\n"
    # the checksum goes first: half of a model is refused, also beside the other half of an older one
    write_text(folder / _CHECKSUM, checksum_of(settings.encode(), weights) + "\n")
    write_bytes(folder / "model.safetensors", weights)
    write_text(folder / "config.json", settings)


def checksum_of(config: bytes, weights: bytes) -> str:
    """SHA-256 of both files, one after the other."""
    return hashlib.sha256(hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()).hexdigest()
