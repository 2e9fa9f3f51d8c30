"""Checks of numbers that a caller gives: what is no number, or one that no call would come back from, is named."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MOST = 10**6
"""More steps, rounds or draws than this are taken for a mistake: they would take years."""


def check_count(name: str, value: Any, *, least: int | None = 1, most: int | None = None) -> int:
    """The value, where it is a whole number within the bounds that are given.

    Raises:
        ValueError: anything else, with the argument's name.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; it must be at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {number}; more than {most:,} would never end")
    return number


def check_positive(name: str, value: Any, *, least: float = 0.0, most: float = math.inf) -> float:
    """The value, where it is a positive finite number between two bounds.

    Raises:
        ValueError: anything else, with the argument's name.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    if not (0 < value < math.inf):
        raise ValueError(f"{name} is {value}; it must be positive and finite")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; it must lie between {least:g} and {most:g}")
    return float(value)


def check_temperature(value: Any) -> float:
    """A temperature of probes: beyond these bounds they are all zero, or infinite.

    Raises:
        ValueError: a temperature that is no number from 0.001 to 1,000.
    """
    return check_positive("temperature", value, least=1e-3, most=1e3)


def all_finite(x: Float[Tensor, "..."]) -> bool:
    """Whether no entry is NaN or infinite: a sum is none where its terms are, and takes no memory."""
    x = x.detach()
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def check_is_model(model: Any) -> None:
    """Refuse what has no hook points.

    Raises:
        ValueError: anything but a bridge or a ``HookedRootModule``, with how to get one.
    """
    if isinstance(model, torch.nn.Module) and hasattr(model, "hooks"):
        return
    what = f"the text {model!r}" if isinstance(model, str) else f"a {type(model).__name__}"
    get = "TransformerBridge.boot_transformers(name)"
    if callable(getattr(model, "model", None)):
        get = "task.model()"
    elif isinstance(model, torch.nn.Module):
        get = "a bridge around it, TransformerBridge.boot_transformers(name, hf_model=model)"
    raise ValueError(f"model is {what}, which has no hook points: give a TransformerLens model, {get}")


def checked_positions(positions: Any, hook: str) -> Any:
    """The positions as they are kept: a tuple of integers, a slice of them, a tensor with places for each example, or
    a span's name.

    Raises:
        ValueError: none at all, or what is no integer.
    """
    if positions is None:
        return None
    wrong = ValueError(
        f"positions of {hook} are {positions!r}: give an integer, several, a slice of integers, or an integer tensor "
        "[n] or [n, places] with the places of each example, or the name of a span"
    )
    if isinstance(positions, Tensor):
        if positions.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8) or positions.ndim not in (1, 2):
            raise wrong
        if not positions.numel():
            raise wrong
        return positions.long()
    if isinstance(positions, slice):
        parts = (positions.start, positions.stop, positions.step)
        if any(part is not None and not _whole(part) for part in parts):
            raise wrong
        return positions
    if isinstance(positions, str) and positions:
        return positions
    several: Any = (positions,) if _whole(positions) else positions
    if isinstance(several, str | bytes) or not isinstance(several, Iterable):
        raise wrong
    several = tuple(several)
    if not several or not all(_whole(part) for part in several):
        raise wrong
    return tuple(operator.index(part) for part in several)


def _whole(part: Any) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, bool) and not isinstance(part, Tensor)
