"""Backward passes by other rules: gradients are those by hand, and what the model computes stays the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers import architectures, native
from helpers.backward_by_hand import gradients
from helpers.models import NoCasts, unchecked
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

import tl_sparsify as tls
from tl_sparsify.gradients.backward import Rules

RULES = {
    "true": Rules(),
    "gim": tls.backward.GIM,
    "relp": tls.backward.RELP,
    "norms": Rules(norms="frozen"),
    "softmax": Rules(softmax=3.0),
    "patterns": Rules(patterns="frozen"),
    "products": Rules(products="halved"),
    "activations": Rules(activations="proportional"),
    "activations, halved": Rules(activations="proportional", products="halved"),
    "without": Rules(without=(1,)),
}
MODELS = [*architectures.CONFIGS, *native.VARIANTS]


def model_of(name: str) -> Any:
    return architectures.bridge(name) if name in architectures.CONFIGS else native.native(name)


def side_of(name: str) -> str:
    """In float64 the others' masks are infinite in the float32 of their softmax, and padding on the left is NaN."""
    return "left" if name in ("GPT-2", "Pythia", "GPT-NeoX, sequential", *native.VARIANTS) else "right"


@cache
def gated() -> Any:
    """Gated MLPs, LayerNorm and no rotation, so that nothing is cast to float32."""
    config: dict[str, Any] = {
        "d_model": 12,
        "d_head": 4,
        "n_heads": 3,
        "n_layers": 2,
        "n_ctx": 8,
        "d_vocab": 17,
        "d_mlp": 10,
    }
    config |= {"act_fn": "silu", "gated_mlp": True, "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    return native.randomised(model, 0.5)


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def taken(model: Any, tokens: Tensor, wanted: Tensor, rules: Any, hooks: list[str]) -> dict[str, Tensor]:
    """The gradients at these hook points, from the embedding on, by autograd."""
    sites = tuple(tls.Site("residual", number, hook, 1) for number, hook in enumerate(hooks))
    with tls.backward.modified(model, rules), tls.recorded(model, tls.Units(sites), gradients=True) as recording:
        logits = model(tokens)
    found = torch.autograd.grad((logits * wanted).sum(), [recording.activations[hook] for hook in hooks])
    return dict(zip(hooks, found, strict=True))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gated", "GPT-2", "Llama"])
def test_gradients_are_those_by_hand(name: str, rules: str):
    model = gated() if name == "gated" else architectures.bridge(name)
    act = gelu if name == "GPT-2" else torch.nn.functional.silu
    tokens = architectures.batch(2, 5).tokens
    wanted = torch.randn(2, 5, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = gradients(model, tokens, wanted, RULES[rules], act)
    found = taken(model, tokens, wanted, RULES[rules], ["blocks.0.hook_resid_pre", *sorted(expected)])
    # Llama's norms compute in float32
    allowed = 1e-5 if name == "Llama" else 1e-10
    for hook, gradient in expected.items():
        torch.testing.assert_close(found[hook], gradient, rtol=allowed, atol=allowed * float(gradient.abs().max()))


@pytest.mark.parametrize("backward", ["gim", "relp"])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_is_the_same_bit_for_bit_and_nothing_is_left(name: str, backward: Any):
    model, examples = model_of(name), architectures.padded(architectures.batch(), side_of(name))
    tokens, mask = examples.tokens, examples.tokens != 0  # none of the prompts holds token 0

    def logits() -> Tensor:
        return model(tokens, attention_mask=mask.long())[mask]

    before = logits()
    hooks = {key: len(point.fwd_hooks) for key, point in model.hook_dict.items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with tls.backward.modified(model, backward):
        inside = logits()
        with torch.no_grad():
            assert torch.equal(logits(), before)
    assert torch.equal(inside, before)
    assert hooks == {key: len(point.fwd_hooks) for key, point in model.hook_dict.items()}
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert torch.equal(logits(), before)


def test_nothing_is_left_after_an_exception():
    model = architectures.bridge("Llama")
    hooks = {key: len(point.fwd_hooks) for key, point in model.hook_dict.items()}
    with pytest.raises(RuntimeError, match="on purpose"), tls.backward.modified(model, "relp"):
        raise RuntimeError("on purpose")
    assert hooks == {key: len(point.fwd_hooks) for key, point in model.hook_dict.items()}


def test_the_default_is_the_true_gradient_bit_for_bit():
    model, examples = architectures.bridge("GPT-2"), architectures.batch()
    units = tls.heads(model) + tls.neurons(model)
    for score in (tls.score.gradient, tls.score.risk, tls.score.integrated):
        plain = score(model, examples, units)
        for same in ("true", Rules()):
            again = score(model, examples, units, backward=same)
            assert torch.equal(plain.scores, again.scores)
            assert again.name == plain.name
        other = score(model, examples, units, backward="gim")
        assert other.name.endswith("gim")
        assert not torch.allclose(plain.scores, other.scores, rtol=1e-3)
    for same in ("true", Rules()):
        probing = tls.Probing(backward=same)
        found = tls.sparsify(model, examples, units, sizes=(0.5,), probing=probing, progress=False)
        plain = tls.sparsify(model, examples, units, sizes=(0.5,), progress=False)
        assert torch.equal(found.order, plain.order)


def test_a_rectifier_is_proportional_to_its_input():
    model = native.native("LNPre, ReLU, bidirectional")
    units, examples = tls.heads(model) + tls.neurons(model), architectures.batch()
    found = tls.score.gradient(model, examples, units, backward=Rules(activations="proportional"))
    expected = tls.score.gradient(model, examples, units)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backward", ["gim", "relp"])
@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama", "Gemma 3", "plain"])
def test_batches_and_padding_change_nothing(name: str, backward: Any):
    model, examples = model_of(name), architectures.batch(5)
    padded = architectures.padded(examples, side_of(name))
    with NoCasts():  # a softmax in float32 rounds a wider row otherwise, on some processors
        units = tls.heads(model) + tls.neurons(model)
        values = tls.constants.mean(model, examples, units)
        for score in (tls.score.gradient, tls.score.risk):
            expected = score(model, examples, units, values=values, backward=backward)
            one = score(model, examples, units, values=values, backward=backward, batch_size=1)
            torch.testing.assert_close(one.scores, expected.scores, rtol=1e-10, atol=1e-12)
            wide = score(model, padded, units, values=values, backward=backward)
            torch.testing.assert_close(wide.scores, expected.scores, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backward", ["true", "gim", "relp"])
def test_edges_of_a_unit_sum_to_its_own_effect(backward: Any):
    model, examples = architectures.bridge("GPT-2"), architectures.batch()
    units = tls.heads(model) + tls.neurons(model)
    found = tls.baselines.edge_attribution(model, examples, units, source="shuffled", backward=backward)
    expected = tls.score.gradient(model, examples, units, source="shuffled", backward=backward)
    torch.testing.assert_close(found.scores.sum(1), expected.scores, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backward", ["true", "gim", "relp"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2", "gated"])
def test_edges_as_units_sum_to_their_writer(name: str, backward: Any):
    model = gated() if name == "gated" else model_of(name)
    examples = architectures.batch()
    edges, heads = tls.edges(model), tls.heads(model)
    found = tls.score.gradient(model, examples, edges, backward=backward).scores
    expected = tls.score.gradient(model, examples, heads, backward=backward).scores
    allowed = 1e-9 if name in ("GPT-2", "gated") else 1e-4  # norms of the others compute in float32
    for head, score in zip(heads.names, expected, strict=True):
        mine = torch.tensor([edge.startswith(f"{head}->") for edge in edges.names])
        torch.testing.assert_close(found[mine].sum(), score, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("backward", ["gim", "relp"])
def test_a_search_takes_the_rules_and_measures_true_risk(backward: Any):
    model, examples = architectures.bridge("GPT-2"), architectures.batch(8)
    units = tls.heads(model)
    probing = tls.Probing(backward=backward)
    path = tls.sparsify(model, examples, units, sizes=(0.5,), probing=probing, progress=False)
    measured = tls.risk(model, path.at(0.5), examples)
    assert path.rounds[-1].measured.mean == pytest.approx(measured.mean, rel=1e-9)


def test_what_is_unknown_or_missing_is_refused_by_name():
    model, examples = architectures.bridge("GPT-2"), architectures.batch()
    units = tls.heads(model)
    with unchecked(), pytest.raises(ValueError, match="backward is 'grim'; it is true, gim, relp"):
        tls.score.gradient(model, examples, units, backward="grim")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(ValueError, match="backward is 'grim'"):
        tls.Probing(backward="grim")  # type: ignore[arg-type]
    with unchecked(), pytest.raises(ValueError, match="norms is 'cold'; it is true or frozen"):
        Rules(norms="cold")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"softmax is 0\.0"):
        Rules(softmax=0.0)
    with pytest.raises(ValueError, match="the model has blocks 0 to 2"):
        tls.score.gradient(model, examples, units, backward=Rules(without=(3,)))
    before = tls.Units((tls.Site("neuron", 1, "blocks.1.mlp.hook_pre", 20),))
    with pytest.raises(ValueError, match="no units can lie at hook_pre"):
        tls.score.risk(model, examples, before, backward="relp")


@pytest.mark.parametrize("kept", (1.0, 0.5))
def test_what_a_block_without_gradient_reads_has_none_however_much_of_it_is_kept(kept: float):
    model, examples = native.native(), architectures.batch()
    units = tls.edges(model)
    values = tls.constants.mean(model, examples, units)
    keep = torch.full((len(units),), kept, dtype=torch.float64).requires_grad_()
    with tls.backward.modified(model, Rules(without=(1,))), NoCasts():
        with tls.intervened(model, tls.Intervention(units, keep, values)):
            (slope,) = torch.autograd.grad(model(examples.tokens)[:, -1, 3].sum(), keep)
    into = torch.tensor(["->L1" in name for name in units.names])
    assert float(slope[into].abs().max()) == 0 and float(slope[~into].abs().max()) > 1e-3
