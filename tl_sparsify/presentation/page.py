"""The circuit page: one HTML file to walk through a circuit in, which loads nothing."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.files import check_folder, write_text
from tl_sparsify.abstraction.evidence import Alignment, Evidence
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.presentation.circuit_data import Request, gathered
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

_TEMPLATE = Path(__file__).with_name("page.html")


@checked
def page(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    out: str | Path = "circuit.html",
    title: str = "A circuit",
    scores: Scores | None = None,
    path: CircuitPath | None = None,
    alignment: Alignment | None = None,
    evidence: Evidence | None = None,
    shown: int = 3,
    effects: int = 16,
    limit: int = 300,
    progress: bool = True,
) -> Path:
    """Write a page of layers by positions with the kept units and the strongest edges between them, and return the
    file. Hover or go to a unit with the keyboard for its score, its effect, the tokens that it promotes (by
    TransformerLens's logit readout), a head's attention, a neuron's top examples; a slider filters by size.

    A unit stands where its constant would matter most in the example that is chosen. The effect is how much the risk of
    the circuit rises without the unit; an edge how far the other's value then moves. Where the model has no logit
    readout or no attention pattern, these parts are left out.

    Args:
        out: the file; a few hundred kilobytes, below 2 MB.
        scores: shown, and they order the units where there is no path.
        path: orders the units: the slider goes along it.
        alignment, evidence: of a causal model: its variables lead to their units and what was measured.
        shown: how many examples can be looked at.
        effects: on how many examples effects are measured.
        limit: the most units on the page, the first in order.

    One forward pass over ``effects`` examples for each kept unit, and a few more.

    Raises:
        FileNotFoundError: ``out`` is in a folder that is not there.
        ValueError: a model in training mode, a reduction of another model, scores or a path of other units, no
            unit that is kept, a number below one.

    Example:
        >>> tls.page(model, reduction, test, scores=scores, effects=4, progress=False).name
        'circuit.html'
    """
    for name, value in (("shown", shown), ("effects", effects), ("limit", limit)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    target = Path(out)
    check_folder(target)
    request = Request(scores, path, alignment, evidence, shown, effects, limit, progress)
    content = gathered(model, reduction, examples, request) | {"title": title}
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = _TEMPLATE.read_text(encoding="utf-8")
    parts = {"{{title}}": escape(title), "{{data}}": data}
    write_text(target, re.sub(r"{{(title|data)}}", lambda found: parts[found[0]], template))
    return target
