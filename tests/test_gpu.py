"""A GPU: every number is the CPU's, to the rounding of float64; half precision keeps statistics in float32; memory does
not grow with the number of examples. Skipped as a whole where there is no GPU."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tl_sparsify as tls
from tl_sparsify.comparison import baselines

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
CLOSE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-12}


@cache
def models() -> tuple[Any, Any]:
    """The same model in float64 on the CPU and on the GPU."""
    model = tls.load_task("planted_backup").model().double()
    return model, copy.deepcopy(model).to(DEVICE)


@cache
def splits() -> tuple[tls.Examples, tls.Examples]:
    train, validation, _ = tls.load_task("planted_backup").examples(0)
    return train[:48], validation[:32]


def units_of(model: Any) -> tls.Units:
    return tls.heads(model) + tls.neurons(model)


def same(one: Any, other: Any) -> None:
    assert_close(one.cpu(), other.cpu(), check_dtype=False, **CLOSE)


@pytest.mark.parametrize(
    "scorer",
    [tls.score.risk, tls.score.variance, tls.score.gradient, tls.score.integrated, tls.score.exact],
    ids=lambda scorer: scorer.__name__,
)
def test_scores(scorer: Any):
    mine, theirs = (scorer(model, splits()[0], units_of(model), seed=0) for model in models())
    same(mine.scores, theirs.scores)
    same(mine.stderr, theirs.stderr)


def test_scores_of_edges():
    mine, theirs = (tls.score.risk(model, splits()[0], tls.edges(model), seed=0) for model in models())
    same(mine.scores, theirs.scores)


@pytest.mark.parametrize("inside", [0, 3])
def test_a_search_and_its_refits(inside: int):
    train, validation = splits()
    settings: dict[str, Any] = {"rounds": 4, "smallest": 0.1, "refitting": tls.Refitting(inside), "seed": 0}
    settings |= {"held_out": validation, "progress": False}
    mine, theirs = (tls.sparsify(model, train, units_of(model), **settings) for model in models())
    assert torch.equal(mine.order.cpu(), theirs.order.cpu())
    for one, other in zip(mine.rounds, theirs.rounds, strict=True):
        assert one.measured.mean == pytest.approx(other.measured.mean, rel=1e-6, abs=1e-10)


def reductions() -> tuple[tls.Reduction, tls.Reduction]:
    made = []
    for model in models():
        means = tls.constants.mean(model, splits()[0], units_of(model))
        circuit = baselines.random(model, splits()[0], means.units, seed=0).top(0.5)
        made.append(tls.constants.reduced(model, circuit, means))
    return made[0], made[1]


def test_constants():
    train, validation = splits()
    for one, other in zip(reductions()[0].values.tensors, reductions()[1].values.tensors, strict=True):
        same(one, other)
    fitted = [
        tls.constants.refit(model, reduction, train, validation, steps=5, progress=False)
        for model, reduction in zip(models(), reductions(), strict=True)
    ]
    for one, other in zip(fitted[0].values.tensors, fitted[1].values.tensors, strict=True):
        assert_close(one.cpu(), other.cpu(), rtol=1e-6, atol=1e-9)


def test_risk_and_what_is_evaluated():
    found = [
        tls.evaluate(model, reduction, splits()[1], seed=0)
        for model, reduction in zip(models(), reductions(), strict=True)
    ]
    assert found[0].risk.mean == pytest.approx(found[1].risk.mean, rel=1e-8)
    assert found[0].accuracy == found[1].accuracy
    assert found[0].faithfulness == pytest.approx(found[1].faithfulness, rel=1e-8)


def test_a_folded_model_is_the_ablated_one():
    model, reduction = models()[1], reductions()[1]
    small = tls.fold(model, reduction)
    assert next(small.parameters()).device.type == torch.device(DEVICE).type
    tokens = splits()[1].tokens.to(DEVICE)
    with torch.no_grad():
        with tls.intervened(model, tls.ablate(reduction)):
            expected = model(tokens)
        assert_close(small(tokens), expected, **CLOSE)


def test_a_mask():
    settings: dict[str, Any] = {"steps": 5, "per_step": 16, "seed": 0, "progress": False}
    mine, theirs = (baselines.top_k_gate(model, splits()[0], units_of(model), **settings) for model in models())
    assert_close(mine.scores.cpu(), theirs.scores.cpu(), rtol=1e-5, atol=1e-8)


def test_batches_and_the_model_stay_what_they_were():
    model = models()[1]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole, parts = (tls.score.risk(model, splits()[0], units_of(model), batch_size=size) for size in (None, 7))
    same(whole.scores, parts.scores)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == torch.device(DEVICE).type and torch.equal(parameter, before[name]), name


def test_half_precision_keeps_its_statistics_in_float32():
    single = tls.load_task("planted_backup").model().to(DEVICE)
    half = copy.deepcopy(single).to(torch.bfloat16)
    found, expected = (tls.score.risk(model, splits()[0], units_of(model), seed=0) for model in (half, single))
    assert found.scores.dtype == torch.float64 and bool(torch.isfinite(found.scores).all())
    assert tls.constants.mean(half, splits()[0], units_of(half)).tensors[0].dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([found.scores.cpu(), expected.scores.cpu()]))[0, 1]) > 0.99


def test_memory_does_not_grow_with_the_examples():
    model, (train, _) = models()[1], splits()

    def peak(examples: tls.Examples) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tls.score.risk(model, examples, units_of(model), batch_size=8)
        return torch.cuda.max_memory_allocated() - before

    peak(train[:16])
    assert peak(train) <= 1.05 * peak(train[:24])


def test_blocks_that_are_run_again_run_under_the_same_hooks(monkeypatch: pytest.MonkeyPatch):
    """On a GPU a backward pass runs in a thread of its own."""
    model, few = models()[1], splits()[0][:4]
    units = units_of(model)
    reduction = tls.constants.reduced(
        model, tls.Circuit.of(units, units.names[::2]), tls.constants.zero(model, few, units)
    )

    def found() -> list[torch.Tensor]:
        path = tls.sparsify(model, few, units, rounds=2, start=reduction, batch_size=1, progress=False)
        return [tls.score.risk(model, few, units, batch_size=1).scores, path.scores]

    before = found()
    monkeypatch.setattr("tl_sparsify.core.memory.SHARE_OF_ONE", 0.0)
    for one, other in zip(before, found(), strict=True):
        same(one, other)
