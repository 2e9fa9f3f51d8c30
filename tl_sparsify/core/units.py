"""Units: the variables of the structural causal model, as one flat index over all of them.

A *site* is a hook point cut into units of one kind: the heads of ``blocks.3.attn.hook_z``, the neurons of
``blocks.3.mlp.hook_post``. ``Units`` concatenates sites, so that a score, a mask or a ranking over every unit of a
model is one tensor. ``Unit`` objects exist for printing and for naming a few of them.

A site reads an activation as ``[batch, pos, units, width]`` and writes it back: heads are ``width = d_head`` wide,
neurons ``width = 1``; whole layers are one unit of width ``d_model``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparsify._internal.checks import check_is_model
from tl_sparsify._internal.experts import experts_of
from tl_sparsify._internal.storage import parameter_count
from tl_sparsify.core.site import LETTER, Positions, Site

_KIND = {letter: kind for kind, letter in LETTER.items()} | dict.fromkeys(("PRE", "MID", "POST"), "direction")
_NAME = re.compile(r"(?:L(\d+))?(H|N|ERR|E|MLP|ATTN|RESID|D|PRE|MID|POST|S|F)(\d*)")


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


@dataclass(frozen=True)
class Unit:
    """One unit, for printing and for naming: ``units["L1H3"]``, ``units["L0N12"].at(4)``.

    Example:
        >>> unit = units["L1H3"]
        >>> unit.at(4), unit.index, unit.site.hook
        (L1H3@4, 3, 'blocks.1.attn.hook_z')
    """

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
    restricts all of them to a position, ``units.at("S1")`` to a span that the examples have by this name.

    Example:
        >>> both = tls.heads(model) + tls.neurons(model)
        >>> both, both["L0N12"].at(4), both.index("L1H0")
        (Units(780: 12 heads, 768 neurons), L0N12@4, 4)
    """

    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites is empty: units need at least one site")
        if len(set(self.sites)) != len(self.sites):
            twice = next(site for site in self.sites if self.sites.count(site) > 1)
            raise ValueError(f"sites holds {twice.hook}{twice.suffix} twice; each unit may stand once")
        named: dict[str, Site] = {}
        for site in self.sites:
            other = named.setdefault(site.name(0), site)
            if other is not site:
                raise ValueError(
                    f"sites {other.hook} and {site.hook} both have a unit {site.name(0)}: give them different layers"
                    + (", or join their bases" if site.basis is not None else "")
                )

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
        match = None if "->" in name else _NAME.match(name)
        if match is None:
            raise KeyError(f"{name!r} is no unit name; names look like {self.names[0]} or {self.names[-1]}")
        layer, kind = int(match[1] or 0), _KIND[match[2]]
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

    @property
    def placed_by_example(self) -> bool:
        """Whether some are at other positions in each example."""
        return any(isinstance(site.positions, Tensor | str) for site in self.sites)

    def for_examples(self, index: Int[Tensor, "batch"], spans: Mapping[str, Int[Tensor, "n 2"]] | None = None) -> Units:
        """The same units, with per-example positions, and those of ``spans``, taken for the examples ``index``.

        Raises:
            ValueError: units at a span that is not among ``spans``.
        """
        if not self.placed_by_example:
            return self
        return Units(tuple(site.for_examples(index, spans) for site in self.sites))

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
        return torch.cat([torch.full((site.size,), site.layer, device="cpu") for site in self.sites])

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


def check_positions(units: Units, n: int) -> None:
    """Refuse units whose positions are those of more or fewer than these ``n`` examples: they would be other examples'.

    Raises:
        ValueError: such positions.
    """
    for site in units.sites:
        if isinstance(site.positions, Tensor) and len(site.positions) != n:
            raise ValueError(
                f"positions of {site.hook} are places of {len(site.positions)} examples, and there are {n}: take those "
                "of a part with units.for_examples(index), or name a span, which every split has of its own"
            )


def _parse_positions(text: str) -> Positions:
    try:
        if ":" in text:
            start, _, stop = text.partition(":")
            return slice(int(start) if start else None, int(stop) if stop else None)
        if text[:1].isalpha():
            return text
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise KeyError(f"positions {text!r} do not parse; write @4, @1,3, @0:4 or @S1") from None


def select(chosen: Iterable[Unit]) -> tuple[Units, Bool[Tensor, "units"]]:
    """The sites of some units, and the mask of these units over them (a unit counts once)."""
    chosen = list(chosen)
    units = Units(tuple(dict.fromkeys(unit.site for unit in chosen)))
    mask = torch.zeros(len(units), dtype=torch.bool, device="cpu")
    for unit in chosen:
        mask[units.offsets[units.sites.index(unit.site)] + unit.index] = True
    return units, mask


def blocks_of(model: Any) -> list[tuple[int, Any]]:
    """The model's blocks, each with its number.

    Raises:
        ValueError: what is no model, or one without blocks.
    """
    check_is_model(model)
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"{type(model).__name__} has no blocks; name its hook points yourself: "
            'Units((Site(kind="neuron", layer=0, hook="...", size=...),))'
        )
    return list(enumerate(model.blocks))


