"""The command line: ``tl-sparsify run TASK`` finds, folds and verifies a circuit; ``tl-sparsify tasks`` lists tasks."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from tl_sparsify import constants, plot, score
from tl_sparsify._directory import check_free
from tl_sparsify._files import write_text
from tl_sparsify._folded import FOLDED
from tl_sparsify._progress import step
from tl_sparsify.circuit import Reduction
from tl_sparsify.evaluation import evaluate
from tl_sparsify.examples import Examples
from tl_sparsify.folding import fold, save_folded
from tl_sparsify.intervene import ablate, answer_logits, device_of, intervened
from tl_sparsify.search import sparsify
from tl_sparsify.task import list_tasks, load_task
from tl_sparsify.units import heads, neurons
from tl_sparsify.verification import Evidence, verify

_SIZES = ("heads", "neurons", "parameters")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's, or the copy of it that newer typers bring


@app.callback()
def _app() -> None:
    """Find out which algorithm a transformer runs: sparse circuits, folded and verified."""


@app.command()
def tasks() -> None:
    """List the tasks that ship with the package."""
    for name in list_tasks():
        typer.echo(f"{name}: {load_task(name).description}")


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="a task's name, or a folder of your own")],
    keep: Annotated[float, typer.Option(help="the fraction of units to keep and to fold")] = 0.05,
    rounds: Annotated[int, typer.Option(help="rounds of removing units")] = 20,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    out: Annotated[Path | None, typer.Option(help="where to write; results/TASK by default")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars, no tables")] = False,
) -> None:
    """Score the units of TASK's model, find a path of circuits, refit, fold one, verify it, and write it all down."""
    if not 0 < keep <= 1:  # what is wrong with the arguments is said before the work starts
        raise ValueError(f"--keep is {keep}; a fraction of the units must lie in (0, 1]")
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; at least one is needed")
    loaded = load_task(task)
    folder = _writable(Path("results") / loaded.name if out is None else out)
    console = Console(quiet=quiet)
    where, model = _device(device), loaded.model()
    model = model if device_of(model) == where else model.to(where, print_details=False)
    train, validation, test = loaded.examples(seed)
    units = heads(model) + neurons(model)
    console.print(f"[bold]{loaded.name}[/]: {loaded.description}\n{units!r}, {train!r} to search")

    with step("scoring units", not quiet):
        values = (constants.zero if loaded.ablation == "zero" else constants.mean)(model, train, units)
        scores = score.risk(model, train, units, values=values, temperature=3.0, seed=seed)
    _write_csv(scores.to_frame().sort_values("score", ascending=False, kind="stable"), folder / "scores.csv")

    path = sparsify(
        model,
        train,
        units,
        rounds=rounds,
        smallest=min(keep, 0.01),
        values=values,
        held_out=validation,
        seed=seed,
        progress=not quiet,
    )
    _write_csv(path.to_frame(), folder / "path.csv")
    console.print(_table(f"Path: risk in nats on {len(validation)} validation examples", path.to_frame()))

    reduction = constants.refit(model, path.at(keep), train, validation, seed=seed, progress=not quiet)
    reduction.save(folder / "circuit.reduction")
    small = fold(model, reduction)
    save_folded(small, folder / "folded")
    with step("evaluating the circuit", not quiet):
        found = evaluate(model, reduction, test, seed=seed)
    _write_csv(pd.DataFrame([found.to_dict()]), folder / "evaluation.csv")
    layers = _layers(model, small)
    _write_csv(layers, folder / "fold.csv")
    console.print(_table(f"Fold: {reduction.circuit!r}", _before_and_after(layers)))
    console.print(
        f"on {len(test)} test examples: accuracy {found.accuracy:.3f} (original {found.original_accuracy:.3f}), risk "
        f"{found.risk!r}, faithfulness {found.faithfulness:.3f}, completeness {found.completeness:.3f}\n"
        f"folded against ablated: max |logit difference| {_difference(model, reduction, small, test):.1e}\n"
    )

    with step("verifying the algorithm", not quiet):
        pairs = loaded.pairs(512, seed)
        evidence = verify(model, loaded.causal_model, loaded.alignment, pairs, reduced=small, seed=seed)
    _write_csv(evidence.to_frame(), folder / "evidence.csv")
    for part in _evidence(evidence):
        console.print(part)

    plot.save(plot.risk_curve(path), folder / "risk.png")
    plot.save(plot.unit_map(reduction, scores), folder / "map.png")
    console.print(f"written to {folder}")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} is not writable: {error.strerror}") from error
    try:
        check_free(folder / "folded", FOLDED, "folded model")
    except FileExistsError as error:
        raise ValueError(f"--out: {error}") from error
    return folder


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    write_text(path, frame.to_csv(index=False))


