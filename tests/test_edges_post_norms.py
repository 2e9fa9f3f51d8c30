"""Edges of models with norms behind attention and MLPs: against a forward pass written out reader by reader, in which
each reader hears the norm of what it keeps of a layer's heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import NoCasts, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.metrics import log_odds

NAMES = ("Gemma 2", "Gemma 3", "OLMo 2")
every_name = pytest.mark.parametrize("name", NAMES)
OPTIONS: dict[str, dict[str, Any]] = {"Gemma 2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}}


def bridge(name: str, built: dict[str, Any] = {}) -> Any:  # noqa: B006
    if name not in built:
        built[name] = architectures.fresh(name, **OPTIONS.get(name, {}))
    return built[name]


def constants_of(model: Any, units: tls.Units, seed: int = 0) -> tls.Values:
    """Random constants, the same for a writer wherever it is read."""
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


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin


class ByHand:
    """The forward pass in plain torch; ``share`` says how much of a writer a reader hears: 1 all, 0 the constant."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens, self.config = model, tokens, model.original_model.config
        with NoCasts(), torch.no_grad():
            _, self.cache = model.run_with_cache(tokens)
        self.gemma = model.cfg.architecture.startswith("Gemma")

    def norm(self, module: Any, x: Tensor) -> Tensor:
        """The root mean square norm; none where there is none."""
        if module is None:
            return x
        weight = module.original_component.weight
        weight = 1 + weight if self.gemma else weight
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight

    def window(self, layer: int) -> Tensor:
        """Which keys are out of each query's sight."""
        pos = self.tokens.shape[1]
        ago = torch.arange(pos)[:, None] - torch.arange(pos)
        types = getattr(self.config, "layer_types", None)
        near = types is not None and types[layer] == "sliding_attention"
        return (ago < 0) | (ago >= self.config.sliding_window) if near else ago < 0

    def run(self, share: dict[str, Any], constants: dict[str, Tensor]) -> Tensor:
        model, config = self.model, self.config
        written = {"embed": self.cache["blocks.0.hook_in"]}
        many = model.cfg.n_heads // len(model.blocks[0].attn.W_K)

        def heard(writer: str, reader: str) -> Tensor:
            constant = constants[writer]
            return constant + share[f"{writer}->{reader}"] * (written[writer] - constant)

        def read(reader: str) -> Tensor:
            parts = [heard(w, reader) for w in written if "H" not in w]
            for layer, block in enumerate(model.blocks):
                heads = [heard(w, reader) for w in written if w.startswith(f"L{layer}H")]
                parts += [self.norm(block.ln1_post, torch.stack(heads).sum(0))] if heads else []
            return torch.stack(parts).sum(0)

        def normed(norm: Any, heads: list[Tensor]) -> list[Tensor]:
            """Norms of queries or keys: one for each head, or one over all of them."""
            if norm is None:
                return heads
            if self.gemma:
                return [self.norm(norm, x) for x in heads]
            return list(self.norm(norm, torch.cat(heads, -1)).chunk(len(heads), -1))

        for layer, block in enumerate(model.blocks):
            attn, cos, sin = block.attn, *(self.cache[f"blocks.{layer}.attn.hook_{part}"] for part in ("cos", "sin"))
            ln1, ln2 = (getattr(block, part, None) for part in ("ln1", "ln2"))
            heads, groups = range(model.cfg.n_heads), range(model.cfg.n_heads // many)
            q = [self.norm(ln1, read(f"L{layer}H{h}.q")) @ attn.W_Q[h] for h in heads]
            k = [self.norm(ln1, read(f"L{layer}G{g}.k")) @ attn.W_K[g] for g in groups]
            v = [self.norm(ln1, read(f"L{layer}G{g}.v")) @ attn.W_V[g] for g in groups]
            q, k = (normed(getattr(attn, f"{part}_norm", None), x) for part, x in (("q", q), ("k", k)))
            new = {}
            for h in heads:
                scores = rotated(q[h], cos, sin) @ rotated(k[h // many], cos, sin).mT
                scores = scores * attn.original_component.scaling
                cap = getattr(config, "attn_logit_softcapping", None)
                scores = scores if cap is None else (scores / cap).tanh() * cap
                pattern = scores.masked_fill(self.window(layer), -torch.inf).softmax(-1)
                new[f"L{layer}H{h}"] = pattern @ v[h // many] @ attn.W_O[h]
            written |= new
            x, mlp = self.norm(ln2, read(f"L{layer}MLP")), block.mlp.original_component
            out = mlp.down_proj.original_component(
                mlp.act_fn(mlp.gate_proj.original_component(x)) * mlp.up_proj.original_component(x)
            )
            written[f"L{layer}MLP"] = self.norm(block.ln2_post, out)
        found = self.norm(model.ln_final, read("logits")) @ model.unembed.W_U
        cap = getattr(config, "final_logit_softcapping", None)
        return found if cap is None else (found / cap).tanh() * cap


def shares_of(units: tls.Units, keep: Tensor) -> dict[str, Any]:
    return dict(zip(units.names, keep.unbind(), strict=True))


def named(values: tls.Values) -> dict[str, Tensor]:
    return dict(zip(values.units.sites[-1].writers, values.tensors[-1], strict=True))


@every_name
def test_the_forward_pass_by_hand_is_the_model(name: str):
    model, tokens = bridge(name), architectures.batch(length=9).tokens
    units = tls.edges(model)
    with torch.no_grad(), NoCasts():
        found = ByHand(model, tokens).run(shares_of(units, torch.ones(len(units))), named(constants_of(model, units)))
    assert float((found - logits(model, tokens)).abs().max()) < 1e-10


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.5, 0.95]), st.sampled_from(NAMES))
def test_a_reader_hears_the_norm_of_what_it_keeps(seed: int, share: float, name: str):
    model, tokens = bridge(name), architectures.batch(n=2, length=9).tokens
    units = tls.edges(model)
    values, circuit = constants_of(model, units, seed), random_circuit(units, seed, share)
    with torch.no_grad(), NoCasts():
        expected = ByHand(model, tokens).run(shares_of(units, circuit.mask.double()), named(values))
    found = logits(model, tokens, ablation(circuit, values))
    assert float((found - expected).abs().max()) < 1e-10
    assert float((found - logits(model, tokens)).abs().max()) > 1e-3


@every_name
def test_two_interventions_share_the_norm_of_what_both_keep(name: str):
    """The norm of a sum is no sum: heads that two contexts remove for one reader leave one sum together."""
    model, tokens = bridge(name), architectures.batch(n=2).tokens
    units = tls.edges(model)
    values = constants_of(model, units)
    for first, second in [
        (["L0H1->L2H3.q"], ["L0H4->L2H3.q"]),
        (["L0H1->L2MLP", "L1H2->L2MLP"], ["L0H0->L2MLP", "embed->L2MLP"]),
        (["L2H1->logits", "L1MLP->logits"], ["L2H5->logits"]),
    ]:
        one, other, both = (~tls.Circuit.of(units, edges) for edges in (first, second, first + second))
        with torch.no_grad(), NoCasts(), tls.intervened(model, ablation(one, values)):
            nested = logits(model, tokens, ablation(other, values))
        together = logits(model, tokens, ablation(one, values), ablation(other, values))
        expected = logits(model, tokens, ablation(both, values))
        assert torch.allclose(nested, expected, rtol=0, atol=1e-11)
        assert torch.allclose(together, expected, rtol=0, atol=1e-11)
        assert not torch.allclose(expected, logits(model, tokens, ablation(one, values)), rtol=0, atol=1e-6)


@every_name
def test_derivatives_with_respect_to_keep_are_those_by_hand(name: str):
    model, examples = bridge(name), architectures.batch(n=2)
    units = tls.edges(model)
    values = constants_of(model, units)
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    hand = ByHand(model, examples.tokens)

    def value(rows: Tensor) -> Tensor:
        return log_odds(rows[:, -1][:, examples.choices], examples).sum()

    with NoCasts(), torch.enable_grad():
        with unchanged(model), tls.intervened(model, tls.Intervention(units, keep, values)):
            [found] = torch.autograd.grad(value(model(examples.tokens)), keep)
        [expected] = torch.autograd.grad(value(hand.run(shares_of(units, keep), named(values))), keep)
    assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())


