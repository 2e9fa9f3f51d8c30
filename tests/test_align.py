"""Alignment search on networks whose variables have a known place, and on a trained one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.carrier import PLACE, SUM, Carrier, sums
from helpers.equality import (
    BOTH,
    EQUALITY,
    FIRST,
    LEFT,
    NEITHER,
    RIGHT,
    SECOND,
    UNITS,
    UNREAD,
    Network,
    counted,
    drawn,
    pairs_of,
    removal,
)
from helpers.models import unchanged
from helpers.verification import PARITY, answered_by, native, native_pairs
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

import tl_sparsify as tls
from tl_sparsify import (
    Alignment,
    AlignmentResult,
    CausalModel,
    Examples,
    Pairs,
    Unit,
    align,
    fingerprint,
    load_task,
    verify,
)

EACH = [(site, i) for site in UNITS.sites for i in range(site.size)]
CROSSED = CausalModel(
    EQUALITY.inputs,
    {"left": lambda a, c: a == c, "right": lambda b, d: b == d, "same": lambda left, right: left == right},
    "same",
)
EVERY = ("left", "right", "same")


def known(n: int = 400, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Pairs to search with, and held-out ones."""
    return pairs_of(*drawn(n, seed)), pairs_of(*drawn(n, seed + 100))


def places(found: AlignmentResult, variable: str) -> set[Unit]:
    return set(found.alignment.units[variable])


@pytest.mark.parametrize("seed", range(4))
def test_the_neurons_of_every_variable_are_found(seed: int):
    found = align(Network(), EQUALITY, *known(seed=seed), units=UNITS, variables=EVERY, trials=12)
    assert found.held_out == found.held_out_changed == dict.fromkeys(EVERY, 1.0)
    assert places(found, "left") == set(LEFT) and places(found, "right") == set(RIGHT)
    assert places(found, "same") == {BOTH, NEITHER}


def test_what_is_found_is_what_verification_says():
    pairs, held_out = known()
    found = align(Network(), EQUALITY, pairs, held_out, units=UNITS, variables=EVERY, trials=12)
    evidence = verify(Network(), EQUALITY, found.alignment, held_out)
    for variable in EVERY:
        assert evidence.accuracy(variable) == found.held_out[variable]
        assert evidence.accuracy(variable, intervention="random units") < 1
        rows = evidence.to_frame().set_index(["model", "intervention", "variable"])
        changed = rows.loc["original", "aligned units", variable].accuracy_changed
        assert changed == found.held_out_changed[variable]


def test_where_no_units_carry_a_variable_its_accuracy_says_so():
    found = align(Network(), CROSSED, *known(), units=UNITS, variables=("left", "right"), trials=12)
    assert all(accuracy < 0.8 for accuracy in found.held_out.values())


def test_without_variables_all_but_the_output_are_sought():
    found = align(Network(), EQUALITY, *known(), units=UNITS)
    assert found.alignment.variables == tuple(found.held_out) == ("left", "right")


def test_only_units_that_are_asked_for_are_returned():
    found = align(Network(), EQUALITY, *known(), units=tls.Units((SECOND,)), variables=("same", "left"), trials=12)
    assert places(found, "same") == {BOTH, NEITHER} and found.held_out["same"] == 1
    assert {unit.site for unit in places(found, "left")} == {SECOND} and found.held_out["left"] < 1


def test_inside_a_reduction_only_kept_units_are_returned():
    model = Network()
    found = align(model, EQUALITY, *known(), units=UNITS, variables=EVERY, reduction=removal(model, UNREAD), trials=12)
    assert places(found, "left") == set(LEFT) and found.held_out["same"] == 1
    assert found.exhaustive == len(UNITS) - len(UNREAD) + 1
    partly = removal(model, [LEFT[0], RIGHT[2]])
    found = align(model, EQUALITY, *known(), units=UNITS, variables=("left", "right"), reduction=partly, trials=12)
    assert places(found, "left") == set(LEFT[1:]) and places(found, "right") == set(RIGHT[:2])


def test_the_search_runs_in_the_reduced_model():
    model = Network()
    constant = removal(model, LEFT, value=1.0)  # "left" three times over: the answer is the same for all inputs
    with pytest.raises(ValueError, match=r"interchanging|pairs right on both inputs"):
        align(model, EQUALITY, pairs_of(*drawn(8, 3)), pairs_of(*drawn(8, 4)), units=UNITS, reduction=constant)


def test_units_without_any_effect_give_an_alignment_that_says_so():
    model, (pairs, held_out) = Network(), known()
    silent = removal(model, [*LEFT, *RIGHT, BOTH, NEITHER])  # answers "different", whatever the input
    found = align(model, EQUALITY, pairs, held_out, units=UNITS, variables=("left",), reduction=silent)
    assert len(found.alignment.units["left"]) == 1
    assert found.held_out_changed["left"] == 0 < found.held_out["left"] < 0.8