def _sites(model: Any, kind: str, part: str, hook: str, weight: str | None) -> Units:
    sites: list[Site] = []
    for layer, block in blocks_of(model):
        name = f"blocks.{layer}.{hook}"
        module = getattr(block, part, None) if part else block
        if module is None or name not in model.hook_dict:
            continue
        # Sizes come from the layers: a folded model's differ, and its cfg fits none of them.
        size = 1 if weight is None else _size(module, kind, weight, name)
        if size:
            sites.append(Site(kind=kind, layer=layer, hook=name, size=size))
    if not sites:
        raise ValueError(f"{type(model).__name__} has no hook point blocks.*.{hook}: it has no {kind} units")
    return Units(tuple(sites))


def _size(module: Any, kind: str, weight: str, hook: str) -> int:
    """How many units a layer has: the rows of its output weight or, where that is packed or elsewhere (quantised,
    offloaded), what its output projection says that it takes in."""
    try:
        return getattr(module, weight).shape[0]
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        projection = getattr(module, "o" if kind == "head" else "out", None)
        linear = getattr(projection, "original_component", projection)
        inputs = getattr(linear, "in_features", getattr(linear, "nx", None))  # nx: transformers' Conv1D
        if inputs is None:
            what = type(getattr(module, "original_component", module)).__name__
            raise ValueError(
                f"{hook} has no {kind} units: its layer is a {what}, which has no one output weight (a mixture of "
                "experts?): use experts(model), mlps(model), heads(model) or attentions(model)"
            ) from error
        return inputs // module.config.d_head if kind == "head" else inputs


def heads(model: Any) -> Units:
    """All attention heads: ``blocks.{l}.attn.hook_z``, value a ``d_head`` vector per position. No model pass.

    Example:
        >>> tls.heads(model)
        Units(12: 12 heads)
    """
    return _sites(model, "head", "attn", "attn.hook_z", "W_O")


def neurons(model: Any) -> Units:
    """All MLP neurons: ``blocks.{l}.mlp.hook_post``, value a scalar per position. No model pass.

    Example:
        >>> tls.neurons(model)
        Units(768: 768 neurons)
    """
    return _sites(model, "neuron", "mlp", "mlp.hook_post", "W_out")


def experts(model: Any) -> Units:
    """The experts of every layer that is a mixture of experts: ``blocks.{l}.mlp.hook_experts``, value what the expert
    adds to its layer, a ``d_model`` vector per position (0 where the router does not choose it). The router is left
    alone, and so are experts that every token goes through. Experts do not fold. No model pass.

    Taking the experts apart costs a pass through them a second time, and a ``d_model`` vector for each of them at each
    position.

    Raises:
        ValueError: a model without a mixture of experts.

    Example:
        >>> tls.experts(model)  # of a Mixtral: Units(256: 256 experts)
        Traceback (most recent call last):
        ValueError: TransformerBridge has no mixture of experts: it has no expert units
    """
    sites: list[Site] = []
    for layer, _ in blocks_of(model):
        hook = f"blocks.{layer}.mlp.hook_experts"
        found = experts_of(model, hook)
        if found is not None:
            sites.append(Site(kind="expert", layer=layer, hook=hook, size=int(found[1].num_experts)))  # type: ignore[arg-type]
    if not sites:
        raise ValueError(f"{type(model).__name__} has no mixture of experts: it has no expert units")
    return Units(tuple(sites))


def mlps(model: Any) -> Units:
    """All whole MLP layers: ``blocks.{l}.hook_mlp_out``, value a ``d_model`` vector per position. No model pass.

    Example:
        >>> tls.mlps(model).names
        ('L0MLP', 'L1MLP', 'L2MLP')
    """
    return _sites(model, "mlp", "mlp", "hook_mlp_out", None)


def attentions(model: Any) -> Units:
    """All whole attention layers: ``blocks.{l}.hook_attn_out``, value a ``d_model`` vector per position.

    Example:
        >>> tls.attentions(model).names
        ('L0ATTN', 'L1ATTN', 'L2ATTN')
    """
    return _sites(model, "attention", "attn", "hook_attn_out", None)


def residuals(model: Any) -> Units:
    """The whole residual stream after each block: ``blocks.{l}.hook_resid_post``, a ``d_model`` vector per position.
    For interchange, where it is the ceiling of what a layer's units can carry; it cannot be folded. No model pass.

    Example:
        >>> tls.residuals(model).names
        ('L0RESID', 'L1RESID', 'L2RESID')
    """
    return _sites(model, "residual", "", "hook_resid_post", None)


def parameters(model: Any, units: Units) -> Float[Tensor, "units"]:
    """How many parameters each head, neuron or whole layer has in the weights: its share of its layer's attention or
    MLP, without the output bias. For a search by cost. No model pass.

    Raises:
        ValueError: units that are no part of the weights, such as directions.
    """
    parts = {"head": "attn", "attention": "attn", "neuron": "mlp", "mlp": "mlp"}
    found: list[Tensor] = []
    for site in units.sites:
        mixture = experts_of(model, site.hook) if site.kind == "expert" else None
        if mixture is not None:
            found.append(torch.full((site.size,), parameter_count(mixture[1]) / site.size, device="cpu"))
            continue
        if site.kind not in parts:
            raise ValueError(f"{site.kind} units of {site.hook} are no part of the weights: they have no parameters")
        part = getattr(dict(blocks_of(model))[site.layer], parts[site.kind])
        bias = getattr(part, "b_O" if parts[site.kind] == "attn" else "b_out", None)
        total = parameter_count(part)
        total -= 0 if bias is None else bias.numel()
        found.append(torch.full((site.size,), total / site.size, device="cpu"))
    return torch.cat(found)
