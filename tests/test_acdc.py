"""ACDC: against the published loop, written with names and sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import unchanged
from helpers.native import native

import tl_sparsify as tls
from tl_sparsify.comparison.cost import cost_of


def slowly(model: Any, examples: tls.Examples, units: tls.Units, values: tls.Values, threshold: float) -> set[str]:
    kept, now = list(units.names), 0.0
    readers = list(dict.fromkeys(name.partition("->")[2] for name in units.names))
    for reader in reversed(readers):
        owner = reader.partition(".")[0]
        for edge in [name for name in reversed(units.names) if name.endswith(f"->{reader}")]:
            if owner != "logits" and not any(name.startswith(f"{owner}->") for name in kept):
                kept.remove(edge)  # nothing reads it
                continue
            without = tls.Circuit.of(units, [name for name in kept if name != edge])
            then = tls.risk(model, tls.constants.reduced(model, without, values), examples).mean
            if then - now < threshold:
                kept.remove(edge)
                now = then
    return set(kept)


def test_what_stays_at_each_threshold_is_what_the_published_loop_keeps():
    model, examples = architectures.fresh("GPT-2", n_layer=2, n_head=2, n_embd=8, n_inner=8), architectures.batch()
    units = tls.edges(model, "head")
    values = tls.constants.zero(model, examples, units)
    settings: dict[str, Any] = {"values": values, "progress": False}
    with unchanged(model):
        alone = [tls.baselines.acdc(model, examples, units, thresholds=[t], **settings) for t in (0.02, 0.1)]
        both = tls.baselines.acdc(model, examples, units, thresholds=[0.1, 0.02], **settings)
    for threshold, scores in zip((0.02, 0.1), alone, strict=True):
        found = {name for name, score in zip(units.names, scores.scores.tolist(), strict=True) if score > 0}
        assert found == slowly(model, examples, units, values, threshold) and 0 < len(found) < len(units)
        assert 1 < scores.forward_passes < 1 + len(units)
    assert torch.equal(both.scores, torch.maximum(alone[0].scores, alone[1].scores))
    assert both.forward_passes == sum(scores.forward_passes - 1 for scores in alone) + 1


@pytest.mark.parametrize("thresholds", [[], [-1.0], [float("nan")]])
def test_thresholds_that_are_none_are_refused(thresholds: list[float]):
    with pytest.raises(ValueError, match="thresholds is"):
        tls.baselines.acdc(native(), architectures.batch(), tls.edges(native()), thresholds=thresholds)


def test_what_would_take_for_ever_and_what_are_no_edges_are_refused():
    model, examples = native(), architectures.batch()
    with pytest.raises(ValueError, match="fewer thresholds"):
        tls.baselines.acdc(model, examples, tls.edges(model), thresholds=[0.1] * 1000)
    with pytest.raises(ValueError, match="not all of them edges"):
        tls.baselines.acdc(model, examples, tls.heads(model))


def test_the_other_run_is_taken_once():
    model = architectures.fresh("GPT-2", n_layer=2, n_head=2, n_embd=8, n_inner=8)
    examples = architectures.batch()
    examples = replace(examples, counterfactual_tokens=examples.tokens.flip(0).roll(1, 1))
    units = tls.edges(model, "head")
    values = tls.constants.counterfactual(model, examples, units)

    def sweep(size: int | None = None) -> tls.Scores:
        settings: dict[str, Any] = {"thresholds": [0.003], "batch_size": size, "progress": False}
        return tls.baselines.acdc(model, examples, units, values=values, **settings)

    found, cost = cost_of(model, len(examples), sweep)
    kept = {name for name, score in zip(units.names, found.scores.tolist(), strict=True) if score > 0}
    assert kept == slowly(model, examples, units, values, 0.003) and 0 < len(kept) < len(units)
    assert cost.forward == found.forward_passes <= 2 + len(units)
    assert torch.equal(sweep(2).scores, found.scores)
