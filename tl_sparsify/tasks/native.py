"""TransformerLens-native models as a folder: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native

from tl_sparsify._internal.files import write_bytes, write_text


def load_native(folder: str | Path) -> TransformerBridge:
    """The native model that :func:`save_native` wrote, on the CPU and in evaluation mode.

    Raises:
        ValueError: a folder without ``config.json`` or ``model.safetensors``.

    Example:
        >>> folder = tls.task.own_language_model().parents[1] / "hierarchical_equality" / "model"
        >>> tls.heads(tls.task.load_native(folder))
        Units(12: 12 heads)
    """
    folder = Path(folder)
    for part in ("config.json", "model.safetensors"):
        if not (folder / part).is_file():
            raise ValueError(f"{folder} has no {part}: give a folder that save_native wrote")
    model = boot_native(TransformerBridgeConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def save_native(model: TransformerBridge, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write the model's weights and the settings of its ``TransformerBridgeConfig``.

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
    empty = boot_native(TransformerBridgeConfig(**config)).state_dict()
    if {name: value.shape for name, value in empty.items()} != {name: value.shape for name, value in tensors.items()}:
        raise ValueError("the model's weights do not have the shapes that config gives")
    write_bytes(folder / "model.safetensors", to_bytes(tensors))
    write_text(folder / "config.json", json.dumps(dict(config), indent=1) + "\n")
