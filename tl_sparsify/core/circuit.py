"""Circuit: which units are kept. Values: what removed units are set to. Reduction: both, for one model.

A circuit is a boolean vector over units with set algebra; a reduction is what search returns, what ablation, folding
and evaluation take, and what is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify.core.units import Unit, Units

REFIT, REFITTED_NEIGHBOURS = "refit", "refitted neighbours"
"""The kinds of values that were fitted together on the divergence: constants, and maps of kept units."""
COUNTERFACTUAL = "counterfactual"
"""The kind of values that are no constants: each example's on its counterfactual input."""
FirstToken = Literal["bos", "any", "none"]
"""At which first tokens removed units are left alone: a beginning-of-sequence token, whose activations are outliers
that do not depend on the input; any token; none. In models with an attention sink a few neurons write huge values
there."""
FIRST_TOKENS: tuple[FirstToken, ...] = ("bos", "any", "none")


@dataclass(frozen=True, eq=False)
class Circuit:
    """The set of kept units: ``circuit.mask[i]`` says whether unit ``i`` of ``circuit.units`` is kept.

    ``&``, ``|``, ``-``, ``^`` and ``~`` are set operations; ``<=`` is inclusion.

    Example:
        >>> pair = tls.Circuit.of(units, ["L0H2", "L1H0"])
        >>> pair, len(~pair), pair <= tls.Circuit.full(units)
        (Circuit(2 of 12 units: 2 heads), 10, True)
    """

    units: Units
    mask: Bool[Tensor, "units"]

    def __post_init__(self) -> None:
        if not isinstance(self.units, Units):
            raise ValueError(f"units are a {type(self.units).__name__}, not Units: tls.heads(model), say")
        if not isinstance(self.mask, Tensor) or self.mask.dtype != torch.bool:
            what = (
                f"a tensor of {self.mask.dtype}" if isinstance(self.mask, Tensor) else f"a {type(self.mask).__name__}"
            )
            raise ValueError(f"mask is {what}; it must be a bool tensor, one for each unit: give mask.bool()")
        if self.mask.shape != (len(self.units),):
            raise ValueError(f"mask has shape {tuple(self.mask.shape)}; {self.units!r} needs ({len(self.units)},)")

    @staticmethod
    def full(units: Units) -> Circuit:
        """Every unit kept."""
        return Circuit(units, torch.ones(len(units), dtype=torch.bool, device="cpu"))

    @staticmethod
    def empty(units: Units) -> Circuit:
        """No unit kept."""
        return Circuit(units, torch.zeros(len(units), dtype=torch.bool, device="cpu"))

    @staticmethod
    def of(units: Units, kept: Iterable[str | Unit]) -> Circuit:
        """The circuit of the named units; an unknown name is a ``KeyError`` that says what there is."""
        mask = torch.zeros(len(units), dtype=torch.bool, device="cpu")
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
    (the values of another run). Only constants fold. ``kind`` says how they were made, and is not compared, unless it
    is ``counterfactual``: then the tensors hold NaN in place of what each example's counterfactual input gives.

    Example:
        >>> zeros = tls.Values(units, tuple(torch.zeros(site.size, 16) for site in units.sites))
        >>> zeros.constant, zeros == tls.constants.zero(model, train, units)
        (True, True)
    """

    units: Units
    tensors: tuple[Float[Tensor, "..."], ...]
    kind: str = "given"

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            if not isinstance(tensor, Tensor):
                raise ValueError(f"tensors hold a {type(tensor).__name__}; values are tensors, one for each site")
            if not tensor.is_floating_point():
                raise ValueError(f"tensors hold one of {tensor.dtype}; values are real numbers: give tensor.float()")
        if any(tensor.is_inference() for tensor in self.tensors):  # made under inference_mode: of no use to gradients
            with torch.inference_mode(False):
                object.__setattr__(self, "tensors", tuple(tensor.clone() for tensor in self.tensors))
        if len(self.tensors) != len(self.units.sites):
            raise ValueError(f"{len(self.tensors)} tensors for the {len(self.units.sites)} sites of {self.units!r}")
        for site, tensor in zip(self.units.sites, self.tensors, strict=True):
            if tensor.ndim not in (2, 4) or tensor.shape[-2] != site.rows:
                raise ValueError(
                    f"value of {site.hook} has shape {tuple(tensor.shape)}; it must be [{site.rows}, width] "
                    f"or [batch, pos, {site.rows}, width]"
                )

    @property
    def paired(self) -> bool:
        """Whether they are each example's on its counterfactual input."""
        return self.kind == COUNTERFACTUAL

    @property
    def constant(self) -> bool:
        """Whether no value varies by example or position."""
        return not self.paired and all(tensor.ndim == 2 for tensor in self.tensors)

    def where(self, mask: Bool[Tensor, "units"], other: Values) -> Values:
        """These values where ``mask``, ``other``'s elsewhere; edges from one writer share theirs (any)."""
        masks = (site.by_row(part) for site, part in zip(self.units.sites, self.units.split(mask), strict=True))
        parts = zip(masks, self.tensors, other.tensors, strict=True)
        return Values(self.units, tuple(torch.where(m[:, None].to(a.device), a, b) for m, a, b in parts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Values) or self.units != other.units:
            return False
        if self.paired or other.paired:
            return self.paired and other.paired
        return all(torch.equal(a, b) for a, b in zip(self.tensors, other.tensors, strict=True))

    def __hash__(self) -> int:
        return hash((self.units, tuple(tuple(tensor.shape) for tensor in self.tensors)))

    def __repr__(self) -> str:
        what = "constant" if self.constant else "of counterfactual inputs" if self.paired else "of a run"
        return f"Values({what} for {self.units!r})"


@dataclass(frozen=True, eq=False)
class NeighbourMap:
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
        twice = len(removed.unique()) != len(removed)
        if twice or width * len(removed) != len(self.rows) or not len(self.rows):
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
        if not isinstance(other, NeighbourMap) or self.size != other.size:
            return False
        mine, theirs = (self.rows, self.columns, self.weights), (other.rows, other.columns, other.weights)
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def __hash__(self) -> int:
        return hash((self.size, len(self.rows)))
