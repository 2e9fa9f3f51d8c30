"""Blocks that are run again in backward passes: the same numbers bit for bit, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import CONFIGS, MORE, batch, fresh
from helpers.mixtures import mixture
from helpers.models import bridge, examples, reduction_of, unchanged, unchecked, units_of
from test_spread_models import SPREAD
from test_spread_models import bridge as spread
from torch.autograd.graph import saved_tensors_hooks

import tl_sparsify as tls
from tl_sparsify._internal.recomputation import recomputing
from tl_sparsify.core import memory
from tl_sparsify.core.probes import samples

ONE_BY_ONE: dict[str, Any] = {"batch_size": 1, "seed": 0}


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on every single example is too long for what it may take."""
    return lambda: monkeypatch.setattr(memory, "SHARE_OF_ONE", 0.0)


def numbers(model: Any, data: tls.Examples, units: tls.Units) -> Iterator[torch.Tensor]:
    """All that takes a backward pass, an example at a time."""
    values = tls.constants.mean(model, data, units)
    half = tls.constants.reduced(model, tls.Circuit.of(units, units.names[::2]), values)
    for part in samples(model, data, half, current=half, restorable=True, probes=3, temperature=2.0, **ONE_BY_ONE):
        yield part.effects
        yield part.linear
    yield tls.score.risk(model, data, units, **ONE_BY_ONE).scores
    yield tls.score.gradient(model, data, units, **ONE_BY_ONE).scores
    yield tls.score.integrated(model, data, units, steps=2, **ONE_BY_ONE).scores
    quiet = ONE_BY_ONE | {"progress": False}
    yield tls.constants.refit(model, half, data, data, steps=2, per_step=2, **quiet).values.tensors[0]
    yield tls.baselines.top_k_gate(model, data, units, steps=2, per_step=2, **quiet).scores
    yield tls.sparsify(model, data, units, rounds=2, smallest=0.3, **quiet).order


def assert_same(model: Any, data: tls.Examples, units: tls.Units, long: Callable[[], None]) -> None:
    before = list(numbers(model, data, units))
    long()
    with unchanged(model):
        after = list(numbers(model, data, units))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_every_architecture_gives_the_same_numbers_bit_for_bit(name: str, long: Callable[[], None]):
    model = fresh(name)
    assert_same(model, batch(3), tls.heads(model) + tls.neurons(model), long)


def test_so_do_native_models(long: Callable[[], None]):
    model = bridge()
    assert_same(model, examples(3), units_of(model), long)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_so_do_mixtures_of_experts(name: str, long: Callable[[], None]):
    model = mixture(name)
    assert_same(model, batch(3), tls.experts(model) + tls.heads(model), long)


@pytest.mark.parametrize("how", ["on the CPU", "some on disk", "int8"])
def test_so_do_models_whose_weights_are_elsewhere(how: str, tmp_path: Path, long: Callable[[], None]):
    model = spread("Llama", SPREAD[how], tmp_path)
    with unchecked():
        assert_same(model, batch(2), tls.heads(model), long)


@pytest.mark.parametrize("rules", [tls.backward.GIM, tls.backward.RELP])
def test_so_do_other_backward_passes(rules: Any, long: Callable[[], None]):
    model, data = fresh("Llama"), batch(3)
    units = tls.heads(model) + tls.neurons(model)

    def scores() -> torch.Tensor:
        with tls.backward.modified(model, rules):
            return tls.score.gradient(model, data, units, **ONE_BY_ONE).scores

    before = scores()
    long()
    assert torch.equal(before, scores())


def test_second_derivatives_go_through_blocks_that_are_run_again(long: Callable[[], None]):
    model, data = bridge(), examples(3)
    before = tls.baselines.second_order(model, data, units_of(model), **ONE_BY_ONE).scores
    long()
    torch.testing.assert_close(tls.baselines.second_order(model, data, units_of(model), **ONE_BY_ONE).scores, before)