def test_a_smaller_set_is_preferred_within_the_tolerance():
    pairs, held_out = known()
    strict, loose = (
        align(Network(), EQUALITY, pairs, held_out, units=UNITS, variables=("left",), trials=12, tolerance=tolerance)
        for tolerance in (0.0, 0.5)
    )
    assert len(loose.alignment.units["left"]) == 1 < len(strict.alignment.units["left"])
    assert loose.searched["left"] < strict.searched["left"] == 1


def test_pairs_that_tell_the_variable_from_the_answer_count_for_half_of_what_is_searched():
    """Units that carry the answer are right on all pairs but one in twenty, which tells them from the variable's."""
    few = [*([((0, 1), (2, 1)), ((1, 2), (1, 2)), ((3, 0), (1, 0)), ((2, 3), (0, 3))] * 5)[:19], ((1, 0), (3, 2))]
    pairs = sums(*zip(*few * 2, strict=True))
    found = align(Carrier(), SUM, pairs, pairs, units=tls.Units((PLACE[0].site,)), variables=("first",), trials=4)
    assert (found.held_out["first"], found.searched["first"], found.tells_apart["first"]) == (0.95, 0.5, 0.05)
    assert found.to_frame().tells_apart.tolist() == [0.05]


def test_pairs_that_the_model_answers_wrong_are_left_out():
    model, (pairs, held_out) = Network(blind=1), known(800)
    found = align(model, EQUALITY, pairs, held_out, units=UNITS, variables=("left", "right"), trials=12)
    assert places(found, "left") == set(LEFT) and places(found, "right") == set(RIGHT)
    assert found.held_out["left"] == verify(model, EQUALITY, found.alignment, held_out).accuracy("left") < 1


def test_the_same_search_finds_the_same():
    first, second = (align(Network(), EQUALITY, *known(), units=UNITS, variables=EVERY, seed=1) for _ in range(2))
    assert first == second and repr(first) == repr(second)


def test_batches_do_not_matter():
    found = [
        align(Network(), EQUALITY, *known(90), units=UNITS, variables=EVERY, batch_size=size) for size in (7, 45, None)
    ]
    assert found[0].alignment == found[1].alignment == found[2].alignment
    assert found[0].searched == found[2].searched and found[0].held_out == found[2].held_out


def test_what_was_found_prints_in_a_line_and_as_a_table():
    found = align(Network(), EQUALITY, *known(), units=UNITS, variables=EVERY, trials=12)
    assert repr(found).startswith("AlignmentResult(left: 3 units 1.000, right: 3 units 1.000, same: 2 units 1.000; ")
    assert f"{found.forward} + {found.backward} passes, every unit alone 13)" in repr(found)
    frame = found.to_frame().set_index("variable")
    assert list(frame.columns) == ["units", "names", "held_out", "held_out_changed", "searched", "tells_apart"]
    assert frame.loc["left", "units"] == 3 and set(frame.loc["left", "names"].split()) == {u.name for u in LEFT}
    many = replace(found, alignment=Alignment({"left": [Unit(FIRST, i) for i in range(7)]}))
    assert many.to_frame().names[0].endswith("L0N5 ...")


