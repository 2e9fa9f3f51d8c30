"""Hierarchical equality in two layers of neurons worked out by hand, its causal model, and pairs of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_sparsify import (
    Alignment,
    CausalModel,
    Circuit,
    Examples,
    Pairs,
    Reduction,
    Site,
    Unit,
    Units,
    Values,
    fingerprint,
)

SYMBOLS = 3
INPUTS = ("a", "b", "c", "d")
EVERY = np.array(list(itertools.product(range(SYMBOLS), repeat=4)))
SAME, DIFFERENT = 0, 1
ANSWERS = {True: SAME, False: DIFFERENT}
EQUALITY = CausalModel(
    INPUTS,
    {"left": lambda a, b: a == b, "right": lambda c, d: c == d, "same": lambda left, right: left == right},
    "same",
)
FIRST = Site("neuron", 0, "hook_first", 2 * SYMBOLS + 2)
SECOND = Site("neuron", 1, "hook_second", 4)
UNITS = Units((FIRST, SECOND))
LEFT = [Unit(FIRST, i) for i in range(SYMBOLS)]  # neuron i: a = b = i
RIGHT = [Unit(FIRST, SYMBOLS + i) for i in range(SYMBOLS)]  # neuron i: c = d = i
BOTH, NEITHER = Unit(SECOND, 0), Unit(SECOND, 1)
UNREAD = [Unit(FIRST, 2 * SYMBOLS), Unit(SECOND, 2)]
TRUE = Alignment({"left": LEFT, "right": RIGHT, "same": [BOTH, NEITHER]})


class Network(HookedRootModule):
    """Hierarchical equality in two layers of ReLU neurons, worked out by hand.

    First layer: ``a = b = s``, ``c = d = s`` for every symbol s, and two neurons that nobody reads (a = 0, d = 0).
    Second: both pairs equal, neither, one that nobody reads, and one that answers "different", whatever the rest, on
    inputs with a = ``blind``.
    """

    def __init__(self, blind: int | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4 * SYMBOLS, FIRST.size), nn.Linear(FIRST.size + SYMBOLS, SECOND.size)
        self.out = nn.Linear(SECOND.size, 2)
        self.hook_first, self.hook_second = HookPoint(), HookPoint()
        self.setup()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for symbol, side in itertools.product(range(SYMBOLS), range(2)):
                neuron, start = side * SYMBOLS + symbol, 2 * side * SYMBOLS + symbol
                self.first.weight[neuron, [start, start + SYMBOLS]] = 1.0
                self.first.bias[neuron] = -1.0
            self.first.weight[2 * SYMBOLS, 0] = self.first.weight[2 * SYMBOLS + 1, 3 * SYMBOLS] = 1.0
            self.second.weight[0, : 2 * SYMBOLS], self.second.bias[0] = 1.0, -1.0
            self.second.weight[1, : 2 * SYMBOLS], self.second.bias[1] = -1.0, 1.0
            self.second.weight[2, 0] = 1.0
            if blind is not None:
                self.second.weight[3, FIRST.size + blind] = 1.0
            self.out.weight[SAME, :2] = 1.0
            self.out.bias[DIFFERENT], self.out.weight[DIFFERENT, 3] = 0.5, 9.0
        self.double().eval()

    def forward(self, tokens: Tensor) -> Tensor:
        seen = nn.functional.one_hot(tokens, SYMBOLS).double().flatten(1)
        first = self.hook_first(self.first(seen).relu())
        return self.out(self.hook_second(self.second(torch.cat([first, seen[:, :SYMBOLS]], 1)).relu()))


def named(rows: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(INPUTS, rows.T, strict=True))


def examples(rows: np.ndarray, **more: Any) -> Examples:
    labels = [[ANSWERS[bool(same)]] for same in EQUALITY.run(named(rows))["same"]]
    return Examples(torch.tensor(rows), torch.tensor(labels), **more)


def drawn(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return EVERY[rng.integers(len(EVERY), size=n)], EVERY[rng.integers(len(EVERY), size=n)]


def pairs_of(base: np.ndarray, source: np.ndarray, answers: Mapping[Any, int] = ANSWERS) -> Pairs:
    return Pairs(named(base), named(source), examples(base), examples(source), answers)


def removal(model: Any, gone: Sequence[Unit], value: float = 0.0) -> Reduction:
    values = Values(UNITS, tuple(torch.full((site.size, 1), value, dtype=torch.float64) for site in UNITS.sites))
    return Reduction(~Circuit.of(UNITS, gone), values, fingerprint=fingerprint(model))


def counted(model: Any, run: Callable[[], Any]) -> tuple[Any, int]:
    """What ``run`` gives, and how many rows of input the model and its copies ran on."""
    rows = 0

    def count(module: Any, inputs: tuple[Any, ...]) -> None:
        nonlocal rows
        rows += len(inputs[0])

    handle = model.register_forward_pre_hook(count)
    try:
        return run(), rows
    finally:
        handle.remove()
