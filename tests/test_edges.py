"""Edges as units: against a forward pass written out reader by reader, and against the units that write them."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.edges import by_hand, constants_of
from helpers.models import NoCasts, unchanged, unchecked
from helpers.native import native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.distributions import drawn_interventions
from tl_sparsify.core.metrics import log_odds
from tl_sparsify.core.probes import samples
from tl_sparsify.core.units import parameters

every_sum = pytest.mark.parametrize("name", ("native", *architectures.CONFIGS))


def model_of(name: str) -> Any:
    return native() if name == "native" else architectures.bridge(name)


def random_circuit(units: tls.Units, seed: int, kept: float = 0.5) -> tls.Circuit:
    return tls.Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < kept)


def logits(model: Any, tokens: Tensor, *interventions: tls.Intervention) -> Tensor:
    with torch.no_grad(), NoCasts(), tls.intervened(model, *interventions):
        return model(tokens)


def ablation(circuit: tls.Circuit, values: tls.Values) -> tls.Intervention:
    return tls.Intervention(circuit.units, circuit.mask.double(), values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.5, 0.95]))
def test_any_set_of_edges_is_what_a_sum_for_each_reader_gives(seed: int, share: float):
    model, tokens = native(), architectures.batch().tokens
    units = tls.edges(model)
    values, circuit = constants_of(model, units, seed), random_circuit(units, seed, share)
    named = dict(zip(units.sites[-1].writers, values.tensors[-1], strict=True))
    expected = by_hand(model, tokens, set(circuit.names), named)
    found = logits(model, tokens, ablation(circuit, values))
    assert float((found - expected).abs().max()) < 1e-10
    assert float((found - logits(model, tokens)).abs().max()) > 1e-3


def test_one_removed_edge_is_path_patching_with_all_else_as_it_then_is():
    model, tokens = native(), architectures.batch().tokens
    units = tls.edges(model)
    values = constants_of(model, units)
    named = dict(zip(units.sites[-1].writers, values.tensors[-1], strict=True))
    for edge in ("embed->L0H0.k", "L0H1->L2H3.q", "L1MLP->L2H0.v", "L0H2->L0MLP", "L2H1->logits"):
        circuit = ~tls.Circuit.of(units, [edge])
        expected = by_hand(model, tokens, set(circuit.names), named)
        assert float((logits(model, tokens, ablation(circuit, values)) - expected).abs().max()) < 1e-10


@every_sum
def test_law_14_keeping_every_edge_of_the_kept_units_is_keeping_the_units(name: str):
    model, examples = model_of(name), architectures.batch()
    units, nodes = tls.edges(model), tls.heads(model) + tls.mlps(model)
    values = tls.constants.mean(model, examples, units)
    means = tls.constants.mean(model, examples, nodes)
    for seed in range(3):
        circuit = random_circuit(nodes, seed, 0.7)
        gone = set((~circuit).names)
        kept = torch.tensor([edge.partition("->")[0] not in gone for edge in units.names])
        with unchanged(model):
            found = logits(model, examples.tokens, ablation(tls.Circuit(units, kept), values))
        expected = logits(model, examples.tokens, ablation(circuit, means))
        assert float((found - expected).abs().max()) < 1e-10
        assert float((expected - logits(model, examples.tokens)).abs().max()) > 1e-3


@every_sum
def test_law_14_the_edges_of_a_writer_sum_to_the_writer(name: str):
    model, examples = model_of(name), architectures.batch(n=3)
    units, nodes = tls.edges(model), tls.heads(model) + tls.mlps(model)
    with NoCasts():
        edges = tls.score.gradient(model, examples, units)
        alone = tls.score.gradient(model, examples, nodes)
    for writer, score in zip(nodes.names, alone.scores.tolist(), strict=True):
        mine = [name.startswith(f"{writer}->") for name in units.names]
        assert abs(float(edges.scores[torch.tensor(mine)].sum()) - score) < 1e-10


@every_sum
def test_keeping_every_edge_changes_nothing(name: str):
    model, tokens = model_of(name), architectures.batch().tokens
    units = tls.edges(model)
    values = constants_of(model, units)
    full = tls.Circuit.full(units)
    assert torch.equal(logits(model, tokens, ablation(full, values)), logits(model, tokens))
    written_out = tls.Intervention(units, torch.ones(len(units)).double().requires_grad_(), values)  # is not skipped
    assert float((logits(model, tokens, written_out) - logits(model, tokens)).abs().max()) < 1e-12


@pytest.mark.parametrize("readers", ("qkv", "head", "layer"))
@every_sum
def test_probes_are_the_derivatives_along_each_edges_removal(name: str, readers: Any):
    """Against the derivative with respect to ``keep``, at the original model and in an ablated one."""
    model, examples = model_of(name), architectures.batch(n=3)
    units = tls.edges(model, readers)
    values = constants_of(model, units)
    circuit = random_circuit(units, 1, 0.8)
    for current in (None, tls.constants.reduced(model, circuit, values)):
        removal = tls.constants.reduced(model, tls.Circuit.full(units), values)
        with NoCasts(), unchanged(model):
            shared = {"metric": log_odds, "probes": 1, "restorable": True}
            [part] = samples(model, examples, removal, current=current, **shared)
            keep = (circuit.mask if current is not None else torch.ones(len(units))).double()
            keep = keep.expand(len(examples), -1).clone().requires_grad_()
            with torch.enable_grad(), tls.intervened(model, tls.Intervention(units, keep, values)):
                rows = model(examples.tokens)[:, -1][:, examples.choices]
                slope = torch.autograd.grad(log_odds(rows, examples).sum(), keep)[0]
        assert float((part.effects[0].abs() - slope.abs()).abs().max()) < 1e-9 * float(slope.abs().max())


@pytest.mark.parametrize("parts", (("k",), ("q", "v"), ("v", "mlp")))
def test_effects_of_edges_into_some_parts_are_those_that_they_have_among_all(parts: tuple[str, ...]):
    """What the other parts project goes back as it always does; heads that are units too change nothing."""
    model, examples = native(), architectures.batch(n=3)
    units = tls.edges(model)
    some = tls.Units(tuple(site for site in units.sites if site.hook.split(".")[-2] in parts))

    def effects(units: tls.Units) -> Tensor:
        removal = tls.constants.reduced(model, tls.Circuit.full(units), tls.constants.mean(model, examples, units))
        [part] = samples(model, examples, removal, metric=log_odds, probes=1)
        return part.effects[0][:, [units.names.index(name) for name in some.names]]

    among_all = effects(units)
    for found in (effects(some), effects(some + tls.heads(model))):
        assert float((found - among_all).abs().max()) < 1e-12 * float(among_all.abs().max())


@pytest.mark.parametrize("readers", ("qkv", "head", "layer"))
@pytest.mark.parametrize("name", ("native", "Llama", "Gemma 2"))
def test_an_edge_that_is_interchanged_is_removed_from_what_it_then_carries(name: str, readers: Any):
    model, examples = model_of(name), architectures.batch()
    generator = torch.Generator().manual_seed(1)
    other = torch.randint(2, 17, examples.tokens.shape, generator=generator)
    examples = replace(examples, counterfactual_tokens=other)
    units = tls.edges(model, readers)
    values = constants_of(model, units)
    reduction = tls.constants.reduced(model, tls.Circuit.full(units), values)
    distribution = tls.InterventionDistribution.interchange(0.5, "counterfactual", of="all")
    with NoCasts():
        [part] = samples(model, examples, reduction, metric=log_odds, probes=1, interventions=distribution)
        drawn = drawn_interventions(distribution, model, reduction, examples, torch.arange(len(examples)), 0)
    keep = torch.ones(len(examples), len(units), dtype=torch.float64).requires_grad_()
    with NoCasts(), tls.intervened(model, *drawn, tls.Intervention(units, keep, values)):
        (slope,) = torch.autograd.grad(
            log_odds(model(examples.tokens)[:, -1][:, examples.choices], examples).sum(), keep
        )
    assert bool((drawn[0].keep == 0).any()) and float(slope.abs().max()) > 1e-3
    assert float((part.effects[0].abs() - slope.abs()).abs().max()) < 1e-9


def test_an_edge_that_is_at_its_mean_already_loses_nothing_when_it_is_set_to_it():
    model, examples = native(), architectures.batch()
    units = tls.edges(model)
    means = tls.constants.mean(model, examples, units)
    at_means = tls.InterventionDistribution.mean(1.0, of="all")
    assert float(tls.score.risk(model, examples, units, values=means, interventions=at_means).scores.max()) < 1e-20


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("name", ("GPT-2", "Llama", "Pythia"))
def test_scores_of_edges_into_attention_make_no_copies_in_any_precision(name: str, dtype: torch.dtype):
    model, examples = architectures.fresh(name, dtype), architectures.batch()
    with tls.recorded(model, tls.edges(model), gradients=True, lean=True) as recording:
        model(examples.tokens)
    assert {hook for hook in recording.hooks if ".attn." in hook} == set(recording.heard)


def test_nothing_of_a_score_of_edges_stays_in_memory():
    """Not even until Python looks for what refers to itself."""
    model, examples = native(), architectures.batch(n=2)
    units = tls.edges(model)
    values = constants_of(model, units)

    def kept() -> int:
        tls.score.risk(model, examples, units, values=values)
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    kept()
    gc.collect()
    gc.disable()
    try:
        assert kept() == kept()
    finally:
        gc.enable()


def test_derivatives_with_respect_to_keep_are_differences():
    model, examples = native(), architectures.batch(n=2)
    units = tls.edges(model)
    values = constants_of(model, units)
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        with tls.intervened(model, tls.Intervention(units, at, values)):
            return model(examples.tokens)[:, -1].log_softmax(-1)[:, 3].sum()

    leaf = keep.clone().requires_grad_()
    [slope] = torch.autograd.grad(value(leaf), leaf)
    for number in range(0, len(units), 17):
        step = torch.zeros_like(keep)
        step[number] = 1e-5
        with torch.no_grad():
            difference = (value(keep + step) - value(keep - step)) / 2e-5
        assert abs(float(difference - slope[number])) < 1e-7


def test_names_follow_the_benchmarks_count():
    sized: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 24, "n_inner": 8}
    units = tls.edges(architectures.fresh("GPT-2", **sized))
    assert len(units) == 32_491 and len(set(units.names)) == 32_491
    assert units["L3H1->L7H11.v"].name == "L3H1->L7H11.v" and units.index("embed->L0H0.q") == 0
    assert {name.partition("->")[0] for name in units.names if name.endswith("->L1H0.k")} == {
        "embed",
        *(f"L0H{head}" for head in range(12)),
        "L0MLP",
    }


def test_heads_that_share_keys_share_a_reader():
    units = tls.edges(architectures.bridge("Llama"))
    readers = {name.partition("->")[2] for name in units.names}
    assert {"L0H5.q", "L0G2.k", "L0G2.v", "L2MLP", "logits"} <= readers and "L0H0.k" not in readers
    model, tokens = architectures.bridge("Llama"), architectures.batch().tokens
    values = constants_of(model, units)
    # the query of one head alone: its group's other head attends as before
    circuit = ~tls.Circuit.of(units, [f"{w}->L1H2.q" for w in units.sites[4].writers])
    patterns = tls.Units((tls.Site("head", 1, "blocks.1.attn.hook_z", 6),))
    with torch.no_grad():
        before = tls.run_values(model, architectures.batch(), patterns).tensors[0]
        with tls.intervened(model, ablation(circuit, values)):
            after = tls.run_values(model, architectures.batch(), patterns).tensors[0]
    assert [bool((before[:, :, h] != after[:, :, h]).any()) for h in range(6)] == [h == 2 for h in range(6)]
    assert tokens.shape[0] == len(before)


def test_an_mlp_beside_attention_does_not_read_it():
    parallel = tls.edges(architectures.bridge("Pythia"))
    assert "L1H0->L1MLP" not in parallel.names and "L0H0->L1MLP" in parallel.names
    assert "L1H0->L1MLP" in tls.edges(architectures.bridge("GPT-NeoX, sequential")).names


@pytest.mark.parametrize(("readers", "count"), [("qkv", 3), ("head", 1)])
def test_a_head_is_read_into_by_three_or_by_one(readers: Any, count: int):
    model, tokens = native(), architectures.batch().tokens
    found = tls.edges(model, readers)
    into = [name for name in found.names if re.match(r"L0H0->L1H1(\.|$)", name)]
    assert len(into) == count
    three, one = tls.edges(model), tls.edges(model, "head")
    parts = ~tls.Circuit.of(three, [name for name in three.names if re.match(r"L0H0->L1H1\.", name)])
    whole = ~tls.Circuit.of(one, ["L0H0->L1H1"])
    together = logits(model, tokens, ablation(whole, constants_of(model, one)))
    assert torch.allclose(logits(model, tokens, ablation(parts, constants_of(model, three))), together, atol=1e-12)


def test_a_layer_reads_as_all_its_heads():
    model, tokens = native(), architectures.batch().tokens
    one, layer = tls.edges(model, "head"), tls.edges(model, "layer")
    assert [name for name in layer.names if "L0H0->L1" in name] == ["L0H0->L1ATTN", "L0H0->L1MLP"]
    heads = ~tls.Circuit.of(one, [f"L0H0->L1H{h}" for h in range(4)])
    whole = ~tls.Circuit.of(layer, ["L0H0->L1ATTN"])
    found = logits(model, tokens, ablation(whole, constants_of(model, layer)))
    assert torch.allclose(found, logits(model, tokens, ablation(heads, constants_of(model, one))), atol=1e-12)


def test_edges_at_positions_are_removed_there_alone():
    model, examples = native(), architectures.batch()
    everywhere = tls.edges(model)
    third = everywhere.at(2)
    mask = torch.zeros(len(third), dtype=torch.bool)
    found = logits(model, examples.tokens, ablation(tls.Circuit(third, mask), constants_of(model, third)))
    whole = logits(model, examples.tokens, ablation(tls.Circuit(everywhere, mask), constants_of(model, everywhere)))
    plain = logits(model, examples.tokens)
    assert torch.allclose(found[:, :2], plain[:, :2], atol=1e-12)
    assert torch.allclose(found[:, 2], whole[:, 2], atol=1e-12)
    for other in (whole, plain):
        assert float((found[:, 3:] - other[:, 3:]).abs().max()) > 1e-3
    assert third["L0H1->L2H3.q@2"].name == "L0H1->L2H3.q@2"


def test_interventions_on_units_and_edges_nest():
    """A head ablated before it is read: what its edges lose is what it then writes."""
    model, examples = native(), architectures.batch()
    units, nodes = tls.edges(model), tls.heads(model) + tls.neurons(model)
    values, means = constants_of(model, units), tls.constants.mean(model, examples, nodes)
    gone = ablation(~tls.Circuit.of(nodes, ["L0H1", "L1N3"]), means)
    edges = ablation(~tls.Circuit.of(units, [n for n in units.names if n.startswith("L0H1->")]), values)
    both = logits(model, examples.tokens, gone, edges)
    with torch.no_grad(), tls.intervened(model, gone), tls.intervened(model, edges):
        assert torch.allclose(model(examples.tokens), both, atol=1e-12)
    mixed = units + nodes
    joined = tls.Values(mixed, values.tensors + means.tensors)
    keep = torch.cat([edges.keep, gone.keep])
    assert torch.allclose(logits(model, examples.tokens, tls.Intervention(mixed, keep, joined)), both, atol=1e-12)
    with pytest.raises(RuntimeError, match="stopped"), tls.intervened(model, edges):
        raise RuntimeError("stopped")
    assert torch.equal(logits(model, examples.tokens), logits(model, examples.tokens))


@pytest.mark.parametrize("size", [1, 7])
def test_batches_change_no_number(size: int):
    model, examples = native(), architectures.batch(n=9)
    units = tls.edges(model)
    whole, parts = (tls.constants.mean(model, examples, units, batch_size=s) for s in (9, size))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(whole.tensors, parts.tensors, strict=True))
    given = {"values": whole, "probes": 2, "seed": 3}
    risks = [tls.score.risk(model, examples, units, batch_size=s, **given).scores for s in (9, size)]
    assert torch.allclose(*risks, rtol=1e-10, atol=1e-18)


def test_everything_that_takes_units_takes_edges(tmp_path: Any):
    model, examples = native(), architectures.batch(n=8)
    units = tls.edges(model)
    with unchanged(model):
        path = tls.sparsify(model, examples, units, rounds=4, smallest=0.1, progress=False)
        alone = tls.score.exact(model, examples, units, progress=False)
    reduction = path.at(0.1)
    chance = [
        tls.risk(model, reduction.with_circuit(random_circuit(units, seed, 0.1)), examples).mean for seed in range(5)
    ]
    assert tls.risk(model, reduction, examples).mean < min(chance)
    one = reduction.with_circuit(~tls.Circuit.of(units, ["embed->L0H1.v"]))
    measured = tls.risk(model, one, examples).mean
    assert abs(float(alone.scores[units.index("embed->L0H1.v")]) - measured) < 1e-6 * measured + 1e-12
    reduction.save(tmp_path / "edges.reduction")
    assert tls.Reduction.load(tmp_path / "edges.reduction") == reduction
    refitted = tls.constants.refit(model, reduction, examples, examples, steps=30, progress=False)
    assert tls.risk(model, refitted, examples).mean < tls.risk(model, reduction, examples).mean
    assert (~reduction.circuit | reduction.circuit) == tls.Circuit.full(units)
    assert tls.evaluate(model, reduction, examples).risk.mean == tls.risk(model, reduction, examples).mean


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.02, 0.05, 0.1, 0.3]), st.sampled_from(["native", "Llama", "Pythia"]))
def test_pruning_changes_no_number(seed: int, share: float, name: str):
    model, tokens = model_of(name), architectures.batch().tokens
    units = tls.edges(model)
    values, circuit = constants_of(model, units, seed), random_circuit(units, seed, share)
    pruned = tls.prune(circuit)
    before, after = (logits(model, tokens, ablation(c, values)) for c in (circuit, pruned))
    assert pruned <= circuit and torch.equal(tls.prune(pruned).mask, pruned.mask)
    assert float((before - after).abs().max()) < 1e-12
    assert tls.loose_ends(pruned).unread == ()


def test_pruning_leaves_what_is_read_elsewhere():
    units = tls.edges(native())
    loose = tls.Circuit.of(units, ["embed->L0H0.q", "L1H1->logits"])
    assert tls.loose_ends(loose) == tls.LooseEnds(unfed=("L1H1",), unread=("L0H0",))
    assert tls.prune(loose).names == ("L1H1->logits",)
    at_the_end = tls.Circuit(units.at(-1), loose.mask)  # elsewhere all are read
    assert tls.prune(at_the_end).mask.equal(loose.mask)
    some = tls.Units(units.sites[:3])  # what later layers read is not among these
    assert len(tls.prune(tls.Circuit.of(some, ["embed->L0H0.q"]))) == 1


@pytest.mark.parametrize(("name", "readers"), [("native", "layer"), ("Llama", "qkv"), ("Llama", "head")])
def test_pruning_leaves_what_is_read_by_heads_that_no_edge_is_from(name: str, readers: Any):
    """The layer's heads are read outside of these units, as no later reader is among them."""
    model, examples = model_of(name), architectures.batch(n=4)
    sites = tls.edges(model, readers).sites
    for some in (
        tls.Units(sites[:1]),
        tls.Units(tuple(site for site in sites if site.hook.startswith("blocks.0.attn"))),
    ):
        full = tls.Circuit.full(some)
        assert tls.prune(full).mask.all() and tls.loose_ends(full) == tls.LooseEnds((), ())
        removed = tls.constants.reduced(model, ~full, constants_of(model, some))
        assert tls.risk(model, removed, examples).mean > 1e-6
        found = tls.baselines.acdc(model, examples, some, thresholds=[1e-12], values=removed.values, progress=False)
        assert bool((found.scores > 0).any())


def test_what_edges_are_not_is_refused_by_name():
    model, examples = native(), architectures.batch()
    units = tls.edges(model)
    reduction = tls.constants.reduced(model, tls.Circuit.full(units), constants_of(model, units))
    with pytest.raises(ValueError, match=r"edges do not fold: what one reader gets"):
        tls.fold(model, reduction)
    with unchecked(), pytest.raises(ValueError, match=r"readers is 'q'"):
        tls.edges(model, "q")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"'L2H0->L1H0\.q' is no unit name; names look like"):
        units["L2H0->L1H0.q"]
    with pytest.raises(ValueError, match=r"without edges: tls\.edges\(model\) gives some"):
        tls.prune(tls.Circuit.full(tls.heads(model)))
    with pytest.raises(ValueError, match=r"curvature_weighted gives each unit a constant; edges"):
        tls.constants.curvature_weighted(model, examples, units)
    with pytest.raises(ValueError, match=r"no part of the weights"):
        parameters(model, units)
    with pytest.raises(ValueError, match=r"writers and readers"):
        replace(units.sites[0], writers=())
