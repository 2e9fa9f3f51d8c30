"""Batches that fit: how many examples at a time, and that nothing depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, inputs, linear, random_mask, reduction_of, units_of

import tl_sparsify as tls
from tl_sparsify import baselines, constants, score
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core import memory
from tl_sparsify.core.distributions import InterventionDistribution
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import batch_size_for, fitting
from tl_sparsify.core.memory import example_bytes, rows_for


def prompts(n: int, pos: int, answers: int = 1, vocabulary: int = 50257) -> Examples:
    tokens = torch.randint(vocabulary, (n, pos), generator=torch.Generator().manual_seed(0))
    return Examples(tokens, tokens.where(torch.arange(pos) >= pos - answers, -100))


def gpt2_small() -> Any:
    """What the estimate looks at in a model of GPT-2 small's shape, without memory for its weights."""
    block = [(768, 2304), (2304,), (768, 768), (768, 3072), (3072, 768)]
    shapes = [(50257, 768), (1024, 768), *block * 12]
    weights = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    cfg = SimpleNamespace(d_vocab=50257, n_heads=12)
    return SimpleNamespace(parameters=lambda: iter(weights), blocks=range(12), cfg=cfg)


def test_the_estimate_follows_from_the_sizes_of_the_modules():
    model, batch = bridge(), examples(4, answers=2)
    # two layers: q, k, v, o are 8 x 8, the mlp is 8 x 5 and 5 x 8; the position embedding 8 x 8
    widths = 2 * (4 * 16 + 2 * 13) + 16
    numbers = 2.5 * 5 * widths + 8 * 2 * 11 + 4 * 25 * 4
    assert example_bytes(model, batch, narrow=True) == 8 * numbers
    assert example_bytes(model, batch, narrow=False) == 8 * (numbers + 8 * 3 * 11)


def test_a_batch_of_gpt2_small_takes_at_most_what_it_may():
    model = gpt2_small()
    # 12 layers of 3072 + 1536 + 3840 + 3840 inputs and outputs, and 1024 + 768 of the positions
    numbers = 2.5 * 20 * 149_248 + 8 * 50_257 + 4 * 400 * 144
    assert example_bytes(model, prompts(2, 20), narrow=True) == 4 * numbers
    rows = rows_for(model, prompts(192, 20), narrow=True)
    assert rows == 5 * 2**28 // (4 * numbers) == rows_for(model, prompts(384, 20), narrow=True)
    assert rows_for(model, prompts(192, 20, answers=20), narrow=True) < rows
    assert rows_for(model, prompts(192, 20), narrow=False) < rows
    assert rows_for(model, prompts(4, 1000), narrow=True) == 1


def test_small_models_run_16384_tokens_at_a_time_and_what_is_given_is_taken():
    model, data = bridge(), examples(4)
    assert rows_for(model, data, narrow=True) == 16_384 // 5
    assert batch_size_for(model, data, None) == 4 and batch_size_for(model, data, 3) == 3
    assert batch_size_for(linear(), inputs(12), None) == 12


def test_defaults_fall_to_pieces_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch):
    model, data = bridge(), examples(12)
    units = units_of(model)
    before = score.risk(model, data, units)
    one = example_bytes(model, data, narrow=True)
    monkeypatch.setattr(memory, "ON_CPU", 5 * one)
    assert batch_size_for(model, data, None) == 5 == batch_size_for(model, examples(24), None)
    after = score.risk(model, data, units)
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-10, atol=1e-16)
    torch.testing.assert_close(after.stderr, before.stderr, rtol=1e-9, atol=1e-14)


SWAPS = InterventionDistribution.interchange(0.3)


@pytest.mark.parametrize("settings", [{}, {"interventions": SWAPS}, {"per_step": 7}])
def test_a_step_of_a_refit_may_be_taken_in_parts(settings: dict[str, Any]):
    model, data = bridge(), examples(12)
    reduction = reduction_of(model, random_mask(units_of(model), 3))
    shared = {"steps": 10, "progress": False} | settings
    whole, parts = (constants.refit(model, reduction, data, data, batch_size=b, **shared) for b in (None, 2))
    for one, another in zip(whole.values.tensors, parts.values.tensors, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-8, atol=1e-10)
    assert whole.values != reduction.values


@pytest.mark.parametrize("train", [baselines.hard_concrete, baselines.top_k_gate, baselines.information_bottleneck])
def test_a_step_of_a_mask_may_be_taken_in_parts(train: Any):
    model, data = bridge(), examples(12)
    units = units_of(model)
    shared: dict[str, Any] = {"steps": 4, "per_step": 10, "held_out": examples(6, 1), "progress": False}
    whole, parts = (train(model, data, units, batch_size=b, **shared) for b in (None, 3))
    torch.testing.assert_close(whole.scores, parts.scores, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("run", ["refit", "mask"])
def test_no_pass_is_larger_than_what_is_given(run: str):
    model, data = bridge(), examples(12)
    units = units_of(model)
    sizes: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: sizes.append(len(value)))]):
        if run == "refit":
            reduction = reduction_of(model, random_mask(units, 3))
            constants.refit(model, reduction, data, data, steps=2, batch_size=4, progress=False)
        else:
            baselines.hard_concrete(model, data, units, steps=2, held_out=data, batch_size=4, progress=False)
    assert max(sizes) == 4


