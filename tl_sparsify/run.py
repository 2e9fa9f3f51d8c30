"""A run: score the units of a task's model, find a path of circuits, refit, fold one, verify it, and write it down.

Every file is written as soon as what is in it is known, ``run.json`` at last: it says that the run is complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape

from tl_sparsify._internal.files import remove, versions, write_text
from tl_sparsify._internal.progress import duration, step
from tl_sparsify._internal.ranks import on_main
from tl_sparsify.abstraction.align import align
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.verify import verify
from tl_sparsify.comparison import baselines
from tl_sparsify.comparison.convergence import refit_until_converged
from tl_sparsify.comparison.evaluate import Evaluation, evaluate
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.measure import compared, known_of, remembering
from tl_sparsify.core.metrics import risk_and_right
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Units
from tl_sparsify.folding.bridge import FOLDED, save_folded
from tl_sparsify.folding.fold import fold, why_not
from tl_sparsify.folding.sizes import sizes_by_layer
from tl_sparsify.masking.sharpening import sharpen
from tl_sparsify.plan import TEMPERATURE, Effort, Request, cut, seconds
from tl_sparsify.presentation import plot, printed
from tl_sparsify.presentation.results import RUN_ENTRIES
from tl_sparsify.presentation.sealed import sealed
from tl_sparsify.search import constants, score
from tl_sparsify.search.checkpoint import STATE
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.settings import Probing, Refitting
from tl_sparsify.tasks.accuracy import ENOUGH, Accuracy, accuracy
from tl_sparsify.tasks.beginning import Beginning
from tl_sparsify.tasks.task import Task

Splits = tuple[Examples, Examples, Examples]


@dataclass(frozen=True, eq=False)
class Setting:
    """What every part of a run has to know.

    Attributes:
        task, model: what is studied.
        splits: train, validation and test examples.
        request, effort: what is asked for, and how much work.
        folder: where files are written.
        checkpoint: where the search is, round by round.
        console: where tables are printed.
        shows: whether there are tables and progress.
    """

    task: Task
    model: Any
    splits: Splits
    request: Request
    effort: Effort
    folder: Path
    checkpoint: Path
    console: Console
    shows: bool

    @property
    def shared(self) -> dict[str, Any]:
        """What every function that runs the model takes."""
        return {"seed": self.request.seed, "batch_size": self.effort.batch_size}

    def csv(self, frame: pd.DataFrame, name: str) -> None:
        """Write a table."""
        write_text(self.folder / name, frame.to_csv(index=False))


def carry_out(
    beginning: Beginning, request: Request, folder: Path, checkpoint: Path, console: Console, about: dict[str, Any]
) -> None:
    """Do all of it, and write the files to ``folder``.

    Args:
        checkpoint: a folder from which an interrupted search goes on.
        about: what else is to stand in ``run.json``.
    """
    task, model = beginning.task, beginning.model
    effort = request.effort_for(model)
    splits = cut(task.examples(request.seed), effort)
    here = Setting(task, model, splits, request, effort, folder, checkpoint, console, not console.quiet)
    train, validation, _ = splits
    units = request.units(model)
    console.print(f"[bold]{escape(task.name)}[/]: {escape(task.description)}")
    console.print(escape(f"{units!r}, {train!r} to search"))
    right = _judged(here, beginning, units)

    pairs, alignment = _alignment(here)
    with step("scoring units", here.shows):
        batching = {"batch_size": effort.batch_size}
        values = (
            constants.zero(model, train, units)
            if task.ablation == "zero"
            else constants.mean(model, train, units, **batching)
        )
        probing: dict[str, Any] = {"probes": effort.probes, "temperature": TEMPERATURE}
        scores = score.risk(model, train, units, values=values, **probing, **here.shared)
    here.csv(scores.to_frame().sort_values("score", ascending=False, kind="stable"), "scores.csv")
    of_nothing = constants.reduced(model, Circuit.empty(units), values)
    unfoldable = why_not(model, replace(of_nothing, first_token=request.rule))
    if unfoldable is not None:
        console.print(escape(f"there will be no smaller model: {unfoldable}"))
    path = _searched(here, values)
    here.csv(path.to_frame(), "path.csv")
    console.print(printed.table(f"Path: risk in nats on {len(validation)} validation examples", path.to_frame()))

    fitting: dict[str, Any] = {} if effort.steps is None else {"steps": effort.steps}
    fitting |= {"per_step": effort.refit_batch, "progress": here.shows} | here.shared
    reduction = constants.refit(model, path.at(request.keep), train, validation, **fitting)
    reduction.save(folder / "circuit.reduction")
    small = fold(model, reduction) if unfoldable is None else None
    if small is not None:
        save_folded(small, folder / "folded")
    found = _evaluated(here, reduction, small)
    if request.comparing:
        _compared(here, reduction, values, found)
    level = None
    if alignment is not None:
        with step("verifying the algorithm", here.shows):
            evidence = verify(model, task.causal_model, alignment, pairs, reduced=small or reduction, **here.shared)
        here.csv(evidence.to_frame(), "evidence.csv")
        level = evidence.level
        for part in printed.evidence(evidence):
            console.print(part)

    plot.save(plot.risk_curve(path), folder / "risk.png")
    plot.save(plot.unit_map(reduction, scores), folder / "map.png")
    plot.save(plot.causal_graph(task.causal_model), folder / "causal.png")
    about = {"score": {"name": scores.name, "measured_in": scores.measured_in, "temperature": TEMPERATURE}} | about
    about = _about(here, about, beginning, right, level, len(pairs), small is not None)
    if alignment is not None and not task.alignment.units:
        about |= {"alignment": {name: [unit.name for unit in chosen] for name, chosen in alignment.units.items()}}
    folded = () if small is None else (f"folded/{FOLDED}",)
    about = sealed(json.loads(json.dumps(about)), folder, (*RUN_ENTRIES, *folded))
    write_text(folder / "run.json", json.dumps(about, indent=2) + "\n")


def _judged(here: Setting, beginning: Beginning, units: Units) -> Accuracy:
    """How well the model does the task, and how long the run will take, said before the search."""
    right = accuracy(here.model, here.splits[1], batch_size=here.effort.batch_size)
    if str(beginning):
        here.console.print(escape(str(beginning)))
    here.console.print(f"the model's accuracy on validation examples: {escape(str(right))}")
    if right.choices < ENOUGH:
        here.console.print(
            f"[yellow]warning[/]: below {ENOUGH}: the model hardly does this task, and a circuit of it explains little"
        )
    given = bool(here.task.alignment.units)
    aligns = here.request.aligning and not given
    variables = len(here.task.causal_model.variables) if given or aligns else 0
    parts = {"aligns": aligns, "compares": here.request.comparing, "sharpens": here.request.sharpens}
    takes = seconds(here.model, here.splits, units, here.effort, variables=variables, **parts)
    here.console.print(f"effort {here.request.effort}: about {duration(takes)}\n")
    return right


def _alignment(here: Setting) -> tuple[Pairs, Alignment | None]:
    """Pairs for verification, and which units carry the variables: as the task says, or looked for."""
    task, (pairs_, seed) = here.task, (here.effort.pairs, here.request.seed)
    if task.alignment.units or not here.request.aligning:
        return task.pairs(pairs_, seed), task.alignment if task.alignment.units else None
    both = task.pairs(2 * pairs_, seed)  # drawn at once: padded alike, so that positions are the same
    pairs_ = min(pairs_, len(both) // 2)  # a task may have fewer
    pairs, searching = both[:pairs_], both[pairs_:]
    with step("looking for the causal model's variables", here.shows):
        size = here.effort.batch_size
        return pairs, align(here.model, task.causal_model, searching, pairs, batch_size=size).alignment


def _searched(here: Setting, values: Values) -> CircuitPath:
    """The path of the search; of large units alone it is sharpened, and its constants are refitted afterwards only."""
    train, validation, _ = here.splits
    path = _gone_on_with(here, values)
    if not here.request.sharpens:
        return path
    given: dict[str, Any] = {"steps": here.effort.sharpening(len(train)), "per_step": here.effort.beside_batch}
    given |= {"exchanged": here.effort.exchanged, "held_out": validation, "progress": here.shows}
    return sharpen(here.model, path, train, **given, **here.shared)


def _gone_on_with(here: Setting, values: Values) -> CircuitPath:
    """The search from its last round, or from the start where it does not fit what is there now."""
    state = here.checkpoint / STATE
    if not state.is_file():
        return _in_rounds(here, values)
    here.console.print("going on with the search that was interrupted")
    try:
        return _in_rounds(here, values)
    except ValueError as error:
        if str(state) not in str(error):
            raise
    here.console.print("it is damaged, or of another task, model or versions than are here now: it starts afresh")
    on_main(lambda: remove(here.checkpoint), "removing a search that does not fit")
    return _in_rounds(here, values)


def _inner(here: Setting) -> int | None:
    """Steps of the refit in each round of the search; the package's own where ``None``."""
    return 0 if here.request.sharpens else here.effort.inner


