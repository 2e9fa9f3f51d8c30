"""Units: the variables of the structural causal model, as one flat index over all of them.

A *site* is a hook point cut into units of one kind: the heads of ``blocks.3.attn.hook_z``, the neurons of
``blocks.3.mlp.hook_post``. ``Units`` concatenates sites, so that a score, a mask or a ranking over every unit of a
model is one tensor. ``Unit`` objects exist for printing and for naming a few of them.

A site reads an activation as ``[batch, pos, units, width]`` and writes it back: heads are ``width = d_head`` wide,
neurons ``width = 1``; whole layers are one unit of width ``d_model``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Positions = None | int | slice | Sequence[int] | Tensor
"""Where a unit is meant: everywhere (``None``), at one or several positions, or at one position per example."""

_LETTER = {"head": "H", "neuron": "N", "mlp": "MLP", "attention": "ATTN", "residual": "RESID"}
_WHOLE = ("mlp", "attention", "residual")
_KIND = {letter: kind for kind, letter in _LETTER.items()}
_NAME = re.compile(r"L(\d+)(H|N|MLP|ATTN|RESID)(\d*)")


@runtime_checkable
class Model(Protocol):
    """What is asked of a model: any ``TransformerBridge`` or ``HookedRootModule`` has it."""

    training: bool
    hook_dict: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def hooks(self, fwd_hooks: list[Any]) -> AbstractContextManager[Any]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


@dataclass(frozen=True, eq=False)
class Site:
    """One hook point cut into ``size`` units of one ``kind``, at all or at the named ``positions``."""

    kind: str
    layer: int
    hook: str
    size: int
    positions: Positions = None

    def __post_init__(self) -> None:
        if self.kind not in _LETTER:
            raise ValueError(f"kind is {self.kind!r}; the known kinds are {', '.join(_LETTER)}")
        if self.size < 1:
            raise ValueError(f"size of {self.hook} is {self.size}; a site has at least one unit")
        if isinstance(self.positions, int):
            object.__setattr__(self, "positions", (self.positions,))
        elif isinstance(self.positions, list):
            object.__setattr__(self, "positions", tuple(self.positions))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        where = self.positions
        where = (*where.flatten().tolist(), "each") if isinstance(where, Tensor) else where
        where = (where.start, where.stop, where.step, "slice") if isinstance(where, slice) else where
        return (self.kind, self.layer, self.hook, self.size, where)

    @property
    def suffix(self) -> str:
        """How the positions print behind a unit's name: nothing, ``@4``, ``@1,3``, ``@0:4`` or ``@each``."""
        where = self.positions
        if where is None:
            return ""
        if isinstance(where, Tensor):
            return "@each"
        if isinstance(where, slice):
            return f"@{'' if where.start is None else where.start}:{'' if where.stop is None else where.stop}"
        return "@" + ",".join(str(position) for position in where)  # type: ignore[union-attr]

    def name(self, index: int) -> str:
        """The name of unit ``index``: ``L1H3``, ``L0N12@4``, ``L2MLP``."""
        letter = _LETTER[self.kind]
        return f"L{self.layer}{letter}{'' if self.kind in _WHOLE else index}{self.suffix}"

    def read(self, activation: Float[Tensor, "..."]) -> Float[Tensor, "batch pos units width"]:
        """The units' values in the hook point's activation (a view where possible).

        Raises:
            ValueError: the activation's shape does not hold ``size`` units.
        """
        wanted = {"head": "[batch, pos, units, width]", "neuron": "[batch, pos, units] or [batch, units]"}
        if self.kind == "head" and activation.ndim == 4 and activation.shape[2] == self.size:
            return activation
        if self.kind == "neuron" and activation.ndim in (2, 3) and activation.shape[-1] == self.size:
            return activation.unsqueeze(-1) if activation.ndim == 3 else activation[:, None, :, None]
        if self.kind in _WHOLE and activation.ndim == 3 and self.size == 1:
            return activation.unsqueeze(2)
        raise ValueError(
            f"{self.hook} yields {tuple(activation.shape)}; a site of {self.size} {self.kind} units needs "
            f"{wanted.get(self.kind, '[batch, pos, d_model]')}. Are the units those of this model?"
        )

    def position_mask(self, batch: int, pos: int) -> Bool[Tensor, "#batch pos"] | None:
        """Which positions are meant, or ``None`` for all of them.

        Raises:
            ValueError: a position outside the input, or not one position per example.
        """
        where = self.positions
        if where is None:
            return None
        if isinstance(where, slice):
            mask = torch.zeros(1, pos, dtype=torch.bool)
            mask[:, where] = True
            return mask
        index = where if isinstance(where, Tensor) else torch.tensor([where])
        if isinstance(where, Tensor):
            if where.shape[:1] != (batch,):
                raise ValueError(
                    f"positions of {self.hook} name {tuple(where.shape)} places for a batch of {batch}: "
                    "give one index per example"
                )
            index = where.reshape(batch, -1)
        if bool(((index < -pos) | (index >= pos)).any()):
            raise ValueError(f"positions {self.suffix[1:]} of {self.hook} lie outside an input of length {pos}")
        return torch.zeros(index.shape[0], pos, dtype=torch.bool).scatter_(1, index.cpu() % pos, True)

    def for_examples(self, index: Int[Tensor, "batch"]) -> Site:
        """The same site with per-example positions taken for the examples ``index``."""
        return replace(self, positions=self.positions[index]) if isinstance(self.positions, Tensor) else self


