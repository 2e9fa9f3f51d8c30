"""Baselines: the signature of the scores, a control that knows nothing of the model, patching against loops of the
test's own. Edges, masks and rounds have files of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import batch as prompts
from helpers.architectures import bridge as architecture
from helpers.architectures import padded as padded_prompts
from helpers.kinds import N, close, data, padded
from helpers.models import (
    NoCasts,
    bridge,
    examples,
    fresh,
    inputs,
    linear,
    reduction_of,
    unchanged,
    unchecked,
    units_of,
)
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_sparsify import Examples, Site, Units, baselines, constants, score
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.metrics import log_odds, log_probability
from tl_sparsify.core.units import attentions, heads, mlps, neurons, residuals
from tl_sparsify.search.scores import Scores

UNITS = Units((Site("neuron", 0, "hook_neurons", 60), Site("head", 1, "hook_heads", 40)))
EXAMPLES = Examples(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long))
OTHER = {
    "in_rounds",
    "edge_attribution",
    "acdc",
    "eap_ig_activations",
    "information_flow",
}  # what takes a scorer, and what scores edges
METHODS = [getattr(baselines, name) for name in baselines.__all__ if name.islower() and name not in OTHER]


class Unusable(HookedRootModule):
    """A model that counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.hook_neurons, self.hook_heads = HookPoint(), HookPoint()
        self.runs = 0
        self.setup()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return self.weight * tokens


def random(seed: int = 0) -> Scores:
    return baselines.random(Unusable(), EXAMPLES, UNITS, seed=seed)


def everything(model: Any) -> Units:
    return heads(model) + neurons(model) + mlps(model) + attentions(model)


@pytest.mark.parametrize("method", [*METHODS, score.risk, score.gradient], ids=lambda f: f.__name__)
def test_methods_have_one_signature(method: Callable[..., Any]):
    parameters = inspect.signature(method).parameters
    assert list(parameters)[:3] == ["model", "examples", "units"]
    further = [parameter for name, parameter in parameters.items() if name not in ("model", "examples", "units")]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in further)
    assert "seed" in parameters
    assert inspect.getdoc(method)


@pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__)
def test_methods_score_every_unit_with_their_defaults(method: Callable[..., Scores]):
    model, batch = bridge(), examples(8)
    units = units_of(model)
    trained = (baselines.hard_concrete, baselines.top_k_gate, baselines.information_bottleneck)
    quick = {"steps": 3} if method in trained else {}
    found = method(model, batch, units, seed=1, **quick)
    assert found.units == units and found.scores.shape == found.stderr.shape == (len(units),)
    assert bool(found.scores.isfinite().all()) and len(found.scores.unique()) > 1
    assert found.name and found.measured_in
    assert f"``{method.__name__}``" in (baselines.__doc__ or "")


def test_random_is_a_score_for_every_unit():
    found = random()
    assert found.units == UNITS and found.scores.shape == (100,)
    assert bool(((found.scores >= 0) & (found.scores < 1)).all())
    assert len(set(found.scores.tolist())) == 100
    assert bool(found.stderr.isnan().all())
    assert (found.name, found.forward_passes, found.backward_passes) == ("random", 0, 0)


def test_random_is_a_function_of_the_seed():
    assert torch.equal(random(3).scores, random(3).scores)
    assert not torch.equal(random(3).order, random(4).order)


def test_random_uses_neither_the_model_nor_the_global_random_state():
    model, state = Unusable(), torch.get_rng_state()
    baselines.random(model, EXAMPLES, UNITS)
    assert model.runs == 0 and torch.equal(torch.get_rng_state(), state)


def test_random_prefers_no_unit():
    chosen = torch.stack([random(seed).top(0.2).mask for seed in range(500)])
    assert bool((chosen.sum(1) == 20).all())
    often = chosen.double().mean(0)
    assert bool(((often - 0.2).abs() < 5 * (0.2 * 0.8 / 500) ** 0.5).all())
    first, second = UNITS.split(often)
    assert float(first.mean()) == pytest.approx(float(second.mean()), abs=0.02)


def test_the_table_of_random_scores_names_every_unit():
    frame = random().to_frame()
    assert list(frame.columns) == ["unit", "kind", "layer", "index", "score", "stderr"]
    assert tuple(frame.unit) == UNITS.names and frame.score.tolist() == random().scores.tolist()


# Norms and exact effects


