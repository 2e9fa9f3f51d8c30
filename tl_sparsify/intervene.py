"""Interventions: the one primitive ``value + keep * (v - value)``, and the only file with hooks.

Under an intervention a unit's value ``v`` becomes ``lerp(value, v, keep)``: 1 keeps it, 0 sets it to ``value``.
Ablation takes constants for ``value``, interchange the values of a source run, and ``keep`` may be anything between.
Interventions nest: the inner context sees the values that the outer one left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify.circuit import Circuit, Mixing, Reduction, Values
from tl_sparsify.examples import NO_LABEL, Examples
from tl_sparsify.units import Model, Site, Units


@dataclass(frozen=True, eq=False)
class Intervention:
    """``do(unit = value)`` for some units, softened by ``keep``.

    Attributes:
        units: the units.
        keep: ``[units]`` or, by example, ``[batch, units]``; 1 leaves a unit alone, 0 replaces it.
        values: what replaces them: constants, or the values of another run.
        mixing: for each site, what is added to that as a linear map of the site's units as they are there.
    """

    units: Units
    keep: Float[Tensor, "*batch units"]
    values: Values
    mixing: tuple[Mixing | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.keep.ndim not in (1, 2) or self.keep.shape[-1] != len(self.units):
            raise ValueError(f"keep has shape {tuple(self.keep.shape)}; {self.units!r} need [units] or [batch, units]")
        if self.values.units != self.units:
            raise ValueError(f"values are for {self.values.units!r}, the intervention for {self.units!r}")


def ablate(reduction: Reduction) -> Intervention:
    """Set every removed unit of a reduction to its constant (or affine replacement), everywhere.

    Nested with other interventions on its units it comes last, so that affine replacements see what the others left.
    """
    return Intervention(reduction.units, reduction.circuit.mask.float(), reduction.values, reduction.mixing)


def interchange(circuit: Circuit, source: Values) -> Intervention:
    """Set the units *in* ``circuit`` to their values in a source run (``source`` from :func:`run_values`)."""
    return Intervention(circuit.units, (~circuit.mask).float(), source)


def _canonical(model: Model, hook: str) -> str:
    """The hook point's own name: under an alias, compatibility mode would call a hook twice."""
    if hook not in model.hook_dict:
        raise ValueError(f"the model has no hook point {hook!r}: are the units those of this model?")
    return model.hook_dict[hook].name or hook


def _apply(
    site: Site,
    keep: Float[Tensor, "*batch some"],
    value: Float[Tensor, "..."],
    mixing: Mixing | None,
    activation: Float[Tensor, "..."],
    hook: Any,
) -> Float[Tensor, "..."]:
    v = site.read(activation)
    if keep.ndim == 2 and len(keep) != len(activation):
        raise ValueError(f"keep is for {len(keep)} examples, {site.hook} saw a batch of {len(activation)}")
    weight = keep.to(v)[..., None] if keep.ndim == 1 else keep.to(v)[:, None, :, None]
    target = value.to(v).expand_as(v)
    if mixing is not None:
        target = target + mixing.of(v)
    new = torch.lerp(target, v, weight.expand_as(v))
    where = site.position_mask(v.shape[0], v.shape[1])
    if where is not None:
        new = torch.where(where.to(v.device)[..., None, None], new, v)
    return site.write(activation, v, new)


@contextmanager
def intervened(model: Model, *interventions: Intervention) -> Iterator[None]:
    """Run the model under interventions, in the order given; nothing of them is left afterwards.

    Units that are kept outright cost nothing and stay the same bit for bit. Gradients flow through values and keep.
    No model pass of its own.

    Raises:
        ValueError: a hook point that the model lacks, or (when the model runs) an activation of another shape.
    """
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for intervention in interventions:
        parts = zip(
            intervention.units.sites,
            intervention.units.split(intervention.keep),
            intervention.values.tensors,
            intervention.mixing or (None,) * len(intervention.units.sites),
            strict=True,
        )
        for site, keep, value, mixing in parts:
            if keep.requires_grad or bool((keep != 1).any()):
                for hook, entry in zip(site.hook_names, site.entries(value), strict=True):
                    hooks.append((_canonical(model, hook), partial(_apply, site, keep, entry, mixing)))
    with model.hooks(fwd_hooks=hooks):
        yield


