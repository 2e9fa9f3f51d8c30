"""First tokens: where a beginning-of-sequence token stands, an ablation leaves units alone, and so does a fold."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import seeded, unchecked

import tl_sparsify as tls


@cache
def setting() -> tuple[Any, tls.Examples, tls.Reduction]:
    """The small language model on IOI, whose prompts begin with a special token; half of its units are kept."""
    task = tls.load_task("ioi")
    model = task.model()
    train = task.examples(0)[0][:24]
    units = tls.heads(model) + tls.neurons(model)
    kept = tls.Circuit(units, torch.rand(len(units), generator=seeded(1)) < 0.5)
    return model, train, tls.constants.reduced(model, kept, tls.constants.mean(model, train, units))


def neurons_of_the_first_layer(model: Any, data: tls.Examples, reduction: tls.Reduction) -> torch.Tensor:
    units = tls.Units(tuple(site for site in reduction.units.sites if site.hook == "blocks.0.mlp.hook_post"))
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)), tls.recorded(model, units) as recording:
        model(data.tokens, attention_mask=None if data.attention_mask is None else data.attention_mask.long())
    return recording.read()[0][..., 0]


def given_to(data: tls.Examples) -> torch.Tensor:
    return torch.ones_like(data.tokens, dtype=torch.bool) if data.attention_mask is None else data.attention_mask


def first_of(data: tls.Examples) -> torch.Tensor:
    """Each row's first position that is no padding."""
    mask = given_to(data)
    return mask & (mask.long().cumsum(1) == 1)


def test_units_keep_their_values_at_the_first_token_and_nowhere_else():
    model, data, reduction = setting()
    full = tls.Reduction(tls.Circuit.full(reduction.units), reduction.values)
    own = neurons_of_the_first_layer(model, data, full)
    left = neurons_of_the_first_layer(model, data, reduction)
    gone = neurons_of_the_first_layer(model, data, replace(reduction, first_token="none"))
    first, rest = first_of(data), given_to(data) & ~first_of(data)
    assert bool((data.tokens[first] == model.tokenizer.bos_token_id).all()) and torch.equal(left[first], own[first])
    assert not torch.equal(gone[first], own[first]) and torch.equal(gone[rest], left[rest])
    assert "forward" not in vars(model)


def test_a_first_token_of_any_kind_is_left_alone_on_request():
    model, data, reduction = setting()
    bos, rest = first_of(data), given_to(data) & ~first_of(data)
    shifted = replace(data, tokens=torch.where(bos, data.tokens[0, -1], data.tokens))
    plain, any_kind = (
        neurons_of_the_first_layer(model, shifted, replace(reduction, first_token=rule)) for rule in ("none", "any")
    )
    assert torch.equal(neurons_of_the_first_layer(model, shifted, reduction), plain)
    assert not torch.equal(plain[bos], any_kind[bos]) and torch.equal(plain[rest], any_kind[rest])


@pytest.mark.parametrize("rule", ["bos", "none"])
def test_a_folded_model_is_the_ablated_one_at_every_position(rule: Any, tmp_path: Path):
    model, data, reduction = setting()
    reduction = replace(reduction, first_token=rule)
    folded = tls.fold(model, reduction)
    tls.save_folded(folded, tmp_path / "folded")
    mask = given_to(data)
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)):
        ablated = model(data.tokens, attention_mask=mask.long())
    for one in (folded, tls.load_folded(tmp_path / "folded")):
        with torch.no_grad():
            found = one(data.tokens, attention_mask=mask.long())
        assert float((found - ablated)[mask].abs().max()) < 1e-4
    again = tls.fold(folded, tls.constants.reduced(folded, tls.Circuit.full(tls.heads(folded)), heads_of(folded, data)))
    with torch.no_grad():
        found = (one(data.tokens, attention_mask=mask.long())[mask] for one in (again, folded))
        torch.testing.assert_close(*found)


def heads_of(model: Any, data: tls.Examples) -> tls.Values:
    return tls.constants.mean(model, data[:4], tls.heads(model))


def test_the_rule_is_saved_stated_and_checked(tmp_path: Path):
    _, _, reduction = setting()
    other = replace(reduction, first_token="none")
    other.save(tmp_path / "one.reduction")
    assert tls.Reduction.load(tmp_path / "one.reduction") == other != reduction
    with pytest.raises(ValueError, match="first_token is 'always'"), unchecked():
        replace(reduction, first_token="always")
    with pytest.raises(ValueError, match="first_token is 'any'"):
        tls.fold(setting()[0], replace(reduction, first_token="any"))


def test_a_unit_costs_nothing_where_it_is_left_alone():
    """Only the first token's value differs between the two constants: what replaces it must not matter."""
    model, data, reduction = setting()
    moved = tls.Values(reduction.units, tuple(v.clone() for v in reduction.values.tensors))
    own = neurons_of_the_first_layer(model, data, tls.Reduction(tls.Circuit.full(reduction.units), moved))
    assert float(own[first_of(data)].std(0).max()) < 1e-4  # a constant, whatever comes after
    risks = [tls.risk(model, replace(reduction, first_token=rule), data).mean for rule in ("bos", "none")]
    assert risks[0] != risks[1]


SHORT, LONG = "David gave a ring to", "Then David gave a ring to"


@cache
def with_a_filler_of_its_own(begins: bool) -> tuple[Any, tls.Reduction]:
    """The same model with a tokenizer that pads with another token than the bos, and may put no bos first."""
    model = tls.load_task("ioi").model()
    model.tokenizer.pad_token = model.tokenizer.convert_ids_to_tokens(model.tokenizer.bos_token_id + 1)
    model.cfg.default_prepend_bos = begins
    return model, setting()[2]


def with_the_bos_for_filler(begins: bool) -> tuple[Any, tls.Reduction]:
    model, _, reduction = setting()
    if not begins:
        model = tls.load_task("ioi").model()
        model.cfg.default_prepend_bos = False
    return model, reduction


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("kind", [with_a_filler_of_its_own, with_the_bos_for_filler])
def test_text_is_what_its_tokens_are_to_ablations_and_folds_alike(kind: Any, begins: bool, side: str):
    model, reduction = kind(begins)
    folded = tls.fold(model, reduction)
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)):
        alone = [model(model.to_tokens(text))[0] for text in (SHORT, LONG)]
        texts = [model([SHORT, LONG], padding_side=side), folded([SHORT, LONG], padding_side=side)]
        for one in (model, folded):
            torch.testing.assert_close(one(SHORT)[0], alone[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(one(input=[LONG])[0], alone[1], atol=1e-4, rtol=0)
    for logits in texts:
        for row, expected in zip(logits, alone, strict=True):
            found = row[-len(expected) :] if side == "left" else row[: len(expected)]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fold_is_the_ablation_where_a_call_alone_leaves_the_bos_out(side: str):
    model, _, reduction = setting()
    folded, options = tls.fold(model, reduction), {"prepend_bos": False, "padding_side": side}
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)):
        torch.testing.assert_close(folded([SHORT, LONG], **options), model([SHORT, LONG], **options), atol=1e-4, rtol=0)
        alone = model(model.to_tokens(LONG, prepend_bos=False))
        torch.testing.assert_close(model(LONG, prepend_bos=False), alone, atol=1e-4, rtol=0)


def test_tokens_without_a_batch_are_one_prompt():
    model, _, reduction = setting()
    tokens, folded = model.to_tokens(SHORT), tls.fold(model, reduction)
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)):
        expected = model(tokens)
        for one in (model, folded):
            torch.testing.assert_close(one(tokens[0]), expected, atol=1e-4, rtol=0)