def test_edges_go_on_from_earlier_blocks_and_no_block_is_run_again(long: Callable[[], None]):
    model, data = bridge(), examples(3)
    units = tls.edges(model)
    values = tls.constants.zero(model, data, units)
    found: list[list[int]] = []
    for _ in range(2):
        with runs(model) as mlps:
            tls.score.risk(model, data, units, values=values, probes=2, **ONE_BY_ONE)
        found.append(mlps)
        long()
    assert found[0] == found[1]
    assert_same(model, data, units, long)


@contextmanager
def runs(model: Any) -> Iterator[list[int]]:
    """Batch sizes that MLPs are run on."""
    found: list[int] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda module, inputs: found.append(len(inputs[0])))
        for block in model.blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def test_a_backward_pass_runs_each_block_once_more_and_short_prompts_none(long: Callable[[], None]):
    model, data = bridge(), examples(3)
    units = units_of(model)
    values = tls.constants.zero(model, data, units)
    for expected in (3 * 2, 3 * 2 * (1 + 2)):
        with runs(model) as mlps:
            tls.score.risk(model, data, units, values=values, probes=2, **ONE_BY_ONE)
        assert len(mlps) == expected
        long()
    with runs(model) as mlps:
        tls.risk(model, reduction_of(model), data, batch_size=1)
        tls.score.risk(model, data, units, values=values, probes=2, batch_size=3)  # what the user gives is taken
    assert sorted(mlps) == [1] * 3 * 2 * 2 + [3] * 2


def test_threads_that_run_blocks_again_give_what_each_gives_alone(long: Callable[[], None]):
    model = bridge()
    units, parts = units_of(model), [examples(8, seed) for seed in range(3)]
    reductions = [reduction_of(model, torch.arange(len(units)) % 3 != seed) for seed in range(3)]

    def found(number: int) -> torch.Tensor:
        given: dict[str, Any] = {"start": reductions[number], "progress": False, **ONE_BY_ONE}
        return tls.sparsify(model, parts[number], units, rounds=2, smallest=0.2, **given).scores

    long()
    alone = [found(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(found, [0, 1, 2] * 3))
    for number, one in zip([0, 1, 2] * 3, together, strict=True):
        assert torch.equal(one, alone[number])


def kept(model: Any, data: tls.Examples) -> int:
    """Bytes that a forward pass keeps for the backward pass, but for weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), tls.recorded(model, tls.heads(model), gradients=True):
        model(data.tokens)
    return sum(storages.values())


def test_blocks_keep_what_comes_in():
    model = fresh("Llama", num_hidden_layers=6, max_position_embeddings=256)
    data = batch(1, length=200)
    whole = kept(model, data)
    with recomputing(model):
        again = kept(model, data)
    stream = 8 * 200 * 24
    assert 5 * stream <= again < 20 * stream and whole > 40 * again


def test_nothing_is_left_after_an_error():
    model, data = bridge(), examples(3)
    before = [dict(vars(block)) for block in model.blocks]
    with pytest.raises(RuntimeError, match="enough"), recomputing(model):
        assert vars(model.blocks[0]) != before[0]
        raise RuntimeError("enough")
    assert [dict(vars(block)) for block in model.blocks] == before
    assert all(parameter.requires_grad for parameter in model.parameters()) and len(data) == 3


@pytest.mark.parametrize(("size", "sizes"), [(3, {12, 6, 3}), (1, {12, 6, 3, 2, 1})])
def test_a_search_goes_on_in_halves_where_memory_runs_out_and_at_last_runs_blocks_again(size: int, sizes: set[int]):
    model, data = bridge(), examples(12)
    units = units_of(model)
    values = tls.constants.mean(model, data, units)
    settings: dict[str, Any] = {"rounds": 3, "smallest": 0.2, "values": values, "progress": False}
    expected = tls.sparsify(model, data, units, batch_size=size, **settings)
    tried: list[int] = []

    def limited(activation: torch.Tensor, hook: Any) -> None:
        tried.append(len(activation))
        again = "forward" in vars(model.blocks[0])
        if torch.is_grad_enabled() and (len(activation) > size or (size == 1 and not again)):
            raise torch.OutOfMemoryError("no more")

    with model.hooks(fwd_hooks=[("hook_embed", limited)]):
        found = tls.sparsify(model, data, units, **settings)
    assert torch.equal(found.order, expected.order) and set(tried) == sizes
