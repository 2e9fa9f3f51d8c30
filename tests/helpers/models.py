"""Models small enough to check by hand or by brute force, and examples for them. All in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jaxtyping
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens import HookedRootModule, TransformerBridge, TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import Intervention, ablate, intervened, recorded
from tl_sparsify.core.reduction import Reduction, fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads, neurons

VOCABULARY = 11
LENGTH = 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(seed: int = 1, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A transformer of 2 layers, 2 heads and 5 neurons in each, all parameters random; without norms, so that
    nothing is cast to float32."""
    config = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 2, "n_ctx": 8, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 5, "act_fn": "relu", "normalization_type": None, "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config | settings), dtype=dtype)
    return shaken(model, 0.4, seed)


def shaken(model: Any, scale: float, seed: int = 1) -> Any:
    """The model with random numbers of this size added to all parameters, in evaluation mode."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model.eval()


@cache
def bridge(**settings: Any) -> Any:
    """The same transformer for all tests that do not change it."""
    return fresh(**settings)


def units_of(model: Any) -> Units:
    return heads(model) + neurons(model)


def examples(n: int = 12, seed: int = 0, *, answers: int = 1, choices: tuple[int, ...] | None = None) -> Examples:
    """Random tokens, with an answer at each of the last positions and a random counterfactual."""
    generator = seeded(seed)
    tokens, other = torch.randint(VOCABULARY, (2, n, LENGTH), generator=generator)
    possible = torch.tensor(choices if choices is not None else range(VOCABULARY))
    labels = torch.full((n, LENGTH), -100)
    labels[:, -answers:] = possible[torch.randint(len(possible), (n, answers), generator=generator)]
    return Examples(
        tokens,
        labels,
        counterfactual_tokens=other,
        counterfactual_labels=labels.roll(1, 0),
        choices=None if choices is None else possible,
    )


def values_in(model: Any, tokens: Tensor, units: Units, *interventions: Intervention) -> tuple[Tensor, ...]:
    """What the model makes of the units under interventions."""
    with torch.no_grad(), intervened(model, *interventions), recorded(model, units) as recording:
        model(tokens)
    return recording.read()


def random_values(units: Units, seed: int = 0, width: int = 4) -> Values:
    """Random constants: ``width`` numbers for a head, one for a neuron."""
    generator = seeded(seed)
    sizes = [(site.size, width if site.kind == "head" else 1) for site in units.sites]
    return Values(units, tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes))


def random_mask(units: Units, seed: int = 0, kept: float = 0.5) -> Tensor:
    return torch.rand(len(units), generator=seeded(seed)) < kept


def reduction_of(model: Any, mask: Tensor | None = None, seed: int = 0, units: Units | None = None) -> Reduction:
    """A reduction with random constants and, unless it is given, a random circuit."""
    units = units_of(model) if units is None else units
    circuit = Circuit(units, random_mask(units, seed) if mask is None else mask)
    return Reduction(circuit, random_values(units, seed), fingerprint=fingerprint(model))


class TwoLayers(HookedRootModule):
    """``logits = act(x @ W_in + b_in) @ W_out``: floats ``[n, features]`` in, one bank of units, no positions."""

    def __init__(self, w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None, *, relu: bool = False):
        super().__init__()
        self.w_in, self.w_out = torch.nn.Parameter(w_in), torch.nn.Parameter(w_out)
        self.b_in = torch.nn.Parameter(torch.zeros_like(w_in[0]) if b_in is None else b_in)
        self.relu = relu
        self.hook_hidden = HookPoint()
        self.setup()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.w_in + self.b_in
        return self.hook_hidden(hidden.relu() if self.relu else hidden) @ self.w_out

    @property
    def units(self) -> Units:
        return Units((Site("neuron", 0, "hook_hidden", self.w_in.shape[1]),))


def planted(kept: tuple[str, ...]) -> Any:
    """A transformer of which only the units ``kept`` reach the output: the others' readers are zero."""
    model = fresh()
    silent = Circuit.of(units_of(model), kept)
    with torch.no_grad():
        for site, mask in zip(silent.units.sites, silent.units.split(~silent.mask), strict=True):
            block = model.blocks[site.layer]
            reader = block.attn.o if site.kind == "head" else block.mlp.out
            width = 4 if site.kind == "head" else 1
            reader.original_component.weight[:, mask.repeat_interleave(width)] = 0
    return model


def linear(units: int = 6, features: int = 4, choices: int = 3, seed: int = 0) -> TwoLayers:
    """A linear network."""
    generator = seeded(seed)
    w_in = torch.randn(features, units, generator=generator, dtype=torch.float64)
    return TwoLayers(w_in, torch.randn(units, choices, generator=generator, dtype=torch.float64))


