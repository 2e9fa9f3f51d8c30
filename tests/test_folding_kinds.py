"""Folding of whole layers, directions, stream directions and affine replacements, on every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, UNEVEN, bridge, fresh, one_by_one
from helpers.files import word_tokenizer
from helpers.models import NoCasts
from helpers.native import PATTERNS, SEEDS, VARIANTS, ablated, distance, mask, native, tokens, units_of
from helpers.native import fresh as native_fresh
from hypothesis import given, settings
from torch import Tensor

from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.circuit import Circuit, NeighbourMap, Values
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, attentions, mlps, neurons, residuals
from tl_sparsify.folding.bridge import load_folded, save_folded
from tl_sparsify.folding.fold import fold

MODELS = [*VARIANTS, *CONFIGS]
PLACES = [f"blocks.{layer}.hook_resid_{place}" for layer in (0, 1) for place in ("pre", "mid", "post")]
PLACES += ["blocks.0.hook_attn_out", "blocks.2.hook_mlp_out"]


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return native(name, dtype) if name in VARIANTS else bridge(name, dtype)


def draws(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_units(model: Any, seed: int) -> Units:
    """Units of every kind that folds; the directions neither of unit length nor orthogonal."""
    units = units_of(model) + attentions(model)
    if "mlp" in model.blocks[0]._modules:
        units += mlps(model)
    for number, place in enumerate(PLACES):
        if place in model.hook_dict:
            units += directions(model, place, draws(model.cfg.d_model, 2 + number % 2, seed=seed + number))
    return units + stream_directions(model, draws(model.cfg.d_model, 3, seed=seed + 60))


def reduction_of(model: Any, units: Units, kept: Tensor, seed: int, mixed: bool = True) -> Reduction:
    """Random constants, and random affine replacements where a site has kept and removed units of width 1."""
    widths = {"head": model.cfg.d_head, "attention": model.cfg.d_model, "mlp": model.cfg.d_model}
    shapes = [(site.size, widths.get(site.kind, len(site.hook_names))) for site in units.sites]
    values = Values(units, tuple(draws(*shape, seed=seed + number) for number, shape in enumerate(shapes)))
    mixing: list[NeighbourMap | None] = []
    for site, keep in zip(units.sites, units.split(kept), strict=True):
        columns, rows = keep.nonzero().flatten(), (~keep).nonzero().flatten()
        if not mixed or site.kind not in ("neuron", "direction") or not len(columns) or not len(rows):
            mixing.append(None)
            continue
        size = min(len(columns), len(rows))  # the first removed of the first kept, all of the last kept
        columns = torch.cat([columns[:size], columns[-1:].expand(len(rows))])
        rows = torch.cat([rows[:size], rows])
        mixing.append(NeighbourMap(site.size, rows, columns, draws(len(rows), seed=seed + len(mixing)) * 0.3))
    parts = tuple(mixing) if any(mixing) else None
    return Reduction(Circuit(units, kept), values, fingerprint=fingerprint(model), mixing=parts)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(patterns=PATTERNS, seed=SEEDS)
def test_folded_is_ablated_in_float64(name: str, patterns: list[str], seed: int):
    model = model_of(name)
    units = all_units(model, seed)
    reduction = reduction_of(model, units, mask(units, patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-9


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(patterns=PATTERNS, seed=SEEDS)
def test_folded_is_ablated_in_float32(name: str, patterns: list[str], seed: int):
    model = model_of(name, torch.float32)
    units = all_units(model, seed)
    reduction = reduction_of(model, units, mask(units, patterns, seed), seed)
    assert distance(model, reduction, fold(model, reduction), tokens(seed)) <= 1e-4


@pytest.mark.parametrize("kind", ["mlp", "attention", "direction", "stream", "neighbours"])
@pytest.mark.parametrize("name", ["plain", "GPT-2", "Pythia", "Llama", "Gemma 2"])
def test_each_kind_alone(name: str, kind: str):
    model = model_of(name)
    units = neurons(model) if kind == "neighbours" else all_units(model, 3)
    units = Units(tuple(site for site in units.sites if kind in (site.kind, "neighbours")))
    patterns = ["some", "one"] if kind == "neighbours" else ["none", "some", "one"]
    reduction = reduction_of(model, units, mask(units, patterns, 3), 3)
    folded = fold(model, reduction)
    assert distance(model, reduction, folded, tokens()) <= 1e-9
    with torch.no_grad(), NoCasts():
        assert not torch.allclose(folded(tokens()), model(tokens()))


def uneven(model: Any, seed: int) -> Reduction:
    """A reduction of every kind, which keeps heads and neurons in layers 0 and 2 but no attention or MLP in layer 1."""
    units = all_units(model, seed)
    kept = mask(units, UNEVEN, seed)
    for site, part in zip(units.sites, units.slices, strict=True):
        if site.kind in ("attention", "mlp"):
            kept[part] = site.layer != 1
    return reduction_of(model, units, kept, seed)


@pytest.mark.parametrize("name", CONFIGS)
def test_key_value_cache_and_padding(name: str):
    model = bridge(name)
    reduction = uneven(model, 4)
    folded = fold(model, reduction)
    with torch.no_grad(), NoCasts():
        with intervened(model, ablate(reduction)):
            expected = one_by_one(model, tokens(), 4)
        found = one_by_one(folded, tokens(), 4)
    assert expected.isfinite().all() and (found - expected).abs().max() <= 1e-9
    attended = torch.ones(3, 9, dtype=torch.long)
    attended[1, :4] = 0
    assert distance(model, reduction, folded, tokens(), attention_mask=attended) <= 1e-9


@pytest.mark.parametrize("name", ["plain", *CONFIGS])
def test_folds_again_and_loads(name: str, tmp_path: Path):
    model = model_of(name)
    folded = fold(model, uneven(model, 5))
    assert set(units_of(folded).names) == set(folded.units)
    units = Units(tuple(site for site in all_units(folded, 6).sites if site.kind not in ("attention", "mlp")))
    reduction = reduction_of(folded, units, mask(units, UNEVEN, 7), 7)
    again = fold(folded, reduction)
    assert distance(folded, reduction, again, tokens()) <= 1e-9
    save_folded(again, tmp_path / "model")
    loaded = load_folded(tmp_path / "model")
    assert torch.equal(loaded(tokens()), again(tokens()))
    assert loaded.units == again.units and fingerprint(loaded) == fingerprint(again)
    assert loaded.n_params_total == again.n_params_total
    layers = attentions(loaded)
    kept = torch.tensor([True, True, False])
    whole = reduction_of(loaded, layers, kept, 8)
    assert distance(loaded, whole, fold(loaded, whole), tokens()) <= 1e-9


def written(folded: Any, direction: Tensor) -> list[Tensor]:
    """The coordinates along a direction of all that the weights can write to the stream, beside their constants."""
    tables = [folded.embed.weight, *([folded.pos_embed.weight] if "pos_embed" in folded._modules else [])]
    rows = [table - table.mean(0) for table in tables]
    rows += [block.attn.W_O.flatten(0, 1) for block in folded.blocks] + [block.mlp.W_out for block in folded.blocks]
    return [row.detach() @ direction for row in rows]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("Gemma 2", "Gemma 3")])
def test_stream_directions_leave_every_weight(name: str):
    model = bridge(name)
    units = stream_directions(model, torch.linalg.qr(draws(model.cfg.d_model, 2, seed=0)).Q)
    reduction = reduction_of(model, units, torch.tensor([True, False]), 1)
    folded = fold(model, reduction)
    kept, gone = units.sites[0].basis.unbind(1)
    assert max(row.abs().max() for row in written(folded, gone)) <= 1e-12
    for row, before in zip(written(folded, kept), written(model, kept), strict=True):
        torch.testing.assert_close(row, before)
    assert folded.hook_dict.keys() == model.hook_dict.keys()
    made = 3 * sum(part.original_component.bias is None for part in (model.blocks[0].attn.o, model.blocks[0].mlp.out))
    tied = model.embed.weight is model.unembed.original_component.weight
    assert folded.n_params_total == model.n_params_total + made * model.cfg.d_model + tied * model.embed.weight.numel()
    torch.testing.assert_close(folded.W_U, model.W_U)


def test_what_stays_explicit_is_small_and_counted():
    model = bridge("Llama")
    units = directions(model, "blocks.1.hook_resid_post", draws(24, 3, seed=0))
    reduction = reduction_of(model, units, torch.tensor([True, False, False]), 1, mixed=False)
    folded = fold(model, reduction)
    new = {name: tuple(p.shape) for name, p in folded.named_parameters()}
    new = {name.rpartition(".")[2]: shape for name, shape in new.items() if name not in dict(model.named_parameters())}
    assert new == {"basis": (24, 2), "reader": (24, 2), "coordinates": (2,)}
    _, cache = folded.run_with_cache(tokens())
    with intervened(model, ablate(reduction)):
        _, expected = model.run_with_cache(tokens())
    assert cache.keys() == expected.keys()
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], expected["blocks.1.hook_resid_post"])
    read = units.sites[0].read(cache["blocks.1.hook_resid_post"])[..., 1:, 0]
    torch.testing.assert_close(read, reduction.values.tensors[0][1:, 0].expand_as(read))  # constants


@pytest.mark.parametrize("name", ["plain", "GPT-2", "Gemma 2"])
def test_a_removed_layer_has_no_weights_and_writes_its_constant(name: str):
    model = model_of(name)
    units = attentions(model) + mlps(model)
    kept = Circuit.of(units, ["L0ATTN", "L2ATTN", "L1MLP", "L2MLP"]).mask
    reduction = reduction_of(model, units, kept, 2)
    folded = fold(model, reduction)
    assert set(units_of(folded).names) == set(folded.units)
    assert {unit[:3] for unit in units_of(model).names} - {unit[:3] for unit in folded.units} == {"L1H", "L0N"}
    assert folded.blocks[1].attn.W_Q.numel() == folded.blocks[0].mlp.W_in.numel() == 0
    _, cache = folded.run_with_cache(tokens())
    value = reduction.values.tensors
    torch.testing.assert_close(cache["blocks.1.hook_attn_out"], value[1].expand(3, 9, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cache["blocks.0.hook_mlp_out"], value[3].expand(3, 9, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_half_precision_models_fold_no_worse_than_they_ablate(name: str):
    model = fresh(name, torch.bfloat16)
    reduction = uneven(model, 9)
    folded = fold(model, reduction)
    half = {parameter.dtype for path, parameter in folded.named_parameters() if "hook_" not in path}
    assert half == {torch.bfloat16}
    exact = ablated(fresh(name, torch.bfloat16).double(), reduction, tokens())
    error = (folded(tokens()).double() - exact).abs().max()
    assert error <= 1.5 * (ablated(model, reduction, tokens()).double() - exact).abs().max()


def test_what_does_not_fold_is_refused_by_name():
    model = bridge("Llama")

    def reduction(units: Units) -> Reduction:
        return reduction_of(model, units, torch.zeros(len(units), dtype=torch.bool), 0)

    with pytest.raises(ValueError, match="units of kind 'residual' do not fold; those of kind head, neuron, attent"):
        fold(model, Reduction(Circuit.empty(residuals(model)), whole_values(residuals(model))))
    with pytest.raises(
        ValueError, match=r"direction units of blocks\.1\.mlp\.hook_post do not fold; those of hook_resid"
    ):
        fold(model, reduction(directions(model, "blocks.1.mlp.hook_post", draws(20, 2, seed=0))))
    with pytest.raises(ValueError, match=r"basis of blocks\.1\.hook_resid_post has 23 rows, the model's stream 24"):
        site = Site("direction", 1, "blocks.1.hook_resid_post", 2, basis=draws(23, 2, seed=0))
        fold(model, reduction(Units((site,))))
    with pytest.raises(ValueError, match=r"units at positions 4 of blocks\.1\.hook_resid_post do not fold"):
        fold(model, reduction(directions(model, "blocks.1.hook_resid_post", draws(24, 2, seed=0)).at(4)))
    with pytest.raises(ValueError, match=r"has 1 mlp units of width 24, the reduction's 1 of width 23"):
        fold(model, Reduction(Circuit.empty(mlps(model)), whole_values(mlps(model), 23)))


def whole_values(units: Units, width: int = 24) -> Values:
    return Values(units, tuple(torch.zeros(1, width) for _ in units.sites))


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama"])
def test_models_with_processed_weights(name: str, tmp_path: Path):
    model = fresh(name, torch.float32)
    model.process_weights(fold_ln=True, center_writing_weights=True, center_unembed=True)
    model.eval()
    reduction = uneven(model, 3)
    folded = fold(model, reduction)
    assert distance(model, reduction, folded, tokens()) <= 1e-4
    save_folded(folded, tmp_path / "model")
    assert torch.equal(load_folded(tmp_path / "model")(tokens()), folded(tokens()))
    model.enable_compatibility_mode()
    model.eval()
    reduction = uneven(model, 4)
    assert distance(model, reduction, fold(model, reduction), tokens()) <= 1e-4


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "plain"])
def test_directions_left_alone_at_the_bos_are_so_for_what_reads_it(name: str, tmp_path: Path):
    model = (native_fresh if name in VARIANTS else fresh)(name)
    model.tokenizer = word_tokenizer(tmp_path / "words")
    inputs = torch.cat([torch.zeros(3, 1, dtype=torch.long), tokens()[:, 1:].clamp_min(2)], 1)
    sites = [site for site in all_units(model, 3).sites if site.kind in ("direction", "stream")]
    before = [site for site in sites if site.hook.endswith("resid_pre")]
    for some in ([before[0]], [before[1]], [sites[-1]], sites):
        units = Units(tuple(some))
        reduction = reduction_of(model, units, torch.zeros(len(units), dtype=torch.bool), 3)
        reduction = replace(reduction, first_token="bos", fingerprint=None)  # which casts, too
        with NoCasts():
            folded = fold(model, reduction)
        assert distance(model, reduction, folded, inputs) <= 1e-9
    save_folded(folded, tmp_path / "model")
    assert distance(model, reduction, load_folded(tmp_path / "model"), inputs) <= 1e-9
