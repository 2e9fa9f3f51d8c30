"""Dictionaries: what they encode, which features fire, objects of the user's own, and files in SAELens's layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dictionaries import FEATURES, IN, NAMES, OUT, STREAM, dictionary, encoded
from helpers.models import bridge, examples, fresh, seeded
from safetensors.torch import save_file
from torch import Tensor

import tl_sparsify as tls

ALL = pytest.mark.parametrize("name", NAMES)


def inputs(n: int = 30) -> Tensor:
    return torch.randn(n, 8, generator=seeded(1), dtype=torch.float64)


@ALL
def test_encoding_is_the_formula_feature_by_feature(name: str):
    d, x = dictionary(name), inputs()
    torch.testing.assert_close(d.encode(x), encoded(d, x))
    a = d.encode(x)
    torch.testing.assert_close(d.decode(a), d.b_dec + sum(a[:, f, None] * d.W_dec[f] for f in range(FEATURES)))
    assert name != "topk" or int((a > 0).sum(1).max()) <= 4


@ALL
def test_some_features_are_encoded_as_among_all(name: str):
    d, x = dictionary(name), inputs()
    some = torch.tensor([1, 4, 5, 12])
    assert torch.allclose(d.encoder(some).encode(x), d.encode(x)[:, some])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"W_dec": torch.zeros(3, 8).double()}, "W_dec has shape"),
        ({"b_enc": torch.zeros(3).double()}, "b_enc has shape"),
        ({"b_dec": torch.full((8,), float("nan")).double()}, "b_dec holds NaN"),
        ({"activation": "jumprelu"}, "threshold is for jumprelu"),
        ({"activation": "topk"}, "k is None"),
        ({"activation": "topk", "k": 99}, "k is 99"),
        ({"threshold": torch.zeros(FEATURES).double()}, "threshold is for jumprelu"),
        ({"W_dec": torch.zeros(FEATURES, 3).double(), "b_dec": torch.zeros(3).double(), "centred": False}, "source"),
        ({"W_dec": torch.zeros(FEATURES, 3).double(), "b_dec": torch.zeros(3).double()}, "centred"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        replace(dictionary(), **wrong)


# Firing


@pytest.mark.parametrize("least", [1, 4])
def test_firing_counts_positions_that_hold_input(least: int):
    model = bridge()
    batch = replace(examples(6), attention_mask=torch.arange(5)[None, :] >= (torch.arange(6) % 3)[:, None])
    d = dictionary("topk", k=1)
    [x] = tls.run_values(model, batch, tls.Units((tls.Site("residual", 0, STREAM, 1),))).tensors
    counts = [0] * FEATURES
    for i in range(6):
        for p in range(i % 3, 5):
            for f in range(FEATURES):
                counts[f] += int(encoded(d, x[i, p])[0, f] > 0)
    found = tls.dictionaries.firing(model, d, batch, least=least)
    assert found.tolist() == [count >= least for count in counts] and 0 < int(found.sum()) < FEATURES


# Objects of the user's own


class Own:
    """Anything with ``encode`` and ``decode``."""

    def __init__(self, of: tls.Dictionary) -> None:
        self.of = of

    def encode(self, x: Tensor) -> Tensor:
        return self.of.encode(x)

    def decode(self, features: Tensor) -> Tensor:
        return self.of.decode(features)


class Curved(Own):
    def decode(self, features: Tensor) -> Tensor:
        return self.of.decode(features.square())


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_an_object_of_ones_own_gives_the_same_numbers(name: str, tmp_path: Path):
    model, batch, d = bridge(), examples(), dictionary(name)
    own = tls.features(model, Own(d), STREAM, examples=batch, error=True)
    units = tls.features(model, d, examples=batch, error=True)
    assert own.names == units.names
    for one, other in zip(
        tls.run_values(model, batch, own).tensors, tls.run_values(model, batch, units).tensors, strict=True
    ):
        torch.testing.assert_close(one, other)
    found, expected = (tls.score.risk(model, batch, part).scores for part in (own, units))
    torch.testing.assert_close(found, expected)
    reduction = tls.dictionaries.remove(model, own, [own.names[0]])
    with pytest.raises(ValueError, match="cannot be saved"):
        reduction.save(tmp_path / "own.reduction")


def test_what_is_no_dictionary_is_refused():
    model, batch = bridge(), examples()
    with pytest.raises(ValueError, match="not affine"):
        tls.features(model, Curved(dictionary()), STREAM, examples=batch)
    with pytest.raises(ValueError, match="how many features the dictionary has is not known"):
        tls.features(model, Own(dictionary()), STREAM)
    with pytest.raises(ValueError, match="hook is not given"):
        tls.features(model, Own(dictionary()), examples=batch)
    with pytest.raises(ValueError, match="encode"):
        tls.features(model, object(), STREAM)
    with pytest.raises(ValueError, match="no hook point"):
        tls.features(model, dictionary(), "blocks.9.hook_resid_post")
    with pytest.raises(ValueError, match="no feature of the dictionary fires"):
        tls.features(model, dictionary(b_enc=torch.full((FEATURES,), -1e3).double()), examples=batch)
    with pytest.raises(ValueError, match="both given"):
        tls.features(model, dictionary(), examples=batch, which=torch.ones(FEATURES, dtype=torch.bool))
    with pytest.raises(ValueError, match="which has shape"):
        tls.features(model, dictionary(), which=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="width 8"):
        tls.dictionaries.firing(model, dictionary(), batch, hook="blocks.0.mlp.hook_post")


# Files


@ALL
def test_what_is_saved_is_loaded(name: str, tmp_path: Path):
    d, x = dictionary(name), inputs()
    tls.dictionaries.save(d, tmp_path, dtype=torch.float64)
    again = tls.dictionaries.load(tmp_path)
    assert torch.equal(again.encode(x), d.encode(x)) and torch.equal(
        again.decode(again.encode(x)), d.decode(d.encode(x))
    )
    assert (again.hook, again.source, again.k, again.centred) == (d.hook, d.source, d.k, d.centred)


def written(folder: Path, said: dict[str, Any], **tensors: Tensor) -> Path:
    """A folder as SAELens writes it."""
    d = dictionary()
    made = {"W_enc": d.W_enc, "W_dec": d.W_dec, "b_enc": d.b_enc, "b_dec": d.b_dec} | tensors
    save_file({name: tensor.float().clone() for name, tensor in made.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 8, "d_sae": FEATURES} | said))
    return folder


def test_older_and_newer_configurations_of_sae_lens_are_read(tmp_path: Path):
    older = {"architecture": "standard", "activation_fn_str": "relu", "hook_name": STREAM, "hook_head_index": None}
    older |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "finetuning_scaling_factor": False}
    found = tls.dictionaries.load(written(tmp_path, older))
    assert (found.activation, found.hook, found.centred) == ("relu", STREAM, True)
    torch.testing.assert_close(found.encode(inputs()), dictionary().encode(inputs()), rtol=1e-5, atol=1e-5)
    topk = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    assert tls.dictionaries.load(written(tmp_path, topk | {"hook_name": STREAM})).k == 3
    newer = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "metadata": {"hook_name": STREAM}}
    found, d, x = tls.dictionaries.load(written(tmp_path, newer)), dictionary(), inputs()
    length = d.W_dec.norm(dim=1)  # what it says: ranked by what they write, and put back by rows of length 1
    ranked = ((x - d.b_dec) @ d.W_enc + d.b_enc) * length
    kept = ranked.relu() * (ranked >= ranked.topk(4).values[:, 3:])
    torch.testing.assert_close(found.encode(x), kept, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.decode(kept), (kept / length) @ d.W_dec + d.b_dec, rtol=1e-5, atol=1e-5)
    jump = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": {"hook_name": STREAM}}
    found = tls.dictionaries.load(written(tmp_path, jump, threshold=torch.full((FEATURES,), 0.3)))
    before = x @ d.W_enc + d.b_enc
    torch.testing.assert_close(found.encode(x), before * (before > 0.3), rtol=1e-5, atol=1e-5)
    across = {"architecture": "transcoder", "metadata": {"hook_name": IN, "hook_name_out": OUT}}
    found = tls.dictionaries.load(written(tmp_path, across))
    assert (found.source, found.hook, found.centred) == (IN, OUT, False)


@pytest.mark.parametrize(
    ("said", "tensors", "message"),
    [
        ({"architecture": "gated"}, {}, "architecture 'gated'"),
        ({}, {"W_skip": torch.zeros(8, 8)}, "a tensor W_skip"),
        ({"normalize_activations": "layer_norm"}, {}, "normalises"),
        ({"activation_fn_str": "tanh-relu"}, {}, "activation 'tanh-relu'"),
        ({"hook_head_index": 3}, {}, "one head"),
        ({"reshape_activations": "hook_z"}, {}, "reshapes"),
        ({}, {"b_enc": torch.zeros(3)}, "b_enc has shape"),
        ({}, {"W_enc": torch.full((8, FEATURES), float("inf"))}, "W_enc holds"),
        ({"architecture": "jumprelu"}, {}, "threshold"),
        ({"architecture": "topk"}, {}, "k is None"),
    ],
)
def test_other_layouts_are_refused_by_name(
    said: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        tls.dictionaries.load(written(tmp_path, said, **tensors))


def test_damaged_and_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors"):
        tls.dictionaries.load(tmp_path)
    folder = written(tmp_path, {})
    (folder / "sae_weights.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="damaged"):
        tls.dictionaries.load(folder)
    (written(tmp_path, {}) / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="no object"):
        tls.dictionaries.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        tls.dictionaries.load(folder)


class Rounded(Own):
    """In float32, whatever the model's precision, as most dictionaries are."""

    def __init__(self, of: Any):
        super().__init__(
            replace(of, **{name: getattr(of, name).float() for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
        )
        self.W_dec = self.of.W_dec

    def encode(self, x: Tensor) -> Tensor:
        return self.of.encode(x.float())

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec + self.of.b_dec


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_an_object_of_another_precision_than_the_model(precision: torch.dtype):
    model, batch, d = fresh(dtype=precision), examples(), dictionary()
    own = tls.features(model, Rounded(d), STREAM, examples=batch)
    basis = own.sites[0].basis
    assert basis is not None and basis.dtype == precision
    rows = d.W_dec[list(own.sites[0].numbers or ())].T
    torch.testing.assert_close(basis.double(), rows.double(), rtol=1e-2, atol=1e-2)
    assert bool(tls.score.risk(model, batch, own, probes=1).scores.isfinite().all())
