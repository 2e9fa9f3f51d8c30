"""Train a transformer of whose units it is known what they do: ``python -m tasks.planting NAME [--out FOLDER]``.

Each variable of the task's causal model is planted in the units that the task's alignment names, by interchange
intervention training (Geiger et al., *Inducing Causal Structure for Interpretable Neural Networks*, 2022) in its strict
variant (Gupta et al., *InterpBench: Semi-Synthetic Transformers for Evaluating Mechanistic Interpretability
Techniques*, 2024): the aligned units, taken from a source input, must give the causal model's counterfactual answer;
any others, interchanged or set to their means, must change nothing.

Training makes the others' effects small, not zero. So some dimensions of the residual stream are closed to the true
units and to the unembedding, and in the last part of the training the other units write into these alone. They go on
working, as loudly as the true ones, and nothing that counts reads them: their effect is zero up to round-off. That is
exact because the model has no LayerNorm. At the end the stream is rotated, so that no dimension stands out.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tl_sparsify as tls
from tasks.planting_measures import accuracy, changed, idle_units, interchange_accuracies, measured, stand_in
from tasks.planting_model import CLOSED, Plan, close, loud, plan, rotate, start
from tasks.training import train, transformer
from tl_sparsify.core.units import select
from tl_sparsify.tasks.native import save_native

LEARNING_RATE, SMOOTHING, EVALUATE_EVERY = 2e-3, 1e-3, 250


@dataclass(frozen=True)
class Batch:
    """Base and source inputs of the train split."""

    base_inputs: tls.pairing.Inputs
    source_inputs: tls.pairing.Inputs
    base: tls.Examples
    source: tls.Examples


def batch_of(plan: Plan, rng: np.random.Generator, size: int) -> Batch:
    """``size`` fresh inputs and as many sources, evenly over the task's cells."""
    inputs = plan.module.drawn(rng, 0, 2 * size, replace=True)
    base, source = ({name: part[side] for name, part in inputs.items()} for side in (slice(size), slice(size, None)))
    return Batch(base, source, plan.module.encode(base), plan.module.encode(source))


def answers_to(plan: Plan, batch: Batch, variable: str) -> Int[Tensor, "batch"]:
    """The causal model's answers on the bases with ``variable`` taken from the sources."""
    model = plan.causal_model
    values = model.interchange(batch.base_inputs, {variable: batch.source_inputs})[model.output]
    return torch.tensor([plan.module.ANSWERS[value] for value in values.tolist()])


def run(model: Any, examples: tls.Examples, units: tls.Units) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The logits at the answer, and the units' values, both as parts of the graph."""
    with tls.recorded(model, units, gradients=True) as recording:
        logits = model(examples.tokens)[:, -1]
    return logits, recording.read()


