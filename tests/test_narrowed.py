"""Logits where an answer is read and nowhere else: the numbers are those of the whole output, on every architecture,
under interventions, with gradients; and the whole output where somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import architectures, native
from helpers.models import NoCasts, inputs, linear, unchanged
from torch import Tensor

from tl_sparsify._internal.layouts import narrows
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.basis import directions
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, answer_rows, output
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units, mlps
from tl_sparsify.folding.fold import fold
from tl_sparsify.search import constants

MODELS = [*architectures.CONFIGS, *native.VARIANTS]


def model_of(name: str) -> Any:
    return architectures.bridge(name) if name in architectures.CONFIGS else native.native(name)


def uneven(padding: bool = False) -> Examples:
    """Three examples with one, three and two answers."""
    tokens = torch.randint(2, 17, (3, 6), generator=torch.Generator().manual_seed(4))
    labels = torch.full((3, 6), -100)
    for example, position in [(0, 5), (1, 1), (1, 2), (1, 5), (2, 3), (2, 4)]:
        labels[example, position] = tokens[example, position]
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, :2] = False
    return Examples(tokens, labels, mask if padding else None)


def whole(model: Any, batch: Examples) -> Tensor:
    """The rows of the whole output."""
    example, position = answer_rows(batch)
    return output(model, batch)[example, position]


@contextmanager
def unembedded(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that come out of the unembedding's own matrix product."""
    shapes: list[tuple[int, ...]] = []
    part = model.unembed.original_component
    handle = part.register_forward_hook(lambda module, given, found: shapes.append(tuple(found.shape)))
    try:
        yield shapes
    finally:
        handle.remove()


def half(model: Any) -> Reduction:
    units = native.units_of(model)
    kept = torch.rand(len(units), generator=torch.Generator().manual_seed(2)) < 0.5
    return Reduction(Circuit(units, kept), constants.mean(model, uneven(), units))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_whole_output(name: str, padding: bool):
    model, batch = model_of(name), uneven(padding)
    reduction = half(model)
    with torch.no_grad(), NoCasts():
        for interventions in ((), (ablate(reduction),)):
            with intervened(model, *interventions), unembedded(model) as shapes, unchanged(model):
                expected, found = whole(model, batch), answer_logits(model, batch)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert shapes == [(3, 6, 17), (6, 1, 17)]


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "no norms, soft caps"])
def test_folded_models_unembed_no_more_either(name: str):
    model, batch = model_of(name), uneven()
    reduction = constants.reduced(model, half(model).circuit, half(model).values)
    small = fold(model, reduction)
    with torch.no_grad(), NoCasts(), unembedded(small) as shapes:
        found = answer_logits(small, batch)
        torch.testing.assert_close(found, whole(small, batch), rtol=1e-12, atol=1e-12)
    assert shapes == [(6, 1, 17), (3, 6, 17)]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_output(name: str):
    model, batch = model_of(name), uneven()
    units = native.units_of(model)
    found: list[tuple[Tensor, ...]] = []
    with NoCasts():
        for rows in (whole, answer_logits):
            with recorded(model, units, gradients=True) as recording:
                total = (rows(model, batch).softmax(1) * torch.arange(17)).sum()
            found.append(torch.autograd.grad(total, list(recording.activations.values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.shape[:2] == (3, 6)


def test_every_hook_before_the_unembedding_sees_all_positions():
    model, batch = model_of("GPT-2"), uneven()
    sites = directions(model, "blocks.2.hook_resid_post", torch.eye(24)[:, :2]).sites
    units = Units(sites) + mlps(model) + directions(model, "unembed.hook_in", torch.eye(24)[:, :3])
    with torch.no_grad(), recorded(model, units) as all_of_it:
        output(model, batch)
    with torch.no_grad(), recorded(model, units) as recording:
        answer_logits(model, batch)
    for one, other in zip(all_of_it.read(), recording.read(), strict=True):
        assert one.shape[:2] == (3, 6) and torch.equal(one, other)
    changed = Reduction(Circuit.empty(units), constants.zero(model, batch, units))
    with torch.no_grad(), intervened(model, ablate(changed)):
        torch.testing.assert_close(answer_logits(model, batch), whole(model, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_who_looks_at_the_logits_sees_all_of_them(direction: str):
    model, batch = model_of("Llama"), uneven()
    seen: list[tuple[int, ...]] = []

    def look(value: Tensor, hook: Any) -> None:
        seen.append(tuple(value.shape))

    assert narrows(model)
    with model.hooks(**{f"{direction}_hooks": [("unembed.hook_out", look)]}):
        assert not narrows(model)
        with recorded(model, mlps(model), gradients=True):
            found = answer_logits(model, batch)
            found.sum().backward()
    assert seen == [(3, 6, 17)] and narrows(model)


def test_other_models_give_their_whole_output():
    model, batch = linear(), inputs()
    assert not narrows(model)
    assert torch.equal(answer_logits(model, batch), model(batch.tokens))


def test_an_architecture_that_cannot_leave_logits_out_gives_all_of_them():
    model, batch = architectures.fresh("GPT-2"), uneven()
    forward = model.original_model.forward

    def plain(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    model.original_model.forward = plain
    with torch.no_grad(), unembedded(model) as shapes:
        answer_logits(model, batch)
    assert shapes == [(3, 6, 17)]


def test_passes_are_counted_in_examples_whatever_the_number_of_answers():
    model, batch = model_of("Qwen2"), uneven()
    with counted(model) as passes, recorded(model, mlps(model), gradients=True):
        answer_logits(model, batch).sum().backward()
    assert passes == {"forward": 3, "backward": 3}
