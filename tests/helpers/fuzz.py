"""Bad calls, drawn at random: every public function with one argument that it cannot take, and what came of it."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import tl_sparsify as tls
from helpers.mixtures import mixture
from helpers.models import bridge, examples, fresh, random_mask, random_values, reduction_of, units_of
from tl_sparsify import Circuit, Examples, baselines, certificates, constants, curvature, pairing, score
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit, Units

SECONDS = 20
"""A call that takes longer never ends."""
PACKAGE = str(Path(tls.__file__).parent)
NAN, INF = float("nan"), float("inf")


def elsewhere() -> Units:
    """Units that the model does not have."""
    return Units((Site("neuron", 0, "blocks.0.mlp.hook_post", 99),))


@cache
def pool(kind: str) -> list[Any]:
    """What no argument of a kind may be."""
    wrong: list[Any] = ["text", [1, 2], {"a": 1}, 1.5, torch.ones(3), pd.DataFrame({"a": [1]}), SimpleNamespace(), b"x"]
    wordy = [value for value in wrong if not isinstance(value, float)]
    data = examples(4)
    training = fresh()
    training.train()
    pools: dict[str, list[Any]] = {
        "model": [*wrong, None, nn.Linear(2, 2), object, training],
        "examples": [*wrong, None, (data.tokens, data.labels), replaced(data)],
        "answers": [*wrong, None, (data.tokens, data.labels), replaced(data), chosen(data)],
        "none": [],
        "distance": [*wordy, -1.0, NAN, "0.5", 1j, None],
        "loaded": [*wrong, None, nn.Linear(2, 2), object],
        "module": [*wrong, None, object],
        "made": [*wrong, None, random_values(units_of(bridge())), units_of(bridge())],
        "draws": [*wrong[:5], -1, -5, 10**20, INF, NAN, True, [4], "8"],
        "positions": [(), [], 1.5, [1.5], True, {}, b"x", slice(0.5, 2), torch.tensor([0.5]), "", object()],
        "units": [*wrong, None, ["L0H0"], "L0H0", elsewhere(), Circuit.full(units_of(bridge()))],
        "reduction": [*wrong, None, random_values(units_of(bridge())), units_of(bridge()), foreign()],
        "circuit": [*wrong, None, torch.ones(14, dtype=torch.bool), ["L0H0"], Circuit.full(elsewhere())],
        "values": [*wrong, random_values(elsewhere())],
        "seed": [1.5, "0", NAN, None, [0], np.random.default_rng(0), torch.Generator(), 2**70, True, {}],
        "count": [*wrong[:5], 0, -1, -5, 10**20, INF, NAN, True, [4], np.array([2, 3]), "8"],
        "size": [*wrong[:5], 0, -1, INF, NAN, True, [4], "8"],
        "positive": [
            *(w for w in wrong if not isinstance(w, float)),
            -1.0,
            NAN,
            INF,
            -INF,
            True,
            [0.5],
            "0.5",
            1j,
            None,
        ],
        "fraction": [
            *(w for w in wrong if not isinstance(w, float)),
            -0.5,
            1.5,
            NAN,
            INF,
            True,
            "half",
            [0.5],
            1j,
            None,
        ],
        "sizes": ["half", 0.5, (), [], [NAN], [2.0], [-0.1], [0.1, 0.5], [True], ["a"], np.array([0.5]), {}],
        "choice": ["nonsense", 3, 1.5, ["mean"], {}, b"x", True],
        "flag": ["yes", 2.5, [True], {}, "", 3],
        "metric": ["log_odds", 3, [1], {}, lambda a, b: 1.0, lambda a, b: a.sum(), lambda a, b: a[:, 0] * NAN],
        "interventions": ["interchange", 0.5, [0.1], {}, torch.ones(2)],
        "numbers": ["text", {}, object(), torch.ones(2, 2, 2), torch.full((14,), NAN), None],
    }
    return pools[kind]


def replaced(data: Examples) -> Examples:
    """Tokens that the model does not know."""
    return Examples(data.tokens.clone().fill_(99), data.labels)


def chosen(data: Examples) -> Examples:
    """Answers that it does not know."""
    return Examples(data.tokens, data.labels, choices=torch.arange(99))


def foreign() -> Any:
    """A reduction of another model."""
    return reduction_of(bridge(seed=3), seed=1)


@dataclass(frozen=True)
class Entry:
    """A public function, arguments that it takes, and the kinds of those that are thrown at it."""

    call: Callable[..., Any]
    good: dict[str, Any]
    kinds: dict[str, str | list[Any]]
    watched: Callable[[], Any] = bridge
    """The model that the call must leave as it was."""


def thrown_at(kind: str | list[Any]) -> list[Any]:
    """The bad values of a kind, or those that are given; ``units?``: units, or nothing."""
    if isinstance(kind, list):
        return kind
    return [value for value in pool(kind.removesuffix("?")) if value is not None or not kind.endswith("?")]


def entries() -> dict[str, Entry]:
    """The public functions by name, each with arguments that it takes."""
    model, data = bridge(), examples(4)
    units, reduction = units_of(model), reduction_of(model)
    three: dict[str, Any] = {"model": model, "examples": data, "units": units}
    kinds = {"model": "model", "examples": "examples", "units": "units", "seed": "seed", "batch_size": "size"}
    more = {"metric": "metric", "interventions": "interventions", "probes": "count", "temperature": "positive"}
    found: dict[str, Entry] = {}
    for name, extra in {
        "risk": more | {"values": "values", "examples": "answers"},
        "variance": {},
        "scaled_variance": {},
        "gradient": {"metric": "metric", "source": "choice", "values": "values", "examples": "answers"},
        "integrated": {"metric": "metric", "steps": "count"},
        "exact": {"metric": "metric", "progress": "flag", "interventions": "interventions"},
    }.items():
        found[f"score.{name}"] = Entry(getattr(score, name), three, kinds | extra)
    no_batch = {name: kind for name, kind in kinds.items() if name != "batch_size"}
    for name, extra in {
        "random": {"examples": "none", "units": "none", "model": "loaded"},
        "activation_norm": {"batch_size": "size"},
        "exact_zero": {"metric": "metric", "batch_size": "size"},
        "exact_mean": {"metric": "metric", "batch_size": "size"},
        "activation_patching": {"metric": "metric", "source": "choice", "direction": "choice"},
        "attribution_patching": {"metric": "metric", "source": "choice"},
        "eap": {"metric": "metric"},
        "eap_ig": {"metric": "metric", "steps": "count"},
        "hard_concrete": {"steps": "count", "learning_rate": "positive", "progress": "flag"},
        "information_bottleneck": {"steps": "count", "learning_rate": "positive"},
        "top_k_gate": {"steps": "count", "temperature": "positive", "smallest": "fraction"},
    }.items():
        found[f"baselines.{name}"] = Entry(getattr(baselines, name), three, no_batch | extra)
    scorer = {"scorer": score.variance} | three
    found["baselines.in_rounds"] = Entry(
        baselines.in_rounds, scorer, no_batch | {"rounds": "count", "smallest": "fraction"}
    )
    for name in ("mean", "zero"):
        found[f"constants.{name}"] = Entry(
            getattr(constants, name), three, {n: k for n, k in kinds.items() if n in three}
        )
    found["constants.newton"] = Entry(constants.newton, three, kinds | {"damping": "positive", "probes": "count"})
    found["constants.curvature_weighted"] = Entry(
        constants.curvature_weighted, three, kinds | {"temperature": "positive", "probes": "count"}
    )
    judged = {"model": model, "reduction": reduction, "examples": data}
    reducing = {"model": "model", "reduction": "reduction", "examples": "examples", "seed": "seed"}
    found["risk"] = Entry(tls.risk, judged, reducing | {"metric": "metric", "interventions": "interventions"})
    found["evaluate"] = Entry(
        tls.evaluate,
        judged,
        reducing | {"ablation": "choice", "probability": "fraction", "bootstrap": "draws", "batch_size": "size"},
    )
    found["polish"] = Entry(tls.polish, judged, reducing | {"metric": "metric"})
    found["constants.refit"] = Entry(
        constants.refit,
        {"model": model, "reduction": reduction, "train": data, "validation": data, "steps": 2, "progress": False},
        {"model": "model", "reduction": "reduction", "train": "examples", "validation": "examples", "steps": "count"}
        | {"learning_rate": "positive?", "seed": "seed", "batch_size": "size", "metric": "metric"},
    )
    found["constants.neighbours"] = Entry(
        constants.neighbours,
        {"model": model, "reduction": reduction, "train": data},
        {"model": "model", "reduction": "reduction", "train": "answers", "seed": "seed"}
        | {"ridge": "positive", "temperature": "positive"},
    )
    found["sparsify"] = Entry(
        tls.sparsify,
        {"model": model, "train": data, "units": units, "rounds": 2, "progress": False},
        {"model": "model", "train": "examples", "units": "units", "rounds": "count", "seed": "seed"}
        | {"smallest": "fraction", "sizes": "sizes", "metric": "metric", "batch_size": "size", "progress": "flag"},
    )
    found["sparsify_affine"] = Entry(
        tls.sparsify_affine,
        {"model": model, "train": data, "units": units, "sizes": (0.5,), "progress": False},
        {"model": "model", "train": "examples", "units": "units", "sizes": "sizes", "seed": "seed", "ridge": "positive"}
        | {"temperature": "positive", "probes": "count", "batch_size": "size"},
    )
    found["curvature.uniformity"] = Entry(curvature.uniformity, three, kinds)
    found["run_values"] = Entry(
        tls.run_values,
        {"model": model, "batch": data, "units": units},
        {"model": "model", "batch": "examples", "units": "units"},
    )
    found["fold"] = Entry(
        tls.fold, {"model": model, "reduction": reduction}, {"model": "model", "reduction": "reduction"}
    )
    found["ablate"] = Entry(tls.ablate, {"reduction": reduction}, {"reduction": "made"})
    found["interchange"] = Entry(
        tls.interchange,
        {"circuit": reduction.circuit, "source": reduction.values},
        {"circuit": "circuit", "source": "values"},
    )
    found["fingerprint"] = Entry(tls.fingerprint, {"model": model}, {"model": "module"})
    for family in ("heads", "neurons", "mlps", "attentions", "residuals"):
        found[family] = Entry(getattr(tls, family), {"model": model}, {"model": "loaded"})
    found["experts"] = Entry(tls.experts, {"model": mixture("Mixtral")}, {"model": "loaded"})
    found["Circuit"] = Entry(
        Circuit, {"units": units, "mask": random_mask(units)}, {"units": "units", "mask": "numbers"}
    )
    found["Reduction"] = Entry(
        tls.Reduction,
        {"circuit": reduction.circuit, "values": reduction.values},
        {"circuit": "circuit", "values": "values", "first_token": "choice"},
    )
    found["Intervention"] = Entry(
        tls.Intervention,
        {"units": units, "keep": torch.ones(14), "values": reduction.values},
        {"units": "units", "keep": "numbers", "values": "values"},
    )
    found["Scores.top"] = Entry(
        lambda size: score.variance(model, data, units).top(size), {"size": 0.5}, {"size": "fraction"}
    )
    found["Unit.at"] = Entry(lambda where: Unit(units.sites[0], 0).at(where), {"where": 0}, {"where": "positions"})
    found["InterventionDistribution.interchange"] = Entry(
        tls.InterventionDistribution.interchange, {"probability": 0.1}, {"probability": "fraction", "source": "choice"}
    )
    found["certificates.confidence_sequence"] = Entry(
        certificates.confidence_sequence,
        {"draws": torch.ones(5)},
        {"draws": "numbers", "level": "fraction", "grid": "count"},
    )
    found["certificates.margin_bound"] = Entry(
        certificates.margin_bound,
        {"margins": torch.ones(5), "squared_distance": 0.1},
        {"margins": "numbers", "squared_distance": "distance"},
    )
    found["pairing.split_of"] = Entry(pairing.split_of, {"keys": np.arange(9)}, {"keys": "numbers", "shares": "sizes"})
    found["load_task"] = Entry(tls.load_task, {"name": "planted_gate"}, {"name": "choice"})
    return found


def combinations(table: dict[str, Entry]) -> list[tuple[str, str, int]]:
    """Every function with every bad value of each of its arguments."""
    return [
        (name, argument, number)
        for name, entry in table.items()
        for argument, kind in entry.kinds.items()
        for number in range(len(thrown_at(kind)))
    ]


@dataclass(frozen=True)
class Outcome:
    """What came of a call: ``refused`` by a clear sentence, or ``obscure``, ``accepted``, ``changed``, ``hang``."""

    name: str
    argument: str
    value: str
    kind: str
    said: str


def thrown(table: dict[str, Entry], name: str, argument: str, number: int) -> Outcome:
    """One bad call. The model is looked at before and after."""
    entry = table[name]
    value = thrown_at(entry.kinds[argument])[number]
    shown = f"{type(value).__name__} {value!r:.60}"
    before, kind, said = _state(entry.watched()), "accepted", ""
    try:
        with warnings.catch_warnings(), limited(SECONDS):
            warnings.simplefilter("ignore")
            found = entry.call(**entry.good | {argument: value})
            said = f"{found!r:.80}"
    except TimeoutError:
        kind = "hang"
    except Exception as error:  # noqa: BLE001
        kind, said = ("refused" if clear(error, argument) else "obscure"), _told(error)
    if _state(entry.watched()) != before:
        kind = "changed"
    return Outcome(name, argument, shown, kind, said)


SYNONYMS = {
    "model": ("model", "hook point", "transformerbridge"),
    "batch": ("batch", "examples", "tokens", "labels"),
    "examples": ("examples", "tokens", "labels", "choices"),
    "train": ("train", "examples", "tokens", "labels"),
    "validation": ("validation", "examples", "tokens", "labels"),
    "units": ("units", "hook", "values", "circuit", "alignment"),
    "shares": ("shares", "share"),
    "where": ("where", "positions"),
    "circuit": ("circuit", "values", "units"),
    "values": ("values", "units", "hook"),
    "sizes": ("sizes", "size"),
    "size": ("size", "fraction"),
    "name": ("name", "task"),
    "alignment": ("alignment", "units", "variable", "hook"),
    "causal_model": ("causal_model", "variable", "causal model"),
    "reduced": ("reduced", "reduction"),
    "fields": ("fields", "no column"),
    "inputs": ("inputs", "an input"),
    "mechanisms": ("mechanism",),
    "rows": ("rows", "templates", "inputs"),
    "split": ("split", "no file"),
    "path": ("path", "no circuit file"),
    "folder": ("folder", "no file", "holds no results"),
    "tasks": ("task",),
    "methods": ("method",),
    "source": ("source", "values", "scores", "units", "row", "config.json", "folder", "language model"),
}


def clear(error: Exception, argument: str) -> bool:
    """Whether an error is a sentence of this package that names the argument, and not one from underneath it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames[-1].filename.startswith(PACKAGE)
    told = str(error).lower()
    named = any(word in told for word in SYNONYMS.get(argument, (argument,)))
    return isinstance(error, ValueError | KeyError | FileNotFoundError) and ours and named and len(told.split()) > 4


def _told(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:160]} ({Path(frame.filename).name}:{frame.lineno})"


def _state(model: Any) -> Any:
    points = dict.fromkeys(model.hook_dict.values())
    hooks = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)
    numbers = [parameter.detach().sum().item() for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    return hooks, numbers, flags, modes, torch.is_grad_enabled(), torch.get_default_dtype(), torch.initial_seed()


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """``TimeoutError`` after so long."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
