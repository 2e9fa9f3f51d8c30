"""The plan of a run: what is refused, and how much work an effort is."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tokenized import ANSWERS, PROMPTS, bridge

from tl_sparsify import Examples, heads, neurons, plan
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.plan import Effort, Request, cut, seconds


class Large:
    """As far as its size is concerned."""

    def parameters(self) -> list[torch.Tensor]:
        return [torch.empty(20_000_001, device="meta")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.0}, "--keep is 0.0"),
        ({"rounds": 0}, "--rounds is 0; at least one is needed"),
        ({"steps": 0}, "--steps is 0; at least one is needed"),
        ({"examples": -1}, "--examples is -1; at least one is needed"),
        ({"batch_size": 0}, "--batch-size is 0; at least one is needed"),
        ({"seed": -1}, r"--seed is -1; it must lie in \[0, 2147483647\]"),
        ({"seed": 2**31}, "--seed is 2147483648"),
        ({"first_token": "some"}, "--first-token is 'some'; it is one of bos, any, none"),
        ({"first_token": "any"}, "--first-token is 'any'; .* does not fold: name bos or none"),
        ({"effort": "great"}, "--effort is 'great'; it is one of quick, standard, thorough"),
        ({"kinds": "heads,wings"}, "--units has 'wings'; the kinds are heads, neurons, attentions, mlps"),
        ({"kinds": "heads,mlps,neurons"}, "--units has neurons and mlps, which are made of them"),
        ({"kinds": "heads,heads"}, "it names a kind twice"),
    ],
)
def test_what_is_wrong_is_said_by_the_options_name(options: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Request(**options)


def test_a_small_model_has_the_packages_own_settings_by_default():
    found = Request().effort_for(bridge("GPT-2"))
    assert found == Effort() and (found.rounds, found.pairs, found.patience) == (20, 512, 300)
    assert (found.train, found.steps, found.inner, found.batch_size) == (None, None, None, None)
    assert (found.refit_batch, found.beside_batch, found.probes) == (512, 128, 4)


def test_a_large_model_has_many_examples_with_one_probe():
    for name, train, rounds in (("quick", 192, 10), ("standard", 512, 20), ("thorough", 1024, 20)):
        found = Request(effort=name).effort_for(Large())
        assert (found.train, found.probes, found.rounds) == (train, 1, rounds)


def test_a_quick_search_of_a_large_model_refits_at_its_end_only(timed: list[int]):
    model = bridge("GPT-2")
    some = Examples.from_prompts(model, PROMPTS * 4, ANSWERS * 4)
    assert Request(effort="quick").effort_for(Large()).inner == 0
    effort = Effort(rounds=4, pairs=1, steps=1, inner=1, patience=1)
    inside, after = (
        seconds(model, (some, some, some), heads(model), one, aligns=False, compares=False)
        for one in (effort, replace(effort, inner=0))
    )
    assert inside - after == pytest.approx(1.8 * 4 * ((8 + 3) + 12 * 8))


def test_steps_reach_every_refit_and_the_batch_size_too():
    found = Request(steps=30, batch_size=16, rounds=3, examples=40).effort_for(bridge("GPT-2"))
    assert (found.steps, found.inner, found.patience, found.rounds, found.train) == (30, 2, 30, 3, 40)
    assert found.most == 30  # as many steps as were asked for
    assert (found.batch_size, found.refit_batch, found.beside_batch) == (16, 16, 16)
    assert Request(steps=1).effort_for(bridge("GPT-2")).inner == 1
    assert Request(steps=300).effort_for(bridge("GPT-2")).inner == 20  # as without


@pytest.mark.parametrize("model", [Large(), bridge("GPT-2")])
def test_more_effort_is_more_of_everything(model: Any):
    quick, standard, thorough = (Request(effort=name).effort_for(model) for name in ("quick", "standard", "thorough"))
    for less, more in ((quick, standard), (standard, thorough)):
        for name in ("train", "validation", "test", "pairs", "rounds", "patience", "most"):
            few, many = getattr(less, name), getattr(more, name)
            assert many is None or few is None or few <= many, name
        assert less != more
    if isinstance(model, Large):
        assert quick.train is not None and quick.batch_size == quick.refit_batch == 32


def test_splits_are_cut():
    some = Examples.from_prompts(bridge("GPT-2"), PROMPTS, ANSWERS)
    assert [len(split) for split in cut((some, some, some), replace(Effort(), train=2, test=1))] == [2, 3, 1]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By a clock of its own a forward pass takes two seconds and half a second for each example, the first of all a
    hundred more, and a backward pass three; the sizes of the batches that were timed."""
    now, sizes = [0.0], []

    def forward(model: Any, batch: Examples) -> torch.Tensor:
        now[0] += 2 + 0.5 * len(batch) + (0 if sizes else 100)
        sizes.append(len(batch))
        return answer_logits(model, batch)

    def backward(*args: Any, **options: Any) -> Any:
        now[0] += 3
        return grad(*args, **options)

    grad = torch.autograd.grad
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(plan, "answer_logits", forward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    return sizes


def test_time_is_that_of_the_passes(timed: list[int]):
    model = bridge("GPT-2")
    some = Examples.from_prompts(model, PROMPTS * 4, ANSWERS * 4)
    splits, units = (some, some[:6], some[:2]), heads(model) + neurons(model)
    effort = Effort(rounds=4, pairs=1, steps=1, inner=1, patience=1)
    # a pass over train is 8 and over validation 5; each backward 3, of four probes that hold the slope
    search = 8 + (8 + 4 * 3) + 2 * 8 + 1.8 * 4 * ((8 + 4 * 3) + (5 + 4 * 3) + (11 + 12 * 5))
    alone = search + 2 * 8 + (11 + 12 * 5) + 9 * 3 + 38 * 2.5
    assert seconds(model, splits, units, effort, aligns=False, compares=False) == pytest.approx(alone)
    assert seconds(model, splits, units, effort, aligns=True, compares=False) == pytest.approx(alone + 30 * 2.5)
    verified = alone + 3 * (2 * (7 + 3) + 2) * 2.5  # of three layers
    told = seconds(model, splits, units, effort, aligns=False, compares=False, variables=3)
    assert told == pytest.approx(verified)
    others = 2 * 8 + 4 * ((4 * 11 + 4 * 5) + (11 + 5) + 2 * 3) + 3
    assert seconds(model, splits, units, effort, aligns=False, compares=True) == pytest.approx(alone + others)
    assert set(timed) == {4, 12}


def test_more_batches_take_more_time_and_a_longer_pass_is_not_timed_twice(timed: list[int]):
    model = bridge("GPT-2")
    some = Examples.from_prompts(model, PROMPTS * 4, ANSWERS * 4)
    effort = Effort(rounds=1, pairs=1, steps=1, inner=1, patience=1)
    whole, parts = (
        seconds(model, (some, some, some), heads(model), one, aligns=False, compares=False)
        for one in (effort, replace(effort, batch_size=6))
    )
    assert parts > whole
    assert timed == [4, 4, 4, 12, 12, 4, 4, 4, 6, 6]  # the first for nothing, then each once: it took over a second


def test_a_mask_takes_half_of_the_passes_of_the_search_and_at_most_twenty():
    assert Request(kinds="heads,mlps").sharpens and Request(kinds="edges").sharpens
    assert not Request(kinds="heads,neurons").sharpens
    effort = Effort(rounds=10, probes=1, per_round=48, batch_size=32)
    assert effort.sharpening(256) == math.ceil(15 * 2 * 48 / 2 / 32)
    assert replace(effort, per_round=None).sharpening(256) == math.ceil(15 * 2 * 256 / 2 / 32)
    assert replace(effort, per_round=None, probes=4).sharpening(256) == math.ceil(20 * 256 / 32)
    assert effort.sharpening(20) == math.ceil(15 * 2 * 20 / 2 / 20)  # a step has no more examples than there are


def test_units_are_those_of_the_kinds():
    model = bridge("GPT-2")
    kinds = {"heads": {"head"}, "heads,mlps": {"head", "mlp"}, "heads, neurons": {"head", "neuron"}}
    for names, found in kinds.items():
        assert {site.kind for site in Request(kinds=names).units(model).sites} == found
