"""Path patching: against a forward pass written out reader by reader, exact scores, and TransformerLens's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import examples, unchanged, unchecked
from helpers.native import native
from transformer_lens.patching import get_act_patch_direct_path

import tl_sparsify as tls
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import log_odds


def mean_of(model: Any, batch: tls.Examples, *interventions: tls.Intervention) -> float:
    with torch.no_grad(), tls.intervened(model, *interventions):
        return float(log_odds(answer_logits(model, batch), batch).double().mean())


def test_a_path_of_one_edge_is_that_edge_removed_to_the_counterfactual():
    model, batch = native(), examples(8)
    units = tls.edges(model)
    some = ["embed->L0H0.k", "L0H1->L2H3.q", "L1MLP->L2H0.v", "L0H2->L0MLP", "L2H1->logits"]
    paired = tls.constants.counterfactual(model, batch, units)
    before = mean_of(model, batch)
    with unchanged(model):
        found = tls.patch_paths(model, batch, some)
    for name, change in zip(found.path, found.change, strict=True):
        one = tls.constants.reduced(model, ~tls.Circuit.of(units, [name]), paired)
        source = tls.run_values(model, batch.counterfactuals, units)
        expected = mean_of(model, batch, tls.ablate(one, source)) - before
        assert change == pytest.approx(expected, abs=1e-10) and abs(change) > 1e-6
    assert found.before.tolist() == pytest.approx([before] * 5) and found.n.tolist() == [8] * 5


def test_a_longer_path_carries_what_its_beginning_makes_and_nothing_else():
    model, batch = native(), examples(8)
    heads, units = tls.heads(model), tls.edges(model)
    [found] = tls.patch_paths(model, batch, ["L0H1->L1H2.v->logits"]).to_dict("records")
    # by hand: the head's output when its values alone hear the sender's counterfactual, read by the logits alone
    source = tls.run_values(model, batch.counterfactuals, units)
    first = tls.interchange(tls.Circuit.of(units, ["L0H1->L1H2.v"]), source)
    with tls.intervened(model, first):
        middle = tls.run_values(model, batch, heads)
    # in a run in which nothing else that reads that head hears of it
    others = [name for name in units.names if name.startswith("L1H2->") and name != "L1H2->logits"]
    clean = tls.run_values(model, batch, units)
    changed = tls.interchange(tls.Circuit.of(heads, ["L1H2"]), middle)
    kept = tls.interchange(tls.Circuit.of(units, others), clean)
    expected = mean_of(model, batch, changed, kept) - mean_of(model, batch)
    assert found["change"] == pytest.approx(expected, abs=1e-10) and abs(expected) > 1e-6 and found["edges"] == 2


def test_paths_carried_together_are_not_a_sum():
    model, batch = native(), examples(8)
    pair = ["L0H1->L2H3.q", "L0H1->L2H3.k"]
    found = tls.patch_paths(model, batch, [*pair, pair])
    units = tls.edges(model)
    source = tls.run_values(model, batch.counterfactuals, units)
    both = mean_of(model, batch, tls.interchange(tls.Circuit.of(units, pair), source)) - mean_of(model, batch)
    assert found.change[2] == pytest.approx(both, abs=1e-10) and found.path[2] == " + ".join(pair)
    assert abs(found.change[0] + found.change[1] - both) > 1e-9


def test_it_is_transformer_lens_own_where_that_runs():
    model, batch = architectures.bridge("GPT-2"), architectures.batch(8)
    batch = batch.with_partners(torch.arange(8).roll(1))
    assert batch.counterfactual_tokens is not None and batch.choices is not None
    columns = batch.choices
    _, clean = model.run_with_cache(batch.tokens)
    _, corrupted = model.run_with_cache(batch.counterfactual_tokens)
    other = batch.counterfactuals

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return log_odds(logits[:, -1, columns], other).mean()

    arguments: dict[str, Any] = {"src_layer": 0, "src_head": 1, "component": "v", "verbose": False}
    theirs = get_act_patch_direct_path(model, batch.counterfactual_tokens, clean, corrupted, metric, **arguments)
    paths = [f"L0H1->L{layer}H{head}.v" for layer in (1, 2) for head in range(6)]
    ours = tls.patch_paths(model, batch, paths, direction="denoising")
    moved = (theirs[1:] - mean_of(model, other)).flatten().tolist()
    assert ours.change.tolist() == pytest.approx(moved, abs=1e-5) and max(map(abs, moved)) > 1e-3


@pytest.mark.parametrize("size", [1, 3, None])
def test_batches_change_no_number(size: int | None):
    model, batch = native("gated, RMS, rotary, grouped"), examples(8)
    paths = ["L0H1->L1G0.k->L2H1.q", ["L0MLP->L1H2.q->logits", "embed->L2MLP"]]
    found = tls.patch_paths(model, batch, paths, batch_size=size)
    whole = tls.patch_paths(model, batch, paths)
    assert found.change.tolist() == pytest.approx(whole.change.tolist(), abs=1e-12)
    assert found.edges.tolist() == [2, 3] and whole.change.abs().min() > 1e-9


def test_a_group_passes_on_what_each_of_its_heads_writes():
    model, batch = native("gated, RMS, rotary, grouped"), examples(4)
    found = tls.patch_paths(model, batch, ["embed->L0G1.v->logits", ["embed->L0G1.v->logits"]])
    assert found.change[0] == found.change[1] != 0
    with pytest.raises(ValueError, match="no edge 'L0H9->logits'"):
        tls.patch_paths(model, batch, ["L0H9->logits"])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "name at least one in a list"),
        ("L0H1->L2H3.q", r"must be a list|name at least one in a list"),
        (["L0H1"], "is no path"),
        (["L2H1->L1H0.q"], "the model has no edge"),
        ([[]], "an empty sequence"),
    ],
)
def test_what_is_no_path_is_refused(paths: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tls.patch_paths(native(), examples(2), paths)


def test_examples_need_counterfactuals_and_a_known_direction():
    model, batch = native(), examples(4)
    with unchecked(), pytest.raises(ValueError, match="direction is 'up'"):
        tls.patch_paths(model, batch, ["L0H1->logits"], direction="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="counterfactual_tokens"):
        tls.patch_paths(model, tls.Examples(batch.tokens, batch.labels), ["L0H1->logits"])
