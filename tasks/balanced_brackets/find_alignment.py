"""Where do ``total_zero``, ``never_below`` and ``balanced`` live? Prints tables of interchange accuracy.

    python -m tasks.balanced_brackets.find_alignment

Neurons are chosen on pairs of the validation part of the input space; every accuracy is on pairs of the test part.
"""

# ruff: noqa: T201
from __future__ import annotations

import pandas as pd
import torch

import tl_sparsify as tls
from tasks.balanced_brackets.task import ANSWER_POSITION, BRACKETS, FROM_THE_RIGHT, load_model, pairs
from tasks.finding import any_directions, any_units, grown, heads, layers, learned_directions, table

PAIRS = 2048
GROW = (8, 16, 24, 32, 40, 48, 64)
ALL = slice(0, ANSWER_POSITION)
PLACES = (
    ("total_zero", "blocks.0.hook_resid_post"),
    ("total_zero", "blocks.1.hook_resid_mid"),
    ("never_below", "blocks.1.hook_resid_mid"),
)


def main() -> None:
    torch.set_num_threads(1)
    pd.set_option("display.width", 150, "display.max_rows", None, "display.max_columns", None)
    model, search, test = load_model(), pairs(PAIRS, 1, "validation"), pairs(PAIRS, 0)
    sets = {"nothing": [], **layers(model, ANSWER_POSITION, "="), **heads(model, ANSWER_POSITION, "=", 4)}
    sets |= layers(model, ALL, "the brackets") | heads(model, ALL, "the brackets", 1)
    print("Accuracy on test pairs; with a star on those whose right answer changes.\n")
    print(table(model, BRACKETS, test, sets), "\n")
    kept = {name: sets[name] for name in sets if name.startswith("L1") and "L1H1, L1H2, L1H3" in name}
    print("The same with the row read from the right\n", table(model, FROM_THE_RIGHT, test, kept), "\n")
    [site] = [site for site in tls.neurons(model).at(ANSWER_POSITION).sites if site.layer == 1]
    for n, units in zip(GROW, grown(model, BRACKETS, search, site, "balanced", GROW), strict=True):
        few = {"chosen": units} | {f"random {seed}": any_units(site, n, seed) for seed in range(3)}
        print(f"{n} neurons of layer 1 at =\n{table(model, BRACKETS, test, few)}")
        print("  ", ", ".join(str(unit.index) for unit in units), "\n")
    for variable, hook in PLACES:
        for rank in (1, 2, 4):
            found = {
                "learnt": learned_directions(model, BRACKETS, search, hook, ANSWER_POSITION, variable, rank),
                "random": any_directions(model, hook, ANSWER_POSITION, rank, seed=0),
            }
            print(f"{rank} directions of {hook} at = for {variable}\n{table(model, BRACKETS, test, found)}\n")


if __name__ == "__main__":
    main()
