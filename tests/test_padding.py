"""Padding never matters: its side, its length and the token that fills it change no number, under every intervention;
and a named position that is padding is refused by every entry that runs the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import LENGTH, NoCasts, bridge, fresh, random_mask, reduction_of, seeded, unchecked, units_of

import tl_sparsify as tls
from tl_sparsify import baselines, constants, curvature, score
from tl_sparsify.abstraction.interchange import TestedModel as Subject
from tl_sparsify.abstraction.interchange import answers, logits
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import InterventionDistribution, checked_partners, lone, partners
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.measure import risk
from tl_sparsify.core.units import Units

N, LONGEST = 32, 7
SHUFFLED = InterventionDistribution.interchange(0.4)
Side = Literal["left", "right"]


def prompts(
    side: Side = "right", filler: int = 0, width: int = LONGEST, lengths: tuple[int, ...] = (4, 5, 6, 7)
) -> Examples:
    """32 prompts of 4 to 7 tokens, eight of each length, each with an answer at its last one."""
    tokens = torch.full((N, width), filler)
    mask, labels = torch.zeros(N, width, dtype=torch.bool), torch.full((N, width), -100)
    for i in range(N):
        length = lengths[i % len(lengths)]
        start = width - length if side == "left" else 0
        words = torch.randint(11, (length + 1,), generator=seeded(i))
        tokens[i, start : start + length] = words[:-1]
        mask[i, start : start + length] = True
        labels[i, start + length - 1] = words[-1]
    return Examples(tokens, labels, mask)


PADDED = {
    f"{side}, {filler}, {width}": (side, filler, width)
    for side, filler, width in (
        ("right", 0, LONGEST),
        ("left", 0, LONGEST),
        ("right", 9, LONGEST),
        ("left", 9, LONGEST + 1),
        ("right", 0, LONGEST + 1),
    )
}


def fixed(model: Any, units: Units | None = None) -> Any:
    units = units_of(model) if units is None else units
    return reduction_of(model, random_mask(units, 3), units=units)


def evaluated(ablation: Any = None) -> Callable[[Any, Examples], list[float]]:
    def run(model: Any, data: Examples) -> list[float]:
        found = tls.evaluate(model, fixed(model), data, ablation=ablation, probability=0.4, seed=1)
        numbers = [found.risk.mean, found.interchange_risk.mean, found.interchange_agreement, found.faithfulness]
        return [*numbers, found.completeness, *(end for pair in found.intervals.values() for end in pair)]

    return run


def scored(method: Callable[..., Any], **settings: Any) -> Callable[[Any, Examples], list[float]]:
    return lambda model, data: method(model, data, units_of(model), seed=1, **settings).scores.tolist()


def values(method: Callable[..., Any]) -> Callable[[Any, Examples], list[float]]:
    return lambda model, data: torch.cat([v.flatten() for v in method(model, data, units_of(model)).tensors]).tolist()


NUMBERS: dict[str, Callable[[Any, Examples], list[float]]] = {
    "risk": lambda m, d: [risk(m, fixed(m), d).mean],
    "risk under interchange": lambda m, d: [risk(m, fixed(m), d, interventions=SHUFFLED, seed=2).mean],
    "evaluate": evaluated(),
    "evaluate, zero": evaluated("zero"),
    "evaluate, counterfactual": evaluated("counterfactual"),
    "score.risk": scored(score.risk),
    "score.risk under interchange": scored(score.risk, interventions=SHUFFLED),
    "score.variance": scored(score.variance),
    "score.scaled_variance": scored(score.scaled_variance),
    "score.gradient": scored(score.gradient),
    "score.gradient, shuffled": scored(score.gradient, source="shuffled"),
    "score.integrated, shuffled": scored(score.integrated, source="shuffled"),
    "score.exact, shuffled": scored(score.exact, source="shuffled", progress=False),
    "score.exact under interchange": scored(score.exact, interventions=SHUFFLED, progress=False),
    "activation_patching": scored(baselines.activation_patching, progress=False),
    "attribution_patching": scored(baselines.attribution_patching),
    "eap_ig": scored(baselines.eap_ig),
    "activation_norm": scored(baselines.activation_norm),
    "constants.mean": values(constants.mean),
    "constants.curvature_weighted": values(constants.curvature_weighted),
    "constants.newton": values(constants.newton),
}


@pytest.mark.filterwarnings("ignore:Newton constants")
@pytest.mark.parametrize("name", NUMBERS)
def test_one_number_whatever_the_padding(name: str):
    model = bridge(n_ctx=LONGEST + 1)
    with NoCasts():
        found = [torch.tensor(NUMBERS[name](model, prompts(*how))).double() for how in PADDED.values()]
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-10, atol=1e-12), (other - found[0]).abs().max()
    assert bool((found[0] != 0).any())


def test_partners_are_other_examples_of_the_same_length():
    data = prompts()
    assert data.attention_mask is not None
    for seed in range(5):
        partner = partners(data, seed, 17)
        assert sorted(partner.tolist()) == list(range(N)) and bool((partner != torch.arange(N)).all())
        assert torch.equal(data.attention_mask[partner], data.attention_mask)
        assert torch.equal(partner, partners(prompts("left", 9, LONGEST + 1), seed, 17))
    plain = Examples(data.tokens, data.labels)
    assert not bool(lone(plain).any()) and len(set(partners(plain, 0, 17).tolist())) == N


def test_an_example_without_a_partner_is_refused_by_its_length():
    whole = prompts()
    data = whole[torch.tensor([0, 4, 1, 8])]  # lengths 4, 4, 5, 4
    assert lone(data).tolist() == [False, False, True, False]
    with pytest.raises(
        ValueError, match=r"1 of 4 have no partner .*first: number 2, 5 positions.*counterfactual_tokens"
    ):
        checked_partners(data, 0, 17)
    model = bridge()
    for call in (
        lambda: score.risk(model, data, units_of(model), interventions=SHUFFLED),
        lambda: tls.evaluate(model, fixed(model), data, ablation="counterfactual"),
        lambda: baselines.activation_patching(model, data, units_of(model), progress=False),
    ):
        with pytest.raises(ValueError, match="no partner of their own length"):
            call()


def test_evaluation_interchanges_those_that_have_a_partner_and_says_how_many():
    model, whole = bridge(), prompts()
    some = torch.tensor([0, 4, 1, 8])
    found = tls.evaluate(model, fixed(model), whole[some], probability=0.5)
    only = tls.evaluate(model, fixed(model), whole[some[[0, 1, 3]]], probability=0.5)
    assert (found.risk.n, found.interchange_risk.n) == (4, 3)
    assert found.interchange_risk == only.interchange_risk
    none = tls.evaluate(model, fixed(model), whole[:4], probability=0.5)
    assert none.interchange_risk.n == 0 and none.interchange_risk.mean != none.interchange_risk.mean


# Named positions


def called(method: Callable[..., Any], model: Any, units: Units, data: Examples) -> Any:
    return method(model, data, units)


def entries(model: Any, units: Units) -> dict[str, Callable[[Examples], Any]]:
    reduction = fixed(model, units)
    circuit = Circuit.full(units)
    means = reduction.values
    named = {
        f"score.{name}": partial(called, getattr(score, name), model, units)
        for name in ("risk", "variance", "scaled_variance", "gradient", "integrated", "exact")
    }
    named |= {
        f"baselines.{name}": partial(called, getattr(baselines, name), model, units)
        for name in ("activation_norm", "activation_patching", "attribution_patching", "eap", "hard_concrete")
    }
    named |= {
        f"constants.{name}": partial(called, getattr(constants, name), model, units)
        for name in ("mean", "curvature_weighted", "newton", "zero")
    }
    return named | {
        "run_values": lambda d: tls.run_values(model, d, units),
        "risk": lambda d: risk(model, reduction, d),
        "additivity": lambda d: score.additivity(model, d, reduction),
        "evaluate": lambda d: tls.evaluate(model, reduction, d),
        "refit": lambda d: constants.refit(model, reduction, d, d, steps=2),
        "sparsify": lambda d: tls.sparsify(model, d, units, rounds=2),
        "sparsify_affine": lambda d: tls.sparsify_affine(model, d, units, sizes=(0.5,)),
        "uniformity": lambda d: curvature.uniformity(model, d, units),
        "polish": lambda d: tls.polish(model, reduction, d),
        "full circuit": lambda d: score.exact(model, d, circuit.units, values=means),
    }


NAMES = sorted(entries(bridge(), units_of(bridge()).at(-1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "position"), [("right", -1), ("left", 0)])
def test_a_named_position_that_is_padding_is_refused(name: str, side: Side, position: int):
    model, data = bridge(), prompts(side)
    call = entries(model, units_of(model).at(position))[name]
    with pytest.raises(
        ValueError, match=rf"positions {position} of blocks.* are padding in .* examples .*pad on the other side"
    ):
        call(data)


@pytest.mark.parametrize(
    ("where", "side", "fine"),
    [
        (-1, "left", True),
        (0, "right", True),
        (3, "right", True),
        (4, "right", False),
        ((0, 4), "right", False),
        (slice(1, None), "right", True),
        (slice(1, None), "left", False),
        (slice(0, 4), "right", True),
        (slice(0, 5), "right", False),
        (slice(-4, None), "left", True),
        (slice(-5, None), "left", False),
        (slice(None, -1), "left", True),
        (torch.arange(N) % 4 + 3, "right", True),
        (torch.arange(N) % 4 + 4, "right", False),
    ],
)
def test_which_positions_are_padding(where: Any, side: Side, fine: bool):
    model, data = bridge(), prompts(side, width=LONGEST + 1 if isinstance(where, torch.Tensor) else LONGEST)
    units = units_of(model).at(where)
    if fine:
        assert bool(torch.isfinite(score.risk(model, data, units).scores).all())
        return
    for size in (None, 1, 5):
        with pytest.raises(ValueError, match="are padding in"):
            score.risk(model, data, units, batch_size=size)


def test_without_a_mask_every_position_is_input():
    model, data = bridge(), prompts(lengths=(LENGTH,), width=LENGTH)
    assert torch.equal(
        score.risk(model, data, units_of(model).at(-1)).scores,
        score.risk(model, replace(data, attention_mask=None), units_of(model).at(-1)).scores,
    )


@pytest.mark.parametrize(
    "bad", [(), [], "", 1.5, (1.0,), True, slice(0.5, 2), torch.tensor([0.5]), torch.tensor(3), {}]
)
def test_positions_that_are_none_are_refused(bad: Any):
    with unchecked(), pytest.raises(ValueError, match=r"positions of blocks.* are .*: give an integer"):
        units_of(bridge()).at(bad)


def test_a_slice_that_selects_nothing_is_refused():
    model, data = bridge(), prompts(lengths=(LENGTH,), width=LENGTH)
    for where in (slice(5, None), slice(3, 2), slice(99, 120)):
        with pytest.raises(ValueError, match="select nothing of an input of length 5"):
            score.risk(model, data, units_of(model).at(where))


def test_a_unit_at_the_beginning_of_sequence_token_alone_has_the_mean_there():
    model, data = fresh(), prompts(lengths=(LENGTH,), width=LENGTH)
    tokens = data.tokens.index_fill(1, torch.tensor([0]), 7)
    units = units_of(model)
    with torch.no_grad(), recorded(model, units) as recording:
        model(tokens)
    model.tokenizer = SimpleNamespace(bos_token_id=7)
    found = constants.mean(model, replace(data, tokens=tokens), units.at(0))
    for mean, v in zip(found.tensors, recording.read(), strict=True):
        assert torch.allclose(mean, v[:, 0].mean(0), rtol=1e-10) and bool(mean.any())


# Pairs


def of_length(lengths: tuple[int, ...], side: Side) -> tuple[Examples, dict[str, np.ndarray]]:
    data = prompts(side, lengths=lengths)
    return data, {"x": np.arange(N)}


def pairs_of(base: tuple[int, ...], source: tuple[int, ...], side: Side) -> tls.Pairs:
    (one, first), (two, second) = of_length(base, side), of_length(source, side)
    return tls.Pairs(first, second, one, two, {i: i % 11 for i in range(N)})


COPY = tls.CausalModel(inputs=("x",), mechanisms={"v": lambda x: x, "y": lambda v: v}, output="y")


BASE, SOURCE = (4, 5, 6, 7), (5, 4, 6, 4)


def test_units_at_all_positions_are_taken_where_both_inputs_have_one_counted_from_the_end():
    model = bridge()
    units = units_of(model)
    names = ["L0H0", "L0N3", "L1H1"]
    for side in ("left", "right"):
        other = pairs_of(BASE, SOURCE, side)
        with NoCasts():
            [found] = logits(Subject("original", model), other.base, [[([units[n] for n in names], other.source)]])
        for i in range(N):
            base, source = (part.tokens[i][part.attention_mask[i]][None] for part in (other.base, other.source))  # type: ignore[index]
            both = min(base.shape[1], source.shape[1])
            with torch.no_grad(), recorded(model, units) as recording:
                model(source)
            taken = tls.Values(units.at(slice(-both, None)), tuple(_last(v, both, base) for v in recording.read()))
            circuit = Circuit.of(taken.units, [units[name].at(slice(-both, None)) for name in names])
            with torch.no_grad(), tls.intervened(model, tls.interchange(circuit, taken)):
                wanted = model(base)[0, -1]
            assert torch.allclose(found[i], wanted, rtol=1e-10)


def _last(v: torch.Tensor, both: int, base: torch.Tensor) -> torch.Tensor:
    """A source's last values as if it were as long as the base: what stands before is not meant."""
    padded = torch.full((1, base.shape[1], *v.shape[2:]), float("nan"), dtype=v.dtype)
    padded[:, -both:] = v[:, -both:]
    return padded.nan_to_num(0.0)


