"""Interventions: the one primitive ``value + keep * (v - value)``, and the only file with hooks (but for experts').

Under an intervention a unit's value ``v`` becomes ``lerp(value, v, keep)``: 1 keeps it, 0 sets it to ``value``.
Ablation takes constants for ``value``, interchange the values of a source run, and ``keep`` may be anything between.
Interventions nest: the inner context sees the values that the outer one left. They are those of the thread that makes
them: another one that intervenes on the same model waits, and one that only runs it sees the model as it is.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked, checked_fields
from tl_sparsify._internal.encoders import to_read
from tl_sparsify._internal.experts import experts_of, hooked_experts
from tl_sparsify._internal.first_tokens import watching_first_tokens
from tl_sparsify._internal.layouts import STREAM
from tl_sparsify._internal.readers import first_hooks, noting, reader_hooks, reads, rows_first, rows_last
from tl_sparsify._internal.recomputation import AGAIN, ONCE, lock_of, setting
from tl_sparsify.core.circuit import Circuit, FirstToken, NeighbourMap, Values
from tl_sparsify.core.edges import apply_to_edges, check_run
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site, check_places
from tl_sparsify.core.units import Model, Units
from tl_sparsify.reading.heard import Heard
from tl_sparsify.reading.written import Written


@checked_fields
@dataclass(frozen=True, eq=False)
class Intervention:
    """``do(unit = value)`` for some units, softened by ``keep``.

    Attributes:
        units: the units.
        keep: ``[units]`` or, by example, ``[batch, units]``; 1 leaves a unit alone, 0 replaces it.
        values: what replaces them: constants, or the values of another run.
        mixing: for each site, what is added to that as a linear map of the site's units as they are there.
        first_token: at which first tokens the units are left alone, whatever ``keep`` says.

    Example:
        >>> half = tls.Intervention(units, torch.full((12,), 0.5), means)  # halfway to their means
        >>> with tls.intervened(model, half):
        ...     logits = model(test.tokens)
    """

    units: Units
    keep: Float[Tensor, "*batch units"]
    values: Values
    mixing: tuple[NeighbourMap | None, ...] | None = None
    first_token: FirstToken = "none"

    def __post_init__(self) -> None:
        if self.keep.ndim not in (1, 2) or self.keep.shape[-1] != len(self.units):
            raise ValueError(f"keep has shape {tuple(self.keep.shape)}; {self.units!r} need [units] or [batch, units]")
        if bool(torch.isnan(self.keep.detach()).any()):
            raise ValueError("keep holds NaN; 1 leaves a unit alone, 0 replaces it")
        if self.values.units != self.units:
            raise ValueError(f"values are for {self.values.units!r}, the intervention for {self.units!r}")


@checked
def ablate(reduction: Reduction, source: Values | None = None) -> Intervention:
    """Set every removed unit of a reduction to its constant (or affine replacement), everywhere; of one whose values
    are those of counterfactual inputs, to its value in ``source``, their run (:func:`forward.run_values`).

    Nested with other interventions on its units it comes last, so that affine replacements see what the others left.

    Raises:
        ValueError: values of counterfactual inputs without a ``source``, constants with one.

    Example:
        >>> with tls.intervened(model, tls.ablate(reduction)):
        ...     logits = model(test.tokens)
    """
    paired = reduction.values.paired
    if paired and source is None:
        raise ValueError(
            "reduction sets removed units to their values on counterfactual inputs, and source is not given: "
            "ablate(reduction, tls.run_values(model, examples.counterfactuals, reduction.units))"
        )
    if source is not None and (not paired or source.paired or source.units != reduction.units):
        what = f"for {source.units!r}" if paired else f"given, and the reduction has {reduction.kind} values of its own"
        raise ValueError(f"source is {what}: give the run of a reduction made with tls.constants.counterfactual")
    keep = reduction.circuit.mask.float()
    values = reduction.values if source is None else source
    return Intervention(reduction.units, keep, values, reduction.mixing, reduction.first_token)


@checked
def interchange(circuit: Circuit, source: Values) -> Intervention:
    """Set the units *in* ``circuit`` to their values in a source run (``source`` from :func:`forward.run_values`).

    Example:
        >>> source = tls.run_values(model, test.with_partners(torch.arange(64).flip(0)), units)
        >>> with tls.intervened(model, tls.interchange(tls.Circuit.of(units, ["L1H0"]), source)):
        ...     logits = model(test.tokens)
    """
    return Intervention(circuit.units, (~circuit.mask).float(), source)


@contextmanager
def _hooked(model: Model, hooks: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """The model with these hooks, for this thread: another one that wants hooks on it waits, and what another one runs
    on it meanwhile does not see them."""
    mine = threading.get_ident()

    def here(act: Callable[..., Any]) -> Callable[..., Any]:
        def only_here(activation: Any, hook: Any) -> Any:
            return act(activation, hook=hook) if mine in (threading.get_ident(), AGAIN.get()) else None

        return only_here

    points = model.hook_dict  # a bridge makes it anew each time that it is asked
    mine_only = [(_canonical(model, points, name), here(hook)) for name, hook in hooks]
    experts = [part for part in mine_only if isinstance(part[0], str) and experts_of(model, part[0])]
    reading = [part for part in mine_only if isinstance(part[0], str) and reads(part[0])]
    plain = [part for part in mine_only if part not in experts and part not in reading]
    changed = {name for name, _ in plain}
    if reading:
        plain += [(_canonical(model, points, name), here(hook)) for name, hook in reader_hooks(model, reading)]
    first = [(points[name], here(hook)) for name, hook in first_hooks(model, [name for name, _ in reading])]
    with (
        setting(ONCE) if reading else nullcontext(),
        lock_of(model),
        noting(model, bool(reading), changed) as notes,
        _before_others(first),
        model.hooks(fwd_hooks=plain + [(name, here(note)) for name, note in notes]),
        hooked_experts(model, experts),
    ):
        yield


@contextmanager
def _before_others(hooks: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Hook points with these hooks, which come before those that are there."""
    handles = [(point, point.add_hook(hook, prepend=True)) for point, hook in hooks]
    try:
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def _canonical(model: Model, points: Mapping[str, Any], hook: Any) -> Any:
    """The hook point's own name: under an alias, compatibility mode would call a hook twice."""
    if not isinstance(hook, str) or reads(hook) or experts_of(model, hook) is not None:
        return hook
    if hook not in points:
        raise ValueError(f"the model has no hook point {hook!r}: are the units those of this model?")
    return points[hook].name or hook


