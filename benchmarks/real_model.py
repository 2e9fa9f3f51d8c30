r"""A real language model: circuits of SmolLM2-135M by the joint search and by other orders, on text tasks.

One cell for each task, kind of units, method and seed: a CSV of its own, so that a run that was stopped goes on where
it was. Every method sees the same training examples and the same means, and takes at least as many backward passes as
the joint search but for one-shot scores, which have no more to take. The joint search draws some of the training
examples for each round, a mask some for each step; attribution takes all of them every time. Sharpened is a search of
one round for each size that is reported and, in all other passes, masks from its order and from nothing, whose circuits
are measured on an eighth of the training examples. Polished is what is sharpened after exact exchanges on all training
examples, with the circuits of exact removal and of the mask as rivals; it is made where it is asked for by name, as
exact removal is. With ``--refit`` there are also rows of constants that are refitted from the means, for each circuit,
until the validation risk no longer falls, or ``--most`` steps are done, and for half of ``--patience`` steps more at a
falling rate.

    tl-sparsify fetch smollm2
    python benchmarks/real_model.py --tasks ioi subject_verb_agreement --kinds heads+neurons
    python benchmarks/real_model.py --tasks subject_verb_agreement --kinds heads+neurons --examples 256 --per-round 64 \
        --test 128 --refit --sizes 0.1 --patience 40 --most 100
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from shared import check_methods, circuit_of, search_passes, sharpened, trained_mask

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison import baselines
from tl_sparsify.comparison.cost import cost_of
from tl_sparsify.core.measure import compared, known_of, remembering
from tl_sparsify.core.metrics import risk_and_right

SIZES = (0.5, 0.3, 0.2, 0.1, 0.05)
ROUNDS = 20
TASKS = ("ioi", "subject_verb_agreement", "gendered_pronoun", "docstring", "greater_than")
RESULTS = Path(__file__).parent / "results" / "real_model"
REMOVED, EXACT = 64, "exact removal"  # examples; a forward pass for each unit
POLISHED, POLISHING = "joint risk, polished", 30  # passes for each size
BY_NAME = (EXACT, POLISHED)  # where they are asked for: they take more passes than all others
EXCHANGED, HELD_OUT = 1, 8  # of a path that is sharpened: units on either side of an exchange; a part of the examples
KINDS: dict[str, Callable[[Any], tls.Units]] = {
    "heads": tls.heads,
    "heads+mlps": lambda model: tls.heads(model) + tls.mlps(model),
    "heads+neurons": lambda model: tls.heads(model) + tls.neurons(model),
}


def methods(options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """By name: a function of model, examples, units, and the settings that all share."""
    size = options.batch_size
    backward = search_passes(ROUNDS, options.probes, options.per_round)
    probing = tls.Probing(options.probes, examples=options.per_round)

    def joint(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        settings: dict[str, Any] = {"smallest": SIZES[-1], "rounds": ROUNDS, "batch_size": size, "progress": False}
        first = options.first_token
        return tls.sparsify(
            model, train, units, values=values, probing=probing, first_token=first, seed=seed, **settings
        )

    def sharpening(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        settings: dict[str, Any] = {"values": values, "seed": seed, "batch_size": size, "probing": probing}
        settings |= {"first_token": options.first_token, "sizes": SIZES, "budget": backward, "exchanged": EXCHANGED}
        held_out = train[: len(train) // HELD_OUT]
        return sharpened(model, train, units, per_step=min(16, size), held_out=held_out, **settings)

    def one_shot(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        return tls.score.risk(model, train, units, values=values, temperature=3.0, seed=seed, batch_size=size)

    def attribution(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        rounds, smallest = max(ROUNDS, -(-backward // len(train))), SIZES[-1]
        scorer = tls.score.gradient
        given: dict[str, Any] = {"absolute": True, "batch_size": size, "seed": seed, "progress": False}
        return baselines.in_rounds(
            scorer, model, train, units, rounds=rounds, smallest=smallest, values=values, **given
        )

    def removed(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        some = train[:REMOVED]
        return tls.score.exact(model, some, units, values=values, seed=seed, batch_size=size, progress=False)

    def mask(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        given: dict[str, Any] = {"values": values, "seed": seed, "examples": backward, "per_step": size}
        return trained_mask(model, train, units, smallest=SIZES[-1], **given)

    def polished(model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int) -> Any:
        path, *others = (find(model, train, units, values, seed) for find in (sharpening, mask, removed))
        given: dict[str, Any] = {"passes": POLISHING, "probes": options.probes, "seed": seed, "batch_size": size}
        found = dict[float, tls.Reduction]()
        for kept in SIZES:
            rivals = [order.top(kept) for order in others]
            found[kept] = tls.polish(model, path.at(kept), train, rivals=rivals, **given)
        return found

    return {
        "joint risk": joint,
        "joint risk, sharpened": sharpening,
        "risk, one shot": one_shot,
        "attribution, rounds": attribution,
        "top-k mask": mask,
        EXACT: removed,
        POLISHED: polished,
    }


def cell(options: argparse.Namespace, task: str, kind: str, method: str, seed: int) -> dict[str, pd.DataFrame]:
    """One method on one task: by kind of constants a row a size."""
    loaded = tls.load_task(task, model=options.model)
    model = loaded.model()
    model = model if options.device == "cpu" else model.to(options.device)
    train, validation, test = loaded.examples(seed)
    train, validation = train.sample(options.examples, seed=seed), validation.sample(options.test, seed=seed)
    test = test.sample(options.test, seed=seed)
    units = KINDS[kind](model)
    values = tls.constants.mean(model, train, units, batch_size=options.batch_size)
    find = methods(options)[method]
    started = time.perf_counter()
    found, cost = cost_of(model, len(train), lambda: find(model, train, units, values, seed))
    seconds = time.perf_counter() - started
    same = {"clean": True, "many": True, "batch_size": options.batch_size}
    known = known_of(model, train, units, **same) if options.refit else None
    fitting: dict[str, Any] = {"patience": options.patience, "most": options.most, "per_step": options.batch_size}
    fitting |= {"batch_size": options.batch_size, "seed": seed, "known": known}
    judging = [("mean", size) for size in SIZES] + [("refitted", size) for size in options.sizes if options.refit]
    rows, recall = dict[str, list[dict[str, Any]]](), remembering()
    for constants, size in judging:
        circuit = circuit_of(found, size)
        reduction = replace(tls.constants.reduced(model, circuit, values), first_token=options.first_token)
        if constants == "refitted":
            reduction = tls.refit_until_converged(model, reduction, train, validation, **fitting)
        judged = compared(model, reduction, test, risk_and_right, recall=recall, batch_size=options.batch_size)
        (risk, accuracy), (error, _) = judged.mean.tolist(), judged.stderr.tolist()
        row = {"task": task, "units": kind, "method": method, "seed": seed, "size": size}
        row |= {"constants": constants, "kept": len(circuit)}
        row |= {"risk": risk, "risk_stderr": error, "accuracy": accuracy}
        row |= {"examples": len(train), "per_round": options.per_round, "probes": options.probes}
        row |= {"first_token": options.first_token, "forward": cost.forward, "backward": cost.backward}
        rows.setdefault(constants, []).append(row | {"seconds": seconds})
    return {constants: pd.DataFrame(found) for constants, found in rows.items()}


def table(frame: pd.DataFrame) -> str:
    """Markdown: risk, its standard error and accuracy for each method and size, means over seeds; the lowest bold."""
    lines: list[str] = []
    for (task, kind, constants), part in frame.groupby(["task", "units", "constants"], sort=False):
        means = part.groupby(["method", "size"], sort=False)[["risk", "risk_stderr", "accuracy"]].mean().unstack("size")
        sizes = sorted(part["size"].unique(), reverse=True)
        lines += [f"**{task}**, {kind}, {constants} constants", ""]
        lines += [
            "| method | " + " | ".join(f"{100 * size:g} %" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for name in sorted(means.index, key=lambda name: name != "joint risk"):
            cells: list[str] = []
            for size in sizes:
                risk, error, accuracy = (means.loc[name, (kind, size)] for kind in ("risk", "risk_stderr", "accuracy"))
                best = len(means) > 1 and risk == means[("risk", size)].min()
                text = f"{risk:.3f} ± {error:.3f} ({accuracy:.2f})"
                cells.append(f"**{text}**" if best else text)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Make every cell that is missing, and the table of all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--kinds", nargs="+", default=tuple(KINDS), choices=tuple(KINDS))
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--examples", type=int, default=512, help="for training")
    parser.add_argument("--per-round", type=int, default=128, help="of them in a round of the joint search")
    parser.add_argument("--test", type=int, default=256)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--first-token", default="bos", choices=("bos", "any", "none"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--patience", type=int, default=50, help="of a refit, in steps")
    parser.add_argument("--most", type=int, default=6000, help="steps of a refit, converged or not")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="that are refitted")
    options = parser.parse_args()
    every = methods(options)
    names = options.methods or [name for name in every if name not in BY_NAME]
    check_methods(parser, names, every)
    named = ("model", "examples", "per_round", "probes", "first_token", "test")
    folder = RESULTS / "-".join(str(getattr(options, option)) for option in named)
    for seed, task, kind, method in itertools.product(options.seeds, options.tasks, options.kinds, names):
        name = f"{task}-{kind}-{method.replace(', ', '-').replace(' ', '_')}-{seed}"
        fitted = f"{name}-refit-{options.patience}-{options.most}"
        files = {"mean": folder / f"{name}.csv", "refitted": folder / f"{fitted}.csv"}
        if files["refitted" if options.refit else "mean"].is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for constants, found in cell(options, task, kind, method, seed).items():
            write_text(files[constants], found.to_csv(index=False))
            risks = ", ".join(f"{risk:.4f}" for risk in found.risk)
            print(f"{task}, {kind}, {method}, seed {seed}, {constants}: {risks} ({found.seconds[0]:.0f} s)", flush=True)
    files = sorted(RESULTS.glob("*/*.csv"))
    if files:
        frame = pd.concat([pd.read_csv(file).assign(setting=file.parent.name) for file in files])
        groups = list(frame.groupby("setting", sort=False))
        parts = [f"### {name}\n\n{table(part)}" if len(groups) > 1 else table(part) for name, part in groups]
        write_text(RESULTS.parent / "real_model.md", "\n".join(parts))


if __name__ == "__main__":
    main()
