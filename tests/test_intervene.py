"""Interventions against the primitive ``value + keep * (v - value)`` written out, and every refusal."""

from __future__ import annotations

import re
from types import SimpleNamespace
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
    seeded,
    unchanged,
    units_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_sparsify import constants, score
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import (
    answer_index,
    answer_logits,
    answer_rows,
    check_model,
    frozen,
    output,
    run_values,
    valid_positions,
)
from tl_sparsify.core.intervene import Intervention, ablate, interchange, intervened, recorded
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, attentions, heads, mlps, neurons
from tl_sparsify.search.joint import sparsify

SEEDS = st.integers(0, 2**31)
Z, POST = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"


def values_in(model: Any, tokens: Tensor, units: Units, *interventions: Intervention) -> tuple[Tensor, ...]:
    """What the model makes of the units under interventions."""
    with torch.no_grad(), intervened(model, *interventions), recorded(model, units) as recording:
        model(tokens)
    return recording.read()


# The primitive


@given(SEEDS, st.booleans())
@settings(max_examples=10)
def test_a_unit_becomes_value_plus_keep_times_the_rest(seed: int, by_example: bool):
    model, data = bridge(), examples(4, seed)
    units = heads(model) + neurons(model)
    last = Units(units.sites[1:2] + units.sites[3:])  # layer 1, so that nothing before them changes
    keep = torch.rand((4, len(last)) if by_example else (len(last),), generator=seeded(seed), dtype=torch.float64)
    values = random_values(last, seed)
    v = values_in(model, data.tokens, last)
    found = values_in(model, data.tokens, last, Intervention(last, keep, values))
    weights = [k[:, None, :, None] if by_example else k[:, None] for k in last.split(keep)]
    # the neurons come after the heads, which change their values
    torch.testing.assert_close(found[0], values.tensors[0] + weights[0] * (v[0] - values.tensors[0]))
    behind = values_in(
        model, data.tokens, last, Intervention(last, keep.clone().index_fill(-1, torch.arange(2, 7), 1), values)
    )
    torch.testing.assert_close(found[1], values.tensors[1] + weights[1] * (behind[1] - values.tensors[1]))


def test_ablation_sets_removed_units_and_leaves_kept_ones():
    model, data = bridge(), examples(3)
    reduction = reduction_of(model)
    found = values_in(model, data.tokens, reduction.units, ablate(reduction))
    for got, value, kept in zip(
        found, reduction.values.tensors, reduction.units.split(reduction.circuit.mask), strict=True
    ):
        assert (got[:, :, ~kept] == value[~kept]).all()
        assert not (got[:, :, kept] == value[kept]).any()


@pytest.mark.parametrize("kind", [attentions, mlps])
def test_whole_layers_are_units_too(kind: Any):
    model, data = bridge(), examples(3)
    units = kind(model)
    values = Values(units, tuple(torch.randn(1, 8, generator=seeded(0), dtype=torch.float64) for _ in units.sites))
    found = values_in(model, data.tokens, units, ablate(Reduction(Circuit.of(units, [units.names[0]]), values)))
    assert (found[1] == values.tensors[1]).all() and not (found[0] == values.tensors[0]).any()


def test_logits_move_by_the_readers_weights():
    model, data = linear(), inputs()
    values = random_values(model.units)
    reduction = Reduction(Circuit.of(model.units, ["L0N1", "L0N4"]), values)
    hidden = data.tokens @ model.w_in
    hidden[:, [0, 2, 3, 5]] = values.tensors[0][[0, 2, 3, 5], 0]
    with torch.no_grad(), intervened(model, ablate(reduction)):
        torch.testing.assert_close(model(data.tokens), hidden @ model.w_out)


def test_gradients_flow_through_keep_and_values():
    model, data = bridge(), examples(3)
    units = units_of(model)
    keep = torch.full((len(units),), 0.7, dtype=torch.float64, requires_grad=True)
    values = Values(units, tuple(t.clone().requires_grad_() for t in random_values(units).tensors))

    def logits(*parts: Tensor) -> Tensor:
        with intervened(model, Intervention(units, parts[0], Values(units, parts[1:]))):
            return answer_logits(model, data)

    assert torch.autograd.gradcheck(logits, (keep, *values.tensors))


def test_gradients_with_respect_to_keep_make_the_risk():
    model, data = bridge(), examples(1, choices=(2, 5))
    units = units_of(model)
    values = constants.mean(model, examples(8), units)
    keep = torch.ones(len(units), dtype=torch.float64, requires_grad=True)
    with intervened(model, Intervention(units, keep, values)):
        logits = answer_logits(model, data)[0]
    (gradient,) = torch.autograd.grad(logits[0] - logits[1], keep)
    expected = gradient.square() * logits.softmax(0).prod() / 2
    torch.testing.assert_close(score.risk(model, data, units, values=values).scores, expected.detach())


# Positions


@given(SEEDS)
@settings(max_examples=10)
def test_positions_are_the_only_places_that_change(seed: int):
    model, data = bridge(), examples(4, seed)
    each = torch.randint(5, (4,), generator=seeded(seed))
    two = torch.randint(5, (4, 2), generator=seeded(seed))
    plain = heads(model)
    for where, mask in [
        (2, torch.arange(5) == 2),
        (-1, torch.arange(5) == 4),
        ((0, 3), (torch.arange(5) == 0) | (torch.arange(5) == 3)),
        (slice(1, 4), (torch.arange(5) >= 1) & (torch.arange(5) < 4)),
        (each, torch.arange(5) == each[:, None]),
        (two, (torch.arange(5) == two[:, :1]) | (torch.arange(5) == two[:, 1:])),
    ]:
        units = Units(plain.at(where).sites[1:])
        reduction = Reduction(Circuit.empty(units), random_values(units, seed))
        before = values_in(model, data.tokens, units)[0]
        after = values_in(model, data.tokens, units, ablate(reduction))[0]
        mask = mask.expand(4, 5)
        assert torch.equal(after[~mask], before[~mask])
        assert (after[mask] == reduction.values.tensors[0]).all()


