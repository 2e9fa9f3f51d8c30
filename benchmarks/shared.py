"""What the benchmark scripts share: where results lie, options, numbers in tables, and going on where one stopped."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.cost import counted

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WOVEN, CONTINUED = 6, 4
"""About how many circuits are measured for each size of a path that is sharpened, beside its exchanges (eight at most);
and for one of a path that is gone on with below its last circuit (six at most)."""
LEAST = 1e-6
"""In nats; lower risks are told apart by rounding only."""
Page = Callable[[pd.DataFrame], str]


def parser(doc: str | None, *, seeds: int | None = None, tasks: bool = False) -> argparse.ArgumentParser:
    """The options of a script: ``--seeds`` where it has a default, ``--task NAME ...`` where tasks are done in turn."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if tasks:
        made.add_argument("--task", nargs="*", default=None, help="again; all that are not done where not given")
    if seeds is not None:
        made.add_argument("--seeds", type=int, default=seeds)
    return made


def check_methods(options: argparse.ArgumentParser, names: Iterable[str], every: Collection[str]) -> None:
    """End the script where there is no method of a name."""
    for name in names:
        if name not in every:
            options.error(f"--methods: there is no {name!r}; choose from {', '.join(map(repr, every))}")


def in_processes(
    doc: str | None, script: str, names: Sequence[str], measured: Callable[..., Mapping[str, float]]
) -> pd.DataFrame | None:
    """Measure each step in a process of its own, ``measured(name, repeats, prompts, pos)``. Such a process prints what
    it measured, and ``None`` is returned there."""
    options = parser(doc)
    for name, default in (("repeats", 3), ("prompts", 32), ("pos", 20)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--step", help="measure one step only, here, and print it as json")
    arguments = options.parse_args()
    shape = {"repeats": arguments.repeats, "prompts": arguments.prompts, "pos": arguments.pos}
    if arguments.step:
        print(json.dumps(measured(arguments.step, *shape.values())))
        return None
    rows = []
    for name in names:
        command = [sys.executable, script, *(f"--{key}={value}" for key, value in shape.items()), "--step", name]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"step": name} | json.loads(found.splitlines()[-1]))
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def search_passes(rounds: int, probes: int, examples: int) -> int:
    """Backward passes, of one example each, of a joint search, at most: in all rounds that see so many examples, and in
    those that may be made again."""
    return (rounds + rounds // 2) * (probes + 1) * examples


def steps_left(
    budget: int,
    spent: Mapping[str, int],
    *,
    train: int,
    held_out: int,
    rounds: int,
    exchanged: int,
    per_step: int,
    paired: bool,
    woven: int = WOVEN,
) -> int:
    """How many steps of masks a search leaves that has ``spent`` its passes, each over one example.

    With it they take about as many backward passes as the ``budget`` and three times as many passes in all (four times
    where values are ``paired``), or fewer: each table has what was taken. ``train`` and ``held_out`` are numbers of
    examples; ``woven`` circuits of so many ``rounds`` are measured, and offered exchanges twice.
    """
    offers = 2 if exchanged else 0
    measuring = woven + offers * (exchanged**2 + 5) + 3 * paired
    left = (3 + paired) * budget - spent["forward"] - spent["backward"] - train - rounds * held_out * measuring
    return max(2, min(budget - spent["backward"] - offers * rounds * held_out, left // (2 + paired)) // per_step)


def sharpened(
    model: Any,
    train: tls.Examples,
    units: tls.Units,
    *,
    values: tls.Values,
    seed: int,
    sizes: Sequence[float],
    probing: tls.Probing,
    budget: int,
    per_step: int,
    exchanged: int,
    held_out: tls.Examples,
    exchanges: int | None = None,
    searched: Sequence[float] | None = None,
    relative: bool = False,
    first_token: Any = "bos",
    batch_size: int | None = None,
) -> tls.CircuitPath:
    """A search of one round for each size, and in what it leaves of the ``budget`` (passes of one example each) masks;
    where it is ``searched`` at other sizes, one mask inside of its last circuit."""
    quiet: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": False}
    with counted(model) as passes:
        searching: dict[str, Any] = {"sizes": searched or sizes, "exchanges": exchanges, "first_token": first_token}
        found = tls.sparsify(model, train, units, values=values, probing=probing, **searching, **quiet)
    given: dict[str, Any] = {"per_step": min(per_step, len(train)), "exchanged": exchanged}
    lengths = {"train": len(train), "held_out": len(held_out), "rounds": len(sizes)}
    woven = CONTINUED if searched else WOVEN
    steps = steps_left(budget, passes, woven=woven, paired=values.paired, **lengths, **given)
    given |= {"sizes": sizes, "relative": relative}
    return tls.sharpen(model, found, train, steps=steps, held_out=held_out, **given, **quiet)


def trained_mask(
    model: Any,
    train: tls.Examples,
    units: tls.Units,
    *,
    values: tls.Values,
    seed: int,
    examples: int,
    per_step: int,
    **settings: Any,
) -> tls.Scores:
    """A mask that sees so many examples."""
    many = min(per_step, len(train))
    given: dict[str, Any] = {"steps": math.ceil(examples / many), "per_step": many, "seed": seed, "progress": False}
    return tls.baselines.top_k_gate(model, train, units, values=values, **given, **settings)


def circuit_of(found: tls.CircuitPath | tls.Scores | Mapping[float, tls.Reduction], size: float) -> tls.Circuit:
    """What a method found at a size: in a path, by scores, or for this size by itself."""
    if isinstance(found, Mapping):
        return found[size].circuit
    return found.at(size).circuit if isinstance(found, tls.CircuitPath) else found.top(size)


def nats(risk: float) -> str:
    """A risk in two digits; ``< 1e-6`` where it says no more."""
    return "< 1e-6" if 0 <= risk <= LEAST else f"{risk:.2g}"


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def marked(
    values: Sequence[float], text: Callable[[float], str] = nats, best: Callable[[Iterable[float]], float] = min
) -> list[str]:
    """The values as text, a dash for NaN; bold what looks like the best one."""
    shown = ["-" if math.isnan(value) else text(value) for value in values]
    known = [value for value in values if not math.isnan(value)]
    top = text(best(known)) if known else ""
    return [f"**{cell}**" if cell == top else cell for cell in shown]


def write(stem: str, frame: pd.DataFrame, pages: Mapping[str, Page], *, show: bool = True) -> None:
    """Write a table as ``stem.csv``, and each page made of it as Markdown, which is printed too."""
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{stem}.csv", frame.to_csv(index=False))
    for name, page in pages.items():
        write_text(RESULTS / f"{name}.md", page(frame))
        if show:
            print(page(frame), flush=True)


def by_task(
    tables: Mapping[str, Mapping[str, Page]],
    wanted: Sequence[str] | None,
    rows: Callable[[str], Mapping[str, pd.DataFrame]],
    *,
    in_order: bool = False,
    **reading: Any,
) -> dict[str, pd.DataFrame]:
    """Do one task after the other, and write all tables after each, so that an interrupted run goes on.

    Args:
        tables: for each table, by the stem of its file, its pages.
        wanted: tasks to do, again where they were done; all that lack in a table where not given.
        rows: what a task adds to each table.
        in_order: whether the rows are sorted by task.
        reading: options of ``pandas.read_csv``.
    """
    files = {stem: RESULTS / f"{stem}.csv" for stem in tables}
    done = {
        stem: pd.read_csv(file, **reading) if file.is_file() else pd.DataFrame({"task": []})
        for stem, file in files.items()
    }
    known = set.intersection(*(set(frame.task) for frame in done.values()))
    for name in wanted or [name for name in tls.list_tasks() if name not in known]:
        for stem, new in rows(name).items():
            whole = pd.concat([done[stem].loc[done[stem].task != name], new], ignore_index=True)
            done[stem] = whole.sort_values("task", kind="stable") if in_order else whole
            write(stem, done[stem], tables[stem], show=False)
        print(name, flush=True)
    return done
