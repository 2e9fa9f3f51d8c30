"""A small transformer with all parameters random, reductions of it, and the slow computation of every measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from helpers.by_hand import Fill, average, table
from helpers.models import bridge, shaken
from tl_sparsify import Circuit, Examples, Reduction, Units, Values, fingerprint, heads, neurons

VOCABULARY, POSITIONS, N = 9, 6, 12


@cache
def native() -> Any:
    """A small transformer in float64 with all parameters random."""
    config = {"d_model": 16, "d_head": 4, "n_heads": 2, "n_layers": 2, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 10, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    return shaken(model, 0.3)


def data(choices: bool = True) -> Examples:
    """Sequences with one to three answers each, among five choices or all tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (N, POSITIONS), generator=generator)
    labels = torch.randint(1, 6, (N, POSITIONS), generator=generator)
    read = torch.rand(N, POSITIONS, generator=generator).argsort(1) < torch.randint(1, 4, (N, 1), generator=generator)
    labels[~read] = -100
    return Examples(tokens, labels, choices=torch.tensor([3, 1, 2, 5, 4]) if choices else None)


def units_of(model: Any) -> Units:
    return heads(model) + neurons(model)


def random_values(seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)
    units = units_of(native())
    widths = {"head": 4, "neuron": 1}
    shapes = [(site.size, widths[site.kind]) for site in units.sites]
    return Values(units, tuple(torch.randn(shape, generator=generator).double() * 0.5 for shape in shapes))


def reduction_of(kept: Sequence[str], seed: int = 0, kind: str = "given", **more: Any) -> Reduction:
    circuit = Circuit.of(units_of(native()), kept)
    return Reduction(circuit, replace(random_values(seed), kind=kind), fingerprint=fingerprint(native()), **more)


KEPT = ["L0H0", "L1H1", "L0N1", "L0N2", "L0N7", "L1N0", "L1N4"]


def logits_of(kept: Sequence[str] | None, values: Values, tokens: Tensor, source: Tensor | None = None) -> Tensor:
    """The logits of one input with everything outside ``kept`` set to its value, unit by unit.

    With ``source`` the units of ``KEPT`` take their values from its run, under the same ablation.
    """
    seen: dict[str, Tensor] = {}

    def run(tokens: Tensor, write: bool) -> Tensor:
        hooks = []
        for site, constants in zip(values.units.sites, values.tensors, strict=True):
            gone = [i for i in range(site.size) if kept is not None and site.name(i) not in kept]
            taken = [i for i in range(site.size) if site.name(i) in KEPT and write]

            def change(
                activation: Tensor,
                hook: Any,
                name: str = site.hook,
                gone: list[int] = gone,
                taken: list[int] = taken,
                constants: Tensor = constants,
            ) -> Tensor:
                activation = activation.clone()
                for i in gone:
                    activation[:, :, i] = constants[i] if activation.ndim == 4 else constants[i, 0]
                for i in taken:
                    activation[:, :, i] = seen[name][:, :, i]
                if not write:
                    seen[name] = activation
                return activation

            hooks.append((site.hook, change))
        with torch.no_grad(), native().hooks(fwd_hooks=hooks):
            return native()(tokens[None])[0]

    if source is not None:
        run(source, write=False)
    return run(tokens, write=source is not None)


def means(
    kept: Sequence[str] | None, values: Values, examples: Examples, sources: Tensor | None = None
) -> dict[str, float]:
    """Every measure, by sums over examples and over each one's answers."""
    choices = list(range(VOCABULARY)) if examples.choices is None else examples.choices.tolist()
    sums = {"risk": 0.0, "accuracy": 0.0, "agreement": 0.0, "log odds": 0.0}
    for i, (tokens, labels) in enumerate(zip(examples.tokens, examples.labels, strict=True)):
        source = None if sources is None else sources[i]
        full, reduced = (logits_of(circuit, values, tokens, source) for circuit in (None, kept))
        answered = [position for position in range(POSITIONS) if labels[position] != -100]
        for position in answered:
            z, w = ([float(logits[position, c]) for c in choices] for logits in (full, reduced))
            p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (z, w))
            right = choices.index(int(labels[position]))
            share = 1 / len(answered) / len(examples)
            sums["risk"] += share * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            sums["accuracy"] += share * (max(range(len(w)), key=w.__getitem__) == right)
            sums["agreement"] += share * (z.index(max(z)) == w.index(max(w)))
            sums["log odds"] += share * math.log(q[right] / (1 - q[right]))
    return sums


# Ablations


def slow(batch: Examples, reduction: Reduction, fills: list[Fill]) -> tuple[dict[str, float], float, float]:
    """The measures of the circuit, its faithfulness and completeness, by hand-written hooks."""
    kept = list(reduction.circuit.names)
    others = [name for name in reduction.units.names if name not in kept]
    rows = table(bridge(), reduction.units, batch, [None, [], kept, others], fills.__getitem__)
    even = [1.0] * len(batch)
    full, empty, here, there = (average(rows, k, "metric", even) for k in range(4))
    found = {name: average(rows, 2, name, even) for name in ("risk", "accuracy", "agreement")}
    return found, (here - empty) / (full - empty), (there - empty) / (full - empty)
