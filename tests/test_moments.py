"""Moments against two-pass results, and against every way to put parts together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import seeded
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify.core.moments import Estimate, Moments

SEEDS = st.integers(0, 2**31)
PROCESS = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("moments", sys.argv[3])  # alone: the package takes long to import
sys.modules["moments"] = moments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(moments)
Moments = moments.Moments
rank, store, data = int(sys.argv[1]), sys.argv[2], torch.arange(7.0).double().reshape(7, 1) ** 2
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
total = Moments.of(data[:3] if rank == 0 else data[3:]).all_reduce()
torch.testing.assert_close(total.mean, data.mean(0), rtol=1e-14, atol=0)
torch.testing.assert_close(total.variance, data.var(0, correction=0), rtol=1e-14, atol=0)
assert total.count.item() == 7
torch.distributed.destroy_process_group()
"""


@given(st.integers(2, 30), SEEDS, st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_moments_equal_the_two_pass_result(n: int, seed: int, shift: float, scale: float):
    data = torch.randn(n, 2, 3, generator=seeded(seed), dtype=torch.float64) * scale + shift
    found = Moments.merge(Moments.of(row) for row in data.split(1))
    tolerance = 1e-12 * (1 + abs(shift) / scale) ** 2
    torch.testing.assert_close(found.mean, data.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, data.var(0, correction=0), rtol=tolerance, atol=1e-300)
    torch.testing.assert_close(found.stderr, data.std(0) / n**0.5, rtol=tolerance, atol=1e-300)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), SEEDS)
def test_empty_parts_add_nothing(sizes: list[int], seed: int):
    data = torch.randn(sum(sizes) + 1, 3, generator=seeded(seed), dtype=torch.float64)
    parts = [Moments.of(part) for part in data.split([*sizes, 1])]
    found, expected = Moments.merge(parts), Moments.of(data)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.spread, expected.spread)
    assert torch.equal(found.count, expected.count)


@given(SEEDS)
def test_weights_leave_samples_out(seed: int):
    data = torch.randn(9, 4, generator=seeded(seed), dtype=torch.float64)
    chosen = torch.rand(9, 4, generator=seeded(seed + 1)) < 0.6
    found = Moments.of(data[:4], chosen[:4].double()) + Moments.of(data[4:], chosen[4:].double())
    for column in range(4):
        samples = data[chosen[:, column], column]
        assert found.count[column] == len(samples)
        if len(samples):
            torch.testing.assert_close(found.mean[column], samples.mean())
            torch.testing.assert_close(found.variance[column], samples.var(correction=0))


def test_half_precision_samples_are_added_in_float64():
    data = torch.full((4000,), 1.0, dtype=torch.bfloat16)
    found = Moments.of(data)
    assert found.mean.dtype == torch.float64 and found.mean == 1 and found.count == 4000


def test_one_sample_has_an_infinite_standard_error():
    assert Moments.of(torch.tensor([3.0])).stderr == float("inf")
    assert Moments.of(torch.tensor([3.0, 3.0])).stderr == 0


def test_an_estimate_prints_its_number_error_and_size():
    estimate = Estimate.of(Moments.of(torch.tensor([1.0, 2.0, 3.0, 6.0])), "nats")
    assert (estimate.mean, estimate.n, float(estimate)) == (3.0, 4, 3.0)
    assert estimate.stderr == pytest.approx((14 / 3 / 4) ** 0.5)
    assert repr(estimate) == "3 ± 1.1 nats (n=4)"
    assert repr(Estimate(0.5, 0.25, 1234)) == "0.5 ± 0.25 (n=1,234)"


def test_alone_there_is_nothing_to_reduce():
    moments = Moments.of(torch.tensor([1.0, 2.0]))
    assert moments.all_reduce() is moments


@pytest.mark.slow
def test_two_processes_have_the_moments_of_both(tmp_path: Path):
    source = str(sys.modules[Moments.__module__].__file__)
    commands = [[sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), source] for rank in range(2)]
    started = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
