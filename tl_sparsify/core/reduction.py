"""Reduction: a circuit and what replaces its removed units, for one model. It is what search returns, what ablation,
folding and evaluation take, and what is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked_fields
from tl_sparsify._internal.encoders import Encoder
from tl_sparsify._internal.files import read_tensors, reading, write_tensors
from tl_sparsify._internal.storage import checksum
from tl_sparsify.core.circuit import (
    FIRST_TOKENS,
    REFIT,
    REFITTED_NEIGHBOURS,
    Circuit,
    FirstToken,
    NeighbourMap,
    Values,
)
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units


@checked_fields
@dataclass(frozen=True, eq=False)
class Reduction:
    """A circuit and the constants that replace its removed units, for the model with ``fingerprint``.

    Attributes:
        circuit: the kept units.
        values: a constant for every unit; the kept units' are not used by the reduction itself. Or, of
            :func:`constants.counterfactual`, what each unit is on an example's counterfactual input.
        reference: the constants of the empty circuit that faithfulness is measured from (``values`` before a refit).
        fingerprint: of the model, checked by everything that takes both; ``None`` is never refused.
        mixing: for each site a linear map of kept units that is added to the constants of removed ones, or ``None``:
            the affine fold into neighbours. Made for this circuit only.
        first_token: at which first tokens removed units keep their own values (:data:`circuit.FirstToken`).

    Example:
        >>> reduction.save("half.reduction")
        >>> tls.Reduction.load("half.reduction") == reduction
        True
    """

    circuit: Circuit
    values: Values
    reference: Values | None = None
    fingerprint: str | None = None
    mixing: tuple[NeighbourMap | None, ...] | None = None
    first_token: FirstToken = "bos"

    def __post_init__(self) -> None:
        if self.first_token not in FIRST_TOKENS:
            raise ValueError(f"first_token is {self.first_token!r}; it is one of {', '.join(FIRST_TOKENS)}")
        if self.circuit.units != self.values.units:
            raise ValueError(f"values are for {self.values.units!r}, the circuit for {self.circuit.units!r}")
        if not self.values.constant and not self.values.paired:
            raise ValueError("values vary by example or position: a reduction needs constants, which fold")
        if self.values.paired and self.mixing is not None:
            raise ValueError("mixing adds to constants; values are those of counterfactual inputs: leave one of them")
        for values in (self.values, self.reference):
            if values is not None and not values.paired:
                self._check_values(values)
        if self.mixing is not None:
            self._check_mixing(self.mixing)
            if all(part is None for part in self.mixing):
                object.__setattr__(self, "mixing", None)

    def _check_values(self, values: Values) -> None:
        for site, kept, tensor in zip(
            self.units.sites, self.units.split(self.circuit.mask), values.tensors, strict=True
        ):
            if not tensor.is_floating_point():
                raise ValueError(f"values of units at {site.hook} are of type {tensor.dtype}; they are real numbers")
            if not bool((finite := torch.isfinite(tensor).all(1).cpu()).all()):
                which = "removed" if bool((~finite & site.by_row(~kept.cpu())).any()) else "kept"
                raise ValueError(f"values of {which} units at {site.hook} are NaN or infinite: nothing is set to them")

    def _check_mixing(self, mixing: tuple[NeighbourMap | None, ...]) -> None:
        if len(mixing) != len(self.units.sites):
            raise ValueError(f"mixing has {len(mixing)} parts for the {len(self.units.sites)} sites of {self.units!r}")
        for site, kept, part in zip(self.units.sites, self.units.split(self.circuit.mask), mixing, strict=True):
            if part is None:
                continue
            if not bool(torch.isfinite(part.weights).all()):
                raise ValueError(f"mixing of {site.hook} has NaN or infinite weights")
            for name, index in (("rows", part.rows), ("columns", part.columns)):
                if len(index) != len(part.weights) or bool(((index < 0) | (index >= part.size)).any()):
                    raise ValueError(f"mixing of {site.hook} has {name} that are no units of it, or not one a weight")
            if part.size != site.size or site.kind not in ("neuron", "direction"):
                raise ValueError(f"mixing of {site.hook} is for {part.size} units, not {site.size} {site.kind} units")
            if bool(kept[part.rows].any()) or not bool(kept[part.columns].all()):
                raise ValueError(f"mixing of {site.hook} maps from removed or to kept units: is it of this circuit?")

    @property
    def units(self) -> Units:
        """All units, kept or removed."""
        return self.circuit.units

    @property
    def kind(self) -> str:
        """How the constants were made (``mean``, ``zero``, ``refit``, ``given``: by the user), or ``counterfactual``;
        part of every number."""
        return self.values.kind

    @property
    def refitted(self) -> bool:
        """Whether the constants, or the maps of kept units, were fitted together on the divergence."""
        return self.kind in (REFIT, REFITTED_NEIGHBOURS)

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

    def for_examples(
        self, index: Int[Tensor, "batch"], spans: Mapping[str, Int[Tensor, "n 2"]] | None = None
    ) -> Reduction:
        """The same reduction, with per-example positions, and those of ``spans``, taken for the examples ``index``."""
        units = self.units.for_examples(index, spans)
        if units is self.units:
            return self
        reference = None if self.reference is None else replace(self.reference, units=units)
        circuit, values = Circuit(units, self.circuit.mask), replace(self.values, units=units)
        return replace(self, circuit=circuit, values=values, reference=reference)

    def save(self, path: str | Path) -> None:
        """Write json and tensors to one safetensors file, with a checksum: complete, or not at all."""
        check_saved(self.units)
        sites = [_site_to_json(site) for site in self.units.sites]
        header = {"sites": sites, "kind": self.kind, "fingerprint": self.fingerprint, "first_token": self.first_token}
        tensors = {"mask": self.circuit.mask}
        tensors |= {f"values.{i}": tensor for i, tensor in enumerate(self.values.tensors)}
        if self.reference is not None:
            header["reference_kind"] = self.reference.kind
            tensors |= {f"reference.{i}": tensor for i, tensor in enumerate(self.reference.tensors)}
        tensors |= {f"basis.{i}": site.basis for i, site in enumerate(self.units.sites) if site.basis is not None}
        for i, site in enumerate(self.units.sites):
            parts = _encoder_parts(site).items()
            tensors |= {f"encoder.{i}.{name}": part for name, part in parts if isinstance(part, Tensor)}
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
        path = Path(path)
        header, tensors = read_tensors(path, "reduction")
        with reading(path, "reduction"):
            return Reduction._from_file(header, tensors)

    @staticmethod
    def _from_file(header: dict[str, Any], tensors: dict[str, Tensor]) -> Reduction:
        total = sum(site["size"] for site in header["sites"])
        if tensors["mask"].shape != (total,):  # before there is memory for so many
            raise ValueError(f"its sites have {total:,} units, its mask {tensors['mask'].numel():,}")
        bases = [tensors.get(f"basis.{i}") for i in range(len(header["sites"]))]
        places = zip(header["sites"], bases, strict=True)
        sites = [_site_from_json(site, basis, _encoder_of(i, site, tensors)) for i, (site, basis) in enumerate(places)]
        units = Units(tuple(sites))
        n = range(len(sites))
        reference = None
        if "reference.0" in tensors:
            reference = Values(units, tuple(tensors[f"reference.{i}"] for i in n), header["reference_kind"])
        values = Values(units, tuple(tensors[f"values.{i}"] for i in n), header["kind"])
        mixing = tuple(
            NeighbourMap(sites[i].size, *(tensors[f"mixing.{i}.{part}"] for part in ("rows", "columns", "weights")))
            if f"mixing.{i}.rows" in tensors
            else None
            for i in n
        )
        kept = Circuit(units, tensors["mask"])
        affine = mixing if any(mixing) else None
        first_token = header.get("first_token", "none")  # files from before there was a choice
        return Reduction(kept, values, reference, header["fingerprint"], affine, first_token)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Reduction)
            and (self.circuit, self.values, self.reference) == (other.circuit, other.values, other.reference)
            and self.mixing == other.mixing
            and (self.fingerprint, self.first_token) == (other.fingerprint, other.first_token)
        )

    def __hash__(self) -> int:
        return hash((self.circuit, self.fingerprint))

    def __repr__(self) -> str:
        return f"Reduction({self.circuit!r}, {self.kind} values)"


def check_saved(units: Units) -> None:
    """Refuse units that no file holds.

    Raises:
        ValueError: positions that vary by example, or a slice of them.
    """
    for site in units.sites:
        if isinstance(site.positions, Tensor | slice):
            raise ValueError(f"positions of {site.hook} vary by example or are a slice: such units cannot be saved")


def _site_to_json(site: Site) -> dict[str, Any]:
    said = {
        "kind": site.kind,
        "layer": site.layer,
        "hook": site.hook,
        "size": site.size,
        "positions": list(site.positions) if isinstance(site.positions, tuple) else site.positions,
        "also": list(site.also),
        "writers": list(site.writers),
        "readers": list(site.readers),
    }
    if site.encoder is not None:
        said |= {"source": site.source, "numbers": list(site.numbers), "k": _encoder_parts(site).get("k")}
    return said


def _encoder_parts(site: Site) -> dict[str, Any]:
    """What a site's encoder is made of.

    Raises:
        ValueError: an encoder of the user's own, of which nothing is known but that it encodes.
    """
    if site.encoder is None:
        return {}
    if not isinstance(site.encoder, Encoder):
        raise ValueError(
            f"features of {site.hook} are those of a {type(site.encoder).__name__}, which cannot be saved: make them "
            "of a tls.Dictionary with its tensors"
        )
    return site.encoder.parts()


def _encoder_of(number: int, site: dict[str, Any], tensors: Mapping[str, Tensor]) -> Encoder | None:
    """The encoder of the site with this number in a file."""
    start = f"encoder.{number}."
    parts: dict[str, Any] = {name.removeprefix(start): part for name, part in tensors.items() if name.startswith(start)}
    return Encoder(**parts, k=site["k"]) if parts else None


def _site_from_json(site: dict[str, Any], basis: Float[Tensor, "width size"] | None, encoder: Encoder | None) -> Site:
    kinds = {"kind": str, "hook": str, "layer": int, "size": int}
    for name, kind in kinds.items():
        if type(site[name]) is not kind:
            raise ValueError(f"{name} of a site is {site[name]!r}; it is of type {kind.__name__}")
    where = site.get("positions")
    listed = isinstance(where, list) and all(type(position) in (int, str) for position in where)
    if where is not None and not listed and type(where) not in (int, str):
        raise ValueError(f"positions of a site are {where!r}")
    several = {name: tuple(site.get(name, ())) for name in ("also", "writers", "readers", "numbers")}
    whole: dict[str, Any] = {**site, "basis": basis, **several, "encoder": encoder}
    whole.pop("k", None)
    return Site(**whole)


_SAMPLED = 65_536
_ROUNDED = 4_096  # of each parameter


def fingerprint(model: Any) -> str:
    """A hash of the model's numbers: names, shapes and every value of its parameters, and of the buffers that belong to
    its state, in float32, so that a float64 copy has the same; behind a dash one that a copy in bfloat16 has as well.
    No model pass.

    Example:
        >>> tls.fingerprint(model) == reduction.fingerprint
        True
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, which has no parameters: give a model")
    exact, rounded = hashlib.sha256(), hashlib.sha256()
    for name, tensor in _state(model):
        described = f"{name}:{tuple(tensor.shape)}:"
        exact.update(f"{described}{checksum(tensor)}".encode())
        few = tensor.detach().reshape(-1)[:_ROUNDED]
        few = few.to(torch.bfloat16) if few.is_floating_point() else few
        rounded.update(f"{described}{checksum(few)}".encode())
    return f"{exact.hexdigest()[:16]}-{rounded.hexdigest()[:8]}"


