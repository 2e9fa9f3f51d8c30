"""Cost as it is made: examples run forward and backward, seconds and peak memory of a call, whatever runs the model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_sparsify.core.memory import device_of

T = TypeVar("T")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Attributes:
        forward, backward: examples that the model ran on, divided by ``n``: passes over the data.
        seconds: of wall-clock time.
        peak_mb: the most memory (MiB) in use beyond what was before, on the model's device; NaN where the system does
            not tell.
    """

    forward: float
    backward: float
    seconds: float
    peak_mb: float


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Count inside the context, under ``forward`` and ``backward``, the examples of every forward pass and of every
    backward pass through its output. The model's own passes stay what they are."""
    passes: Counter[str] = Counter(forward=0, backward=0)
    forward, replaced = model.forward, "forward" in vars(model)

    def counting(*inputs: Any, **settings: Any) -> Any:
        output = forward(*inputs, **settings)
        n = len(inputs[0] if inputs else output)  # the output may have a row for each answer
        passes["forward"] += n
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: passes.update(backward=n))
        return output

    model.forward = counting
    try:
        yield passes
    finally:
        if replaced:
            model.forward = forward
        else:
            del model.forward


def cost_of(model: Any, n: int, call: Callable[[], T]) -> tuple[T, Cost]:
    """What ``call`` gives and what it took; ``n`` is the number of examples that makes one pass."""
    before = _memory(model, reset=True)
    start = time.perf_counter()
    with counted(model) as passes:
        result = call()
    seconds = time.perf_counter() - start
    peak = _memory(model) - before
    return result, Cost(passes["forward"] / n, passes["backward"] / n, seconds, peak)


def _memory(model: Any, *, reset: bool = False) -> float:
    """The peak of memory in use since the last reset (MiB); with ``reset`` what is in use now."""
    device = device_of(model)
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        if reset:
            _RESET.write_text("5")  # Linux: the peak becomes what is resident now
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return float(lines["VmHWM"].split()[0]) / 1024
    except (OSError, KeyError):
        return float("nan")
