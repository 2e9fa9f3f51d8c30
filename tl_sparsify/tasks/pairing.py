"""Which input is paired with which: splits that never move, and pairs on which doing nothing cannot score well.

An interchange accuracy says nothing where the right answer is the base's own. Pairs are therefore drawn so that for
each variable, taken alone, the causal model's answer changes on half of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.prompts import NO_LABEL

Inputs = Mapping[str, Shaped[np.ndarray, "n *rest"]]


@checked
def split_of(keys: Int[np.ndarray, "n"], shares: Sequence[int] = (3, 1, 1)) -> Int[np.ndarray, "n"]:
    """The split (0, 1, 2: train, validation, test) that each input, named by its number, always belongs to.

    A hash of the number (the SplitMix64 finaliser) decides, never a seed: no seed's test input is another's training
    input. ``shares`` are relative sizes.

    Example:
        >>> tls.pairing.split_of(np.arange(8))
        array([0, 0, 0, 1, 1, 1, 0, 0])
    """
    if not len(shares) or min(shares) < 0 or not 0 < sum(shares) <= 10**6:
        raise ValueError(f"shares are {tuple(shares)}; they are a few whole numbers, such as (3, 1, 1)")
    x = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.repeat(np.arange(len(shares)), shares)[(x % np.uint64(sum(shares))).astype(np.int64)]


@checked
def partners(answers: Shaped[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
    """For each example another one, every one taken once; for half of them one with another answer (exactly if every
    answer is there an even number of times, else within one).

    Raises:
        ValueError: an answer that more than half of the examples have, or that fewer than four have.

    Example:
        >>> answers = np.repeat(["same", "different"], 50)
        >>> float((answers[tls.pairing.partners(answers, seed=0)] != answers).mean())
        0.5
    """
    rng = np.random.default_rng([seed, 41])
    values, inverse, counts = np.unique(answers, return_inverse=True, return_counts=True)
    if not len(counts) or counts.max() * 2 > len(answers) + 1 or counts.min() < 4:
        raise ValueError(
            f"answers are {dict(zip(values.tolist(), counts.tolist(), strict=True))}: each must be there at least 4 "
            "times, and none for more than half of the examples"
        )
    # Odd counts are halved up and down in turn, the largest first, so that the others still outnumber its rest.
    odd = np.argsort(-counts, kind="stable")
    odd = odd[counts[odd] % 2 == 1]
    within = counts // 2
    within[odd[int(counts.max() % 2 == 0) :: 2]] += 1
    order = rng.permutation(len(answers))
    order = order[np.argsort(inverse[order], kind="stable")]
    place = np.concatenate([np.arange(count) for count in counts])  # among those of the answer
    stays = place < np.repeat(within, counts)
    partner = np.empty_like(order)
    for value in range(len(values)):
        group = order[stays & (inverse[order] == value)]
        partner[group] = np.roll(group, 1)
    other = order[~stays]
    partner[other] = np.roll(other, int((counts - within).max()))
    return partner


@checked
def pairs(
    causal_model: CausalModel,
    inputs: Inputs,
    encode: Callable[[Inputs], Examples],
    answers: Mapping[Any, int],
    *,
    n: int,
    seed: int,
    variables: Sequence[str] | None = None,
) -> Pairs:
    """``n`` pairs of ``inputs``, balanced for each of the ``variables`` (all where not given), and as evenly as that
    allows over the combinations of variables whose interchange changes the answer.

    Args:
        inputs: the pool: a value of each input variable for each of its inputs, no input twice.
        encode: the examples of some inputs, with the causal model's answer as their one label.

    Raises:
        ValueError: fewer than two inputs, a variable whose interchange changes the answer for none or for all of the
            pool's pairs, or changes that go together so that no pairs are balanced for every variable.

    Example:
        >>> parity = tls.CausalModel(("x",), {"odd": lambda x: x % 2, "answer": lambda odd: odd}, "answer")
        >>> def encode(rows):
        ...     x = torch.from_numpy(rows["x"])
        ...     return tls.pairing.labelled_examples(x[:, None], x % 2)
        >>> len(tls.pairing.pairs(parity, {"x": np.arange(40)}, encode, {0: 0, 1: 1}, n=16, seed=0))
        16
    """
    base, source = balanced(causal_model, inputs, variables or causal_model.variables, n=n, seed=seed)
    first, second = _at(inputs, base), _at(inputs, source)
    return Pairs(first, second, encode(first), encode(second), answers)


@checked
def balanced(
    causal_model: CausalModel, inputs: Inputs, variables: Sequence[str], *, n: int, seed: int
) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "k"]]:
    """Numbers of base and source inputs, as :func:`pairs` takes them.

    Example:
        >>> parity = tls.CausalModel(("x",), {"odd": lambda x: x % 2, "answer": lambda odd: odd}, "answer")
        >>> base, source = tls.pairing.balanced(parity, {"x": np.arange(40)}, ["odd"], n=20, seed=0)
        >>> int((base % 2 != source % 2).sum())
        10
    """
    rng = np.random.default_rng([seed, 43])
    size = len(next(iter(inputs.values())))
    if size < 2:
        raise ValueError(f"inputs holds {size} inputs; pairs need at least two")
    candidates = max(20_000, 40 * n)
    base = rng.integers(size, size=candidates)
    source = (base + rng.integers(1, size, size=candidates)) % size
    targets = [(causal_model, variable) for variable in variables]
    index = _balanced(_at(inputs, base), _at(inputs, source), targets, n, rng)
    return base[index], source[index]


@checked
def balanced_among(
    base: Inputs, source: Inputs, targets: Sequence[tuple[CausalModel, str]], *, n: int, seed: int
) -> Int[np.ndarray, "k"]:
    """Numbers of ``n`` of the given pairs, balanced for each variable (of a causal model of its own), in random order.

    Raises:
        ValueError: as :func:`pairs`.

    Example:
        >>> parity = tls.CausalModel(("x",), {"odd": lambda x: x % 2, "answer": lambda odd: odd}, "answer")
        >>> base, source = {"x": np.arange(100)}, {"x": np.arange(100) // 2}
        >>> chosen = tls.pairing.balanced_among(base, source, [(parity, "odd")], n=20, seed=0)
        >>> int((base["x"][chosen] % 2 != source["x"][chosen] % 2).sum())
        10
    """
    return _balanced(base, source, targets, n, np.random.default_rng([seed, 47]))


def _balanced(
    base: Inputs, source: Inputs, targets: Sequence[tuple[CausalModel, str]], n: int, rng: np.random.Generator
) -> Int[np.ndarray, "k"]:
    variables = [variable for _, variable in targets]
    changed = _changed(base, source, targets)
    pattern = changed @ (1 << np.arange(len(variables)))
    present, counts = np.unique(pattern, return_counts=True)
    bits = (present[:, None] >> np.arange(len(variables)) & 1).astype(bool)
    for variable, bit in zip(variables, bits.T, strict=True):
        if bit.all() or not bit.any():
            raise ValueError(
                f"interchanging {variable!r} changes the answer for {'all' if bit.all() else 'none'} of the pairs: "
                "no balanced pairs can be drawn"
            )
    wanted = _quotas(bits, counts, n)
    off = np.abs(wanted @ bits - n / 2)
    if off.max() > 1:
        raise ValueError(
            f"interchanging {variables[int(off.argmax())]!r} would change the answer for {off.max():g} of {n} pairs "
            "more or fewer than half, because of the other variables: balance fewer variables"
        )
    chosen = [rng.choice(np.flatnonzero(pattern == p), k, replace=False) for p, k in zip(present, wanted, strict=True)]
    return rng.permutation(np.concatenate(chosen))


def _changed(base: Inputs, source: Inputs, targets: Sequence[tuple[CausalModel, str]]) -> Bool[np.ndarray, "n v"]:
    """Whether the causal model's answer changes when each variable alone is taken from the source."""
    columns: list[Bool[np.ndarray, "n"]] = []
    for model, variable in targets:
        after = model.interchange(base, {variable: source})[model.output]
        columns.append(after != model.run(base)[model.output])
    return np.stack(columns, 1)


def _quotas(bits: Bool[np.ndarray, "p v"], counts: Int[np.ndarray, "p"], n: int) -> Int[np.ndarray, "p"]:
    """How many pairs of each pattern: every column's ones hold half of the weight (iterative proportional fitting)."""
    weight: Float[np.ndarray, "p"] = np.minimum(counts / counts.sum(), 1 / len(counts))
    for _ in range(200):
        for bit in bits.T:
            weight = np.where(bit, weight / (2 * weight[bit].sum()), weight / (2 * weight[~bit].sum()))
    exact = weight / weight.sum() * n
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: n - whole.sum()]] += 1
    while True:  # rounding may have moved a column off half: move single pairs while that helps
        off = whole @ bits - n / 2
        moved = np.abs(off - bits[:, None] + bits[None, :].astype(int)).sum(2)  # one pair from pattern i to pattern j
        moved[whole == 0] = np.inf
        i, j = np.unravel_index(moved.argmin(), moved.shape)
        if moved[i, j] >= np.abs(off).sum():
            break
        whole[i] -= 1
        whole[j] += 1
    if (whole > counts).any():
        raise ValueError(
            f"{int((whole - counts).max())} pairs too few of a combination of changes that {n} balanced pairs need: "
            "give a pool in which the variables' values are more even, or ask for fewer pairs"
        )
    return whole


def _at(inputs: Inputs, index: Int[np.ndarray, "some"]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values)[index] for name, values in inputs.items()}


@checked
def labelled_examples(
    tokens: Int[Tensor, "n pos"],
    answers: Int[Tensor, "n"],
    *,
    position: int = -1,
    choices: Int[Tensor, "k"] | None = None,
) -> Examples:
    """Examples that are answered at one position.

    Example:
        >>> found = tls.pairing.labelled_examples(torch.tensor([[3, 3, 32], [3, 5, 32]]), torch.tensor([33, 34]))
        >>> found.labels.tolist()
        [[-100, -100, 33], [-100, -100, 34]]
    """
    labels = tokens.new_full(tokens.shape, NO_LABEL)
    labels[:, position] = answers
    return Examples(tokens, labels, choices=choices)
