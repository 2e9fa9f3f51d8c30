"""Forward: run a model and read its answers: logits at the labelled positions, units' values, positions that count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import all_finite, check_count, check_is_model
from tl_sparsify._internal.layouts import narrows
from tl_sparsify._internal.random import check_seed
from tl_sparsify._internal.ranks import share
from tl_sparsify._internal.recomputation import ALWAYS, ONCE, lock_of, recomputing, setting
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.intervene import first_bad_hook, narrowed, recorded
from tl_sparsify.core.memory import device_of, rows_for, too_long
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.core.site import Site, input_at
from tl_sparsify.core.units import Model, Units, check_positions

T = TypeVar("T")


_FROZEN: WeakKeyDictionary[Any, tuple[int, list[torch.nn.Parameter]]] = WeakKeyDictionary()
"""How many times a model is frozen at the moment, by nested calls and other threads, and what is switched on again when
it no longer is."""


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Switch the parameters' gradients off, and afterwards on again where they were: only activations are
    differentiated here, and the weights' part of the graph would cost memory."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "torch.inference_mode() is on, and what is made under it has no gradients: call this outside of it "
            "(torch.no_grad() does no harm)"
        )
    with lock_of(model):
        times, wanted = _FROZEN.pop(model, (0, []))
        if times == 0:
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _set_wanted(wanted, False)
        _FROZEN[model] = times + 1, wanted
    try:
        yield
    finally:
        with lock_of(model):
            times, wanted = _FROZEN.pop(model)
            if times > 1:
                _FROZEN[model] = times - 1, wanted
            else:
                _set_wanted(wanted, True)


def _set_wanted(parameters: list[torch.nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)


def check_model(model: Any) -> None:
    """Refuse what is no model, and one in training mode: dropout and batch statistics would make every number a random
    one."""
    check_is_model(model)
    roots = [("", model), ("original_model.", getattr(model, "original_model", None))]
    for prefix, root in roots:
        if not isinstance(root, torch.nn.Module) or not _trains(root):
            continue
        for name, module in root.named_modules():
            if module.training:
                raise ValueError(f"model is in training mode (at {prefix}{name or 'its root'}): call model.eval()")


def _trains(root: torch.nn.Module) -> bool:
    """Whether any module in it is in training mode: without names, which take several times as long to make."""
    waiting, seen = [root], {id(root)}
    while waiting:
        module = waiting.pop()
        if module.training:
            return True
        for child in module.children():
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    return False


def check_examples(examples: Any, name: str = "examples") -> None:
    """Refuse what is no :class:`Examples`.

    Raises:
        ValueError: anything else, with how to make examples.
    """
    if not isinstance(examples, Examples):
        raise ValueError(
            f"{name} is a {type(examples).__name__}, not Examples: make them of tensors, tls.Examples(tokens, labels), "
            "or of text, tls.Examples.from_prompts(model, prompts, answers)"
        )


def check_held_out(units: Units, held_out: Any, train: Examples) -> None:
    """Refuse examples to judge on that are none, and units at places that each example of ``train`` has of its own: a
    tensor of places does not say where they are in other examples.

    Raises:
        ValueError: either.
    """
    if held_out is None or held_out is train:
        return
    check_examples(held_out, "held_out")
    check_positions(units, len(held_out))
    for site in units.sites:
        if isinstance(site.positions, Tensor) and not bool((site.positions == site.positions[:1]).all()):
            raise ValueError(
                f"positions of {site.hook} are a tensor of places, one for each example of train, which does not say "
                "where they are in held_out: name a span, which every split has of its own, or leave held_out out"
            )


def check_call(model: Any, examples: Any, *units: Units, seed: Any = 0, batch_size: Any = None) -> None:
    """What every entry that runs a model on examples refuses at once: :func:`check_model`, :func:`check_examples`,
    units at positions of other examples, a seed or a batch size that is none."""
    check_model(model)
    check_examples(examples)
    for some in units:
        check_positions(some, len(examples))
    check_seed(seed)
    if batch_size is not None:
        check_count("batch_size", batch_size)


def output(model: Model, batch: Examples) -> Float[Tensor, "batch pos vocab"]:
    """The model's logits on a batch. One forward pass.

    Raises:
        ValueError: a token id outside the vocabulary, or an output that is no logits.
    """
    device = device_of(model)
    embedding = getattr(model, "W_E", None)
    if embedding is not None and not batch.tokens.is_floating_point() and batch.tokens.ndim != 2:
        raise ValueError(f"tokens are of shape {tuple(batch.tokens.shape)}; a language model takes [n, pos]")
    if embedding is not None and not batch.tokens.is_floating_point():
        low, high = int(batch.tokens.min()), int(batch.tokens.max())
        if low < 0 or high >= len(embedding):
            bad = low if low < 0 else high
            raise ValueError(f"tokens holds id {bad}; the model's vocabulary has ids 0 to {len(embedding) - 1}")
    tokens, mask = batch.tokens.to(device), batch.attention_mask
    with input_at(mask), recomputing(model) if _again(model, batch) else nullcontext():
        logits = model(tokens) if mask is None else model(tokens, attention_mask=mask.to(device).long())
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ValueError(f"the model returned {type(logits).__name__}, not logits [batch, pos, vocab]")
    return logits if logits.ndim == 3 else logits[:, None]


def _again(model: Model, batch: Examples) -> bool:
    """Whether the blocks are run once more in the backward pass: one example's graph would not fit."""
    if not torch.is_grad_enabled() or ONCE.get() or not hasattr(model, "blocks"):
        return False
    return ALWAYS.get() or (len(batch) == 1 and too_long(model, batch, narrow=narrows(model)))


