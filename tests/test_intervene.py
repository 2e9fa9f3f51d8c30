"""Interventions against the primitive ``value + keep * (v - value)`` written out."""

from __future__ import annotations

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
    values_in,
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
    frozen,
    output,
    run_values,
    valid_positions,
)
from tl_sparsify.core.intervene import Intervention, ablate, interchange, intervened, recorded
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units, attentions, heads, mlps, neurons

SEEDS = st.integers(0, 2**31)
Z, POST = "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"


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
    data = Examples(tokens, tokens.where(mask, -100), mask)
    model = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=7))
    expected = mask.clone()
    expected[0, 0] = expected[1, 1] = False  # the first token only, and never all that an example has
    assert torch.equal(valid_positions(model, data), expected)
    for i in range(4):
        assert torch.equal(valid_positions(model, data[i : i + 1]), expected[i : i + 1])
    assert torch.equal(valid_positions(SimpleNamespace(), data), mask)


def test_flags_come_back_where_they_were():
    model = fresh()
    model.embed.requires_grad_(False)
    with unchanged(model), pytest.raises(KeyError), frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise KeyError
