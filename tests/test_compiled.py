"""Compiled tasks: the network answers what the program says, on every input; what is said to be known of its units is
measured again here; each variable is where it is said to be, in the original and in a folded model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.tasks.compiled import TOLERANCE, Layout, Program, effects, needed, redundant, working

NAMES = ("tracr_reverse", "tracr_frac_prevs", "tracr_sort", "tracr_hist")
FOLDER = Path(__file__).parent.parent / "tasks"
every_task = pytest.mark.parametrize("name", NAMES)

# The programs once more, on strings of characters, without arrays.
ANSWER: dict[str, Callable[[str], str]] = {
    "tracr_reverse": lambda text: text.replace("_", "")[::-1][0],
    "tracr_frac_prevs": lambda text: str(Fraction(sum(letter in "aei" for letter in text[:4]), 4)),
    "tracr_sort": lambda text: sorted(text)[2],
    "tracr_hist": lambda text: str(text.count(text[2])),
}


@cache
def program(name: str) -> Program:
    task = tls.load_task(name)
    return sys.modules[f"tl_sparsify_task_{task.name}"].program()


@cache
def model_of(name: str) -> Any:
    return program(name).task().model()


@cache
def units_of(name: str) -> tls.Units:
    return tls.heads(model_of(name)) + tls.neurons(model_of(name))


def metrics(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "model" / "metrics.json").read_text())


def shipped(name: str) -> dict[str, Tensor]:
    """The weights in the file, by the native model's names."""
    weights = load_file(FOLDER / name / "model" / "model.safetensors")
    return {key.replace("._original_component", ""): tensor for key, tensor in weights.items()}


