"""What was found: behaviours, each with its contexts, its circuit, and that circuit's risk beside the controls'."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparsify._internal.files import versions, write_text
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction

BEHAVIOURS_FILES = ("behaviours.json", "behaviours.md", "circuits")
"""What :meth:`Behaviours.save` writes."""
_LISTED = 12  # units of a circuit in the table


@dataclass(frozen=True)
class Ranged:
    """A number with its interval over examples.

    Example:
        >>> tls.Ranged(0.5, 0.41, 0.58)
        0.5 (0.41 to 0.58)
    """

    value: float
    low: float
    high: float

    def __repr__(self) -> str:
        whole = f"{self.value:.3g}"
        return whole if math.isnan(self.low) else f"{whole} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A group of contexts that the model answers alike, and its circuit.

    Attributes:
        name: the commonest last tokens of its contexts, an arrow, and the commonest answers.
        train: the contexts that its circuit was found on, as numbers of examples.
        held_out: those that it is judged on.
        shown: three of these as text, with the answer in brackets.
        reduction: its circuit.
        risk: of the circuit, on the contexts held out.
        together: of the circuit of all contexts, there.
        random: of the circuit of a random group of as many contexts, there.
        gain: ``together`` less ``risk``.
        random_gain: by how much the random group's circuit lowers the risk of the circuit of all contexts on the random
            group's own contexts held out.

    Example:
        >>> found = tls.behaviours(model, train, units, count=2, size=0.5, least=4, rounds=1, bootstrap=50)
        >>> all(len(one.reduction.circuit) == 6 for one in found.found)
        True
    """

    name: str
    train: Int[Tensor, "some"]
    held_out: Int[Tensor, "others"]
    shown: tuple[str, ...]
    reduction: Reduction
    risk: Ranged
    together: Ranged
    random: Ranged
    gain: Ranged
    random_gain: Ranged

    def __len__(self) -> int:
        return len(self.train) + len(self.held_out)

    def __repr__(self) -> str:
        return f"Behaviour({self.name}: {len(self)} contexts, {self.reduction.circuit!r})"


