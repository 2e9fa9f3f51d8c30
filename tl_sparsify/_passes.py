"""Passes as they are made: how many examples a model runs forward and backward on, whatever runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Count inside the context, under ``forward`` and ``backward``, the examples of every forward pass and of every
    backward pass through its output. The model's own passes stay what they are."""
    passes: Counter[str] = Counter(forward=0, backward=0)
    forward, replaced = model.forward, "forward" in vars(model)

    def counting(*inputs: Any, **settings: Any) -> Any:
        output = forward(*inputs, **settings)
        passes["forward"] += len(output)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=len(gradient)))
        return output

    model.forward = counting
    try:
        yield passes
    finally:
        if replaced:
            model.forward = forward
        else:
            del model.forward
