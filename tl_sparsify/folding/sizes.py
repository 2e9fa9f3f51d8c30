"""Sizes: heads, neurons and parameters of a model and of the smaller one that was folded from it, layer by layer."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tl_sparsify._internal.storage import parameter_count
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.units import heads, neurons


def sizes_by_layer(model: Any, folded: Any) -> pd.DataFrame:
    """A row for each layer and one for the whole model: ``part``, then ``heads, neurons, parameters``, each before and
    (``_kept``) after. No model pass.

    Args:
        model: the original, with heads and neurons.
        folded: what :func:`fold` made of it.
    """
    units = heads(model) + neurons(model)
    kept = Circuit.of(units, list(folded.units.values())).mask
    rows: list[dict[str, Any]] = []
    for layer, (before, after) in enumerate(zip(model.blocks, folded.blocks, strict=True)):
        row: dict[str, Any] = {"part": f"layer {layer}"}
        for kind in ("head", "neuron"):
            here = [
                (site.size, int(kept[part].sum()))
                for site, part in zip(units.sites, units.slices, strict=True)
                if (site.kind, site.layer) == (kind, layer)
            ]
            row |= {f"{kind}s": sum(size for size, _ in here), f"{kind}s_kept": sum(left for _, left in here)}
        rows.append(row | {"parameters": parameter_count(before), "parameters_kept": parameter_count(after)})
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "part"}
    total |= {"parameters": parameter_count(model), "parameters_kept": parameter_count(folded)}
    return pd.DataFrame([*rows, {"part": "whole model"} | total])