def some(examples: tls.Examples, size: int = 4500) -> tls.Examples:
    """Every one of few examples, evenly spaced ones of many."""
    return examples[torch.arange(0, len(examples), -(-len(examples) // size))]


def texts(name: str, examples: tls.Examples) -> list[str]:
    """The inputs as their programs take them."""
    tokens = program(name).layout.tokens
    assert {tokens[row[0]] for row in examples.tokens.tolist()} == {"BOS"}
    return ["".join(tokens[token] for token in row[1:]) for row in examples.tokens.tolist()]


def outputs(name: str, examples: tls.Examples, *interventions: tls.Intervention) -> Float[Tensor, "n outputs"]:
    """The logits where the answer is read."""
    with torch.no_grad(), tls.intervened(model_of(name), *interventions):
        parts = [model_of(name)(batch.tokens)[batch.labels != -100] for _, batch in examples.batches(4096)]
    return torch.cat(parts)


def kept(name: str, names: Collection[str], examples: tls.Examples) -> Float[Tensor, "n outputs"]:
    """The logits with all units at zero but the named ones."""
    units = units_of(name)
    zero = tls.constants.zero(model_of(name), examples, units)
    return outputs(name, examples, tls.ablate(tls.Reduction(tls.Circuit.of(units, names), zero)))


@every_task
def test_the_network_answers_what_the_program_says_on_every_input(name: str):
    pool = program(name).pool()
    names = program(name).layout.outputs
    answers = [names[i] for i in outputs(name, pool).argmax(1).tolist()]
    assert answers == [ANSWER[name](text) for text in texts(name, pool)]
    assert len(pool) == metrics(name)["test_space"]["every input"]["n"] == len(set(texts(name, pool)))


def test_reversal_is_right_on_strings_that_are_in_no_split_too():
    module = sys.modules["tl_sparsify_task_tracr_reverse"] if program("tracr_reverse") else None
    strings = module.every_input()  # type: ignore[union-attr]
    examples = program("tracr_reverse").encode(program("tracr_reverse").named(strings))
    assert len(examples) == sum(6**length for length in range(1, 7))
    names = program("tracr_reverse").layout.outputs
    answers = [names[i] for i in outputs("tracr_reverse", examples).argmax(1).tolist()]
    assert answers == [ANSWER["tracr_reverse"](text) for text in texts("tracr_reverse", examples)]


@every_task
def test_the_answers_logit_is_one_and_all_others_are_zero(name: str):
    pool = program(name).pool()
    wanted = torch.nn.functional.one_hot(pool.labels[pool.labels != -100], len(program(name).layout.outputs))
    torch.testing.assert_close(outputs(name, pool), wanted.float(), atol=2e-3, rtol=0)


@every_task
def test_the_residual_stream_is_labelled(name: str):
    """The embedding of token and position is at the coordinates with their labels."""
    layout, weights = program(name).layout, shipped(name)
    embedding, positions = weights["embed.weight"], weights["pos_embed.weight"]
    for token, row in zip(layout.tokens, embedding, strict=True):
        assert row[layout.residual.index(f"tokens:{token}")] == row[layout.residual.index("one")] == 1 == row.sum() / 2
    for index, row in enumerate(positions[1:]):
        assert row[layout.residual.index(f"indices:{index}")] == 1 == row.sum()


def test_an_unknown_variable_has_no_coordinates():
    with pytest.raises(KeyError, match="'width'; there are hist, hist_selector_width_attn_output, indices"):
        Layout.load(FOLDER / "tracr_hist" / "model").directions("width", 0, 3)


@every_task
def test_the_working_units_are_those_whose_weights_are_not_zero(name: str):
    """Read from the file: what is shipped, not what a model makes of it."""
    weights = shipped(name)
    found: dict[str, list[str]] = {"H": [], "N": []}
    for layer in range(model_of(name).cfg.n_layers):
        part = {key: weights[f"blocks.{layer}.{key}"] for key in ("attn.v.weight", "attn.v.bias", "attn.o.weight")}
        moved = part["attn.o.weight"] @ torch.cat([part["attn.v.weight"], part["attn.v.bias"][:, None]], 1)
        found["H"] += [f"L{layer}H0"] if bool((moved != 0).any()) else []
        into = weights[f"blocks.{layer}.mlp.in.weight"].abs().sum(1)
        into = into + weights[f"blocks.{layer}.mlp.in.bias"].abs()
        out = weights[f"blocks.{layer}.mlp.out.weight"].abs().sum(0)
        found["N"] += [f"L{layer}N{i}" for i in ((into > 0) & (out > 0)).nonzero().flatten().tolist()]
    assert program(name).truth["weights"] == tuple(found["H"] + found["N"]) == working(model_of(name))


@every_task
def test_the_needed_units_are_those_whose_removal_changes_an_output(name: str):
    """By the weights that read them, set to zero one after the other: no hook."""
    pool = some(program(name).pool(), 1500)
    original, changed = outputs(name, pool), []
    for unit in units_of(name):
        block = model_of(name).blocks[unit.site.layer]
        weight = (block.attn.o if unit.site.kind == "head" else block.mlp.out).weight
        was = weight.data.clone()
        if unit.site.kind == "head":
            weight.data.zero_()  # there is one head in a layer
        else:
            weight.data[:, unit.index] = 0
        try:
            moved = (outputs(name, pool).log_softmax(1) - original.log_softmax(1)).abs().max()
        finally:
            weight.data.copy_(was)
        assert moved < 1e-3 or moved > 0.1, unit  # nothing between: it is known
        changed += [unit.name] if moved > 0.1 else []
    assert set(changed) == set(program(name).truth["removal"])


@every_task
def test_removal_and_redundant_units_are_enough(name: str):
    pool, truth, found = program(name).pool(), program(name).truth, metrics(name)
    original = outputs(name, pool)
    torch.testing.assert_close(kept(name, (*truth["removal"], *found["redundant"]), pool), original, atol=2e-3, rtol=0)
    enough = bool(torch.allclose(kept(name, truth["removal"], pool), original, atol=2e-3, rtol=0))
    assert enough == (not found["redundant"])
    assert set(truth["removal"]) <= set(truth["weights"])
    assert found["truth"] == {key: len(names) for key, names in truth.items()}
    assert not set(found["redundant"]) & set(truth["removal"])


def test_the_keys_of_fives_stand_in_for_each_other():
    """What the card of the sorting program says of L0N24 to L0N29."""
    name = "tracr_sort"
    pool, truth = program(name).pool(), program(name).truth
    fives = tuple(f"L0N{i}" for i in range(24, 30))
    assert tuple(metrics(name)["redundant"]) == fives
    everything, original = set(units_of(name).names), outputs(name, pool)
    for unit in fives:
        torch.testing.assert_close(kept(name, everything - {unit}, pool), original, atol=2e-3, rtol=0)
    without = kept(name, everything - set(fives), pool)
    lost = (without - original).abs().amax(1) > 2e-3
    assert float(without[lost].abs().max()) < 2e-3  # nothing is selected
    answers = [ANSWER[name](text) for text in texts(name, pool)]
    assert lost.tolist() == [answer == "5" for answer in answers]
    assert all(text.count("5") >= 4 for text, gone in zip(texts(name, pool), lost.tolist(), strict=True) if gone)
    torch.testing.assert_close(kept(name, (*truth["removal"], *fives[:3]), pool), original, atol=2e-3, rtol=0)


def test_needed_units_are_those_with_an_effect():
    name = "tracr_hist"
    pool = some(program(name).pool(), 500)
    alone = effects(model_of(name), pool, units_of(name))
    assert needed(model_of(name), pool, units_of(name)) == tls.Circuit(units_of(name), alone > TOLERANCE).names
    assert needed(model_of(name), pool, units_of(name), tolerance=float(alone.max())) == ()


@pytest.mark.slow
@every_task
def test_the_shipped_truth_and_redundancy_are_measured_again(name: str):
    model, pool, units = model_of(name), program(name).pool(), units_of(name)
    truth, found, few = program(name).truth, metrics(name), some(pool, 1500)
    mask = tls.Circuit.of(units, truth["removal"]).mask
    alone = effects(model, few, units)
    assert torch.equal(alone > TOLERANCE, mask)
    assert redundant(model, few, units, truth["removal"]) == tuple(found["redundant"])
    assert not bool((~mask).any()) or float(alone[~mask].max()) < 1e-8
    # the least effect of a needed unit on every input: none has less there than on a part of them
    original, least = outputs(name, pool).log_softmax(1), float("inf")
    for number in alone.where(mask, float("inf")).argsort().tolist():
        if float(alone[number]) >= least:
            break
        without = kept(name, set(units.names) - {units.names[number]}, pool).log_softmax(1)
        least = min(least, float((original.exp() * (original - without)).sum(1).max()))
    assert least == pytest.approx(found["least_nats_of_needed"], abs=1e-4)


@every_task
@pytest.mark.parametrize("which", ["alignment", "directions"])
def test_each_variable_is_where_it_is_said_to_be(name: str, which: str):
    task, alignment = program(name).task(), getattr(program(name), which)
    assert set(alignment.variables) == set(task.causal_model.variables) - {"string"}
    evidence = tls.verify(model_of(name), task.causal_model, alignment, task.pairs(256, 3), draws=1)
    for variable in alignment.variables:
        assert evidence.accuracy(variable) == 1, variable
        assert evidence.accuracy(variable, intervention="do nothing") == 0.5, variable


@every_task
def test_units_outside_the_alignment_carry_nothing(name: str):
    task, pairs = program(name).task(), program(name).pairs(256, 4)
    aligned = {unit.at(None).name for units in task.alignment.units.values() for unit in units}
    outside = [unit.name for unit in units_of(name) if unit.name not in aligned]
    if not outside:
        pytest.skip("every unit is aligned")
    circuit = tls.Circuit.of(units_of(name), outside)
    source = tls.run_values(model_of(name), pairs.source, units_of(name))
    swapped = outputs(name, pairs.base, tls.interchange(circuit, source))
    torch.testing.assert_close(swapped, outputs(name, pairs.base), atol=2e-3, rtol=0)


@every_task
def test_a_folded_model_of_the_working_units_is_the_same_and_has_the_same_variables(name: str):
    task, model, units = program(name).task(), model_of(name), units_of(name)
    _, _, test = task.examples(0)
    zero = tls.constants.zero(model, test, units)
    small = tls.fold(model, tls.constants.reduced(model, tls.Circuit.of(units, task.truth["weights"]), zero, "zero"))
    with torch.no_grad():
        torch.testing.assert_close(small(test.tokens), model(test.tokens), atol=1e-4, rtol=0)
    evidence = tls.verify(model, task.causal_model, task.alignment, task.pairs(128, 0), reduced=small, draws=0)
    assert all(evidence.accuracy(variable, "reduced") == 1 for variable in task.alignment.variables)


@every_task
def test_wrong_rivals_are_found_wrong_and_right_ones_right(name: str):
    task, pairs = program(name).task(), program(name).pairs(512, 5)
    own = pairs.base.labels[pairs.base.labels != -100]
    for rival, causal_model in task.causal_models.items():
        plain = float((pairs.expected(causal_model, ()) == own).double().mean())
        shared = tls.Alignment({v: u for v, u in task.alignment.units.items() if v in causal_model.variables})
        evidence = tls.verify(model_of(name), causal_model, shared, pairs, draws=0)
        found = [evidence.accuracy(variable) for variable in shared.variables]
        if rival not in task.wrong:
            assert plain == 1 and min(found) == 1, rival
        elif rival != "sides":  # which is wrong in variables that nothing is aligned with
            assert max(plain, *found) < 0.8, rival


def test_halves_are_coarser_variables_of_the_share():
    name = "tracr_frac_prevs"
    task, layout = program(name).task(), program(name).layout
    halves = task.causal_models["halves"]
    alignment = tls.Alignment(
        {"first": layout.some_neurons(0, [0], (1, 2)), "second": layout.some_neurons(0, [0], (3, 4))}
    )
    evidence = tls.verify(model_of(name), halves, alignment, task.pairs(256, 6), draws=0)
    assert [evidence.accuracy(variable) for variable in halves.variables[:2]] == [1, 1]


def test_the_two_sides_of_a_letter_are_no_variables():
    """The card says that no unit has ``before``: not even everything at the letters before the answer."""
    name = "tracr_hist"
    task, pairs = program(name).task(), program(name).pairs(256, 6)
    sites = units_of(name) + tls.residuals(model_of(name))
    for places in (1, 2, (1, 2), 3):
        for site in sites.at(places).sites:
            units = tls.Units((site,))
            source = tls.run_values(model_of(name), pairs.source, units)
            answer = outputs(name, pairs.base, tls.interchange(tls.Circuit.full(units), source)).argmax(1)
            expected = pairs.expected(task.causal_models["sides"], ("before",))
            assert float((answer == expected).double().mean()) < 0.9


@every_task
@pytest.mark.parametrize(("n", "seed"), [(512, 0), (100, 9)])
def test_pairs_are_balanced_for_every_variable(name: str, n: int, seed: int):
    task = program(name).task()
    pairs = task.pairs(n, seed)
    own = pairs.base.labels[pairs.base.labels != -100]
    for variable in task.causal_model.variables:
        assert int((pairs.expected(task.causal_model, (variable,)) == own).sum()) == n / 2, variable


@every_task
def test_search_keeps_what_is_needed_and_removes_what_is_not(name: str):
    """With zeros for removed units, but for one unit: in saturated models an expansion sees the right order, as a rule,
    in gradients near round-off (the head of the reversing program comes last but one)."""
    task, model, units = program(name).task(), model_of(name), units_of(name)
    train, _, test = task.examples(0)
    size = len(task.truth["removal"]) + len(metrics(name)["redundant"]) + 1
    zero = tls.constants.zero(model, train, units)
    fractions = [f for f in (0.5, 0.25) if f * len(units) > size] + [size / len(units)]
    path = tls.sparsify(model, train, units, sizes=fractions, values=zero, progress=False)
    found = path.rounds[-1].reduction
    assert len(found.circuit) == size
    assert tls.Circuit.of(units, task.truth["removal"]) <= found.circuit
    assert tls.risk(model, found, test).mean < 1e-6


@every_task
def test_an_expansion_does_not_see_what_the_first_head_is_worth(name: str):
    """The limit that the cards state: saturated attention has no gradient, and removal costs what it costs."""
    model, units, found = model_of(name), tls.heads(model_of(name)), metrics(name)["first_head"]
    _, _, test = program(name).examples(0)
    zero = tls.constants.zero(model, test, units)
    number = units.index(found["unit"])
    assert float(tls.score.risk(model, test, units, values=zero, seed=0).scores[number]) < 1e-10 > found["risk"]
    exact = float(tls.score.exact(model, test, units, values=zero, progress=False).scores[number])
    assert exact == pytest.approx(found["exact"], abs=1e-4) and exact > 0.05
    text = (FOLDER / name / "README.md").read_text().replace("\n  ", " ")
    assert f"risk of {found['unit']} is below 1e-10 nats, and removing it costs {found['exact']:.3f}" in text


@every_task
def test_the_cards_tables_are_those_of_the_metrics(name: str):
    lines, found = set((FOLDER / name / "README.md").read_text().splitlines()), metrics(name)
    variables = program(name).causal_model.variables
    for row, cells in found["interchange"].items():
        wanted = " | ".join("{:.3f} ({:.3f})".format(*cells[variable]) for variable in variables)
        assert f"| {row} | {wanted} |" in lines
    for rival, cells in found["rivals"].items():
        wanted = (f"{cells[v]:.3f}" if v in cells else "" for v in ("answers", *program(name).alignment.variables))
        assert f"| `{rival}` | {' | '.join(wanted)} |" in lines
    for row, cells in found["kept"].items():
        if found["redundant"] or "redundant" not in row:
            assert f"| {row} | {cells['units']} | {cells['nats']:g} | {cells['accuracy']:.3f} |" in lines


@every_task
def test_answers_are_equally_frequent_and_pools_hold_the_splits(name: str):
    everything = set(texts(name, program(name).pool()))
    for examples in program(name).examples(2):
        assert set(texts(name, examples)) <= everything
        counts = np.unique(examples.labels[examples.labels != -100].numpy(), return_counts=True)[1]
        assert len(set(counts.tolist())) == 1 and len(counts) == len(program(name).asked)


@pytest.mark.slow
@every_task
def test_compiling_again_gives_the_same_weights(name: str):
    pytest.importorskip("tracr", reason="the extra `tracr` is not installed")
    from tasks.compile_tracr import SOURCES, compile_native

    model, config, labels = compile_native(SOURCES[name])
    folder = FOLDER / name / "model"
    assert config == json.loads((folder / "config.json").read_text())
    assert labels == json.loads((folder / "labels.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