def test_the_activation_norm_is_a_mean_of_lengths():
    model, batch = bridge(), padded()
    units = everything(model)
    assert batch.attention_mask is not None
    with torch.no_grad(), recorded(model, units) as recording:
        model(batch.tokens, attention_mask=batch.attention_mask.long())
    lengths = torch.cat([v.square().sum(-1).sqrt() for v in recording.read()], 2)
    each = torch.stack([lengths[i][batch.attention_mask[i]].mean(0) for i in range(N)])
    found = [baselines.activation_norm(model, batch, units, batch_size=size) for size in (None, 1, 4)]
    for one in found:
        assert close(one.scores, each.mean(0)) and close(one.stderr, each.std(0) / N**0.5)
    assert (found[0].forward_passes, found[0].backward_passes) == (1, 0)


@pytest.mark.parametrize("metric", [None, log_odds])
def test_exact_effects_of_zero_and_of_means(metric: Any):
    model, batch = bridge(), data()
    units = units_of(model)
    zero = score.exact(model, batch, units, values=constants.zero(model, batch, units), metric=metric)
    mean = score.exact(model, batch, units, metric=metric)
    found = (
        baselines.exact_zero(model, batch, units, metric=metric),
        baselines.exact_mean(model, batch, units, metric=metric),
    )
    assert torch.equal(found[0].scores, zero.scores) and torch.equal(found[1].scores, mean.scores)
    assert [one.name for one in found] == ["exact, zero", "exact, mean"]
    assert [one.forward_passes for one in found] == [len(units) + 1, len(units) + 2]
    values = reduction_of(model).values
    given = baselines.exact_mean(model, batch, units, values=values)
    assert torch.equal(given.scores, score.exact(model, batch, units, values=values).scores)


# Activation patching


KINDS: dict[str, Callable[[Any], Units]] = {
    "heads and neurons": units_of,
    "whole layers": lambda model: mlps(model) + attentions(model),
    "mixed": lambda model: neurons(model) + mlps(model) + heads(model),
    "at positions": lambda model: heads(model).at((1, 3)) + neurons(model).at(slice(2, None)) + heads(model).at(0),
    "at one position per example": lambda model: neurons(model).at(torch.tensor([4, 0, 3, 1, 2, 4])),
}


@pytest.mark.parametrize("source", ["counterfactual", "shuffled"])
@pytest.mark.parametrize("kind", KINDS)
def test_noising_is_the_exact_effect(kind: str, source: Any):
    model, batch = bridge(), data()
    units = KINDS[kind](model)
    with unchanged(model):
        found = baselines.activation_patching(model, batch, units, source=source, seed=2)
    exact = score.exact(model, batch, units, source=source, metric=log_odds, seed=2)
    assert close(found.scores, exact.scores, 1e-12) and close(found.stderr, exact.stderr, 1e-12)
    assert (found.forward_passes, found.backward_passes) == (exact.forward_passes, 0) == (len(units) + 2, 0)
    assert (found.name, found.measured_in) == ("activation patching (noising)", "units of the metric")


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "Llama", "Gemma 2"])
def test_noising_is_the_exact_effect_in_other_architectures(name: str):
    model = architecture(name)
    batch = padded_prompts(prompts(4).with_partners(torch.tensor([1, 2, 3, 0])), "left")
    given: dict[str, Any] = {"source": "shuffled", "metric": log_probability}
    with NoCasts():
        found = baselines.activation_patching(model, batch, heads(model) + mlps(model), **given)
        exact = score.exact(model, batch, heads(model) + mlps(model), **given)
    assert close(found.scores, exact.scores)


def restored(model: Any, batch: Examples, units: Units, metric: Any) -> Tensor:
    """How much of the metric comes back on the counterfactual run with a unit's value from the clean one: one example
    and one unit at a time, with hooks of the test's own."""
    effects = torch.zeros(len(batch), len(units), dtype=torch.float64)
    assert batch.counterfactual_tokens is not None
    hooks = [site.hook for site in units.sites for _ in range(site.size)]
    for i in range(len(batch)):
        one = batch[i : i + 1]
        rows = one.labels[0] != -100
        with torch.no_grad():
            _, clean = model.run_with_cache(one.tokens)
            before = metric(model(batch.counterfactual_tokens[i : i + 1])[0, rows], one).mean()
            for u, (unit, name) in enumerate(zip(units, hooks, strict=True)):

                def put(activation: Tensor, hook: Any, unit: Any = unit, new: Tensor = clean[name]) -> Tensor:
                    changed = activation.clone()
                    there = {"head": (..., unit.index, slice(None)), "neuron": (..., unit.index)}.get(
                        unit.site.kind, ...
                    )
                    changed[there] = new[there]
                    return changed

                with model.hooks(fwd_hooks=[(name, put)]):
                    logits = model(batch.counterfactual_tokens[i : i + 1])
                effects[i, u] = metric(logits[0, rows], one).mean() - before
    return effects


