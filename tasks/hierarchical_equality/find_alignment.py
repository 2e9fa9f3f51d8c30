"""Where do ``left``, ``right`` and ``same`` live in the trained transformer? Prints tables of interchange accuracy.

    python tasks/hierarchical_equality/find_alignment.py

A set of units is given the values that it takes on a source input. For a variable V the network should then give the
causal model's answer on the base input under do(V = V(source)). Sets are found on pairs of the validation part of the
input space and reported on pairs of the test part. An accuracy near 0.5 is what doing nothing gives.
"""

# ruff: noqa: T201
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from task import ANSWER_POSITION, DIFFERENT, EQUALITY, SAME, load_model, pairs
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls

VARIABLES = ("left", "right", "same")
POSITIONS = ("a", "b", "c", "d", "answer")
PAIRS = 2048
GROW = (8, 16, 24, 32, 40, 48, 56, 64)


@dataclass(frozen=True)
class Part:
    """Units of one hook point at one position; ``index`` None means all of them."""

    layer: int
    hook: str
    position: int
    index: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{self.hook}"


class Study:
    """A model, its pairs, and what every hook point does on the sources."""

    def __init__(self, model: TransformerBridge, drawn: tls.Pairs) -> None:
        self.model, self.base = model, drawn.base.tokens
        self.plain = torch.tensor(EQUALITY.run(drawn.base_inputs)["same"].copy())
        self.expected: dict[str, Bool[Tensor, "n"]] = {
            v: torch.tensor(EQUALITY.interchange(drawn.base_inputs, {v: drawn.source_inputs})["same"].copy())
            for v in VARIABLES
        }
        self.values: dict[str, Float[Tensor, "n pos ..."]] = {}
        hooks = [(name, partial(self._record, name=name)) for name in hook_names(model)]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            model(drawn.source.tokens)

    def _record(self, value: Float[Tensor, "n pos ..."], hook: object, name: str) -> None:
        self.values[name] = value.clone()

    def gap(self, parts: Iterable[Part], gates: Float[Tensor, "units"] | None = None) -> Float[Tensor, "n"]:
        """Logit of "same" less that of "different", the parts interchanged; ``gates`` scales the change of a unit."""
        by_name: dict[str, list[Part]] = {}
        for part in parts:
            by_name.setdefault(part.name, []).append(part)

        def interchange(value: Float[Tensor, "n pos ..."], hook: object, name: str) -> Float[Tensor, "n pos ..."]:
            value = value.clone()
            for part in by_name[name]:
                index = slice(None) if part.index is None else list(part.index)
                old, new = value[:, part.position, index], self.values[name][:, part.position, index]
                value[:, part.position, index] = new if gates is None else old + gates * (new - old)
            return value

        with self.model.hooks(fwd_hooks=[(name, partial(interchange, name=name)) for name in by_name]):
            logits = self.model(self.base)[:, ANSWER_POSITION]
        return logits[:, SAME] - logits[:, DIFFERENT]

    @torch.no_grad()
    def accuracy(self, *parts: Part) -> dict[str, float]:
        """Interchange accuracy for each variable, on all pairs and on those whose right answer changes."""
        answer = self.gap(parts) > 0
        row: dict[str, float] = {}
        for variable, expected in self.expected.items():
            right, changes = (answer == expected).float(), expected != self.plain
            row |= {variable: right.mean().item(), f"{variable}*": right[changes].mean().item()}
        return row

    def grow(self, part: Part, variable: str, size: int, step: int = 4) -> tuple[int, ...]:
        """The ``size`` neurons of a part that serve the variable best, added a few at a time.

        Those come first by which the loss falls most steeply, with respect to the share of a neuron's change let in.
        """
        total = self.values[part.name].shape[-1]
        sign = torch.where(self.expected[variable], 1.0, -1.0)
        gates = torch.zeros(total)
        while gates.sum() < size:
            gates = gates.detach().requires_grad_()
            loss = torch.nn.functional.softplus(-sign * self.gap([part], gates)).mean()
            (slope,) = torch.autograd.grad(loss, gates)
            slope = slope.masked_fill(gates > 0, torch.inf)
            gates = gates.detach().index_fill(0, slope.argsort(stable=True)[:step], 1.0)
        return tuple(gates.nonzero().flatten().tolist())


