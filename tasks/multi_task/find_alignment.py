"""Where do ``rule`` and ``answer`` live, and are all four answers found every time? Prints tables of accuracy.

    python -m tasks.multi_task.find_alignment

Neurons and directions are chosen on pairs of the validation part; every accuracy is on pairs of the test part.
"""

# ruff: noqa: T201
from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import torch

import tl_sparsify as tls
from tasks.finding import among, any_directions, any_units, grown, heads, layers, learned_directions, table
from tasks.multi_task.task import (
    ANSWER_NEURONS,
    ANSWERS,
    CURRENT,
    LEAST,
    LENGTH,
    ONE_TASK,
    PARALLEL,
    RULE,
    SHAPE,
    SPACE,
    encode,
    load_model,
    reading,
)

PAIRS = 1024
GROW = (64, 128, 160, 192, 224)
RANK = 12
ALL, REST = slice(0, LENGTH + 1), slice(1, LENGTH + 1)


def balanced(variable: str, split: int, seed: int) -> tls.Pairs:
    """Pairs balanced for a variable of the parallel model, less those whose source has the variable's task: there it is
    the answer."""
    inputs = SPACE.drawn(np.random.default_rng([seed, 67]), split, SPACE.pool)
    drawn = tls.pairing.pairs(PARALLEL, inputs, encode, ANSWERS, n=PAIRS, seed=seed, variables=(variable,))
    return among(drawn, drawn.source_inputs["task"] != PARALLEL.variables.index(variable))


def main() -> None:
    torch.set_num_threads(1)
    pd.set_option("display.width", 170, "display.max_rows", None, "display.max_columns", None)
    pd.set_option("display.max_colwidth", 70)
    model, search, test = load_model(), SPACE.pairs(PAIRS, 1, split=1), SPACE.pairs(PAIRS, 0)
    every = range(SHAPE["heads"])
    some = [chosen for size in (1, 4, 5, 6) for chosen in itertools.combinations(every, size)]
    read = {f"what heads {chosen} of layer 0 read at the task": reading(0, chosen) for chosen in some}
    read |= {f"what all heads of layer {layer} read at the task": reading(layer, every) for layer in range(1, 3)}
    print("Accuracy on test pairs; with a star on those whose right answer changes.\n")
    print(table(model, RULE, test, {"nothing": []} | read), "\n")
    places = layers(model, CURRENT, "the current number") | layers(model, REST, "all numbers")
    places |= heads(model, CURRENT, "the current number", 1) | heads(model, REST, "all numbers", 1)
    print(table(model, RULE, test, places), "\n")
    site = tls.neurons(model).at(CURRENT).sites[2]
    for n, units in zip(GROW, grown(model, RULE, search, site, "answer", GROW, step=8), strict=True):
        few = {"chosen": units} | {f"random {seed}": any_units(site, n, seed) for seed in range(3)}
        print(f"{n} neurons of layer 2 at the current number\n{table(model, RULE, test, few)}\n")
        if n == len(ANSWER_NEURONS):
            print(f"They are {', '.join(str(unit.index) for unit in units)}\n")
    own = test.expected(RULE, ())
    for name, rival in (("least", LEAST), ("one task", ONE_TASK)):
        print(f"{name}: {float((test.expected(rival, ()) == own).double().mean()):.3f} of its answers are right\n")
    for variable in PARALLEL.variables[:4]:
        drawn, part = balanced(variable, 2, 0), balanced(variable, 1, 1)
        found: dict[str, list[tls.Unit]] = {"nothing": [], **layers(model, CURRENT, "the current number")}
        for layer in range(SHAPE["layers"]):
            hook = f"blocks.{layer}.hook_resid_post"
            name = f"{RANK} directions of the stream after layer {layer}"
            found[f"{name}, learnt"] = learned_directions(model, PARALLEL, part, hook, CURRENT, variable, RANK)
            found[f"{name}, random"] = any_directions(model, hook, CURRENT, RANK, seed=0)
        print(f"{variable}\n{table(model, PARALLEL, drawn, found)[[variable, f'{variable}*']]}\n")


if __name__ == "__main__":
    main()
