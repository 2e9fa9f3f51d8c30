"""Methods: what the benchmark compares, by name, each with the settings among which validation chooses.

Ours run with their defaults, and once with more rounds. Every other method gets at least as many passes over the data
as ``sparsify`` takes (about 27 forward and 100 backward), by iterating it (at most once for each unit) or by exact
patching where it is cheaper than that, and its setting is chosen on validation examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tl_sparsify.comparison import baselines
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search import score
from tl_sparsify.search.compensating import sparsify_affine
from tl_sparsify.search.joint import sparsify
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

_ROUNDS = 42  # of two forward passes and one backward pass: as many passes as sparsify takes
_SIZES = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03)  # of the compensating search

Scorer = Callable[..., Scores | CircuitPath]
"""``(model, examples, units, *, seed, ...)``; it gets ``values``, ``held_out`` and ``progress`` if it takes them."""


@dataclass(frozen=True)
class Method:
    """A method under comparison.

    Attributes:
        name: in tables.
        settings: functions of one signature by the name of their setting; validation chooses where there are several.
        signed: whether its scores have signs that mean something; the order by their size is then another setting.
        ours: whether it is this package's own; figures and tables set these apart from what they are held against.
        refuses: whether it is for some units or models only. A comparison then leaves out the settings that raise a
            ``ValueError``, and where all do its line says why; other methods' errors end the comparison.

    Example:
        >>> tls.Method("random order", {"default": tls.baselines.random})
        Method(name='random order', ...)
    """

    name: str
    settings: Mapping[str, Scorer]
    signed: bool = False
    ours: bool = False
    refuses: bool = False

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError(f"settings of method {self.name!r} is empty: give at least one function")

    @staticmethod
    def of(method: Method | Scorer) -> Method:
        """A method as it is, or one of a single function, under the function's name."""
        if isinstance(method, Method):
            return method
        inner = method.func if isinstance(method, partial) else method
        return Method(getattr(inner, "__name__", type(inner).__name__).replace("_", " "), {"default": method})


def run(scorer: Scorer, model: Model, train: Examples, units: Units, seed: int, **given: Any) -> Scores | CircuitPath:
    """Call a scorer with those of ``given`` that it takes, and that are not already fixed in it."""
    fixed = scorer.keywords if isinstance(scorer, partial) else {}
    known = inspect.signature(scorer).parameters
    taken = {name: value for name, value in given.items() if name in known and name not in fixed}
    return scorer(model, train, units, seed=seed, **taken)


def _rounds(scorer: Callable[..., Scores], rounds: int = _ROUNDS, **settings: Any) -> Scorer:
    return partial(baselines.in_rounds, scorer, rounds=rounds, **settings)


def _edges(scorer: Callable[..., Scores], rounds: int) -> dict[str, Scorer]:
    one_shot = {reduce: partial(scorer, reduce=reduce) for reduce in ("sum", "max")}
    return one_shot | {f"{reduce}, in rounds": _rounds(scorer, rounds, reduce=reduce) for reduce in ("sum", "max")}


def _other_gradients(backward: Literal["gim", "relp"]) -> dict[str, Scorer]:
    """Attribution to units, and by edges, with another backward pass."""
    found = {
        "one shot": partial(baselines.attribution_patching, backward=backward),
        "in rounds": _rounds(baselines.attribution_patching, absolute=True, backward=backward),
    }
    return found | {"by edges, in rounds": _rounds(baselines.eap, backward=backward)}


METHODS: tuple[Method, ...] = (
    Method("joint risk", {"default": partial(sparsify, held_out=None)}, ours=True),
    Method("joint risk, 60 rounds", {"default": partial(sparsify, rounds=60, held_out=None)}, ours=True),
    Method("joint risk, refitted inside", {"default": sparsify}, ours=True),
    Method("compensating", {"default": partial(sparsify_affine, sizes=_SIZES)}, ours=True),
    Method(
        "risk",
        {
            "T = 1": score.risk,
            "T = 3": partial(score.risk, temperature=3.0),
            "in rounds": _rounds(score.risk, 32, temperature=3.0),
        },
    ),
    Method(
        "activation patching",
        {
            "noising": partial(baselines.activation_patching, direction="noising"),
            "denoising": partial(baselines.activation_patching, direction="denoising"),
        },
        signed=True,
        refuses=True,
    ),
    Method(
        "attribution patching",
        {
            "one shot": baselines.attribution_patching,
            "in rounds": _rounds(baselines.attribution_patching, absolute=True),
            "to the mean, in rounds": _rounds(score.gradient, absolute=True),
        },
        signed=True,
    ),
    Method(
        "AtP*",
        {"one shot": baselines.atp_star, "in rounds": _rounds(baselines.atp_star, 19)},  # 7 passes and more each
        refuses=True,
    ),
    Method(
        "second order",
        {
            "joint": baselines.second_order,
            "alone": partial(baselines.second_order, direction="alone"),
            "joint, in rounds": _rounds(baselines.second_order, absolute=True),
        },
        signed=True,
    ),
    Method("attribution, GIM", _other_gradients("gim"), signed=True, refuses=True),
    Method("attribution, RelP", _other_gradients("relp"), signed=True, refuses=True),
    Method("edge attribution", _edges(baselines.eap, _ROUNDS), refuses=True),
    Method("edge attribution, integrated", _edges(baselines.eap_ig, 12), refuses=True),
    Method("exact, zero", {"default": baselines.exact_zero}),
    Method("exact, mean", {"default": baselines.exact_mean}),
    Method(
        "hard-concrete mask",
        {
            f"penalty {penalty:g}": partial(baselines.hard_concrete, penalty=penalty, per_step=64)
            for penalty in (2.0, 10.0)
        },
    ),
    Method(
        "top-k mask",
        {
            f"temperature {temperature:g}": partial(baselines.top_k_gate, temperature=temperature, per_step=64)
            for temperature in (0.2, 0.5)
        },
    ),
    Method(
        "information-bottleneck mask",
        {f"beta {beta:g}": partial(baselines.information_bottleneck, beta=beta, per_step=64) for beta in (1.0, 10.0)},
    ),
    Method(
        "activation norm", {"one shot": baselines.activation_norm, "in rounds": _rounds(baselines.activation_norm, 126)}
    ),
    Method("variance", {"one shot": score.variance, "in rounds": _rounds(score.variance, 63)}),
    Method("scaled variance", {"one shot": score.scaled_variance, "in rounds": _rounds(score.scaled_variance, 63)}),
    Method("random", {"default": baselines.random}),
)


BENCH_TASKS = (
    "hierarchical_equality",
    "balanced_brackets",
    "planted_backup",
    "planted_equality",
    "planted_gate",
    "tracr_sort",
)
"""What ``tl-sparsify bench`` runs where no task is named."""
BENCH_FOLDER = "results/bench"
SMOKE_TASKS = ("planted_backup",)
SMOKE_METHODS = ("joint risk", "attribution patching", "variance", "random")


def named(names: Sequence[str] = ()) -> tuple[Method, ...]:
    """The benchmark's methods of these names, all where none is given.

    Raises:
        ValueError: an unknown name.
    """
    known = {method.name: method for method in METHODS}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; the methods are: {', '.join(known)}")
    return METHODS if not names else tuple(known[name] for name in dict.fromkeys(names))
