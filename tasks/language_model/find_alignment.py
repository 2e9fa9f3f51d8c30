"""Where do a text task's variables live in the small language model? Prints tables of interchange accuracies.

    python -m tasks.language_model.find_alignment TASK [--model NAME]

Places are tried on pairs of the test part; what is searched for (by ``tl_sparsify.align``) is found on other pairs and
judged on those.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse

import pandas as pd
import torch

import tl_sparsify as tls
from tasks.finding import heads, layers, table

PAIRS = 256
LAST = 8  # positions from the end at which places are tried
ABOVE = 0.55  # what is shown has at least this accuracy for some variable
RANKS = (None, 8)  # of learnt directions; none: heads and neurons alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--model", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pd.set_option("display.width", 150, "display.max_rows", None, "display.max_columns", None)
    task = tls.load_task(arguments.task, model=arguments.model)
    model = task.model()
    both = task.pairs(2 * PAIRS, 0)
    test, search = both[:PAIRS], both[PAIRS:]
    for name, causal_model in task.causal_models.items():
        if not torch.equal(test.expected(causal_model, ()), test.expected(task.causal_model, ())):
            continue  # its answers tell already that it is wrong
        places: dict[str, list[tls.Unit]] = {"nothing": []}
        for position in range(-1, -LAST - 1, -1):
            places |= layers(model, position, str(position))
        places |= heads(model, -1, "-1", 1)
        for layer in range(model.cfg.n_layers):
            site = tls.Site(
                kind="residual",
                layer=layer,
                hook=f"blocks.{layer}.hook_resid_post",
                size=1,
                positions=slice(-LAST, -1),
            )
            places[f"residual stream after layer {layer} at -{LAST} to -2"] = [tls.Unit(site, 0)]
        sites = tls.heads(model).at(-1).sites
        for last in range(1, len(sites)):
            units = [tls.Unit(site, index) for site in sites[: last + 1] for index in range(site.size)]
            places[f"all heads of layers 0 to {last} at -1"] = units
        print(f"{name}\n{table(model, causal_model, test, places, above=ABOVE)}\n", flush=True)
        inner = tuple(v for v in causal_model.variables if v != causal_model.output)
        for rank in RANKS:
            found = tls.align(model, causal_model, search, test, variables=inner, subspace=rank)
            print(f"align, subspace {rank}\n{found.to_frame()}\n", flush=True)


if __name__ == "__main__":
    main()
