"""Where do ``where`` and ``greatest`` live, and does any place hold the greatest of a half? Prints accuracies.

python -m tasks.greatest_of_list.find_alignment
"""

# ruff: noqa: T201
from __future__ import annotations

import itertools

import pandas as pd
import torch

import tl_sparsify as tls
from tasks.finding import any_directions, heads, layers, learned_directions, table
from tasks.greatest_of_list.task import (
    ANSWER_POSITION,
    HALVES,
    LOOKUP,
    NUMBER_POSITIONS,
    RUNNING,
    alignment,
    load_model,
    pairs,
)

PAIRS = 2048
PLACES = (*zip(NUMBER_POSITIONS, "abcd", strict=True), (ANSWER_POSITION, "="))


def main() -> None:
    torch.set_num_threads(1)
    pd.set_option("display.width", 150, "display.max_rows", None, "display.max_columns", None)
    model, test = load_model(), pairs(PAIRS, 0)
    sets: dict[str, list[tls.Unit]] = {"nothing": []}
    for hook, positions in (("hook_k", NUMBER_POSITIONS), ("hook_v", NUMBER_POSITIONS)):
        site = tls.Site(kind="head", layer=0, hook=f"blocks.0.attn.{hook}", size=4, positions=positions)
        for some in itertools.chain.from_iterable(itertools.combinations(range(4), k + 1) for k in range(4)):
            sets[f"{hook} of {', '.join(f'L0H{i}' for i in some)} at a, b, c, d"] = [tls.Unit(site, i) for i in some]
    everything = {name: units for place in PLACES for name, units in layers(model, *place).items()}
    print("Accuracy on test pairs; with a star on those whose right answer changes.\n")
    print(table(model, LOOKUP, test, sets | everything | heads(model, ANSWER_POSITION, "=", 4)), "\n")
    aligned = {f"all of {variable}": list(units) for variable, units in alignment().units.items()}
    print(f"Pairs with 0, 1 and 2\n{table(model, LOOKUP, pairs(PAIRS, 0, least=0), aligned)}\n")
    for title, rival in (("halves", HALVES), ("running", RUNNING)):
        drawn, search = (pairs(PAIRS, seed, part, rival) for seed, part in ((0, "test"), (1, "validation")))
        print(f"{title}: whole places\n{table(model, rival, drawn, {'nothing': []} | everything)}\n")
        for variable in rival.variables[:-1]:
            hook = "blocks.0.hook_resid_post"
            found = {
                "learnt": learned_directions(model, rival, search, hook, ANSWER_POSITION, variable, 8),
                "random": any_directions(model, hook, ANSWER_POSITION, 8, seed=0),
            }
            print(f"{title}: 8 directions of the residual stream at = for {variable}")
            print(table(model, rival, drawn, found), "\n")


if __name__ == "__main__":
    main()
