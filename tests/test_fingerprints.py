"""A model's fingerprint sees every number of it, is cheap, and says what kind of other model another one is."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import TwoLayers, fresh, linear, reduction_of
from torch import nn

from tl_sparsify import Circuit, Reduction, Values, fingerprint
from tl_sparsify._internal.storage import checksum
from tl_sparsify.core.reduction import check_fingerprint


def wide() -> TwoLayers:
    """256 features, 1,024 units, 256 answers: every fourth row of the output weights was all that was looked at."""
    generator = torch.Generator().manual_seed(0)
    return TwoLayers(torch.randn(256, 1024, generator=generator), torch.randn(1024, 256, generator=generator))


def test_neurons_whose_weights_become_zero_are_seen():
    model = wide()
    before = fingerprint(model)
    with torch.no_grad():
        model.w_out[torch.arange(1024) % 4 != 0] = 0  # 768 of them
    assert fingerprint(model) != before


@pytest.mark.parametrize("place", [0, 1, 3, 2**16, 2**16 + 1, 2**18 - 1])
def test_any_one_value_is_seen(place: int):
    model = wide()
    before = fingerprint(model)
    with torch.no_grad():
        model.w_in.view(-1)[place] += 1e-3
    after = fingerprint(model)
    assert after != before
    with torch.no_grad():
        model.w_in.view(-1)[place] -= 1e-3
        model.w_in.view(-1)[[place, (place + 2**16) % 2**18]] = model.w_in.view(-1)[[(place + 2**16) % 2**18, place]]
    assert fingerprint(model) not in (before, after)  # two values in each other's place


def test_a_checksum_is_that_of_a_slow_sum():
    values = torch.randn(2 * 2**16 + 5, generator=torch.Generator().manual_seed(1))
    bits = values.view(torch.int32).tolist()
    from tl_sparsify._internal import random as _random

    weights = (_random.bits(0, 101, torch.arange(2**16)) | 1).tolist()

    def row(part: list[int]) -> int:
        low = [(b * w) % 2**32 for b, w in zip(part, weights, strict=False)]
        return sum(v - 2**32 if v >= 2**31 else v for v in low)

    whole, rest = (_random.bits(0, 101, 0, place, torch.arange(65)) | 1 for place in (0, 1))
    rows = [row(bits[: 2**16]), row(bits[2**16 : 2**17])]
    expected = sum(r * w for r, w in zip(rows, whole.tolist(), strict=False)) + row(bits[2**17 :]) * int(rest[0])
    assert checksum(values) == expected % 2**64
    assert checksum(values.double()) == checksum(values) and checksum(values.view(-1, 1)) == checksum(values)


class WithState(TwoLayers):
    def __init__(self) -> None:
        super().__init__(torch.eye(3), torch.eye(3))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_buffers_that_are_state_count_and_tables_do_not():
    model = WithState()
    before = fingerprint(model)
    model.table += 1
    assert fingerprint(model) == before
    model.scale += 1
    assert fingerprint(model) != before


def test_parameters_that_are_not_here_count_by_their_shape():
    model = linear()
    model.w_in = nn.Parameter(torch.empty(4, 6, device="meta"))
    other = linear()
    other.w_in = nn.Parameter(torch.empty(4, 7, device="meta"))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model)) != fingerprint(other)


def test_the_same_model_in_another_precision_is_named_with_how_to_go_on():
    model: Any = fresh(dtype=torch.float32)
    reduction = reduction_of(model)
    low = fresh(dtype=torch.float32).to(torch.bfloat16)
    check_fingerprint(fresh(dtype=torch.float32).double(), reduction)
    with pytest.raises(
        ValueError, match=r"same model in different precision \(this one is in bfloat16\).*replace"
    ) as error:
        check_fingerprint(low, reduction)
    assert "\n" not in str(error.value)
    check_fingerprint(low, replace(reduction, fingerprint=fingerprint(low)))
    back = replace(reduction, fingerprint=fingerprint(low))
    with pytest.raises(ValueError, match=r"different precision \(this one is in float32\)"):
        check_fingerprint(model, back)


def test_a_model_in_compatibility_mode_is_named():
    model: Any = fresh(normalization_type="LN")
    reduction = reduction_of(model)
    model.enable_compatibility_mode()
    with pytest.raises(ValueError, match="this model is in compatibility mode, which changes its weights"):
        check_fingerprint(model, reduction)


def test_what_version_0_1_0_wrote_is_still_known():
    model = fresh(dtype=torch.float32)
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(f"{name}:{tuple(parameter.shape)}".encode() + parameter.detach().numpy().tobytes())
    old = replace(reduction_of(model), fingerprint=total.hexdigest()[:16])
    check_fingerprint(model, old)
    with pytest.raises(ValueError, match="reduction was made for the model"):
        check_fingerprint(fresh(seed=2, dtype=torch.float32), old)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["values", "reference"])
def test_values_that_are_not_finite_are_no_reduction(bad: float, part: str):
    model = linear()
    good = Values(model.units, (torch.zeros(6, 1),))
    broken = Values(model.units, (torch.zeros(6, 1).index_fill(0, torch.tensor([2]), bad),))
    for kept, which in ((Circuit.empty(model.units), "removed"), (Circuit.full(model.units), "kept")):
        with pytest.raises(ValueError, match=f"values of {which} units at hook_hidden are NaN or infinite"):
            Reduction(kept, **{"values": good, part: broken})
