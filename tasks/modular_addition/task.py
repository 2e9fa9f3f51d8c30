"""Modular addition: a + b modulo a prime. Data, causal models and the trained transformer.

After Nanda, Chan, Lieberum, Smith and Steinhardt, *Progress measures for grokking via mechanistic interpretability*
(2023). An input is two numbers and a query token; the answer is read at the query. The variables are cosines and sines
of a few frequencies: they are carried by directions of the residual stream, not by heads or neurons.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls
from tl_sparsify._internal.files import read_tensors

MODULUS = 97  # token ids 0 to 96
QUERY = MODULUS
VOCABULARY = MODULUS + 1
INPUTS = ("a", "b")
ANSWER_POSITION = 2
# The frequencies that the network uses, as find_alignment.py finds them: two, and harmonics of these (modulo 97 and up
# to sign, 11 is twice 43, 32 three times 43, 34 twice 17).
KEYS = (43, 17, 11, 32, 34)
SUMS = 32  # of the inputs that pairs are drawn from: among all sums too few pairs have the same one
ANSWERS = {number: number for number in range(MODULUS)}
SHAPE = {"layers": 1, "heads": 4, "width": 64, "mlp": 256}
SIZES = {"train": 40 * MODULUS, "validation": 10 * MODULUS, "test": 10 * MODULUS}
# Where the waves are at the query: in what the neurons read, and in the stream after them.
PLACES = {"added": "blocks.0.hook_resid_mid", "waves": "blocks.0.hook_resid_post"}
FOLDER = Path(__file__).parent
MODEL, DIRECTIONS = FOLDER / "model", FOLDER / "directions.safetensors"


def wave(number: Int[np.ndarray, "*shape"], keys: tuple[int, ...] = KEYS) -> Float[np.ndarray, "*shape waves"]:
    """Cosines and sines of a number at each key frequency: all cosines, then all sines."""
    angle = 2 * np.pi * number[..., None] * np.array(keys) / MODULUS
    return np.concatenate([np.cos(angle), np.sin(angle)], -1)


def doubled(added: Float[np.ndarray, "n waves"]) -> Float[np.ndarray, "n waves"]:
    """The waves of a + b from the added waves of a and b, which lie at half its angle: the angle is doubled."""
    x, y = np.split(added, 2, 1)
    return np.concatenate([x**2 - y**2, 2 * x * y], 1) / np.tile(x**2 + y**2, 2)


def vote(waves: Float[np.ndarray, "n waves"]) -> Int[np.ndarray, "n"]:
    """The number whose waves agree best."""
    return (waves @ wave(np.arange(MODULUS)).T).argmax(1)


# Waves of a and b are added; their angle is doubled; the number whose waves agree best is the answer.
CLOCK = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "added": lambda a, b: wave(a) + wave(b),
        "waves": lambda added: doubled(added),
        "answer": lambda waves: vote(waves),
    },
    output="answer",
)
# The same answers, but the sum is a number: right as far as it goes.
SUM = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"sum": lambda a, b: (a + b) % MODULUS, "answer": lambda sum: sum},
    output="answer",
)
# Wrong, though its answers are right: tens and units are added apart.
DIGITS = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={
        "tens": lambda a, b: a // 10 + b // 10,
        "units": lambda a, b: a % 10 + b % 10,
        "answer": lambda tens, units: (10 * tens + units) % MODULUS,
    },
    output="answer",
)
# Wrong: the difference.
DIFFERENCE = tls.CausalModel(
    inputs=INPUTS,
    mechanisms={"waves": lambda a, b: wave(a - b), "answer": lambda waves: vote(waves)},
    output="answer",
)


def inputs_of(index: Int[np.ndarray, "n"]) -> dict[str, Int[np.ndarray, "n"]]:
    """The inputs with these numbers."""
    return dict(zip(INPUTS, np.unravel_index(index, (MODULUS, MODULUS)), strict=True))


def encode(inputs: tls.pairing.Inputs) -> tls.Examples:
    """Tokens ``[a, b, query]``, answered at the query."""
    total = (inputs["a"] + inputs["b"]) % MODULUS
    tokens = torch.tensor(np.stack([inputs["a"], inputs["b"], np.full(len(total), QUERY)], axis=1))
    return tls.pairing.labelled_examples(tokens, torch.tensor(total), choices=torch.arange(MODULUS))


SPACE = tls.InputSpace(
    causal_model=CLOCK,
    size=MODULUS**2,
    inputs_of=inputs_of,
    cells=MODULUS,
    cell=lambda values: values["answer"],
    encode=encode,
    word=lambda answer: answer,
    answers=ANSWERS,
    sizes=SIZES,
)


def task() -> tls.Task:
    """The task: see the card, README.md."""
    return tls.Task(
        name="modular_addition",
        description=f"the sum of two numbers modulo {MODULUS}",
        model=load_model,
        dataset=SPACE.dataset,
        examples=SPACE.examples,
        causal_model=CLOCK,
        alignment=alignment(),
        pairs=pairs,
        chance=1 / MODULUS,
        causal_models={"clock": CLOCK, "sum": SUM, "digits": DIGITS, "difference": DIFFERENCE},
        wrong=("digits", "difference"),
    )


def pairs(
    n: int = 512,
    seed: int = 0,
    part: str = "test",
    causal_model: tls.CausalModel = CLOCK,
    variables: tuple[str, ...] | None = None,
) -> tls.Pairs:
    """Pairs of inputs of the test part of the input space (or of another), balanced for every variable of a causal
    model or for the ``variables`` named, from a pool of inputs with 32 of the sums."""
    rng = np.random.default_rng([seed, 71])
    cells = SPACE.numbers[list(SIZES).index(part)]
    pool = np.concatenate([cells[total] for total in rng.choice(MODULUS, SUMS, replace=False)])
    return tls.pairing.pairs(causal_model, inputs_of(pool), encode, ANSWERS, n=n, seed=seed, variables=variables)


def alignment() -> tls.Alignment:
    """Which directions carry each variable at the query (found by find_alignment.py)."""
    _, bases = read_tensors(DIRECTIONS, "directions")
    return tls.Alignment({variable: carried(variable, bases[variable]) for variable in PLACES})


def carried(variable: str, basis: Float[torch.Tensor, "width r"]) -> list[tls.Unit]:
    """Directions, the columns of ``basis``, of the place where a variable is."""
    site = tls.Site(
        kind="direction",
        layer=0,
        hook=PLACES[variable],
        size=basis.shape[1],
        positions=ANSWER_POSITION,
        basis=basis,
    )
    return [tls.Unit(site, i) for i in range(site.size)]


def load_model(folder: Path = MODEL) -> TransformerBridge:
    """The trained transformer, on the CPU and in evaluation mode."""
    return tls.task.load_native(folder)
