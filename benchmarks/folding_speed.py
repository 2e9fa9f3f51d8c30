"""How much faster a folded GPT-2 small is, beside what counting arithmetic operations predicts.

Random weights in the shape of GPT-2 small, 32 x 64 tokens, random circuits that keep 50, 10 and 5 % of the heads and
of the neurons. In every round the full and the folded models run once each, in turn; a ratio is of one round, and the
median over rounds is printed with its range. Times are processor seconds of one thread, which other work on the machine
disturbs little. ``blocks`` is the model without the unembedding. Parameters and bytes on disk are of the same models
(the first row keeps everything). Writes ``benchmarks/results/folding_speed.csv`` and ``folding_speed.md``.

    python benchmarks/folding_speed.py [--rounds 7] [--batch 32] [--pos 64]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from score_speed import gpt2_small
from shared import parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of

FRACTIONS = (0.5, 0.1, 0.05)
DEMANDED = {0.5: 0.7, 0.1: 0.7, 0.05: 0.6}


def reduction(model: Any, fraction: float, seed: int = 0) -> tls.Reduction:
    """A random circuit with a fraction of the heads and of the neurons, and random constants."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for units in (tls.heads(model), tls.neurons(model)):
        kept = torch.randperm(len(units), generator=generator)[: round(fraction * len(units))]
        masks.append(torch.zeros(len(units), dtype=torch.bool).index_fill_(0, kept, True))
    units = tls.heads(model) + tls.neurons(model)
    widths = {"head": model.cfg.d_head, "neuron": 1}
    values = tuple(torch.randn(site.size, widths[site.kind], generator=generator) for site in units.sites)
    return tls.Reduction(tls.Circuit(units, torch.cat(masks)), tls.Values(units, values))


def operations(model: Any, batch: int, pos: int) -> tuple[float, float]:
    """Multiplications of a forward pass, read from the weights: of the blocks, and of the whole model."""
    blocks = 0.0
    for block in model.blocks:
        heads, d_head = block.attn.W_Q.shape[0], model.cfg.d_head
        weights = 4 * heads * d_head * model.cfg.d_model + 2 * block.mlp.W_out.numel()
        blocks += batch * pos * (weights + 2 * heads * d_head * pos)
    return blocks, blocks + batch * pos * model.W_U.numel()


def seconds(run: Callable[[torch.Tensor], Any], tokens: torch.Tensor) -> float:
    start = time.process_time()
    run(tokens)
    return time.process_time() - start


def bytes_on_disk(folded: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        tls.save_folded(folded, Path(folder) / "model")
        return sum(file.stat().st_size for file in (Path(folder) / "model").rglob("*"))


def table(rounds: int, batch: int, pos: int) -> pd.DataFrame:
    """One row for each fraction of units kept."""
    full = gpt2_small()
    everything = tls.Circuit.full(tls.heads(full) + tls.neurons(full))
    models = {1.0: tls.fold(full, reduction(full, 1.0).with_circuit(everything))}
    models |= {fraction: tls.fold(full, reduction(full, fraction)) for fraction in FRACTIONS}
    tokens = torch.randint(full.cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(0))
    runs = {f"{part} {kept}": run for kept, model in models.items() for part, run in parts(model).items()}
    with torch.no_grad():
        for run in runs.values():
            run(tokens)  # warm
        times = pd.DataFrame([{name: seconds(run, tokens) for name, run in runs.items()} for _ in range(rounds)])
    rows = []
    for kept, model in models.items():
        row = {"kept": kept, "parameters": model.n_params_total, "bytes": bytes_on_disk(model)}
        counted = zip(
            ("blocks", "whole"), operations(models[1.0], batch, pos), operations(model, batch, pos), strict=True
        )
        for part, before, after in counted:
            ratio = times[f"{part} 1.0"] / times[f"{part} {kept}"]
            row |= {f"{part}_seconds": times[f"{part} {kept}"].median(), f"{part}_predicted": before / after}
            row |= {f"{part}_ratio": ratio.median(), f"{part}_low": ratio.min(), f"{part}_high": ratio.max()}
        rows.append(row)
    return pd.DataFrame(rows)


def parts(model: Any) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The forward pass without the unembedding, and all of it."""
    return {"blocks": lambda tokens: model.original_model.transformer(tokens, use_cache=False), "whole": model}


def markdown(frame: pd.DataFrame) -> str:
    names = ["kept", "parameters", "MB on disk"]
    names += [f"{part}: {what}" for part in ("blocks", "whole") for what in ("predicted", "measured (range)", "share")]
    lines: list[list[str]] = []
    for row in frame.to_dict("records"):
        cells = [f"{row['kept']:.0%}", f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.1f}"]
        for part in ("blocks", "whole"):
            predicted, ratio = row[f"{part}_predicted"], row[f"{part}_ratio"]
            spread = f"{row[f'{part}_low']:.2f} to {row[f'{part}_high']:.2f}"
            cells += [f"{predicted:.2f}", f"{ratio:.2f} ({spread})", f"{ratio / predicted:.2f}"]
        lines.append(cells)
    return table_of(names, lines)


def main() -> None:
    options = parser(__doc__)
    for name, default in (("rounds", 7), ("batch", 32), ("pos", 64)):
        options.add_argument(f"--{name}", type=int, default=default)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    frame = table(arguments.rounds, arguments.batch, arguments.pos)
    write("folding_speed", frame, {"folding_speed": markdown})
    for row in frame.to_dict("records"):
        for part in ("blocks", "whole"):
            share, least = row[f"{part}_ratio"] / row[f"{part}_predicted"], DEMANDED.get(row["kept"], 0)
            if share < least:
                print(f"{part} at {row['kept']:.0%}: {share:.2f} of the predicted ratio, less than {least}")


if __name__ == "__main__":
    main()