@pytest.mark.parametrize("metric", [log_odds, log_probability])
def test_denoising_is_what_a_loop_restores(metric: Any):
    model, batch = bridge(), data()
    units = everything(model)
    found = baselines.activation_patching(model, batch, units, direction="denoising", metric=metric)
    effects = restored(model, batch, units, metric)
    assert close(found.scores, effects.mean(0)) and close(found.stderr, effects.std(0) / N**0.5)
    assert found.name == "activation patching (denoising)"


def test_answers_are_read_among_the_choices():
    model, batch = bridge(), data(choices=(1, 4, 6))
    found = baselines.activation_patching(model, batch, units_of(model))
    exact = score.exact(model, batch, units_of(model), source="counterfactual", metric=log_odds)
    assert close(found.scores, exact.scores, 1e-12)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("source", ["counterfactual", "shuffled"])
def test_batches_do_not_matter_to_patching(source: Any, direction: Any):
    model, batch = bridge(), data(9)
    found = [
        baselines.activation_patching(
            model, batch, units_of(model), source=source, direction=direction, batch_size=size, seed=1
        )
        for size in (1, 4, None)
    ]
    assert all(close(one.scores, found[0].scores) and close(one.stderr, found[0].stderr) for one in found)


def test_patching_makes_one_pass_for_each_unit(capfd: pytest.CaptureFixture[str]):
    model, batch, rows = fresh(), data(), []
    model.add_hook("blocks.1.hook_resid_post", lambda tensor, hook: rows.append(len(tensor)))
    found = baselines.activation_patching(model, batch, units_of(model), batch_size=4)
    assert sum(rows) == found.forward_passes * N == (len(units_of(model)) + 2) * N
    assert capfd.readouterr() == ("", "")  # TransformerLens's own bars are for terminals


def test_without_counterfactuals_partners_are_shuffled():
    model, batch = bridge(), data()
    alone = replace(batch, counterfactual_tokens=None, counterfactual_labels=None)
    for method in (baselines.activation_patching, baselines.attribution_patching):
        found = method(model, alone, units_of(model), seed=4)
        assert torch.equal(found.scores, method(model, batch, units_of(model), source="shuffled", seed=4).scores)
        assert not close(found.scores, method(model, batch, units_of(model)).scores, 0.1)
        with pytest.raises(ValueError, match="no counterfactual_tokens"):
            method(model, alone, units_of(model), source="counterfactual")


def test_attribution_patching_is_the_gradient_at_the_clean_run():
    model, batch = bridge(), data()
    found = baselines.attribution_patching(model, batch, units_of(model))
    gradient = score.gradient(model, batch, units_of(model), source="counterfactual")
    assert torch.equal(found.scores, gradient.scores) and torch.equal(found.stderr, gradient.stderr)
    assert (found.name, found.forward_passes, found.backward_passes) == ("attribution patching", 2, 1)


def test_in_an_ablated_model_removed_units_have_no_effect():
    model, batch = bridge(), data()
    reduction = reduction_of(model)
    with unchanged(model), intervened(model, ablate(reduction)):
        found = baselines.activation_patching(model, batch, units_of(model))
        exact = score.exact(model, batch, units_of(model), source="counterfactual", metric=log_odds)
    assert close(found.scores, exact.scores, 1e-12)
    assert bool((found.scores[~reduction.circuit.mask] == 0).all()) and float(found.scores.abs().max()) > 0


def test_what_cannot_be_patched_is_refused_by_name():
    model, batch = bridge(), data()
    with pytest.raises(ValueError, match=r"residual units of blocks\.0\.hook_resid_post are not patched"):
        baselines.activation_patching(model, batch, residuals(model))
    network = linear()
    with pytest.raises(ValueError, match="neuron units of hook_hidden are not patched"):
        baselines.activation_patching(network, inputs(), network.units)
    stranger = Units((Site("neuron", 0, "blocks.0.mlp.hook_post", 6),))
    with pytest.raises(ValueError, match="TwoLayers is no model of TransformerLens's"):
        baselines.activation_patching(network, inputs(), stranger)
    for settings, message in [
        ({"direction": "back"}, "direction is 'back'; it is noising or denoising"),
        ({"source": "corrupt"}, "source is 'corrupt'; it is counterfactual or shuffled"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metric": lambda logits, batch: logits.sum()}, r"metric gave shape \(\) for"),
    ]:
        with unchanged(model), pytest.raises(ValueError, match=message), unchecked():
            baselines.activation_patching(model, batch, units_of(model), **settings)
    with pytest.raises(ValueError, match="training mode"):
        baselines.activation_patching(fresh().train(), batch, units_of(model))