def _joined(parts: list[Float[Tensor, "batch pos some one"]]) -> Float[Tensor, "batch pos some width"]:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


@dataclass(frozen=True)
class Recording:
    """The activations that the last forward pass left at each hook point, and the units to read in them."""

    units: Units
    activations: dict[str, Float[Tensor, "..."]]

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points, each once, in order of the units."""
        return tuple(dict.fromkeys(hook for site in self.units.sites for hook in site.hook_names))

    def read(self) -> tuple[Float[Tensor, "batch pos some width"], ...]:
        """The units' values, per site.

        Raises:
            ValueError: a hook point that did not fire.
        """
        for hook in self.hooks:
            if hook not in self.activations:
                raise ValueError(
                    f"hook point {hook} did not fire: the model does not compute it, or it is switched off"
                )
        return tuple(_joined([site.read(self.activations[h]) for h in site.hook_names]) for site in self.units.sites)

    def pull(self, gradients: dict[str, Float[Tensor, "..."]]) -> tuple[Float[Tensor, "batch pos some width"], ...]:
        """The gradients with respect to the units' values, per site, from those with respect to the activations."""
        return tuple(_joined([site.pull(gradients[h]) for h in site.hook_names]) for site in self.units.sites)


@contextmanager
def recorded(model: Model, units: Units, *, gradients: bool = False) -> Iterator[Recording]:
    """Record the units' activations in every forward pass inside the context (the last one's are kept).

    With ``gradients`` the graph starts at the first recorded activation, and the recorded tensors are part of it, so
    that ``torch.autograd.grad`` can be taken with respect to them; otherwise they are detached.

    Raises:
        ValueError: a hook point that the model lacks.
    """
    recording = Recording(units, {})

    def keep(activation: Float[Tensor, "..."], hook: Any, name: str) -> Float[Tensor, "..."] | None:
        if not gradients:
            recording.activations[name] = activation.detach()
            return None
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
        recording.activations[name] = activation
        return activation

    with model.hooks(fwd_hooks=[(_canonical(model, name), partial(keep, name=name)) for name in recording.hooks]):
        yield recording


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Switch the parameters' gradients off, and afterwards on again where they were: only activations are
    differentiated here, and the weights' part of the graph would cost memory."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def check_model(model: Any) -> None:
    """Refuse a model in training mode: dropout and batch statistics would make every number a random one."""
    roots = [("", model), ("original_model.", getattr(model, "original_model", None))]
    for prefix, root in roots:
        for name, module in root.named_modules() if isinstance(root, torch.nn.Module) else ():
            if module.training:
                raise ValueError(f"model is in training mode (at {prefix}{name or 'its root'}): call model.eval()")


def device_of(model: Model) -> torch.device:
    """The device of the model's first parameter: where inputs go."""
    return next(iter(model.parameters())).device


def output(model: Model, batch: Examples) -> Float[Tensor, "batch pos vocab"]:
    """The model's logits on a batch. One forward pass.

    Raises:
        ValueError: a token id outside the vocabulary, or an output that is no logits.
    """
    device = device_of(model)
    tokens = batch.tokens.to(device)
    embedding = getattr(model, "W_E", None)
    if embedding is not None and not tokens.is_floating_point():
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= len(embedding):
            bad = low if low < 0 else high
            raise ValueError(f"tokens holds id {bad}; the model's vocabulary has ids 0 to {len(embedding) - 1}")
    if batch.attention_mask is None:
        logits = model(tokens)
    else:
        logits = model(tokens, attention_mask=batch.attention_mask.to(device).long())
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ValueError(f"the model returned {type(logits).__name__}, not logits [batch, pos, vocab]")
    return logits if logits.ndim == 3 else logits[:, None]


