"""Circuit: which units are kept. Values: what removed units are set to. Reduction: both, for one model.

A circuit is a boolean vector over units with set algebra; a reduction is what search returns, what ablation, folding
and evaluation take, and what is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._files import read_tensors, write_tensors
from tl_sparsify.units import Site, Unit, Units


@dataclass(frozen=True, eq=False)
class Circuit:
    """The set of kept units: ``circuit.mask[i]`` says whether unit ``i`` of ``circuit.units`` is kept.

    ``&``, ``|``, ``-``, ``^`` and ``~`` are set operations; ``<=`` is inclusion.
    """

    units: Units
    mask: Bool[Tensor, "units"]

    def __post_init__(self) -> None:
        if self.mask.shape != (len(self.units),):
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}; {self.units!r} needs ({len(self.units)},)")

    @staticmethod
    def full(units: Units) -> Circuit:
        """Every unit kept."""
        return Circuit(units, torch.ones(len(units), dtype=torch.bool))

    @staticmethod
    def empty(units: Units) -> Circuit:
        """No unit kept."""
        return Circuit(units, torch.zeros(len(units), dtype=torch.bool))

    @staticmethod
    def of(units: Units, kept: Iterable[str | Unit]) -> Circuit:
        """The circuit of the named units; an unknown name is a ``KeyError`` that says what there is."""
        mask = torch.zeros(len(units), dtype=torch.bool)
        for unit in kept:
            mask[units.index(unit)] = True
        return Circuit(units, mask)

    def _same_units(self, other: Circuit) -> None:
        if self.units != other.units:
            raise ValueError(f"circuits over different units: {self.units!r} and {other.units!r}")

    def __and__(self, other: Circuit) -> Circuit:
        self._same_units(other)
        return Circuit(self.units, self.mask & other.mask)

    def __or__(self, other: Circuit) -> Circuit:
        self._same_units(other)
        return Circuit(self.units, self.mask | other.mask)

    def __xor__(self, other: Circuit) -> Circuit:
        self._same_units(other)
        return Circuit(self.units, self.mask ^ other.mask)

    def __sub__(self, other: Circuit) -> Circuit:
        self._same_units(other)
        return Circuit(self.units, self.mask & ~other.mask)

    def __invert__(self) -> Circuit:
        return Circuit(self.units, ~self.mask)

    def __le__(self, other: Circuit) -> bool:
        self._same_units(other)
        return bool((~self.mask | other.mask).all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.units == other.units and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.units, self.mask.numpy().tobytes()))

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __contains__(self, unit: str | Unit) -> bool:
        return bool(self.mask[self.units.index(unit)])

    @property
    def fraction(self) -> float:
        """The share of units kept."""
        return len(self) / len(self.units)

    @property
    def names(self) -> tuple[str, ...]:
        """The kept units' names, in flat order."""
        return tuple(name for name, kept in zip(self.units.names, self.mask.tolist(), strict=True) if kept)

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {len(self.units):,} units: {self.units.describe(self.mask)})"


@dataclass(frozen=True, eq=False)
class Values:
    """One value for every unit: per site a tensor ``[units, width]`` (a constant), or ``[batch, pos, units, width]``
    (the values of another run). Only constants fold. ``kind`` says how they were made, and is not compared."""

    units: Units
    tensors: tuple[Float[Tensor, "..."], ...]
    kind: str = "given"

    def __post_init__(self) -> None:
        if len(self.tensors) != len(self.units.sites):
            raise ValueError(f"{len(self.tensors)} tensors for the {len(self.units.sites)} sites of {self.units!r}")
        for site, tensor in zip(self.units.sites, self.tensors, strict=True):
            if tensor.ndim not in (2, 4) or tensor.shape[-2] != site.size:
                raise ValueError(
                    f"value of {site.hook} has shape {tuple(tensor.shape)}; it must be [{site.size}, width] "
                    f"or [batch, pos, {site.size}, width]"
                )

    @property
    def constant(self) -> bool:
        """Whether no value varies by example or position."""
        return all(tensor.ndim == 2 for tensor in self.tensors)

    def where(self, mask: Bool[Tensor, "units"], other: Values) -> Values:
        """These values where ``mask``, ``other``'s elsewhere."""
        parts = zip(self.units.split(mask), self.tensors, other.tensors, strict=True)
        return Values(self.units, tuple(torch.where(m[:, None].to(a.device), a, b) for m, a, b in parts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values) or self.units != other.units:
            return False
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))

    def __hash__(self) -> int:
        return hash((self.units, tuple(tuple(tensor.shape) for tensor in self.tensors)))

    def __repr__(self) -> str:
        return f"Values({'constant' if self.constant else 'of a run'} for {self.units!r})"


