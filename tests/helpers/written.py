"""Results without a model: a small circuit with its scores and path, evidence, and a benchmark's table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tl_sparsify import (
    CausalModel,
    Circuit,
    CircuitPath,
    Estimate,
    Evidence,
    Reduction,
    Scores,
    Site,
    Units,
    Values,
    plot,
)
from tl_sparsify.abstraction.evidence import NOTHING, Row
from tl_sparsify.abstraction.verdicts import Role
from tl_sparsify.core.circuit import NeighbourMap
from tl_sparsify.search.path import Round

UNITS = Units(
    (
        Site("head", 0, "blocks.0.attn.hook_z", 3),
        Site("head", 2, "blocks.2.attn.hook_z", 2),
        Site("neuron", 0, "blocks.0.mlp.hook_post", 5),
        Site("neuron", 1, "blocks.1.mlp.hook_post", 4),
        Site("neuron", 2, "blocks.2.mlp.hook_post", 5),
    )
)
KEPT = ["L0H1", "L2H0", "L2H1", "L0N4", "L1N0", "L1N3"]
SIZES = (12, 7, 4, 2, 1)
MEASURED = (0.0, 1e-4, 0.02, 0.3, 0.7)  # a logarithm of the first is none
PREDICTED = (1e-9, 2e-4, 0.01, 0.5, 0.6)
EQUALITY = CausalModel(
    ("a", "b", "c", "d"),
    {"left": lambda a, b: a == b, "right": lambda c, d: c == d, "same": lambda left, right: left == right},
    "same",
)


def reduction_of(circuit: Circuit, kind: str = "mean") -> Reduction:
    widths = {"head": 2}
    values = tuple(torch.zeros(site.size, widths.get(site.kind, 1)) for site in circuit.units.sites)
    return Reduction(circuit, Values(circuit.units, values, kind))


def affine(circuit: Circuit) -> Reduction:
    """The removed neurons of each layer as a map of its first kept one."""
    mixing: list[NeighbourMap | None] = []
    for site, mask in zip(circuit.units.sites, circuit.units.split(circuit.mask), strict=True):
        removed, kept = (~mask).nonzero().flatten(), mask.nonzero().flatten()[:1]
        some = site.kind == "neuron" and len(removed) > 0 and len(kept) > 0
        mixing.append(
            NeighbourMap(site.size, removed, kept.expand(len(removed)), torch.ones(len(removed))) if some else None
        )
    return replace(reduction_of(circuit, "refitted neighbours"), mixing=tuple(mixing))


def path() -> CircuitPath:
    rounds = []
    for size, measured, predicted in zip(SIZES, MEASURED, PREDICTED, strict=True):
        circuit = Circuit(UNITS, torch.arange(len(UNITS)) >= len(UNITS) - size)
        estimates = (Estimate(value, value / 10, 50, "nats") for value in (predicted, measured))
        rounds.append(Round(reduction_of(circuit), *estimates, additivity=0.0))
    return CircuitPath(UNITS, torch.arange(len(UNITS)), tuple(rounds))


def scores(values: Sequence[float] | None = None, name: str = "test") -> Scores:
    given = torch.arange(len(UNITS)).double().flip(0) if values is None else torch.tensor(values).double()
    return Scores(UNITS, given, torch.zeros_like(given), name, "nats", 0, 0)


ROLES = {
    "aligned units": Role.ALIGNED,
    "aligned units, a source each": Role.ALIGNED,
    "whole residual stream": Role.CEILING,
    "all unaligned units": Role.UNALIGNED,
    "random kept units, p = 0.1": Role.CHECK,
}


def row(model: str, intervention: str, variable: str, accuracy: float, changed: float = 0.0, **other: Any) -> Row:
    plain = Row(model, intervention, variable, accuracy, 0.01, accuracy - 0.02, min(1.0, accuracy + 0.02), changed,
                float("nan"), float("nan"), 512, 1.0, 1.0, 0, ROLES.get(intervention, Role.CONTROL),
                model == "random weights", intervention == "aligned units, a source each",
                float("nan") if variable == NOTHING else 0.5, changes=0.5)  # fmt: skip
    return replace(plain, **other)


def evidence(**changes: dict[str, Any]) -> Evidence:
    """``left`` is accepted, ``right`` is not; ``changes`` replace attributes of the rows of a model (by its first
    word)."""
    rows = [
        row("original", "aligned units", "left", 0.984, 0.969),
        row("original", "do nothing", "left", 0.511),
        row("original", "random units", "left", 0.522, 0.181),
        row("original", "whole residual stream", "left", 0.999, 0.999),
        row("original", "aligned units", "right", 0.713, 0.422, lower=0.654),
        row("original", "do nothing", "right", 0.501),
        row("original", "aligned units", "left & right", 0.961, 0.951),
        row("original", "aligned units, a source each", "left & right", 0.962, 0.952),
        row("original", "all unaligned units", NOTHING, 0.433, float("nan"), units=730.0),
        row("reduced", "aligned units", "left", 0.976, 0.955, retained=0.875, units=7.0, removed=3),
        row("reduced", "do nothing", "left", 0.503, retained=0.875),
        row("reduced", "aligned units", "right", float("nan"), float("nan"), lower=0.0, upper=1.0, retained=0.875),
        row("reduced", "random kept units, p = 0.1", NOTHING, 0.871, 0.809, risk=0.7, margin_bound=0.9),
        row("random weights", "aligned units", "left", 0.25, 0.25),
        row("random weights", "aligned units", "right", 0.26, 0.27),
    ]
    return Evidence(tuple(replace(r, **changes.get(r.model.split()[0], {})) for r in rows))


METHODS = (
    "joint risk, refitted inside", "compensating, affine", "activation patching", "attribution patching", "EAP, sum",
    "EAP, max", "EAP-IG", "activation norm", "variance", "scaled variance", "exact, zero", "exact, mean",
    "hard-concrete gates", "top-k gates", "single-unit risk", "random",
)  # fmt: skip
BENCHED = (0.2, 0.1, 0.05, 0.03)


def table(
    tasks: Sequence[str] = ("hierarchical_equality", "planted_backup"),
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    ablations: Sequence[str] = ("mean",),
    sizes: Sequence[float] = BENCHED,
) -> pd.DataFrame:
    """A benchmark's table: risk grows with the place of the method in the list and as the circuit gets smaller."""
    rng = np.random.default_rng(0)
    rows = []
    for t, task in enumerate(tasks):
        units = 780 if t % 2 == 0 else 72
        for ablation in ablations:
            for m, method in enumerate(methods):
                curve = {"cmd": 0.1 + 0.05 * m, "cpr": 0.9 - 0.04 * m, "auroc": 1 - 0.03 * m if t % 2 else np.nan}
                curve |= {"average_precision": 1 - 0.05 * m if t % 2 else np.nan}
                cost = {"forward": 40 + 2 * m, "backward": 80, "seconds": 3.5 + m, "peak_mb": 200.0 + m}
                for seed in range(seeds):
                    for size in sizes:
                        kept = max(1, round(size * units))
                        risk = 0.002 * 1.45**m * (0.2 / size) ** 2 * np.exp(rng.normal(0, 0.3))
                        right = max(0.5, 1 - risk / 4)
                        faith = 1 - risk
                        ours = method.startswith(("joint", "compensating"))
                        row = {
                            "task": task,
                            "method": method,
                            "ours": ours,
                            "setting": "",
                            "seed": seed,
                            "ablation": ablation,
                        }
                        row |= {"size": size, "kept": kept, "fraction": kept / units}
                        row |= {"risk": risk, "accuracy": right, "faithfulness": faith}
                        for name, value in (("risk", risk), ("accuracy", right), ("faithfulness", faith)):
                            row |= {
                                f"{name}_low": value - 0.1 * abs(value),
                                f"{name}_high": value + 0.1 * (1 - right) + 0.01,
                            }
                        rows.append(row | curve | cost)
    return pd.DataFrame(rows)