def answer_rows(batch: Examples) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """Example (within the batch) and position of every labelled position, in order."""
    example, position = (batch.labels != NO_LABEL).nonzero(as_tuple=True)
    return example, position


def answer_logits(model: Model, batch: Examples) -> Float[Tensor, "rows choices"]:
    """The logits at the labelled positions, over ``choices`` (or every token), in float32 or better.

    One forward pass.

    Raises:
        ValueError: labels or choices outside the output vocabulary, or labels of another length than the output; a
            NaN or infinite output, with the first hook point that has one.
    """
    logits = output(model, batch)
    if batch.labels.shape[1] != logits.shape[1]:
        raise ValueError(f"labels has {batch.labels.shape[1]} positions, the model's output {logits.shape[1]}")
    top = int(batch.labels.max() if batch.choices is None else batch.choices.max())
    if top >= logits.shape[-1]:
        raise ValueError(f"labels or choices hold id {top}; the model's output has ids 0 to {logits.shape[-1] - 1}")
    example, position = answer_rows(batch)
    rows = logits[example.to(logits.device), position.to(logits.device)]
    if batch.choices is not None:
        rows = rows[:, batch.choices.to(rows.device)]
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"the model's output is NaN or infinite, {_first_bad_hook(model, batch)}")
    return rows if rows.dtype == torch.float64 else rows.float()


def answer_index(batch: Examples) -> Int[Tensor, "rows"]:
    """The right answer's column in :func:`answer_logits` for every labelled position."""
    example, position = answer_rows(batch)
    labels = batch.labels[example, position]
    if batch.choices is None:
        return labels
    return (labels[:, None] == batch.choices).int().argmax(1)


def _first_bad_hook(model: Model, batch: Examples) -> str:
    bad: list[str] = []

    def look(activation: Any, hook: Any) -> None:
        if isinstance(activation, Tensor) and activation.is_floating_point() and not torch.isfinite(activation).all():
            bad.append(str(hook.name))

    def watched(name: str) -> bool:  # masked attention scores are minus infinity by design
        return not name.endswith("hook_attn_scores")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hook points that are switched off
        with model.hooks(fwd_hooks=[(watched, look)]):
            output(model, batch)
    return f"first at hook point {bad[0]}" if bad else "at no hook point before the output"


def run_values(model: Model, batch: Examples, units: Units) -> Values:
    """The units' values on a batch: the source of an interchange. One forward pass, no gradients."""
    with torch.no_grad(), recorded(model, units) as recording:
        output(model, batch)
    return Values(units, recording.read())


def batch_size_for(model: Model, examples: Examples, batch_size: int | None) -> int:
    """The given batch size, or one that runs about 16,384 tokens at a time."""
    if batch_size is not None:
        return batch_size
    per_example = examples.labels.shape[1]
    return max(1, min(len(examples), 16_384 // per_example))


def valid_positions(model: Any, batch: Examples) -> Bool[Tensor, "batch pos"]:
    """Positions that hold input: neither padding nor the beginning-of-sequence token, whose activations are
    outliers that spoil a mean."""
    shape = batch.labels.shape
    valid = torch.ones(shape, dtype=torch.bool) if batch.attention_mask is None else batch.attention_mask.cpu()
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    if bos is None or batch.tokens.shape != shape:
        return valid
    first = valid & (valid.long().cumsum(1) == 1)
    without = valid & ~(first & (batch.tokens.cpu() == bos))
    return torch.where(without.any(1, keepdim=True), without, valid)  # an example that is nothing else keeps it


def unit_positions(
    model: Model, batch: Examples, site: Site, v: Float[Tensor, "batch pos some width"]
) -> Bool[Tensor, "batch pos"]:
    """Positions that hold input and at which the site is meant."""
    valid = valid_positions(model, batch)
    wanted = valid if valid.shape == v.shape[:2] else torch.ones(v.shape[:2], dtype=torch.bool)
    where = site.position_mask(*v.shape[:2])
    return (wanted if where is None else wanted & where).to(v.device)
