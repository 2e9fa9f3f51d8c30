"""Sizes of units come from a model's layers, also where their weights are packed, elsewhere, or one of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import GROUPED, fresh
from helpers.models import unchecked
from helpers.native import randomised
from torch import nn
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_sparsify import Examples, attentions, heads, mlps, neurons, score
from tl_sparsify.abstraction.interchange import families


def mixture() -> Any:
    settings = {key: value for key, value in GROUPED.items() if key != "head_dim"}
    config = transformers.MixtralConfig(**settings, num_local_experts=2, num_experts_per_tok=1)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        model = randomised(transformers.MixtralForCausalLM(config), scale=0.4)
    return build_bridge_from_module(model, "MixtralForCausalLM", hf_config=config).eval()


def test_a_mixture_of_experts_has_heads_and_whole_layers_and_refuses_neurons_by_name():
    model = mixture()
    assert [len(units) for units in (heads(model), attentions(model), mlps(model))] == [18, 3, 3]
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.hook_post has no neuron units: .* mixture of experts.*mlps"):
        neurons(model)
    assert families(model) == heads(model)
    tokens = torch.randint(2, 17, (4, 6), generator=torch.Generator().manual_seed(0))
    data = Examples(tokens, tokens.where(torch.arange(6) == 5, -100))
    for units in (heads(model), mlps(model)):
        assert bool((score.risk(model, data, units).scores > 0).any())


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Pythia", "Gemma 2"])
def test_sizes_do_not_need_the_weights(name: str):
    whole, model = fresh(name), fresh(name)
    for block in model.blocks:
        for part in (block.attn.o, block.mlp.out):
            part.original_component.weight = nn.Parameter(torch.empty(7, 1, device="meta"), requires_grad=False)
    with unchecked():
        assert heads(model) == heads(whole) and neurons(model) == neurons(whole)