def baselines(found: float = 0.012, best: float = 0.5) -> pd.DataFrame:
    rows = []
    for method, risk in (("random", 0.69), ("activation variance", best), ("found circuit", found)):
        for replacements, refitted, times in (("mean", False, 3.0), ("refit", True, 1.0)):
            row = {"method": method, "found": method == "found circuit", "as_saved": False}
            row |= {"replacements": replacements, "refitted": refitted, "kept": 6, "risk": risk * times}
            rows.append(row | {"risk_stderr": risk / 10, "accuracy": 1 - risk / 2})
    last = {"method": "found circuit, as saved", "found": True, "as_saved": True, "replacements": "refit"}
    last |= {"refitted": True, "kept": 6}
    return pd.DataFrame([*rows, last | {"risk": 0.0101, "risk_stderr": 0.001, "accuracy": 0.9973}])


def about(**changes: Any) -> dict[str, Any]:
    return {
        "task": "tiny",
        "description": "is (a == b) the same as (c == d)",
        "ablation": "mean",
        "chance": 0.5,
        "keep": 0.3,
        "rounds": 5,
        "seed": 3,
        "device": "cpu",
        "examples": {"train": 48, "validation": 24, "test": 1234, "pairs": 512},
        "score": {"name": "risk", "measured_in": "nats", "temperature": 3.0},
        "baseline_refit": {"patience": 60, "most": 600, "batch_size": 128},
        "evidence_level": 0.05,
        "versions": {"python": "3.11.0", "torch": "2.0"},
    } | changes


def run_folder(folder: Path, **changes: Any) -> Path:
    """What a run writes, without running anything; ``changes`` are files' contents by name (``about=...``)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        "risk": 0.0101, "risk_stderr": 0.001, "accuracy": 0.9973, "original_accuracy": 0.9991, "agreement": 0.9964,
        "faithfulness": 0.6965, "completeness": 0.0047, "interchange_risk": 0.593, "interchange_risk_stderr": 0.07,
        "interchange_agreement": 0.8906, "probability": 0.1, "folded_difference": 1.2e-6,
    }  # fmt: skip
    sizes = {"heads": 5, "heads_kept": 3, "neurons": 14, "neurons_kept": 3, "parameters": 1000, "parameters_kept": 227}
    frames = {
        "scores": scores().to_frame(),
        "path": path().to_frame(),
        "evaluation": pd.DataFrame([found | changes.get("evaluation", {})]),
        "fold": pd.DataFrame([{"part": "layer 0"} | sizes, {"part": "whole model"} | sizes]),
        "baselines": changes.get("baselines", baselines()),
        "evidence": changes.get("evidence", evidence()).to_frame(),
    }
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    changes.get("reduction", reduction_of(Circuit.of(UNITS, KEPT), "refit")).save(folder / "circuit.reduction")
    (folder / "run.json").write_text(json.dumps(changes.get("about", about())))
    plot.save(plot.risk_curve(path()), folder / "risk.png")
    plot.save(plot.causal_graph(EQUALITY), folder / "causal.png")
    return folder
