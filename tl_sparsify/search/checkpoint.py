"""Checkpoints: what a search knows after a round, in a folder, from which the same call goes on.

A round's circuit is a file of its own; the state that names them is written last and renamed, so that a process that
is killed loses the round it was in and nothing else. The state also holds a digest of every argument: a search never
goes on from another one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from numbers import Number
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module

from tl_sparsify._internal.files import read_tensors, reading, versions, write_tensors
from tl_sparsify._internal.ranks import is_main, on_main
from tl_sparsify._internal.storage import checksum
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units
from tl_sparsify.expansion.selection import Shrinkage
from tl_sparsify.expansion.shrinkage import Trade
from tl_sparsify.search.path import Round

STATE, _KIND = "state.search", "search"


@dataclass(frozen=True, eq=False)
class State:
    """A search after a round.

    Attributes:
        step, pending: which size is being made, and the sizes on the way to it.
        left: when each unit left; infinite for those that have not.
        clock, number: units that have left so far, and expansions made.
        found: the rounds.
        believed, promised, trade, spare: how the next round is chosen (:mod:`shrinkage`).
        picks, restored: what the last round changed.
        before: the reduction that the last expansion was around.
        current: the one that the search is at; after a round that round's.
    """

    step: int
    pending: tuple[int | float, ...]
    left: Float[Tensor, "units"]
    clock: int
    number: int
    found: tuple[Round, ...]
    believed: Shrinkage
    promised: float
    trade: Trade
    spare: int
    picks: Int[Tensor, "picks"]
    restored: Int[Tensor, "restored"]
    before: Reduction
    current: Reduction


def describe(arguments: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each argument of a search, by name."""
    said = {name: hashlib.sha256(_said(value).encode()).hexdigest()[:16] for name, value in arguments.items()}
    return said | {"versions": _said(versions())}


def _said(value: Any) -> str:
    """Text that is the same for equal values."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{checksum(value)}"
    if isinstance(value, Units):
        return _said([value.names, [(site.hook, site.positions, site.basis, *_encoded(site)) for site in value.sites]])
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__ + _said({field.name: getattr(value, field.name) for field in fields(value)})
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_said(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_said, value)) + "]"
    if isinstance(value, partial):
        return _said([value.func, value.args, value.keywords])
    if isinstance(value, MethodType):
        return _said([value.__func__, _plain(value.__self__)])
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}{_said_of_function(value)}"
    return _said(_plain(value)) if callable(value) else repr(value)


def _said_of_function(function: FunctionType) -> str:
    """What tells functions of one name apart: their code, and what they were made with."""
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    return _said([_plain(function.__code__), _plain([function.__defaults__, function.__kwdefaults__, held])])


def _plain(value: Any) -> Any:
    """The value without what is another text in every process."""
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, _plain(value.co_consts)]
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, FunctionType | MethodType | partial):
        return _said(value)
    if value is None or isinstance(value, Number | str | bytes | Tensor):
        return value
    # an object is what it holds; of a model, which is told apart by its weights, its kind is enough
    held = {} if isinstance(value, type | Module) else getattr(value, "__dict__", {})
    name = value if isinstance(value, type | BuiltinFunctionType) else type(value)
    return [f"{name.__module__}.{name.__qualname__}", _plain(held)]


def _encoded(site: Site) -> tuple[Any, ...]:
    """What features of a dictionary have beside; nothing for others, whose digests stay what they were."""
    return () if site.encoder is None else (site.source, site.encoder)


def write(folder: Path, described: Mapping[str, str], state: State) -> None:
    """Put a state into a folder; the circuits that an earlier one named and this one does not go. Of several processes
    the first one writes."""
    on_main(lambda: _write(folder, described, state), f"writing step {state.step} of the search")


def _write(folder: Path, described: Mapping[str, str], state: State) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    reductions = [*(step.reduction for step in state.found), state.before]
    *names, before = (f"{_name(reduction)}.reduction" for reduction in reductions)
    for name, reduction in zip((*names, before), reductions, strict=True):
        if not (folder / name).is_file():
            reduction.save(folder / name)
    header = {
        "arguments": dict(described),
        "numbers": [state.step, list(state.pending), state.clock, state.number, state.promised, state.spare],
        "believed": asdict(state.believed),
        "trade": asdict(state.trade),
        "before": before,
        "rounds": [
            {"file": name, "additivity": step.additivity}
            | {"predicted": asdict(step.predicted), "measured": asdict(step.measured)}
            for name, step in zip(names, state.found, strict=True)
        ],
    }
    write_tensors(folder / STATE, _KIND, header, {"left": state.left, "picks": state.picks, "restored": state.restored})
    _tidy(folder, {*names, before})


def _tidy(folder: Path, named: Collection[str]) -> None:
    """Remove the circuits that no state names."""
    for file in folder.glob("*.reduction"):
        if file.name not in named:
            file.unlink(missing_ok=True)


def _name(reduction: Reduction) -> str:
    """A name that only equal reductions share."""
    return hashlib.sha256(_said((reduction.circuit.mask, reduction.values.tensors)).encode()).hexdigest()[:16]


def read(folder: Path, described: Mapping[str, str], units: Units) -> State | None:
    """The state in a folder; ``None`` where there is none. Circuits that a killed process left beside it go.

    Raises:
        ValueError: a search with other arguments, which are named; a damaged file.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    header, tensors = read_tensors(path, _KIND)
    with reading(path, "state of a search", "Delete the folder to search from the start."):
        before = header["arguments"]
        other = [name for name in described if before.get(name) != described[name]]
        if other:
            raise ValueError(
                f"{path} belongs to a search with another {other[0]}: give the same arguments to go on from it, or "
                "another folder"
            )
        if is_main():  # killed between the state and the end of its writing
            _tidy(folder, {header["before"], *(one["file"] for one in header["rounds"])})

        def kept(name: str) -> Reduction:
            found = Reduction.load(folder / Path(name).name)
            values = Values(units, found.values.tensors, found.values.kind)
            reference = (
                None if found.reference is None else Values(units, found.reference.tensors, found.reference.kind)
            )
            circuit = Circuit(units, found.circuit.mask)
            return Reduction(circuit, values, reference, found.fingerprint, found.mixing, found.first_token)

        step, pending, clock, number, promised, spare = header["numbers"]
        found = tuple(
            Round(
                kept(one["file"]),
                Estimate(**one["predicted"]),
                Estimate(**one["measured"]),
                one["additivity"],
            )
            for one in header["rounds"]
        )
        return State(
            step,
            tuple(pending),
            tensors["left"],
            clock,
            number,
            found,
            Shrinkage(**header["believed"]),
            promised,
            Trade(Shrinkage(**header["trade"]["shrinkage"]), header["trade"]["share"]),
            spare,
            tensors["picks"],
            tensors["restored"],
            kept(header["before"]),
            found[-1].reduction,
        )