def _apply(
    site: Site,
    keep: Float[Tensor, "*batch some"],
    value: Float[Tensor, "..."],
    mixing: NeighbourMap | None,
    spared: Callable[[], Bool[Tensor, "batch pos"] | None],
    activation: Float[Tensor, "..."],
    hook: Any,
    arrived: Mapping[str, Float[Tensor, "..."]],
) -> Float[Tensor, "..."]:
    v = site.read(*to_read(site, arrived, activation))
    check_places(site, activation)
    if keep.ndim == 2 and len(keep) != len(activation):
        raise ValueError(f"keep is for {len(keep)} examples, {site.hook} saw a batch of {len(activation)}")
    check_run(site, value, v)
    weight = keep.to(v)[..., None] if keep.ndim == 1 else keep.to(v)[:, None, :, None]
    target = value.to(v).expand_as(v)
    if mixing is not None:
        target = target + mixing.of(v)
    new = torch.lerp(target, v, weight.expand_as(v))
    if (where := site.position_mask(v.shape[0], v.shape[1])) is not None:
        new = torch.where(where.to(v.device)[..., None, None], new, v)
    if (first := spared()) is not None:
        new = torch.where(first.to(v.device)[..., None, None], v, new)
    return site.write(activation, v, new)


def _arrive(name: str, arrived: dict[str, Tensor], activation: Float[Tensor, "..."], hook: Any) -> None:
    arrived[name] = activation


