"""The plan of a run: what is asked for, how much work that is, and about how long it takes.

``effort`` chooses numbers of examples, rounds and refit steps; a model of more than 20 million parameters gets fewer.
Numbers that are given stand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tl_sparsify.abstraction.controls import streams
from tl_sparsify.core.circuit import FIRST_TOKENS, FirstToken, Values
from tl_sparsify.core.edges import edges
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batch_size_for, frozen
from tl_sparsify.core.intervene import Intervention, intervened
from tl_sparsify.core.memory import device_of
from tl_sparsify.core.metrics import most_answers
from tl_sparsify.core.probes import vectors_of
from tl_sparsify.core.units import Units, attentions, experts, heads, mlps, neurons
from tl_sparsify.search import constants

BESIDE_BATCH = 128  # examples in a step of the refits for baselines.csv
PROBES, TEMPERATURE = 4, 3.0
LARGEST_SEED = 2**31 - 1
_LARGE = 20_000_000  # parameters
_REFIT_BATCH = 512
_FEW = 32  # examples at a time of a large model
_VALIDATED = 12  # passes over the validation examples in a refit
_INNER = 15  # the last refit has so many times the steps of those in the search
_WOVEN, _OFFERED = 5, 1.5  # of a path that is sharpened: circuits measured, and exchanges offered, for each round
_EXPANSIONS = 1.8  # for each round: exchanges, and rounds of which half is taken back, need their own
_PATIENT = 4  # a refit has converged after about so many times its patience
_ALIGNING = 30  # passes over the pairs
_EVALUATING = 9  # over the test examples
_LITTLE = 4  # examples in the smaller of two batches that are timed
_TIMES, _MOMENT = 5, 1.0  # a pass is timed so often, while that takes no more seconds
_KINDS: Mapping[str, Callable[[Any], Units]] = {
    "heads": heads,
    "neurons": neurons,
    "attentions": attentions,
    "mlps": mlps,
    "experts": experts,
    "edges": edges,
}
_SHARPENED = 20  # passes over the training examples
_INSIDE = {"neurons": "mlps", "experts": "mlps", "heads": "attentions"}


@dataclass(frozen=True)
class Effort:
    """How much work a run does.

    Attributes:
        train, validation, test: the most examples of each split; all where ``None``.
        pairs: for verification; as many again are searched for the variables.
        rounds: of removing units.
        per_round: training examples in each of them; all where ``None``.
        probes: for each example, in scores and search.
        exchanged: of a path that is sharpened, units on either side of its exchanges (:func:`sharpen`).
        steps, inner: of the last refit, and of those within the search. The package's own where ``None``.
        patience, most: of the refits of the circuits that are compared (:func:`refit_until_converged`), in steps.
        batch_size: examples at a time; the package's own where ``None``.
    """

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    pairs: int = 512
    rounds: int = 20
    per_round: int | None = None
    probes: int = PROBES
    exchanged: int = 2
    steps: int | None = None
    inner: int | None = None
    patience: int = 300
    most: int = 6000
    batch_size: int | None = None

    @property
    def refit_batch(self) -> int:
        """Examples in a step of a refit."""
        return min(_REFIT_BATCH, self.batch_size or _REFIT_BATCH)

    @property
    def beside_batch(self) -> int:
        """The same for other orders, and for a mask."""
        return min(BESIDE_BATCH, self.refit_batch)

    def sharpening(self, train: int) -> int:
        """Steps of the masks that sharpen a path: half as many backward passes as a search takes at most, and no more
        than 20 over all training examples."""
        searched = (self.rounds + self.rounds // 2) * (self.probes + 1) * min(train, self.per_round or train)
        return math.ceil(min(searched / 2, _SHARPENED * train) / min(self.beside_batch, train))


_SMALL = {
    "quick": Effort(256, 128, 256, 128, rounds=10, steps=100, inner=6, patience=60),
    "standard": Effort(),
    "thorough": Effort(rounds=40, steps=600, inner=40, patience=600, most=12_000),
}
# At equal cost many examples with one probe give a better path than few with four, and fresh ones in each round than
# always the same.
_large = partial(Effort, probes=1, batch_size=_FEW)
_OF_LARGE = {
    "quick": _large(192, 24, 64, 32, rounds=10, per_round=48, exchanged=1, steps=20, inner=0, patience=5, most=5),
    "standard": _large(512, 64, 256, 128, per_round=128, steps=100, inner=4, patience=20, most=100),
    "thorough": _large(1024, 256, 512, 256, per_round=256, steps=300, inner=20, patience=50, most=500),
}
EFFORTS = tuple(_SMALL)


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        keep: the fraction of units to keep and to fold.
        kinds: of units, with commas between.
        effort: ``quick``, ``standard`` or ``thorough``.
        rounds, steps, examples, batch_size: instead of what ``effort`` chooses.
        aligning: look for the causal model's variables where the task does not say where they are.
        comparing: fit circuits of the same size in other orders.
        first_token: at which first tokens removed units are left alone: ``bos`` or ``none``.
        seed: of everything random.

    Raises:
        ValueError: an option that is out of range, with its name.
    """

    keep: float = 0.05
    kinds: str = "heads,neurons"
    effort: str = "standard"
    rounds: int | None = None
    steps: int | None = None
    examples: int | None = None
    batch_size: int | None = None
    aligning: bool = True
    comparing: bool = True
    first_token: str = "bos"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"--keep is {self.keep}; a fraction of the units must lie in (0, 1]")
        for name in ("rounds", "steps", "examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; at least one is needed")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"--seed is {self.seed}; it must lie in [0, {LARGEST_SEED}]")
        if self.first_token not in FIRST_TOKENS:
            raise ValueError(f"--first-token is {self.first_token!r}; it is one of {', '.join(FIRST_TOKENS)}")
        if self.first_token == "any":
            raise ValueError(
                "--first-token is 'any'; what removed units write at a first token that varies does not fold: name bos "
                "or none, or call sparsify"
            )
        if self.effort not in EFFORTS:
            raise ValueError(f"--effort is {self.effort!r}; it is one of {', '.join(EFFORTS)}")
        chosen = self.chosen
        for name in chosen:
            if name not in _KINDS:
                raise ValueError(f"--units has {name!r}; the kinds are {', '.join(_KINDS)}")
            if _INSIDE.get(name) in chosen:
                raise ValueError(f"--units has {name} and {_INSIDE[name]}, which are made of them: name one of the two")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"--units is {self.kinds!r}; it names a kind twice")

    @property
    def sharpens(self) -> bool:
        """Whether all units are large (heads, layers, edges), so that a mask goes on from the search's order."""
        return "neurons" not in self.chosen

    @property
    def rule(self) -> FirstToken:
        """``first_token``."""
        return "none" if self.first_token == "none" else "bos"

    @property
    def chosen(self) -> list[str]:
        """The kinds of units."""
        return [name.strip() for name in self.kinds.split(",")]

    def units(self, model: Any) -> Units:
        """The units of these kinds."""
        first, *rest = (_KINDS[name](model) for name in self.chosen)
        return sum(rest, start=first)

    def effort_for(self, model: Any) -> Effort:
        """How much work, for a model of this size."""
        size = sum(parameter.numel() for parameter in model.parameters())
        effort = (_OF_LARGE if size > _LARGE else _SMALL)[self.effort]
        given: dict[str, Any] = {"rounds": self.rounds, "train": self.examples, "batch_size": self.batch_size}
        if self.steps is not None:
            given |= {
                "steps": self.steps,
                "patience": self.steps,
                "most": self.steps,
                "inner": max(1, round(self.steps / _INNER)),
            }
        return replace(effort, **{name: value for name, value in given.items() if value is not None})


