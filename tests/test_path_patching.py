"""Path patching: against TransformerLens's, and against a forward pass written out reader by reader."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.edges import run_by_hand
from helpers.models import unchanged
from helpers.native import native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens.patching import get_act_patch_direct_path

import tl_sparsify as tls
from tl_sparsify.comparison.cost import cost_of

QUIET: dict[str, Any] = {"progress": False}
EDGES = ("embed->L0H0.k", "L0H1->L2H3.q", "L1MLP->L2H0.v", "L0H2->L0MLP", "L2H1->logits")


def paired(n: int = 4) -> tls.Examples:
    examples = architectures.batch(n)
    other = torch.randint(2, 17, examples.tokens.shape, generator=torch.Generator().manual_seed(1))
    return replace(examples, counterfactual_tokens=other, counterfactual_labels=examples.labels)


def log_odds(rows: Tensor, examples: tls.Examples) -> Tensor:
    return tls.metrics.log_odds(rows[:, -1][:, examples.choices], examples)


def by_hand(model: Any, tokens: Tensor, heard: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what each writer writes, where each reader sums for itself what it hears: ``heard[edge]`` instead of
    what the edge's writer writes."""
    return run_by_hand(model, tokens, set(tls.edges(model).names), {}, gives=heard)


def test_edges_and_chains_are_what_a_sum_for_each_reader_gives():
    model, examples = native(), paired()
    assert examples.counterfactual_tokens is not None
    clean, _ = by_hand(model, examples.tokens, {})
    _, other = by_hand(model, examples.counterfactual_tokens, {})

    def effect(heard: dict[str, Tensor]) -> Tensor:
        return log_odds(by_hand(model, examples.tokens, heard)[0], examples) - log_odds(clean, examples)

    expected = [effect({edge: other[edge.partition("->")[0]]}) for edge in EDGES]
    first = by_hand(model, examples.tokens, {"L0H1->L1H2.v": other["L0H1"]})[1]
    second = by_hand(model, examples.tokens, {"L1H2->L1MLP": first["L1H2"]})[1]
    expected.append(effect({"L1MLP->logits": second["L1MLP"]}))
    expected.append(effect({f"L0H1->L2H3.{part}": other["L0H1"] for part in "qkv"}))
    expected.append(effect({"L0H1->logits": other["L0H1"], "L1H2->logits": first["L1H2"]}))
    chain, both = "L0H1->L1H2.v->L1MLP->logits", ("L0H1->logits", "L0H1->L1H2.v->logits")
    with unchanged(model):
        found = tls.patch_paths(model, examples, [*EDGES, chain, "L0H1->L2H3", both], **QUIET)
    assert found.forward_passes == 2 + 5 + 3 + 1 + 1  # the last path's first edge is the first of the chain
    assert float((found.moments.mean - torch.stack(expected).mean(1)).abs().max()) < 1e-10
    assert float((found.moments.stderr - torch.stack(expected).std(1) / 2).abs().max()) < 1e-10
    assert float(found.moments.mean.abs().min()) > 1e-6


@pytest.mark.parametrize(("name", "part"), [("GPT-2", "q"), ("GPT-2", "k"), ("GPT-2", "v"), ("Llama", "q")])
def test_edges_between_heads_are_those_of_transformerlens(name: str, part: Any):
    model, examples = architectures.bridge(name), paired()
    with torch.no_grad():
        assert examples.counterfactual_tokens is not None
        _, clean = model.run_with_cache(examples.tokens)
        start, corrupted = model.run_with_cache(examples.counterfactual_tokens)

        def change(rows: Tensor) -> Tensor:
            return (log_odds(rows, examples) - log_odds(start, examples)).mean()

        given = (model, examples.counterfactual_tokens, clean, corrupted, change, 0, 1, part)
        theirs = get_act_patch_direct_path(*given, verbose=False)
    heads = [(layer, head) for layer in (1, 2) for head in range(model.cfg.n_heads)]
    names = [f"L0H1->L{layer}H{head}.{part}" for layer, head in heads]
    ours = tls.patch_paths(model, examples, names, direction="denoising", **QUIET).moments.mean
    expected = torch.stack([theirs[place] for place in heads])
    assert float((ours - expected).abs().max()) < 1e-6  # theirs are kept in float32
    assert float(ours.abs().max()) > 1e-4


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from(EDGES), min_size=1), st.sampled_from([1, 3, None]))
def test_the_divergence_of_edges_patched_together_does_not_depend_on_batches(together: set[str], size: int | None):
    model, examples = native(), paired()
    units = tls.edges(model)
    source = tls.run_values(model, replace(examples, tokens=examples.counterfactual_tokens), units)
    with torch.no_grad(), tls.intervened(model, tls.interchange(tls.Circuit.of(units, list(together)), source)):
        changed = model(examples.tokens)[:, -1][:, examples.choices].log_softmax(-1)
    with torch.no_grad():
        original = model(examples.tokens)[:, -1][:, examples.choices].log_softmax(-1)
    expected = (original.exp() * (original - changed)).sum(-1).mean()
    found = tls.patch_paths(model, examples, [tuple(together)], metric=None, batch_size=size, **QUIET)
    assert abs(found[found.paths[0]].mean - float(expected)) < 1e-12
    assert found.measured_in == "nats" and found[found.paths[0]].mean > 0


def test_a_run_patched_with_itself_is_unchanged():
    model, examples = native(), paired()
    same = replace(examples, counterfactual_tokens=examples.tokens)
    found = tls.patch_paths(model, same, [*EDGES, "L0H1->L1H2->logits"], **QUIET)
    assert float(found.moments.mean.abs().max()) < 1e-12