@checked
@contextmanager
def intervened(model: Model, *interventions: Intervention) -> Iterator[None]:
    """Run the model under interventions, in the order given; nothing of them is left afterwards.

    Units that are kept outright cost nothing and stay the same bit for bit. Gradients flow through values and keep.
    No model pass of its own.

    Raises:
        ValueError: a model in training mode, a hook point that it lacks, or (when it runs) an activation of another
            shape, a named position that is padding, or edges into readers of which one is a part of another.

    Example:
        >>> before = model(test.tokens)
        >>> with tls.intervened(model, tls.ablate(reduction)):
        ...     ablated = model(test.tokens)
        >>> torch.equal(ablated, before), torch.equal(model(test.tokens), before)
        (False, True)
    """
    if model.training:
        raise ValueError("model is in training mode: call model.eval()")
    hooks: list[tuple[Any, Callable[..., Any]]] = []
    seen: dict[str, Bool[Tensor, "batch pos"] | None] = {}
    rules: list[FirstToken] = [part.first_token for part in interventions if part.first_token != "none"]
    for intervention in interventions:
        spared = partial(seen.get, intervention.first_token)
        parts = zip(
            intervention.units.sites,
            intervention.units.split(intervention.keep),
            intervention.values.tensors,
            intervention.mixing or (None,) * len(intervention.units.sites),
            strict=True,
        )
        changed = [part for part in parts if part[1].requires_grad or bool((part[1] != 1).any())]
        arrived: dict[str, Float[Tensor, "..."]] = {}
        encoded = [name for site, *_ in changed if site.encoder for name in (site.hook, site.source or site.hook)]
        hooks += [(name, partial(_arrive, name, arrived)) for name in dict.fromkeys(encoded)]
        for site, keep, value, mixing in changed:
            act = apply_to_edges if site.kind == "edge" else partial(_apply, arrived=arrived)
            for hook, entry in zip(site.hook_names, site.entries(value), strict=True):
                hooks.append((hook, partial(act, site, keep, entry, mixing, spared)))
    watching = watching_first_tokens(model, rules, seen) if rules and hooks else nullcontext()
    with _hooked(model, hooks) if hooks else nullcontext(), watching:
        yield


@contextmanager
def streaming(
    model: Model, stream: Float[Tensor, "layers_and_one d_model"], where: Bool[Tensor, "batch pos"]
) -> Iterator[None]:
    """Set the residual stream before the first block and after each, at the positions ``where``, to what it is known
    to be there: what a block leaves, and what the next one reads of that."""

    def set_to(x: Float[Tensor, "batch pos d_model"], hook: Any, row: int) -> Float[Tensor, "batch pos d_model"]:
        if x.shape[:2] != where.shape:  # narrowed to the positions of answers
            return x
        return torch.where(where.to(x.device)[..., None], stream[row].to(x), x)

    ends = [(layer, row, end) for layer in range(len(stream) - 1) for row, end in enumerate(("pre", "post"), layer)]
    with _hooked(model, [(f"blocks.{layer}.hook_resid_{end}", partial(set_to, row=row)) for layer, row, end in ends]):
        yield


@contextmanager
def acting(model: Model, acts: list[tuple[str, Callable[..., Any]]]) -> Iterator[None]:
    """Call ``act(activation, hook=...)`` at each of these hook points; what it returns, if anything, takes the
    activation's place. For what is no intervention, such as another backward pass. No model pass of its own."""
    with _hooked(model, acts):
        yield


def joined(parts: list[Float[Tensor, "batch pos some one"]]) -> Float[Tensor, "batch pos some width"]:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)


