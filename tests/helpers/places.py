"""Where in a shipped task's model a variable may lie, and how well some units carry it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from tl_sparsify import (
    CausalModel,
    Circuit,
    Pairs,
    Task,
    Unit,
    heads,
    interchange,
    intervened,
    load_task,
    neurons,
    residuals,
    run_values,
)
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.units import select


@cache
def loaded(name: str) -> Task:
    return load_task(name)


@cache
def model_of(name: str) -> Any:
    return loaded(name).model()


def places(model: Any, length: int) -> Iterator[list[Unit]]:
    """All heads, all neurons and the residual stream of each layer, at each position, counted from the end."""
    for units in (heads(model), neurons(model), residuals(model)):
        for site in units.sites:
            yield from ([Unit(site, i).at(-position) for i in range(site.size)] for position in range(1, length + 1))


def carried(name: str, model: CausalModel, variable: str, units: Sequence[Unit], pairs: Pairs) -> float:
    """Interchange accuracy of some units for a variable of a causal model, among the choices if there are any."""
    sites, mask = select(units)
    swap = interchange(Circuit(sites, mask), run_values(model_of(name), pairs.source, sites))
    with torch.no_grad(), intervened(model_of(name), swap):
        best = answer_logits(model_of(name), pairs.base).argmax(1)
    said = best if pairs.base.choices is None else pairs.base.choices[best]
    return float((said == pairs.expected(model, (variable,))).double().mean())
