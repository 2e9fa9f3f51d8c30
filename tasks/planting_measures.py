"""What a planted model does: the figures of its card, and which units are true by what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import tl_sparsify as tls
from tasks.planting_model import Plan, written
from tl_sparsify.core.units import select

PAIRS = 1024
MATTERS = 1e-2  # nats: what removing a unit must cost for it to be true by removal


@torch.no_grad()
def changed(model: Any, chosen: Sequence[tls.Unit], pairs: tls.Pairs) -> dict[str, float]:
    """The share of answers that change when each unit alone is interchanged."""
    plain = model(pairs.base.tokens)[:, -1].argmax(1)
    shares: dict[str, float] = {}
    for unit in chosen:
        units, mask = select([unit])
        swap = tls.interchange(tls.Circuit(units, mask), tls.run_values(model, pairs.source, units))
        with tls.intervened(model, swap):
            shares[unit.name] = float((model(pairs.base.tokens)[:, -1].argmax(1) != plain).double().mean())
    return shares


def idle_units(plan: Plan) -> tuple[list[tls.Unit], list[tls.Unit]]:
    """The other units, and the aligned ones at their other positions."""
    units, mask = plan.idle
    chosen = [unit for unit, idle in zip(units, mask.tolist(), strict=True) if idle]
    return [u for u in chosen if u.site.positions is None], [u for u in chosen if u.site.positions is not None]


@torch.no_grad()
def accuracy(model: Any, examples: tls.Examples) -> dict[str, float]:
    """Accuracy over the whole vocabulary and mean cross-entropy in nats."""
    logits, labels = model(examples.tokens)[:, -1], examples.labels[:, -1]
    right = float((logits.argmax(1) == labels).double().mean())
    nats = float(torch.nn.functional.cross_entropy(logits.double(), labels))
    return {"n": len(labels), "accuracy": round(right, 6), "nats": round(nats, 6)}


def interchange_accuracies(model: Any, plan: Plan, pairs: tls.Pairs) -> dict[str, float]:
    """Interchange intervention accuracy of each variable (all pairs)."""
    found: dict[str, float] = {}
    for variable, aligned in plan.alignment.units.items():
        units, mask = select(aligned)
        with torch.no_grad():
            swap = tls.interchange(tls.Circuit(units, mask), tls.run_values(model, pairs.source, units))
            with tls.intervened(model, swap):
                answers = model(pairs.base.tokens)[:, -1].argmax(1)
        expected = pairs.expected(plan.causal_model, (variable,))
        found[variable] = float((answers == expected).double().mean())
    return found


def auroc(scores: Float[Tensor, "units"], truth: Bool[Tensor, "units"]) -> float:
    """The chance that a true unit has a larger score than another one, ties counted half."""
    true, other = scores[truth].double(), scores[~truth].double()
    wins = (true[:, None] > other).double() + 0.5 * (true[:, None] == other).double()
    return round(float(wins.mean()), 4)


def stand_in(model: Any, plan: Plan, examples: tls.Examples, pairs: tls.Pairs) -> dict[str, float]:
    """Accuracies with the first head, its backup or both at their means, and the backup's interchange accuracy where
    the first is gone; ``silence``: the share of answers that the backup's interchange leaves alone where it is not."""
    assert plan.backup is not None  # noqa: S101
    first, second = (torch.tensor([name == unit for name in plan.units.names]) for unit in plan.backup)
    means = tls.constants.mean(model, plan.module.examples(0)[0], plan.units)
    answers = pairs.expected(plan.causal_model, plan.alignment.variables[:1])

    def without(gone: Bool[Tensor, "units"]) -> tls.Intervention:
        return tls.Intervention(plan.units, (~gone).float(), means)

    found: dict[str, float] = {}
    for name, gone in {"first": first, "second": second, "both": first | second}.items():
        with tls.intervened(model, without(gone)):
            found[f"without_{name}"] = accuracy(model, examples)["accuracy"]
    zeros = tls.constants.zero(model, examples, plan.units)
    with tls.intervened(model, tls.Intervention(plan.units, (~first).float(), zeros)):
        found["first_at_zero"] = accuracy(model, examples)["accuracy"]
    with torch.no_grad():
        with tls.intervened(model, without(first)):
            values = tls.run_values(model, pairs.source, plan.units)
        swap = tls.interchange(tls.Circuit(plan.units, second), values)
        with tls.intervened(model, swap, without(first)):
            found["takes_over"] = float((model(pairs.base.tokens)[:, -1].argmax(1) == answers).double().mean())
    [silent] = changed(model, [plan.units[plan.backup[1]]], pairs).values()
    return found | {"silence": 1 - silent}


