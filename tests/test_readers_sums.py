"""Sums of what was written, by each reader's shares, and their gradients: against sums that are written out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import torch
from helpers.edges import constants_of
from helpers.native import native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.reading.written import Ledger, Written

BATCH, POS, WIDTH, LAYERS = 3, 2, 4, 3
Sum = Callable[[Tensor, list[Tensor]], Tensor]


def by_hand() -> Sum:
    def summed(share: Tensor, parts: list[Tensor]) -> Tensor:
        written = torch.cat(parts, 2)
        every = share if share.ndim == 3 else share.expand(BATCH, -1, -1)
        return torch.einsum("brw,bpwd->rbpd", every, written)

    return summed


def by_ledger() -> Sum:
    ledgers: dict[int, Ledger] = {}

    def summed(share: Tensor, parts: list[Tensor]) -> Tensor:
        return Written("", tuple(parts), ledgers, []).sums(share, parts[0], 0, list(range(len(parts))))

    return summed


def layered(shares: list[Tensor], start: Tensor, summed: Sum, parallel: bool) -> list[Tensor]:
    """Layers in which three readers, and then one, read all that was written, and write what comes of it. What each of
    them read, by layer."""
    parts, read = [start], list[Tensor]()
    for layer in range(LAYERS):
        many, one = shares[2 * layer : 2 * layer + 2]
        heads = summed(many, parts).permute(1, 2, 0, 3).tanh()
        before = list(parts)
        parts.append(heads)
        alone = summed(one, before if parallel else parts)
        parts.append(alone.permute(1, 2, 0, 3).sin())
        read += [heads, alone]
    return [*read, summed(shares[-1], parts)]


def shares_of(seed: int, by_example: str, parallel: bool) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for layer in range(LAYERS + 1):
        writers = 2 + 4 * layer
        for readers, more in ((3, 0), (1, 0 if parallel else 3)):
            apart = by_example == "all" or (by_example == "some" and layer % 2 == 1)
            shape = ((BATCH,) if apart else ()) + (readers, writers + more)
            found.append(torch.randn(shape, generator=made, dtype=torch.float64).requires_grad_())
    return found[: 2 * LAYERS + 1]


def start_of(seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed + 1)
    return torch.randn(BATCH, POS, 2, WIDTH, generator=made, dtype=torch.float64).requires_grad_()


def total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum()


cases = given(st.integers(0, 2**31), st.sampled_from(["none", "some", "all"]), st.booleans())


@settings(max_examples=20, deadline=None)
@cases
def test_sums_and_gradients_are_those_of_sums_written_out(seed: int, by_example: str, parallel: bool):
    shares, start = shares_of(seed, by_example, parallel), start_of(seed)
    found: list[list[Tensor]] = []
    for summed in (by_hand(), by_ledger()):
        read = layered(shares, start, summed, parallel)
        again = torch.autograd.grad(read[-1].cos().sum(), [start, *shares], retain_graph=True)
        # of an earlier reader alone, of all, and of the last one again: each pass has its own readers
        early = torch.autograd.grad(read[2].square().sum(), [start, *shares[:3]], retain_graph=True)
        middle = torch.autograd.grad(read[-1].sum(), read[-2], retain_graph=True)
        every = torch.autograd.grad(total(read), [start, *shares], retain_graph=True)
        last = torch.autograd.grad(read[-1].cos().sum(), [start, *shares])
        assert all(torch.equal(a, b) for a, b in zip(again, last, strict=True))
        found.append([*read, *again, *early, *middle, *every])
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(expected, got, rtol=1e-11, atol=1e-11)


@settings(max_examples=10, deadline=None)
@cases
def test_second_derivatives_are_those_of_sums_written_out(seed: int, by_example: str, parallel: bool):
    shares, start = shares_of(seed, by_example, parallel), start_of(seed)
    found: list[tuple[Tensor, ...]] = []
    for summed in (by_hand(), by_ledger()):
        value = layered(shares, start, summed, parallel)[-1].cos().sum()
        slopes = torch.autograd.grad(value, [start, *shares], create_graph=True)
        found.append(torch.autograd.grad(total(slopes), [start, *shares]))
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(expected, got, rtol=1e-10, atol=1e-10)


def test_a_graph_of_removed_edges_goes_when_nothing_holds_it():
    """At once, and not when Python next looks for cycles: the activations of a pass would stay until then."""
    model = native()
    units = tls.edges(model)
    tokens = torch.arange(10).view(2, 5)
    values = constants_of(model, units)

    def one_pass() -> weakref.ref[Tensor]:
        keep = torch.full((len(units),), 0.5, dtype=torch.float64).requires_grad_()
        with tls.intervened(model, tls.Intervention(units, keep, values)):
            (slope,) = torch.autograd.grad(model(tokens).square().sum(), keep)
        assert bool(slope.any())
        return weakref.ref(keep)

    gc.collect()
    gc.disable()
    try:
        assert one_pass()() is None
    finally:
        gc.enable()