def _in_rounds(here: Setting, values: Values) -> CircuitPath:
    train, validation, _ = here.splits
    return sparsify(
        here.model,
        train,
        values.units,
        rounds=here.effort.rounds,
        probing=Probing(here.effort.probes, TEMPERATURE, here.effort.per_round),
        refitting=Refitting(_inner(here), here.effort.refit_batch),
        smallest=min(here.request.keep, 0.01),
        values=values,
        held_out=validation,
        first_token=here.request.rule,
        checkpoint=here.checkpoint,
        progress=here.shows,
        **here.shared,
    )


def _evaluated(here: Setting, reduction: Reduction, small: Any) -> Evaluation:
    test, console = here.splits[2], here.console
    with step("evaluating the circuit", here.shows):
        found = evaluate(here.model, reduction, test, **here.shared)
        difference = {} if small is None else {"folded_difference": _difference(here, reduction, small)}
    here.csv(pd.DataFrame([found.to_dict() | difference]), "evaluation.csv")
    if small is not None:
        sizes = sizes_by_layer(here.model, small)
        here.csv(sizes, "fold.csv")
        console.print(printed.table(f"Fold: {reduction.circuit!r}", printed.before_and_after(sizes)))
    folded = "these units do not fold: there is no smaller model\n"
    for worst in difference.values():
        folded = f"folded against ablated: max |logit difference| {worst:.1e}\n"
    console.print(
        f"on {len(test)} test examples: accuracy {found.accuracy:.3f} (original {found.original_accuracy:.3f}), risk "
        f"{found.risk!r}, faithfulness {found.faithfulness:.3f}, completeness {found.completeness:.3f}\n{folded}"
    )
    return found