def surprise(logits: Float[Tensor, "batch vocab"], answers: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
    """Cross-entropy in nats, labels smoothed: a model that is certain hides from every probe what its units do."""
    return torch.nn.functional.cross_entropy(logits, answers, label_smoothing=SMOOTHING)


def replaced(
    plan: Plan, chosen: tls.Units, mask: Bool[Tensor, "some"], values: Sequence[Tensor], means: bool = False
) -> tls.Intervention:
    """Set some units to their values in another run, or to their means over it."""
    by_hook = {site.hook: value for site, value in zip(plan.units.sites, values, strict=True)}
    found = [by_hook[site.hook] for site in chosen.sites]
    if means:
        found = [value.mean((0, 1)) for value in found]
    return tls.Intervention(chosen, (~mask).float(), tls.Values(chosen, tuple(found)))


def planted_loss(plan: Plan, model: Any, batch: Batch, rng: np.random.Generator, alone: bool) -> Float[Tensor, ""]:
    """Behaviour untouched, behaviour with idle units replaced, and one variable interchanged with idle units replaced.

    While ``alone`` the idle units are always replaced, all of them: no other way to the answer can be learnt.
    """
    with torch.no_grad():
        values = tls.run_values(model, batch.source, plan.units).tensors
    with tls.intervened(model, *[noise(plan, values, rng, alone)] * alone):
        logits, values = run(model, batch.source, plan.units)
    loss = surprise(logits, batch.source.labels[:, -1])
    with tls.intervened(model, noise(plan, values, rng, alone)):
        loss = loss + surprise(model(batch.base.tokens)[:, -1], batch.base.labels[:, -1])
    variable = str(rng.choice(plan.alignment.variables))
    chosen, mask = select(plan.alignment.units[variable])
    with tls.intervened(model, noise(plan, values, rng, alone), replaced(plan, chosen, mask, values)):
        loss = loss + surprise(model(batch.base.tokens)[:, -1], answers_to(plan, batch, variable))
    return loss


def noise(plan: Plan, values: Sequence[Tensor], rng: np.random.Generator, every: bool) -> tls.Intervention:
    """Idle units (all, half or none of them) set to their values on other inputs, or to their means."""
    idle, mask = plan.idle
    share = 1.0 if every else float(rng.choice([0.0, 0.5, 1.0], p=[0.2, 0.4, 0.4]))
    some = mask & torch.from_numpy(rng.random(len(mask)) < share)
    others = [value.roll(int(rng.integers(1, len(value))), 0) for value in values]
    return replaced(plan, idle, some, others, means=bool(rng.random() < 0.5))


def backup_loss(plan: Plan, model: Any, batch: Batch, rng: np.random.Generator, alone: bool) -> Float[Tensor, ""]:
    """As :func:`planted_loss`; the backup without effect while the first head is there, and in its place when not."""
    assert plan.backup is not None  # noqa: S101
    first, second = (torch.tensor([name == unit for name in plan.units.names]) for unit in plan.backup)
    everything, labels = plan.units, batch.base.labels[:, -1]
    logits, values = run(model, batch.source, everything)
    loss = surprise(logits, batch.source.labels[:, -1])
    without_first = replaced(plan, everything, first, values, means=True)
    with tls.intervened(model, without_first):
        unaided, stand_ins = run(model, batch.source, everything)
    loss = loss + surprise(unaided, batch.source.labels[:, -1])
    clean = model(batch.base.tokens)[:, -1]
    loss = loss + surprise(clean, labels)
    answers = answers_to(plan, batch, plan.alignment.variables[0])
    with tls.intervened(model, replaced(plan, everything, first, values)):
        loss = loss + surprise(model(batch.base.tokens)[:, -1], answers)
    with tls.intervened(model, replaced(plan, everything, second, stand_ins), without_first):
        loss = loss + surprise(model(batch.base.tokens)[:, -1], answers)
    backup = plan.units[plan.backup[1]]
    quiet, speaking = (of[plan.units.sites.index(backup.site)][:, -1, backup.index] for of in (values, stand_ins))
    loss = loss + 10 * quiet.var(0).sum() / speaking.var(0).sum()
    with tls.intervened(model, noise(plan, values, rng, alone)):
        loss = loss + surprise(model(batch.base.tokens)[:, -1], labels)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--out", type=Path)
    for option in ("steps", "alone-steps", "free-steps", "batch"):
        parser.add_argument(f"--{option}", type=int, help="the task's own where not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="measure the shipped model again; no training")
    args = parser.parse_args()
    here, settings = plan(args.name)
    out = args.out or Path(here.module.__file__ or "").parent / "model"
    if args.measure:
        model = tls.task.load_native(out)
        write(model, here, json.loads((out / "metrics.json").read_text()), out)
        return
    given = {name: getattr(args, name, None) for name in here.module.SCHEDULE}
    schedule = here.module.SCHEDULE | {name: steps for name, steps in given.items() if steps is not None}
    config = transformer(seed=args.seed, **settings)
    objective = planted_loss if here.backup is None else backup_loss
    validation, held_out = here.module.examples(0)[1], here.module.pairs(512, 1, split=1)
    strict: dict[str, float] = {}

    def loss(model: Any, step: int) -> Float[Tensor, ""]:
        if step == 1:
            start(model, here)
        close(model, here, silence=step > schedule["free_steps"])
        rng = np.random.default_rng([args.seed, step])
        return objective(here, model, batch_of(here, rng, schedule["batch"]), rng, step <= schedule["alone_steps"])

    evaluations = iter(range(EVALUATE_EVERY, schedule["steps"] + 1, EVALUATE_EVERY))

    def judge(model: Any) -> float:
        """The least of the accuracies that are wanted; half of it while the other units are not silent yet."""
        step = next(evaluations)
        close(model, here, silence=step > schedule["free_steps"])
        others, elsewhere = idle_units(here)
        if step == schedule["free_steps"]:
            strict["worst_outside_before"] = max(changed(model, others, held_out).values())
        found = interchange_accuracies(model, here, held_out)
        found["behaviour"] = accuracy(model, validation)["accuracy"]
        found["elsewhere"] = 1 - max(changed(model, elsewhere, held_out).values(), default=0.0)
        if here.backup is not None:
            found |= stand_in(model, here, validation, held_out)
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        least = min(value for name, value in found.items() if name not in ("without_both", "first_at_zero"))
        return least if step > schedule["free_steps"] else least / 2

    model, how = train(
        config,
        loss,
        judge,
        steps=schedule["steps"],
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        evaluate_every=EVALUATE_EVERY,
        patience=schedule["steps"],
    )
    loud(model, here, here.module.examples(0)[0])
    rotate(model, args.seed)
    save_native(model, config, out)
    kind = {"kind": "planted", **here.module.SHAPE, "closed": CLOSED, "smoothing": SMOOTHING}
    write(model, here, {**kind, **schedule, **how, **strict}, out)


def write(model: Any, plan: Plan, how: dict[str, Any], out: Path) -> None:
    """Measure, and write metrics.json and truth.json."""
    figures, truth = measured(model, plan)
    (out / "metrics.json").write_text(json.dumps(how | figures, indent=1) + "\n")
    (out / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    print(json.dumps({**how, **figures, "truth": truth}, indent=1))


if __name__ == "__main__":
    main()
