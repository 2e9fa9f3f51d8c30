"""Ranks: processes that run the same script, each on its share of the examples, and all with the same result.

Under ``torchrun``, ``accelerate launch`` or a ``torch.distributed`` group that is there already every process makes the
same calls. A process runs the passes over its own examples (:func:`share`), and what comes of them is put together
(:func:`gathered`, :func:`totalled`, :func:`summed`), in order of example, so that every process goes on with the same
numbers and makes the same choices. Where there are fewer examples than processes each does the whole.

Whenever processes meet, each says what it is about and what went wrong: an exception in one is raised in all, and calls
that differ end with a sentence rather than waiting for ever.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as group

T = TypeVar("T")

_APART: ContextVar[bool] = ContextVar("apart", default=False)
_OWN_FILES: ContextVar[bool] = ContextVar("own_files", default=False)
_KNOWN = "_known_to_all"  # of an exception about which the processes have met
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and accelerate launch set
_AS_THEY_ARE = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, FileExistsError, FileNotFoundError, PermissionError, torch.OutOfMemoryError)
}


def ranks() -> tuple[int, int]:
    """This process's number and how many there are: ``(0, 1)`` where nothing was launched together.

    The group is joined at the first call (by ``accelerate.PartialState``), and only by a launched process itself: one
    that it started in turn has its environment and no part in the group. Who joined it here leaves it at exit.
    """
    if _APART.get() or not group.is_available():
        return 0, 1
    if not group.is_initialized():
        launched = all(name in os.environ for name in _LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1
        if not launched or multiprocessing.parent_process() is not None:
            return 0, 1
        from accelerate import PartialState  # a second to import, for those who need it

        PartialState()
        atexit.register(_leave)
    return group.get_rank(), group.get_world_size()


def _leave() -> None:
    """Leave the group while the interpreter still runs: gloo's threads may hold tensors, and a process that ends with
    those is aborted now and then after all is done."""
    if group.is_initialized():
        group.destroy_process_group()


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return ranks()[0] == 0


@contextmanager
def own_files() -> Iterator[None]:
    """Here every process writes its own files, where the others do not look."""
    token = _OWN_FILES.set(True)
    try:
        yield
    finally:
        _OWN_FILES.reset(token)


def has_own_files() -> bool:
    """Whether this process is in :func:`own_files`."""
    return _OWN_FILES.get()


@contextmanager
def apart() -> Iterator[None]:
    """Here this process is on its own: what it calls is not called by the others."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def share(n: int) -> slice:
    """This process's part of ``n`` examples; the whole where they are fewer than the processes."""
    rank, size = ranks()
    return slice(n * rank // size, n * (rank + 1) // size) if n >= size else slice(0, n)


def _shared(n: int) -> bool:
    return 1 < ranks()[1] <= n


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """A block that all processes run to its end, or that ends with an exception in all."""
    try:
        yield
    except Exception as error:
        _meet(what, error=error)
        raise
    _meet(what)


def on_main(run: Callable[[], object], what: str) -> None:
    """Run something in the first process alone, while the others wait for its end."""
    with agreed(what):
        if is_main():
            with apart():
                run()


def gathered(parts: Iterable[T], n: int) -> list[T]:
    """The parts of all processes, of their shares of ``n`` examples, in order of example: tensors, numbers, tuples,
    lists and dataclasses of them. What goes wrong while they are made is raised in all processes."""
    if not _shared(n):
        return list(parts)
    tensors: list[Tensor] = []
    what = f"a pass over {n} examples"
    try:
        mine = list(parts)
        shape = _taken_apart(mine, tensors)
    except Exception as error:
        _meet(what, error=error)
        raise
    shapes = _meet(what, shape)
    found: list[T] = []
    for rank, (other, theirs) in enumerate(zip(shapes, _exchanged(shapes, tensors), strict=True)):
        found += mine if rank == ranks()[0] else _put_together(other, theirs)
    return found


def totalled(parts: Iterable[T], add: Callable[[T, T], T], n: int) -> T:
    """All parts of all processes, added up: each adds its own, and then all of them the sums, in order."""
    if not _shared(n):
        return reduce(add, parts)
    return reduce(add, gathered((reduce(add, part) for part in [parts]), n))


def summed(parts: Iterable[Sequence[Tensor]], n: int) -> tuple[Tensor, ...]:
    """The sum of the parts of all processes, one for each tensor of a part; without a copy for each process."""

    def plus(one: Sequence[Tensor], other: Sequence[Tensor]) -> Sequence[Tensor]:
        return [a + b for a, b in zip(one, other, strict=True)]

    if not _shared(n):
        return tuple(reduce(plus, parts))
    with agreed(f"a sum over {n} examples"):
        mine = [part.detach().contiguous() for part in reduce(plus, parts)]
    sent = [part.to(_channel()) for part in mine]
    sent = [a.clone() if a is b else a for a, b in zip(sent, mine, strict=True)]
    for waiting in [group.all_reduce(part, async_op=True) for part in sent]:
        if waiting is not None:
            waiting.wait()
    return tuple(a.to(b.device) for a, b in zip(sent, mine, strict=True))


def _channel() -> torch.device:
    """The device from which the group can send a tensor."""
    if str(group.get_backend()) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _meet(what: str, told: Any = None, error: Exception | None = None) -> list[Any]:
    """What each process tells the others.

    Raises:
        Exception: that of another process, of its kind.
        RuntimeError: another process is about something else.
    """
    rank, size = ranks()
    if size == 1 or getattr(error, _KNOWN, False):
        return [told]
    said: list[Any] = [None] * size
    wrong = None if error is None else (type(error).__name__, str(error))
    group.all_gather_object(said, (what, wrong, told if error is None else None))
    if error is not None:
        setattr(error, _KNOWN, True)
        return []
    errors = {other: wrong for other, (_, wrong, _) in enumerate(said) if wrong is not None}
    elsewhere = {other: theirs for other, (theirs, _, _) in enumerate(said) if theirs != what}
    if not errors and not elsewhere:
        return [told for _, _, told in said]
    if errors:
        other, (name, text) = next(iter(errors.items()))
        trouble = _AS_THEY_ARE.get(name, RuntimeError)(f"process {other} of {size}: {text or name}")
    else:
        other, theirs = next(iter(elsewhere.items()))
        trouble = RuntimeError(
            f"process {rank} of {size} is at {what}, process {other} at {theirs}: all processes must make the same "
            "calls, with the same arguments"
        )
    setattr(trouble, _KNOWN, True)
    raise trouble


@dataclass(frozen=True)
class _Leaf:
    """A tensor that travels on its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _taken_apart(value: Any, tensors: list[Tensor]) -> Any:
    """The value with a leaf for each of its tensors, which go to ``tensors`` in order."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return _Leaf(tuple(value.shape), value.dtype, value.device.type)
    if isinstance(value, list | tuple):
        return type(value)(_taken_apart(part, tensors) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return _Whole(type(value), {f.name: _taken_apart(getattr(value, f.name), tensors) for f in fields(value)})
    return value


@dataclass(frozen=True)
class _Whole:
    """A dataclass whose tensors travel on their own."""

    kind: type
    parts: dict[str, Any]


def _put_together(shape: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(shape, _Leaf):
        return next(tensors)
    if isinstance(shape, list | tuple):
        return type(shape)(_put_together(part, tensors) for part in shape)
    if isinstance(shape, _Whole):
        return shape.kind(**{name: _put_together(part, tensors) for name, part in shape.parts.items()})
    return shape


def _leaves(shape: Any) -> Iterator[_Leaf]:
    if isinstance(shape, _Leaf):
        yield shape
    elif isinstance(shape, list | tuple):
        for part in shape:
            yield from _leaves(part)
    elif isinstance(shape, _Whole):
        yield from _leaves(list(shape.parts.values()))


def _exchanged(shapes: Sequence[Any], tensors: Sequence[Tensor]) -> list[Iterator[Tensor]]:
    """The tensors of each process, on this one's devices."""
    channel, devices = _channel(), {tensor.device.type: tensor.device for tensor in tensors}
    leaves = [list(_leaves(shape)) for shape in shapes]
    length = max(sum(leaf.bytes for leaf in some) for some in leaves)
    mine = torch.zeros(length, dtype=torch.uint8, device=channel)
    at = 0
    for tensor in tensors:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        mine[at : at + len(raw)] = raw.to(channel)
        at += len(raw)
    buffers = [torch.empty_like(mine) for _ in shapes]
    if length:
        group.all_gather(buffers, mine)

    def read(buffer: Tensor, some: Sequence[_Leaf]) -> Iterator[Tensor]:
        at = 0
        for leaf in some:
            # a copy, since a number may begin at no multiple of its size
            raw, at = buffer[at : at + leaf.bytes].clone(), at + leaf.bytes
            yield raw.view(leaf.dtype).view(leaf.shape).to(devices.get(leaf.kind, torch.device(leaf.kind)))

    return [read(buffer, some) for buffer, some in zip(buffers, leaves, strict=True)]
