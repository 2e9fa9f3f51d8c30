"""What is done with a folded model: scores, interchange, generation, several devices; and what fold refuses."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from helpers.architectures import CONFIGS, FIRST_EMPTY, UNEVEN, bridge
from helpers.architectures import fresh as fresh_bridge
from helpers.models import NoCasts
from helpers.native import distance, fresh, mask, native, reduction_of, removed, tokens, units_of
from torch import Tensor, nn
from transformer_lens.patching import generic_activation_patch, get_act_patch_resid_pre, layer_head_vector_patch_setter

from tl_sparsify import score
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import output, run_values
from tl_sparsify.core.intervene import ablate, interchange, intervened
from tl_sparsify.core.units import neurons
from tl_sparsify.folding.fold import fold

NAMES = ["gated, RMS, rotary, grouped", "GPT-2", "Pythia", "Llama", "Gemma 2"]


def model_of(name: str) -> Any:
    return bridge(name) if name in CONFIGS else native(name)


def examples(seed: int) -> Examples:
    inputs = tokens(seed, batch=6)
    labels = torch.full_like(inputs, -100)
    labels[:, -1] = inputs[:, 0]
    return Examples(inputs, labels)


@pytest.mark.parametrize("name", NAMES)
def test_interchange_runs_on_the_folded_model_as_on_the_ablated_one(name: str):
    model = model_of(name)
    reduction = reduction_of(model, mask(units_of(model), UNEVEN, 3))
    folded = fold(model, reduction)
    units = units_of(folded)
    chosen = units.names[::2]
    here = Circuit.of(units, chosen)
    there = Circuit.of(reduction.units, [folded.units[unit] for unit in chosen])
    with NoCasts(), torch.no_grad():
        with intervened(folded, interchange(here, run_values(folded, examples(2), units))):
            found = output(folded, examples(1))
        with intervened(model, ablate(reduction)):
            source = run_values(model, examples(2), reduction.units)
        with intervened(model, ablate(reduction), interchange(there, source)):
            expected = output(model, examples(1))
        assert (found - expected).abs().max() <= 1e-9
        assert (found - output(folded, examples(1))).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_scores_run_on_a_folded_model(name: str):
    model = model_of(name)
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    units = units_of(folded)
    for found in (score.risk(folded, examples(1), units, probes=2, seed=0), score.gradient(folded, examples(1), units)):
        frame = found.to_frame()
        assert list(frame["unit"]) == list(units.names)
        assert frame["score"].abs().gt(0).any() and frame["score"].notna().all()


def test_transformer_lens_patches_layers_and_existing_heads():
    model = bridge("Llama", torch.float32)
    folded: Any = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    _, clean = folded.run_with_cache(tokens(1))
    heads_left = pd.DataFrame(
        [(layer, head) for layer, block in enumerate(folded.blocks) for head in range(len(block.attn.W_Q))],
        columns=["layer", "head"],
    )
    effects = generic_activation_patch(
        folded, tokens(), clean, first_logit, layer_head_vector_patch_setter, "z", index_df=heads_left
    )
    assert effects.shape == (len(heads_left),) and effects.isfinite().all() and len(effects.unique()) > 1
    by_layer = get_act_patch_resid_pre(folded, tokens(), clean, first_logit)
    assert by_layer.shape == (3, 9) and by_layer.isfinite().all()


def first_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 0].mean()


@pytest.mark.parametrize("patterns", [UNEVEN, FIRST_EMPTY, ["none"]], ids=["uneven", "first empty", "none kept"])
@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_generated(name: str, patterns: list[str]):
    model = bridge(name, torch.float32)
    reduction = reduction_of(model, mask(units_of(model), patterns, 5))
    folded = fold(model, reduction)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with intervened(model, ablate(reduction)):
        expected = model.generate(tokens()[:, :5], **options)
    for use_past_kv_cache in (True, False):
        found = folded.generate(tokens()[:, :5], use_past_kv_cache=use_past_kv_cache, **options)
        assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_stay_on_their_devices(name: str):
    model = fresh_bridge(name)
    for block in model.blocks[1:]:
        block.to("cuda")
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    for small, block in zip(folded.blocks, model.blocks, strict=True):
        assert {p.device.type for p in small.parameters()} == {p.device.type for p in block.parameters()}
        assert {b.device.type for b in small.buffers()} <= {next(block.parameters()).device.type}


def quantised(model: Any) -> None:
    class Linear4bit(nn.Linear):
        pass

    model.blocks[1].mlp.out.original_component.__class__ = Linear4bit


def eight_bits(model: Any) -> None:
    linear = model.blocks[1].mlp.out.original_component
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def offloaded(model: Any) -> None:
    model.blocks[1].mlp.out.original_component.to("meta")


@pytest.mark.parametrize(
    "break_it,says",
    [
        (quantised, r"is a Linear4bit, which does not fold \(quantised\?\)"),
        (eight_bits, r"has weights of torch.int8, which do not fold \(quantised\?\)"),
        (offloaded, r"is offloaded and has no weights here: load the model without"),
    ],
)
def test_weights_that_do_not_fold_are_refused(break_it: Any, says: str):
    model = fresh()
    reduction = removed(neurons(model), 1)
    break_it(model)
    with pytest.raises(ValueError, match=says):
        fold(model, reduction)


def test_a_failed_fold_leaves_the_model_as_it_was():
    model = fresh("gated, RMS, rotary, grouped")
    expected = model(tokens())
    with pytest.raises(ValueError, match="NaN or infinite"):
        fold(model, removed(neurons(model), 1, float("nan")))
    reduction = reduction_of(model, mask(units_of(model), UNEVEN, 3))
    assert torch.equal(model(tokens()), expected)
    assert distance(model, reduction, fold(model, reduction), tokens()) <= 1e-9
