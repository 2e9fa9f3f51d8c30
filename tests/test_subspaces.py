"""A dormant subspace made on purpose is caught, and an honest one passes."""

from __future__ import annotations

import pytest
import torch
from helpers.models import unchanged
from test_align import TURNED, bits, turned
from torch import Tensor

import tl_sparsify as tls

HOOK = "blocks.0.mlp.hook_post"


def split(model: object, direction: Tensor, variable: str = "first") -> tls.SubspaceSplit:
    units = list(tls.directions(model, HOOK, direction[:, None].float()).at(0))
    alignment = tls.Alignment({variable: units})
    return tls.split_subspace(model, TURNED, alignment, bits(400, 0))  # type: ignore[arg-type]


def dormant() -> object:
    """The model whose neurons carry a bit each, with the readers of neuron 0 turned off: its bit passes no more. An
    added pathway: none reads the difference of the two neurons; their sum is read."""
    model = turned(0)
    weights = {name.replace("._original_component", ""): p for name, p in model.named_parameters()}  # type: ignore
    with torch.no_grad():
        out = weights["layers.0.mlp.fc_out.weight"]
        out.copy_(out[:, :1].expand_as(out) * 0)
        out[3, 1] = 1.0
    return model


def test_an_honest_direction_passes():
    model = turned(0)
    with unchanged(model):
        found = split(model, torch.tensor([1.0, 0.0]))
    assert not found.dormant("first")
    assert found.part("first", "whole").accuracy == found.part("first", "visible").accuracy == 1
    assert (found.part("first", "null").rank, found.part("first", "null").accuracy) == (0, 0)


def test_what_no_reader_sees_has_no_effect():
    found = split(dormant(), torch.tensor([1.0, 0.0]))
    whole, visible, null = (found.part("first", name) for name in ("whole", "visible", "null"))
    assert (visible.rank, null.rank, null.share) == (0, 1, 1.0)
    assert null.accuracy == whole.accuracy
    assert not found.dormant("first")


class Illusion(torch.nn.Module):
    pass


def test_a_hook_without_known_readers_is_refused():
    model = turned(0)
    units = list(tls.directions(model, "blocks.0.hook_mlp_out", torch.eye(4)[:, :1]).at(0))
    with pytest.raises(ValueError, match="what reads blocks.0.hook_mlp_out is not known"):
        tls.split_subspace(model, TURNED, tls.Alignment({"first": units}), bits(40, 0))
    with pytest.raises(ValueError, match="not aligned with directions"):
        heads = tls.Alignment({"first": [tls.neurons(model)["L0N0"]]})
        tls.split_subspace(model, TURNED, heads, bits(40, 0))
