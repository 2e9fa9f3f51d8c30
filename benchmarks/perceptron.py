"""The paper's own setting: a perceptron's last hidden layer, reduced, and judged under random interchange.

A 64-512-512-10 perceptron is trained on scikit-learn's digits (which come with the package) for each seed. Of the 512
units of its last hidden layer some are kept, and original and reduced model are compared on test digits while every
kept unit takes, with a probability, its value on another digit. The table gives the share of top-1 *disagreements*.
The first three rows are the published rules, redone; from "the same p" on they are selected and fitted under the
probability that they are judged under. The last two rows are limits for the units that "compensating, fitted under
the same p" keeps: what a linear readout of them reaches that is trained for long on just this, and a bound that no
function of them, linear or not, can beat. Writes ``benchmarks/results/perceptron.csv`` and ``.md``.

    python benchmarks/perceptron.py [--seeds 3]
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from shared import parser, write
from sklearn.datasets import load_digits
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.measure import compared
from tl_sparsify.core.reduction import Reduction

SIZES = (384, 256, 128, 64, 32)
PROBABILITIES = (0.1, 0.2, 0.5)
WIDTH = 512
DRAWS = 10
STEPS = 3000  # of the readout's training
Method = Callable[[int, float], Reduction]
FITTED = tls.InterventionDistribution.mixture(
    (1.0, tls.InterventionDistribution()), *((1.0, tls.InterventionDistribution.interchange(p)) for p in PROBABILITIES)
)


def judged_under(p: float) -> tls.InterventionDistribution:
    """Mostly interchange with this probability, and also none: what a reduction judged under it is fitted under."""
    return tls.InterventionDistribution.mixture(
        (1.0, tls.InterventionDistribution()), (3.0, tls.InterventionDistribution.interchange(p))
    )


class Perceptron(HookedRootModule):
    """64-512-512-10, with a hook point at the last hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.last = torch.nn.Linear(WIDTH, 10)
        self.hook_hidden = HookPoint()
        self.setup()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hook_hidden(self.second(self.first(x).relu()).relu()))


def data(seed: int) -> tuple[tls.Examples, tls.Examples]:
    """1,197 digits to train and to reduce, 600 to test, split by the seed."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)[:, None].long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1197], order[1197:]
    return tls.Examples(x[train], y[train]), tls.Examples(x[test], y[test])


def trained(train: tls.Examples, seed: int) -> Perceptron:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # noqa: TID251
        model = Perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        for index in torch.randperm(len(train), generator=generator).split(64):
            loss = torch.nn.functional.cross_entropy(model(train.tokens[index]), train.labels[index, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def methods(model: Any, train: tls.Examples, units: tls.Units, seed: int) -> dict[str, Method]:
    """For each method the reduction that it gives for a number of units, to be judged under a probability."""
    values = tls.constants.mean(model, train, units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning is what this row is about
        newton = tls.constants.newton(model, train, units, damping=0.0, clip=False)
    variance = tls.score.variance(model, train, units)
    single = tls.score.risk(model, train, units, probes=9, temperature=3.0, seed=seed)
    search: dict[str, Any] = {"seed": seed, "progress": False}
    joint = search | {"probing": tls.Probing(9)}
    path = tls.sparsify(model, train, units, smallest=SIZES[-1] / WIDTH, **joint)
    swapped = tls.sparsify(model, train, units, smallest=SIZES[-1] / WIDTH, interventions=FITTED, **joint)
    fractions = [size / WIDTH for size in SIZES]

    def compensated(under: tls.InterventionDistribution) -> dict[int, Reduction]:
        affine = tls.sparsify_affine(model, train, units, sizes=fractions, interventions=under, probes=9, **search)
        return {size: step.reduction for size, step in zip(SIZES, affine.rounds, strict=True)}

    mixed = compensated(FITTED)
    same = {p: compensated(judged_under(p)) for p in PROBABILITIES}

    def top(scores: tls.Scores, constants: Any) -> Method:
        return lambda size, p: tls.constants.reduced(model, scores.top(size / WIDTH), constants)

    def folded(at: Method, nearest: int | None, **under: Any) -> Method:
        return lambda size, p: tls.constants.neighbours(model, at(size, p), train, nearest=nearest, **under)

    def along(found: tls.CircuitPath) -> Method:
        return lambda size, p: found.at(size / WIDTH)

    def refitted(size: int, p: float) -> Reduction:
        fit, rest = train[:997], train[997:]
        under = tls.InterventionDistribution.interchange(p)
        return tls.constants.refit(
            model, same[p][size], fit, rest, steps=200, interventions=under, seed=seed, progress=False
        )

    return {
        "published: variance, mean": top(variance, values),
        "published: risk, affine fold into 8": folded(top(single, values), 8, weighting="uniform"),
        "published: risk, Newton constant": top(single, newton),
        "joint risk, mean": along(path),
        "joint risk under interchange, mean": along(swapped),
        "joint risk, affine fold into all": folded(along(path), None),
        "the same, fitted under interchange": folded(along(path), None, interventions=FITTED),
        "compensating, fitted under interchange": lambda size, p: mixed[size],
        "compensating, fitted under the same p": lambda size, p: same[p][size],
        "the same, refitted under the same p": refitted,
        "compensating, maps of 16 draws of the same p": lambda size, p: tls.constants.neighbours(
            model,
            tls.constants.reduced(model, same[p][size].circuit, values),
            train,
            nearest=None,
            interventions=judged_under(p),
            draws=16,
            seed=seed,
        ),
    }


def disagreement(model: Any, reduction: Reduction, test: tls.Examples, probability: float) -> float:
    """The share of test digits and draws for which the two models answer differently."""

    def compare(original: Tensor, reduced: Tensor, batch: tls.Examples) -> Tensor:
        return (original.argmax(1) != reduced.argmax(1)).double()

    under = tls.InterventionDistribution.interchange(probability)
    found = [compared(model, reduction, test, compare, interventions=under, seed=draw) for draw in range(DRAWS)]
    return sum(float(moments.mean) for moments in found) / DRAWS


def hidden(model: Perceptron, examples: tls.Examples) -> Tensor:
    """The last hidden layer's values, ``[examples, WIDTH]``."""
    with torch.no_grad():
        return model.second(model.first(examples.tokens).relu()).relu()


