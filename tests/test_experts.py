"""Experts of a mixture as units: what each adds to its layer, against the layer computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.mixtures import mixture
from helpers.models import NoCasts, bridge, unchanged
from torch import Tensor

import tl_sparsify as tls

NAMES = ("Mixtral", "Qwen2Moe", "Olmoe", "GptOss")
every_mixture = pytest.mark.parametrize("name", NAMES)


def data(n: int = 6) -> tls.Examples:
    tokens = torch.randint(2, 17, (n, 5), generator=torch.Generator().manual_seed(0))
    return tls.Examples(tokens, tokens.where(torch.arange(5) == 4, -100))


def inside(module: Any) -> Any:
    return inside(module.original_component) if hasattr(module, "original_component") else module


def by_hand(model: Any, examples: tls.Examples, layer: int) -> Tensor:
    """``[batch, pos, experts, d_model]``: the layer's experts with the weights of all others at zero."""
    experts, given = inside(inside(model.blocks[layer].mlp).experts), []
    with torch.no_grad():
        handle = experts.register_forward_hook(lambda module, inputs, output: given.append(inputs))
        model(examples.tokens)
        handle.remove()
        tokens, chosen, weights = given[0]
        parts = [experts(tokens, chosen, weights * (chosen == number)) for number in range(4)]
    return torch.stack(parts, 1).reshape(*examples.tokens.shape, 4, -1)


@every_mixture
def test_the_value_of_an_expert_is_what_it_adds(name: str):
    model, examples = mixture(name), data()
    units = tls.experts(model)
    assert units.names[:5] == ("L0E0", "L0E1", "L0E2", "L0E3", "L1E0") and len(units) == 12
    with unchanged(model), NoCasts():
        values = tls.run_values(model, examples, units)
        for layer in range(3):
            expected = by_hand(model, examples, layer)
            assert float((values.tensors[layer] - expected).abs().max()) < 1e-10
            assert 0 < float((expected == 0).all(-1).double().mean()) < 1  # a router that chooses


@every_mixture
def test_an_ablation_leaves_out_what_the_expert_adds(name: str):
    """Against the weights: an expert whose output projection is zero adds nothing."""
    model, examples = mixture(name), data()
    units = tls.experts(model)
    removed = tls.Circuit.full(units) - tls.Circuit.of(units, ["L1E2", "L2E0"])
    zero = tls.constants.zero(model, examples, units)
    with torch.no_grad(), NoCasts():
        with unchanged(model), tls.intervened(model, tls.ablate(tls.Reduction(removed, zero))):
            found = model(examples.tokens)
        changed = []
        for layer, number in ((1, 2), (2, 0)):
            experts = inside(inside(model.blocks[layer].mlp).experts)
            for part in (experts.down_proj, getattr(experts, "down_proj_bias", None)):
                if part is not None:
                    changed.append((part, part.clone()))
                    part[number] = 0
        try:
            expected = model(examples.tokens)
        finally:
            for part, before in changed:
                part.copy_(before)
        assert float((found - expected).abs().max()) < 1e-10
        assert float((found - model(examples.tokens)).abs().max()) > 1e-3


def test_interventions_nest_and_the_inner_one_sees_what_the_outer_left():
    model, examples = mixture("Mixtral"), data()
    units = tls.experts(model)
    one, other = tls.constants.zero(model, examples, units), tls.constants.mean(model, examples, units)
    first = tls.ablate(tls.Reduction(~tls.Circuit.of(units, ["L1E2", "L1E3"]), one))
    second = tls.ablate(tls.Reduction(~tls.Circuit.of(units, ["L1E3"]), other))
    with torch.no_grad():
        with tls.intervened(model, first), tls.intervened(model, second), tls.recorded(model, units) as recording:
            nested = model(examples.tokens)
        with tls.intervened(model, first, second):
            together = model(examples.tokens)
    torch.testing.assert_close(nested, together, atol=1e-12, rtol=0)
    values = recording.read()[1]
    assert float(values[:, :, 2].abs().max()) == 0
    torch.testing.assert_close(values[:, :, 3], other.tensors[1][3].expand_as(values[:, :, 3]))


@every_mixture
def test_every_score_and_the_search_take_experts(name: str):
    """The derivative against differences, the search against removing one at a time; with heads beside them."""
    model, examples = mixture(name), data()
    units = tls.heads(model) + tls.experts(model)
    means = tls.constants.mean(model, examples, units)
    with unchanged(model):
        risk, exact = tls.score.risk(model, examples, units), tls.score.exact(model, examples, units, progress=False)
        path = tls.sparsify(model, examples, units, rounds=3, progress=False)
    assert bool((risk.scores > 0).any()) and bool((exact.scores > 0).any())
    assert [len(step.reduction.circuit) for step in path.rounds][-1] < len(units)

    def metric(logits: Tensor, batch: tls.Examples) -> Tensor:
        return logits[:, 3]

    with NoCasts():
        gradient = tls.score.gradient(model, examples, units, values=means, metric=metric)
    number, step = units.index("L2E1"), 1e-4
    ends = []
    for keep in (1 - step, 1 + step):
        weight = torch.ones(len(units), dtype=torch.float64).index_fill(0, torch.tensor([number]), keep)
        with torch.no_grad(), NoCasts(), tls.intervened(model, tls.Intervention(units, weight, means)):
            ends.append(float(model(examples.tokens)[:, 4, 3].mean()))
    assert float(gradient.scores[number]) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-8)


def test_experts_are_named_counted_and_saved(tmp_path: Any):
    model = mixture("Mixtral")
    units = tls.experts(model)
    assert repr(units) == "Units(12: 12 experts)" and units["L2E3"].index == 3
    reduction = tls.Reduction(tls.Circuit.of(units, ["L0E1"]), tls.constants.zero(model, data(), units))
    reduction.save(tmp_path / "one.reduction")
    assert tls.Reduction.load(tmp_path / "one.reduction") == reduction
    with pytest.raises(ValueError, match="fold"):
        tls.fold(model, tls.constants.reduced(model, reduction.circuit, reduction.values))


def test_a_model_without_a_mixture_has_no_experts():
    with pytest.raises(ValueError, match="has no mixture of experts: it has no expert units"):
        tls.experts(bridge())