def test_at_positions_that_nothing_reads_a_path_carries_nothing():
    model, examples = native(), paired()
    edge = "L2H1->logits"
    last, first = (tls.patch_paths(model, examples, [edge], positions=p, **QUIET)[edge].mean for p in (-1, 0))
    assert first == 0 and abs(last - tls.patch_paths(model, examples, [edge], **QUIET)[edge].mean) < 1e-12 < abs(last)


def test_the_table_has_an_interval_around_each_effect():
    frame = tls.patch_paths(native(), paired(), EDGES, **QUIET).to_frame(level=0.9)
    assert tuple(frame.path) == EDGES and (frame.n == 4).all()
    assert ((frame.high - frame.low) / frame.stderr - 2 * 1.6448536).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([], "paths is empty"),
        (["L0H1"], "a path is written"),
        (["L0H1->L0H2.q"], "no edge 'L0H1->L0H2.q'"),
        (["L0H1->L1H2.w"], "did you mean"),
        (["embed.q->L0H1.q->logits"], "begins with what writes"),
        (["L0H1.w->logits"], "begins with what writes"),
        (["L0H1->logits->L1H2.q"], "no edge 'logits->L1H2.q'"),
        ([("L0H1->logits", "L0H1->logits")], "a last edge of its own"),
    ],
)
def test_what_is_no_path_is_refused_by_name(paths: Any, words: str):
    with pytest.raises(ValueError, match=words):
        tls.patch_paths(native(), paired(), paths, **QUIET)


def test_of_heads_that_share_keys_the_reader_must_be_named():
    model, examples = architectures.bridge("Llama"), paired()
    with pytest.raises(ValueError, match="no edge 'L0H1->L2H3'"):
        tls.patch_paths(model, examples, ["L0H1->L2H3"], **QUIET)
    with pytest.raises(ValueError, match=r"name their group, as in L1G0\.k, or give grouped=False"):
        tls.patch_paths(model, examples, ["L0H1->L2H3.k"], **QUIET)
    found = tls.patch_paths(model, examples, ["L0H1->L2G1.k", "L0H1->L2H3.q->logits"], **QUIET)
    assert float(found.moments.mean.abs().min()) > 1e-6


def test_heads_that_share_keys_are_patched_each_where_readers_are_not_grouped():
    model, examples = architectures.bridge("Llama"), paired()
    together, apart = (("L0H1->L2G1.k",), ("L0H1->L2H2.k", "L0H1->L2H3.k"))
    found = tls.patch_paths(model, examples, [together], **QUIET)
    each = tls.patch_paths(model, examples, [apart, *apart, "L0H1->L2H3"], grouped=False, **QUIET)
    assert torch.allclose(each.moments.mean[:1], found.moments.mean, rtol=1e-9)
    units = tls.edges(model, grouped=False)
    source = tls.run_values(model, examples.counterfactuals, units)
    with torch.no_grad():
        before = model(examples.tokens)
        for number, edge in ((1, "L0H1->L2H2.k"), (2, "L0H1->L2H3.k")):
            with tls.intervened(model, tls.interchange(tls.Circuit.of(units, [edge]), source)):
                change = log_odds(model(examples.tokens), examples) - log_odds(before, examples)
            assert float(each.moments.mean[number] - change.mean()) == pytest.approx(0, abs=1e-9)


def test_what_paths_begin_with_alike_is_run_once():
    model, examples = native(), paired()
    paths = ["L0H1->L1H2.v->L1MLP->logits", "L0H1->logits", "L0H1->L1H2.v->L2H3.q", "L0H1->L1H2.v->L1MLP->L2H3.q"]
    paths += ["L0H2->L1H2.v->logits", "L0H1->L1H2.v->L2H0.k->logits"]
    for size in (None, 2):
        found, cost = cost_of(
            model, len(examples), lambda size=size: tls.patch_paths(model, examples, paths, batch_size=size, **QUIET)
        )
        ways = ["L0H1->L1H2.v", "L0H1->L1H2.v->L1MLP", "L0H1->L1H2.v->L2H0.k", "L0H2->L1H2.v"]
        assert cost.forward == found.forward_passes == 2 + len(paths) + len(ways)
        for path in paths:
            alone = tls.patch_paths(model, examples, [path], **QUIET)
            assert abs(found[path].mean - alone[path].mean) < 1e-12 < abs(alone[path].mean)


@pytest.mark.parametrize("source", ["counterfactual", "shuffled"])
def test_denoising_holds_right_answers_against_the_clean_runs_wrong_ones(source: Any):
    model, examples = native(), paired()
    wrong = torch.where(examples.labels == -100, -100, examples.labels.roll(1, 0))
    named = replace(examples, counterfactual_labels=None, wrong_answers=wrong.amax(1, keepdim=True))
    settings: dict[str, Any] = {"source": source, "direction": "denoising", "metric": tls.metrics.mean_difference}
    found, expected = (
        tls.patch_paths(model, one, EDGES, **settings, **QUIET).moments.mean
        for one in (replace(examples, counterfactual_labels=wrong), named)
    )
    assert torch.equal(found, expected) and float(expected.abs().min()) > 1e-6
    units = tls.heads(model)
    for method in (tls.baselines.activation_patching, tls.baselines.eap):
        scores, same = (
            method(model, one, units, **settings).scores
            for one in (replace(examples, counterfactual_labels=wrong), named)
        )
        assert torch.equal(scores, same)