@dataclass(frozen=True, eq=False)
class Mixing:
    """A linear map within a site: unit ``rows[i]`` gains ``weights[i]`` times the value of unit ``columns[i]``.

    For units of width 1 (neurons, directions). Sparse, because few units are neighbours of one.
    """

    size: int
    rows: Int[Tensor, "entries"]
    columns: Int[Tensor, "entries"]
    weights: Float[Tensor, "entries"]

    def matrix(self, like: Float[Tensor, "..."]) -> Float[Tensor, "units units"]:
        """The sparse matrix ``[row, column]``, in the precision and on the device of ``like``."""
        index = torch.stack([self.rows, self.columns])
        with torch.sparse.check_sparse_tensor_invariants(False):
            return torch.sparse_coo_tensor(index, self.weights, (self.size,) * 2).to(like.device, like.dtype)

    @cached_property
    def _block(self) -> tuple[Int[Tensor, "removed"], Int[Tensor, "kept"]] | None:
        """The removed and the kept units where every removed one is mapped from the same kept ones, in order."""
        removed = self.rows.unique_consecutive()
        width = len(self.rows) // max(1, len(removed))
        if width * len(removed) != len(self.rows) or not len(self.rows):
            return None
        rows, columns = self.rows.view(len(removed), width), self.columns.view(len(removed), width)
        same = torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))
        return (removed, columns[0]) if same else None

    def of(self, v: Float[Tensor, "batch pos units one"]) -> Float[Tensor, "batch pos units one"]:
        """What every unit gains, for values ``v``."""
        if self._block is not None:
            removed, kept = (part.to(v.device) for part in self._block)
            gained = v[:, :, kept, 0] @ self.weights.to(v).view(len(removed), len(kept)).T
            return torch.zeros_like(v).index_copy(2, removed, gained[..., None])
        flat = v.reshape(-1, self.size).T
        return torch.sparse.mm(self.matrix(v), flat).T.reshape(v.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mixing) or self.size != other.size:
            return False
        mine, theirs = (self.rows, self.columns, self.weights), (other.rows, other.columns, other.weights)
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash((self.size, len(self.rows)))