def answer_rows(batch: Examples) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """Example (within the batch) and position of every labelled position, in order, on the CPU."""
    example, position = (batch.labels.cpu() != NO_LABEL).nonzero(as_tuple=True)
    return example, position


def answer_logits(model: Model, batch: Examples) -> Float[Tensor, "rows choices"]:
    """The logits at the labelled positions, over ``choices`` (or every token), in float32 or better.

    One forward pass, which unembeds no other position where the architecture allows that (:func:`narrows`).

    Raises:
        ValueError: labels or choices outside the output vocabulary, or labels of another length than the output; a
            NaN or infinite output, with the first hook point that has one.
    """
    rows = _narrow_logits(model, batch)
    if rows is None:
        logits = output(model, batch)
        if batch.labels.shape[1] != logits.shape[1]:
            raise ValueError(f"labels has {batch.labels.shape[1]} positions, the model's output {logits.shape[1]}")
        example, position = answer_rows(batch)
        rows = logits[example.to(logits.device), position.to(logits.device)]
    top = int(batch.labels.max() if batch.choices is None else batch.choices.max())
    if top >= rows.shape[-1]:
        raise ValueError(f"labels or choices hold id {top}; the model's output has ids 0 to {rows.shape[-1] - 1}")
    if batch.choices is not None:
        rows = rows[:, batch.choices.to(rows.device)]
    if not all_finite(rows):
        raise ValueError(
            f"the model's output is NaN or infinite, {first_bad_hook(model, lambda: output(model, batch))}"
        )
    return rows if rows.dtype == torch.float64 else rows.float()


def _narrow_logits(model: Model, batch: Examples) -> Float[Tensor, "rows vocab"] | None:
    """The logits at the labelled positions, where the model computes no others; ``None`` where it has to."""
    if not narrows(model):
        return None
    example, position = answer_rows(batch)
    with narrowed(model, example, position, batch.labels.shape[1]) as times:
        logits = output(model, batch)
    return logits[:, 0] if len(times) == 1 and logits.shape[:2] == (len(example), 1) else None


def answer_index(batch: Examples) -> Int[Tensor, "rows"]:
    """The right answer's column in :func:`answer_logits` for every labelled position."""
    example, position = answer_rows(batch)
    labels = batch.labels[example, position]
    if batch.choices is None:
        return labels
    return (labels[:, None] == batch.choices).int().argmax(1)


@checked
def run_values(model: Model, batch: Examples, units: Units) -> Values:
    """The units' values on a batch: the source of an interchange. One forward pass, no gradients.

    Raises:
        ValueError: a model in training mode, NaN or infinite values.

    Example:
        >>> tls.run_values(model, test, units)
        Values(of a run for Units(12: 12 heads))
    """
    check_model(model)
    with torch.no_grad(), recorded(model, units) as recording:
        output(model, batch)
    values = recording.read()
    edges = [value for site, value in zip(units.sites, values, strict=True) if site.kind == "edge"]
    longest = max(edges, key=Tensor.numel, default=None)  # those of other edges are its beginnings
    fine = longest is None or all_finite(longest)
    for site, value in zip(units.sites, values, strict=True):
        if not (fine and site.kind == "edge") and not all_finite(value):
            raise ValueError(f"activations at hook point {site.hook} are NaN or infinite: they are no values to take")
    return Values(units, values)