def test_parts_of_a_step_are_no_more_passes():
    model, data = bridge(), examples(12)
    reduction = reduction_of(model, random_mask(units_of(model), 3))
    found = []
    for size in (None, 5):
        with counted(model) as passes:
            constants.refit(model, reduction, data, data, steps=3, batch_size=size, progress=False)
        found.append(passes)
    assert found[0] == found[1]


def test_a_step_without_examples_is_refused():
    model, data = bridge(), examples(3)
    with pytest.raises(ValueError, match="per_step is 0"):
        constants.refit(model, reduction_of(model), data, data, per_step=0, progress=False)


def test_where_memory_runs_out_half_is_tried():
    model, data = bridge(), examples(12)
    tried: list[int] = []

    def run(size: int) -> int:
        tried.append(size)
        if size > least:
            raise torch.OutOfMemoryError("no more")
        return size

    least = 2
    assert fitting(run, model, data, None) == 1 and tried == [12, 6, 3, 1]
    tried.clear()
    with pytest.raises(torch.OutOfMemoryError):
        fitting(run, model, data, 7)  # what the user gives is taken
    least = 0
    with pytest.raises(torch.OutOfMemoryError):
        fitting(run, model, data, None)
    assert tried == [7, 12, 6, 3, 1, 1]  # the last with blocks that are run again


RUNNING: dict[str, Callable[[Any, tls.Examples, tls.Reduction, int | None], Any]] = {
    "means": lambda model, data, reduced, size: tls.constants.mean(model, data, reduced.units, batch_size=size).tensors,
    "risk": lambda model, data, reduced, size: tls.risk(model, reduced, data, batch_size=size).mean,
    "evaluate": lambda model, data, reduced, size: tls.evaluate(model, reduced, data, batch_size=size).risk.mean,
    "gradient": lambda model, data, reduced, size: (
        tls.score.gradient(model, data, reduced.units, values=reduced.values, batch_size=size).scores
    ),
    "polish": lambda model, data, reduced, size: (
        tls.polish(model, reduced, data, passes=40, batch_size=size).circuit.mask
    ),
    "refit": lambda model, data, reduced, size: (
        tls.constants.refit(model, reduced, data, data, steps=2, batch_size=size, progress=False).values.tensors
    ),
    "mask": lambda model, data, reduced, size: (
        tls.baselines.top_k_gate(
            model, data, reduced.units, steps=2, values=reduced.values, batch_size=size, progress=False
        ).scores
    ),
}


@pytest.mark.parametrize("name", RUNNING)
def test_what_runs_out_of_memory_goes_on_in_halves_unless_the_user_chose_the_batches(name: str):
    model, data = bridge(), examples(12)
    reduced = reduction_of(model)
    expected = RUNNING[name](model, data, reduced, 3)
    tried: list[int] = []

    def limited(activation: torch.Tensor, hook: Any) -> None:
        tried.append(len(activation))
        if len(activation) > 3:
            raise torch.OutOfMemoryError("no more")

    with model.hooks(fwd_hooks=[("hook_embed", limited)]):
        found = RUNNING[name](model, data, reduced, None)
        assert set(tried) == {12, 6, 3}
        with pytest.raises(torch.OutOfMemoryError):
            RUNNING[name](model, data, reduced, 4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


WIDE_VOCABULARY = """
import resource, sys, torch
import tl_sparsify as tls
from transformer_lens import TransformerBridge, TransformerBridgeConfig

sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 1, "n_ctx": 64, "d_mlp": 16, "d_vocab": 150_000}
model = TransformerBridge.boot_native(TransformerBridgeConfig(**sizes, act_fn="relu", seed=0)).eval()
tokens = torch.randint(150_000, (16, 64), generator=torch.Generator().manual_seed(0))
examples, units = tls.Examples(tokens, tokens), tls.heads(model) + tls.neurons(model)
reduction = tls.Reduction(tls.Circuit.of(units, units.names[:4]), tls.constants.zero(model, examples, units))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "risk":
    tls.risk(model, reduction, examples)
else:
    tls.score.risk(model, examples, units)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is counted in other units elsewhere")
@pytest.mark.parametrize("run", ["risk", "score.risk"])
def test_an_answer_at_every_token_of_a_large_vocabulary_stays_within_the_budget(run: str):
    """16 examples with 64 answers among 150,000 tokens are logits of .6 GB, of which ten copies were held at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WIDE_VOCABULARY, run]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 2 * memory.ON_CPU


def test_a_model_of_buffers_alone_runs_where_they_are():
    model: Any = linear()
    for name in ("w_in", "w_out", "b_in"):
        weight = getattr(model, name).detach()
        delattr(model, name)
        model.register_buffer(name, weight)
    batch = inputs()
    values = constants.mean(model, batch, model.units)
    found = score.risk(model, batch, model.units, values=values)
    same: Any = linear()
    expected = score.risk(same, batch, model.units, values=values)
    assert not list(model.parameters()) and torch.equal(found.scores, expected.scores)