def test_positions_of_each_example_do_not_depend_on_batches():
    model, data = bridge(), examples(6)
    units = units_of(model).at(torch.randint(5, (6,), generator=seeded(3)))
    reduction = reduction_of(model, random_mask(units), units=units)
    together = risk(model, reduction, data)
    assert together.mean > 1e-3
    for size in (1, 4):
        assert risk(model, reduction, data, batch_size=size).mean == pytest.approx(together.mean, rel=1e-12)
    alone = [
        risk(model, reduction_of(model, random_mask(units), units=units_of(model).at(int(where))), data[i : i + 1]).mean
        for i, where in enumerate(units.sites[0].positions)  # type: ignore[arg-type]
    ]
    assert together.mean == pytest.approx(sum(alone) / 6, rel=1e-12)


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


# Interchange


def test_interchange_takes_the_values_of_the_source():
    model, base, source = bridge(), examples(4), examples(4, 1)
    units = units_of(model)
    circuit = Circuit.of(units, ["L0H1", "L1N2", "L1N4"])
    taken = run_values(model, source, units)
    found = values_in(model, base.tokens, units, interchange(circuit, taken))
    for got, there, swapped in zip(found, taken.tensors, units.split(circuit.mask), strict=True):
        assert torch.equal(got[:, :, swapped], there[:, :, swapped])
        assert not torch.equal(got[:, :, ~swapped], there[:, :, ~swapped])


def test_interchange_of_everything_gives_the_sources_answer():
    model, base, source = linear(), inputs(), inputs(seed=1)
    units = model.units
    with torch.no_grad(), intervened(model, interchange(Circuit.full(units), run_values(model, source, units))):
        assert torch.equal(model(base.tokens), model(source.tokens))


def test_a_source_is_taken_under_the_interventions_around_it():
    model, source = bridge(), examples(4, 1)
    reduction = reduction_of(model)
    with intervened(model, ablate(reduction)):
        inner = run_values(model, source, reduction.units)
    expected = values_in(model, source.tokens, reduction.units, ablate(reduction))
    assert all(torch.equal(a, b) for a, b in zip(inner.tensors, expected, strict=True))
    assert not inner.constant and all(not tensor.requires_grad for tensor in inner.tensors)


# Recording and reading answers


def test_recorded_values_are_the_caches():
    model, data = bridge(), examples(3)
    _, cache = model.run_with_cache(data.tokens)
    with recorded(model, units_of(model)) as recording:
        model(data.tokens)
    assert torch.equal(recording.read()[1], cache[Z]) and torch.equal(recording.read()[3][..., 0], cache[POST])
    with recorded(model, units_of(model), gradients=True) as recording:
        logits = model(data.tokens)
    found = torch.autograd.grad(logits.sum(), list(recording.activations.values()))
    assert all(gradient.abs().sum() > 0 for gradient in found)


def test_recording_keeps_the_graph_of_what_is_outside():
    model, data = linear(), inputs()
    keep = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with intervened(model, Intervention(model.units, keep, random_values(model.units))):
        with recorded(model, model.units, gradients=True):
            model(data.tokens).sum().backward()
    assert keep.grad is not None and keep.grad.abs().sum() > 0


def test_answers_are_read_at_the_labels():
    model, data = bridge(), examples(4, answers=2, choices=(3, 1, 8))
    with torch.no_grad():
        logits = model(data.tokens)
        found = answer_logits(model, data)
    assert torch.equal(found, logits[:, -2:].flatten(0, 1)[:, [3, 1, 8]])
    example, position = answer_rows(data)
    assert example.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and position.tolist() == [3, 4] * 4
    right = torch.tensor([3, 1, 8])[answer_index(data)]
    assert torch.equal(right, data.labels[:, -2:].flatten())
    everything = examples(4)
    assert torch.equal(answer_index(everything), everything.labels[:, -1])


def test_padding_reaches_the_model():
    model, data = bridge(), examples(2)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    padded = Examples(data.tokens, data.labels, mask)
    with torch.no_grad():
        found, short = output(model, padded), model(data.tokens[1:, 2:])
    assert torch.equal(found[0], output(model, data)[0])
    without_positions = fresh(positional_embedding_type="rotary")
    with torch.no_grad():
        found, short = output(without_positions, padded), without_positions(data.tokens[1:, 2:])
    torch.testing.assert_close(found[1, 2:], short[0])


def test_padding_and_the_first_token_are_no_input():
    tokens = torch.tensor([[7, 1, 7, 2], [0, 7, 3, 7], [0, 0, 0, 7], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()
    data = Examples(tokens, tokens, mask)
    model = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=7))
    expected = mask.clone()
    expected[0, 0] = expected[1, 1] = False  # the first token only, and never all that an example has
    assert torch.equal(valid_positions(model, data), expected)
    for i in range(4):
        assert torch.equal(valid_positions(model, data[i : i + 1]), expected[i : i + 1])
    assert torch.equal(valid_positions(SimpleNamespace(), data), mask)


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


def test_flags_come_back_where_they_were():
    model = fresh()
    model.embed.requires_grad_(False)
    with unchanged(model), pytest.raises(KeyError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