@torch.no_grad()
def exchanged(
    model: Perceptron, values: Tensor, kept: Tensor, p: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """One draw for each row: another row, which kept units it gives, the kept units' values, the original's logits."""
    other = values[torch.randperm(len(values), generator=generator)]
    given = torch.rand(values.shape, generator=generator).lt(p) & kept
    mixed = torch.where(given, other, values)
    return other, given, mixed[:, kept], model.last(mixed)


def readout(model: Perceptron, train: tls.Examples, kept: Tensor, p: float, seed: int) -> torch.nn.Linear:
    """A linear readout of the kept units, trained to answer as the original does under the probability."""
    values, generator = hidden(model, train), torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(int(kept.sum()), 10)
    with torch.no_grad():
        linear.weight.copy_(model.last.weight[:, kept])
        linear.bias.copy_(model.last.bias + model.last.weight[:, ~kept] @ values[:, ~kept].mean(0))
    optimizer = torch.optim.Adam(linear.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        rows = values[torch.randint(len(values), (256,), generator=generator)]
        _, _, visible, logits = exchanged(model, rows, kept, p if step % 4 else 0.0, generator)
        loss = torch.nn.functional.kl_div(linear(visible).log_softmax(1), logits.softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return linear


def limits(
    model: Perceptron, train: tls.Examples, test: tls.Examples, kept: Tensor, p: float, seed: int
) -> dict[str, float]:
    """Disagreement of the trained readout, and the bound for every function of the kept units.

    The bound: exchange the two digits, and every choice among the units in which they differ; the kept units have the
    same values as before. Where the original then answers differently, no function of them is right both times, and at
    least the less probable of the two is lost.
    """
    values, linear = hidden(model, test), readout(model, train, kept, p, seed)
    generator = torch.Generator().manual_seed(seed)
    wrong, lost = 0.0, 0.0
    for _ in range(DRAWS):
        other, given, visible, logits = exchanged(model, values, kept, p, generator)
        differ = (values != other) & kept
        back = torch.where(kept, torch.where(given, other, values), other)
        with torch.no_grad():
            conflict = model.last(back).argmax(1) != logits.argmax(1)
            wrong += float((linear(visible).argmax(1) != logits.argmax(1)).double().mean())
        odds = ((differ & ~given).sum(1) - (differ & given).sum(1)).abs() * torch.tensor((1 - p) / p).log()
        lost += float((conflict * torch.sigmoid(-odds)).double().mean())
    return {
        "limit: the same units, a readout trained for long": wrong / DRAWS,
        "limit: the same units, any function": lost / DRAWS,
    }


def rows(seed: int) -> list[dict[str, Any]]:
    train, test = data(seed)
    model = trained(train, seed)
    units = tls.Units((tls.Site(kind="neuron", layer=1, hook="hook_hidden", size=WIDTH),))
    found: list[dict[str, Any]] = []
    every = methods(model, train, units, seed)
    for name, at in every.items():
        for size in SIZES:
            for p in PROBABILITIES:
                share = disagreement(model, at(size, p), test, p)
                found.append({"method": name, "seed": seed, "kept": size, "probability": p, "disagreement": share})
        print(f"seed {seed}: {name}", flush=True)
    for size in SIZES:
        for p in PROBABILITIES:
            kept = every["compensating, fitted under the same p"](size, p).circuit.mask
            for name, share in limits(model, train, test, kept, p, seed).items():
                found.append({"method": name, "seed": seed, "kept": size, "probability": p, "disagreement": share})
    print(f"seed {seed}: limits", flush=True)
    return found


def markdown(frame: pd.DataFrame) -> str:
    """One row a method and probability, one column a size: the mean over seeds."""
    lines: list[list[str]] = []
    for p in PROBABILITIES:
        for method in dict.fromkeys(frame.method):
            part = frame[(frame.method == method) & (frame.probability == p)]
            cells = [f"{part[part.kept == size].disagreement.mean():.4f}" for size in SIZES]
            lines.append([str(p), method, *cells])
    return table_of(["p", "order, replacement", *(f"{size} kept" for size in SIZES)], lines)


def main() -> None:
    arguments = parser(__doc__, seeds=3).parse_args()
    frame = pd.DataFrame([row for seed in range(arguments.seeds) for row in rows(seed)])
    write("perceptron", frame, {"perceptron": markdown})


if __name__ == "__main__":
    main()
