"""Folded models as Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, FIRST_EMPTY, UNEVEN, bridge, fresh
from helpers.files import full_disk, word_tokenizer
from helpers.models import NoCasts
from helpers.native import PATTERNS, SEEDS, mask, native, reduction_of, tokens, units_of
from hypothesis import given, settings
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.folding.export import export_hf
from tl_sparsify.folding.fold import fold
from tl_sparsify.tasks.language_models import load_language_model
from tl_sparsify.tasks.task import own_language_model

EXPORTED = list(CONFIGS)


def exported(folded: Any, path: Path) -> Any:
    export_hf(folded, path)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", EXPORTED)
@settings(max_examples=4)
@given(patterns=PATTERNS, seed=SEEDS)
def test_logits_are_the_same(name: str, patterns: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory):
    model = bridge(name)
    folded = fold(model, reduction_of(model, mask(units_of(model), patterns, seed), seed))
    loaded = exported(folded, tmp_path_factory.mktemp("export") / "model")
    with torch.no_grad(), NoCasts():
        expected, found = folded(tokens(seed)), loaded(tokens(seed)).logits
    assert found.isfinite().all() and (found - expected).abs().max() <= 1e-9


def test_a_model_that_transformer_lens_loaded_by_name(tmp_path: Path):
    """Loading by name switches ``output_attentions`` on, which loads with eager attention only."""
    model = load_language_model(own_language_model())
    folded = fold(model, replace(reduction_of(model, ["L0H1", "L2N3"]), first_token="none"))
    export_hf(folded, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    inputs = tokens()
    with torch.no_grad():
        assert (loaded(inputs).logits - folded(inputs)).abs().max() <= 1e-4


@pytest.mark.parametrize("patterns", [UNEVEN, FIRST_EMPTY, ["none"]], ids=["uneven", "first empty", "none kept"])
@pytest.mark.parametrize("name", EXPORTED)
def test_key_value_cache(name: str, patterns: list[str], tmp_path: Path):
    model = bridge(name)
    loaded = exported(fold(model, reduction_of(model, mask(units_of(model), patterns, 5))), tmp_path / "model")
    inputs, past = tokens(), DynamicCache(config=loaded.config)
    steps = [inputs[:, :4], *inputs[:, 4:].split(1, dim=1)]
    with torch.no_grad(), NoCasts():
        found = torch.cat([loaded(step, past_key_values=past, use_cache=True).logits for step in steps], dim=1)
        assert (found - loaded(inputs).logits).abs().max() <= 1e-9
    text = loaded.generate(inputs[:, :3], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert text.shape == (3, 7)


@pytest.mark.parametrize("name", ["GPT-2", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_kept_weights_is_written(name: str, dtype: torch.dtype, tmp_path: Path):
    model = fresh(name, dtype)
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3)))
    loaded = exported(folded, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == folded.n_params_total
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    weights = {path.replace("_original_component.", ""): t for path, t in folded.original_model.state_dict().items()}
    assert all(torch.equal(parameter, weights[path]) for path, parameter in loaded.named_parameters())
    assert json.loads((tmp_path / "model" / "folded_units.json").read_text()) == folded.units
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (name == "GPT-2")
    if dtype == torch.float32:
        default = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()  # attention of another implementation
        assert (default(tokens()).logits - folded(tokens())).abs().max() <= 1e-4


def test_projected_embeddings_are_not_tied(tmp_path: Path):
    model = bridge("GPT-2")
    direction = torch.randn(24, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    units = stream_directions(model, direction)
    values = Values(units, (torch.full((1, len(units.sites[0].hook_names)), 0.3, dtype=torch.float64),))
    folded = fold(model, Reduction(Circuit.empty(units), values))
    loaded = exported(folded, tmp_path / "model")
    with torch.no_grad(), NoCasts():
        assert (loaded(tokens()).logits - folded(tokens())).abs().max() <= 1e-9
        assert (loaded(tokens()).logits - model(tokens())).abs().max() > 1e-3


LOAD = """
import sys, torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import tl_sparsify
torch.set_num_threads(int(sys.argv[2]))
tokens = torch.tensor(eval(sys.argv[1]))
for path in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", trust_remote_code=False).eval()
    save_file({"logits": model(tokens).logits.detach()}, path + "/logits")
"""


@pytest.mark.slow
def test_loaded_in_a_new_process_the_logits_are_identical(tmp_path: Path):
    expected = {}
    for name in EXPORTED:
        model = bridge(name, torch.float32)
        path = tmp_path / name
        loaded = exported(fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3))), path)
        expected[str(path)] = loaded(tokens()).logits
    arguments = [sys.executable, "-c", LOAD, repr(tokens().tolist()), str(torch.get_num_threads()), *expected]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path)
    for path, logits in expected.items():
        assert torch.equal(load_file(path + "/logits")["logits"], logits)


def test_the_tokenizer_is_exported_too(tmp_path: Path):
    model = fresh("Llama", torch.float32)
    model.tokenizer = word_tokenizer(tmp_path / "words")
    reduction = reduction_of(model, ["L0H1", "L2N3"])
    with pytest.raises(ValueError, match="leaves units alone at a beginning-of-sequence token"):
        export_hf(fold(model, reduction), tmp_path / "model")
    export_hf(fold(model, replace(reduction, first_token="none")), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == model.tokenizer.get_vocab()


def test_what_cannot_be_exported_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="export_hf exports what fold returns, not a TransformerBridge"):
        export_hf(bridge("Llama"), tmp_path / "model")
    other = native()
    with pytest.raises(ValueError, match=r"TransformerLensNative cannot be exported; these can: GPT2LM.*Use sa"):
        export_hf(fold(other, reduction_of(other, ["L0H1"])), tmp_path / "model")
    model = bridge("Llama")
    units = directions(model, "blocks.1.hook_resid_post", torch.eye(24, 1))
    stepped = fold(model, Reduction(Circuit.empty(units), Values(units, (torch.ones(1, 1),))))
    with pytest.raises(ValueError, match=r"explicit step at blocks\.1\.hook_out \(a residual direction\), which no"):
        export_hf(stepped, tmp_path / "model")
    compatible = fresh("GPT-2", torch.float32)
    compatible.enable_compatibility_mode()
    with pytest.raises(ValueError, match="compatibility mode cannot be exported"):
        export_hf(fold(compatible.eval(), reduction_of(compatible, ["L0H1"])), tmp_path / "model")
    folded = fold(model, reduction_of(model, ["L0H1"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="is there and is no exported model"):
        export_hf(folded, tmp_path / "mine")
    export_hf(folded, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()

    for name in ("model", "new"):
        with pytest.raises(SafetensorError, match="File too large"), full_disk():
            export_hf(fold(model, reduction_of(model, ["L1H1"])), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
