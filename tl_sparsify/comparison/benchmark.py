"""Benchmark: methods side by side on the same units, examples and measures.

A cell is one method on one task with one seed. Every setting of the method orders the units on the training examples;
the setting whose circuits have the least risk on validation is judged on test: under zero, mean and counterfactual
ablation, with constants that are refitted alike for every method until they have converged, on request with affine maps
fitted alike, and as the method itself leaves it, so that selection and replacements are judged apart.
Finished cells are files, so an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.files import versions, write_bytes, write_text
from tl_sparsify._internal.processes import end_with_parent
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.comparison import cells
from tl_sparsify.comparison.cells import cell_file
from tl_sparsify.comparison.convergence import refit_until_converged
from tl_sparsify.comparison.cost import Cost, cost_of
from tl_sparsify.comparison.curves import SIZES, Curve
from tl_sparsify.comparison.evaluate import auroc, average_precision, evaluate
from tl_sparsify.comparison.methods import METHODS, Method, Scorer, named, run
from tl_sparsify.comparison.tables import markdown
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model, Units, heads, neurons
from tl_sparsify.search import constants
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores, kept_count
from tl_sparsify.tasks.task import Task, load_task

_LEAST = 1e-6  # nats: lower risks do not decide between settings
_PER_STEP = 128  # examples in a step of the refit


@dataclass(frozen=True)
class Comparison:
    """What the cells of a comparison have in common.

    Attributes:
        sizes: fractions of units at which circuits are judged.
        refit_patience: of the refit that every circuit gets.
        maps: whether every circuit is also judged with affine maps.
        examples: the most training and the most validation examples that are used.
        bootstrap: replicates for intervals over test examples.
    """

    sizes: tuple[float, ...] = (0.2, 0.1, 0.05, 0.03)
    refit_patience: int = 300
    maps: bool = False
    examples: int = 512
    bootstrap: int = 1000
    versions: dict[str, str] = field(default_factory=versions)


@dataclass(frozen=True)
class _Data:
    """A task as every method of a comparison sees it."""

    task: Task
    model: Model
    units: Units
    train: Examples
    validation: Examples
    test: Examples
    values: Values
    seed: int


@checked
def compare(
    model: Model,
    task: Task,
    methods: Sequence[Method | Scorer] = METHODS,
    *,
    units: Units | None = None,
    sizes: Sequence[float] = (0.2, 0.1, 0.05, 0.03),
    seeds: int | Sequence[int] = 3,
    refit_patience: int = 300,
    maps: bool = False,
    examples: int = 512,
    bootstrap: int = 1000,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every method with every seed and judge its circuits alike.

    Args:
        methods: of :data:`methods.METHODS`, or functions ``(model, examples, units, *, seed, ...)`` of your own.
        units: heads and neurons where not given.
        sizes: fractions of units at which circuits are judged; the areas CPR and CMD are over :data:`curves.SIZES`.
        seeds: how many, or which: of the data split and of everything random.
        refit_patience: of :func:`refit_until_converged`, in steps of 128 examples, from the same constants for every
            method's circuits; 0: no refit.
        maps: judge every circuit also with affine maps of its kept neighbours (:func:`constants.neighbours`), refitted
            alike, so that an order which was found with maps is told apart from the maps.
        examples: use at most so many training and validation examples, drawn at random; test examples are all used.
        bootstrap: replicates for the intervals; 0: none.
        out: a folder for finished cells; those that it already has are not run again, but for those that are damaged.

    Returns:
        A row for each task, method, seed, ablation and size: ``task, method, ours, setting, seed, own_ablation,
        ablation, size, kept, fraction``; ``risk`` (nats), ``accuracy`` and ``faithfulness``, each with ``_low`` and
        ``_high``; ``cpr, cmd``; ``auroc, average_precision`` for the true units where they are known and all among
        ``units`` (those whose removal matters, else those whose weights do work); the cost of the chosen setting
        (``forward, backward`` passes, ``seconds``, ``peak_mb``) and of all that were tried (``settings, all_forward,
        all_backward``). Sizes that keep equally many units have equal rows.
        A method that refuses the units or the model has one row, without numbers, whose ``setting`` says why.
        ``ablation`` is ``zero``, ``mean``, ``counterfactual``, ``refitted`` (from ``own_ablation``, which the task
        calls for, until it has converged), ``maps``, or ``as found`` (where a search fits replacements itself: those).

    Raises:
        ValueError: no methods, sizes or seeds, two of one name, cells in ``out`` that were made with other settings,
            of another model or of other units, methods whose names make one file there, and what :func:`evaluate`
            raises.

    Example:
        >>> table = tls.compare(
        ...     model, task, [tls.baselines.random], units=units, sizes=(0.5,), seeds=1, refit_patience=1, examples=32,
        ...     bootstrap=10, progress=False,
        ... )
        >>> table["method"].unique().tolist()
        ['random']
    """
    chosen = [Method.of(method) for method in methods]
    names = [method.name for method in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods is {names}; give at least one, each once (Method(name, ...) names one)")
    check_count("refit_patience", refit_patience, least=0, most=10**5)
    check_count("examples", examples)
    if not sizes:
        raise ValueError("sizes is empty; give at least one fraction of units, such as (0.2, 0.1)")
    shared = Comparison(tuple(sizes), refit_patience, maps, examples, bootstrap)
    units = heads(model) + neurons(model) if units is None else units
    folder = None if out is None else Path(out)
    if folder is not None:
        cells.check_names(names)
        cells.prepare(folder, asdict(shared))
        cells.check_made_of(folder, task.name, model, units)
    numbers = list(range(int(seeds))) if isinstance(seeds, int | np.integer) else list(seeds)
    if not numbers:
        raise ValueError(f"seeds is {seeds}; at least one is needed: how many, or which")
    found: list[pd.DataFrame] = []
    for seed in numbers:
        data: _Data | None = None
        for method in bar(chosen, f"{task.name}, seed {seed}", progress):
            key = {"task": task.name, "method": method.name, "seed": seed}  # what a cell is of, as its file says
            file = None if folder is None else cell_file(folder, task.name, method.name, seed)
            kept = None if file is None else cells.read(file, key)
            if kept is not None:
                found.append(kept)
                continue
            data = _data(model, task, units, seed, examples) if data is None else data
            frame = _cell(data, method, shared)
            found.append(frame if file is None else cells.write(file, key, frame))
    return pd.concat(found, ignore_index=True)


@checked
def write_comparison(table: pd.DataFrame, folder: str | Path) -> tuple[Path, ...]:
    """Write a table as ``table.csv``, ``table.parquet`` and, a part for each task, ``table.md``; returns the files."""
    folder = Path(folder)
    parts = [f"## {task}\n\n{markdown(table, task)}" for task in dict.fromkeys(table["task"])]
    write_text(folder / "table.csv", table.to_csv(index=False))
    write_bytes(folder / "table.parquet", table.to_parquet(index=False))
    write_text(folder / "table.md", "\n".join(parts))
    return folder / "table.csv", folder / "table.parquet", folder / "table.md"


@checked
def compare_tasks(
    tasks: Sequence[str],
    methods: Sequence[str] = (),
    *,
    seeds: int = 3,
    out: str | Path,
    workers: int = 2,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """:func:`compare` for several tasks by name, in processes of one thread each: a task and a seed at a time.

    ``methods`` are names of :data:`methods.METHODS` (all where none is given), ``settings`` those of :func:`compare`.
    The numbers do not depend on ``workers``. Returns all finished cells of ``out``.

    Raises:
        ValueError: an unknown task or method, fewer than one worker or seed, and what :func:`compare` raises.
    """
    if workers < 1 or seeds < 1:
        raise ValueError(f"workers is {workers} and seeds {seeds}; at least one of each is needed")
    named(methods)
    for task in tasks:
        load_task(task)
    groups = [(task, list(methods), seed, str(out), settings) for seed in range(seeds) for task in tasks]
    before = {process.pid for process in multiprocessing.active_children()}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        futures = [pool.submit(_group, *group) for group in groups]
        try:
            for future in bar(futures, "tasks and seeds", progress):
                future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                if process.pid not in before:
                    process.terminate()  # a cell takes minutes, and what is half done is of no use
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return gathered(out)


def _group(task: str, methods: list[str], seed: int, out: str, settings: dict[str, Any]) -> None:
    """The cells of one task and seed, in a process of its own."""
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    loaded = load_task(task)
    compare(loaded.model(), loaded, named(methods), seeds=[seed], out=out, progress=False, **settings)


@checked
def gathered(folder: str | Path) -> pd.DataFrame:
    """All finished cells of a folder as one table.

    Raises:
        FileNotFoundError: none is there.
        ValueError: a cell that is damaged, or has no checksum, as those of older versions.
    """
    files = sorted((Path(folder) / "cells").glob("*/[!.]*.csv"))
    if not files:
        raise FileNotFoundError(f"no finished cells in {folder}: run `tl-sparsify bench --out {folder}`")
    table = pd.concat([cells.checked_cell(file) for file in files], ignore_index=True)
    places = {method.name: place for place, method in enumerate(METHODS)}
    rank = table.method.map(places).fillna(len(places))
    return table.assign(rank=rank).sort_values(["task", "rank", "method", "seed"], kind="stable").drop(columns="rank")


def _data(model: Model, task: Task, units: Units, seed: int, most: int) -> _Data:
    train, validation, test = task.examples(seed)
    train, validation = train.sample(most, seed=seed), validation.sample(most, seed=seed)
    values = (constants.zero if task.ablation == "zero" else constants.mean)(model, train, units)
    return _Data(task, model, units, train, validation, test, values, seed)


def _cell(data: _Data, method: Method, shared: Comparison) -> pd.DataFrame:
    """One method on one task with one seed: choose its setting, judge its circuits."""
    given: dict[str, Any] = {"values": data.values, "held_out": data.validation, "progress": False}
    tried: list[tuple[float, str, Scores | CircuitPath, Cost]] = []
    costs, refusals = list[Cost](), list[str]()
    key = {"task": data.task.name, "method": method.name, "ours": method.ours, "setting": "", "seed": data.seed}
    key |= {"own_ablation": data.task.ablation}
    for name, scorer in method.settings.items():
        call = partial(run, scorer, data.model, data.train, data.units, data.seed, **given)
        try:
            result, cost = cost_of(data.model, len(data.train), call)
        except ValueError as error:
            if not method.refuses:
                raise
            refusals.append(str(error))
            continue
        costs.append(cost)
        candidates: dict[str, Scores | CircuitPath] = {name: result}
        if method.signed and isinstance(result, Scores):
            candidates = {f"{name}, signed": result, f"{name}, by size": result.absolute}
        alone = len(method.settings) == len(candidates) == 1
        tried += [(0.0 if alone else _worth(data, one, shared), label, one, cost) for label, one in candidates.items()]
    if not tried:
        return cells.refused(key, refusals[0])
    _, key["setting"], found, cost = min(tried, key=lambda one: one[0])
    key |= {"ablation": "", "size": float("nan")}
    spent = asdict(cost) | {"settings": len(tried)}
    spent |= {"all_forward": sum(one.forward for one in costs), "all_backward": sum(one.backward for one in costs)}
    truth = _truth(data, found)
    return pd.DataFrame([key | row | truth | spent for row in _judged(data, found, shared)])


def _worth(data: _Data, found: Scores | CircuitPath, shared: Comparison) -> float:
    """The mean logarithm of the risk on validation over the sizes, under the task's own ablation."""
    risks = _curve(data, found, data.task.ablation, data.validation, shared.sizes, 0).risk
    return sum(math.log(max(risk, _LEAST)) for risk in risks) / len(risks)


def _curve(
    data: _Data, found: Scores | CircuitPath, kind: str, examples: Examples, sizes: Sequence[float], bootstrap: int
) -> Curve:
    given: dict[str, Any] = {"ablation": kind, "sizes": sizes, "bootstrap": bootstrap, "seed": data.seed}
    if kind == "mean":
        given["values"] = data.values if data.task.ablation == "mean" else _means(data)
    return evaluate(data.model, found, examples, **given)


def _means(data: _Data) -> Values:
    return constants.mean(data.model, data.train, data.units)


def _judged(data: _Data, found: Scores | CircuitPath, shared: Comparison) -> list[dict[str, Any]]:
    """A row for each ablation and size, on test examples, with the sizes asked for."""
    rows: list[dict[str, Any]] = []
    for kind in ("zero", "mean", "counterfactual"):
        areas = _curve(data, found, kind, data.test, SIZES, shared.bootstrap)
        others = [size for size in shared.sizes if size not in SIZES]
        frames = [areas.to_frame().assign(cpr=areas.cpr, cmd=areas.cmd)]
        if others:
            more = _curve(data, found, kind, data.test, others, shared.bootstrap).to_frame()
            frames.append(more.assign(cpr=areas.cpr, cmd=areas.cmd))
        for row in pd.concat(frames).drop_duplicates("kept").to_dict("records"):
            rows.append({str(name): value for name, value in row.items()} | {"ablation": kind})
    same: dict[int, list[float]] = {}  # of few units several sizes keep as many: one circuit, measured once
    for size in dict.fromkeys(shared.sizes):
        same.setdefault(kept_count(len(data.units), size), []).append(size)
    for size, *_ in same.values():
        circuit = found.at(size).circuit if isinstance(found, CircuitPath) else found.top(size)
        own = _own(found, size)
        if own is not None:
            rows.append(_measured(data, own, shared) | {"ablation": "as found"})
        if not shared.refit_patience:
            continue
        plain = constants.reduced(data.model, circuit, data.values, data.task.ablation)
        rows.append(_refitted(data, plain, shared) | {"ablation": "refitted"})
        if shared.maps:
            mapped = constants.neighbours(data.model, plain, data.train, seed=data.seed)
            rows.append(_refitted(data, mapped, shared) | {"ablation": "maps"})
    for size in sorted(SIZES):  # of those that only the areas ask for the smallest
        same.setdefault(kept_count(len(data.units), size), [size])
    return [row | {"size": size} for row in rows for size in same.get(row["kept"], [row["fraction"]])]


def _refitted(data: _Data, reduction: Reduction, shared: Comparison) -> dict[str, Any]:
    """A circuit with its replacements refitted, as for every method."""
    settings: dict[str, Any] = {"patience": shared.refit_patience, "per_step": _PER_STEP, "seed": data.seed}
    return _measured(
        data, refit_until_converged(data.model, reduction, data.train, data.validation, **settings), shared
    )


def _measured(data: _Data, reduction: Reduction, shared: Comparison) -> dict[str, Any]:
    outcome = evaluate(data.model, reduction, data.test, bootstrap=shared.bootstrap, seed=data.seed)
    row: dict[str, Any] = {"kept": outcome.kept, "fraction": outcome.fraction}
    for name, (low, high) in outcome.intervals.items():
        value = getattr(outcome, name)
        row |= {name: float(getattr(value, "mean", value)), f"{name}_low": low, f"{name}_high": high}
    return row | {"interchange_agreement": outcome.interchange_agreement}


def _own(found: Scores | CircuitPath, size: float) -> Reduction | None:
    """A circuit with the replacements that its search fitted, where it did."""
    if not isinstance(found, CircuitPath):
        return None
    reduction = found.at(size)
    rounds = [step.reduction for step in found.rounds if step.reduction.circuit == reduction.circuit]
    own = rounds[0] if rounds else reduction
    return own if own.refitted else None


def _truth(data: _Data, found: Scores | CircuitPath) -> dict[str, float]:
    """How well the order finds the units that are known to matter; NaN where none are known, or not all are units."""
    names = data.task.truth.get("removal", data.task.truth.get("weights"))
    if names is None or not set(names) <= set(data.units.names):
        return {"auroc": float("nan"), "average_precision": float("nan")}
    truth = Circuit.of(data.units, list(names))
    return {"auroc": auroc(found.scores, truth), "average_precision": average_precision(found.scores, truth)}
