"""A dormant subspace made on purpose is caught, and an honest one passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.models import shaken, unchanged
from helpers.verification import PARITY, native_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_align import BITS, TURNED, bits, turned
from torch import Tensor
from transformer_lens import HookedRootModule, TransformerBridge, TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

import tl_sparsify as tls

COPY, ASLEEP, CARRIER, OTHER = torch.eye(4)


class Hidden(HookedRootModule):
    """Two bits in four entries: the first twice, of which one copy is read by none; one entry that is always 0, and
    that is read strongly; the second bit."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_hidden = HookPoint()
        self.read = torch.nn.Parameter(torch.eye(4)[:, 1:])
        self.setup()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        signs = torch.tensor(2.0 * BITS - 1)
        x, y = signs.float()[tokens[:, 0]].unbind(1)
        hidden = self.hook_hidden(torch.stack([x, 0 * x, x, y], 1))
        asleep, carrier, other = (hidden @ self.read).unbind(1)
        return (torch.stack([4 * asleep + carrier, other], 1) @ signs.float().T)[:, None]


def pairs(n: int = 400) -> tls.Pairs:
    made = bits(n, 0)
    base, source = (
        tls.Examples(side.tokens[:, :1], side.labels[:, 1:], choices=torch.arange(4))
        for side in (made.base, made.source)
    )
    return tls.Pairs(made.base_inputs, made.source_inputs, base, source, made.answers)


def split(*directions: Tensor) -> tls.SubspaceSplit:
    model: Any = Hidden()
    units = tls.directions(model, "hook_hidden", torch.stack(directions, 1))
    with unchanged(model):
        alignment = tls.Alignment({"first": list(units)})
        return tls.split_subspace(model, TURNED, alignment, pairs(), readers={"hook_hidden": model.read.detach()})


def test_a_dormant_subspace_is_caught():
    """The whole moves the entry that is read by what the unread copy says; neither part does anything."""
    direction = (COPY + ASLEEP) / 2**0.5
    found = split(direction)
    whole, visible, null = (found.part("first", name) for name in ("whole", "visible", "null"))
    assert (whole.accuracy, visible.accuracy, null.accuracy) == (1.0, 0.0, 0.0)
    assert (whole.rank, visible.rank, null.rank) == (1, 1, 1) and abs(visible.share - 0.5) < 1e-6
    assert found.dormant("first") and found.to_frame().part.tolist() == ["whole", "visible", "null"]
    model: Any = Hidden()
    alignment = tls.Alignment({"first": list(tls.directions(model, "hook_hidden", direction[:, None]))})
    assert tls.verify(model, TURNED, alignment, pairs(), draws=1).verdict("first").accepted  # which alone does not tell


@pytest.mark.parametrize("directions", [(CARRIER,), (CARRIER, COPY)])
def test_an_honest_subspace_passes_also_with_an_idle_part(directions: tuple[Tensor, ...]):
    found = split(*directions)
    assert not found.dormant("first")
    assert found.part("first", "whole").accuracy == found.part("first", "visible").accuracy == 1
    assert found.part("first", "null").accuracy == 0 and found.part("first", "null").rank == len(directions) - 1


def test_an_idle_direction_does_nothing_and_is_no_illusion():
    found = split(COPY)
    assert found.part("first", "whole").accuracy == 0 and not found.dormant("first")
    assert (found.part("first", "visible").rank, found.part("first", "null").share) == (0, 1.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_the_parts_make_up_the_whole_and_no_reader_sees_the_null_part(seed: int, rank: int, outputs: int):
    """Of any directions, whatever a random reader reads: the answers without the null part are those with nothing."""
    drawn = torch.Generator().manual_seed(seed)
    model: Any = Hidden()
    with torch.no_grad():  # all that the network reads goes through these columns
        model.read.copy_(
            model.read @ torch.randn(3, outputs, generator=drawn) @ torch.randn(outputs, 3, generator=drawn)
        )
    units = list(tls.directions(model, "hook_hidden", torch.randn(4, rank, generator=drawn)))
    some = pairs(100)
    labels = model(some.base.tokens)[:, 0].argmax(1, keepdim=True)
    assert labels.shape == some.base.labels.shape
    some = tls.Pairs(
        some.base_inputs,
        some.source_inputs,
        tls.Examples(some.base.tokens, labels, choices=some.base.choices),
        tls.Examples(
            some.source.tokens, model(some.source.tokens)[:, 0].argmax(1, keepdim=True), choices=some.base.choices
        ),
        some.answers,
    )
    found = tls.split_subspace(
        model, TURNED, tls.Alignment({"first": units}), some, readers={"hook_hidden": model.read.detach()}
    )
    whole, visible, null = (found.part("first", name) for name in ("whole", "visible", "null"))
    assert abs(visible.share + null.share - 1) < 1e-5 and whole.share == pytest.approx(1) and whole.rank == rank
    assert max(visible.rank, null.rank) <= rank <= visible.rank + null.rank
    assert visible.rank <= outputs and null.rank >= rank - visible.rank
    assert null.accuracy == 0 or math.isnan(null.accuracy), "all these answers should change, and none does"


def test_the_readers_of_neurons_and_of_the_stream_are_known():
    model, some = turned(0), bits(200, 0)
    for hook, direction in (("blocks.0.mlp.hook_post", [1.0, 0.0]), ("blocks.0.hook_resid_post", [0.0, 0.0, 1.0, 0.0])):
        units = list(tls.directions(model, hook, torch.tensor(direction)[:, None]).at(0))
        found = tls.split_subspace(model, TURNED, tls.Alignment({"first": units}), some)
        assert found.part("first", "visible").accuracy == 1 and found.part("first", "null").rank == 0
    unread = list(tls.directions(model, "blocks.0.hook_resid_post", torch.eye(4)[:, :1]).at(0))  # read in block 0 alone
    found = tls.split_subspace(model, TURNED, tls.Alignment({"first": unread}), some)
    assert found.part("first", "visible").rank == 0 and found.part("first", "whole").accuracy == 0


def test_what_cannot_be_split_is_refused():
    model = turned(0)
    units = list(tls.directions(model, "blocks.0.hook_mlp_out", torch.eye(4)[:, :1]).at(0))
    with pytest.raises(ValueError, match=r"what reads blocks\.0\.hook_mlp_out is not known"):
        tls.split_subspace(model, TURNED, tls.Alignment({"first": units}), bits(40, 0))
    with pytest.raises(ValueError, match="not aligned with directions"):
        tls.split_subspace(model, TURNED, tls.Alignment({"first": [tls.neurons(model)["L0N0"]]}), bits(40, 0))
    with pytest.raises(ValueError, match="alignment names 'third'"):
        tls.split_subspace(model, TURNED, tls.Alignment({"third": units}), bits(40, 0))


def test_the_gate_reads_the_stream():
    config = {"d_model": 32, "d_head": 2, "n_heads": 1, "n_layers": 2, "n_ctx": 4, "d_vocab": 6, "d_mlp": 4}
    config |= {"act_fn": "silu", "gated_mlp": True, "normalization_type": None, "seed": 0}
    model = shaken(TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64), 0.4)
    gate = torch.linalg.qr(model.blocks[1].mlp.W_gate.detach()).Q[:, :1]
    units = list(tls.directions(model, "blocks.0.hook_resid_post", gate).at(1))
    found = tls.split_subspace(model, PARITY, tls.Alignment({"odd": units}), native_pairs(20))
    assert found.part("odd", "visible").share == pytest.approx(1) and found.part("odd", "null").rank == 0