@pytest.mark.parametrize("draws", [0, 2])
def test_evidence_of_pairs_of_other_lengths_does_not_depend_on_padding(draws: int):
    model, frames = bridge(n_ctx=LONGEST + 1), []
    units = units_of(model)
    everywhere = tls.Alignment({"v": [units["L0H0"], units["L1N2"]]})
    for side, filler, width in PADDED.values():
        base, source = prompts(side, filler, width, BASE), prompts(side, filler, width, SOURCE)
        rows = {"x": np.arange(N)}
        pairs = tls.Pairs(rows, rows, base, source, {i: i % 11 for i in range(N)})
        with NoCasts():
            reduced = reduction_of(model, random_mask(units, 3))
            frames.append(tls.verify(model, COPY, everywhere, pairs, reduced=reduced, draws=draws).to_frame())
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], rtol=1e-10)


def test_a_named_position_that_is_padding_in_one_of_a_pair_is_refused():
    model, left, right = bridge(), *(pairs_of(BASE, SOURCE, side) for side in ("left", "right"))
    last = [units_of(model)["L0H0"].at(-1)]
    [found] = answers(Subject("original", model), left.base, [[(last, left.source)]])
    assert len(found) == N  # what is the last position in both may be taken
    with pytest.raises(ValueError, match=r"positions -1 .* are padding"):
        answers(Subject("original", model), right.base, [[(last, right.source)]])
    with pytest.raises(ValueError, match=r"base has tokens of shape \(32, 7\), source \(32, 8\): pad both"):
        tls.Pairs(left.base_inputs, left.source_inputs, left.base, prompts(width=8), left.answers)