def _state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, in order of name; tables that a model makes for itself are none."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    elsewhere = _offloaded(model) if any(tensor.is_meta for tensor in found.values()) else {}
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}"] = buffer
    for name, tensor in sorted(found.items()):
        weights, leaf = elsewhere.get(id(tensor), ({}, ""))
        yield name, weights.get(leaf, tensor)  # one at a time: all of them may not fit


def _offloaded(model: Any) -> dict[int, tuple[Any, str]]:
    """Where the parameters are that accelerate keeps elsewhere (on the CPU, on disk), by the parameter's id."""
    found: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights = getattr(part, "weights_map", None)
            if weights is not None:
                found |= {id(p): (weights, leaf) for leaf, p in module._parameters.items() if p is not None}
    return found


def _sampled_fingerprint(model: Any) -> str:
    """What version 0.1.0 wrote into its files: of evenly spaced parameters alone."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        flat = parameter.detach().reshape(-1)
        flat = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        total.update(f"{name}:{tuple(parameter.shape)}".encode() + flat.numpy().tobytes())
    return total.hexdigest()[:16]


def check_fingerprint(model: Any, reduction: Reduction) -> None:
    """Refuse a reduction that was made for another model.

    Raises:
        ValueError: another model, or the same one in another precision or in compatibility mode, with how to go on.
    """
    check_origin(model, reduction.fingerprint, "reduction")


def check_origin(model: Any, made: str | None, what: str) -> None:
    """Refuse what was made for another model than one with the fingerprint ``made``; ``None`` is never refused.

    Raises:
        ValueError: as :func:`check_fingerprint`.
    """
    if made is None:
        return
    found = fingerprint(model) if "-" in made else _sampled_fingerprint(model)
    if found == made:
        return
    mend = "load the model that it was made for, or make a reduction for this one"
    if found.rpartition("-")[2] == made.rpartition("-")[2]:
        dtype = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
        mend = (
            f"they are the same model in different precision (this one is in {dtype}): load it in the other one, or "
            "go on with dataclasses.replace(reduction, fingerprint=tls.fingerprint(model)), and measure it here"
        )
    elif getattr(model, "compatibility_mode", False):
        mend = (
            "this model is in compatibility mode, which changes its weights: use the reduction without that mode, or "
            "make one in it"
        )
    raise ValueError(f"{what} was made for the model {made}, this one is {found}: {mend}")