def counted_backward(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the backward passes from now on."""
    calls = [0]
    for place, name in ((torch.autograd, "grad"), (Tensor, "backward")):
        original = getattr(place, name)

        def counting(*args: Any, original: Callable[..., Any] = original, **settings: Any) -> Any:
            calls[0] += 1
            return original(*args, **settings)

        monkeypatch.setattr(place, name, counting)
    return calls


@pytest.mark.parametrize("trials", [2, 7, None])
def test_passes_are_counted_as_they_were_made(trials: int | None, monkeypatch: pytest.MonkeyPatch):
    model, (pairs, held_out) = Network(), known(200)
    calls = counted_backward(monkeypatch)
    found, rows = counted(
        model, lambda: align(model, EQUALITY, pairs, held_out, units=UNITS, variables=EVERY, trials=trials)
    )
    judging = 200 * (2 + 2 * len(EVERY))  # held-out pairs: answers, and each variable's source and interchange
    assert rows == found.forward * 100 + judging
    assert calls[0] == found.backward == 4 * len(EVERY)
    most = 4 + 5 + len(EVERY) * ((6 if trials is None else trials) + 3)
    assert found.forward <= most
    assert found.exhaustive == len(UNITS) + 1


def test_the_model_is_left_as_it_came_in():
    model = Network()
    model.first.bias.requires_grad_(False)
    state = torch.get_rng_state()
    with unchanged(model):
        align(model, EQUALITY, *known(60), units=UNITS, reduction=removal(model, UNREAD))
        with pytest.raises(ValueError, match="units those of this model"):
            align(model, EQUALITY, *known(60), units=tls.Units((replace(FIRST, size=5),)))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_sought_is_refused_by_name():
    model, (pairs, held_out) = Network(), known(60)

    shown = replace(pairs.base, counterfactual_tokens=pairs.source.tokens)

    def sought(match: str, causal_model: CausalModel = EQUALITY, some: Pairs = pairs, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            align(model, causal_model, some, held_out, **{"units": UNITS} | settings)

    sought("variables names 'middle'; there are left, right, same", variables=("left", "middle"))
    sought("variables is empty", variables=())
    sought("trials is 1; a search takes at least two", trials=1)
    sought("reduction was made for the model", reduction=removal(Network(blind=0), LEFT))
    sought("the model answers 0 of 60 pairs right", some=wrong(pairs))
    sought("interchanging 'left' changes the answer of no pair", some=pairs_of(*drawn(60)[:1] * 2))
    each = tls.Units((replace(FIRST, positions=torch.zeros(60, dtype=torch.long)),))
    sought("units of hook_first have a position for each example", units=each)
    sought("units of hook_first have .* or are at a span", units=tls.Units((replace(FIRST, positions="A"),)))
    paired = replace(removal(model, LEFT), values=tls.constants.counterfactual(model, shown, UNITS))
    sought("subspace is given, and the reduction's removed units take their values on", reduction=paired, subspace=1)
    sought("has no blocks; name its hook points yourself", units=None)
    sought("the reduction keeps none of the units", reduction=removal(model, [Unit(site, i) for site, i in EACH]))
    model.train()
    sought(r"model is in training mode.*call model\.eval\(\)")


def wrong(pairs: Pairs) -> Pairs:
    return replace(pairs, base=replace(pairs.base, labels=1 - pairs.base.labels))


TURNED = CausalModel(
    ("x", "y"),
    {"first": lambda x: x, "second": lambda y: y, "answer": lambda first, second: 2 * first + second},
    "answer",
)
BITS = np.array(list(itertools.product(range(2), repeat=2)))


def turned(angle: float) -> Any:
    """Two bits in one token, answered at the second of two positions; its MLP passes them on in two neurons that are
    turned by ``angle`` against them, so that with 45 degrees each carries half of both."""
    config = {"d_model": 4, "d_head": 4, "n_heads": 1, "n_layers": 2, "n_ctx": 2, "d_vocab": 5, "d_mlp": 2}
    config |= {"act_fn": "relu", "normalization_type": None, "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    parameters = {name.replace("._original_component", ""): p for name, p in model.named_parameters()}
    signs = torch.tensor(2 * BITS - 1, dtype=torch.float64)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        parameters["tok_embed.weight"][:4, :2] = signs
        parameters["layers.0.mlp.fc_in.weight"][:, :2] = turn
        parameters["layers.0.mlp.fc_in.bias"].fill_(3.0)  # never off
        parameters["layers.0.mlp.fc_out.weight"][2:] = turn.T
        parameters["layers.0.mlp.fc_out.bias"][2:] = -3 * turn.T.sum(1)
        attention = "layers.1.attn"
        parameters[f"{attention}.v.weight"][2:, 2:] = 2 * torch.eye(2)  # half of it stays at the second position
        parameters[f"{attention}.o.weight"][2:, 2:] = torch.eye(2)
        parameters["head.weight"][:4, 2:] = signs
    return model.eval()


def bits(n: int, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)

    def side() -> tuple[dict[str, np.ndarray], Examples]:
        number = rng.integers(4, size=n)
        tokens = np.stack([number, np.full(n, 4)], 1)
        labels = np.stack([np.full(n, -100), number], 1)
        inputs = dict(zip(("x", "y"), BITS[number].T, strict=True))
        return inputs, Examples(torch.tensor(tokens), torch.tensor(labels), choices=torch.arange(4))

    (base_inputs, base), (source_inputs, source) = side(), side()
    return Pairs(base_inputs, source_inputs, base, source, {i: i for i in range(4)})


def test_neurons_that_carry_a_variable_are_preferred_to_directions():
    found = align(turned(0), TURNED, bits(200, 0), bits(200, 1), subspace=1)
    for variable, name in (("first", "L0N0@0"), ("second", "L0N1@0")):
        assert [unit.name for unit in found.alignment.units[variable]] == [name]
        assert found.held_out[variable] == 1


def test_a_direction_is_learnt_where_no_units_carry_a_variable():
    model = turned(45)
    plain = align(model, TURNED, bits(400, 0), bits(400, 1))
    with unchanged(model):
        found = align(model, TURNED, bits(400, 0), bits(400, 1), subspace=1)
    for number, variable in enumerate(("first", "second")):
        assert plain.held_out[variable] < 0.9 < 0.99 < found.held_out[variable]
        [unit] = found.alignment.units[variable]
        where = {"blocks.0.hook_resid_post": (0,), "blocks.1.hook_resid_post": (1,)}[unit.site.hook]
        assert unit.site.kind == "direction" and unit.site.positions == where and unit.site.basis is not None
        later = unit.site.basis[2:, 0].abs()
        assert later[number] > 3 * later[1 - number]
    evidence = verify(model, TURNED, found.alignment, bits(400, 1))
    assert evidence.accuracy("first") == found.held_out["first"]
    assert evidence.accuracy("first", intervention="norm-matched random subspace") < 0.9


def test_a_learnt_direction_depends_on_the_seed_alone():
    found = [align(turned(45), TURNED, bits(100, 0), bits(100, 1), subspace=1, seed=seed) for seed in (0, 0, 1)]
    bases = [f.alignment.units["first"][0].site.basis for f in found]
    assert torch.equal(bases[0], bases[1]) and not torch.equal(bases[0], bases[2])


def test_passes_with_a_subspace_are_counted_as_they_were_made(monkeypatch: pytest.MonkeyPatch):
    model = turned(45)
    calls = counted_backward(monkeypatch)
    found, rows = counted(model, lambda: align(model, TURNED, bits(64, 0), bits(64, 1), subspace=1))
    assert rows == found.forward * 32 + 64 * (2 + 2 * 2)
    assert calls[0] == found.backward == 2 * (4 + 24)  # 32 pairs are one step of learning
    assert found.forward <= 4 + 5 + 2 * (32 + 3 + 28)


def test_a_direction_is_learnt_where_answers_stand_at_another_position_in_each_example():
    model, pairs, held_out = turned(45), bits(300, 0), bits(300, 1)

    def moved(some: Pairs) -> Pairs:
        first = torch.arange(300) % 2 == 0  # these are read at the first position, where the token itself stands
        sides = {}
        for name in ("base", "source"):
            side = getattr(some, name)
            labels = torch.where(first[:, None], side.labels.flip(1), side.labels)
            sides[name] = replace(side, labels=labels)
        return replace(some, **sides)

    found = align(model, TURNED, moved(pairs), moved(held_out), subspace=1, variables=("first",))
    assert found.held_out["first"] > 0.99


def test_units_at_a_position_are_sought_there_alone():
    model = turned(0)
    here, there = (
        align(model, TURNED, bits(100, 0), bits(100, 1), units=tls.neurons(model).at(where), variables=("first",))
        for where in ((0,), slice(0, 1))
    )
    assert [unit.name for unit in here.alignment.units["first"]] == ["L0N0@0"]
    assert here.alignment == there.alignment and here.exhaustive == there.exhaustive == 4 + 1
    everywhere = align(model, TURNED, bits(100, 0), bits(100, 1), units=tls.neurons(model), variables=("first",))
    assert everywhere.exhaustive == 2 * 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_variables_of_a_trained_transformer_are_found(seed: int):
    task = load_task("hierarchical_equality")
    model: Any = task.model()
    pairs, held_out = task.pairs(512, seed), task.pairs(1024, seed + 50)
    before = fingerprint(model)
    found, rows = counted(model, lambda: align(model, task.causal_model, pairs, held_out, variables=EVERY))
    assert found.held_out["left"] == 1
    assert found.held_out["right"] >= 0.95 and found.held_out["same"] >= 0.97
    assert found.exhaustive == 780 * 5 + 1
    assert rows == found.forward * 256 + 1024 * (2 + 2 * len(EVERY))
    assert rows <= found.exhaustive * 256 / 5
    assert fingerprint(model) == before


@pytest.mark.slow
def test_a_wrong_model_of_a_trained_transformer_is_not_aligned():
    task = load_task("hierarchical_equality")
    found = align(task.model(), task.causal_models["crossed"], task.pairs(512, 0), task.pairs(1024, 50))
    assert all(accuracy < 0.8 for accuracy in found.held_out.values())


def test_an_answer_that_is_no_choice_is_refused():
    model = native()
    pairs = answered_by(model, native_pairs(200))
    few = ((pairs.base.labels[:, 3] < 3) & (pairs.source.labels[:, 3] < 3)).nonzero().flatten()
    pairs = pairs[few]
    base, source = (replace(side, choices=torch.arange(3)) for side in (pairs.base, pairs.source))
    pairs = replace(pairs, base=base, source=source)
    assert 3 in pairs.expected(PARITY, ("odd",))
    with pytest.raises(ValueError, match=r"answer 3 \(a token\) is not among the choices of the pairs"):
        align(model, PARITY, pairs, pairs, units=tls.heads(model), variables=["odd"], trials=2)
