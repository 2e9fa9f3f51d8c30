"""Controls: what stands in the place of aligned units, models and answers, is what it says, and drawn from the seed."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.architectures import bridge as hugging_face
from helpers.models import bridge, exclusive_or, fresh, reduction_of, seeded, unchanged, units_of
from torch import Tensor
from transformer_lens.tools.analysis.interchange import arbitrary_targets, reinitialized

from tl_sparsify import Alignment, Examples, Pairs, Site, Unit, directions, fingerprint, fold, heads, neurons
from tl_sparsify.abstraction.controls import (
    everything,
    made_up,
    others,
    outside,
    placebo,
    random_units,
    random_weights,
    streams,
)
from tl_sparsify.abstraction.interchange import TestedModel as Subject

SITE = Site("neuron", 0, "blocks.0.mlp.hook_post", 5)


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@cache
def folded() -> Any:
    return fold(bridge(), reduction_of(bridge(), seed=1))


MODELS = {
    "native": bridge,
    "folded": folded,
    "without layers of torch's": exclusive_or,
    "Llama": lambda: hugging_face("Llama"),
    "GPT-2": lambda: hugging_face("GPT-2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_are_of_the_same_architecture_and_other_weights(name: str):
    model = MODELS[name]()
    before = torch.get_rng_state()
    with unchanged(model):
        random = random_weights(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert random is not model and not any(module.training for module in random.modules())
    assert [w.shape for w in weights(random)] == [w.shape for w in weights(model)]
    assert {w.dtype for w in weights(random)} == {w.dtype for w in weights(model)}
    assert {w.data_ptr() for w in weights(random)}.isdisjoint({w.data_ptr() for w in weights(model)})
    assert fingerprint(random) != fingerprint(model)
    if name != "without layers of torch's":
        tokens = torch.tensor([[2, 3, 4, 5], [5, 4, 3, 2]])
        assert not torch.allclose(random(tokens), model(tokens))
        assert list(heads(random)) == list(heads(model)) and list(neurons(random)) == list(neurons(model))


@pytest.mark.parametrize("name", ["native", "without layers of torch's", "Llama"])
def test_random_weights_are_a_function_of_the_seed(name: str):
    model = MODELS[name]()
    one, same, other = (fingerprint(random_weights(model, seed)) for seed in (3, 3, 4))
    assert one == same != other


def test_random_weights_of_torch_layers_are_transformer_lens_own():
    model = bridge()
    for mine, theirs in zip(weights(random_weights(model, 5)), weights(reinitialized(model, 5)), strict=True):
        assert torch.equal(mine, theirs)


def test_random_weights_of_hugging_face_are_as_it_initialises_them():
    model = hugging_face("Llama")
    random = random_weights(model, 0)
    scale = model.original_model.config.initializer_range
    for old, new in zip(model.blocks, random.blocks, strict=True):
        assert new.mlp.W_in.std().item() == pytest.approx(scale, rel=0.2) and old.mlp.W_in.std() > 5 * scale
        assert bool((new.ln1.weight == 1).all())


def test_weights_that_nobody_resets_keep_their_entries_in_another_order():
    model = exclusive_or()
    for old, new in zip(weights(model), weights(random_weights(model, 1)), strict=True):
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_random_units_are_as_many_of_the_same_site_and_position():
    chosen = [Unit(SITE, 1).at(2), Unit(SITE, 3).at(2), Unit(SITE, 0), heads(bridge())["L1H0"]]
    free = others(Subject("original", bridge()), Alignment({"a": chosen}), chosen, (4, 5))
    for draw in range(10):
        found = random_units(chosen, free, 7, draw)
        assert [unit.site for unit in found] == [chosen[0].site] * 2 + [SITE, chosen[3].site]
        assert len(set(found)) == 4 and set(found).isdisjoint(chosen)
    assert random_units(chosen, free, 7, 0) == random_units(chosen, free, 7, 0)
    assert len({tuple(u.name for u in random_units(chosen, free, 7, draw)) for draw in range(10)}) > 3


def test_random_units_are_drawn_evenly_from_outside_and_never_from_inside():
    counts = torch.zeros(5)
    for draw in range(600):
        for unit in random_units([Unit(SITE, 0), Unit(SITE, 1)], {SITE: [2, 3, 4]}, 0, draw):
            counts[unit.index] += 1
    assert bool((counts[:2] == 0).all()) and bool(((counts[2:] - 400).abs() < 60).all())
    four = [Unit(SITE, i) for i in range(4)]
    for draw in range(20):
        assert random_units(four, {SITE: [4]}, 0, draw) == [Unit(SITE, 4)]
        assert random_units(four, {}, 0, draw) == []


def test_candidates_are_units_that_the_model_has_and_no_variable_at_these_positions():
    model, units = bridge(), units_of(bridge())
    own = [units["L0N0"].at(2), units["L0N1"].at(2)]
    rest = {
        "b": [units["L0N2"].at((1, 2))],  # there as well
        "c": [units["L0N3"].at(1)],  # elsewhere
        "d": [units["L1N4"]],  # in another layer
    }
    site = own[0].site
    original = Subject("original", model)
    assert others(original, Alignment({"a": own} | rest), own, (4, 5)) == {site: [3, 4]}
    assert others(original, Alignment({"a": own, "e": [units["L0N4"]]} | rest), own, (4, 5)) == {site: [3]}
    assert others(original, Alignment({"a": own, "e": [units["L0N3"].at(-3)]}), own, (4, 5)) == {site: [2, 4]}
    each = torch.tensor([0, 1, 2, 3])
    assert others(original, Alignment({"a": own, "e": [units["L0N3"].at(each)]}), own, (4, 5)) == {site: [2, 4]}
    removed = reduction_of(model, torch.tensor([name not in ("L0N3", "L0N4") for name in units.names]))
    for subject in (
        Subject("reduced", model, removal=removed),
        Subject("reduced", fold(model, removed), own_names={v: k for k, v in fold(model, removed).units.items()}),
    ):
        assert others(subject, Alignment({"a": own}), own, (4, 5)) == {site: [2]}
        assert others(subject, Alignment({"a": own} | rest), own, (4, 5)) == {}


def test_everything_is_all_heads_and_neurons():
    model = bridge()
    alignment = Alignment(
        {"a": [heads(model)["L0H1"].at(3), heads(model)["L0H1"].at(1)], "b": [neurons(model)["L1N2"]]}
    )
    assert everything(model, alignment) == list(units_of(model))
    left = outside(model, alignment)
    assert {unit.name for unit in everything(model, alignment)} - {unit.name for unit in left} == {"L0H1", "L1N2"}


def test_everything_of_a_model_without_blocks_is_its_alignments_hook_points():
    model = exclusive_or()
    alignment = Alignment({"a": [Unit(model.units.sites[0], 3)]})
    assert everything(model, alignment) == list(model.units)
    assert [unit.index for unit in outside(model, alignment)] == [0, 1, 2, 4, 5, 6, 7]


def test_directions_of_two_bases_are_told_apart():
    model = exclusive_or()
    bases = [torch.linalg.qr(torch.randn(8, 3, generator=seeded(seed), dtype=torch.float64))[0] for seed in (0, 1)]
    one, two = (list(directions(model, "hook_hidden", basis)) for basis in bases)
    left = outside(model, Alignment({"a": one[:1], "b": two[1:2]}))
    assert left == [*one[1:], two[0], two[2]]


def test_a_stream_for_each_layer():
    assert [site.hook for site in streams(bridge())] == [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    assert streams(exclusive_or()) == ()
    layers = [site.layer for site in streams(fresh(n_layers=30))]
    assert len(layers) == 12 and layers[0] == 0 and layers[-1] == 29
    assert {after - before for before, after in pairwise(layers)} == {2, 3}


def pairs(n: int = 40) -> Pairs:
    tokens = torch.randint(11, (2, n, 5), generator=seeded(2))
    labels = torch.full((n, 5), -100)
    labels[torch.arange(n), torch.arange(n) % 3 + 2] = 1  # read at another position in each example
    mask = torch.ones(n, 5, dtype=torch.bool)
    mask[torch.arange(n) % 3 == 0, 3:] = False
    base, source = (Examples(part, labels, attention_mask=mask) for part in tokens)
    inputs = ({"x": part[:, 0].numpy()} for part in tokens)
    return Pairs(*inputs, base, source, {i: i for i in range(11)})


def test_made_up_answers_are_transformer_lens_arbitrary_targets():
    found = made_up(pairs(200), 5)
    keys = [(str(x),) for x in pairs(200).source_inputs["x"]]
    assert torch.equal(found, arbitrary_targets(keys, 11, 5))
    assert len(found.unique()) > 4


def test_made_up_answers_are_the_same_for_the_same_source():
    some = pairs(200)
    found = made_up(some, 1)
    for source in range(11):
        assert len(found[torch.from_numpy(some.source_inputs["x"] == source)].unique()) == 1


def by_hand(model: Any, some: Pairs, basis: Tensor, columns: list[int], where: int, other: Tensor) -> Tensor:
    """Answers when position ``where`` moves within ``other`` as far as exact interchange of ``columns`` of ``basis``
    moves it: one example at a time."""
    dual = torch.linalg.pinv(basis).T
    answers = []
    for i in range(len(some)):
        seen: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> None:
            seen["source"] = activation[:, where]

        def swap(activation: Tensor, hook: Any, seen: dict[str, Tensor] = seen) -> Tensor:
            change = seen["source"] - activation[:, where]
            aligned = change @ dual[:, columns] @ basis[:, columns].T
            move = change @ other @ other.T
            activation = activation.clone()
            activation[:, where] += move * aligned.norm() / move.norm()
            return activation

        def run(examples: Examples, hook: Any, i: int = i) -> Tensor:
            mask = None if examples.attention_mask is None else examples.attention_mask[i : i + 1].long()
            with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", hook)]):
                return model(examples.tokens[i : i + 1], attention_mask=mask)

        run(some.source, keep)
        place = int((some.base.labels[i] != -100).nonzero())
        answers.append(run(some.base, swap)[0, place].argmax())
    return torch.stack(answers)


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("size", [7, None])
def test_the_placebo_moves_as_far_as_the_directions_and_reads_each_examples_own_answer(
    orthonormal: bool, size: int | None
):
    model = fresh(seed=4)
    basis = torch.randn(8, 4, generator=seeded(0), dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0] if orthonormal else basis
    units = [unit.at(2) for unit in directions(model, "blocks.0.hook_resid_post", basis)][:2]
    with unchanged(model):
        found = placebo(Subject("original", model), pairs(), units, draws=2, seed=6, batch_size=size)
    assert len(found) == 2
    for seed, answers in enumerate(found):
        other = torch.linalg.qr(torch.randn(8, 2, generator=seeded(6 + seed)))[0].double()
        expected = by_hand(model, pairs(), basis, [0, 1], 2, other)
        assert torch.equal(answers, expected)
    assert len(found[0].unique()) > 2


def test_no_draws_no_placebo():
    model = bridge()
    units = [unit.at(2) for unit in directions(model, "blocks.0.hook_resid_post", torch.eye(8, 2))]
    assert placebo(Subject("original", model), pairs(), units, draws=0, seed=0) == []


def test_the_placebo_of_a_reduced_model_is_of_the_reduced_model():
    model = fresh(seed=4)
    reduction = reduction_of(model, seed=2)
    units = [unit.at(2) for unit in directions(model, "blocks.0.hook_resid_post", torch.eye(8, 3, dtype=torch.float64))]
    found = [
        placebo(subject, pairs(), units, draws=2, seed=6)
        for subject in (
            Subject("reduced", model, removal=reduction),
            Subject("reduced", fold(model, reduction), own_names={}),
            Subject("original", copy.deepcopy(model)),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
