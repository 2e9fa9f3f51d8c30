"""Checks: what every entry point refuses in one sentence."""

from __future__ import annotations

from typing import Any

import torch


def check_is_model(model: Any) -> None:
    """Refuse what has no hook points.

    Raises:
        ValueError: anything but a bridge or a ``HookedRootModule``, with how to get one.
    """
    if isinstance(model, torch.nn.Module) and hasattr(model, "hooks"):
        return
    what = f"the text {model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
    get = "TransformerBridge.boot_transformers(name)"
    if callable(getattr(model, "model", None)):
        get = "task.model()"
    elif isinstance(model, torch.nn.Module):
        get = "a bridge around it, TransformerBridge.boot_transformers(name, hf_model=model)"
    raise ValueError(f"model is {what}, which has no hook points: give a TransformerLens model, {get}")
