"""Stress tests of circuits whose truth is known, or of a circuit in a file.

On each planted task the circuit of all true units, and circuits that are wrong in a known way: too small, with an idle
unit added, or random. Each goes through ``tls.stress``; the claims that should hold of the true ones, and fail of the
others, can be read from the table. Writes ``benchmarks/results/stress.csv`` and ``stress.md``.

    python benchmarks/stress.py
    python benchmarks/stress.py --task ioi --model smollm2 --circuit my.reduction --name ioi
    python benchmarks/stress.py --task ioi --model smollm2 --keep 0.3 --examples 48 --draws 5 --name smollm2 \
        --others subject_verb_agreement gendered_pronoun
    python benchmarks/stress.py --mechanisms

The second form tests a saved reduction, on the test split of the task made for that model, with alternatives and masks
chosen on its training split, and writes ``stress_NAME.csv`` and ``stress_NAME.md``; the third finds the circuit first,
heads and whole MLPs by ``sparsify`` on training examples. Both go on, test by test, from what is in the csv. The last
one writes ``stress_mechanisms.csv`` and ``.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
from shared import RESULTS, ROOT, write
from sklearn.metrics import adjusted_rand_score

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.stressing.measuring import alike

EXAMPLES = 256
ROWS = ("worst case", "alternatives", "minimality", "hypotheses", "specificity")  # mechanisms are below
BACKUP = {
    "the head that copies": ["L0H1"],
    "its silent backup": ["L1H2"],
    "both": ["L0H1", "L1H2"],
    "an idle head": ["L0H0"],
}
EQUALITY = ["L0H1", "L0H2", "L1H0", "L1H3", "L1N3", "L1N18", "L1N26"]
SUM = ["L0H0", "L0H2", "L1N1", "L1N5", "L1N9", "L1N13", "L1N17", "L1N21", "L1N25", "L1N29"]
CIRCUITS: dict[str, dict[str, list[str]]] = {
    "planted_backup": BACKUP,
    "planted_equality": {
        "the true units": EQUALITY,
        "and an idle head": [*EQUALITY, "L0H0"],
        "a true head missing": [name for name in EQUALITY if name != "L0H2"],
        "random": [],
    },
    "planted_sum": {
        "the true units": SUM,
        "four of them missing": [name for name in SUM if name not in ("L0H0", "L1N5", "L1N21", "L1N25")],
    },
}


def planted(task_name: str) -> pd.DataFrame:
    """The tables of one task's circuits."""
    task = tls.load_task(task_name)
    model = task.model()
    train, _, test = task.examples(0)
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.mean(model, train, units)
    found: list[pd.DataFrame] = []
    for name, kept in CIRCUITS[task_name].items():
        circuit = tls.Circuit.of(units, kept)
        if not kept:
            circuit = alike(tls.Circuit.of(units, EQUALITY), 1, 0)
        found.append(stressed(model, tls.constants.reduced(model, circuit, values), train, test, task_name, name))
    return pd.concat(found)


def mechanisms() -> pd.DataFrame:
    """How many mechanisms are found where there are four, and where there is one."""
    lines: list[pd.DataFrame] = []
    for name, kept, n in (("multi_task", 6, 512), ("planted_equality", EQUALITY, 128)):
        task = tls.load_task(name)
        model = task.model()
        train, _, test = task.examples(0)
        units = tls.heads(model) if isinstance(kept, int) else tls.heads(model) + tls.neurons(model)
        values = tls.constants.mean(model, train, units)
        if isinstance(kept, int):
            scores = tls.score.risk(model, train.sample(256), units, values=values, temperature=3.0)
            circuit = scores.top(kept / len(units))
        else:
            circuit = tls.Circuit.of(units, kept)
        reduction = tls.constants.reduced(model, circuit, values)
        some = test.sample(n)
        table = tls.stress(model, reduction, some, rows=("mechanisms",), train=train.sample(n), draws=5)
        found = table.details["mechanisms"]
        agreed = adjusted_rand_score(some.tokens[:, 0].numpy(), found.groups.numpy())
        lines.append(
            table.frame().assign(
                task=name,
                kept=len(circuit),
                groups=found.count,
                rand=agreed if name == "multi_task" else float("nan"),
                one=float(found.risks[0]),
                own=float(found.risks[found.count - 1]),
            )
        )
    return pd.concat(lines)


def groups_markdown(frame: pd.DataFrame) -> str:
    """One row a task."""
    heads = ["task", "units kept", "groups", "adjusted Rand index", "one circuit, nats", "a circuit for each group"]
    heads += ["gain", "gain of random groups", "verdict"]
    rows: list[list[str]] = []
    for line in frame.to_dict("records"):
        rand = f"{line['rand']:.3f}" if line["rand"] == line["rand"] else "-"
        numbers = [f"{line[name]:.2g}" for name in ("one", "own", "value", "control")]
        rows.append([line["task"], str(line["kept"]), str(line["groups"]), rand, *numbers, str(line["stand"])])
    return table_of(heads, rows)


def stressed(model: Any, reduction: tls.Reduction, train: Any, test: Any, task: str, name: str) -> pd.DataFrame:
    """The table of one circuit."""
    table = tls.stress(model, reduction, test[:EXAMPLES], rows=ROWS, train=train[:EXAMPLES])
    print(f"{task}, {name}\n{table.markdown()}", flush=True)
    risk = tls.risk(model, reduction, test[:EXAMPLES]).mean
    return table.frame().assign(task=task, circuit=name, risk=risk, kept=len(reduction.circuit))


