"""A high-level causal model: named variables, a mechanism for each, and one output. Pure, and free of torch.

An intervention ``do(V = v)`` replaces V's mechanism by the value v. An interchange intervention takes v from the run
on a source input: ``M(base, do(V = V(source)))``. That is what a network is held against, variable by variable, when
it is asked whether it implements the model (Geiger, Lu, Icard and Potts, *Causal Abstractions of Neural Networks*,
2021; Geiger et al., *Causal Abstraction: A Theoretical Foundation for Mechanistic Interpretability*, 2025).

A model that gives the right outputs is not evidence that a network computes its intermediate variables: several
causal models share one input-output function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np

from tl_sparsify._internal.arguments import checked

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, eq=False)
class CausalModel:
    """A deterministic, acyclic causal model over batches.

    Args:
        inputs: names of the input variables.
        mechanisms: for each other variable, a function whose parameter names are the variable's parents. It gets one
            array of shape ``[n, ...]`` for each parent and returns one value for each of the n examples.
        output: the variable that the network's answer is held against.

    Raises:
        ValueError: a duplicate name, a name that is both input and mechanism, a parent that is no variable, a
            mechanism with a parameter that has no usable name, a cycle, or an output that is no variable. The
            message names the culprit.

    Example:
        >>> equality = tls.CausalModel(
        ...     inputs=("a", "b", "c", "d"),
        ...     mechanisms={
        ...         "left": lambda a, b: a == b,
        ...         "right": lambda c, d: c == d,
        ...         "same": lambda left, right: left == right,
        ...     },
        ...     output="same",
        ... )
        >>> base, source = {"a": [1], "b": [1], "c": [2], "d": [2]}, {"a": [1], "b": [3], "c": [4], "d": [4]}
        >>> equality.run(base)["same"].item(), equality.interchange(base, {"left": source})["same"].item()
        (True, False)
    """

    inputs: tuple[str, ...]
    mechanisms: Mapping[str, Callable[..., Any]]
    output: str
    parents: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)
    variables: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inputs = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
        if not isinstance(inputs, list | tuple) or not all(isinstance(name, str) for name in inputs):
            raise ValueError(f"inputs is {self.inputs!r:.80}; it names the input variables, such as ('a', 'b')")
        if not isinstance(self.mechanisms, Mapping) or not all(isinstance(name, str) for name in self.mechanisms):
            kind = type(self.mechanisms).__name__
            raise ValueError(f"mechanisms is a {kind}; it is a dictionary of functions by the variable's name")
        inputs, mechanisms = tuple(inputs), dict(self.mechanisms)
        twice = sorted({name for name in inputs if inputs.count(name) > 1})
        if twice:
            raise ValueError(f"duplicate inputs: {_listed(twice)}; name each once")
        both = sorted(set(inputs) & set(mechanisms))
        if both:
            raise ValueError(f"both an input and a mechanism: {_listed(both)}; an input has no mechanism")
        known = (*inputs, *mechanisms)
        if self.output not in known:
            raise ValueError(f"the output {self.output!r} is no variable; known are {_listed(known)}")
        parents = {name: _parents(name, mechanism) for name, mechanism in mechanisms.items()}
        for name, wanted in parents.items():
            missing = [parent for parent in wanted if parent not in known]
            if missing:
                raise ValueError(
                    f"the mechanism of {name!r} needs {_listed(missing)}, which is neither an input nor has a "
                    f"mechanism; known are {_listed(known)}"
                )
        try:
            order = tuple(TopologicalSorter(parents).static_order())
        except CycleError as error:
            raise ValueError(f"the mechanisms form a cycle: {' -> '.join(error.args[1])}") from error
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "mechanisms", mechanisms)
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "variables", tuple(name for name in order if name in mechanisms))

    @checked
    def run(self, inputs: Mapping[str, Any], do: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """The value of every variable on a batch, optionally under an intervention.

        Args:
            inputs: for each input variable an array, list or tensor of shape ``[n]`` (trailing dimensions are allowed).
            do: for each intervened variable, inputs included, a scalar or an array of shape ``[n]``. Its mechanism
                is not called, and an input that is set need not be given.

        Returns:
            One array of length n for each input and variable, in topological order.

        Raises:
            ValueError: a missing or unknown name, unequal lengths, or a mechanism that raises or returns another
                length than n.
        """
        do = dict(do or {})
        known = (*self.inputs, *self.variables)
        _refuse_unknown("do", do, known)
        _refuse_unknown("inputs", inputs, self.inputs)
        missing = [name for name in self.inputs if name not in inputs and name not in do]
        if missing:
            raise ValueError(f"missing inputs: {_listed(missing)}; needed are {_listed(self.inputs)}")
        fixed = {name: np.asarray(value) for name, value in {**inputs, **do}.items()}
        size = _common_length(fixed, scalars=do)
        values: dict[str, np.ndarray] = {}
        for name in known:
            value = fixed[name] if name in fixed else self._compute(name, values, size)
            values[name] = np.broadcast_to(value, (size,)) if value.ndim == 0 else value
        return values

    @checked
    def interchange(self, base: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """The value of every variable on ``base`` when each named variable takes its value from its own source input.

        Args:
            base: input batch, as for ``run``.
            sources: for each variable to interchange, the input batch (of the same length) that its value is from.

        Returns:
            As ``run``: ``run(base, do={V: run(sources[V])[V] for V in sources})``.
        """
        _refuse_unknown("sources", sources, (*self.inputs, *self.variables))
        return self.run(base, do={name: self.run(source)[name] for name, source in sources.items()})

    def fixes_output(self, variables: Iterable[str]) -> bool:
        """Whether the output is one of these ``variables``, or follows from them alone: every way from an input to the
        output leads through them. Interchanging them then gives the source's own output, whatever the base.

        Raises:
            ValueError: a name that is no variable.

        Example:
            >>> task.causal_model.fixes_output(["left"]), task.causal_model.fixes_output(["left", "right"])
            (False, True)
        """
        passed = set(variables)
        _refuse_unknown("variables", passed, (*self.inputs, *self.variables))
        reached = {self.output} - passed
        for name in reversed(self.variables):  # children before their parents
            if name in reached:
                reached |= set(self.parents[name]) - passed
        return reached.isdisjoint(self.inputs)

    def graph(self) -> str:
        """The model's graph as plain Mermaid text, one edge a line; many notebooks and web pages draw it, and
        ``tl_sparsify.plot.causal_graph`` does with matplotlib."""
        nodes = [f"    {name}[/{name}/]" for name in self.inputs]
        nodes += [f"    {name}([{name}])" if name == self.output else f"    {name}" for name in self.variables]
        edges = [f"    {parent} --> {name}" for name in self.variables for parent in self.parents[name]]
        return "\n".join(["graph LR", *nodes, *edges])

    def _compute(self, name: str, values: Mapping[str, np.ndarray], size: int) -> np.ndarray:
        try:
            # copies: a mechanism may work in place
            parents = {parent: np.array(values[parent]) for parent in self.parents[name]}
            value = np.asarray(self.mechanisms[name](**parents))
        except Exception as error:
            raise ValueError(f"the mechanism of {name!r} failed: {type(error).__name__}: {error}") from error
        if value.ndim and len(value) != size:
            raise ValueError(f"the mechanism of {name!r} returned shape {value.shape}; one value for each of {size}")
        return value


def ancestors(causal_model: CausalModel, variable: str) -> set[str]:
    """The variables and inputs that a variable is computed from, at once or by way of others."""
    found = set(causal_model.parents.get(variable, ()))
    for name in reversed(causal_model.variables):  # children before their parents
        if name in found:
            found |= set(causal_model.parents[name])
    return found


def _parents(name: str, mechanism: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(mechanism).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the mechanism of {name!r} has no readable signature: {mechanism!r}") from error
    unusable = [str(parameter) for parameter in parameters if parameter.kind not in NAMED]
    if unusable:
        raise ValueError(f"the mechanism of {name!r} must name its parents one by one, not as {_listed(unusable)}")
    return tuple(parameter.name for parameter in parameters)


def _refuse_unknown(where: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown names in {where}: {_listed(unknown)}; known are {_listed(known)}")


def _common_length(values: Mapping[str, np.ndarray], scalars: Iterable[str]) -> int:
    """The batch length. Only the names in ``scalars`` may be 0-dimensional; if all values are, the length is 1."""
    flat = [name for name, value in values.items() if value.ndim == 0 and name not in scalars]
    if flat:
        raise ValueError(f"inputs are batches, one value for each example; these are scalars: {_listed(flat)}")
    lengths = {name: len(value) for name, value in values.items() if value.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "inputs have unequal lengths: " + ", ".join(f"{name} has {length}" for name, length in lengths.items())
        )
    return next(iter(lengths.values()), 1)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(str(name)) for name in names)
