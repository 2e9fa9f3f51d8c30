"""Integrated gradients at the writers and information-flow routes, each against a slow loop in plain torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import NoCasts, unchanged, unchecked
from helpers.native import fresh, native
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.metrics import log_odds


def examples_of(n: int = 4) -> tls.Examples:
    batch = architectures.batch(n=n)
    return replace(batch, counterfactual_tokens=batch.tokens.flip(0).roll(1, 1))


def same(w: Tensor) -> Tensor:
    return w


def part_of_the_way(other: Tensor, share: float) -> Any:
    return lambda w: other + share * (w - other)


class Plain:
    """A native model with layer norms in plain torch, in which every reader has a copy of the stream."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embedded(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            _, cache = self.model.run_with_cache(tokens)
        return cache["blocks.0.hook_in"]

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        inner = norm.original_component
        return torch.nn.functional.layer_norm(x, x.shape[-1:], inner.weight, inner.bias, self.model.cfg.eps)

    def run(
        self, embedded: Tensor, added: dict[str, Tensor], moved: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The logits, what is written and what is read; ``moved`` makes something else of what is written, ``added``
        goes into what a reader takes in."""
        model, written, taken = self.model, {"embed": moved.get("embed", same)(embedded)}, {}
        stream, pos = written["embed"], embedded.shape[1]

        def read(name: str) -> Tensor:
            taken[name] = stream
            return stream + added.get(name, 0)

        for layer, block in enumerate(model.blocks):
            attn, new = block.attn, {}
            for h in range(model.cfg.n_heads):
                q, k, v = (
                    self.normed(block.ln1, read(f"L{layer}H{h}.{part.lower()}")) @ getattr(attn, f"W_{part}")[h]
                    + getattr(attn, f"b_{part}")[h]
                    for part in "QKV"
                )
                scores = (q @ k.mT / model.cfg.d_head**0.5).masked_fill(torch.ones(pos, pos).triu(1).bool(), -torch.inf)
                new[f"L{layer}H{h}"] = moved.get(f"L{layer}H{h}", same)(scores.softmax(-1) @ v @ attn.W_O[h])
            written |= new
            stream = stream + torch.stack(list(new.values())).sum(0) + attn.b_O
            hidden = self.normed(block.ln2, read(f"L{layer}MLP")) @ block.mlp.W_in + block.mlp.b_in
            out = torch.nn.functional.gelu(hidden) @ block.mlp.W_out + block.mlp.b_out
            written[f"L{layer}MLP"] = moved.get(f"L{layer}MLP", same)(out)
            stream = stream + written[f"L{layer}MLP"]
        logits = self.normed(model.ln_final, read("logits")) @ model.unembed.W_U + model.unembed.b_U
        return logits, written, taken


def integrated_by_hand(model: Any, batch: tls.Examples, units: tls.Units, steps: int, constants: Any = None) -> Tensor:
    """One example, layer and step at a time."""
    plain, total = Plain(model), torch.zeros(len(units), dtype=torch.float64)
    layers = ["embed", *(f"L{layer}{kind}" for layer in range(model.cfg.n_layers) for kind in ("H", "MLP"))]
    assert batch.counterfactual_tokens is not None
    for i in range(len(batch)):
        one = batch[i : i + 1]
        near, far = plain.embedded(one.tokens), plain.embedded(batch.counterfactual_tokens[i : i + 1])
        clean, other = plain.run(near, {}, {})[1], plain.run(far, {}, {})[1]
        if constants is not None:
            other = {name: constants[name].expand_as(w) for name, w in clean.items()}
        for layer in layers:
            for k in range(1, steps + 1):
                moved = {w: part_of_the_way(other[w], k / steps) for w in clean if w.startswith(layer)}
                readers = dict.fromkeys(edge.partition("->")[2] for edge in units.names)
                added = {name: torch.zeros_like(near).requires_grad_() for name in readers}
                logits = plain.run(near, added, moved)[0]
                value = log_odds(logits[:, -1][:, batch.choices], one).mean()
                slopes = dict(zip(added, torch.autograd.grad(value, list(added.values())), strict=True))
                for number, edge in enumerate(units.names):
                    writer, _, reader = edge.partition("->")
                    step = ((clean[writer] - other[writer]) * slopes[reader]).sum()
                    total[number] += step.detach() / steps / len(layers) / len(batch)
    return total


@pytest.mark.parametrize(("steps", "constant"), [(1, False), (2, False), (3, True)])
def test_integrated_gradients_are_a_loop_over_layers_and_steps(steps: int, constant: bool):
    model, examples = native(), examples_of(3)
    units = tls.edges(model)
    values = tls.constants.mean(model, examples, units) if constant else None
    named = None if values is None else dict(zip(units.sites[-1].writers, values.tensors[-1], strict=True))
    with unchanged(model):
        found = tls.baselines.eap_ig_activations(model, examples, units, steps=steps, values=values)
    expected = integrated_by_hand(model, examples, units, steps, named)
    assert float((found.scores - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    assert found.backward_passes == 1 + 7 * (steps - 1) == found.forward_passes - (not constant)
    first = tls.score.gradient(model, examples, units, source="counterfactual").scores
    assert torch.allclose(found.scores, first, rtol=1e-10, atol=1e-12) == (steps == 1 and not constant)


def flow_by_hand(model: Any, batch: tls.Examples, units: tls.Units) -> Tensor:
    """One example, reader, position and writer at a time."""
    total, plain = torch.zeros(len(units), dtype=torch.float64), Plain(model)
    for tokens in batch.tokens.split(1):
        _, written, taken = plain.run(plain.embedded(tokens), {}, {})
        for reader, x in taken.items():
            edges = [(i, edge.partition("->")[0]) for i, edge in enumerate(units.names) if edge.endswith(f"->{reader}")]
            for pos in range(tokens.shape[1]):
                here = x[0, pos]
                near = [max(0.0, float(here.abs().sum() - (here - written[w][0, pos]).abs().sum())) for _, w in edges]
                for (i, _), one in zip(edges, near, strict=True):
                    total[i] += one / sum(near) / tokens.shape[1] / len(batch)
    return total


def test_information_flow_is_a_loop_over_positions():
    model, examples = native(), examples_of(3)
    units = tls.edges(model)
    with unchanged(model):
        found = tls.baselines.information_flow(model, examples, units)
    with torch.no_grad():
        expected = flow_by_hand(model, examples, units)
    assert float((found.scores - expected).abs().max()) < 1e-12
    assert (found.forward_passes, found.backward_passes) == (1, 0)
    last = tls.baselines.information_flow(model, examples, units.at(-1)).scores
    assert not torch.allclose(last, found.scores, atol=1e-3)


def test_readers_that_lost_edges_have_shares_of_their_own():
    """In a model with edges removed a head's readers take in different things."""
    model, examples = native(), examples_of(3)
    units = tls.edges(model)
    values = tls.constants.mean(model, examples, units)
    circuit = ~tls.Circuit.of(units, ["embed->L1H0.q", "L0H1->L1H0.q"])
    plain = tls.baselines.information_flow(model, examples, units).scores
    with tls.intervened(model, tls.Intervention(units, circuit.mask.double(), values)):
        found = tls.baselines.information_flow(model, examples, units).scores
    readers = {
        name for name, one, other in zip(units.names, plain, found, strict=True) if abs(float(one - other)) > 1e-6
    }
    assert {name.partition("->")[2] for name in readers if "->L1H" in name} == {"L1H0.q"}


METHODS = {
    "integrated": lambda *given, **more: tls.baselines.eap_ig_activations(*given, steps=2, **more),
    "flow": tls.baselines.information_flow,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", ["native", "Llama", "Pythia"])
def test_batches_and_padding_change_no_number(method: Any, name: str):
    model = native() if name == "native" else architectures.bridge(name)
    examples, units = examples_of(3), tls.edges(model)
    with NoCasts():
        found = method(model, examples, units)
        again = method(model, examples, units, batch_size=2)
        assert torch.allclose(again.scores, found.scores, rtol=1e-9, atol=1e-14)
        assert torch.allclose(again.stderr, found.stderr, rtol=1e-9, atol=1e-14)
        if name == "native":  # its positions are counted from the left
            return
        for side in ("left", "right"):
            wide = architectures.padded(examples, side)
            other = architectures.padded(replace(examples, tokens=examples.counterfactual_tokens), side).tokens
            wide = replace(wide, counterfactual_tokens=other)
            assert torch.allclose(method(model, wide, units).scores, found.scores, rtol=1e-8, atol=1e-13)


def test_integrated_gradients_where_norms_stand_behind_attention():
    model, examples = architectures.bridge("Gemma 2"), examples_of(3)
    units = tls.edges(model)
    with NoCasts():
        found = tls.baselines.eap_ig_activations(model, examples, units, steps=1).scores
        first = tls.score.gradient(model, examples, units, source="counterfactual").scores
    assert torch.allclose(found, first, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="model has norms behind attention"):
        tls.baselines.information_flow(model, examples, units)


def test_what_is_no_edge_or_no_step_is_refused():
    model, examples = native(), examples_of()
    units, nodes = tls.edges(model), tls.heads(model)
    for method in METHODS.values():
        with pytest.raises(ValueError, match="not all of them edges"):
            method(model, examples, nodes)
    with pytest.raises(ValueError, match="steps is 0"):
        tls.baselines.eap_ig_activations(model, examples, units, steps=0)
    with pytest.raises(ValueError, match=r"values are .*give a constant for each writer"):
        tls.baselines.eap_ig_activations(model, examples, units, values=tls.run_values(model, examples, units))
    with pytest.raises(ValueError, match="values are given, and source is 'shuffled': give one of them"):
        values = tls.constants.mean(model, examples, units)
        tls.baselines.eap_ig_activations(model, examples, units, values=values, source="shuffled")
    with unchecked(), pytest.raises(ValueError, match="source is 'corrupt'"):
        tls.baselines.eap_ig_activations(model, examples, units, source="corrupt")  # type: ignore[arg-type]


def test_one_step_is_the_gradient_where_a_first_token_is_left_alone():
    model, examples = fresh(), examples_of(3)
    units = tls.edges(model)
    values = tls.constants.zero(model, examples, units)
    plain = tls.baselines.eap_ig_activations(model, examples, units, steps=1, values=values).scores
    model.tokenizer = SimpleNamespace(bos_token_id=int(examples.tokens[0, 0]))
    for given in ({"values": values}, {"source": "counterfactual"}):
        found = tls.baselines.eap_ig_activations(model, examples, units, steps=1, **given).scores
        expected = tls.score.gradient(model, examples, units, **given).scores
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)
    found = tls.baselines.eap_ig_activations(model, examples, units, steps=1, values=values).scores
    assert not torch.allclose(found, plain, rtol=1e-3)  # one of the examples begins with that token


def test_constants_are_those_of_the_scorer_in_rounds():
    model, examples = native(), examples_of(3)
    units = tls.edges(model, "layer")
    values = tls.constants.zero(model, examples, units)
    scorer, settings = tls.baselines.eap_ig_activations, {"steps": 1, "values": values}
    found = tls.baselines.in_rounds(scorer, model, examples, units, rounds=1, progress=False, **settings)
    assert torch.equal(found.order, scorer(model, examples, units, **settings).order)
    assert found.forward_passes == 1


@pytest.mark.parametrize("readers", ["qkv", "layer"])
def test_scores_of_what_is_written_are_those_of_each_edges_writer(readers: Any):
    model, examples = native(), examples_of(3)
    units = tls.edges(model, readers)
    *_, written = tls.run_values(model, examples, units).tensors
    lengths, spread = written.norm(dim=3).mean((0, 1)), written.flatten(0, 1).var(0, correction=0).sum(1)
    of_edges = [units.sites[-1].writers.index(name.partition("->")[0]) for name in units.names]
    for scorer, expected in (
        (tls.baselines.activation_norm, lengths),
        (tls.score.variance, spread),
        (tls.score.scaled_variance, spread),
    ):
        found = scorer(model, examples, units)
        torch.testing.assert_close(found.scores, expected[of_edges])
        assert len(found.top(0.5)) == round(len(units) / 2) and found.stderr.shape == found.scores.shape
