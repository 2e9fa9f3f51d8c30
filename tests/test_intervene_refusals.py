"""What interventions refuse: training mode, tokens and answers that are not there, numbers that are not
finite, shapes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.models import (
    bridge,
    examples,
    fresh,
    inputs,
    linear,
    random_mask,
    random_values,
    reduction_of,
    unchanged,
    values_in,
)

from tl_sparsify import constants, score
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.edges import edges
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_logits,
    check_model,
    output,
    run_values,
)
from tl_sparsify.core.intervene import Intervention, ablate, intervened
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, mlps, neurons
from tl_sparsify.search.joint import sparsify

Z, POST = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"


@pytest.mark.parametrize(
    "where, says", [(5, "positions 5 of"), (-6, "positions -6 of"), (torch.tensor([0, 5, 1]), "positions each of")]
)
def test_positions_outside_the_input_are_refused(where: Any, says: str):
    model = bridge()
    reduction = reduction_of(model, units=heads(model).at(where), mask=random_mask(heads(model)))
    with pytest.raises(ValueError, match=says + r".*outside an input of length 5"):
        values_in(model, examples(3).tokens, heads(model), ablate(reduction))


def test_positions_for_other_examples_are_refused():
    model = bridge()
    units = heads(model).at(torch.tensor([0, 1]))
    reduction = reduction_of(model, units=units, mask=random_mask(units))
    with pytest.raises(ValueError, match=r"positions of .* for a batch of 3"):
        values_in(model, examples(3).tokens, heads(model), ablate(reduction))


# What is refused


def calls(model: Any, data: Examples, reduction: Reduction) -> list[Any]:
    units = reduction.units
    return [
        lambda: risk(model, reduction, data),
        lambda: score.risk(model, data, units),
        lambda: score.risk(model, data, units, values=reduction.values),
        lambda: score.variance(model, data, units),
        lambda: constants.mean(model, data, units),
        lambda: constants.zero(model, data, units),
        lambda: constants.refit(model, reduction, data, data, steps=1, progress=False),
        lambda: sparsify(model, data, units, rounds=2, progress=False),
        lambda: sparsify(model, data, units, rounds=2, values=reduction.values, progress=False),
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_model_in_training_mode_is_refused(number: int):
    model, data = fresh(), examples(3)
    reduction = reduction_of(model)
    model.train()
    with unchanged(model), pytest.raises(ValueError, match=r"model is in training mode.*call model\.eval\(\)"):
        calls(model, data, reduction)[number]()
    model.eval()
    part = model.blocks[1].mlp
    part.training = True
    with pytest.raises(ValueError, match=r"training mode \(at .*blocks\.1\..*mlp"):
        check_model(model)


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("bad", [-1, 11])
def test_token_ids_outside_the_vocabulary_are_refused(number: int, bad: int):
    model, data = bridge(), examples(3)
    tokens = data.tokens.clone()
    tokens[0, 1] = bad
    with unchanged(model), pytest.raises(ValueError, match=f"tokens holds id {bad}; .* ids 0 to 10"):
        calls(model, Examples(tokens, data.labels), reduction_of(model))[number]()


def test_answers_outside_the_vocabulary_are_refused():
    model, data = bridge(), examples(3)
    with pytest.raises(ValueError, match=r"labels .*hold id 11; .* ids 0 to 10"):
        answer_logits(model, Examples(data.tokens, data.labels.where(data.labels < 0, 11)))
    with pytest.raises(ValueError, match=r"choices hold id 12; .* ids 0 to 10"):
        answer_logits(model, Examples(data.tokens, data.labels, choices=torch.tensor([*range(11), 12])))


def test_labels_of_another_length_than_the_output_are_refused():
    model, data = bridge(), examples(3)
    with pytest.raises(ValueError, match="labels has 1 positions, the model's output 5"):
        answer_logits(model, Examples(data.tokens, data.labels[:, -1:]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", range(9))
def test_activations_that_are_not_finite_are_refused_with_their_hook_point(number: int, bad: float):
    model, data = fresh(), examples(3)
    reduction = reduction_of(model)
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.bias[2] = bad
        reduction = Reduction(reduction.circuit, reduction.values)  # for any model
    expected = r"blocks\.1\.mlp\.out\.hook_out|blocks\.1\.hook_mlp_out"
    if number in (3, 4, 5):  # what looks at units alone
        reduction = Reduction(Circuit.full(mlps(model)), Values(mlps(model), (torch.zeros(1, 8),) * 2))
        expected = r"blocks\.1\.hook_mlp_out"
    with pytest.raises(ValueError, match=rf"(output is|are) NaN or infinite|hook point ({expected})") as error:
        calls(model, data, reduction)[number]()
    assert re.search(rf"hook point ({expected})\b", str(error.value))


def test_what_a_writer_gives_is_refused_with_the_first_reader_that_gets_it():
    model, data = fresh(), examples(3)
    with torch.no_grad():
        model.blocks[0].mlp.out.original_component.bias[2] = float("nan")
    with pytest.raises(ValueError, match=r"hook point blocks\.1\.attn\.q\.edges are NaN or infinite"):
        run_values(model, data, edges(model))


def test_large_values_whose_sum_overflows_are_values():
    model, data = fresh(), examples(3)
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.bias[2:4] = 1e308
    found = run_values(model, data, mlps(model)).tensors[1]
    assert bool(found.sum().isinf()) and bool(found.isfinite().all())


def test_a_value_that_is_not_finite_is_named_by_its_hook_point():
    model, data = bridge(), examples(3)
    values = Values(heads(model), tuple(torch.full((2, 4), float("nan")) for _ in range(2)))
    keep = Circuit.of(heads(model), ["L0H0", "L0H1"]).mask.float()
    with pytest.raises(ValueError, match=r"first at hook point blocks\.1\.attn\.(hook_z|o\.hook_in)"):
        with intervened(model, Intervention(heads(model), keep, values)):
            answer_logits(model, data)
    with pytest.raises(ValueError, match=r"values of removed units at blocks\.0\.attn\.hook_z are NaN or infinite"):
        Reduction(Circuit.of(heads(model), ["L1H0", "L1H1"]), values)


def test_units_of_another_model_are_refused():
    model, data = bridge(), examples(3)
    elsewhere = Units((Site("neuron", 7, "blocks.7.mlp.hook_post", 5),))
    larger = Units((Site("neuron", 1, POST, 6),))
    for units, says in [
        (elsewhere, r"no hook point 'blocks\.7\.mlp\.hook_post'"),
        (larger, r"yields \(3, 5, 5\).*6 neuron"),
    ]:
        with unchanged(model), pytest.raises(ValueError, match=says):
            values_in(model, data.tokens, heads(model), ablate(Reduction(Circuit.empty(units), random_values(units))))
        with unchanged(model), pytest.raises(ValueError, match=says):
            run_values(model, data, units)


def test_interventions_of_other_shapes_are_refused():
    units = heads(bridge())
    values = random_values(units)
    with pytest.raises(ValueError, match=r"keep has shape \(3,\)"):
        Intervention(units, torch.ones(3), values)
    with pytest.raises(ValueError, match="values are for"):
        Intervention(neurons(bridge()), torch.ones(10), values)


def test_an_output_that_is_no_logits_is_refused():
    model = linear()
    model.forward = lambda x: (x, x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="returned tuple, not logits"):
        output(model, inputs())
