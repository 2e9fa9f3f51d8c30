"""A site: one hook point cut into units of one kind, and how their values are read there and written back.

Heads are slices of the activation, neurons its entries, a whole layer is one unit; an expert's value is what it adds
to its layer. Directions are coordinates: with the columns of ``basis`` as directions ``B``, a unit's value is its entry
of ``v = pinv(B) x`` (columns may overlap) and a change is written as ``x + B (v' - v)``. Features are the columns of a
dictionary's decoder, with values that its encoder makes of ``x`` (or of another activation, ``source``); what they
leave over is the value of one ``error`` unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.checks import checked_positions
from tl_sparsify._internal.encoders import check_encoder, left_over, placed
from tl_sparsify._internal.readers import along_edges, terms

Positions = None | int | slice | str | Sequence[int] | Tensor
"""Where a unit is meant: everywhere (``None``), at one or several positions, at one position per example, or at a span
that the examples have by this name."""

LETTER = {
    "head": "H",
    "neuron": "N",
    "expert": "E",
    "mlp": "MLP",
    "attention": "ATTN",
    "residual": "RESID",
    "direction": "D",
    "stream": "S",
    "feature": "F",
    "error": "ERR",
    "edge": "->",
}
WHOLE = ("mlp", "attention", "residual")
BASED = ("direction", "stream", "feature")
_PLACES = {"hook_resid_pre": "PRE", "hook_resid_mid": "MID", "hook_resid_post": "POST"}


@dataclass(frozen=True, eq=False)
class Site:
    """One hook point cut into ``size`` units of one ``kind``, at all or at the named ``positions``.

    Attributes:
        kind: ``head``, ``neuron``, ``expert``, ``mlp``, ``attention``, ``residual``, ``direction``, ``stream``,
            ``feature``, ``error`` or ``edge``.
        layer: for names and maps; any numbering of the user's own.
        hook: the hook point's name.
        size: the number of units.
        positions: where the units are meant; ``None``: everywhere.
        basis: ``[width, size]``, the directions as columns (kinds ``direction``, ``stream`` and ``feature``); of an
            ``error`` unit those of the features that it is what is left of.
        also: further hook points at which the same units are read and written (kind ``stream``: every write to the
            residual stream); a unit's value then has one entry for each hook point.
        writers, readers: names of what an edge goes from and to (kind ``edge`` only): a unit for each reader and
            writer, all writers of the first reader first. The value of an edge is what its writer writes.
        encoder: what gives the features' values, ``encode(activation)``, and what their sum lacks, ``offset`` (kinds
            ``feature`` and ``error``; :func:`tl_sparsify.features` makes it).
        source: the hook point that is encoded, where it is another than ``hook`` (a transcoder's).
        numbers: the features' numbers in their dictionary; 0, 1, ... where not given.

    Example:
        >>> tls.Site(kind="neuron", layer=0, hook="hook_hidden", size=64).name(3)
        'L0N3'
    """

    kind: str
    layer: int
    hook: str
    size: int
    positions: Positions = None
    basis: Float[Tensor, "width size"] | None = None
    also: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    encoder: Any = None
    source: str | None = None
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in LETTER:
            raise ValueError(f"kind is {self.kind!r}; the known kinds are {', '.join(LETTER)}")
        if self.size < 1:
            raise ValueError(f"size of {self.hook} is {self.size}; a site has at least one unit")
        object.__setattr__(self, "positions", checked_positions(self.positions, self.hook))
        based = self.kind in BASED or self.kind == "error"
        if (self.basis is not None) != based:
            raise ValueError(f"{self.kind} units of {self.hook} {'need a' if based else 'have no'} basis")
        if self.basis is not None and self.kind != "error" and self.basis.shape[-1] != self.size:
            raise ValueError(
                f"basis of {self.hook} has shape {tuple(self.basis.shape)}; it must be [width, {self.size}], "
                "a column for each direction"
            )
        if self.also and self.kind != "stream":
            raise ValueError(f"{self.kind} units of {self.hook} have one hook point; only stream directions have more")
        check_encoder(self)
        if (self.kind == "edge") != bool(self.writers) or (self.kind == "edge") != bool(self.readers):
            raise ValueError(f"{self.kind} units of {self.hook}: edges have writers and readers, others have none")
        if self.kind == "edge" and self.size != len(self.writers) * len(self.readers):
            count = f"{len(self.readers)} readers of {len(self.writers)} writers"
            raise ValueError(f"size of {self.hook} is {self.size}, and it has {count}")

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Site)
            and self._key == other._key
            and (self.basis is other.basis or bool(torch.equal(self._columns, other._columns)))
            and (self.encoder is other.encoder or self.encoder == other.encoder)
        )

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        where = self.positions
        where = (*where.flatten().tolist(), "each") if isinstance(where, Tensor) else where
        where = (where.start, where.stop, where.step, "slice") if isinstance(where, slice) else where
        shape = None if self.basis is None else tuple(self.basis.shape)
        ends = (self.also, self.writers, self.readers, self.source, self.numbers)
        return (self.kind, self.layer, self.hook, self.size, where, shape, *ends)

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Every hook point at which the site's units are written."""
        return (self.hook, *self.also)

    @property
    def suffix(self) -> str:
        """How the positions print behind a unit's name: nothing, ``@4``, ``@1,3``, ``@0:4`` or ``@each``."""
        where = self.positions
        if where is None:
            return ""
        if isinstance(where, Tensor):
            return "@each"
        if isinstance(where, str):
            return f"@{where}"
        if isinstance(where, slice):
            return f"@{'' if where.start is None else where.start}:{'' if where.stop is None else where.stop}"
        return "@" + ",".join(str(position) for position in where)  # type: ignore[union-attr]

    @property
    def prefix(self) -> str:
        """What stands before the index in a unit's name: ``L1H``, ``L0N``, ``L2POST``, ``S``; of edges what is behind
        the arrow."""
        if self.kind == "edge":
            return f"->{self.readers[0]}"
        if self.kind == "stream":
            return "S"
        place = _PLACES.get(self.hook.rsplit(".", 1)[-1]) if self.kind == "direction" else None
        return f"L{self.layer}{place or LETTER[self.kind]}"

    def name(self, index: int) -> str:
        """The name of unit ``index``: ``L1H3``, ``L0N12@4``, ``L2MLP``, ``L2POST0``, ``L1F34``, ``L0H1->L2H3.q``."""
        if self.kind == "edge":
            reader, writer = divmod(index, len(self.writers))
            return f"{self.writers[writer]}->{self.readers[reader]}{self.suffix}"
        return f"{self.prefix}{'' if self.kind in (*WHOLE, 'error') else self.number(index)}{self.suffix}"

    def number(self, index: int) -> int:
        """The number of unit ``index`` in its name: a feature's is that in its dictionary."""
        return self.numbers[index] if self.numbers else index

    @property
    def rows(self) -> int:
        """How many values the site has: one for each unit, or for edges one for each writer."""
        return len(self.writers) or self.size

    def by_row(self, mask: Bool[Tensor, "units"]) -> Bool[Tensor, "rows"]:
        """Which values belong to any of these units."""
        return mask.view(len(self.readers), -1).any(0) if self.kind == "edge" else mask

    def along(
        self, gradient: Float[Tensor, "batch pos some width"], step: Float[Tensor, "batch pos rows width"]
    ) -> Float[Tensor, "batch units"]:
        """What a step of each value comes to along its unit's gradient: the sum over positions and entries."""
        if self.kind == "edge":
            return along_edges(gradient, step, self.writers, len(self.readers))
        return (gradient * step).sum((1, 3))

    @property
    def _columns(self) -> Float[Tensor, "width size"]:
        if self.basis is None:
            raise ValueError(f"{self.kind} units of {self.hook} have no basis")
        return self.basis

    @cached_property
    def _dual(self) -> Float[Tensor, "width size"]:
        """``pinv(basis)`` transposed: what reads the coordinates. For orthonormal columns the basis itself."""
        columns = self._columns.detach().double()  # columns that nearly coincide make the inverse large
        gram = columns.T @ columns
        if torch.allclose(gram, torch.eye(self.size, dtype=gram.dtype, device=gram.device), atol=1e-6):
            return self._columns
        return torch.linalg.pinv(columns).T.to(self._columns)

    def read(
        self, activation: Float[Tensor, "..."], source: Float[Tensor, "..."] | None = None
    ) -> Float[Tensor, "batch pos units width"]:
        """The units' values in the hook point's activation (a view where possible); features' in ``source``, the
        activation to encode, where it is another.

        Raises:
            ValueError: the activation's shape does not hold ``size`` units.
        """
        if self.encoder is not None:
            return self._encoded(activation, activation if source is None else source)
        if self.kind in BASED:
            return self._coordinates(activation, self._dual)
        if self.kind in ("head", "expert") and activation.ndim == 4 and activation.shape[2] == self.size:
            return activation
        if self.kind == "neuron" and activation.ndim in (2, 3) and activation.shape[-1] == self.size:
            return activation.unsqueeze(-1) if activation.ndim == 3 else activation[:, None, :, None]
        if self.kind in WHOLE and activation.ndim == 3 and self.size == 1:
            return activation.unsqueeze(2)
        if self.kind == "edge" and activation.ndim == 4:  # what writers write, or what readers have copies of
            if activation.shape[2] in (self.rows, len(self.readers), len(self.readers) * len(terms(self.writers))):
                return activation
        raise self._mismatch(activation)

    def pull(self, gradient: Float[Tensor, "..."]) -> Float[Tensor, "batch pos units width"]:
        """The gradient with respect to the units' values, from the gradient with respect to the activation."""
        if self.kind == "error":
            return placed(gradient)[:, :, None]
        return self._coordinates(gradient, self._columns) if self.kind in BASED else self.read(gradient)

    def write(
        self,
        activation: Float[Tensor, "..."],
        old: Float[Tensor, "batch pos units width"],
        new: Float[Tensor, "batch pos units width"],
    ) -> Float[Tensor, "..."]:
        """The activation with the units' values changed from ``old`` (as read there) to ``new``."""
        if self.kind in BASED:
            moved = ((new - old)[..., 0] @ self._columns.to(new).T).to(activation)
            return activation + (moved if activation.ndim == 3 else moved[:, 0])
        if self.kind == "error":
            return activation + (new - old).reshape(activation.shape).to(activation)
        return new.reshape(activation.shape)

    def entries(self, value: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], ...]:
        """A value's part for each hook point: all of it for one, an entry for each of several.

        Raises:
            ValueError: a value of another width.
        """
        if not self.also:
            return (value,)
        if value.shape[-1] != len(self.hook_names):
            raise ValueError(f"values of {self.prefix} units have width {value.shape[-1]}, not {len(self.hook_names)}")
        return value.split(1, dim=-1)

    def _encoded(
        self, activation: Float[Tensor, "..."], source: Float[Tensor, "..."]
    ) -> Float[Tensor, "batch pos units width"]:
        """Features' values, or what they leave over of the activation."""
        if (
            activation.ndim not in (2, 3)
            or source.ndim != activation.ndim
            or activation.shape[-1] != len(self._columns)
        ):
            raise self._mismatch(activation)
        features = self.encoder.encode(placed(source))
        return (
            features[..., None]
            if self.kind == "feature"
            else left_over(placed(activation), features, self._columns, self.encoder)
        )

    def _coordinates(
        self, activation: Float[Tensor, "..."], reader: Float[Tensor, "width size"]
    ) -> Float[Tensor, "batch pos units one"]:
        if activation.ndim not in (2, 3) or activation.shape[-1] != len(reader):
            raise self._mismatch(activation)
        if activation.dtype in (torch.float16, torch.bfloat16):
            activation = activation.float()  # a coordinate is a difference of many products
        coordinates = activation @ reader.to(activation)
        return (coordinates if activation.ndim == 3 else coordinates[:, None])[..., None]

    def _mismatch(self, activation: Float[Tensor, "..."]) -> ValueError:
        wanted = dict.fromkeys(("head", "expert"), "[batch, pos, units, width]")
        wanted |= {"neuron": "[batch, pos, units] or [batch, units]"}
        whole = "[batch, pos, d_model]" if self.basis is None else f"[batch, pos, {len(self.basis)}]"
        return ValueError(
            f"{self.hook} yields {tuple(activation.shape)}; a site of {self.size} {self.kind} units needs "
            f"{wanted.get(self.kind, whole)}. Are the units those of this model?"
        )

    def position_mask(self, batch: int, pos: int) -> Bool[Tensor, "#batch pos"] | None:
        """Which positions are meant, or ``None`` for all of them.

        Raises:
            ValueError: a position outside the input, or not one position per example.
        """
        where = self.positions
        if where is None:
            return None
        if isinstance(where, str):
            raise ValueError(
                f"positions of {self.hook} are the span {where!r}, and the examples have no spans: load_examples(..., "
                "spans=...) gives them some, and outside a search units.for_examples(index, examples.spans) places it"
            )
        if isinstance(where, slice):
            mask = torch.zeros(1, pos, dtype=torch.bool, device="cpu")
            mask[:, where] = True
            if not bool(mask.any()):
                raise ValueError(
                    f"positions {self.suffix[1:]} of {self.hook} select nothing of an input of length {pos}"
                )
            return mask
        index = where if isinstance(where, Tensor) else torch.tensor([where], device="cpu")
        if isinstance(where, Tensor):
            if where.shape[:1] != (batch,):
                raise ValueError(
                    f"positions of {self.hook} name {tuple(where.shape)} places for a batch of {batch}: "
                    "give one index per example"
                )
            index = where.reshape(batch, -1)
        if bool(((index < -pos) | (index >= pos)).any()):
            raise ValueError(f"positions {self.suffix[1:]} of {self.hook} lie outside an input of length {pos}")
        return torch.zeros(index.shape[0], pos, dtype=torch.bool, device="cpu").scatter_(1, index.cpu() % pos, True)

    def check_input(self, held: Bool[Tensor, "batch pos"]) -> None:
        """Refuse positions at which an example holds padding. A slice's open ends are those of the input; the ends that
        it names must be input.

        Raises:
            ValueError: such a position, with the mend.
        """
        where = self.positions
        if where is None or isinstance(where, str):
            return  # a span that nothing has placed: position_mask says so
        named = self
        if isinstance(where, slice):
            chosen = range(held.shape[1])[where]
            if not chosen:
                return  # position_mask says so
            ends = (where.start and chosen[0], None if where.stop is None or where.stop > held.shape[1] else chosen[-1])
            inside = tuple(end for end in ends if end is not None)
            if not inside:
                return
            named = replace(self, positions=inside)
        mask = named.position_mask(*held.shape)
        padding = (mask & ~held.to("cpu", torch.bool)).any(1) if mask is not None else held.new_zeros(1)
        if bool(padding.any()):
            first, many = int(padding.nonzero()[0]), int(padding.sum())
            raise ValueError(
                f"positions {self.suffix[1:]} of {self.hook} are padding in {many} of {len(held)} examples (first: "
                f"number {first} of the batch): pad on the other side (padding_side), or give one position per "
                "example, units.at(tensor [n])"
            )

    def for_examples(self, index: Int[Tensor, "batch"], spans: Mapping[str, Int[Tensor, "n 2"]] | None = None) -> Site:
        """The same site with per-example positions, or those of one of ``spans``, taken for the examples ``index``.

        Raises:
            ValueError: a span that the examples do not have.
        """
        where = self.positions
        if isinstance(where, Tensor):
            return replace(self, positions=where[index])
        if not isinstance(where, str) or spans is None:
            return self
        if where not in spans:
            known = ", ".join(spans)
            raise ValueError(f"positions of {self.hook} are the span {where!r}, and the examples have {known}")
        start, stop = spans[where][index].unbind(1)
        steps = torch.arange(int((stop - start).max()), device="cpu")
        return replace(self, positions=torch.minimum(start[:, None] + steps, stop[:, None] - 1))


_HELD: ContextVar[Bool[Tensor, "batch pos"] | None] = ContextVar("held", default=None)


@contextmanager
def input_at(mask: Bool[Tensor, "batch pos"] | None) -> Iterator[None]:
    """Say where the forward pass inside the context has input: units that are meant elsewhere are refused there."""
    before = _HELD.set(mask)
    try:
        yield
    finally:
        _HELD.reset(before)


def check_places(site: Site, activation: Float[Tensor, "..."]) -> None:
    """Refuse an activation in which a position that the site names has no input, as :func:`input_at` says."""
    held, where = _HELD.get(), site.positions
    if held is None or where is None or activation.shape[:2] != held.shape:
        return
    if isinstance(where, Tensor) and len(where) != len(held):
        return  # recorded whole, and read for some examples
    site.check_input(held)