@pytest.mark.parametrize(("where", "first"), [(slice(-4, None), 0), (slice(None, -1), 1)])
def test_a_slice_is_taken_where_both_inputs_have_it(where: slice, first: int):
    """Left padding: the slice that names its ends counted from the end is the same in both."""
    model, other = bridge(), pairs_of(BASE, SOURCE, "left")
    units = units_of(model)
    with NoCasts():
        [found] = logits(Subject("original", model), other.base, [[([units["L0H0"].at(where)], other.source)]])
        for i in range(N):
            both = min(int(part.attention_mask[i].sum()) for part in (other.base, other.source))  # type: ignore[union-attr]
            places = torch.arange(LONGEST - both, LONGEST - first) if first else torch.arange(LONGEST - 4, LONGEST)
            named = units["L0H0"].at(tuple(places.tolist()))
            [wanted] = logits(Subject("original", model), other.base[i : i + 1], [[([named], other.source[i : i + 1])]])
            assert torch.allclose(found[i : i + 1], wanted, rtol=1e-10)


@pytest.mark.parametrize("draws", [0, 2])
def test_evidence_does_not_depend_on_padding(draws: int):
    model, frames = bridge(n_ctx=LONGEST + 1), []
    units = units_of(model)
    for side, filler, width in PADDED.values():
        data = prompts(side, filler, width)
        assert data.attention_mask is not None
        first = data.attention_mask.int().argmax(1)
        partner = partners(data, 0, 1)
        pairs = tls.Pairs(
            {"x": np.arange(N)}, {"x": partner.numpy()}, data, data[partner], {i: i % 11 for i in range(N)}
        )
        alignment = tls.Alignment({"v": [units["L0H0"].at(first), units["L1N2"].at(first + 2)]})
        with NoCasts():
            reduced = reduction_of(model, random_mask(units, 3))
            frames.append(tls.verify(model, COPY, alignment, pairs, reduced=reduced, draws=draws).to_frame())
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0], rtol=1e-10)


def test_values_of_a_run_of_another_width_are_refused_by_both_shapes():
    model = bridge(n_ctx=LONGEST + 1)
    values = tls.run_values(model, prompts(width=8), units_of(model))
    with pytest.raises(
        ValueError, match=r"values of blocks.0.attn.hook_z are those of a run of shape \(32, 8\), .*\(32, 7\)"
    ):
        with tls.intervened(model, tls.interchange(Circuit.full(units_of(model)), values)):
            model(prompts().tokens)


def test_inputs_with_holes_have_partners_with_the_same_holes():
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]).bool()
    data = Examples(torch.ones(5, 4, dtype=torch.long), torch.tensor([[-100, -100, -100, 1]] * 5), mask)
    assert partners(data, 0, 1).tolist() == [2, 3, 0, 1, 4] and lone(data).tolist() == [False] * 4 + [True]
