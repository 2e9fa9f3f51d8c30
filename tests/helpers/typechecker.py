"""What jaxtyping checks annotations with: beartype, which compiles a function defined inside another one once only.

jaxtyping hands it a stand-in that has the annotations and no body, anew each time that the outer function runs; one
with the same annotations does as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_compiled: dict[Any, Callable[..., Any]] = {}


def compiled_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its annotations checked."""
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    names = function.__code__.co_varnames
    key = (function.__module__, function.__qualname__, names, tuple(function.__annotations__.items()))
    try:
        if key not in _compiled:
            _compiled[key] = beartype(function)
    except TypeError:  # an annotation without a hash
        return beartype(function)
    return _compiled[key]