def usable_device(name: str) -> torch.device:
    """The device of this name, on which a tensor has been put once.

    Raises:
        ValueError: there is none, or it does not work here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def cut(splits: tuple[Examples, Examples, Examples], effort: Effort) -> tuple[Examples, Examples, Examples]:
    """The first examples of each split, which are in random order."""
    train, validation, test = splits
    return train[: effort.train], validation[: effort.validation], test[: effort.test]


def seconds(
    model: Any,
    splits: tuple[Examples, Examples, Examples],
    units: Units,
    effort: Effort,
    *,
    aligns: bool,
    compares: bool,
    sharpens: bool = False,
    variables: int = 0,
) -> float:
    """About how long a run takes: the passes that it is made of, each at what one of its kind is measured to take.

    A pass takes a time of its own and one for each example: both are read off two batches, of a few examples and of as
    many as a step of a refit has, with all units ablated. The best of several times counts, and of passes that take
    seconds the first. A search is taken to make nearly all of the exchanges that it may; where masks sharpen its path
    it refits nothing. Verification is of an original and a reduced model, with five random draws and so many
    ``variables``.
    """
    train, validation, test = (len(split) for split in splits)
    forward, backward = _speeds(model, splits[0], units, effort)

    def over(n: int, backwards: int = 0, batch: int | None = None) -> float:
        """A pass over ``n`` examples, with so many backward passes."""
        size = batch or min(n, batch_size_for(model, splits[0], effort.batch_size, units if backwards else None))
        batches, each = math.ceil(n / size), (forward, *[backward] * backwards)
        return sum(one.alone * batches + one.example * n for one in each)

    def refit(steps: int, batch: int, validated: int = _VALIDATED) -> float:
        size = min(batch, train)
        return steps * over(size, 1, min(size, effort.batch_size or size)) + validated * over(validation)

    inner, last = 20 if effort.inner is None else effort.inner, effort.steps or 300
    total = over(train) + over(train, effort.probes)  # means and scores
    in_round = min(train, effort.per_round or train)
    answers = model.cfg.d_vocab if splits[0].choices is None else len(splits[0].choices)
    vectors = vectors_of(answers, effort.probes, most_answers(splits[0]))
    a_round = over(in_round, vectors) + over(validation, vectors)
    if sharpens:
        step = min(effort.beside_batch, train)
        total += effort.sharpening(train) * (over(step) + over(step, 1))
        offers = _OFFERED * ((effort.exchanged**2 + 3) * over(validation) + over(validation, 1))
        total += effort.rounds * (_WOVEN * over(validation) + (offers if effort.exchanged else 0))
    elif inner:
        a_round += refit(inner, effort.refit_batch)
    total += 2 * over(train) + _EXPANSIONS * effort.rounds * a_round
    total += 2 * over(train) + refit(last, effort.refit_batch) + _EVALUATING * over(test)
    if compares:
        steps = min(effort.most, _PATIENT * effort.patience)
        often = max(1, min(effort.most, effort.patience) // 10)  # steps between two looks at validation examples
        one = refit(steps, effort.beside_batch, math.ceil(steps / often))
        falling = max(1, min(effort.patience, effort.most) // 2)  # steps in which the learning rate falls
        one += refit(falling, effort.beside_batch, min(falling, 10))
        total += 2 * over(train) + 4 * (one + 2 * over(test)) + over(test)
    verifying = 2 * (13 + variables * (7 + len(streams(model)))) + 2 * variables + 12
    return total + (verifying + _ALIGNING * aligns) * over(effort.pairs)


@dataclass(frozen=True)
class _Speed:
    """Seconds of a pass: those of its own, and of each example."""

    alone: float
    example: float

    @staticmethod
    def of(few: tuple[int, float], many: tuple[int, float]) -> _Speed:
        """From the seconds of two passes, over so many examples."""
        (small, short), (large, long) = few, many
        example = max(0.0, long - short) / (large - small) if large > small else long / large
        return _Speed(max(0.0, long - example * large), example)


def _speeds(model: Any, examples: Examples, units: Units, effort: Effort) -> tuple[_Speed, _Speed]:
    """Of a forward and of a backward pass with all units ablated."""
    zero = constants.zero(model, examples, units)
    ahead: list[tuple[int, float]] = []
    back: list[tuple[int, float]] = []
    for size in (_LITTLE, effort.refit_batch):
        index = torch.arange(min(size, len(examples)), device="cpu")
        batch = examples[: len(index)]
        spot = units.for_examples(index, examples.spans)
        values = Values(spot, tuple(value.clone().requires_grad_() for value in zero.tensors))
        ablation = Intervention(spot, torch.zeros(len(units)), values)

        def run(backward: bool, batch: Examples = batch, ablation: Intervention = ablation) -> None:
            with frozen(model), torch.set_grad_enabled(backward), intervened(model, ablation):
                logits = answer_logits(model, batch)
            if backward:
                torch.autograd.grad(logits.sum(), ablation.values.tensors, allow_unused=True)
            _wait(model)

        if size == _LITTLE:
            run(True)  # the first pass of all makes what later ones find
        alone = _best(partial(run, False))
        ahead.append((len(batch), alone))
        back.append((len(batch), max(0.0, _best(partial(run, True)) - alone)))
    return _Speed.of(*ahead), _Speed.of(*back)


def _best(run: Callable[[], None]) -> float:
    """Seconds of the fastest of several runs, of as many as take no longer than a moment."""
    times: list[float] = []
    while len(times) < _TIMES and sum(times) < _MOMENT:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(model: Any) -> None:
    if device_of(model).type == "cuda":
        torch.cuda.synchronize()
