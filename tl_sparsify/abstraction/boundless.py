"""Boundless DAS: how many directions carry a variable, learnt with the directions themselves.

A rotation of the whole activation is trained, and with it how many of its first coordinates are interchanged: the
boundary is soft at first and hard at the end (Wu, Geiger, Icard, Potts and Goodman, *Interpretability at Scale:
Identifying Causal Mechanisms in Alpaca*, 2023, arXiv 2305.08809). Each coordinate has a price, so that no more are
taken than the variable needs.

A rotation has many parameters, and may fit what is not there. So the same is trained, with as many parameters, on a
variable that does not exist and in a model that has learnt nothing, and all is judged on other pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformer_lens.tools.analysis.interchange import collect_activations, fit_das, run_with_intervention

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.certificates import confidence_sequence
from tl_sparsify.abstraction.controls import made_up, random_weights
from tl_sparsify.abstraction.das import asked
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, answers, right_answers
from tl_sparsify.core.basis import directions
from tl_sparsify.core.forward import check_model, frozen
from tl_sparsify.core.intervene import intervened
from tl_sparsify.core.units import Model, Unit

VARIABLE, NO_VARIABLE, UNTRAINED = "the variable", "a random variable", "random weights"
_PAIRS = 32  # for each step
_RATE, _BOUNDARY_RATE = 1e-2, 5e-3  # of Adam: of the rotation, and of the boundary as a share of the width
_LAST = 0.1  # of a coordinate: how soft the boundary is in the end


@dataclass(frozen=True)
class LearntRow:
    """One training, judged.

    Attributes:
        method: ``boundless``, or ``DAS`` (TransformerLens's) at the rank that boundless DAS found for the variable.
        on: ``the variable``; or a control: ``a random variable`` (each source has an answer of its own, drawn at
            random) or ``random weights`` (the variable, in an untrained model).
        rank: directions that are interchanged.
        fitted: interchange accuracy on the pairs trained on.
        accuracy: the same on held-out pairs.
        changed: that on the ones of these whose answer should change.
        lower, upper: a confidence sequence for ``accuracy``.
        parameters: numbers trained.

    Example:
        >>> found = tls.boundless_das(
        ...     model, task.causal_model, "left", pairs, pairs, hook="blocks.0.hook_resid_post", position=1, epochs=1
        ... )
        >>> found.row("boundless", "the variable").parameters
        4097
    """

    method: str
    on: str
    rank: int
    fitted: float
    accuracy: float
    changed: float
    lower: float
    upper: float
    parameters: int


@dataclass(frozen=True)
class BoundlessResult:
    """The directions that boundless DAS found, beside DAS and the controls of both.

    Attributes:
        alignment: the variable, aligned with the directions found.
        rows: a line for each training.

    Example:
        >>> found = tls.boundless_das(
        ...     model, task.causal_model, "left", pairs, pairs, hook="blocks.0.hook_resid_post", position=1, epochs=1
        ... )
        >>> found.to_frame()["method"].tolist()
        ['boundless', 'boundless', 'boundless', 'DAS', 'DAS', 'DAS']
    """

    alignment: Alignment
    rows: tuple[LearntRow, ...]

    def row(self, method: str, on: str) -> LearntRow:
        """One line; a ``KeyError`` names what there is."""
        for row in self.rows:
            if (row.method, row.on) == (method, on):
                return row
        raise KeyError(f"no {method!r} on {on!r}; there is {[(r.method, r.on) for r in self.rows]}")

    def to_frame(self) -> pd.DataFrame:
        """One row a training; the columns are :class:`LearntRow`'s attributes."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        best, *controls = (self.row("boundless", on) for on in (VARIABLE, NO_VARIABLE, UNTRAINED))
        beside = ", ".join(f"{row.on} {row.accuracy:.3f}" for row in controls)
        return f"BoundlessResult({best.rank} directions, accuracy {best.accuracy:.3f}; {beside})"


@checked
def boundless_das(
    model: Model,
    causal_model: CausalModel,
    variable: str,
    pairs: Pairs,
    held_out: Pairs,
    *,
    hook: str,
    position: int | None = None,
    epochs: int = 40,
    price: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> BoundlessResult:
    """Learn which directions of an activation carry a variable, and how many, beside DAS and controls of both.

    Args:
        pairs: what is trained on; those that the model answers right on both inputs count.
        held_out: other pairs, on which all is judged.
        hook: where, such as ``blocks.3.hook_resid_post``.
        position: at which position; not given where the activation has no positions.
        epochs: passes over the pairs, over which the boundary hardens.
        price: of interchanging every coordinate, nats; a tenth of the coordinates costs a tenth of it.

    Cost: six trainings (boundless and DAS, on the variable and two controls), each ``epochs`` forward and backward
    passes over the pairs and one forward pass over their sources; two forward passes over both kinds of pairs to judge
    each. A rotation of an activation of width ``d`` has ``d * d`` parameters, and its exponential takes ``d ** 3``
    operations a step.

    Raises:
        ValueError: a model in training mode, a variable or hook point that there is not, a variable whose interchange
            changes no answer, fewer than four pairs that the model answers right, no epochs, a negative price.

    Example:
        >>> found = tls.boundless_das(
        ...     model, task.causal_model, "left", pairs, task.pairs(64, seed=1), hook="blocks.0.hook_resid_post",
        ...     position=1, epochs=1,
        ... )
        >>> found.alignment.variables
        ('left',)
    """
    check_model(model)
    check_count("epochs", epochs)
    if not price >= 0:
        raise ValueError(f"price is {price}; it must not be negative")
    if variable not in causal_model.variables:
        raise ValueError(f"variable is {variable!r}; there are {', '.join(causal_model.variables)}")
    if hook not in model.hook_dict:
        raise ValueError(f"the model has no hook point {hook!r}")
    original = TestedModel("original", model)
    train, test = (
        _right(original, some, name, batch_size) for some, name in ((pairs, "pairs"), (held_out, "held_out"))
    )
    wishes = [some.expected(causal_model, (variable,)) for some in (train, test)]
    if bool((wishes[0] == right_answers(train.base)).all()):
        raise ValueError(f"interchanging {variable!r} changes the answer of no pair: give pairs in which it does")
    random = [made_up(some, seed) for some in (train, test)]
    untrained = TestedModel("random weights", random_weights(model, seed), untrained=True)
    rows: list[LearntRow] = []
    chosen: list[Unit] = []
    for method in ("boundless", "DAS"):
        for on, subject, wanted in (
            (VARIABLE, original, wishes),
            (NO_VARIABLE, original, random),
            (UNTRAINED, untrained, wishes),
        ):
            trial = _Trial(subject.model, train, wanted[0], hook, position, epochs, seed)
            basis, parameters = _boundless(trial, price) if method == "boundless" else _das(trial, rows[0].rank)
            units = _units(subject.model, hook, position, basis)
            chosen = chosen or units
            hits = [
                _hits(subject, some, units, wish, batch_size) for some, wish in zip((train, test), wanted, strict=True)
            ]
            lower, upper = confidence_sequence(hits[1])
            changed = wanted[1] != right_answers(test.base)
            rows.append(
                LearntRow(
                    method,
                    on,
                    basis.shape[1],
                    float(hits[0].mean()),
                    float(hits[1].mean()),
                    float(hits[1][changed].mean()),
                    float(lower[-1]),
                    float(upper[-1]),
                    parameters,
                )
            )
    return BoundlessResult(Alignment({variable: chosen}), tuple(rows))


def _right(subject: TestedModel, pairs: Pairs, name: str, batch_size: int | None) -> Pairs:
    """The pairs that the model answers right on both inputs."""
    [base], [source] = (answers(subject, side, batch_size=batch_size) for side in (pairs.base, pairs.source))
    right = ((base == right_answers(pairs.base)) & (source == right_answers(pairs.source))).nonzero().flatten()
    if len(right) < 4:
        raise ValueError(
            f"the model answers {len(right)} of {len(pairs)} {name} right on both inputs: nothing to learn"
        )
    return pairs[right]


def _hits(
    subject: TestedModel, pairs: Pairs, units: list[Unit], expected: Int[Tensor, "n"], batch_size: int | None
) -> Float[Tensor, "n"]:
    """Whether each answer is the expected one, with the units from the source."""
    [given] = answers(subject, pairs.base, [[(units, pairs.source)]], batch_size=batch_size)
    return (given == expected).double()


def _units(model: Any, hook: str, position: int | None, basis: Float[Tensor, "width rank"]) -> list[Unit]:
    """The directions as units."""
    found = directions(model, hook, basis)
    return list(found if position is None else found.at(position))


@dataclass(frozen=True, eq=False)
class _Trial:
    """What is trained on, and where."""

    model: Any
    pairs: Pairs
    expected: Int[Tensor, "n"]
    hook: str
    position: int | None
    epochs: int
    seed: int

    @property
    def places(self) -> Int[Tensor, "n"] | None:
        """The position of each pair."""
        return None if self.position is None else torch.full((len(self.pairs),), self.position)


class _Rotation(nn.Module):
    """A rotation, of which the coordinates up to a boundary are interchanged."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.turned = orthogonal(nn.Linear(width, width, bias=False))
        self.width = width
        self.boundary = nn.Parameter(torch.tensor(0.5))  # as a share of the width

    @property
    def basis(self) -> Float[Tensor, "width width"]:
        """A direction in each column."""
        return cast(Tensor, self.turned.weight)

    def share(self, softness: float) -> Float[Tensor, "width"]:
        """How far each coordinate is interchanged; ``softness`` in coordinates."""
        place = torch.arange(self.width, device=self.boundary.device) + 0.5
        return ((self.boundary * self.width - place) / softness).sigmoid()


def _boundless(trial: _Trial, price: float) -> tuple[Float[Tensor, "width rank"], int]:
    """The directions within the boundary, at least one, and the number of parameters."""
    n, places = len(trial.pairs), trial.places
    targets, task_logits = asked(trial.model, trial.pairs, trial.expected)
    with intervened(trial.model):
        taken = collect_activations(trial.model, trial.hook, torch.arange(n, 2 * n), task_logits, positions=places)
    width = taken.shape[1]
    # half precision has no exponential of a matrix, and rounds small steps away
    rotation = _Rotation(width, trial.seed).to(torch.promote_types(taken.dtype, torch.float32))
    optimizer = torch.optim.Adam(
        [
            {"params": rotation.turned.parameters(), "lr": _RATE},
            {"params": [rotation.boundary], "lr": _BOUNDARY_RATE},
        ]
    )
    steps = [part for e in range(trial.epochs) for part in _random.permutation(n, trial.seed, 81, e).split(_PAIRS)]
    with frozen(trial.model), torch.enable_grad():
        for number, index in enumerate(steps):
            first = max(width / 10, 2 * _LAST)
            share = rotation.share(first * (_LAST / first) ** (number / max(1, len(steps) - 1)))
            step = _interchange(rotation.basis, share)
            where = None if places is None else places[index]
            logits = run_with_intervention(
                trial.model, trial.hook, step, index, taken[index], task_logits, positions=where
            )
            loss = nn.functional.cross_entropy(logits, targets[index].to(logits.device))
            optimizer.zero_grad()
            (loss + price * rotation.boundary.to(loss.device)).backward()
            optimizer.step()
            with torch.no_grad():
                rotation.boundary.clamp_(1 / width, 1.0)
    rank = max(1, min(width, math.floor(float(rotation.boundary.detach()) * width + 0.5)))
    return rotation.basis.detach()[:, :rank].cpu(), width * width + 1


def _interchange(
    basis: Float[Tensor, "width width"], share: Float[Tensor, "width"]
) -> Callable[[Tensor, Tensor], Tensor]:
    """What TransformerLens calls: base and source activations to the base's, each coordinate moved by its share."""

    def step(base: Float[Tensor, "some width"], source: Float[Tensor, "some width"]) -> Float[Tensor, "some width"]:
        turned = basis.to(base)
        return base + (((source - base) @ turned) * share.to(base)) @ turned.T

    return step


def _das(trial: _Trial, rank: int) -> tuple[Float[Tensor, "width rank"], int]:
    """TransformerLens's DAS at a rank, and the number of parameters."""
    n, places = len(trial.pairs), trial.places
    targets, task_logits = asked(trial.model, trial.pairs, trial.expected)
    with intervened(trial.model):
        result = fit_das(
            trial.model,
            trial.hook,
            torch.arange(n),
            torch.arange(n, 2 * n),
            targets,
            task_logits,
            rank=rank,
            base_positions=places,
            source_positions=places,
            epochs=trial.epochs,
            batch_size=_PAIRS,
            seed=trial.seed,
        )
    basis = result.basis.detach().cpu()
    return basis, basis.numel()