@every_name
def test_attribution_is_a_difference_of_small_steps(name: str):
    """At the original model: the probes' derivatives, through every reader's own copy of each layer's sum."""
    model, examples = bridge(name), architectures.batch(n=2)
    units = tls.edges(model)
    values = constants_of(model, units)
    with NoCasts():
        found = tls.score.gradient(model, examples, units, values=values).scores
    for number in range(0, len(units), 19):
        ends = []
        for step in (1e-5, -1e-5):
            keep = torch.ones(len(units), dtype=torch.float64)
            keep[number] += step
            rows = logits(model, examples.tokens, tls.Intervention(units, keep, values))[:, -1][:, examples.choices]
            ends.append(float(log_odds(rows, examples).mean()))
        assert abs((ends[0] - ends[1]) / 2e-5 - float(found[number])) < 1e-6


@pytest.mark.parametrize(("name", "side"), list(zip(NAMES, ("left", "right", "left"), strict=True)))
def test_padding_and_batches_change_no_number(name: str, side: str):
    model, examples = bridge(name), architectures.batch(n=5)
    units = tls.edges(model)
    given_: dict[str, Any] = {"probes": 2, "seed": 3}
    with NoCasts():
        values = tls.constants.mean(model, examples, units)
        plain = tls.score.risk(model, examples, units, values=values, **given_).scores
        parts = tls.score.risk(model, examples, units, values=values, batch_size=2, **given_).scores
        assert torch.allclose(parts, plain, rtol=1e-8, atol=1e-18)
        wide = architectures.padded(examples, side)
        assert torch.allclose(
            tls.score.risk(model, wide, units, values=values, **given_).scores, plain, rtol=1e-8, atol=1e-18
        )
        reduction = tls.constants.reduced(model, random_circuit(units, 1, 0.8), values)
        risks = [tls.risk(model, reduction, part).mean for part in (examples, wide)]
    assert risks[0] == pytest.approx(risks[1], rel=1e-9)


@pytest.mark.parametrize("name", NAMES[:1])
def test_a_search_finds_edges(name: str):
    model, examples = bridge(name), architectures.batch(n=8)
    units = tls.edges(model, "layer")
    with unchanged(model), NoCasts():
        path = tls.sparsify(model, examples, units, rounds=4, smallest=0.2, progress=False)
        found = tls.risk(model, path.at(0.2), examples).mean
        chance = [
            tls.risk(model, path.at(0.2).with_circuit(random_circuit(units, seed, 0.2)), examples).mean
            for seed in range(5)
        ]
        paths = tls.patch_paths(
            model, examples, ["L0H1->L2H3.q", "L0H1->L1H2.q->logits"], source="shuffled", progress=False
        )
    assert found < min(chance)
    assert bool((paths.moments.mean.abs() > 0).all())


def test_norms_behind_attention_of_other_architectures_are_refused_by_name():
    model = architectures.fresh("Gemma 2")
    model.cfg.architecture = "Gemma3nForConditionalGeneration"
    with pytest.raises(ValueError, match=r"norm behind its attention or MLP \(ln1_post\).*Gemma3nForConditional"):
        tls.edges(model)
