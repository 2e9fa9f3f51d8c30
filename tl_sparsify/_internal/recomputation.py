"""Recomputation: the graph of a long prompt in the memory of one block.

A block keeps for the backward pass what comes in and what hooks hold on to, and is run once more when the pass gets
there (``torch.utils.checkpoint``). It is run as it was: under the hooks that stood when it ran first, whatever has
become of them since, and they record nothing a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    "fwd_hooks",  # of a hook point
)

AGAIN: ContextVar[int | None] = ContextVar("again", default=None)
"""The thread whose forward pass is done again here (on a GPU another one does it)."""

ONCE: ContextVar[bool] = ContextVar("once", default=False)
"""Whether there are hooks that go on from what they saw in earlier blocks: none of these may be run again."""

ALWAYS: ContextVar[bool] = ContextVar("always", default=False)
"""Whether blocks are run again, however much memory there is."""


_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_LOCKING = threading.Lock()


def lock_of(model: Any) -> Any:
    """What a thread holds while the model has hooks, or blocks, of its making."""
    with _LOCKING:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def setting(variable: ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Run each block again where a backward pass needs what is in it, instead of keeping it. Numbers stay what they
    are, bit for bit; every backward pass costs the blocks' forward pass once more."""
    with lock_of(model):
        own = [block.__dict__.get("forward") for block in model.blocks]
        for block in model.blocks:
            object.__setattr__(block, "forward", _recomputed(block, block.forward, lock_of(model)))
        try:
            yield
        finally:
            for block, before in zip(model.blocks, own, strict=True):
                if before is None:
                    object.__delattr__(block, "forward")
                else:
                    object.__setattr__(block, "forward", before)


def _recomputed(block: nn.Module, forward: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        if not is_grad_enabled():
            return forward(*inputs, **named)
        hooks = {module: _hooks_of(module) for module in block.modules()}
        wanted = {parameter: parameter.requires_grad for parameter in block.parameters()}
        thread, times = threading.get_ident(), iter((True,))

        def once_more(*inputs: Any, **named: Any) -> Any:
            if next(times, False):
                return forward(*inputs, **named)
            # a GPU's thread does not wait: the one that it works for may have the lock
            held = lock.acquire(blocking=thread == threading.get_ident())
            try:
                with _as_it_was(hooks, wanted, thread):
                    return forward(*inputs, **named)
            finally:
                if held:
                    lock.release()

        inputs = tuple(_without_cache(value) for value in inputs)
        named = {name: _without_cache(value) for name, value in named.items()}
        return checkpoint(once_more, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return run


def _without_cache(value: Any) -> Any:
    """A cache of keys and values is written to each time: ``None`` in its place."""
    return None if hasattr(value, "get_seq_length") else value


def _hooks_of(module: nn.Module) -> dict[str, Any]:
    return {name: kept.copy() for name in _HOOKS if (kept := module.__dict__.get(name)) is not None}


@contextmanager
def _as_it_was(hooks: dict[nn.Module, dict[str, Any]], wanted: dict[nn.Parameter, bool], thread: int) -> Iterator[None]:
    flags = {parameter: parameter.requires_grad for parameter in wanted}
    now = {module: {name: module.__dict__[name] for name in kept} for module, kept in hooks.items()}
    token = AGAIN.set(thread)
    try:
        for module, kept in hooks.items():
            module.__dict__.update(kept)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        yield
    finally:
        for module, kept in now.items():
            module.__dict__.update(kept)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        AGAIN.reset(token)
