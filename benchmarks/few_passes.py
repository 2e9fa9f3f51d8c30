r"""SmolLM2 with few passes: in what steps a mask is trained, and where a search that is sharpened ends.

Both are chosen on validation examples of prompts that no table has: five words on each of two lines, and the model goes
on with the third on the next ("repetition"; its counterfactual has another third word), and ``greater_than``. Every
method has the passes that it has in the benchmarks of edges (here with whole layers as readers) and of a real model.
One cell for each kind of units, task, ablation and method: a CSV of its own, so that a run that was stopped goes on
where it was. Writes ``benchmarks/results/few_passes.md``.

    python benchmarks/few_passes.py --units edges --ablations mean --methods "mask, 8"
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from edges import ABLATIONS, mask_share
from edges import SIZES as EDGES
from real_model import KINDS
from real_model import SIZES as HEADS
from shared import LEAST, RESULTS, circuit_of, geometric_mean, marked, parser, search_passes, sharpened, trained_mask

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.measure import circuit_risks

TASKS = ("repetition", "greater_than")
WORDS = (
    "apple bread chair river stone cloud horse table light paper glass green music winter summer garden bridge "
    "window doctor letter mother father sister brother teacher student coffee butter silver golden yellow purple "
    "orange planet forest island valley desert market temple castle church school office street corner"
).split()
VALIDATION = 64  # examples


@dataclass(frozen=True)
class Setting:
    """What a kind of units has in its benchmark.

    Attributes:
        units: of a model.
        train: examples.
        rounds, per_round: of the search, and the examples that each of them sees.
        held_out: examples on which circuits are measured.
        exchanged: units on either side of an exchange.
        sizes: that are judged.
    """

    units: Callable[[Any], tls.Units]
    train: int
    rounds: int
    per_round: int
    held_out: int
    exchanged: int
    sizes: tuple[float, ...]

    @property
    def budget(self) -> int:
        """Backward passes of one example each, of the search."""
        return search_passes(self.rounds, 1, self.per_round)


SETTINGS = {
    "edges": Setting(lambda model: tls.edges(model, "layer"), 64, 12, 32, 32, 0, EDGES),
    "heads": Setting(tls.heads, 256, 20, 64, 32, 1, HEADS),
    "heads+neurons": Setting(KINDS["heads+neurons"], 256, 20, 64, 32, 1, HEADS),
}
ENDS: dict[str, tuple[float, ...] | None] = {"all sizes": None, "a half": (0.5,), "a fifth": (0.5, 0.2)}


def known(name: str) -> str:
    """A name that :func:`found_by` knows."""
    *way, per_step = name.split(", ")
    if tuple(way) in {("mask",), *(("sharpened", end) for end in ENDS)} and per_step.isdecimal() and int(per_step):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is neither 'mask, 8' nor 'sharpened, {' | '.join(ENDS)}, 8'")


def repetition(tokenizer: Any, train: int, seed: int) -> tuple[tls.Examples, tls.Examples]:
    """Training and validation examples."""
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = (list[str](), list[str]()), (list[str](), list[str]())
    for _ in range(train + VALIDATION):
        *five, other = (WORDS[place] for place in torch.randperm(len(WORDS), generator=generator)[:6].tolist())
        for words, texts, thirds in zip((five, [*five[:2], other, *five[3:]]), prompts, answers, strict=True):
            texts.append("\n".join([" ".join(words)] * 2 + [" ".join(words[:2])]))
            thirds.append(f" {words[2]}")
    pairs = {"counterfactual_prompts": prompts[1], "counterfactual_answers": answers[1]}
    # without a first token of its own SmolLM2 is right more often here
    examples = tls.Examples.from_prompts(tokenizer, prompts[0], answers[0], prepend_bos=False, **pairs)
    return examples[:train], examples[train:]


def found_by(
    method: str, setting: Setting, model: Any, train: tls.Examples, units: tls.Units, values: tls.Values, seed: int
) -> tls.Scores | tls.CircuitPath:
    """``mask, 8``: in steps of eight examples; ``sharpened, a fifth, 8``: of a search down to a fifth of the units."""
    kind, *end, per_step = method.split(", ")
    given: dict[str, Any] = {"values": values, "seed": seed, "per_step": int(per_step)}
    if kind == "mask":
        more = mask_share(setting.per_round, values) if setting.sizes == EDGES else 1.0
        given |= {"examples": math.ceil(more * setting.budget), "smallest": setting.sizes[-1]}
        return trained_mask(model, train, units, **given)
    searched = ENDS[end[0]]
    sizes = setting.sizes if searched or 0.5 in setting.sizes else (0.5, *setting.sizes)
    given |= {"probing": tls.Probing(1, examples=setting.per_round), "budget": setting.budget, "searched": searched}
    held_out = train[: setting.held_out]
    return sharpened(model, train, units, sizes=sizes, held_out=held_out, exchanged=setting.exchanged, **given)


def rows(kind: str, task: str, ablation: str, method: str, seed: int) -> list[dict[str, Any]]:
    """One for each size."""
    setting, loaded = SETTINGS[kind], tls.load_task("greater_than", model="smollm2")
    model = loaded.model()
    if task == "repetition":
        train, validation = repetition(model.tokenizer, setting.train, seed)
    else:
        train, validation, _ = loaded.examples(seed)
        train, validation = train.sample(setting.train, seed=seed), validation.sample(VALIDATION, seed=seed)
    units = setting.units(model)
    values = getattr(tls.constants, ablation)(model, train, units)
    found = found_by(method, setting, model, train, units, values, seed)
    same = {"units": kind, "task": task, "ablation": ablation, "method": method, "seed": seed}
    circuits = [circuit_of(found, size) for size in setting.sizes]
    measured = circuit_risks(model, tls.constants.reduced(model, circuits[0], values), circuits, validation)
    return [
        same | {"size": size, "risk": risk.mean, "risk_stderr": risk.stderr}
        for size, risk in zip(setting.sizes, measured, strict=True)
    ]


def page(frame: pd.DataFrame) -> str:
    """Markdown: one row a method, for each kind of units, task, ablation and seed: each size's risk, and the geometric
    mean over sizes, lowest of its group bold."""
    risks = frame.assign(risk=frame.risk.clip(lower=LEAST))
    lines: list[list[str]] = []
    for (kind, task, ablation, seed), part in risks.groupby(["units", "task", "ablation", "seed"], sort=False):
        found = {str(method): list(rows.risk) for method, rows in part.groupby("method", sort=False)}
        means = marked([geometric_mean(risks) for risks in found.values()])
        for (method, risks_here), mean in zip(found.items(), means, strict=True):
            here = " / ".join(f"{risk:.2g}" for risk in risks_here)
            lines.append([f"{kind}, {task}, {ablation}, seed {seed}", method, here, mean])
    return table_of(["units, task, ablation", "method", "risk, largest circuit first", "geometric mean"], lines) + "\n"


def main() -> None:
    """Make every cell that is asked for and missing, and the page of all that there are."""
    options = parser(__doc__)
    options.add_argument("--units", nargs="+", default=("edges",), choices=tuple(SETTINGS))
    options.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    options.add_argument("--ablations", nargs="+", default=ABLATIONS, choices=ABLATIONS)
    options.add_argument(
        "--methods", nargs="+", type=known, default=("mask, 32", "mask, 8", "sharpened, all sizes, 16")
    )
    options.add_argument("--seeds", type=int, nargs="+", default=(0,))
    chosen = options.parse_args()
    folder = RESULTS / "few_passes"
    folder.mkdir(parents=True, exist_ok=True)
    every = itertools.product(chosen.seeds, chosen.units, chosen.tasks, chosen.ablations, chosen.methods)
    for seed, kind, task, ablation, method in every:
        file = folder / f"{kind}-{task}-{ablation}-{method.replace(', ', '-').replace(' ', '_')}-{seed}.csv"
        if not file.is_file():
            found = pd.DataFrame(rows(kind, task, ablation, method, seed))
            write_text(file, found.to_csv(index=False))
            risks = ", ".join(f"{risk:.3g}" for risk in found.risk)
            print(f"{kind}, {task}, {ablation}, {method}, seed {seed}: {risks}", flush=True)
    files = sorted(folder.glob("*.csv"))
    if files:
        write_text(RESULTS / "few_passes.md", page(pd.concat(map(pd.read_csv, files))))


if __name__ == "__main__":
    main()
