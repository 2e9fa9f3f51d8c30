"""Files and errors of several processes: ``python -m helpers.several_files FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tl_sparsify as tls
from helpers.models import bridge, examples, fresh, reduction_of, units_of
from helpers.several import numbers
from tl_sparsify._internal import progress, ranks

RANK = int(os.environ["RANK"])


def files(folder: Path) -> Any:
    """What all processes save and read, and a search that goes on from its checkpoint."""
    model, units, data = bridge(), units_of(bridge()), examples(12)
    reduction = reduction_of(model)
    progress.SILENCE = 0.0  # a line for everything that is done
    reduction.save(folder / "a.reduction")
    loaded = tls.Reduction.load(folder / "a.reduction")
    tls.save_folded(tls.fold(model, reduction), folder / "small")
    small = tls.load_folded(folder / "small")
    how: dict[str, Any] = {"rounds": 3, "smallest": 0.3, "checkpoint": folder / "search"}
    path = tls.sparsify(model, data, units, **how)
    again = tls.sparsify(model, data, units, **how)
    same = json.dumps(numbers(path)) == json.dumps(numbers(again))  # as text, where a NaN is itself
    return [list(loaded.circuit.names), len(small.units), same, sorted(p.name for p in folder.iterdir())]


def wrong_in_one(folder: Path) -> Any:
    """What each says where the model's output is NaN on one example only, which one process has."""
    model, data = fresh(), examples(12)
    tokens = data.tokens.clone()
    tokens[11], tokens[:11] = 3, tokens[:11].clamp_max(2)
    with torch.no_grad():
        model.W_E[3] = float("nan")
    return refused(lambda: tls.risk(model, reduction_of(model), tls.Examples(tokens, data.labels)))


def other_calls(folder: Path) -> Any:
    """What each says where they do not make the same calls."""
    data = examples(12 + RANK)
    return refused(lambda: tls.risk(bridge(), reduction_of(bridge()), data))


def no_folder(folder: Path) -> Any:
    """What each says where the first cannot write."""
    return refused(lambda: reduction_of(bridge()).save(folder / "missing" / "a.reduction"))


def out_of_memory(folder: Path) -> Any:
    """The means where one process has room for two examples at a time only."""
    model = fresh()
    forward = model.forward

    def limited(tokens: torch.Tensor, **rest: Any) -> Any:
        if RANK == 1 and len(tokens) > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(tokens, **rest)

    model.forward = limited
    return numbers(tls.constants.mean(model, examples(12), units_of(model)))


def wrong_between(folder: Path) -> Any:
    """What each says where one has an error of its own while the others go on to a pass; and then all go on."""

    def call() -> None:
        with ranks.agreed("the outer block"):
            if RANK == 1:
                raise ValueError("only here")
            tls.risk(bridge(), reduction_of(bridge()), examples(12))

    said = refused(call)
    return [said, numbers(tls.risk(bridge(), reduction_of(bridge()), examples(12)))]


def few(folder: Path) -> Any:
    """The scores of fewer examples than processes."""
    return numbers(tls.score.risk(bridge(), examples(1), units_of(bridge())))


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


CALLS = (files, wrong_in_one, other_calls, no_folder, out_of_memory, wrong_between, few)

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {call.__name__: call(folder) for call in CALLS}
    (folder / f"{RANK}.json").write_text(json.dumps(found))
