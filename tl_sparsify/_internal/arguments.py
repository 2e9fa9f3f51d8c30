"""Arguments of another type than a function takes are refused by one sentence, wherever it is public.

The annotations say what is taken. Only what they say for certain is checked, so that a right value never fails; what a
value must be beside (a range, units of this model) the functions check themselves.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

import torch

from tl_sparsify._internal.checks import MOST, check_is_model
from tl_sparsify._internal.random import check_seed

P = ParamSpec("P")
T = TypeVar("T")

_MENDS = {
    "Examples": "make them of tensors, tls.Examples(tokens, labels), or of text, "
    "tls.Examples.from_prompts(model, prompts, answers)",
    "Units": "tls.heads(model) + tls.neurons(model), say",
    "Unit": "units['L0H1'], say",
    "Circuit": "tls.Circuit.of(units, names), or path.at(0.1).circuit",
    "Reduction": "path.at(0.1) of a search, or tls.Reduction(circuit, values)",
    "Values": "tls.constants.mean(model, examples, units), say",
    "InterventionDistribution": "tls.InterventionDistribution.interchange(0.1), say",
    "Scores": "what tls.score.risk(model, examples, units) returns, say",
    "CircuitPath": "what tls.sparsify(model, examples, units) returns",
    "Alignment": "tls.Alignment({'variable': [units['L0H1']]})",
    "Pairs": "task.pairs(512), or tls.Pairs(base_inputs, source_inputs, base, source, answers)",
    "CausalModel": "tls.CausalModel(inputs, mechanisms, output)",
    "Task": "tls.load_task(name)",
    "Evidence": "what tls.verify returns",
}
_LOOPS = ("steps", "rounds", "draws", "probes", "samples", "bootstrap", "trials", "repeats")
_RANGED = ("smallest", "fraction", "goal", "level")
"""What every function that takes it says the range of, of what is no number as well."""
_SHOWN = 60
_CPU = torch.device("cpu")


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which refuses arguments of another type than its annotations say.

    Raises:
        ValueError: (when called) such an argument, with its name, the value and what is taken.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # Python says which argument is missing, or unknown
        for name, value in given.items():
            parameter = signature.parameters[name]
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and value is not parameter.default and name != "self":
                _check(name, value, parameter.annotation, function)
        # Generators and indices are made on the CPU, whatever the caller's default device is; the model says its own.
        with contextlib.nullcontext() if torch.get_default_device() == _CPU else _CPU:
            return function(*args, **kwargs)

    return call


def checked_fields(cls: type[T]) -> type[T]:
    """A dataclass whose fields :func:`checked` checks."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]
    return cls


def _check(name: str, value: Any, annotation: Any, function: Any) -> None:
    if annotation == "Model":
        check_is_model(value)
        return
    if name == "seed":
        check_seed(value)
        return
    hint = _hint(annotation, function)
    if not _fits(value, hint):
        kind = getattr(hint, "__name__", "")
        if kind in _MENDS:
            raise ValueError(f"{name} is a {type(value).__name__}, not {kind}: {_MENDS[kind]}")
        if any(getattr(part, "__name__", "") in _MENDS for part in get_args(hint)):
            raise ValueError(f"{name} is a {type(value).__name__}: give {_wanted(hint)}")
        raise ValueError(f"{name} is {_shown(value)}; it must be {_wanted(hint)}")
    if isinstance(value, float) and math.isnan(value) and name not in _RANGED:
        raise ValueError(f"{name} is nan; it must be a number")
    if name in _LOOPS and isinstance(value, int) and value > MOST:
        raise ValueError(f"{name} is {value}; more than {MOST:,} would never end")


def _hint(annotation: Any, function: Any) -> Any:
    if not isinstance(annotation, str):
        return annotation
    inner = inspect.unwrap(function)
    try:
        return _evaluated(annotation, id(inner.__globals__), _Scope(inner.__globals__))
    except Exception:  # noqa: BLE001 (a name that is there for type checkers alone: nothing is said for certain)
        return Any


class _Scope(dict[str, Any]):
    """A module's names, as an argument that needs no hash of its content."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scope)


@functools.lru_cache(maxsize=4096)
def _evaluated(annotation: str, module: int, scope: _Scope) -> Any:
    return eval(annotation, dict(scope))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may be what a hint says: true where that is not certain."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) for part in parts)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool_"
    if hint is int:
        return _whole(value)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if hint is Any or hint is inspect.Parameter.empty:
        return True
    array = getattr(hint, "array_type", None)
    if array is not None:
        return not isinstance(array, type) or isinstance(value, array)
    if origin is Callable or hint is Callable:
        return callable(value)
    if isinstance(origin, type):
        return _holds(value, origin, parts)
    return not isinstance(hint, type) or getattr(hint, "_is_protocol", False) or isinstance(value, hint)


def _holds(value: Any, origin: type, parts: tuple[Any, ...]) -> bool:
    if isinstance(value, str | bytes) or not isinstance(value, origin):
        return False
    if issubclass(origin, Mapping) and len(parts) == 2:
        return all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in list(value.items())[:100])
    if origin is tuple and not (len(parts) == 2 and parts[1] is ...):
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if issubclass(origin, Sequence) and parts:
        return all(_fits(part, parts[0]) for part in list(value)[:1000])
    return True


def _whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(operator.index(value), int)
    except (TypeError, RuntimeError, ValueError):
        return False


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str | int | float | bool | type):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if isinstance(value, list | tuple | dict | set):
        text = repr(value)
        return text if len(text) <= _SHOWN else f"a {type(value).__name__} of {len(value)}"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")


def _wanted(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_wanted, parts)))
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if hint is None or hint is type(None):
        return "None"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    if hint in names:
        return names[hint]
    if getattr(hint, "array_type", None) is not None:
        return f"a tensor [{hint.dim_str}]" if getattr(hint, "dim_str", "") else "a tensor"
    if origin is Callable or hint is Callable:
        return "a function"
    if isinstance(origin, type):
        of = [_wanted(part) for part in parts if part is not ...]
        if issubclass(origin, Mapping) and len(of) == 2:
            return f"a dictionary of {of[1]} for {of[0]}"
        return f"a {'tuple' if origin is tuple else 'list'} of {', '.join(dict.fromkeys(of))}" if of else "a list"
    name = getattr(hint, "__name__", str(hint))
    article = "" if name[:1].isupper() and name.endswith("s") else "an " if name[:1] in "AEIO" else "a "  # Units: many
    return f"{article}{name}" + (f" ({_MENDS[name]})" if name in _MENDS else "")