def _table(title: str, frame: pd.DataFrame) -> Table:
    table = Table(title=title, title_justify="left")
    for name in frame.columns:
        table.add_column(name.replace("_", " "), justify="left" if frame[name].dtype.kind in "OUT" else "right")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else f"{cell}" for cell in row))
    return table


def _evidence(evidence: Evidence) -> tuple[Table, str]:
    """One line a variable and intervention, one column a model; and what does not fit into it."""
    models = list(dict.fromkeys(row.model for row in evidence.rows))
    table = Table(title="Evidence: interchange accuracy (where the answer should change)", title_justify="left")
    for name in ("variable", "interchanged", *models):
        table.add_column(name)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in evidence.rows:
        cell = f"{row.accuracy:.3f} ({row.accuracy_changed:.3f})"
        lines.setdefault((row.variable, row.intervention), {})[row.model] = cell
    for names, cells in lines.items():
        table.add_row(*names, *(cells.get(model, "") for model in models))
    notes: list[str] = []
    for model in models:
        aligned = [row for row in evidence.rows if row.model == model and row.intervention == "aligned units"]
        kept = ", ".join(f"{row.variable} {row.units:.0f} of {row.units + row.removed:.0f}" for row in aligned)
        notes.append(f"{model}: {aligned[0].retained:.1%} of the pairs right on both inputs, aligned units: {kept}")
    return table, "\n".join(notes)


def _layers(model: Any, small: Any) -> pd.DataFrame:
    """Heads, neurons and parameters of each layer and of the whole model, before and after."""

    def sizes(of: Any, layer: int) -> dict[str, int]:
        inside = {unit for unit in heads_and_neurons(of) if unit.startswith(f"L{layer}")}
        return {
            "heads": sum("H" in unit for unit in inside),
            "neurons": sum("N" in unit for unit in inside),
            "parameters": _parameters(of.blocks[layer]),
        }

    def heads_and_neurons(of: Any) -> tuple[str, ...]:
        return tuple(small.units) if of is small else (heads(of) + neurons(of)).names

    rows: list[dict[str, Any]] = []
    for layer in range(len(model.blocks)):
        before, after = sizes(model, layer), sizes(small, layer)
        rows.append(
            {"part": f"layer {layer}"}
            | {f"{k}{end}": v[k] for k in before for end, v in (("", before), ("_kept", after))}
        )
    total = {name: sum(row[name] for row in rows) for name in rows[0] if name != "part"}
    total |= {"parameters": _parameters(model), "parameters_kept": _parameters(small)}
    return pd.DataFrame([*rows, {"part": "whole model"} | total])


def _before_and_after(layers: pd.DataFrame) -> pd.DataFrame:
    """The sizes of :func:`_layers` as ``4 to 3``."""
    columns = {name: zip(layers[name], layers[f"{name}_kept"], strict=True) for name in _SIZES}
    return pd.DataFrame(
        {"part": layers.part} | {name: [f"{a:,} to {b:,}" for a, b in c] for name, c in columns.items()}
    )


def _parameters(module: torch.nn.Module) -> int:
    return sum({p.data_ptr(): p.numel() for p in module.parameters()}.values())


def _difference(model: Any, reduction: Reduction, small: Any, examples: Examples) -> float:
    worst = 0.0
    with torch.no_grad():
        for _, batch in examples.batches(1024):
            with intervened(model, ablate(reduction)):
                ablated = answer_logits(model, batch)
            worst = max(worst, float((answer_logits(small, batch) - ablated).abs().max()))
    return worst


def main() -> None:
    """The entry point: status 0 when every step was done, 2 for a wrong argument (one sentence, no traceback)."""
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False)
    except _USAGE_ERROR as error:
        _fail(error.format_message())
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except OSError as error:
        typer.echo(f"tl-sparsify: {error}; the files written so far are complete", err=True)
        status = 1
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    if status == 130:
        typer.echo("interrupted; the files written so far are complete", err=True)
    sys.exit(status)


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"tl-sparsify: {sentence}", err=True)
    sys.exit(2)
