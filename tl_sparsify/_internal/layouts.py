"""Layouts: what of a model's architecture interventions rely on, and who is refused for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

_POST_NORMED = ("Gemma2For", "Gemma3For", "Olmo2For", "Olmo3For")
STREAM, _LOGITS = "unembed.hook_in", "unembed.hook_out"


def blocks_that_read(model: Any) -> Iterator[tuple[int, Any]]:
    """Every block with its number.

    Raises:
        ValueError: a model in which the stream is not the sum of what heads and MLPs write, or in which a reader cannot
            be given an input of its own.
    """
    for layer, block in enumerate(model.blocks):
        architecture = str(getattr(model.cfg, "architecture", None))
        behind = [norm for norm in ("ln1_post", "ln2_post") if isinstance(getattr(block, norm, None), nn.Module)]
        if behind and not architecture.startswith(_POST_NORMED):
            raise ValueError(
                f"block {layer} has a norm behind its attention or MLP ({behind[0]}), and whether the stream of "
                f"{architecture} is the sum of what comes out of these is not known (it is for "
                "Gemma 2 and 3, OLMo 2 and 3): use heads() and mlps()"
            )
        points = model.hook_dict
        if f"blocks.{layer}.attn.hook_z" not in points and f"blocks.{layer}.hook_attn_out" in points:
            raise ValueError(f"block {layer} has attention without heads (no hook_z): use attentions() and mlps()")
        both = f"blocks.{layer}.hook_mlp_out" in points and hasattr(block, "attn")
        if both and getattr(model.cfg, "parallel_attn_mlp", False) and not of_its_own(block):
            raise ValueError(
                f"block {layer}'s attention and MLP read through one norm, so that they cannot be given inputs of "
                "their own: use heads() and mlps()"
            )
        yield layer, block


def check_apart(layer: int, attn: Any) -> None:
    """Refuse attention whose heads cannot be given keys and values of their own.

    Raises:
        ValueError: naming the layer.
    """
    inner = getattr(attn, "original_component", attn)
    normed = getattr(attn, "_qk_norm_phase", None) == "pre_reshape"  # one norm over the keys of all heads
    gated = getattr(attn.config, "gated_q_proj", False) or "gate" in getattr(attn, "submodules", {})
    known = type(attn).__name__ == "PositionEmbeddingsAttentionBridge"
    if not known or normed or gated or getattr(inner, "sinks", None) is not None:
        raise ValueError(
            f"grouped is False, and the heads of block {layer} ({type(inner).__name__}) cannot be given keys and "
            "values of their own: leave grouped=True, where those that share them share a reader"
        )


def post_norm(block: Any) -> Any:
    """What a layer's attention passes before it joins the stream, without hooks; ``None`` where that is nothing."""
    norm = getattr(block, "ln1_post", None)
    return (getattr(norm, "original_component", None) or norm) if isinstance(norm, nn.Module) else None


def of_its_own(block: Any) -> bool:
    return getattr(block, "ln2", None) is not None or getattr(block, "ln1", None) is None


def narrows(model: Any) -> bool:
    """Whether :func:`intervene.narrowed` leaves every logit what it is: all that follows the unembedding's input takes
    each position alone, and nobody looks at what comes out of the unembedding.

    The first is what a Hugging Face model says that can leave logits out itself (``logits_to_keep``), and true of
    TransformerLens's native models.
    """
    inner, points = getattr(model, "original_model", None), getattr(model, "hook_dict", {})
    if inner is None or STREAM not in points or _LOGITS not in points:
        return False
    native = type(inner).__name__ == "NativeModel"
    if not native and "logits_to_keep" not in inspect.signature(inner.forward).parameters:
        return False
    seen = points[_LOGITS].fwd_hooks or points[_LOGITS].bwd_hooks or points[STREAM].bwd_hooks
    return not seen and model.unembed.hook_out is points[_LOGITS]
