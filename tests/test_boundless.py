"""Boundless DAS finds how many directions carry a variable that was planted in a random rotation, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import unchanged
from helpers.verification import PARITY, answered_by, native, native_pairs
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import tl_sparsify as tls

WIDTH = 12


class Rotated(HookedRootModule):
    """The sum of two numbers (and of no third), each of which ``carried`` directions of a rotated activation carry."""

    def __init__(self, carried: int, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.turn = nn.Parameter(torch.linalg.qr(drawn).Q)
        self.signs = nn.Parameter(2.0 * ((torch.arange(2**carried)[:, None] >> torch.arange(carried)) & 1) - 1)
        self.hook_hidden = HookPoint()
        self.setup()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        carried, n = self.signs.shape[1], len(self.signs)
        rest = torch.zeros(len(tokens), WIDTH - 3 * carried)
        hidden = torch.cat([*(self.signs[tokens[:, i]] for i in range(3)), rest], 1) @ self.turn.T
        read = self.hook_hidden(hidden) @ self.turn
        first, second = ((4 * read[:, i * carried : (i + 1) * carried] @ self.signs.T).softmax(1) for i in range(2))
        return 8 * torch.stack([first[:, [s]] * second.roll(s, 1) for s in range(n)]).sum(0)[:, None]


def pairs(numbers: int, seed: int, n: int = 256) -> tls.Pairs:
    rows = np.random.default_rng(seed).integers(numbers, size=(2, n, 3))
    base, source = (
        tls.Examples(torch.tensor(r), torch.tensor((r[:, :2].sum(1)) % numbers)[:, None], choices=torch.arange(numbers))
        for r in rows
    )
    names: list[dict[str, Any]] = [dict(zip(("x", "y", "z"), r.T, strict=True)) for r in rows]
    return tls.Pairs(names[0], names[1], base, source, {i: i for i in range(numbers)})


def added(numbers: int) -> tls.CausalModel:
    return tls.CausalModel(
        ("x", "y", "z"), {"first": lambda x: x, "sum": lambda first, y: (first + y) % numbers}, "sum"
    )


@pytest.mark.parametrize(("carried", "seed"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_the_planted_number_of_directions_is_found_and_the_controls_find_nothing(carried: int, seed: int):
    model: Any = Rotated(carried, seed)
    numbers = 2**carried
    train, test = pairs(numbers, 1), pairs(numbers, 2)
    with unchanged(model):
        found = tls.boundless_das(model, added(numbers), "first", train, test, hook="hook_hidden", seed=seed)
    best = found.row("boundless", "the variable")
    assert abs(best.rank - carried) <= 1 and best.accuracy > 0.97 and best.changed > 0.97
    assert best.lower > 0.9 and best.parameters == WIDTH**2 + 1
    planted = model.turn.detach()[:, :carried]
    units: list[Any] = list(found.alignment.units["first"])
    basis = torch.stack([unit.site.basis[:, unit.index] for unit in units], 1)
    assert basis.shape[1] == best.rank
    if best.rank >= carried:  # what was planted lies in what is found: of random directions a sixth to a third would
        assert (basis.T @ planted).square().sum() > 0.8 * carried
    for method in ("boundless", "DAS"):
        made_up = found.row(method, "a random variable")
        assert made_up.accuracy < 1 / numbers + 0.15 and made_up.fitted < 0.6
        assert found.row(method, "random weights").accuracy < 0.97
        assert found.row(method, "the variable").rank == best.rank
    assert found.row("DAS", "the variable").accuracy > 0.9
    again = tls.verify(model, added(numbers), found.alignment, test, draws=1)
    assert again.verdict("first").accuracy == best.accuracy


def test_it_is_the_same_for_the_same_seed_and_also_after_refusals():
    model: Any = Rotated(2, 0)
    some: dict[str, Any] = {"hook": "hook_hidden", "epochs": 1}
    train = pairs(4, 1, 64)
    one, two = (tls.boundless_das(model, added(4), "first", train, train, **some) for _ in range(2))
    assert one.rows == two.rows and repr(one).startswith("BoundlessResult(")
    with pytest.raises(KeyError, match="no 'DAS' on 'nothing'"):
        one.row("DAS", "nothing")


def test_what_cannot_be_learnt_is_refused():
    model: Any = Rotated(2, 0)
    train = pairs(4, 1, 32)
    some: tuple[tuple[dict[str, Any], str], ...] = (
        ({"epochs": 0}, "epochs"),
        ({"price": -1.0}, "price is -1"),
        ({"hook": "hook_nowhere"}, "no hook point 'hook_nowhere'"),
    )
    for wrong, message in some:
        given: dict[str, Any] = {"hook": "hook_hidden"} | wrong
        with pytest.raises(ValueError, match=message), unchanged(model):
            tls.boundless_das(model, added(4), "first", train, train, **given)
    with pytest.raises(ValueError, match="variable is 'second'; there are"):
        tls.boundless_das(model, added(4), "second", train, train, hook="hook_hidden")
    with pytest.raises(ValueError, match="changes the answer of no pair"):
        alike = tls.Pairs(train.base_inputs, train.base_inputs, train.base, train.base, train.answers)
        tls.boundless_das(model, added(4), "first", alike, alike, hook="hook_hidden")


def test_half_precision_models_are_searched_too():
    model = native().to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    some = answered_by(model, native_pairs(60))
    settings: dict[str, Any] = {"hook": "blocks.0.hook_resid_post", "position": 1, "epochs": 1}
    found = tls.boundless_das(model, PARITY, "odd", some, some, **settings)
    basis = found.alignment.units["odd"][0].site.basis
    assert basis is not None and basis.dtype == torch.float32
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-4)