@dataclass(frozen=True)
class Recording:
    """The activations that the last forward pass left at each hook point, and the units to read in them."""

    units: Units
    activations: dict[str, Float[Tensor, "..."]]
    written: dict[str, tuple[Float[Tensor, "batch pos _ d_model"], ...]] = field(default_factory=dict)
    heard: dict[str, Heard] = field(default_factory=dict)

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points, each once, in order of the units."""
        names = ((*site.hook_names, *filter(None, (site.source,))) for site in self.units.sites)
        return tuple(dict.fromkeys(hook for some in names for hook in some))

    def read(self) -> tuple[Float[Tensor, "batch pos some width"], ...]:
        """The units' values, per site.

        Raises:
            ValueError: a hook point that did not fire.
        """
        for hook in self.hooks:
            if hook not in self.activations and hook not in self.heard:
                raise ValueError(f"hook point {hook} did not fire: the model does not compute it, or it is off")
        most = max(self.written.values(), key=len, default=())
        # what readers are told is a beginning of this
        stacked = rows_last(torch.cat([rows_first(part) for part in most])) if most else None
        return tuple(
            joined([site.read(self.activations[h], self.activations[site.source or h]) for h in site.hook_names])
            if site.kind != "edge" or stacked is None
            else site.read(stacked[:, :, : site.rows])
            for site in self.units.sites
        )

    def pull(self, gradients: dict[str, Float[Tensor, "..."]]) -> tuple[Float[Tensor, "batch pos some width"], ...]:
        """The gradients with respect to the units' values, per site, from those with respect to the activations; of
        what is heard nothing, as its effects are taken on the way."""
        return tuple(
            torch.empty(0, 0, 0, 0)
            if site.hook in self.heard
            else joined([site.pull(gradients[h]) for h in site.hook_names])
            for site in self.units.sites
        )


@checked
@contextmanager
def recorded(model: Model, units: Units, *, gradients: bool = False, lean: bool = False) -> Iterator[Recording]:
    """Record the units' activations in every forward pass inside the context (the last one's are kept).

    With ``gradients`` the graph starts at the first recorded activation, and the recorded tensors are part of it, so
    that ``torch.autograd.grad`` can be taken with respect to them; otherwise they are detached. ``lean``: of edges into
    attention what it projects instead (``heard``), where that says as much; nothing in the context may change these.

    Raises:
        ValueError: a hook point that the model lacks.

    Example:
        >>> with tls.recorded(model, units) as recording:
        ...     logits = model(test.tokens)
        >>> [tuple(values.shape) for values in recording.read()]
        [(64, 5, 4, 16), (64, 5, 4, 16), (64, 5, 4, 16)]
    """
    recording = Recording(units, {})
    placed = any(site.positions is not None for site in units.sites if site.kind == "edge")

    def keep(activation: Float[Tensor, "..."], hook: Any, name: str) -> Float[Tensor, "..."] | Heard | None:
        into = recording if AGAIN.get() is None else Recording(units, {})  # what runs again is recorded
        for site in units.sites:
            if name in site.hook_names:
                check_places(site, activation)
        if isinstance(hook, Written):
            into.written[name] = hook.parts if gradients else tuple(part.detach() for part in hook.parts)
            if lean and hook.heard is not None and hook.heard.behind.slope is not None and not placed:
                return into.heard.setdefault(name, hook.heard)
        if not gradients:
            into.activations[name] = activation.detach()
            return None
        if not activation.requires_grad:
            activation = activation.detach().requires_grad_()
        into.activations[name] = activation
        return activation

    with _hooked(model, [(name, partial(keep, name=name)) for name in recording.hooks]):
        yield recording


@contextmanager
def narrowed(
    model: Model, example: Int[Tensor, "rows"], position: Int[Tensor, "rows"], labelled: int
) -> Iterator[list[int]]:
    """Unembed only the stream at these positions: the model's output has a row for each, ``[rows, 1, vocab]``. Every
    other hook sees what it sees without. For models that :func:`narrows` knows; what it yields gets an entry each
    time that the stream is narrowed. No model pass of its own.

    Raises:
        ValueError: (when the model runs) a stream that has other than ``labelled`` positions.
    """
    times: list[int] = []

    def narrow(stream: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "rows one d_model"]:
        if stream.shape[1] != labelled:
            raise ValueError(f"labels has {labelled} positions, the model's output {stream.shape[1]}")
        times.append(len(example))
        index = (example * labelled + position).to(stream.device)
        return stream.flatten(0, 1).index_select(0, index)[:, None]

    with _hooked(model, [(STREAM, narrow)]):
        yield times


def first_bad_hook(model: Model, run: Callable[[], Any]) -> str:
    """Where in ``run``, a forward pass, the first NaN or infinite activation stands, in words."""
    bad: list[str] = []

    def look(activation: Any, hook: Any) -> None:
        if isinstance(activation, Tensor) and activation.is_floating_point() and not torch.isfinite(activation).all():
            bad.append(str(hook.name))

    def watched(name: str) -> bool:  # masked attention scores are minus infinity by design
        return not name.endswith("hook_attn_scores")

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hook points that are switched off
        with _hooked(model, [(watched, look)]):
            run()
    return f"first at hook point {bad[0]}" if bad else "at no hook point before the output"
