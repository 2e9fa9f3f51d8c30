"""How good is the estimate on a real language model: predicted against measured risk along a path, and what more
training examples bring.

Two parts, each cell a CSV of its own, so that a run that was stopped goes on where it was:

    path      the predicted joint risk of each round's circuit, expanded around the round before, against the measured
              one, both on test examples that the search has not seen, at temperature 1
    examples  the test risk of the circuits that are found with so many training examples; at most ``--per-round``
              of them are in a round, so that passes are as many for all but the smallest

    tl-sparsify fetch smollm2
    python benchmarks/real_estimate.py --tasks ioi
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
from shared import RESULTS, nats

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text

SIZES = (0.5, 0.3, 0.2, 0.1, 0.05)
COUNTS = (16, 64, 256, 1024)
FOLDER = RESULTS / "real_estimate"


def found(options: argparse.Namespace, task: str, count: int, predict: bool) -> tuple[Any, tls.CircuitPath, Any]:
    """The model, a path found with so many training examples, and test examples."""
    loaded = tls.load_task(task, model=options.model)
    model = loaded.model()
    train, _, test = loaded.examples(0)
    train, test = train.sample(count, seed=0), test.sample(options.test, seed=0)
    given: dict[str, Any] = {"held_out": test, "refitting": tls.Refitting(0)} if predict else {}
    probing = tls.Probing(1, examples=min(options.per_round, len(train)))
    units = tls.heads(model) + tls.neurons(model)
    given |= {"smallest": SIZES[-1], "probing": probing, "batch_size": options.batch_size, "progress": False}
    return model, tls.sparsify(model, train, units, **given), test


def along_path(options: argparse.Namespace, task: str) -> pd.DataFrame:
    """One row a round: held-out examples measure, and choose nothing."""
    _, path, _ = found(options, task, options.examples, predict=True)
    return path.to_frame().assign(task=task)


def with_examples(options: argparse.Namespace, task: str, count: int) -> pd.DataFrame:
    """One row a size."""
    model, path, test = found(options, task, count, predict=False)
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        risk = tls.risk(model, path.at(size), test, batch_size=options.batch_size)
        rows.append({"task": task, "examples": count, "size": size, "risk": risk.mean, "stderr": risk.stderr})
    return pd.DataFrame(rows)


def cell(name: str, make: Any) -> pd.DataFrame:
    """What a file of this name holds; made where there is none."""
    file = FOLDER / f"{name}.csv"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, make().to_csv(index=False))
        print(f"{name}: done", flush=True)
    return pd.read_csv(file)


def page(paths: list[pd.DataFrame], counts: list[pd.DataFrame]) -> str:
    """Both tables."""
    lines = ["| task | kept | predicted | measured |", "|---|---|---|---|"]
    for frame in paths:
        for row in frame.itertuples():
            measured = f"{nats(row.measured)} ± {row.measured_stderr:.2g}"
            lines.append(f"| {row.task} | {100 * row.fraction:.3g} % | {nats(row.predicted)} | {measured} |")
    head = " | ".join(f"{100 * size:g} %" for size in SIZES)
    lines += ["", f"| task | training examples | {head} |", "|---|---|" + "---|" * len(SIZES)]
    if counts:
        for (task, count), part in pd.concat(counts).groupby(["task", "examples"], sort=False):
            lines.append(f"| {task} | {count} | " + " | ".join(nats(risk) for risk in part.risk) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make every cell that is missing, and the tables of all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=("ioi", "subject_verb_agreement"))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--examples", type=int, default=512, help="for training, along the path")
    parser.add_argument("--per-round", type=int, default=128)
    parser.add_argument("--test", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    paths, counts = [], []
    for task in options.tasks:
        for count in options.counts:
            counts.append(cell(f"examples-{task}-{count}", lambda t=task, n=count: with_examples(options, t, n)))
        paths.append(cell(f"path-{task}", lambda t=task: along_path(options, t)))
    write_text(RESULTS / "real_estimate.md", page(paths, counts))


if __name__ == "__main__":
    main()
