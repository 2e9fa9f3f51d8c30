"""How much smaller and faster a folded model is: the table ``speed`` of the README.

The task's model is searched once, and its circuits at several sizes are folded. Each folded model's forward pass is
timed in turn with the full model's, on the same batch, and the *ratio* of the two is what counts: the median over
rounds, with its range. Parameters are counted by layer. Writes ``benchmarks/results/speed.csv`` and ``speed.md``.

    python benchmarks/speed.py [--task hierarchical_equality] [--batch 2048] [--repeats 31]
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pandas as pd
import torch
from shared import parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of

SIZES = (0.2, 0.1, 0.05, 0.03)


def seconds(model: Any, tokens: torch.Tensor) -> float:
    """One forward pass."""
    start = time.perf_counter()
    model(tokens)
    return time.perf_counter() - start


def ratios(full: Any, small: Any, tokens: torch.Tensor, repeats: int) -> pd.Series:
    """Seconds of the folded model's forward pass over the full model's, timed by turns."""
    with torch.no_grad():
        for model in (full, small):
            seconds(model, tokens)
        return pd.Series([seconds(small, tokens) / seconds(full, tokens) for _ in range(repeats)])


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measured(full: Any, reduction: tls.Reduction, tokens: torch.Tensor, repeats: int) -> dict[str, Any]:
    small = tls.fold(full, reduction)
    found = ratios(full, small, tokens, repeats)
    row: dict[str, Any] = {"fraction": reduction.circuit.fraction, "kept": len(reduction.circuit)}
    for layer, block in enumerate(full.blocks):
        row |= {f"layer_{layer}": parameters(block), f"layer_{layer}_kept": parameters(small.blocks[layer])}
    row |= {"parameters": parameters(full), "parameters_kept": parameters(small)}
    return row | {"ratio": found.median(), "ratio_low": found.quantile(0.1), "ratio_high": found.quantile(0.9)}


def markdown(frame: pd.DataFrame, layers: int) -> str:
    full = frame.iloc[0]
    names = ["kept", *(f"layer {i}" for i in range(layers)), "whole model", "folded / full seconds (10 to 90 %)"]
    before = [f"{full[f'layer_{i}']:,.0f}" for i in range(layers)]
    lines = [["all", *before, f"{full.parameters:,.0f}", "1"]]
    for row in frame.to_dict("records"):
        cells = [f"{row['fraction']:.0%} ({row['kept']})"]
        cells += [f"{row[f'layer_{i}_kept']:,.0f}" for i in range(layers)]
        cells += [f"{row['parameters_kept']:,.0f}"]
        cells += [f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"]
        lines.append(cells)
    return table_of(names, lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--task", default="hierarchical_equality")
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--repeats", type=int, default=31)
    arguments = options.parse_args()
    task = tls.load_task(arguments.task)
    model = task.model()
    train, validation, _ = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    path = tls.sparsify(model, train, units, held_out=validation, refitting=tls.Refitting(0))
    tokens = train.tokens[torch.arange(arguments.batch) % len(train)]
    frame = pd.DataFrame([measured(model, path.at(size), tokens, arguments.repeats) for size in SIZES])
    write("speed", frame, {"speed": partial(markdown, layers=len(model.blocks))})


if __name__ == "__main__":
    main()
