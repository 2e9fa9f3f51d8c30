"""Folding is ablating on every architecture that folds: small models with random weights, from their configurations."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import CONFIGS, FIRST_EMPTY, UNEVEN, bridge, fresh, one_by_one
from helpers.files import LOAD
from helpers.models import NoCasts
from helpers.native import (
    PATTERNS,
    SEEDS,
    ablated,
    bytes_of,
    check_sizes,
    distance,
    mask,
    reduction_of,
    tokens,
    units_of,
)
from hypothesis import example, given, settings
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import fingerprint
from tl_sparsify.folding.bridge import load_folded, save_folded
from tl_sparsify.folding.fold import ARCHITECTURES, fold


def test_every_architecture_is_here():
    assert {architecture for architecture, _ in CONFIGS.values()} == set(ARCHITECTURES) - {"TransformerLensNative"}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@example(patterns=["all"], seed=0)
@example(patterns=["none"], seed=0)
@example(patterns=["one"], seed=0)
@example(patterns=["one", "none", "one", "one", "one", "none"], seed=0)
@given(patterns=PATTERNS, seed=SEEDS)
def test_folded_is_ablated_in_float64(name: str, patterns: list[str], seed: int):
    model = bridge(name)
    reduction = reduction_of(model, mask(units_of(model), patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-9


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4)
@example(patterns=["none"], seed=0)
@example(patterns=["one"], seed=0)
@given(patterns=PATTERNS, seed=SEEDS)
def test_folded_is_ablated_in_float32(name: str, patterns: list[str], seed: int):
    model = bridge(name, torch.float32)
    reduction = reduction_of(model, mask(units_of(model), patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-4


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}),
    ("GPT-2", {"reorder_and_upcast_attn": True, "tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    ("Mistral", {"num_key_value_heads": 1}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("Qwen3", {"attention_bias": True}),
    ("Gemma 2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7}),
    ("Gemma 3", {"attention_bias": True, "head_dim": 8}),
]


@pytest.mark.parametrize("name,options", OPTIONS, ids=[f"{name} {', '.join(options)}" for name, options in OPTIONS])
def test_options_of_architectures(name: str, options: dict[str, Any], tmp_path: Path):
    model = fresh(name, **options)
    reduction = reduction_of(model, mask(units_of(model), UNEVEN, 3))
    folded = fold(model, reduction)
    assert distance(model, reduction, folded, tokens()) <= 1e-9
    save_folded(folded, tmp_path / "model")
    assert torch.equal(load_folded(tmp_path / "model")(tokens()), folded(tokens()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding(name: str, side: str):
    model = bridge(name)
    reduction = reduction_of(model, mask(units_of(model), UNEVEN, 3))
    attended = torch.ones(3, 9, dtype=torch.long)
    attended[1, :4] = attended[2, :1] = 0
    attended = attended if side == "left" else attended.flip(1)
    folded = fold(model, reduction)
    assert distance(model, reduction, folded, tokens(), attention_mask=attended) <= 1e-9
    with torch.no_grad(), NoCasts():
        assert not torch.allclose(folded(tokens(), attention_mask=attended), folded(tokens()))


@pytest.mark.parametrize("patterns", [UNEVEN, FIRST_EMPTY, ["none"]], ids=["uneven", "first empty", "none kept"])
@pytest.mark.parametrize("name", CONFIGS)
def test_key_value_cache(name: str, patterns: list[str]):
    model = bridge(name)
    reduction = reduction_of(model, mask(units_of(model), patterns, 5))
    folded = fold(model, reduction)
    with torch.no_grad(), NoCasts():
        with intervened(model, ablate(reduction)):
            expected = one_by_one(model, tokens(), 4)
        found, at_once = one_by_one(folded, tokens(), 4), folded(tokens())
    assert expected.isfinite().all()
    assert (found - expected).abs().max() <= 1e-9 and (found - at_once).abs().max() <= 1e-9


@contextmanager
def logits_of(model: Any) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda value, hook: seen.append(value.clone()))]):
        yield seen


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama", "Gemma 3"])
def test_generation(name: str):
    model = bridge(name)
    reduction = reduction_of(model, mask(units_of(model), FIRST_EMPTY, 5))
    folded = fold(model, reduction)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "stop_at_eos": False,
        "use_past_kv_cache": True,
        "verbose": False,
    }
    with NoCasts(), logits_of(folded) as found:
        folded.generate(tokens(), **options)
    with NoCasts(), logits_of(model) as expected, intervened(model, ablate(reduction)):
        model.generate(tokens(), **options)
    assert [logits.shape for logits in found] == [logits.shape for logits in expected] and len(found) == 5
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) <= 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_model_folds_again(name: str):
    model = bridge(name)
    folded = fold(model, reduction_of(model, mask(units_of(model), ["some", "some", "one"], 1)))
    reduction = reduction_of(folded, mask(units_of(folded), ["some", "one", "none"], 2))
    again = fold(folded, reduction)
    assert distance(folded, reduction, again, tokens()) <= 1e-9
    assert sorted(again.units.values()) == sorted(folded.units[unit] for unit in reduction.circuit.names)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_kept_changes_nothing(name: str):
    model = bridge(name, torch.float32)
    folded = fold(model, reduction_of(model, mask(units_of(model), ["all"], 0)))
    assert torch.equal(folded(tokens()), model(tokens()))
    assert fingerprint(folded) == fingerprint(model) and folded.n_params_total == model.n_params_total


@pytest.mark.parametrize("name", CONFIGS)
def test_removed_parameters_are_gone(name: str, tmp_path: Path):
    model = fresh(name, torch.float32)
    folded = fold(model, reduction_of(model, ["L0H1", "L0H4", "L0H5", "L0N3", "L1H0", "L2N0", "L2N1"]))
    grouped = model.cfg.n_key_value_heads is not None  # L0H4 and L0H5 read the same key/value head
    check_sizes(model, folded, [(3, 2 if grouped else 3, 1), (1, 1, 0), (0, 0, 2)])
    # GPT-2's q, k and v share the memory of its fused map, GPT-NeoX's are numbers of their own
    twice = [p for block in folded.blocks for p in block.attn.qkv.parameters()] if "NeoX" in CONFIGS[name][0] else []
    assert bytes_of(folded) == 4 * (folded.n_params_total + sum(p.numel() for p in twice))
    save_folded(folded, tmp_path / "small")
    stored = load_file(tmp_path / "small" / "folded.safetensors")
    parameters = {f"model.{path}" for path, _ in folded.original_model.named_parameters()}
    assert sum(tensor.numel() for path, tensor in stored.items() if path in parameters) == folded.n_params_total
    tables = dict(model.original_model.named_buffers())  # of positions: not of units
    others = {path.removeprefix("model.") for path in stored if path not in parameters and path[:6] != "units."}
    assert all(stored[f"model.{path}"].shape == tables[path].shape for path in others)


def test_ties_stay():
    model = fresh("GPT-2")
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    assert folded.embed.weight is folded.unembed.original_component.weight
    with torch.no_grad():
        folded.blocks[0].attn.qkv.original_component.weight.zero_()
    assert (folded.blocks[0].attn.q.weight == 0).all() and (model.blocks[0].attn.q.weight != 0).any()


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama"])
def test_the_original_is_not_held(name: str):
    model = fresh(name)
    model(tokens())  # with gradients: some bridges keep a part of the graph
    before = fingerprint(model)
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    expected = folded(tokens())
    assert fingerprint(model) == before
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert torch.equal(folded(tokens()), expected)


@pytest.mark.parametrize("flag", ["use_attn_result", "use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Qwen3"])
def test_finer_hooks(name: str, flag: str):
    model = bridge(name, torch.float32)
    folded: Any = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    expected = folded(tokens())
    getattr(folded, f"set_{flag}")(True)
    torch.testing.assert_close(folded(tokens()), expected)
    _, found = folded.run_with_cache(tokens())
    hook = {"use_attn_result": "result", "use_split_qkv_input": "q_input", "use_attn_in": "attn_in"}[flag]
    assert found[f"blocks.0.attn.hook_{hook}"].shape == (3, 9, folded.blocks[0].attn.W_O.shape[0], 24)
    assert not getattr(model.cfg, flag) and not getattr(model.blocks[0].attn.config, flag)


@pytest.mark.slow
def test_loaded_in_a_new_process_the_logits_are_identical(tmp_path: Path):
    expected = {}
    for number, name in enumerate(CONFIGS):
        for dtype in (torch.float32, torch.bfloat16):
            model = fresh(name, dtype)
            folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, number)))
            path = tmp_path / f"{number} {dtype}"
            save_folded(folded, path)
            expected[str(path)] = folded(tokens())
            loaded = load_folded(path)
            assert loaded.units == folded.units and fingerprint(loaded) == fingerprint(folded)
            assert torch.equal(loaded(tokens()), expected[str(path)])
    arguments = [sys.executable, "-c", LOAD, repr(tokens().tolist()), str(torch.get_num_threads()), *expected]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path)
    for path, logits in expected.items():
        assert torch.equal(load_file(path + "/logits")["logits"], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["GPT-2", "Qwen2", "Gemma 2"])
def test_half_precision_models_fold_no_worse_than_they_ablate(name: str, dtype: torch.dtype):
    model = fresh(name, dtype)
    reduction = reduction_of(model, mask(units_of(model), UNEVEN, 3))
    folded = fold(model, reduction)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    exact = ablated(fresh(name, dtype).to(torch.float64), reduction, tokens())
    with torch.no_grad():
        error = (folded(tokens()).double() - exact).abs().max()
    assert error <= 1.5 * (ablated(model, reduction, tokens()).double() - exact).abs().max()


def test_other_architectures_are_refused():
    config = transformers.OPTConfig(
        vocab_size=17, hidden_size=24, ffn_dim=20, num_attention_heads=6, num_hidden_layers=1, word_embed_proj_dim=24
    )
    model = build_bridge_from_module(transformers.OPTForCausalLM(config).eval(), "OPTForCausalLM", hf_config=config)
    with pytest.raises(ValueError, match="models of architecture OPTForCausalLM do not fold; these do: Transformer"):
        fold(model, reduction_of(model, ["L0H0"]))
