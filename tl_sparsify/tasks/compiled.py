"""Tasks about compiled programs: a transformer whose circuit is known because its weights were written, not trained.

A compiled model's residual stream has one labelled coordinate for each value of each variable (Lindner et al., *Tracr:
Compiled Transformers as a Laboratory for Interpretability*, 2023), so a variable's place is known beforehand. What is
known of the units is of two kinds: :func:`working` reads it from the weights, :func:`needed` measures it by removal.
They differ: a neuron may be wired and never fire, or fire where nothing reads it, or be :func:`redundant`.

Zero is what an idle unit of such a model has, so zero is what a removed one is set to; its mean would leave the
constants of the program in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, batches_of
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.metrics import by_example, kl
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit, Units, heads, neurons
from tl_sparsify.search.constants import reduced, zero
from tl_sparsify.tasks.native import load_native
from tl_sparsify.tasks.pairing import Inputs, labelled_examples, pairs, partners, split_of
from tl_sparsify.tasks.task import Task

SPLITS = ("train", "validation", "test")
TOLERANCE = 1e-6  # nats: float32 round-off is far below, the least effect of a needed unit far above


INPUTS = ("t1", "t2", "t3", "t4", "t5", "t6")
Tokens = Int[np.ndarray, "n"]
Strings = Int[np.ndarray, "n length"]


def string(t1: Tokens, t2: Tokens, t3: Tokens, t4: Tokens, t5: Tokens, t6: Tokens) -> Strings:
    """The tokens of each input in a row: a mechanism for programs on strings of six, whose inputs are ``INPUTS``."""
    return np.stack([t1, t2, t3, t4, t5, t6], 1)


def every_string(symbols: int, length: int = len(INPUTS)) -> Strings:
    """Every string of this length, of symbols that are numbered from 0, in order."""
    return np.indices((symbols,) * length).reshape(length, -1).T


def numbers(strings: Strings, symbols: int) -> Int[np.ndarray, "n"]:
    """The number of each string: its tokens as digits to the base ``symbols``."""
    return strings @ symbols ** np.arange(strings.shape[1])[::-1]


@dataclass(frozen=True)
class Layout:
    """Where everything is in a compiled model.

    Attributes:
        residual: a name for each coordinate of the residual stream: ``length:3``, or ``one`` without a value.
        tokens, outputs: a name for each input and each output token.
        heads, neurons: how many each layer has.
    """

    residual: tuple[str, ...]
    tokens: tuple[str, ...]
    outputs: tuple[str, ...]
    heads: int
    neurons: int

    @staticmethod
    def load(folder: Path) -> Layout:
        """The layout of the model in ``folder``, from ``labels.json`` and ``config.json``."""
        labels, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("labels", "config"))
        residual, tokens, outputs = (tuple(labels[part]) for part in ("residual", "tokens", "outputs"))
        return Layout(residual, tokens, outputs, config["n_heads"], config["d_mlp"])

    def head(self, layer: int, positions: int | tuple[int, ...]) -> list[Unit]:
        """The first head of a layer, at ``positions``."""
        return [Unit(Site("head", layer, f"blocks.{layer}.attn.hook_z", self.heads, positions), 0)]

    def some_neurons(self, layer: int, index: Iterable[int], positions: int | tuple[int, ...]) -> list[Unit]:
        """The neurons of a layer with these numbers, at ``positions``."""
        site = Site("neuron", layer, f"blocks.{layer}.mlp.hook_post", self.neurons, positions)
        return [Unit(site, i) for i in index]

    def directions(
        self, variable: str, layer: int, positions: int | tuple[int, ...], place: str = "resid_post"
    ) -> list[Unit]:
        """The coordinates of ``variable`` in the residual stream after ``layer`` (``resid_mid``: after its attention),
        at ``positions``.

        Raises:
            KeyError: a variable without a coordinate.
        """
        numbers = [i for i, label in enumerate(self.residual) if label.split(":")[0] == variable]
        if not numbers:
            known = ", ".join(dict.fromkeys(label.split(":")[0] for label in self.residual))
            raise KeyError(f"no coordinate of the residual stream is labelled {variable!r}; there are {known}")
        size = len(self.residual)  # all coordinates are units, so that a random control has others to choose from
        site = Site("direction", layer, f"blocks.{layer}.hook_{place}", size, positions, torch.eye(size))
        return [Unit(site, i) for i in numbers]


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program, the algorithm that it is, and the inputs that it is studied on.

    Attributes:
        name, description: for people.
        folder: the model's: ``config.json``, ``model.safetensors``, ``labels.json`` and ``truth.json``.
        causal_model: its inputs are token ids, in the order of the positions behind the first token.
        causal_models, wrong: competing algorithms, and the names of the wrong ones.
        alignment: which heads and neurons carry its variables.
        directions: which coordinates of the residual stream do.
        inputs: every input of the program that is used: token ids.
        answers: the output token of every value of the output.
        asked: the values of the output that examples and pairs have.
        position: where the answer is read; the token that marks the beginning is at 0.
        sizes: the number of train, validation and test examples for each value asked.
    """

    name: str
    description: str
    folder: Path
    causal_model: CausalModel
    causal_models: Mapping[str, CausalModel]
    wrong: tuple[str, ...]
    alignment: Alignment
    directions: Alignment
    inputs: Callable[[], Int[np.ndarray, "n inputs"]]
    answers: Mapping[Any, int]
    asked: tuple[Any, ...]
    position: int
    sizes: tuple[int, int, int]
    truth: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / "truth.json"
        truth = json.loads(path.read_text()) if path.is_file() else {}  # not there while it is being measured
        object.__setattr__(self, "truth", {name: tuple(units) for name, units in truth.items()})

    def task(self) -> Task:
        """The program as a task; its answers are equally frequent."""
        return Task(
            name=self.name,
            description=self.description,
            model=lambda: load_native(self.folder),
            dataset=self.dataset,
            examples=self.examples,
            causal_model=self.causal_model,
            alignment=self.alignment,
            pairs=self.pairs,
            chance=1 / len(self.asked),
            causal_models=self.causal_models,
            wrong=self.wrong,
            truth=self.truth,
            ablation="zero",
        )

    @cached_property
    def layout(self) -> Layout:
        """Where everything is in the model."""
        return Layout.load(self.folder)

    @cached_property
    def _pool(self) -> tuple[Int[np.ndarray, "n inputs"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """Every input whose answer is asked, the number of its answer in ``asked``, and its split."""
        tokens = self.inputs()
        output = self.causal_model.run(self.named(tokens))[self.causal_model.output]
        number = (output[:, None] == np.asarray(self.asked)).argmax(1)
        tokens, number = tokens[kept := np.isin(output, self.asked)], number[kept]
        return tokens, number, split_of(numbers(tokens, len(self.layout.tokens)))

    def named(self, tokens: Int[np.ndarray, "n inputs"]) -> dict[str, Int[np.ndarray, "n"]]:
        """The same inputs by name, as the causal model takes them."""
        return dict(zip(self.causal_model.inputs, tokens.T, strict=True))

    def encode(self, inputs: Inputs) -> Examples:
        """Tokens ``[BOS, *inputs]``, and the causal model's answer at the position where it is read."""
        columns = [np.asarray(inputs[name]) for name in self.causal_model.inputs]
        first = np.full(len(columns[0]), self.layout.tokens.index("BOS"))
        tokens = torch.from_numpy(np.stack([first, *columns], 1).astype(np.int64))
        output = self.causal_model.run(inputs)[self.causal_model.output].tolist()
        return labelled_examples(
            tokens, torch.tensor([self.answers[value] for value in output]), position=self.position
        )

    def dataset(self, seed: int = 0) -> DatasetDict:
        """Train, validation and test inputs without repetition, every answer equally often, in random order.

        Returns:
            A column of token ids for each input of the causal model, and ``answer``, the name of the output token.
        """
        rng = np.random.default_rng([seed, 47])
        return DatasetDict({name: self._rows(rng, split, self.sizes[split]) for split, name in enumerate(SPLITS)})

    def examples(self, seed: int = 0) -> tuple[Examples, Examples, Examples]:
        """Train, validation and test examples of ``dataset(seed)``. The counterfactual of an example is another one of
        its split, for half of them with another answer."""
        train, validation, test = (self._examples(data, seed) for data in self.dataset(seed).values())
        return train, validation, test

    def pairs(self, n: int = 512, seed: int = 0) -> Pairs:
        """Pairs of test inputs; for each variable doing nothing is right for half of them."""
        tokens, _ = self._of_split(SPLITS.index("test"))
        return pairs(self.causal_model, self.named(tokens), self.encode, self.answers, n=n, seed=seed)

    def pool(self) -> Examples:
        """Every input whose answer is asked, of all splits, without counterfactuals."""
        return self.encode(self.named(self._pool[0]))

    def _rows(self, rng: np.random.Generator, split: int, size: int) -> Dataset:
        tokens, number = self._of_split(split)
        drawn = [rng.choice(np.flatnonzero(number == i), size, replace=False) for i in range(len(self.asked))]
        index = rng.permutation(np.concatenate(drawn))
        words = [self.layout.outputs[self.answers[self.asked[i]]] for i in number[index]]
        return Dataset.from_dict({**self.named(tokens[index]), "answer": words})

    def _of_split(self, split: int) -> tuple[Int[np.ndarray, "n inputs"], Int[np.ndarray, "n"]]:
        tokens, number, splits = self._pool
        return tokens[splits == split], number[splits == split]

    def _examples(self, data: Dataset, seed: int) -> Examples:
        rows = data.with_format("numpy")
        plain = self.encode({name: np.asarray(rows[name]) for name in self.causal_model.inputs})
        partner = torch.from_numpy(partners(plain.labels[:, self.position].numpy(), seed))
        return plain.with_partners(partner)


def working(model: Any) -> tuple[str, ...]:
    """The heads and neurons whose weights do work: a map in that is not zero, and a map out that is not zero. No model
    pass; what a unit writes may still be read by none, or its input never come."""
    units = heads(model) + neurons(model)
    found: list[Bool[Tensor, "some"]] = []
    for site in units.sites:
        block = model.blocks[site.layer]
        if site.kind == "head":
            moved = torch.einsum("hdk,hke->hde", block.attn.W_V, block.attn.W_O)
            constant = torch.einsum("hk,hke->he", block.attn.b_V, block.attn.W_O)
            found.append((moved != 0).flatten(1).any(1) | (constant != 0).any(1))
        else:
            read = (block.mlp.W_in != 0).any(0) | (block.mlp.b_in != 0)
            found.append(read & (block.mlp.W_out != 0).any(1))
    return Circuit(units, torch.cat(found).cpu()).names


def effects(model: Any, examples: Examples, units: Units) -> Float[Tensor, "units"]:
    """The greatest KL divergence (nats) over the examples that setting each unit alone to zero makes.

    One forward pass over the data for each unit, and one for the original.
    """
    original = _logits(model, examples)
    everything = Circuit.full(units)
    singles = torch.eye(len(units), dtype=torch.bool)
    return torch.stack([_worst(model, examples, everything - Circuit(units, one), original) for one in singles])


def needed(model: Any, examples: Examples, units: Units, *, tolerance: float = TOLERANCE) -> tuple[str, ...]:
    """The units that matter alone: setting one of them to zero changes the output on some example.

    Args:
        tolerance: a KL divergence up to this (nats, on every example) is no change.

    One forward pass over the data for each unit and one more.
    """
    return Circuit(units, effects(model, examples, units) > tolerance).names


def redundant(
    model: Any, examples: Examples, units: Units, kept: Collection[str], *, tolerance: float = TOLERANCE
) -> tuple[str, ...]:
    """The units outside ``kept`` that cannot all be removed, though each of them can: some stand in for others.

    They are removed one after the other as far as the output stays the same, from the last to the first and from the
    first to the last. What is left differs by the order; a unit that either order leaves is redundant.

    One forward pass over the data and, where the units in ``kept`` are not enough, two for each other unit.
    """
    original = _logits(model, examples)
    least = Circuit.of(units, kept)
    if _worst(model, examples, least, original) <= tolerance:
        return ()
    left = least
    for names in (reversed(units.names), units.names):
        circuit = Circuit.full(units)
        for name in names:
            less = circuit - Circuit.of(units, [name])
            if name not in kept and _worst(model, examples, less, original) <= tolerance:
                circuit = less
        left = left | circuit
    return (left - least).names


def _worst(
    model: Any, examples: Examples, circuit: Circuit, original: Float[Tensor, "rows choices"]
) -> Float[Tensor, ""]:
    """The greatest divergence over the examples with everything outside the circuit at zero."""
    removal = ablate(reduced(model, circuit, zero(model, examples, circuit.units), "zero"))
    return by_example(kl(original, _logits(model, examples, removal)), examples).max().cpu()


def _logits(model: Any, examples: Examples, *interventions: Any) -> Float[Tensor, "rows choices"]:
    with torch.no_grad(), intervened(model, *interventions):
        batches = batches_of(model, examples, None)
        return torch.cat([answer_logits(model, batch) for _, batch in batches])
