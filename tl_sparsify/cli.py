"""The command line: ``tl-sparsify run TASK`` finds, folds and verifies a circuit; ``tl-sparsify report DIR`` makes one
HTML file of what was found; ``tl-sparsify bench`` compares methods; ``tl-sparsify tasks`` lists tasks."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import pandas as pd
import torch
import typer
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tl_sparsify._internal.directory import check_free
from tl_sparsify._internal.files import write_text
from tl_sparsify._internal.progress import step
from tl_sparsify._internal.versions import versions
from tl_sparsify.abstraction.align import align
from tl_sparsify.abstraction.evidence import Evidence
from tl_sparsify.abstraction.verdicts import Role
from tl_sparsify.abstraction.verify import verify
from tl_sparsify.comparison import baselines
from tl_sparsify.comparison.benchmark import compare_tasks, write_comparison
from tl_sparsify.comparison.evaluate import evaluate
from tl_sparsify.comparison.methods import BENCH_FOLDER, BENCH_TASKS, SMOKE_METHODS, SMOKE_TASKS
from tl_sparsify.comparison.tables import markdown
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, device_of
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import compared
from tl_sparsify.core.metrics import by_example, correct, kl
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import heads, neurons
from tl_sparsify.folding.bridge import FOLDED, save_folded
from tl_sparsify.folding.fold import fold
from tl_sparsify.folding.sizes import sizes_by_layer
from tl_sparsify.presentation import plot, report
from tl_sparsify.search import constants, score
from tl_sparsify.search.joint import Probing, sparsify
from tl_sparsify.tasks.overview import overview
from tl_sparsify.tasks.task import list_tasks, load_task

_SIZES = ("heads", "neurons", "parameters")
_PAIRS = 512  # for verification
_BESIDE_STEPS, _BESIDE_BATCH = 300, 128  # of the refits for baselines.csv: as by default, on fewer examples a step
_TEMPERATURE = 3.0  # of the probes
_LINE = "{:<24} {:>8} {:>6} {:>6}  {:<17} {}"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's, or the copy of it that newer typers bring


@app.callback()
def _app() -> None:
    """Find out which algorithm a transformer runs: sparse circuits, folded and verified."""


@app.command()
def tasks() -> None:
    """List the tasks that ship with the package: accuracy of their models on test examples beside chance, heads and
    neurons, and how the true circuit is known."""
    typer.echo(_LINE.format("task", "accuracy", "chance", "units", "truth by", "what it is"))
    for name in list_tasks():
        found = overview(load_task(name))
        truth = ", ".join(found.truth) or "-"
        numbers = (f"{found.accuracy:.3f}", f"{found.chance:.3f}", f"{found.units:,}")
        typer.echo(_LINE.format(name, *numbers, truth, found.description))


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="a task's name, or a folder of your own")],
    model_: Annotated[
        str | None, typer.Option("--model", help="for tasks of text: a Hugging Face name or folder (gpt2)")
    ] = None,
    keep: Annotated[float, typer.Option(help="the fraction of units to keep and to fold")] = 0.05,
    rounds: Annotated[int, typer.Option(help="rounds of removing units")] = 20,
    steps: Annotated[int | None, typer.Option(help="of each refit of constants; 300 by default")] = None,
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
    if steps is not None and steps < 1:
        raise ValueError(f"--steps is {steps}; at least one is needed")
    fitting: dict[str, Any] = {} if steps is None else {"steps": steps}
    beside_steps = _BESIDE_STEPS if steps is None else steps
    loaded = load_task(task, model=model_)
    folder = _writable(Path("results") / loaded.name if out is None else out)
    console = Console(quiet=quiet)
    where, model = _device(device), loaded.model()
    model = model if device_of(model) == where else model.to(where, print_details=False)
    train, validation, test = loaded.examples(seed)
    units = heads(model) + neurons(model)
    console.print(f"[bold]{loaded.name}[/]: {loaded.description}\n{units!r}, {train!r} to search")

    pairs, alignment = loaded.pairs(_PAIRS, seed), loaded.alignment
    if not alignment.units:  # nobody has looked yet where this model's variables are
        both = loaded.pairs(2 * _PAIRS, seed)  # drawn at once: padded alike, so that positions are the same
        pairs, searching = both[:_PAIRS], both[_PAIRS:]
        with step("looking for the causal model's variables", not quiet):
            alignment = align(model, loaded.causal_model, searching, pairs).alignment

    with step("scoring units", not quiet):
        values = (constants.zero if loaded.ablation == "zero" else constants.mean)(model, train, units)
        scores = score.risk(model, train, units, values=values, temperature=_TEMPERATURE, seed=seed)
    _write_csv(scores.to_frame().sort_values("score", ascending=False, kind="stable"), folder / "scores.csv")

    path = sparsify(
        model,
        train,
        units,
        rounds=rounds,
        probing=Probing(temperature=_TEMPERATURE),
        smallest=min(keep, 0.01),
        values=values,
        held_out=validation,
        seed=seed,
        progress=not quiet,
    )
    _write_csv(path.to_frame(), folder / "path.csv")
    console.print(_table(f"Path: risk in nats on {len(validation)} validation examples", path.to_frame()))

    reduction = constants.refit(model, path.at(keep), train, validation, seed=seed, progress=not quiet, **fitting)
    reduction.save(folder / "circuit.reduction")
    small = fold(model, reduction)
    save_folded(small, folder / "folded")
    with step("evaluating the circuit", not quiet):
        found = evaluate(model, reduction, test, seed=seed)
    difference = _difference(model, reduction, small, test)
    _write_csv(pd.DataFrame([found.to_dict() | {"folded_difference": difference}]), folder / "evaluation.csv")
    layers = sizes_by_layer(model, small)
    _write_csv(layers, folder / "fold.csv")
    console.print(_table(f"Fold: {reduction.circuit!r}", _before_and_after(layers)))
    console.print(
        f"on {len(test)} test examples: accuracy {found.accuracy:.3f} (original {found.original_accuracy:.3f}), risk "
        f"{found.risk!r}, faithfulness {found.faithfulness:.3f}, completeness {found.completeness:.3f}\n"
        f"folded against ablated: max |logit difference| {difference:.1e}\n"
    )

    with step("comparing with other orders", not quiet):
        splits = (train, validation, test)
        beside = _beside(model, reduction.circuit, values, loaded.ablation, splits, seed, beside_steps)
    last = {"method": "found circuit, as saved", "found": True, "as_saved": True, "replacements": reduction.kind}
    last |= {
        "steps": "",
        "kept": found.kept,
        "risk": found.risk.mean,
        "risk_stderr": found.risk.stderr,
        "accuracy": found.accuracy,
    }
    beside = pd.DataFrame([*beside, last])
    _write_csv(beside, folder / "baselines.csv")
    console.print(_table(f"Circuits of {found.kept:,} units: risk in nats on test examples", beside))

    with step("verifying the algorithm", not quiet):
        evidence = verify(model, loaded.causal_model, alignment, pairs, reduced=small, seed=seed)
    _write_csv(evidence.to_frame(), folder / "evidence.csv")
    for part in _evidence(evidence):
        console.print(part)

    plot.save(plot.risk_curve(path), folder / "risk.png")
    plot.save(plot.unit_map(reduction, scores), folder / "map.png")
    plot.save(plot.causal_graph(loaded.causal_model), folder / "causal.png")
    about = {
        "task": loaded.name,
        "description": loaded.description,
        "ablation": loaded.ablation,
        "chance": loaded.chance,
        "keep": keep,
        "rounds": rounds,
        "seed": seed,
        "device": device,
        "examples": {"train": len(train), "validation": len(validation), "test": len(test), "pairs": len(pairs)},
        "score": {"name": scores.name, "measured_in": scores.measured_in, "temperature": _TEMPERATURE},
        "baseline_refit": {"steps": beside_steps, "batch_size": _BESIDE_BATCH},
        "evidence_level": evidence.level,
        "versions": versions(),
    }
    if model_ is not None:
        about |= {"model": model_}
    if not loaded.alignment.units:
        about |= {"alignment": {name: [unit.name for unit in chosen] for name, chosen in alignment.units.items()}}
    write_text(folder / "run.json", json.dumps(about, indent=2) + "\n")  # at last: it says that the run is complete
    console.print(f"written to {folder}")


@app.command()
def bench(
    tasks: Annotated[list[str] | None, typer.Argument(help="names of tasks; six shipped ones by default")] = None,
    methods: Annotated[str, typer.Option(help="names, with commas between; all by default")] = "",
    seeds: Annotated[int, typer.Option(help="how many: of the data split and of everything random")] = 3,
    out: Annotated[Path, typer.Option(help="where cells and tables go; finished cells are kept")] = Path(BENCH_FOLDER),
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
    examples: Annotated[int, typer.Option(help="the most training and validation examples")] = 512,
    smoke: Annotated[bool, typer.Option("--smoke", help="a small subset: does everything work?")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars, no tables")] = False,
) -> None:
    """Compare methods on tasks with seeds, go on where an earlier call stopped, and write one table with pictures."""
    wanted = tuple(tasks or (SMOKE_TASKS if smoke else BENCH_TASKS))
    chosen = tuple(name.strip() for name in methods.split(",") if name.strip()) or (SMOKE_METHODS if smoke else ())
    settings: dict[str, Any] = {"seeds": 1 if smoke else seeds, "workers": workers, "progress": not quiet}
    settings |= {"examples": 128, "refit_steps": 20, "bootstrap": 100} if smoke else {"examples": examples}
    table = compare_tasks(wanted, chosen, out=out, **settings)
    console = Console(quiet=quiet)
    for path in write_comparison(table, out):
        console.print(f"written: {path}")
    for measure in ("risk", "accuracy", "faithfulness"):
        plot.save(plot.frontier(table, measure), out / f"methods_{measure}.png")
    for name in dict.fromkeys(table["task"]):
        console.print(f"\n[bold]{name}[/]\n{markdown(table, name)}", soft_wrap=True)


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where `run` or `bench` wrote, or both")],
    out: Annotated[Path | None, typer.Option(help="the file to write; DIR/report.html by default")] = None,
) -> None:
    """Make one HTML file of what `run` found and `bench` measured in DIR: tables, figures, controls and limits."""
    typer.echo(f"written to {report.write(folder, out)}")


def _beside(
    model: Any,
    found: Circuit,
    values: Values,
    ablation: str,
    splits: tuple[Examples, Examples, Examples],
    seed: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Circuits of the same size in other orders, beside the one found: each with the same constants, and with the same
    refit of them."""
    train, validation, test = splits
    orders = {
        "random": baselines.random(model, train, found.units, seed=seed),
        "activation variance": score.variance(model, train, found.units),
        "gradient attribution": score.gradient(model, train, found.units, values=values).absolute,
    }
    circuits = {name: scores.top(found.fraction) for name, scores in orders.items()} | {"found circuit": found}
    rows: list[dict[str, Any]] = []
    for name, circuit in circuits.items():
        plain = constants.reduced(model, circuit, values, ablation)
        again = constants.refit(
            model,
            plain,
            train,
            validation,
            steps=steps,
            per_step=_BESIDE_BATCH,
            seed=seed,
            progress=False,
        )
        for reduction, fitted in ((plain, 0), (again, steps)):
            moments = compared(model, reduction, test, _risk_and_right)
            (mean, right), (error, _) = moments.mean.tolist(), moments.stderr.tolist()
            row = {"method": name, "found": circuit is found, "as_saved": False, "replacements": reduction.kind}
            row |= {"steps": fitted, "kept": len(circuit)}
            rows.append(row | {"risk": mean, "risk_stderr": error, "accuracy": right})
    return rows


def _risk_and_right(
    original: Float[Tensor, "rows choices"], reduced: Float[Tensor, "rows choices"], batch: Examples
) -> Float[Tensor, "batch measures"]:
    columns = (kl(original, reduced), correct(reduced, batch).double())
    return torch.stack([by_example(column, batch) for column in columns], 1)


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
        aligned = [
            row for row in evidence.rows if row.model == model and row.role is Role.ALIGNED and not row.sources_apart
        ]
        kept = ", ".join(f"{row.variable} {row.units:.0f} of {row.units + row.removed:.0f}" for row in aligned)
        notes.append(f"{model}: {aligned[0].retained:.1%} of the pairs right on both inputs, aligned units: {kept}")
    return table, "\n".join(notes)


def _before_and_after(layers: pd.DataFrame) -> pd.DataFrame:
    """The sizes of :func:`sizes_by_layer` as ``4 to 3``."""
    columns = {name: zip(layers[name], layers[f"{name}_kept"], strict=True) for name in _SIZES}
    return pd.DataFrame(
        {"part": layers.part} | {name: [f"{a:,} to {b:,}" for a, b in c] for name, c in columns.items()}
    )


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