@dataclass(frozen=True)
class Unit:
    """One unit, for printing and for naming: ``units["L1H3"]``, ``units["L0N12"].at(4)``."""

    site: Site
    index: int

    @property
    def name(self) -> str:
        """``L1H3``, ``L0N12@4``, ..."""
        return self.site.name(self.index)

    def at(self, positions: Positions) -> Unit:
        """This unit at the given positions only."""
        return replace(self, site=replace(self.site, positions=positions))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Units:
    """A flat index over the units of several sites: unit ``i`` is one entry of every ``[units]`` tensor.

    ``units["L1H3"]`` and ``units[17]`` give a :class:`Unit`, ``units + units`` concatenates, ``units.at(4)``
    restricts all of them to a position.
    """

    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites is empty: units need at least one site")
        if len(set(self.sites)) != len(self.sites):
            twice = next(site for site in self.sites if self.sites.count(site) > 1)
            raise ValueError(f"sites holds {twice.hook}{twice.suffix} twice; each unit may stand once")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The flat index of each site's first unit, and at the end the number of units."""
        ends = [0]
        for site in self.sites:
            ends.append(ends[-1] + site.size)
        return tuple(ends)

    def __len__(self) -> int:
        return self.offsets[-1]

    @property
    def slices(self) -> tuple[slice, ...]:
        """Each site's range in the flat index."""
        return tuple(slice(a, b) for a, b in zip(self.offsets, self.offsets[1:], strict=False))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every unit's name, in flat order."""
        return tuple(site.name(i) for site in self.sites for i in range(site.size))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def index(self, unit: str | Unit) -> int:
        """The flat index of a unit.

        Raises:
            KeyError: no such unit here; the message names the nearest part of the model.
        """
        name = unit if isinstance(unit, str) else unit.name
        if name in self._numbers:
            return self._numbers[name]
        match = _NAME.match(name)
        if match is None:
            raise KeyError(f"{name!r} is no unit name; names look like {self.names[0]} or {self.names[-1]}")
        layer, kind = int(match[1]), _KIND[match[2]]
        same = [site for site in self.sites if (site.layer, site.kind) == (layer, kind)]
        has = f"layer {layer} has {sum(site.size for site in same)} of kind {kind}"
        raise KeyError(f"unknown unit {name!r}: {has} among these {self!r}")

    def __getitem__(self, unit: str | int) -> Unit:
        if isinstance(unit, str) and unit not in self._numbers and "@" in unit:
            name, _, where = unit.partition("@")
            return self[name].at(_parse_positions(where))
        number = self.index(unit) if isinstance(unit, str) else range(len(self))[unit]
        for site, part in zip(self.sites, self.slices, strict=True):
            if number < part.stop:
                return Unit(site, number - part.start)
        raise IndexError(number)

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(site, i) for site in self.sites for i in range(site.size))

    def __add__(self, other: Units) -> Units:
        return Units(self.sites + other.sites)

    def at(self, positions: Positions) -> Units:
        """The same units at the given positions only."""
        return Units(tuple(replace(site, positions=positions) for site in self.sites))

    def for_examples(self, index: Int[Tensor, "batch"]) -> Units:
        """The same units, with per-example positions taken for the examples ``index``."""
        if not any(isinstance(site.positions, Tensor) for site in self.sites):
            return self
        return Units(tuple(site.for_examples(index) for site in self.sites))

    def split(self, flat: Shaped[Tensor, "*batch units"]) -> tuple[Shaped[Tensor, "*batch some"], ...]:
        """Cut a tensor over all units into one per site."""
        return tuple(flat[..., part] for part in self.slices)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Every unit's kind, in flat order."""
        return tuple(site.kind for site in self.sites for _ in range(site.size))

    @cached_property
    def layers(self) -> Int[Tensor, "units"]:
        """Every unit's layer, in flat order."""
        return torch.cat([torch.full((site.size,), site.layer) for site in self.sites])

    def describe(self, mask: Bool[Tensor, "units"] | None = None) -> str:
        """``31 heads, 169 neurons``: the number of units of each kind (within ``mask``)."""
        counts: dict[str, int] = {}
        for site, part in zip(self.sites, self.slices, strict=True):
            n = site.size if mask is None else int(mask[part].sum())
            counts[site.kind] = counts.get(site.kind, 0) + n
        plural = {"mlp": "MLPs", "attention": "attentions"}
        return ", ".join(f"{n:,} {plural.get(kind, kind + 's') if n != 1 else kind}" for kind, n in counts.items())

    def __repr__(self) -> str:
        return f"Units({len(self):,}: {self.describe()})"


