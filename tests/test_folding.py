"""Folding is ablating: on small TransformerLens-native models, for random circuits, constants and tokens.

Other architectures are in test_folding_architectures.py.
"""

from __future__ import annotations

import copy
import gc
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.native import (
    PATTERNS,
    SEEDS,
    VARIANTS,
    ablated,
    bytes_of,
    check_sizes,
    distance,
    fresh,
    mask,
    native,
    random_values,
    reduction_of,
    removed,
    tokens,
    units_of,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from transformer_lens import TransformerBridge, TransformerBridgeConfig
from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, neurons
from tl_sparsify.folding.bridge import FoldedBridge, save_folded
from tl_sparsify.folding.fold import fold, why_not


@given(st.sampled_from(list(VARIANTS)), PATTERNS, SEEDS)
def test_folded_is_ablated_in_float64(variant: str, patterns: list[str], seed: int):
    model = native(variant)
    reduction = reduction_of(model, mask(units_of(model), patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-9


@given(st.sampled_from(list(VARIANTS)), PATTERNS, SEEDS)
def test_folded_is_ablated_in_float32(variant: str, patterns: list[str], seed: int):
    model = native(variant, torch.float32)
    reduction = reduction_of(model, mask(units_of(model), patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_fold_no_worse_than_they_ablate(dtype: torch.dtype):
    model = fresh().to(dtype)
    reduction = reduction_of(model, ["L0H1", "L1N2", "L2H0", "L2N7", "L2N9"])
    folded = fold(model, reduction)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    exact = ablated(fresh().to(dtype).to(torch.float64), reduction, tokens())
    with torch.no_grad():
        error = (folded(tokens()).double() - exact).abs().max()
    assert error <= 1.5 * (ablated(model, reduction, tokens()).double() - exact).abs().max()


@given(PATTERNS, PATTERNS, SEEDS)
def test_a_folded_model_folds_again(first: list[str], second: list[str], seed: int):
    model = native("gated, RMS, rotary, grouped")
    assume(set(first) != {"none"})
    kept = mask(units_of(model), first, seed)
    assume(bool(kept.any()))
    folded = fold(model, reduction_of(model, kept, seed))
    units = units_of(folded)
    reduction = reduction_of(folded, mask(units, second, seed + 1), seed + 1)
    again = fold(folded, reduction)
    assert distance(folded, reduction, again, tokens(seed)) <= 1e-9
    assert sorted(again.units.values()) == sorted(folded.units[name] for name in reduction.circuit.names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_kept_changes_nothing(variant: str):
    model = native(variant)
    folded = fold(model, reduction_of(model, mask(units_of(model), ["all"], 0)))
    assert torch.equal(folded(tokens()), model(tokens()))
    assert fingerprint(folded) == fingerprint(model) and bytes_of(folded) == bytes_of(model)
    assert all(name == original for name, original in folded.units.items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["plain", "gated, RMS, rotary, grouped"])
def test_padding(variant: str, side: str):
    model = native(variant)
    reduction = reduction_of(model, mask(units_of(model), ["some", "one", "none", "some"], 3))
    attended = torch.ones(3, 9, dtype=torch.long)
    attended[1, :4] = attended[2, :1] = 0
    attended = attended if side == "left" else attended.flip(1)
    assert distance(model, reduction, fold(model, reduction), tokens(), attention_mask=attended) <= 1e-9


def test_removed_parameters_are_gone():
    model = native("gated, RMS, rotary, grouped")
    folded = fold(model, reduction_of(model, ["L0H0", "L0H2", "L0H3", "L1N3", "L2H1", "L2N0", "L2N19"]))
    check_sizes(model, folded, [(3, 2, 0), (0, 0, 1), (1, 1, 2)])
    assert bytes_of(folded) == 8 * folded.n_params_total


def test_units_and_hook_points_are_those_that_are_kept():
    model = native()
    reduction = reduction_of(model, ["L0H1", "L0H3", "L0N4", "L2N0", "L2N5", "L2H3"])
    folded = fold(model, reduction)
    assert folded.units == {
        "L0H0": "L0H1", "L0H1": "L0H3", "L0N0": "L0N4", "L2H0": "L2H3", "L2N0": "L2N0", "L2N1": "L2N5",
    }  # fmt: skip
    assert set(units_of(folded).names) == set(folded.units)
    assert folded.hook_dict.keys() == model.hook_dict.keys()
    with intervened(model, ablate(reduction)):
        _, expected = model.run_with_cache(tokens())
    _, found = folded.run_with_cache(tokens())
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["blocks.0.attn.hook_z"], expected["blocks.0.attn.hook_z"][:, :, [1, 3]])
    torch.testing.assert_close(found["blocks.0.attn.hook_pattern"], expected["blocks.0.attn.hook_pattern"][:, [1, 3]])
    torch.testing.assert_close(found["blocks.2.mlp.hook_post"], expected["blocks.2.mlp.hook_post"][:, :, [0, 5]])
    assert found["blocks.1.attn.hook_z"].shape == (3, 9, 0, 4) and found["blocks.1.mlp.hook_post"].shape == (3, 9, 0)
    for name in ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_mid"):
        torch.testing.assert_close(found[name], expected[name])
    assert (found["blocks.1.hook_mlp_out"] == found["blocks.1.hook_mlp_out"][0, 0]).all()  # its constant


@pytest.mark.parametrize("variant", ["plain", "gated, RMS, rotary, grouped"])
def test_ablating_the_folded_model_is_ablating_the_original(variant: str):
    model = native(variant)
    outer = reduction_of(model, ["L0H0", "L0H2", "L0H3", "L1H1", "L0N1", "L0N4", "L2N3"])
    folded = fold(model, outer)
    units = units_of(folded)
    constants = dict(zip((site.hook for site in outer.units.sites), outer.values.tensors, strict=True))
    original = [
        [int(re.split("[HN]", folded.units[site.name(i)])[1]) for i in range(site.size)] for site in units.sites
    ]
    values = Values(units, tuple(constants[s.hook][where] for s, where in zip(units.sites, original, strict=True)))
    kept = ["L0H0", "L0H2", "L1H0", "L0N1"]  # of the folded model's units; L0H1, L0N0 and L2N0 are ablated
    inner = Reduction(Circuit.of(units, kept), values)
    both = Reduction(Circuit.of(outer.units, [folded.units[name] for name in kept]), outer.values)
    torch.testing.assert_close(ablated(folded, inner, tokens()), ablated(model, both, tokens()))


def test_transformer_lens_patches_a_folded_model():
    model = native()
    folded: Any = fold(
        model, reduction_of(model, [n for n in units_of(model).names if n[2:] not in ("H0", "N3", "N4")])
    )
    _, cache = folded.run_with_cache(tokens(1))
    effects = get_act_patch_attn_head_out_all_pos(folded, tokens(), cache, lambda logits: logits[:, -1, 0].mean())
    assert effects.shape == (3, 3) and effects.isfinite().all()
    assert folded.W_Q.shape == (3, 3, 16, 4) and folded.W_out.shape == (3, 18, 16)  # the layers are of equal size


def test_the_original_is_not_changed_and_not_held():
    model = fresh()
    model.requires_grad_(False)
    model.blocks[1].mlp.out.original_component.weight.requires_grad_(True)
    before, logits = fingerprint(model), model(tokens())
    reduction = reduction_of(model, mask(units_of(model), ["some"], 0))
    folded = fold(model, reduction)
    assert fingerprint(model) == before and torch.equal(model(tokens()), logits)
    trained = [name for name, parameter in folded.named_parameters() if parameter.requires_grad]
    assert [name.split("_original_component.")[1:] for name in trained] == [["mlp.", "fc_out.", "weight"]]
    addresses = {p.data_ptr() for p in model.parameters() if p.numel()}
    assert not addresses & {p.data_ptr() for p in folded.parameters() if p.numel()}
    assert not folded.training and not any(module.training for module in folded.modules())
    expected = folded(tokens())
    alive = [weakref.ref(model), weakref.ref(model.blocks[0].attn.q.weight)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert torch.equal(folded(tokens()), expected)


def test_a_copy_of_a_folded_model_stands_alone():
    model = native("gated, RMS, rotary, grouped")
    folded = fold(model, reduction_of(model, mask(units_of(model), ["some"], 0)))
    expected = folded(tokens())
    twin = copy.deepcopy(folded)
    del folded
    gc.collect()
    assert torch.equal(twin(tokens()), expected) and isinstance(twin, FoldedBridge)


def test_a_folded_model_trains():
    model = native()
    folded = fold(model, reduction_of(model, mask(units_of(model), ["one"], 0)))
    folded(tokens()).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in folded.parameters())


def test_what_needs_equal_layers_says_so():
    model = native()
    folded = fold(model, reduction_of(model, ["L0H1", "L0N3", "L1N2"]))
    with pytest.raises(ValueError, match="differ in size, so their weights cannot be stacked"):
        _ = folded.W_Q
    with pytest.raises(ValueError, match="cannot enter compatibility mode: enable it on the original, then fold"):
        folded.enable_compatibility_mode()


def test_compatibility_mode_before_folding():
    model = fresh(dtype=torch.float32)
    model.enable_compatibility_mode()
    model.eval()
    reduction = reduction_of(model, mask(units_of(model), ["some", "one", "none", "some"], 1))
    folded = fold(model, reduction)
    assert distance(model, reduction, folded, tokens()) <= 1e-4
    with pytest.raises(ValueError, match="compatibility mode cannot be saved"):
        save_folded(folded, "never")


def test_reductions_that_do_not_fold_are_refused():
    model, other = native(), native("no norms, soft caps")
    reduction = reduction_of(model, ["L0H1", "L1N2", "L2N7"])
    with pytest.raises(ValueError, match="made for the model"):
        fold(other, reduction)
    unknown = Units((Site("neuron", 3, "blocks.3.mlp.hook_post", 20),))
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.3\.mlp\.hook_post'"):
        fold(model, removed(unknown, 1))
    size = Units((Site("neuron", 1, "blocks.1.mlp.hook_post", 21),))
    with pytest.raises(ValueError, match="has 20 neuron units of width 1, the reduction's 21 of width 1"):
        fold(model, removed(size, 1))
    with pytest.raises(ValueError, match="has 4 head units of width 4, the reduction's 4 of width 3"):
        fold(model, removed(heads(model), 3))
    with pytest.raises(ValueError, match=r"units at positions 4 of blocks\.0\.attn\.hook_z do not fold"):
        fold(model, removed(heads(model).at(4), 4))
    before = Units((Site("neuron", 1, "blocks.1.mlp.hook_pre", 20),))
    with pytest.raises(ValueError, match=r"units of blocks\.1\.mlp\.hook_pre do not fold"):
        fold(model, removed(before, 1))
    with pytest.raises(ValueError, match=r"values of removed units at blocks\.0\.mlp\.hook_post are NaN or infinite"):
        fold(model, removed(neurons(model), 1, float("inf")))
    varying = Values(neurons(model), tuple(torch.zeros(3, 9, 20, 1) for _ in range(3)))
    with pytest.raises(ValueError, match="vary by example or position"):
        fold(model, Reduction(Circuit.empty(neurons(model)), varying))


def test_models_that_do_not_fold_are_refused():
    model = native()
    reduction = removed(neurons(model), 1)
    with pytest.raises(ValueError, match="needs a TransformerBridge, not a Linear"):
        fold(torch.nn.Linear(2, 2).eval(), reduction)
    with pytest.raises(ValueError, match="training mode"):
        fold(fresh().train(), reduction)
    with model.hooks(fwd_hooks=[("blocks.1.hook_out", lambda value, hook: value)]):
        with pytest.raises(ValueError, match=r"model has hooks, first at blocks\.1\.hook_out"):
            fold(model, reduction)
    config = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 4, "d_vocab": 5, "d_mlp": 6}
    solu: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config, act_fn="solu_ln")).eval()
    with pytest.raises(ValueError, match=r"neurons of blocks\.0\.mlp do not fold: the activation solu_ln mixes"):
        fold(solu, removed(neurons(solu), 1))
    assert len(heads(fold(solu, reduction_of(solu, [n for n in units_of(solu).names if n != "L0H1"])))) == 1
    unknown = fresh()
    unknown.cfg.architecture = "OPTForCausalLM"
    with pytest.raises(ValueError, match="models of architecture OPTForCausalLM do not fold; these do: Transf"):
        fold(unknown, reduction)


def test_whether_a_model_folds_is_known_beforehand():
    model = native()
    reduction = removed(neurons(model), 1)
    assert why_not(model, reduction) is None and isinstance(fold(model, reduction), FoldedBridge)
    config: dict[str, Any] = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1}
    config |= {"n_ctx": 4, "d_vocab": 5, "d_mlp": 6}
    solu: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config, act_fn="solu_ln")).eval()
    assert why_not(solu, removed(heads(solu), 4)) is None
    unknown = fresh()
    unknown.cfg.architecture = "OPTForCausalLM"
    both_ways = fresh("LNPre, ReLU, bidirectional")
    both_ways.tokenizer = SimpleNamespace(bos_token_id=0)
    bos = Reduction(Circuit.empty(heads(both_ways)), random_values(heads(both_ways), both_ways, 0))
    refused = [(solu, removed(neurons(solu), 1)), (unknown, reduction), (torch.nn.Linear(2, 2).eval(), reduction)]
    refused += [(both_ways, bos)]
    without = replace(bos, first_token="none")
    assert distance(both_ways, without, fold(both_ways, without), tokens()) <= 1e-9
    assert "the model attends both ways" in str(why_not(both_ways, bos))
    for one, some in refused:
        why = why_not(one, some)
        assert why is not None
        with pytest.raises(ValueError, match=re.escape(why)):
            fold(one, some)
