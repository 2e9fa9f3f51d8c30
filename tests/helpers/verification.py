"""Rows of evidence, and a small transformer with pairs and an alignment, for tests of verification."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from helpers.equality import (
    EQUALITY,
    SAME,
    named,
)
from helpers.models import shaken
from tl_sparsify import (
    Alignment,
    CausalModel,
    Circuit,
    Evidence,
    Examples,
    Pairs,
    Reduction,
    Site,
    Unit,
    Values,
    ablate,
    directions,
    fingerprint,
    heads,
    intervened,
    neurons,
)


def swapped(base: np.ndarray, source: np.ndarray, *variables: str) -> np.ndarray:
    """What the network answers when it runs ``EQUALITY`` and these variables come from the source."""
    return EQUALITY.interchange(named(base), {name: named(source) for name in variables})["same"]


def rows_of(evidence: Evidence, **wanted: str) -> pd.DataFrame:
    frame = evidence.to_frame()
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


def row(evidence: Evidence, variable: str, model: str = "original", intervention: str = "aligned units") -> Any:
    found = rows_of(evidence, variable=variable, model=model, intervention=intervention)
    assert len(found) == 1
    return next(found.itertuples())


def answered(model: Any, rows: np.ndarray, reduction: Reduction | None = None) -> np.ndarray:
    with torch.no_grad(), intervened(model, *(() if reduction is None else (ablate(reduction),))):
        return model(torch.tensor(rows)).argmax(1).numpy() == SAME


VOCABULARY, POSITIONS = 6, 4
PARITY = CausalModel(
    ("x", "y"),
    {"odd": lambda x: x % 2, "more": lambda y: y > 2, "answer": lambda odd, more: odd + 2 * more},
    "answer",
)


@cache
def shared_native() -> Any:
    config = {"d_model": 16, "d_head": 4, "n_heads": 4, "n_layers": 2, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 20, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    return shaken(model, 0.3)


def native() -> Any:
    """A small transformer with random weights: right by luck."""
    return copy.deepcopy(shared_native())


NATIVE = Alignment(
    {
        "odd": [Unit(Site("head", 0, "blocks.0.attn.hook_z", 4, at), i) for at, i in ((1, 0), (None, 2))],
        "more": [Unit(Site("neuron", 1, "blocks.1.mlp.hook_post", 20, (2, 3)), i) for i in range(0, 20, 2)],
        "answer": [Unit(Site("neuron", layer, f"blocks.{layer}.mlp.hook_post", 20), 3) for layer in (0, 1)],
    }
)


def native_pairs(n: int = 100, seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)

    def side() -> tuple[dict[str, np.ndarray], Examples]:
        tokens = rng.integers(VOCABULARY, size=(n, POSITIONS))
        inputs = {"x": tokens[:, 1], "y": tokens[:, 2]}
        labels = np.full_like(tokens, -100)
        labels[:, 3] = PARITY.run(inputs)["answer"]
        return inputs, Examples(torch.tensor(tokens), torch.tensor(labels), choices=torch.arange(4))

    (base_inputs, base), (source_inputs, source) = side(), side()
    return Pairs(base_inputs, source_inputs, base, source, {i: i for i in range(4)})


def answered_by(model: Any, pairs: Pairs, reduction: Reduction | None = None) -> Pairs:
    """The same pairs with what the model answers as labels: all are retained."""

    def side(examples: Examples) -> Examples:
        labels = torch.full_like(examples.labels, -100)
        with torch.no_grad(), intervened(model, *(() if reduction is None else (ablate(reduction),))):
            labels[:, 3] = model(examples.tokens)[:, 3, :4].argmax(1)
        return Examples(examples.tokens, labels, choices=examples.choices)

    return Pairs(pairs.base_inputs, pairs.source_inputs, side(pairs.base), side(pairs.source), pairs.answers)


def reduction_of_native(gone: Sequence[str], seed: int = 0) -> Reduction:
    model = shared_native()
    units = heads(model) + neurons(model)
    generator = torch.Generator().manual_seed(seed)
    widths = {"head": 4, "neuron": 1}
    values = Values(units, tuple(torch.randn(s.size, widths[s.kind], generator=generator) for s in units.sites))
    return Reduction(~Circuit.of(units, gone), values, fingerprint=fingerprint(model))


AGREEMENT = "random kept units, p = 0.1"


def basis_of(rank: int, seed: int, width: int = 16) -> Tensor:
    random = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random)[0]


def stream_units(rank: int, seed: int, where: Any, hook: str = "blocks.0.hook_resid_post") -> list[Unit]:
    return [unit.at(where) for unit in directions(native(), hook, basis_of(rank, seed))]
