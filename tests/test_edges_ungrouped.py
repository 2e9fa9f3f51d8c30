"""Edges into the keys and values of single heads, where heads share them: against the model with the shared weights
written once for each head, which has no groups."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import NoCasts, unchanged, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_sparsify as tls

NAMES = ("Llama with biases", "Qwen3", "Gemma 2", "Gemma 3")
every_name = pytest.mark.parametrize("name", NAMES)


def written_out(model: Any, name: str) -> Any:
    """The same model with six heads of keys and values, each pair of them equal."""
    whole = architectures.fresh(name, num_key_value_heads=6)
    state = dict(model.original_model.state_dict())
    mine = whole.original_model.state_dict()
    for key, weight in state.items():
        if weight.shape != mine[key].shape:
            assert ".k" in key or ".v" in key
            state[key] = weight.unflatten(0, (3, -1)).repeat_interleave(2, 0).flatten(0, 1)
    whole.original_model.load_state_dict(state)
    return whole


def pair(name: str, built: dict[str, Any] = {}) -> tuple[Any, Any]:  # noqa: B006
    if name not in built:
        model = architectures.bridge(name)
        built[name] = (model, written_out(model, name))
    return built[name]


def constants_of(model: Any, units: tls.Units, seed: int = 0) -> tls.Values:
    width, most = model.cfg.d_model, max(site.rows for site in units.sites)
    table = torch.randn(most, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tls.Values(units, tuple(table[: site.rows] for site in units.sites))


def random_circuit(units: tls.Units, seed: int, kept: float = 0.5) -> tls.Circuit:
    return tls.Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) < kept)


def logits(model: Any, tokens: Tensor, *interventions: tls.Intervention) -> Tensor:
    with torch.no_grad(), NoCasts(), tls.intervened(model, *interventions):
        return model(tokens)


def ablation(circuit: tls.Circuit, values: tls.Values) -> tls.Intervention:
    return tls.Intervention(circuit.units, circuit.mask.double(), values)


@every_name
@pytest.mark.parametrize("readers", ["qkv", "head"])
def test_names_and_count_are_those_of_the_model_without_groups(name: str, readers: Any):
    model, whole = pair(name)
    units = tls.edges(model, readers, grouped=False)
    assert units.names == tls.edges(whole, readers).names == tls.edges(whole, readers, grouped=False).names
    if readers == "qkv":  # the benchmark's count: 6 heads and an MLP a layer, three inputs a head
        assert len(units) == sum((1 + 7 * layer) * 18 + (1 + 7 * layer + 6) for layer in range(3)) + 22
    assert tls.edges(model, "layer", grouped=False) == tls.edges(model, "layer")


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(NAMES), st.sampled_from(["qkv", "head"])
)
def test_any_set_of_edges_is_that_of_the_model_without_groups(seed: int, share: float, name: str, readers: Any):
    (model, whole), tokens = pair(name), architectures.batch(n=2, length=8).tokens
    units, there = tls.edges(model, readers, grouped=False), tls.edges(whole, readers)
    circuit = random_circuit(units, seed, share)
    found = logits(model, tokens, ablation(circuit, constants_of(model, units, seed)))
    expected = logits(whole, tokens, ablation(tls.Circuit(there, circuit.mask), constants_of(whole, there, seed)))
    assert float((found - expected).abs().max()) < 1e-10
    assert float((found - logits(model, tokens)).abs().max()) > 1e-6


@every_name
def test_both_copies_alike_are_the_groups_reader(name: str):
    model, tokens = architectures.bridge(name), architectures.batch(n=2).tokens
    groups, single = tls.edges(model), tls.edges(model, grouped=False)
    circuit = random_circuit(groups, 3, 0.6)
    kept = set(circuit.names)

    def shared(match: re.Match[str]) -> str:
        return f"->L{match[1]}G{int(match[2]) // 2}.{match[3]}"

    mask = torch.tensor([re.sub(r"->L(\d)H(\d)\.([kv])", shared, edge) in kept for edge in single.names])
    assert 0 < int(mask.sum()) < len(mask)
    found = logits(model, tokens, ablation(tls.Circuit(single, mask), constants_of(model, single)))
    expected = logits(model, tokens, ablation(circuit, constants_of(model, groups)))
    assert float((found - expected).abs().max()) < 1e-10


@every_name
def test_scores_and_gradients_are_those_of_the_model_without_groups(name: str):
    (model, whole), examples = pair(name), architectures.batch(n=5)
    units, there = tls.edges(model, grouped=False), tls.edges(whole)
    values, alike = constants_of(model, units), constants_of(whole, there)
    with NoCasts(), unchanged(model):
        for size in (5, 2):
            found = tls.score.risk(model, examples, units, values=values, probes=2, batch_size=size).scores
            expected = tls.score.risk(whole, examples, there, values=alike, probes=2).scores
            assert torch.allclose(found, expected, rtol=1e-8, atol=1e-16)
        assert torch.allclose(
            tls.score.gradient(model, examples, units, values=values).scores,
            tls.score.gradient(whole, examples, there, values=alike).scores,
            rtol=1e-8,
            atol=1e-12,
        )


def test_interventions_nest_with_heads_and_with_each_other():
    """A head that an outer context holds at a constant stays there, whatever keys and values it is given."""
    (model, whole), tokens = pair("Llama with biases"), architectures.batch(n=2).tokens
    examples, found = architectures.batch(n=4), []
    for here in (model, whole):
        units, nodes = tls.edges(here, grouped=False), tls.heads(here)
        gone = ablation(~tls.Circuit.of(nodes, ["L1H2", "L2H5"]), tls.constants.mean(here, examples, nodes))
        one, other = (ablation(random_circuit(units, seed, 0.8), constants_of(here, units)) for seed in (1, 2))
        with torch.no_grad(), tls.intervened(here, gone), tls.intervened(here, one), tls.intervened(here, other):
            found.append(here(tokens))
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-10)
    with unchanged(model), pytest.raises(RuntimeError, match="stopped"):
        with tls.intervened(
            model,
            ablation(
                random_circuit(tls.edges(model, grouped=False), 0), constants_of(model, tls.edges(model, grouped=False))
            ),
        ):
            raise RuntimeError("stopped")
    assert torch.allclose(logits(model, tokens), logits(whole, tokens), rtol=0, atol=1e-10)


def test_pruning_and_what_cannot_be_taken_apart():
    model, tokens = architectures.bridge("Llama"), architectures.batch().tokens
    units, groups = tls.edges(model, grouped=False), tls.edges(model)
    values, circuit = constants_of(model, units), random_circuit(units, 2, 0.05)
    pruned = tls.prune(circuit)
    before, after = (logits(model, tokens, ablation(part, values)) for part in (circuit, pruned))
    assert pruned <= circuit and len(pruned) < len(circuit)
    assert float((before - after).abs().max()) < 1e-12
    one, other = ablation(~tls.Circuit.of(units, ["embed->L0H1.k"]), values), ~tls.Circuit.of(groups, ["embed->L0G1.v"])
    with pytest.raises(ValueError, match="shared keys and values of block 0"):
        logits(model, tokens, one, ablation(other, constants_of(model, groups)))
    with unchecked(), pytest.raises(ValueError, match=r"grouped is False, and the heads of block 0 \(Olmo2Attention\)"):
        tls.edges(architectures.fresh("OLMo 2"), grouped=False)
