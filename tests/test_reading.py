"""What attention hears in the place of copies: a norm's derivative in closed form, and scores with norms not known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.models import NoCasts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tl_sparsify as tls
from tl_sparsify.reading.norms import norm_slope

WIDTH = 7


def norm_of(kind: str) -> Any:
    made = {
        "layer norm": lambda: nn.LayerNorm(WIDTH, eps=1e-2),
        "layer norm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        "RMS norm": lambda: LlamaRMSNorm(WIDTH, eps=1e-2),
        "none": lambda: None,
    }[kind]()
    if made is not None:
        made.double()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)  # noqa: TID251
            for parameter in made.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return made


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["layer norm", "layer norm without weights", "RMS norm", "none"]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_derivative_of_a_norm_is_autograds(seed: int, kind: str, size: float):
    norm = norm_of(kind)
    x, gradient = torch.randn(2, 2, 3, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * size
    x = x.requires_grad_()
    with NoCasts():
        slope = norm_slope(norm, x)
        assert slope is not None
        [expected] = torch.autograd.grad(x if norm is None else norm(x), x, gradient)
    found = gradient if slope.weight is None else gradient * slope.weight
    if slope.direction is not None:
        along = slope.direction * (slope.direction * found).sum(-1, keepdim=True) / WIDTH
        found = (found - found.mean(-1, keepdim=True) if slope.centred else found) - along
    assert float((found * slope.scale - expected).abs().max()) < 1e-12 * float(1 + expected.abs().max())


class Sharper(nn.LayerNorm):
    """Layer norm by name only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class Unknown(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input / input.abs().sum(-1, keepdim=True)


@pytest.mark.parametrize("made", (Sharper, Unknown))
def test_edges_of_a_model_with_another_norm_are_scored_with_copies(made: type[nn.Module]):
    """Against the derivative with respect to ``keep``."""
    model = architectures.fresh("GPT-2")
    for block in model.blocks:
        block.ln1.original_component.__class__ = made
    examples = architectures.batch(n=3)
    assert norm_slope(model.blocks[0].ln1, torch.randn(1, 1, 24, dtype=torch.float64)) is None
    units = tls.edges(model)
    values = tls.constants.zero(model, examples, units)
    found = tls.score.risk(model, examples, units, values=values, metric=tls.metrics.log_odds)
    keep = torch.ones(len(examples), len(units)).double().requires_grad_()
    with torch.enable_grad(), tls.intervened(model, tls.Intervention(units, keep, values)):
        rows = model(examples.tokens)[:, -1][:, examples.choices]
        slope = torch.autograd.grad(tls.metrics.log_odds(rows, examples).sum(), keep)[0]
    expected = slope.square().mean(0) / 2
    assert float((found.scores - expected).abs().max()) < 1e-9 * float(expected.max())
