"""Small models with random weights of every Hugging Face configuration that is supported, and prompts for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import DynamicCache

from helpers.native import randomised
from tl_sparsify.core.examples import Examples

COMMON = {"vocab_size": 17, "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
COMMON |= {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "max_position_embeddings": 32}
GROUPED = COMMON | {"num_key_value_heads": 3, "head_dim": 4}
SLIDING = GROUPED | {"sliding_window": 6}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_head": 6, "n_layer": 3, "n_inner": 20, "vocab_size": 17, "n_positions": 32}
        | {"bos_token_id": 0, "eos_token_id": 1},
    ),
    "Pythia": ("GPTNeoXForCausalLM", COMMON | {"rotary_pct": 0.5}),
    "GPT-NeoX, sequential": ("GPTNeoXForCausalLM", COMMON | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Llama with biases": ("LlamaForCausalLM", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("MistralForCausalLM", SLIDING),
    "Qwen2": ("Qwen2ForCausalLM", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "Qwen3": ("Qwen3ForCausalLM", GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", SLIDING),
    "Gemma 3": ("Gemma3ForCausalLM", SLIDING),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMo 2": ("Olmo2ForCausalLM", {k: v for k, v in GROUPED.items() if k != "head_dim"})
}
"""Not known to everything: norms behind attention and MLPs alone."""
UNEVEN = ["some", "one", "none", "some"]  # by site: here 3 sites of heads, then 3 of neurons, in turn
FIRST_EMPTY = ["none", "some", "some", "one"]


def fresh(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A bridge with random weights, large enough that attention is far from uniform."""
    architecture, settings = (CONFIGS | MORE)[name]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**settings | options)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = randomised(model_class(config).to(dtype), scale=0.4)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):  # Gemma's: a model made in float64 has it in float64
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    return build_bridge_from_module(model, architecture, hf_config=config).eval()


@cache
def bridge(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The same for all tests that do not change it."""
    return fresh(name, dtype)


def one_by_one(model: Any, inputs: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt, and of the tokens after it, each in a step of its own with the key/value cache."""
    past = DynamicCache(config=model.original_model.config)
    steps = [inputs[:, :prompt], *inputs[:, prompt:].split(1, dim=1)]
    return torch.cat([model(step, past_key_values=past, use_cache=True) for step in steps], dim=1)


def batch(n: int = 4, length: int = 6, choices: tuple[int, ...] = (3, 5, 9)) -> Examples:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 17, (n, length), generator=generator)
    labels = torch.full((n, length), -100)
    labels[:, -1] = torch.tensor(choices)[torch.randint(len(choices), (n,), generator=generator)]
    return Examples(tokens, labels, choices=torch.tensor(choices))


def padded(examples: Examples, side: str, by: int = 3) -> Examples:
    def fill(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (by, 0) if side == "left" else (0, by), value=value)

    mask = fill(torch.ones_like(examples.tokens), 0).bool()
    return Examples(fill(examples.tokens, 0), fill(examples.labels, -100), mask, choices=examples.choices)