def _parse_positions(text: str) -> Positions:
    try:
        if ":" in text:
            start, _, stop = text.partition(":")
            return slice(int(start) if start else None, int(stop) if stop else None)
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise KeyError(f"positions {text!r} do not parse; write @4, @1,3 or @0:4") from None


def select(chosen: Iterable[Unit]) -> tuple[Units, Bool[Tensor, "units"]]:
    """The sites of some units, and the mask of these units over them (a unit counts once)."""
    chosen = list(chosen)
    units = Units(tuple(dict.fromkeys(unit.site for unit in chosen)))
    mask = torch.zeros(len(units), dtype=torch.bool)
    for unit in chosen:
        mask[units.offsets[units.sites.index(unit.site)] + unit.index] = True
    return units, mask


def _blocks(model: Any) -> list[tuple[int, Any]]:
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"{type(model).__name__} has no blocks; name its hook points yourself: "
            'Units((Site(kind="neuron", layer=0, hook="...", size=...),))'
        )
    return list(enumerate(model.blocks))


def _sites(model: Any, kind: str, part: str, hook: str, weight: str | None) -> Units:
    sites: list[Site] = []
    for layer, block in _blocks(model):
        name = f"blocks.{layer}.{hook}"
        module = getattr(block, part, None) if part else block
        if module is None or name not in model.hook_dict:
            continue
        # Sizes come from the weights: a folded model's layers differ, and its cfg fits none of them.
        size = 1 if weight is None else getattr(module, weight).shape[0]
        if size:
            sites.append(Site(kind=kind, layer=layer, hook=name, size=size))
    if not sites:
        raise ValueError(f"{type(model).__name__} has no hook point blocks.*.{hook}: it has no {kind} units")
    return Units(tuple(sites))


def heads(model: Any) -> Units:
    """All attention heads: ``blocks.{l}.attn.hook_z``, value a ``d_head`` vector per position. No model pass."""
    return _sites(model, "head", "attn", "attn.hook_z", "W_O")


def neurons(model: Any) -> Units:
    """All MLP neurons: ``blocks.{l}.mlp.hook_post``, value a scalar per position. No model pass."""
    return _sites(model, "neuron", "mlp", "mlp.hook_post", "W_out")


def mlps(model: Any) -> Units:
    """All whole MLP layers: ``blocks.{l}.hook_mlp_out``, value a ``d_model`` vector per position. No model pass."""
    return _sites(model, "mlp", "mlp", "hook_mlp_out", None)


def attentions(model: Any) -> Units:
    """All whole attention layers: ``blocks.{l}.hook_attn_out``, value a ``d_model`` vector per position."""
    return _sites(model, "attention", "attn", "hook_attn_out", None)


def residuals(model: Any) -> Units:
    """The whole residual stream after each block: ``blocks.{l}.hook_resid_post``, a ``d_model`` vector per position.
    For interchange, where it is the ceiling of what a layer's units can carry; it cannot be folded. No model pass."""
    return _sites(model, "residual", "", "hook_resid_post", None)
