"""Exported checkpoints as bridges again, through TransformerLens's own loader."""

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
from helpers.architectures import CONFIGS, FIRST_EMPTY, UNEVEN, bridge, fresh, one_by_one
from helpers.files import word_tokenizer
from helpers.models import NoCasts
from helpers.native import distance, mask, reduction_of, tokens, units_of
from transformer_lens import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_sparsify.folding.bridge import FoldedBridge, load_folded, save_folded
from tl_sparsify.folding.export import export_hf
from tl_sparsify.folding.fold import fold
from tl_sparsify.tasks.language_models import load_language_model
from tl_sparsify.tasks.task import own_language_model


def booted(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The checkpoint as a bridge; the small models here have no tokenizer of their own."""
    if not (folder / "tokenizer.json").is_file():
        word_tokenizer(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype)


def folded_model(name: str, patterns: list[str]) -> Any:
    model = bridge(name)
    return fold(model, reduction_of(model, mask(units_of(model), patterns, 5), 5))


@pytest.mark.parametrize("patterns", [UNEVEN, FIRST_EMPTY, ["none"]], ids=["uneven", "first empty", "none kept"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bridge_is_the_folded_model(name: str, patterns: list[str], tmp_path: Path):
    folded = folded_model(name, patterns)
    export_hf(folded, tmp_path / "model")
    again = booted(tmp_path / "model")
    assert isinstance(again, FoldedBridge) and again.units == folded.units
    assert again.n_params_total == folded.n_params_total and not again.training
    assert units_of(again) == units_of(folded) if folded.units else not again.units
    attended = torch.ones(3, 9, dtype=torch.long)
    attended[1, :4] = 0
    with torch.no_grad(), NoCasts():
        for options in ({}, {"attention_mask": attended}, {"attention_mask": attended.flip(1)}):
            expected, found = folded(tokens(), **options), again(tokens(), **options)
            read = options.get("attention_mask", torch.ones(3, 9)).bool()
            assert expected[read].isfinite().all() and (found - expected)[read].abs().max() <= 1e-10
        assert (one_by_one(again, tokens(), 4) - folded(tokens())).abs().max() <= 1e-9


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama", "Gemma 3"])
def test_a_booted_model_folds_and_is_written_as_any_other(name: str, tmp_path: Path):
    export_hf(folded_model(name, UNEVEN), tmp_path / "model")
    model = booted(tmp_path / "model")
    model.tokenizer = None
    reduction = reduction_of(model, mask(units_of(model), ["some", "one"], 2))
    small = fold(model, reduction)
    assert distance(model, reduction, small, tokens()) <= 1e-9
    assert set(small.units.values()) == {model.units[unit] for unit in reduction.circuit.names}
    save_folded(small, tmp_path / "saved")
    export_hf(small, tmp_path / "smaller")
    for again in (load_folded(tmp_path / "saved"), booted(tmp_path / "smaller")):
        assert again.units == small.units
        with torch.no_grad(), NoCasts():
            assert (again(tokens()) - small(tokens())).abs().max() <= 1e-10


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_in_transformers(name: str, side: str, tmp_path: Path):
    model = fresh(name, torch.float32)
    folded = fold(model, reduction_of(model, mask(units_of(model), UNEVEN, 3), 3))
    export_hf(folded, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()  # any attention implementation
    attended = torch.ones(3, 9, dtype=torch.long)
    attended[1, :4] = attended[2, :1] = 0
    attended = attended if side == "left" else attended.flip(1)
    places = (attended.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = folded(tokens(), attention_mask=attended, position_ids=places)
        found = loaded(tokens(), attention_mask=attended, position_ids=places).logits
    assert (found - expected)[attended.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("own", [False, True])
def test_a_beginning_token_is_put_first_where_the_originals_tokenizer_does(own: bool, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(own_language_model(), add_bos_token=own)
    AutoModelForCausalLM.from_pretrained(own_language_model()).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    expected = AutoTokenizer.from_pretrained(tmp_path / "original")("First cut the").input_ids
    assert (expected[0] == tokenizer.bos_token_id) == own
    model = load_language_model(tmp_path / "original")  # whose tokenizer always puts it first
    assert model.tokenizer("First cut the").input_ids[0] == tokenizer.bos_token_id
    folded = fold(model, replace(reduction_of(model, ["L0H1", "L2N3"]), first_token="none"))
    export_hf(folded, tmp_path / "model")
    written = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert written("First cut the").input_ids == expected
    assert written.get_vocab() == tokenizer.get_vocab() and written.pad_token == model.tokenizer.pad_token
    again = booted(tmp_path / "model", torch.float32)
    text = "First cut the"
    with torch.no_grad():
        assert torch.equal(again.to_tokens(text), model.to_tokens(text))
        assert (again(text) - folded(text)).abs().max() <= 1e-5


def edit(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_what_a_configuration_may_not_say_is_refused(tmp_path: Path):
    path = tmp_path / "model"
    export_hf(folded_model("Llama", UNEVEN), path)
    assert "attn_implementation" not in (path / "config.json").read_text()
    layers = json.loads((path / "config.json").read_text())["folded_layers"]
    for name in ("attn_implementation", "_attn_implementation"):
        edit(path, **{name: "somebody/attention"})
        with pytest.raises(ValueError, match="implementation 'somebody/attention'; a file may name"):
            AutoModelForCausalLM.from_pretrained(path)
        edit(path, **{name: "eager"})
        assert AutoModelForCausalLM.from_pretrained(path).config._attn_implementation == "eager"
    for wrong, message in (
        (layers[:2], "is no list of the model's layers"),
        ([layers[0] | {"neurons": -1, "units": {"H": [], "N": []}}, *layers[1:]], "has impossible sizes in layer 0"),
        ([layers[0] | {"units": {"H": [], "N": []}}, *layers[1:]], "names too many or too few units in layer 0"),
    ):
        edit(path, folded_layers=wrong)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(path)


def test_what_a_saved_model_may_not_say_is_refused(tmp_path: Path):
    folded = folded_model("Llama", UNEVEN)
    folded.original_model.config._attn_implementation = "somebody/attention"
    save_folded(folded, tmp_path / "model")
    assert load_folded(tmp_path / "model").original_model.config._attn_implementation == "eager"


ORDERS = """
import sys
import tl_sparsify
assert "transformers" not in sys.modules and "torch" not in sys.modules
from transformers import AutoModelForCausalLM
assert "transformer_lens" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "FoldedLlamaForCausalLM"
from transformer_lens import TransformerBridge
bridge = TransformerBridge.boot_transformers(sys.argv[1], device="cpu")
assert type(bridge).__name__ == "FoldedBridge"
"""


@pytest.mark.slow
def test_either_package_may_be_imported_first(tmp_path: Path):
    export_hf(folded_model("Llama", UNEVEN), tmp_path / "model")
    word_tokenizer(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ORDERS, str(tmp_path / "model")], check=True, env=environment, cwd=tmp_path)
