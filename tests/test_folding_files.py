"""Files of folded models: what is saved is loaded, without the original and in another process; nothing by halves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import LOAD, full_disk, word_tokenizer
from helpers.native import VARIANTS, distance, fresh, mask, native, random_values, reduction_of, tokens, units_of
from safetensors.torch import load_file
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.folding.bridge import load_folded, save_folded
from tl_sparsify.folding.fold import fold


@pytest.mark.slow
def test_loaded_in_a_new_process_the_logits_are_identical(tmp_path: Path):
    expected = {}
    for number, (variant, dtype) in enumerate([(v, d) for v in VARIANTS for d in (torch.float32, torch.bfloat16)]):
        model = fresh(variant).to(dtype)
        folded = fold(model, reduction_of(model, mask(units_of(model), ["some", "one", "none", "some"], number)))
        save_folded(folded, tmp_path / str(number))
        expected[str(tmp_path / str(number))] = folded(tokens())
    arguments = [sys.executable, "-c", LOAD, repr(tokens().tolist()), str(torch.get_num_threads()), *expected]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=tmp_path)
    for path, logits in expected.items():
        assert torch.equal(load_file(path + "/logits")["logits"], logits)


def test_load_returns_what_was_saved(tmp_path: Path):
    model = fresh("gated, RMS, rotary, grouped")
    model.blocks[0].attn.requires_grad_(False)
    folded = fold(model, reduction_of(model, mask(units_of(model), ["some", "one"], 4)))
    state = torch.get_rng_state()
    save_folded(folded, tmp_path / "model")
    loaded = load_folded(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(tokens()), folded(tokens())) and fingerprint(loaded) == fingerprint(folded)
    assert loaded.units == folded.units and loaded.tokenizer is None and not loaded.training
    flags = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (loaded, folded)]
    assert flags[0] == flags[1] and set(flags[0].values()) == {True, False}
    units = units_of(loaded)
    reduction = reduction_of(loaded, mask(units, ["one"], 0))
    assert distance(folded, reduction, fold(loaded, reduction), tokens()) <= 1e-9
    save_folded(fold(loaded, reduction), tmp_path / "model")  # over the older one
    assert load_folded(tmp_path / "model").units == fold(loaded, reduction).units
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_tokenizer_is_saved_too(tmp_path: Path):
    config = TransformerBridgeConfig(
        d_model=8, d_head=4, n_heads=2, n_layers=1, n_ctx=8, d_vocab=17, d_mlp=6, act_fn="gelu"
    )
    model: Any = TransformerBridge.boot_native(config, tokenizer=word_tokenizer(tmp_path / "words")).eval()
    save_folded(fold(model, reduction_of(model, ["L0H1"])), tmp_path / "model")
    loaded: Any = load_folded(tmp_path / "model")
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.to_tokens("c").tolist() == model.to_tokens("c").tolist()
    file = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("c", "x"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or missing"):
        load_folded(tmp_path / "model")


def test_damaged_files_are_refused(tmp_path: Path):
    folded = fold(native(), reduction_of(native(), ["L0H1", "L1N2"]))
    save_folded(folded, tmp_path / "model")
    file = tmp_path / "model" / "folded.safetensors"
    content = file.read_bytes()
    with pytest.raises(FileNotFoundError, match="no folded model file at"):
        load_folded(tmp_path / "other")
    for damaged, message in (
        (content[:-100], "damaged or truncated"),
        (content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "checksum does not match"),
        (content.replace(b'eps\\": 1e-05', b'eps\\": 1e-04'), "checksum does not match"),
        (content.replace(b'"version\\": 1', b'"version\\": 2'), "format version 2"),
    ):
        assert damaged != content
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_folded(tmp_path / "model")
    reduction_of(native(), ["L0H1"]).save(file)
    with pytest.raises(ValueError, match="holds a reduction, not a folded model"):
        load_folded(tmp_path / "model")


def test_nothing_half_written_and_nothing_of_others_overwritten(tmp_path: Path):
    folded = fold(native(), reduction_of(native(), ["L0H1", "L1N2"]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="is there and is no folded model"):
        save_folded(folded, tmp_path / "mine")
    with pytest.raises(ValueError, match="save_folded saves what fold returns, not a TransformerBridge"):
        save_folded(native(), tmp_path / "model")
    save_folded(folded, tmp_path / "model")

    other = fold(native(), reduction_of(native(), ["L0H1"]))
    for name in ("model", "new"):
        with pytest.raises(OSError, match="File too large"), full_disk():
            save_folded(other, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]
    assert load_folded(tmp_path / "model").units == folded.units


def test_an_interruption_between_two_renamings_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folded = fold(native(), reduction_of(native(), ["L0H1", "L1N2"]))
    save_folded(folded, tmp_path / "model")
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.is_dir() and self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_folded(fold(native(), reduction_of(native(), ["L0H1"])), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load_folded(tmp_path / "model").units == folded.units


def test_the_stream_of_an_older_file_is_completed(tmp_path: Path):
    """Older versions held what stands after each block at a beginning-of-sequence token, not what stands before."""
    model = fresh()
    model.tokenizer = word_tokenizer(tmp_path / "words")
    units = units_of(model)
    reduction = Reduction(Circuit(units, mask(units, ["some", "one"], 4)), random_values(units, model, 4))
    folded = fold(model, reduction)
    assert folded.first_stream is not None and folded.first_stream.shape == (4, 16)
    bos = torch.zeros(3, 9, dtype=torch.long)
    whole, folded.first_stream = folded.first_stream, folded.first_stream[1:]
    save_folded(folded, tmp_path / "model")
    loaded = load_folded(tmp_path / "model")
    torch.testing.assert_close(loaded.first_stream, whole)
    assert distance(model, reduction, loaded, bos) <= 1e-6  # norms cast to float32
    folded.first_stream = whole[2:]
    save_folded(folded, tmp_path / "other")
    with pytest.raises(ValueError, match=r"first_stream is of shape \(2, 16\); it is finite numbers of shape \(4"):
        load_folded(tmp_path / "other")
