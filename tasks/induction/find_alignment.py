"""Where do ``previous``, ``where`` and ``answer`` live, and is there a table? Prints attention and accuracies.

python -m tasks.induction.find_alignment
"""

# ruff: noqa: T201
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import tl_sparsify as tls
from tasks.finding import any_directions, any_units, grown, heads, layers, learned_directions, table
from tasks.induction.task import (
    ANSWERS,
    CURRENT,
    FIRST,
    INDUCTION,
    LENGTH,
    MOST_FREQUENT,
    SHAPE,
    SPACE,
    TABLE,
    alignment,
    encode,
    load_model,
    matches,
    previous,
)

PAIRS = 1024
GROW = (16, 32, 64)
RANK = 16
ALL = slice(0, LENGTH)


def attention(model: Any, examples: tls.Examples) -> pd.DataFrame:
    """For each head the mean attention to the position before, and from the current token to where it is told."""
    symbols = examples.tokens.numpy()
    found = torch.from_numpy(matches(previous(symbols), symbols))
    last = LENGTH - 1 - found.flip(1).int().argmax(1)
    with torch.no_grad():
        _, cache = model.run_with_cache(examples.tokens)
    rows: dict[str, dict[str, float]] = {}
    for layer in range(model.cfg.n_layers):
        pattern: Float[Tensor, "n heads query key"] = cache[f"blocks.{layer}.attn.hook_pattern"]
        for head in range(pattern.shape[1]):
            one = pattern[:, head]
            at_current = one[:, CURRENT]
            rows[f"L{layer}H{head}"] = {
                "to the position before": float(one[:, 1:].diagonal(offset=0, dim1=1, dim2=2).mean()),
                "to what followed the last occurrence": float(at_current.gather(1, last[:, None]).mean()),
                "to what followed any occurrence": float((at_current * found).sum(1).mean()),
                "to itself": float(at_current[:, CURRENT].mean()),
            }
    return pd.DataFrame(rows).T.round(3)


def looking(layer: int) -> dict[str, list[tls.Unit]]:
    """Queries at the current token and keys everywhere, of every set of heads of a layer."""
    found: dict[str, list[tls.Unit]] = {}
    parts = {
        name: tls.Site(
            kind="head", layer=layer, hook=f"blocks.{layer}.attn.hook_{name}", size=SHAPE["heads"], positions=positions
        )
        for name, positions in (("q", CURRENT), ("k", ALL))
    }
    sets = [some for k in range(SHAPE["heads"]) for some in itertools.combinations(range(SHAPE["heads"]), k + 1)]
    for names, some in itertools.product((("q", "k"), ("k",)), sets):
        title = f"{' and '.join(names)} of {', '.join(f'L{layer}H{i}' for i in some)}"
        found[title] = [tls.Unit(parts[name], i) for name in names for i in some]
    return found


def looked_up() -> list[tls.Unit]:
    """All that the heads of layer 1 look up in: their keys and values at every position, the whole row."""
    sites = [
        tls.Site(kind="head", layer=1, hook=f"blocks.1.attn.hook_{name}", size=SHAPE["heads"], positions=positions)
        for name, positions in (("k", ALL), ("v", tuple(range(LENGTH))))  # the same, written twice: names are not
    ]
    return [tls.Unit(site, i) for site in sites for i in range(site.size)]


def main() -> None:
    torch.set_num_threads(1)
    pd.set_option("display.width", 150, "display.max_rows", None, "display.max_columns", None)
    pd.set_option("display.max_colwidth", 80)
    model, search, test = load_model(), SPACE.pairs(PAIRS, 1, split=1), SPACE.pairs(PAIRS, 0)
    print(f"Attention on the test split\n{attention(model, SPACE.examples(0)[2])}\n")
    places = layers(model, CURRENT, "the current token") | layers(model, ALL, "all positions")
    sets = {"nothing": []} | places | heads(model, CURRENT, "the current token", 2)
    sets |= heads(model, ALL, "all positions", 2) | looking(1)
    print("Accuracy on test pairs; with a star on those whose right answer changes.\n")
    print(table(model, INDUCTION, test, sets), "\n")
    site = tls.neurons(model).at(CURRENT).sites[1]
    for n, units in zip(GROW, grown(model, INDUCTION, search, site, "answer", GROW), strict=True):
        few = {"chosen": units} | {f"random {seed}": any_units(site, n, seed) for seed in range(3)}
        print(f"{n} neurons of layer 1 at the current token\n{table(model, INDUCTION, test, few)}\n")
    own = test.expected(INDUCTION, ())
    for name, rival in (("first", FIRST), ("most frequent", MOST_FREQUENT)):
        print(f"{name}: {float((test.expected(rival, ()) == own).double().mean()):.3f} of its answers are right\n")
    drawn, part = tables(2, 0), tables(1, 1)
    for layer in range(SHAPE["layers"]):
        hook = f"blocks.{layer}.hook_resid_post"
        name = f"{RANK} directions of the stream after layer {layer} at the current token"
        places[f"{name}, learnt"] = learned_directions(model, TABLE, part, hook, CURRENT, "table", RANK)
        places[f"{name}, random"] = any_directions(model, hook, CURRENT, RANK, seed=0)
    aligned = {f"all of {variable}": list(units) for variable, units in alignment().units.items()}
    aligned["keys and values of layer 1 at all positions"] = looked_up()
    print(f"A table\n{table(model, TABLE, drawn, {'nothing': []} | aligned | places)}\n")


def tables(split: int, seed: int) -> tls.Pairs:
    """Pairs balanced for the table of what follows each symbol."""
    inputs = SPACE.drawn(np.random.default_rng([seed, 67]), split, SPACE.pool)
    return tls.pairing.pairs(TABLE, inputs, encode, ANSWERS, n=PAIRS, seed=seed)


if __name__ == "__main__":
    main()