def hook_names(model: TransformerBridge) -> list[str]:
    kinds = ("attn.hook_z", "mlp.hook_post", "hook_resid_mid", "hook_resid_post")
    return [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers) for kind in kinds]


def table(study: Study, sets: dict[str, tuple[Part, ...]], keep: Callable[[dict[str, float]], bool]) -> pd.DataFrame:
    rows = {name: study.accuracy(*parts) for name, parts in sets.items()}
    return pd.DataFrame({name: row for name, row in rows.items() if keep(row)}).T.round(3)


def whole(model: TransformerBridge, kind: str) -> dict[str, tuple[Part, ...]]:
    """Everything at one hook point and position."""
    places = itertools.product(range(model.cfg.n_layers), range(len(POSITIONS)))
    return {f"L{layer} {kind} @ {POSITIONS[p]}": (Part(layer, kind, p),) for layer, p in places}


def single_heads(model: TransformerBridge) -> dict[str, tuple[Part, ...]]:
    places = itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads), range(len(POSITIONS)))
    return {f"L{layer}H{h} @ {POSITIONS[p]}": (Part(layer, "attn.hook_z", p, (h,)),) for layer, h, p in places}


def pairs_of_heads(model: TransformerBridge) -> dict[str, tuple[Part, ...]]:
    """Two heads of a layer at the answer."""
    places = itertools.product(range(model.cfg.n_layers), itertools.combinations(range(model.cfg.n_heads), 2))
    return {
        f"L{layer}H{g},H{h} @ answer": (Part(layer, "attn.hook_z", ANSWER_POSITION, (g, h)),)
        for layer, (g, h) in places
    }


def random_sets(total: int, size: int, draws: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.choice(total, size, replace=False).tolist()) for _ in range(draws)]


def main() -> None:
    torch.set_num_threads(1)
    pd.set_option("display.width", 110, "display.max_rows", None)
    model = load_model()
    search, test = Study(model, pairs(PAIRS, seed=1, part="validation")), Study(model, pairs(PAIRS, seed=0))
    moved = lambda row: max(abs(row[v] - 0.5) for v in VARIABLES) > 0.05  # noqa: E731
    print(f"Accuracy on {PAIRS} pairs; with a star on the half of them whose right answer changes.\n")
    print(table(test, {"nothing": ()}, lambda row: True), "\n")
    for title, sets in {
        "the whole residual stream (the ceiling)": whole(model, "hook_resid_mid") | whole(model, "hook_resid_post"),
        "all heads of a layer": whole(model, "attn.hook_z"),
        "all neurons of a layer": whole(model, "mlp.hook_post"),
        "single heads": single_heads(model),
        "two heads of a layer": pairs_of_heads(model),
    }.items():
        print(f"{title} (rows further than 0.05 from doing nothing)\n{table(test, sets, moved)}\n")
    for variable, layer, position in itertools.product(VARIABLES, range(model.cfg.n_layers), range(len(POSITIONS))):
        part = Part(layer, "mlp.hook_post", position)
        if search.accuracy(part)[variable] >= 0.9:
            print_growth(search, test, part, variable)


def print_growth(search: Study, test: Study, part: Part, variable: str) -> None:
    """How many neurons of a part a variable needs, and the smallest set that does as well as all of them."""
    print(f"neurons of L{part.layer} @ {POSITIONS[part.position]} for {variable}, beside random ones (mean of 10)")
    total = search.values[part.name].shape[-1]
    found: tuple[int, ...] | None = None
    for n in GROW:
        chosen = replace(part, index=search.grow(part, variable, n))
        draws = [replace(part, index=r) for r in random_sets(total, n, 10)]
        chance = np.mean([test.accuracy(draw)[variable] for draw in draws])
        print(f"  {n:3d}  {test.accuracy(chosen)[variable]:.3f}  random {chance:.3f}")
        if found is None and search.accuracy(chosen)[variable] >= search.accuracy(part)[variable]:
            found = chosen.index
    if found is not None:
        print(f"  as good as all of them (on the search pairs), {len(found)}: {', '.join(map(str, found))}")
    print()


if __name__ == "__main__":
    main()
