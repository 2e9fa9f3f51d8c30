"""Which frequencies does the network use, and which directions carry their waves? Prints tables, writes directions.

    python -m tasks.modular_addition.find_alignment [--write]

Directions are found by regression on inputs of the train part, or learnt (DAS) on pairs of the validation part; neurons
are chosen on pairs of the validation part; every accuracy is on pairs of the test part.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import tl_sparsify as tls
from tasks.finding import among, any_directions, any_units, grown, heads, layers, learned_directions, table
from tasks.modular_addition.task import (
    ANSWER_POSITION,
    CLOCK,
    DIFFERENCE,
    DIGITS,
    DIRECTIONS,
    INPUTS,
    KEYS,
    MODULUS,
    PLACES,
    SPACE,
    carried,
    encode,
    inputs_of,
    load_model,
    pairs,
    wave,
)
from tl_sparsify._internal.files import write_tensors

PAIRS = 2048
GROW = (2 * len(KEYS), 16, 32, 64, 128, 192)
HEARD = KEYS[:2]  # loud enough in the logits to change answers alone
Numbers = Int[np.ndarray, "n"]


@torch.no_grad()
def run(model: Any, inputs: tls.pairing.Inputs) -> tuple[Float[Tensor, "n numbers"], dict[str, Float[Tensor, "n w"]]]:
    """Logits of the numbers at the query, and the residual stream there."""
    logits, cache = model.run_with_cache(encode(inputs).tokens)
    return logits[:, ANSWER_POSITION, :MODULUS], {hook: cache[hook][:, ANSWER_POSITION] for hook in PLACES.values()}


def spectrum(model: Any) -> pd.DataFrame:
    """The amplitude of every frequency of a + b - c in the logit of c, and its share of the logits' variance."""
    inputs = inputs_of(np.arange(MODULUS**2))
    logits = run(model, inputs)[0].double()
    logits = logits - logits.mean(1, keepdim=True)
    apart = torch.tensor((inputs["a"] + inputs["b"])[:, None] - np.arange(MODULUS))
    rows = []
    for k in range(1, MODULUS // 2 + 1):
        amplitude = float(2 * (logits * (2 * torch.pi * k * apart / MODULUS).cos()).mean())
        rows.append({"frequency": k, "amplitude": amplitude, "share": amplitude**2 / 2 / float(logits.var())})
    return pd.DataFrame(rows).set_index("frequency").sort_values("amplitude", ascending=False)


def regressed(values: Float[Tensor, "n width"], targets: Float[np.ndarray, "n waves"]) -> Float[Tensor, "width waves"]:
    """An orthonormal basis of the directions in which values move with the targets (least squares)."""
    wanted = torch.tensor(np.concatenate([targets, np.ones((len(targets), 1))], 1))
    slope = torch.linalg.lstsq(wanted, values.double()).solution[:-1]
    return torch.linalg.qr(slope.T).Q.float()


def explained(values: Float[Tensor, "n width"], basis: Float[Tensor, "width r"]) -> float:
    """The share of the variance that lies in the directions."""
    centred = (values - values.mean(0)).double()
    return float((centred @ basis.double()).square().sum() / centred.square().sum())


def principal(values: Float[Tensor, "n width"], rank: int) -> Float[Tensor, "width rank"]:
    """An orthonormal basis of the directions of most variance."""
    return torch.linalg.svd((values - values.mean(0)).double(), full_matrices=False).Vh[:rank].T.contiguous().float()


def read_off(model: Any, key: int) -> Float[Tensor, "width 2"]:
    """An orthonormal basis of the two directions by which the unembedding writes a frequency into the logits."""
    weights = model.unembed.W_U.detach()[:, :MODULUS].double()
    return torch.linalg.qr(weights @ torch.tensor(wave(np.arange(MODULUS), (key,)))).Q.float()


def of_one_strength(logits: Float[Tensor, "n numbers"], sums: Int[np.ndarray, "n"], key: int) -> float:
    """The share of a frequency's power in the logits that is a wave at a + b of the same strength for all inputs."""
    turned = logits.double().numpy() * np.exp(2j * np.pi * key * (sums[:, None] - np.arange(MODULUS)) / MODULUS)
    found = turned.sum(1)
    return float(found.real.mean() ** 2 / (np.abs(found) ** 2).mean())


def shares(stream: Mapping[str, Float[Tensor, "n width"]], inputs: tls.pairing.Inputs) -> pd.DataFrame:
    """How much of the variance of each place goes with each kind of waves of each frequency."""
    a, b = (inputs[name] for name in INPUTS)
    found: dict[str, dict[str, float]] = {}
    for key in KEYS:
        one, two = wave(a, (key,)), wave(b, (key,))
        kinds = {"of a plus of b": one + two, "of a + b": wave(a + b, (key,)), "of a - b": wave(a - b, (key,))}
        for (variable, hook), (kind, waves) in itertools.product(PLACES.items(), kinds.items()):
            fit = torch.linalg.qr(torch.tensor(waves - waves.mean(0))).Q
            centred = (stream[hook] - stream[hook].mean(0)).double()
            share = float((fit.T @ centred).square().sum() / centred.square().sum())
            found.setdefault(f"{variable}: waves {kind}", {})[str(key)] = share
    return pd.DataFrame(found).T


def votes(waves: Float[np.ndarray, "n waves"], amplitudes: Mapping[int, float]) -> Float[np.ndarray, "n numbers"]:
    """What each number gets by the waves, if they are as strong as the network's."""
    return (waves * np.tile([amplitudes[key] for key in KEYS], 2)) @ wave(np.arange(MODULUS)).T


def mixed(key: int, a: Numbers, b: Numbers, one: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n waves"]:
    """The waves of a + b, but for one frequency, whose waves are given."""
    waves = wave(a + b)
    waves[:, np.tile([k == key for k in KEYS], 2)] = one
    return waves


def apart(key: int, amplitudes: Mapping[int, float]) -> tls.CausalModel:
    """The clock, with the wave of one frequency as a variable of its own and votes as strong as the network's."""
    return tls.CausalModel(
        INPUTS,
        {
            "one": lambda a, b: wave(a + b, (key,)),
            "answer": lambda one, a, b: votes(mixed(key, a, b, one), amplitudes).argmax(1),
        },
        "answer",
    )


def clear(drawn: tls.Pairs, key: int, amplitudes: Mapping[int, float]) -> Bool[np.ndarray, "n"]:
    """Pairs on which the mixed vote is not close: the winner is further ahead than for half of them."""
    one = wave(drawn.source_inputs["a"] + drawn.source_inputs["b"], (key,))
    found = np.sort(votes(mixed(key, drawn.base_inputs["a"], drawn.base_inputs["b"], one), amplitudes), 1)
    ahead = found[:, -1] - found[:, -2]
    own = drawn.base.labels[:, ANSWER_POSITION] != drawn.expected(apart(key, amplitudes), ("one",))
    return ahead >= np.median(ahead[own.numpy()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the directions found by regression")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    pd.set_option("display.width", 170, "display.max_rows", None, "display.max_columns", None)
    pd.set_option("display.max_colwidth", 80)
    model = load_model()
    amplitudes = spectrum(model)
    print(f"Frequencies of the logits\n{amplitudes.head(len(KEYS) + 4).round(4)}\n")
    strengths = {int(key): float(row) for key, row in amplitudes.amplitude.items()}
    every = inputs_of(np.arange(MODULUS**2))
    logits, stream = run(model, every)
    for key in HEARD:
        share = of_one_strength(logits, every["a"] + every["b"], key)
        print(f"{key}: {share:.3f} of its power in the logits is one strength")
    print(f"\nShares of variance\n{shares(stream, every).round(3)}\n")
    seen = inputs_of(np.concatenate(SPACE.numbers[0]))
    _, stream = run(model, seen)
    values = CLOCK.run(seen)
    bases = {variable: regressed(stream[hook], values[variable]) for variable, hook in PLACES.items()}
    for variable, hook in PLACES.items():
        share = explained(stream[hook], bases[variable])
        print(f"{variable}: {2 * len(KEYS)} directions of {hook} have {share:.3f} of its variance")
    if write:
        write_tensors(DIRECTIONS, "directions", {"keys": list(KEYS)}, bases)
    search, test = pairs(PAIRS, 1, "validation"), pairs(PAIRS, 0)
    rank = 2 * len(KEYS)
    sets: dict[str, list[tls.Unit]] = {"nothing": []}
    for variable, hook in PLACES.items():
        sets[f"{rank} directions of {hook}, by regression"] = carried(variable, bases[variable])
        for n in range(2, len(KEYS)):
            target = values[variable][:, [*range(n), *range(len(KEYS), len(KEYS) + n)]]
            name = f"{2 * n} directions of {hook}, by regression on {', '.join(map(str, KEYS[:n]))}"
            sets[name] = carried(variable, regressed(stream[hook], target))
        for r in (4, 6, rank):
            sets[f"{r} directions of {hook}, of most variance"] = carried(variable, principal(stream[hook], r))
        for r in (2, 4, rank):
            sets[f"{r} directions of {hook}, learnt"] = learned_directions(
                model, CLOCK, search, hook, ANSWER_POSITION, "waves", r
            )
        for seed in range(3):
            sets[f"{rank} directions of {hook}, random {seed}"] = any_directions(
                model, hook, ANSWER_POSITION, rank, seed
            )
    print(f"\nDirections\n{table(model, CLOCK, test, sets)}\n")
    sets = {**layers(model, ANSWER_POSITION, "="), **heads(model, ANSWER_POSITION, "=", 4)}
    print(f"Heads and neurons\n{table(model, CLOCK, test, sets)}\n")
    [site] = tls.neurons(model).at(ANSWER_POSITION).sites
    for n, units in zip(GROW, grown(model, CLOCK, search, site, "waves", GROW), strict=True):
        few = {f"{n} chosen neurons": units} | {
            f"{n} random neurons, {seed}": any_units(site, n, seed) for seed in range(3)
        }
        print(table(model, CLOCK, test, few), "\n")
    for position, name in enumerate(INPUTS):
        print(f"Places at {name}\n{table(model, CLOCK, test, layers(model, position, name))}\n")
    print("One frequency alone, on pairs balanced for it")
    for key in HEARD:
        one, number = apart(key, strengths), KEYS.index(key)
        drawn, part = (
            pairs(PAIRS // 2, seed, of, causal_model=one, variables=("one",))
            for seed, of in ((0, "test"), (1, "validation"))
        )
        target = values["waves"][:, [number, number + len(KEYS)]]
        found = {
            "nothing": [],
            "its 2 directions after the neurons, by regression": carried(
                "waves", regressed(stream[PLACES["waves"]], target)
            ),
        }
        for k in HEARD:
            found[f"the 2 by which {'it' if k == key else k} is read off"] = carried("waves", read_off(model, k))
        for hook in PLACES.values():
            found[f"4 directions of {hook}, learnt"] = learned_directions(
                model, one, part, hook, ANSWER_POSITION, "one", 4
            )
        both = [
            table(model, one, some, found)[["one", "one*"]]
            for some in (drawn, among(drawn, clear(drawn, key, strengths)))
        ]
        print(f"{key}\n{pd.concat(both, axis=1, keys=['all', 'clear votes'])}\n")
    drawn, part = (pairs(PAIRS, seed, of, DIGITS) for seed, of in ((0, "test"), (1, "validation")))
    found = {"nothing": [], **layers(model, ANSWER_POSITION, "=")}
    for variable, hook in itertools.product(DIGITS.variables[:-1], PLACES.values()):
        title = f"{variable}: {rank} directions of {hook}, learnt"
        found[title] = learned_directions(model, DIGITS, part, hook, ANSWER_POSITION, variable, rank)
    print(f"digits\n{table(model, DIGITS, drawn, found)}\n")
    right = test.expected(DIFFERENCE, ()) == test.expected(CLOCK, ())
    print(f"difference: {float(right.double().mean()):.3f} of its answers are right")


if __name__ == "__main__":
    main()