def inputs(n: int = 12, features: int = 4, choices: int = 3, seed: int = 0) -> Examples:
    """Random float inputs and labels for such a network."""
    generator = seeded(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return Examples(x, torch.randint(choices, (n, 1), generator=generator))


EXCLUSIVE_OR = ("L0N0", "L0N1")
"""The units of :func:`exclusive_or` that its answers need."""


def exclusive_or() -> TwoLayers:
    """``x0 != x1`` for inputs of plus and minus one, worked out by the first two of eight ReLU units.

    Units 0 and 1 are ``relu(x0 + x1)`` and ``relu(-x0 - x1)``. Unit 2 varies most, and nothing reads it; unit 3 is
    constant; units 4 to 6 have one value and are read with weights that cancel; unit 7 is always zero. An order by
    variance keeps 2, and one that looks at each unit alone keeps 6: that one alone costs more than unit 0, though with
    4 and 5 it costs nothing.
    """
    columns = [(1, 1, 0), (-1, -1, 0), (0, 0, 50), (0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1), (1, 1, 1)]
    w_in = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    b_in = torch.tensor([0, 0, 60, 5, 2, 2, 2, -9], dtype=torch.float64)
    same = torch.tensor([2.0, 2, 0, -0.4, 1.2, 1.2, -2.4, 1], dtype=torch.float64)
    return TwoLayers(w_in, torch.stack([same, -same], 1), b_in, relu=True)


def exclusive_or_inputs(n: int = 32, seed: int = 0) -> Examples:
    """Inputs for :func:`exclusive_or`; the label is 0 where the first two are the same."""
    x = 2.0 * torch.randint(2, (n, 3), generator=seeded(seed)).double() - 1
    return Examples(x, (x[:, :1] != x[:, 1:2]).long())


class NoCasts(TorchFunctionMode):
    """Norms and softmax cast to float32 in float64 models too, and a last digit may round either way. Here they stay in
    float64, so that 1e-10 can be asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextmanager
def unchecked() -> Iterator[None]:
    """Without the tests' shape checks, as for a user, who gets the library's own errors."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The model leaves the context as it came in: no hooks, no gradients, the same flags and parameters."""

    def state() -> dict[str, Any]:
        points = dict.fromkeys(model.hook_dict.values())
        return {
            "hooks": [(len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks)) for point in points],
            "context_level": getattr(model, "context_level", 0),
            "training": [module.training for module in model.modules()],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "grad": [parameter.grad for parameter in model.parameters()],
            "fingerprint": fingerprint(model),
            "grad_enabled": torch.is_grad_enabled(),
        }

    before = state()
    try:
        yield
    finally:
        after = state()
        assert after == before, f"changed: {[name for name in before if before[name] != after[name]]}"


def softened(model: Any, batch: Examples, reduction: Reduction, keep: Tensor, current: Reduction | None) -> Tensor:
    """The logits with ``current`` ablated and every unit ``u`` at ``c[u] + keep[u] (v[u] - c[u])``."""
    outer = () if current is None else (ablate(current),)
    with intervened(model, *outer, Intervention(reduction.units, keep, reduction.values)):
        return answer_logits(model, batch)


def jacobian(model: Any, batch: Examples, reduction: Reduction, current: Reduction | None = None) -> Tensor:
    """``[example, row of logits, unit]``: by how much the logits of one example change, to first order, when a unit is
    removed. Rows are the labelled positions times the answers. From ``torch.autograd.functional.jacobian`` of the
    logits with respect to the units' values, contracted with the steps ``c - v``."""
    return torch.stack([_jacobian(model, batch[i : i + 1], reduction, current) for i in range(len(batch))])


def _jacobian(model: Any, example: Examples, reduction: Reduction, current: Reduction | None) -> Tensor:
    outer = () if current is None else (ablate(current),)
    hooks = [site.hook for site in reduction.units.sites]
    with torch.no_grad(), intervened(model, *outer), recorded(model, reduction.units) as recording:
        answer_logits(model, example)
    found = recording.activations

    def logits(*changes: Tensor) -> Tensor:
        added = [(name, lambda v, hook, change=change: v + change) for name, change in zip(hooks, changes, strict=True)]
        with intervened(model, *outer), model.hooks(fwd_hooks=added):
            return answer_logits(model, example).flatten()

    start = tuple(torch.zeros_like(found[hook]) for hook in hooks)
    parts = torch.autograd.functional.jacobian(logits, start)
    columns = []
    for site, hook, part, c in zip(reduction.units.sites, hooks, parts, reduction.values.tensors, strict=True):
        step = c - site.read(found[hook])
        where = site.position_mask(*step.shape[:2])
        step = step if where is None else step * where[..., None, None]
        columns.append((part.reshape(len(part), *step.shape[1:]) * step).sum((1, 3)))
    return torch.cat(columns, 1)


def fisher(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``diag(p) - p p'`` for each row of logits."""
    p = (logits / temperature).softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
