"""Small mixtures of experts of several architectures."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from helpers.architectures import GROUPED
from helpers.native import randomised


@cache
def mixture(name: str) -> Any:
    """A small model in float64 of this architecture with four experts, of which two see a token."""
    settings = {key: value for key, value in GROUPED.items() if key != "head_dim"}
    counts = {"Mixtral": "num_local_experts", "GptOss": "num_local_experts"}
    settings |= {counts.get(name, "num_experts"): 4, "num_experts_per_tok": 2, "attn_implementation": "eager"}
    settings["experts_implementation"] = "eager"  # the others are not for float64
    if name == "Qwen2Moe":
        settings |= {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 10}
    if name == "GptOss":
        settings |= {"head_dim": settings["hidden_size"] // settings["num_attention_heads"]}
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = randomised(getattr(transformers, f"{name}ForCausalLM")(config), scale=0.4).double()
    return build_bridge_from_module(model, f"{name}ForCausalLM", hf_config=config, dtype=torch.float64).eval()