def batch_size_for(model: Model, examples: Examples, batch_size: int | None, units: Units | None = None) -> int:
    """The given batch size, or the largest that fits (:mod:`tl_sparsify.core.memory`), whatever their number: memory
    must not grow with it; ``units`` where their gradients are taken."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
        return batch_size
    return min(len(examples), rows_for(model, examples, narrow=narrows(model), units=units))


def fitting(run: Callable[[int], T], model: Model, examples: Examples, batch_size: int | None) -> T:
    """``run(batch_size)``; where that is not given, with one that fits, and with half of it, again and again, where
    memory runs out all the same; at last with one example at a time, whose blocks are run again in backward passes."""
    size = batch_size_for(model, examples, batch_size)
    while batch_size is None and size > 0:
        try:
            return run(size)
        except torch.OutOfMemoryError:
            size //= 2  # the next try begins when the exception, and what it holds, is gone
        torch.cuda.empty_cache()
    with setting(ALWAYS) if batch_size is None else nullcontext():
        return run(max(size, 1))


def halving(
    run: Callable[[Int[Tensor, "batch"], Examples], T],
    index: Int[Tensor, "batch"],
    batch: Examples,
    batch_size: int | None = None,
) -> list[T]:
    """What ``run`` makes of a batch; where memory runs out, of its halves, and of theirs; of a single example with its
    blocks run again in backward passes. A ``batch_size`` that the user chose is kept."""
    if batch_size is not None:
        return [run(index, batch)]
    try:
        return [run(index, batch)]
    except torch.OutOfMemoryError:
        half = len(batch) // 2  # the next try begins when the exception, and what it holds, is gone
    torch.cuda.empty_cache()
    if half == 0:
        with setting(ALWAYS):
            return [run(index, batch)]
    return [*halving(run, index[:half], batch[:half]), *halving(run, index[half:], batch[half:])]


def in_batches(
    run: Callable[[Int[Tensor, "batch"], Examples], T],
    model: Model,
    examples: Examples,
    batch_size: int | None,
    units: Units | None = None,
) -> Iterator[T]:
    """What ``run`` makes of each batch of this process's share of the examples (:func:`shared_batches`), whose indices
    are those of the whole; where memory runs out and no ``batch_size`` is given, of halves (:func:`halving`) of this
    batch and of those that follow."""
    most = len(examples)
    for index, batch in shared_batches(model, examples, batch_size, units):
        for rows in torch.arange(len(index)).split(most):
            made = halving(run, index[rows], batch if len(rows) == len(index) else batch[rows], batch_size)
            most = max(1, len(rows) // len(made)) if len(made) > 1 else most
            yield from made


def batches_of(
    model: Model, examples: Examples, batch_size: int | None
) -> Iterator[tuple[Int[Tensor, "batch"], Examples]]:
    """Each batch of the examples with their indices, of a size as :func:`batch_size_for` says.

    Raises:
        ValueError: what is no model or no examples, or a batch size below one.
    """
    check_model(model)
    check_examples(examples)
    return examples.batches(batch_size_for(model, examples, batch_size))


def shared_batches(
    model: Model, examples: Examples, batch_size: int | None, units: Units | None = None
) -> Iterator[tuple[Int[Tensor, "batch"], Examples]]:
    """As :func:`batches_of`, of this process's share of the examples; indices are those of the whole; ``units``
    where their gradients are taken. What comes of them is put together by :mod:`tl_sparsify._internal.ranks`."""
    check_model(model)
    check_examples(examples)
    size, mine = batch_size_for(model, examples, batch_size, units), share(len(examples))
    for index in torch.arange(mine.start, mine.stop, device="cpu").split(size):
        yield index, examples[int(index[0]) : int(index[-1]) + 1]


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
    """Positions that hold input and at which the site is meant: the beginning-of-sequence token only where an example
    has no other."""
    valid = valid_positions(model, batch)
    wanted = valid if valid.shape == v.shape[:2] else torch.ones(v.shape[:2], dtype=torch.bool)
    where = site.position_mask(*v.shape[:2])
    if where is None:
        return wanted.to(v.device)
    return torch.where((wanted & where).any(1, keepdim=True), wanted & where, where).to(v.device)
