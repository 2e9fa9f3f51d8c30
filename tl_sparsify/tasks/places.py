"""Places: the units of a small transformer by layer, number and position, named before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit


@dataclass(frozen=True)
class Places:
    """The units of a transformer whose layers are alike: ``Places(heads=4, neurons=32).head(0, 1, position=3)``.

    Attributes:
        heads, neurons: how many each layer has.
    """

    heads: int
    neurons: int

    def head(self, layer: int, index: int, *, position: int) -> Unit:
        """A head at a position. No model pass."""
        return Unit(Site("head", layer, f"blocks.{layer}.attn.hook_z", self.heads, positions=position), index)

    def neuron(self, layer: int, index: int, *, position: int) -> Unit:
        """A neuron at a position. No model pass."""
        return Unit(Site("neuron", layer, f"blocks.{layer}.mlp.hook_post", self.neurons, positions=position), index)