@torch.no_grad()
def silence(model: Any, plan: Plan, examples: tls.Examples) -> dict[str, float]:
    """How much the pair writes at the answer (standard deviation, all dimensions together), the first head there or
    removed."""
    assert plan.backup is not None  # noqa: S101
    first = torch.tensor([name == plan.backup[0] for name in plan.units.names])
    means = tls.constants.mean(model, plan.module.examples(0)[0], plan.units)
    removal = tls.Intervention(plan.units, (~first).float(), means)
    found = {"first": float(written(model, plan, examples, answer=True)[plan.units.index(plan.backup[0])])}
    second = plan.units.index(plan.backup[1])
    found["second"] = float(written(model, plan, examples, answer=True)[second])
    with tls.intervened(model, removal):
        found["second_without_first"] = float(written(model, plan, examples, answer=True)[second])
    return {name: round(value, 6) for name, value in found.items()}


@torch.no_grad()
def parts(model: Any, plan: Plan, pairs: tls.Pairs) -> dict[str, dict[str, float]]:
    """Where the backup's value at the answer comes from: its mean attention to the first token, and the standard
    deviation (all dimensions together) of what it takes from there, from the answer's position, and in all.

    With the first head as it is, removed, or taken from a source with another answer.
    """
    assert plan.backup is not None  # noqa: S101
    first = torch.tensor([name == plan.backup[0] for name in plan.units.names])
    backup = plan.units[plan.backup[1]]
    other = (pairs.base.labels != pairs.source.labels).any(1)
    base, source = pairs.base[other], pairs.source[other]
    means = tls.constants.mean(model, plan.module.examples(0)[0], plan.units)
    swap = tls.interchange(tls.Circuit(plan.units, first), tls.run_values(model, source, plan.units))
    removal = tls.Intervention(plan.units, (~first).float(), means)
    layer, number = f"blocks.{backup.site.layer}.attn", backup.index
    found: dict[str, dict[str, float]] = {}
    for name, what in {"intact": (), "first_removed": (removal,), "first_interchanged": (swap,)}.items():
        with tls.intervened(model, *what):
            _, cache = model.run_with_cache(base.tokens)
        attention = cache[f"{layer}.hook_pattern"][:, number, -1]
        values = cache[f"{layer}.hook_v"].reshape(*attention.shape, backup.site.size, -1)
        taken = attention[..., None] * values[:, :, number]
        spread = {"from_x": taken[:, 0], "from_the_answer": taken[:, -1], "in_all": taken.sum(1)}
        found[name] = {"attention_to_x": round(float(attention[:, 0].mean()), 4)}
        found[name] |= {where: round(float(part.var(0).sum().sqrt()), 4) for where, part in spread.items()}
    return found


def measured(model: Any, plan: Plan) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The figures of the card, on test inputs, and the true units by what makes them true."""
    test = plan.module.examples(0)[2]
    pairs = plan.module.pairs(PAIRS, 0)
    others, elsewhere = idle_units(plan)
    removal = tls.score.exact(model, test, plan.units, progress=False).scores
    names = plan.units.names
    truth = {
        "weights": [name for name, planted in zip(names, plan.planted.tolist(), strict=True) if planted],
        "removal": [name for name, cost in zip(names, removal.tolist(), strict=True) if cost >= MATTERS],
    }
    truth = {kind: found for kind, found in truth.items() if found}
    train = plan.module.examples(0)[0]
    figures = {
        "test_split": accuracy(model, test),
        "test_space": plan.module.tables(lambda examples: accuracy(model, examples)),
        "interchange": interchange_accuracies(model, plan, pairs),
        "worst_outside": max(changed(model, others, pairs).values()),
        "worst_elsewhere": max(changed(model, elsewhere, pairs).values(), default=0.0),
        "removal_nats": {name: round(float(removal[names.index(name)]), 6) for name in truth["weights"]},
        "worst_removal_outside_nats": float(removal[~plan.planted].max()),
        "auroc": {
            "variance": auroc(tls.score.variance(model, train, plan.units).scores, plan.planted),
            "scaled_variance": auroc(tls.score.scaled_variance(model, train, plan.units).scores, plan.planted),
            "gradient": auroc(tls.score.gradient(model, train, plan.units).scores.abs(), plan.planted),
            "risk": auroc(tls.score.risk(model, train, plan.units).scores, plan.planted),
            "exact": auroc(removal, plan.planted),
        },
    }
    if plan.backup is not None:
        both = tls.Circuit(plan.units, torch.tensor([name not in (plan.backup or ()) for name in names]))
        removal_of_both = tls.constants.reduced(model, both, tls.constants.mean(model, train, plan.units))
        cost = {"both_nats": round(tls.risk(model, removal_of_both, test).mean, 6)}
        more = {"writes": silence(model, plan, test), "value": parts(model, plan, pairs)}
        figures["backup"] = stand_in(model, plan, test, pairs) | cost | more
    return figures, truth
