"""A network that adds two numbers in one place, which so carries the answer, and pairs of such inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_sparsify import CausalModel, Examples, Pairs, Site, Unit

SUM = CausalModel(("a", "b"), {"first": lambda a: a, "total": lambda first, b: (first + b) % 4}, "total")


PLACE = [Unit(Site("neuron", 0, "hook_place", 4), i) for i in range(4)]


class Carrier(HookedRootModule):
    """(a + b) % 4 in one place, which so carries the answer, and never a alone."""

    def __init__(self):
        super().__init__()
        self.hook_place = HookPoint()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.setup()
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scale * self.hook_place(torch.nn.functional.one_hot(tokens.sum(1) % 4, 4).float())


def sums(base: Sequence[tuple[int, int]], source: Sequence[tuple[int, int]]) -> Pairs:
    sides = [torch.tensor(side) for side in (base, source)]
    inputs = [dict(zip("ab", side.T.numpy(), strict=True)) for side in sides]
    examples = [Examples(side, side.sum(1, keepdim=True) % 4) for side in sides]
    return Pairs(*inputs, *examples, {i: i for i in range(4)})