def _difference(here: Setting, reduction: Reduction, small: Any) -> float:
    worst, examples = 0.0, here.splits[2]
    size = min(1024, batch_size_for(here.model, examples, here.effort.batch_size))
    with torch.no_grad():
        for _, batch in examples.batches(size):
            with intervened(here.model, ablate(reduction)):
                ablated = answer_logits(here.model, batch)
            worst = max(worst, float((answer_logits(small, batch) - ablated).abs().max()))
    return worst


def _compared(here: Setting, reduction: Reduction, values: Values, found: Evaluation) -> None:
    """Circuits of the same size in other orders, beside the one found."""
    with step("comparing with other orders", here.shows):
        rows = beside(here, reduction.circuit, values)
    last = {"method": "found circuit, as saved", "found": True, "as_saved": True, "replacements": reduction.kind}
    last |= {"refitted": True, "kept": found.kept, "risk": found.risk.mean, "risk_stderr": found.risk.stderr}
    last |= {"accuracy": found.accuracy}
    frame = pd.DataFrame([*rows, last])
    here.csv(frame, "baselines.csv")
    shown = frame.drop(columns=["found", "as_saved", "refitted", "kept"])  # fits into a terminal of 80 columns
    here.console.print(printed.table(f"Circuits of {found.kept:,} units: risk in nats on test examples", shown))


def beside(here: Setting, found: Circuit, values: Values) -> list[dict[str, Any]]:
    """One row for each order and kind of constants: the same ones for all, and the same refit of them to its end."""
    (train, validation, test), model, shared = here.splits, here.model, here.shared
    orders = {
        "random": baselines.random(model, train, found.units, seed=here.request.seed),
        "activation variance": score.variance(model, train, found.units, **shared),
        "gradient attribution": score.gradient(model, train, found.units, values=values, **shared).absolute,
    }
    circuits = {name: scores.top(found.fraction) for name, scores in orders.items()} | {"found circuit": found}
    size = here.effort.batch_size
    known, recall = known_of(model, train, found.units, clean=True, many=True, batch_size=size), remembering()
    rows: list[dict[str, Any]] = []
    for name, circuit in circuits.items():
        plain = constants.reduced(model, circuit, values, here.task.ablation)
        plain = replace(plain, first_token=here.request.rule)
        fitting: dict[str, Any] = {"patience": here.effort.patience, "most": here.effort.most}
        fitting |= {"per_step": here.effort.beside_batch, "known": known, **shared}
        again = refit_until_converged(model, plain, train, validation, **fitting)
        for reduction in (plain, again):
            moments = compared(model, reduction, test, risk_and_right, batch_size=size, recall=recall)
            (mean, right), (error, _) = moments.mean.tolist(), moments.stderr.tolist()
            row = {"method": name, "found": circuit is found, "as_saved": False, "replacements": reduction.kind}
            row |= {"refitted": reduction is again, "kept": len(circuit)}
            rows.append(row | {"risk": mean, "risk_stderr": error, "accuracy": right})
    return rows


def _about(
    here: Setting,
    given: dict[str, Any],
    beginning: Beginning,
    right: Accuracy,
    level: float | None,
    pairs: int,
    folded: bool,
) -> dict[str, Any]:
    """What ``run.json`` says."""
    task, request, effort = here.task, here.request, here.effort
    examples = {name: len(part) for name, part in zip(("train", "validation", "test"), here.splits, strict=True)}
    about: dict[str, Any] = {
        "task": task.name,
        "description": task.description,
        "ablation": task.ablation,
        "chance": task.chance,
        "units": request.chosen,
        "keep": request.keep,
        "first_token": request.first_token,
        "effort": request.effort,
        "rounds": effort.rounds,
        "refitted_in_rounds": _inner(here) != 0,
        "seed": request.seed,
        "examples": examples | {"pairs": pairs},
        "model_accuracy": asdict(right),
    }
    if beginning.prepend_bos is not None:
        about |= {"prepend_bos": beginning.prepend_bos}
    if request.comparing:
        about |= {
            "baseline_refit": {"patience": effort.patience, "most": effort.most, "batch_size": effort.beside_batch}
        }
    if level is not None:
        about |= {"evidence_level": level}
    left_out = {"fold.csv": not folded, "baselines.csv": not request.comparing, "evidence.csv": level is None}
    if any(left_out.values()):
        about |= {"left_out": [name for name, out in left_out.items() if out]}
    return about | {"versions": versions()} | given