def one_circuit(arguments: argparse.Namespace) -> None:
    """The table of a circuit in a file, or of one that is found here, test by test."""
    [name] = arguments.task
    task = _task(name, arguments.model)
    model = task.model()
    train, _, test = task.examples(0)
    train, test = train[: arguments.examples], test[: arguments.examples]
    path = arguments.circuit or ROOT / "results" / f"stress_{arguments.name}.reduction"
    if arguments.circuit is None and not path.exists():
        units = tls.heads(model) + tls.mlps(model)
        found = tls.sparsify(model, train, units, smallest=arguments.keep).at(arguments.keep)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    reduction = tls.Reduction.load(path)
    others = {other: _task(other, arguments.model).examples(0)[2][: arguments.examples] for other in arguments.others}
    risk = tls.risk(model, reduction, test).mean
    stem = f"stress_{arguments.name}"
    done = pd.read_csv(RESULTS / f"{stem}.csv") if (RESULTS / f"{stem}.csv").exists() else pd.DataFrame({"row": []})
    given: dict[str, Any] = {"train": train, "others": others, "draws": arguments.draws}
    for row in (*ROWS, "mechanisms"):
        if row in set(done.row):
            continue
        start = perf_counter()
        table = tls.stress(model, reduction, test, rows=(row,), **given)
        print(table.markdown(), flush=True)
        frame = table.frame().assign(seconds=perf_counter() - start, risk=risk, kept=len(reduction.circuit))
        done = pd.concat([done, frame]) if len(done) else frame
        write(stem, done, {stem: one_markdown}, show=False)


def one_markdown(frame: pd.DataFrame) -> str:
    """One row a test and case; what it took in the last columns."""
    heads = ("test", "case", "found", "control", "claim", "verdict", "forward + backward passes", "seconds")
    rows: list[list[str]] = []
    seen: set[str] = set()
    for line in frame.to_dict("records"):
        found = f"{line['value']:.2g} ({line['low']:.2g} to {line['high']:.2g})"
        control = f"{line['control']:.2g} ({line['control_low']:.2g} to {line['control_high']:.2g})"
        if line["p_value"] == line["p_value"]:
            found, control = f"p = {line['p_value']:.2g}", f"p = {line['control_p_value']:.2g}"
        passes = f"{line['forward']:.0f} + {line['backward']:.0f}"
        took = "" if line["row"] in seen else f"{line['seconds']:.0f}"
        seen.add(str(line["row"]))
        rows.append([line["row"], line["case"], found, control, line["claim"], line["stand"], passes, took])
    return table_of(list(heads), rows)


def _task(name: str, model: str | None) -> tls.Task:
    return tls.load_task(name) if model is None else tls.load_task(name, model=model)


def cell(line: dict[Any, Any]) -> str:
    """What was found, beside the control, and the verdict."""
    if line["p_value"] == line["p_value"]:
        return f"p = {line['p_value']:.2g} (control {line['control_p_value']:.2g}): {line['stand']}"
    return f"{line['value']:.2g} (control {line['control']:.2g}): {line['stand']}"


def markdown(frame: pd.DataFrame) -> str:
    """One row a test and case, one column a circuit; a table for each task."""
    parts: list[str] = []
    for task, part in frame.groupby("task", sort=False):
        names = list(dict.fromkeys(part.circuit))
        risks = [float(part[part.circuit == name].risk.iloc[0]) for name in names]
        kept = [int(part[part.circuit == name].kept.iloc[0]) for name in names]
        heads = [f"{name} ({n}; {risk:.2g} nats)" for name, n, risk in zip(names, kept, risks, strict=True)]
        rows: list[list[str]] = []
        tests = list(dict.fromkeys(part.row))
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for line in part.to_dict("records"):
            cells.setdefault((line["row"], line["case"]), {})[line["circuit"]] = cell(line)
        for row, case in sorted(cells, key=lambda key: tests.index(key[0])):
            by_name = cells[row, case]
            rows.append([str(row), str(case), *(by_name.get(name, "-") for name in names)])
        parts.append(f"`{task}`\n\n{table_of(['test', 'case', *heads], rows)}")
    return "\n".join(parts)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", nargs="*", default=list(CIRCUITS), help="planted ones where no --circuit is given")
    options.add_argument("--model", default=None, help="what the task's model is to be, where it can be another one")
    options.add_argument("--circuit", type=Path, default=None, help="a saved reduction")
    options.add_argument("--keep", type=float, default=None, help="find the circuit of this share of heads and MLPs")
    options.add_argument("--examples", type=int, default=EXAMPLES, help="of each split, of one circuit's table")
    options.add_argument("--draws", type=int, default=20, help="random circuits of a control, in one circuit's table")
    options.add_argument("--others", nargs="*", default=[], help="other tasks, for specificity")
    options.add_argument("--name", default="circuit", help="of the files that a saved reduction's table goes into")
    options.add_argument("--mechanisms", action="store_true", help="only how many mechanisms are found")
    arguments = options.parse_args()
    if arguments.mechanisms:
        write("stress_mechanisms", mechanisms(), {"stress_mechanisms": groups_markdown})
        return
    if arguments.circuit is None and arguments.keep is None:
        frame = pd.concat([planted(name) for name in arguments.task])
        write("stress", frame, {"stress": markdown})
        return
    one_circuit(arguments)


if __name__ == "__main__":
    main()