@dataclass(frozen=True, eq=False)
class Behaviours:
    """The behaviours of a model on some contexts, the largest first.

    Attributes:
        examples: the contexts.
        groups: of each context the number of its behaviour; -1 in a group that is too small to be one.
        found: the behaviours.
        together: the circuit of all contexts, as large as each behaviour's.
        cross: ``[i, j]``, the risk of behaviour ``j``'s circuit on the contexts held out of behaviour ``i``.
        gain: by how much own circuits lower the risk of the circuit of all contexts, over all contexts held out.
        random_gain: the same of random groups: what the circuits of groups gain by being of fewer contexts alone.
        unit: what risks are measured in.
        level: of the intervals.

    Example:
        >>> found = tls.behaviours(model, train, units, count=2, size=0.5, least=4, rounds=1, bootstrap=50)
        >>> found.save("behaviours")
        >>> list(found.to_frame().columns)[:4]
        ['behaviour', 'contexts', 'units', 'risk']
    """

    examples: Examples
    groups: Int[Tensor, "n"]
    found: tuple[Behaviour, ...]
    together: Reduction
    cross: Float[Tensor, "groups groups"]
    gain: Ranged
    random_gain: Ranged
    unit: str
    level: float

    def to_frame(self) -> pd.DataFrame:
        """One row a behaviour: ``behaviour, contexts, units``, and for ``risk``, ``together``, ``random``, ``gain`` and
        ``random_gain`` the value and its interval's ends (``risk_low``, ``risk_high``, ...)."""
        lines: list[dict[str, Any]] = []
        for one in self.found:
            line: dict[str, Any] = {"behaviour": one.name, "contexts": len(one)}
            line["units"] = " ".join(one.reduction.circuit.names)
            for name, ranged in _measures(one).items():
                line |= {name: ranged.value, f"{name}_low": ranged.low, f"{name}_high": ranged.high}
            lines.append(line)
        return pd.DataFrame(lines)

    def markdown(self) -> str:
        """The behaviours with their contexts and circuits, the risks with their controls, and the risk of each circuit
        on the contexts of each behaviour, as Markdown tables."""
        size = len(self.together.circuit)
        left = int((self.groups < 0).sum())
        heads = ["", "behaviour", "contexts", "three of them", f"circuit of {size:,} units"]
        rows = [
            [
                str(i),
                _cell(one.name),
                str(len(one)),
                "<br>".join(map(_cell, one.shown)),
                _cell(_units(one.reduction)),
            ]
            for i, one in enumerate(self.found)
        ]
        parts = [table_of(heads, rows)]
        parts += [f"{left} of {len(self.groups)} contexts are in groups too small to be a behaviour.\n"] if left else []
        parts.append(
            f"Risk on contexts held out ({self.unit}; in brackets {self.level:.0%} intervals over contexts):\n"
        )
        heads = ["", "own circuit", "circuit of all", "of a random group", "gain", "gain of the random group"]
        rows = [[str(i), *map(repr, _measures(one).values())] for i, one in enumerate(self.found)]
        rows.append(["all", "", "", "", repr(self.gain), repr(self.random_gain)])
        parts.append(table_of(heads, rows))
        parts.append("Risk of each behaviour's circuit (columns) on the contexts of each (rows):\n")
        numbers = [str(i) for i in range(len(self.found))]
        cross = [[i, *(f"{risk:.3g}" for risk in row)] for i, row in zip(numbers, self.cross.tolist(), strict=True)]
        parts.append(table_of(["", *numbers], cross))
        return "\n".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write ``behaviours.md``, ``behaviours.json`` and ``circuits/`` (a reduction for each behaviour by its number,
        and ``together``) into a folder, in place of an older result's."""
        folder = Path(folder)
        (folder / "circuits").mkdir(parents=True, exist_ok=True)
        for i, one in enumerate(self.found):
            one.reduction.save(folder / "circuits" / f"{i}.reduction")
        self.together.save(folder / "circuits" / "together.reduction")
        for older in (folder / "circuits").glob("*.reduction"):  # of a larger result
            if older.stem.isdecimal() and int(older.stem) >= len(self.found):
                older.unlink()
        write_text(folder / "behaviours.md", self.markdown())
        write_text(folder / "behaviours.json", json.dumps(self._about(), indent=1, ensure_ascii=False) + "\n")

    def _about(self) -> dict[str, Any]:
        found = [
            {"name": one.name, "contexts": len(one), "shown": list(one.shown)}
            | {"units": list(one.reduction.circuit.names)}
            | {name: _plain(ranged) for name, ranged in _measures(one).items()}
            for one in self.found
        ]
        whole = {"gain": _plain(self.gain), "random_gain": _plain(self.random_gain)}
        whole |= {"together": list(self.together.circuit.names), "groups": self.groups.tolist()}
        whole |= {"cross": self.cross.tolist(), "unit": self.unit, "level": self.level}
        return {"behaviours": found} | whole | {"versions": versions()}

    def __repr__(self) -> str:
        names = "; ".join(f"{one.name} ({len(one)})" for one in self.found[:3])
        more = f"; {len(self.found) - 3} more" if len(self.found) > 3 else ""
        return f"Behaviours({len(self.found)} of {len(self.groups):,} contexts: {names}{more}; gain {self.gain!r})"


def _measures(one: Behaviour) -> dict[str, Ranged]:
    return {name: getattr(one, name) for name in ("risk", "together", "random", "gain", "random_gain")}


def _plain(ranged: Ranged) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(ranged).items()}


def _units(reduction: Reduction) -> str:
    """The circuit's units, heads first; of many only the first ones."""
    names = reduction.circuit.names
    rest = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    ordered = sorted(names, key=lambda name: "H" not in name)
    return ", ".join(ordered[:_LISTED]) + rest


def _cell(text: str) -> str:
    """Text that stays in its cell, and as it is."""
    for raw in "&<|`*_[$\\":  # what Markdown or a formula would make something else of
        text = text.replace(raw, f"&#{ord(raw)};")
    return text.replace("\n", "⏎")
