"""Removing features by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tl_sparsify._internal.arguments import checked
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.units import Unit, Units


@checked
def remove(model: Any, units: Units, names: Iterable[str | Unit], *, values: Values | None = None) -> Reduction:
    """The reduction in which the named features are removed and everything else is kept (SHIFT: Marks et al.,
    arXiv 2403.19647, take out what an expert finds spurious): set to 0, as if they had not fired, or to ``values``.

    No model pass.

    Raises:
        KeyError: a name that no unit has.
        ValueError: units other than features without ``values``.

    Example:
        >>> axes, zeros = torch.eye(64), torch.zeros(64)
        >>> dictionary = tls.Dictionary(axes, axes, zeros, zeros, hook="blocks.1.hook_resid_post")
        >>> tls.dictionaries.remove(model, tls.features(model, dictionary), ["L1F3", "L1F17"])
        Reduction(Circuit(62 of 64 units: 62 features), zero values)
    """
    gone = ~Circuit.of(units, names)
    if values is None:
        wide = next((site for site in units.sites if site.kind not in ("feature", "error")), None)
        if wide is not None:
            raise ValueError(f"values are not given, and {wide.hook} has {wide.kind} units, not features: give them")
        widths = [1 if site.kind == "feature" else len(site.basis) for site in units.sites]  # type: ignore[arg-type]
        sizes = zip((site.size for site in units.sites), widths, strict=True)
        values = Values(units, tuple(torch.zeros(size, width) for size, width in sizes), "zero")
    return Reduction(gone, values, fingerprint=fingerprint(model))
