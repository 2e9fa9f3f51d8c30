"""Constants that are best for each unit alone: their closed forms by hand, and how the published one collapses."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import TwoLayers, bridge, examples, fisher, fresh, inputs, seeded, unchanged, units_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import constants, evaluate, heads, load_task, neurons, score
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples

SEEDS = st.integers(0, 2**31)


def network(seed: int, features: int = 4, units: int = 6, choices: int = 3) -> TwoLayers:
    g = seeded(seed)
    w_in, w_out = torch.randn(features, units, generator=g), torch.randn(units, choices, generator=g)
    return TwoLayers(w_in.double(), w_out.double(), torch.randn(units, generator=g).double(), relu=True)


def parts(model: TwoLayers, data: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """By hand, for every example and unit: its value, the curvature ``w' F w`` and the gradient of the
    cross-entropy."""
    with torch.no_grad():
        v = (data.tokens @ model.w_in + model.b_in).relu()
        z = v @ model.w_out
        h = torch.einsum("ua,nab,ub->nu", model.w_out, fisher(z), model.w_out)
        g = (z.softmax(1) - torch.nn.functional.one_hot(data.labels[:, 0], z.shape[1])) @ model.w_out.T
    return v, h, g


@given(SEEDS)
@settings(max_examples=10)
def test_the_curvature_weighted_mean_is_the_closed_form(seed: int):
    model, data = network(seed), inputs(30, seed=seed)
    v, h, _ = parts(model, data)
    found = constants.curvature_weighted(model, data, model.units).tensors[0][:, 0]
    used = h.sum(0) > 1e-6
    torch.testing.assert_close(found[used], ((h * v).sum(0) / h.sum(0))[used], rtol=1e-4, atol=1e-5)


@given(SEEDS, st.floats(-1, 1))
@settings(max_examples=10)
def test_no_other_constant_has_a_lower_risk_for_a_unit_alone(seed: int, change: float):
    model, data = network(seed), inputs(30, seed=seed)
    best = constants.curvature_weighted(model, data, model.units)
    other = Values(best.units, (best.tensors[0] + change,))
    at_best = score.risk(model, data, model.units, values=best).scores
    at_other = score.risk(model, data, model.units, values=other).scores
    assert (at_best <= at_other + 1e-9).all()


def test_where_the_curvature_is_the_same_everywhere_it_is_the_mean():
    model, data = network(0), inputs(30)
    with torch.no_grad():
        model.w_out.mul_(1e-6)  # the answer hardly depends on the input: the same curvature for all examples
    mean = constants.mean(model, data, model.units).tensors[0]
    torch.testing.assert_close(
        constants.curvature_weighted(model, data, model.units).tensors[0], mean, rtol=1e-4, atol=1e-6
    )


@given(SEEDS)
@settings(max_examples=10)
def test_the_newton_constant_is_the_published_one(seed: int):
    model, data = network(seed), inputs(30, seed=seed)
    v, h, g = parts(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = constants.newton(model, data, model.units, damping=0.0, clip=False).tensors[0][:, 0]
    used = h.sum(0) > 1e-6
    torch.testing.assert_close(found[used], ((h * v - g).sum(0) / h.sum(0))[used], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name, settings", [("newton", {"damping": 0.0, "clip": False}), ("curvature_weighted", {})])
def test_an_example_of_several_answers_counts_as_their_mean(name: str, settings: dict[str, Any]):
    """The same rows one to an example, two, or one in one and three in another: their weights are those shares."""
    model, data = network(2), inputs(8, seed=2)
    rule = partial(getattr(constants, name), model, units=model.units, **settings)
    pairs = Examples(data.tokens.view(4, 2, 4), data.labels.view(4, 2))
    some = torch.tensor([[0, 0, 0], [1, 2, 3]])
    uneven = Examples(data.tokens[some], data.labels[some][..., 0])
    uneven.labels[0, :2] = -100
    thrice = data[torch.tensor([0, 0, 0, 1, 2, 3])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for several, alone in ((pairs, data), (uneven, thrice)):
            found, expected = (rule(examples=given, probes=8).tensors[0] for given in (several, alone))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_clipped_newton_constants_stay_in_the_range_of_the_data():
    model, data = network(1), inputs(30)
    with torch.no_grad():
        model.w_out.mul_(0.05)  # a Newton step alone makes up for all of the error: the less is read, the longer it is
    v, _, _ = parts(model, data)
    with pytest.warns(UserWarning, match=r"Newton constants of \d+ of 6 units left the data's range, clipped to it"):
        found = constants.newton(model, data, model.units, damping=0.0).tensors[0][:, 0]
    assert (found >= v.amin(0) - 1e-12).all() and (found <= v.amax(0) + 1e-12).all()
    with pytest.raises(ValueError, match=r"damping is -1"):
        constants.newton(model, data, model.units, damping=-1.0)


def test_strong_damping_gives_the_mean():
    model, data = network(1), inputs(30)
    mean = constants.mean(model, data, model.units).tensors[0]
    found = constants.newton(model, data, model.units, damping=1e12, clip=False).tensors[0]
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_undamped_newton_constants_destroy_a_well_trained_model():
    """Three quarters of the units stay, those with the largest risk: means change no answer, the published constants
    bring the model to chance; damped and clipped they do no harm."""
    task = load_task("hierarchical_equality")
    model = task.model()
    train, _, test = task.examples(0)
    train, test, units = train[:512], test[:256], heads(model) + neurons(model)
    circuit = score.risk(model, train, units, temperature=3.0).top(0.75)

    def accuracy(values: Values) -> float:
        return evaluate(model, constants.reduced(model, circuit, values), test).accuracy

    assert accuracy(constants.mean(model, train, units)) >= 0.99
    with pytest.warns(UserWarning, match="expect the model to be destroyed"):
        published = constants.newton(model, train, units, damping=0.0, clip=False)
    assert accuracy(published) < 0.6
    with pytest.warns(UserWarning, match="clipped"):
        tamed = constants.newton(model, train, units)
    assert accuracy(tamed) >= 0.99


@pytest.mark.parametrize("name", ["curvature_weighted", "newton"])
def test_batches_do_not_matter_and_the_model_leaves_as_it_came_in(name: str):
    model, data = bridge(), examples(12, answers=2)
    units = units_of(model)
    rule = getattr(constants, name)
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, split = rule(model, data, units), rule(model, data, units, batch_size=5)
    for one, two in zip(whole.tensors, split.tensors, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Newton constants")
@pytest.mark.parametrize("find", [constants.curvature_weighted, partial(constants.newton, clip=False)])
def test_a_bos_at_which_units_are_left_alone_counts_for_no_constant(find: Any):
    model, data = fresh(), examples(20, choices=(1, 2, 3))
    data = replace(data, tokens=torch.cat([torch.zeros(20, 1).long(), data.tokens[:, 1:].clamp_min(1)], 1))
    rest = find(model, data, neurons(model).at(slice(1, None)))
    model.tokenizer = SimpleNamespace(bos_token_id=0)
    found = find(model, data, neurons(model))
    for mine, theirs in zip(found.tensors, rest.tensors, strict=True):
        torch.testing.assert_close(mine, theirs)