@dataclass(frozen=True, eq=False)
class Reduction:
    """A circuit and the constants that replace its removed units, for the model with ``fingerprint``.

    Attributes:
        circuit: the kept units.
        values: a constant for every unit; the kept units' are not used by the reduction itself.
        reference: the constants of the empty circuit that faithfulness is measured from (``values`` before a refit).
        kind: how the values were made (``"mean"``, ``"zero"``, ``"refit"``; ``"given"``: by the user): part of every
            number.
        fingerprint: of the model, checked by everything that takes both; ``None`` is never refused.
        mixing: for each site a linear map of kept units that is added to the constants of removed ones, or ``None``:
            the affine fold into neighbours. Made for this circuit only.
    """

    circuit: Circuit
    values: Values
    kind: str = "given"
    reference: Values | None = None
    fingerprint: str | None = None
    mixing: tuple[Mixing | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.circuit.units != self.values.units:
            raise ValueError(f"values are for {self.values.units!r}, the circuit for {self.circuit.units!r}")
        if not self.values.constant:
            raise ValueError("values vary by example or position: a reduction needs constants, which fold")
        if self.mixing is not None:
            self._check_mixing(self.mixing)

    def _check_mixing(self, mixing: tuple[Mixing | None, ...]) -> None:
        if len(mixing) != len(self.units.sites):
            raise ValueError(f"mixing has {len(mixing)} parts for the {len(self.units.sites)} sites of {self.units!r}")
        for site, kept, part in zip(self.units.sites, self.units.split(self.circuit.mask), mixing, strict=True):
            if part is None:
                continue
            if part.size != site.size or site.kind not in ("neuron", "direction"):
                raise ValueError(f"mixing of {site.hook} is for {part.size} units, not {site.size} {site.kind} units")
            if bool(kept[part.rows].any()) or not bool(kept[part.columns].all()):
                raise ValueError(f"mixing of {site.hook} maps from removed or to kept units: is it of this circuit?")

    @property
    def units(self) -> Units:
        """All units, kept or removed."""
        return self.circuit.units

    @property
    def baseline(self) -> Values:
        """The constants that the empty circuit is measured with (``reference``, else ``values``)."""
        return self.values if self.reference is None else self.reference

    def with_circuit(self, circuit: Circuit) -> Reduction:
        """The same constants with another circuit.

        Raises:
            ValueError: a reduction with affine replacements, which were fitted for their own circuit.
        """
        if self.mixing is not None and circuit != self.circuit:
            raise ValueError("mixing was fitted for its own circuit: take another circuit first, then fit neighbours")
        return replace(self, circuit=circuit)

    def for_examples(self, index: Int[Tensor, "batch"]) -> Reduction:
        """The same reduction, with per-example positions taken for the examples ``index``."""
        units = self.units.for_examples(index)
        if units is self.units:
            return self
        reference = None if self.reference is None else replace(self.reference, units=units)
        circuit, values = Circuit(units, self.circuit.mask), replace(self.values, units=units)
        return replace(self, circuit=circuit, values=values, reference=reference)

    def save(self, path: str | Path) -> None:
        """Write json and tensors to one safetensors file, with a checksum: complete, or not at all."""
        sites = [_site_to_json(site) for site in self.units.sites]
        header = {"sites": sites, "kind": self.kind, "fingerprint": self.fingerprint}
        tensors = {"mask": self.circuit.mask}
        tensors |= {f"values.{i}": tensor for i, tensor in enumerate(self.values.tensors)}
        if self.reference is not None:
            header["reference_kind"] = self.reference.kind
            tensors |= {f"reference.{i}": tensor for i, tensor in enumerate(self.reference.tensors)}
        tensors |= {f"basis.{i}": site.basis for i, site in enumerate(self.units.sites) if site.basis is not None}
        for i, part in enumerate(self.mixing or ()):
            if part is not None:
                parts = {"rows": part.rows, "columns": part.columns, "weights": part.weights}
                tensors |= {f"mixing.{i}.{name}": tensor for name, tensor in parts.items()}
        write_tensors(Path(path), "reduction", header, tensors)

    @staticmethod
    def load(path: str | Path) -> Reduction:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, truncated or no reduction.
        """
        header, tensors = read_tensors(Path(path), "reduction")
        bases = [tensors.get(f"basis.{i}") for i in range(len(header["sites"]))]
        sites = [_site_from_json(site, basis) for site, basis in zip(header["sites"], bases, strict=True)]
        units = Units(tuple(sites))
        n = range(len(sites))
        reference = None
        if "reference.0" in tensors:
            reference = Values(units, tuple(tensors[f"reference.{i}"] for i in n), header["reference_kind"])
        values = Values(units, tuple(tensors[f"values.{i}"] for i in n), header["kind"])
        mixing = tuple(
            Mixing(sites[i].size, *(tensors[f"mixing.{i}.{part}"] for part in ("rows", "columns", "weights")))
            if f"mixing.{i}.rows" in tensors
            else None
            for i in n
        )
        kept = Circuit(units, tensors["mask"])
        affine = mixing if any(mixing) else None
        return Reduction(kept, values, header["kind"], reference, header["fingerprint"], affine)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Reduction)
            and (self.circuit, self.values, self.reference) == (other.circuit, other.values, other.reference)
            and self.mixing == other.mixing
            and (self.kind, self.fingerprint) == (other.kind, other.fingerprint)
        )

    def __hash__(self) -> int:
        return hash((self.circuit, self.kind, self.fingerprint))

    def __repr__(self) -> str:
        return f"Reduction({self.circuit!r}, {self.kind} values)"


def _site_to_json(site: Site) -> dict[str, Any]:
    if isinstance(site.positions, Tensor | slice):
        raise ValueError(f"positions of {site.hook} vary by example or are a slice: such units cannot be saved")
    return {
        "kind": site.kind,
        "layer": site.layer,
        "hook": site.hook,
        "size": site.size,
        "positions": None if site.positions is None else list(site.positions),  # type: ignore[arg-type]
        "also": list(site.also),
    }


def _site_from_json(site: dict[str, Any], basis: Float[Tensor, "width size"] | None) -> Site:
    return Site(**site | {"basis": basis, "also": tuple(site.get("also", ()))})


_SAMPLED = 65_536


def fingerprint(model: Any) -> str:
    """A hash of the model's parameters: names, shapes and values (every one up to 65,536 in a tensor, else that many
    evenly spaced), in float32, so that a model's float64 copy has the same. No model pass."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        flat = parameter.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        total.update(f"{name}:{tuple(parameter.shape)}".encode() + flat.numpy().tobytes())
    return total.hexdigest()[:16]


def check_fingerprint(model: Any, reduction: Reduction) -> None:
    """Refuse a reduction that was made for another model."""
    if reduction.fingerprint is None:
        return
    found = fingerprint(model)
    if found != reduction.fingerprint:
        raise ValueError(
            f"reduction was made for the model {reduction.fingerprint}, this one is {found}: "
            "load the model that it was made for, or make a reduction for this one"
        )
