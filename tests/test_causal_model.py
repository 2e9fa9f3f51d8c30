"""CausalModel: runs, interventions and interchanges against brute force, and every refusal by name."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_sparsify.abstraction.causal_model import CausalModel, ancestors

INPUTS = ("a", "b", "c", "d")
MECHANISMS = {
    "same": lambda left, right: left == right,  # on purpose not in topological order
    "left": lambda a, b: a == b,
    "right": lambda c, d: c == d,
}
EQUALITY = CausalModel(inputs=INPUTS, mechanisms=MECHANISMS, output="same")
EVERY = list(itertools.product(range(3), repeat=4))  # all inputs over three symbols


def batch(rows: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[i] for row in rows]) for i, name in enumerate(INPUTS)}


def by_hand(row: tuple[int, ...], left: bool | None = None, right: bool | None = None) -> bool:
    a, b, c, d = row
    left = a == b if left is None else left
    right = c == d if right is None else right
    return left == right


rows = st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=20)
variables = st.sets(st.sampled_from(("left", "right", "same")))


def test_order_and_parents():
    assert EQUALITY.variables.index("same") == 2
    assert set(EQUALITY.variables) == {"left", "right", "same"}
    assert EQUALITY.parents == {"left": ("a", "b"), "right": ("c", "d"), "same": ("left", "right")}
    assert list(EQUALITY.run(batch(EVERY))) == [*INPUTS, *EQUALITY.variables]


def test_run_on_every_input():
    values = EQUALITY.run(batch(EVERY))
    assert values["same"].tolist() == [by_hand(row) for row in EVERY]
    assert values["left"].tolist() == [a == b for a, b, _, _ in EVERY]


def test_do_on_every_input():
    for left, right in itertools.product((None, True, False), repeat=2):
        do = {name: value for name, value in {"left": left, "right": right}.items() if value is not None}
        assert EQUALITY.run(batch(EVERY), do)["same"].tolist() == [by_hand(row, left, right) for row in EVERY]


def test_do_with_an_array_and_on_an_input():
    values = EQUALITY.run(batch([(0, 1, 2, 2), (0, 1, 2, 2)]), do={"b": np.array([0, 1])})
    assert values["b"].tolist() == [0, 1]
    assert values["same"].tolist() == [True, False]
    base = batch([(0, 1, 2, 2), (0, 1, 2, 2)])
    del base["b"]
    assert EQUALITY.run(base, do={"b": 0})["same"].tolist() == [True, True]


def test_interchange_on_every_pair():
    pairs = list(itertools.product(EVERY[::5], EVERY[::7]))
    base, source = batch([b for b, _ in pairs]), batch([s for _, s in pairs])
    left = EQUALITY.interchange(base, {"left": source})["same"]
    assert left.tolist() == [by_hand(b, left=s[0] == s[1]) for b, s in pairs]
    both = EQUALITY.interchange(base, {"left": source, "right": source})["same"]
    assert both.tolist() == EQUALITY.run(source)["same"].tolist()
    assert EQUALITY.interchange(base, {"same": source})["same"].tolist() == both.tolist()


def test_interchange_from_two_sources():
    base, first, second = batch([(0, 1, 0, 1)]), batch([(2, 2, 0, 1)]), batch([(0, 1, 3, 3)])
    values = EQUALITY.interchange(base, {"left": first, "right": second})
    assert (values["left"].item(), values["right"].item(), values["same"].item()) == (True, True, True)


@given(rows, variables)
@settings(deadline=None)
def test_interchange_with_oneself_changes_nothing(sample, names):
    base = batch(sample)
    plain, changed = EQUALITY.run(base), EQUALITY.interchange(base, dict.fromkeys(names, base))
    assert all(np.array_equal(plain[name], changed[name]) for name in plain)


@given(rows, rows, st.booleans())
@settings(deadline=None)
def test_do_cuts_the_parents(sample, other, value):
    size = min(len(sample), len(other))
    base, moved = batch(sample[:size]), batch(other[:size])
    moved |= {"c": base["c"], "d": base["d"]}
    one, two = EQUALITY.run(base, {"left": value}), EQUALITY.run(moved, {"left": value})
    assert (one["left"] == value).all()
    assert np.array_equal(one["same"], two["same"])


def test_the_mechanism_of_an_intervened_variable_is_not_called():
    model = CausalModel(("x",), {"y": lambda x: 1 / 0, "z": lambda y: y + 1}, "z")
    assert model.run({"x": [1, 2]}, do={"y": 4})["z"].tolist() == [5, 5]


def test_lists_tensors_and_constant_mechanisms():
    model = CausalModel(("x", "y"), {"one": lambda: 1, "sum": lambda x, y, one: x + y + one}, "sum")
    assert model.run({"x": [1, 2], "y": torch.tensor([3, 4])})["sum"].tolist() == [5, 7]


def test_the_output_may_be_an_input():
    assert CausalModel(("x",), {}, "x").run({"x": [3]})["x"].tolist() == [3]


def test_keyword_only_parents():
    def scaled(*, x, factor):
        return x * factor

    assert CausalModel(("x", "factor"), {"y": scaled}, "y").run({"x": [2], "factor": [3]})["y"].item() == 6


def test_the_graph_is_text():
    lines = EQUALITY.graph().splitlines()
    assert lines[0] == "graph LR"
    assert "    a --> left" in lines
    assert "    right --> same" in lines


def test_the_model_cannot_be_changed():
    mechanisms = dict(MECHANISMS)
    model = CausalModel(INPUTS, mechanisms, "same")
    mechanisms.clear()
    assert model.run(batch(EVERY))["same"].tolist() == [by_hand(row) for row in EVERY]
    with pytest.raises(AttributeError):
        model.output = "left"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("inputs", "mechanisms", "output", "message"),
    [
        (("a",), {"x": lambda y: y, "y": lambda x: x}, "x", "cycle: .*x.*y"),
        (("a",), {"x": lambda x: x}, "x", "cycle: x -> x"),
        (("a",), {"x": lambda a, nowhere: a}, "x", "'x' needs 'nowhere'.*known are 'a', 'x'"),
        (("a", "x"), {"x": lambda a: a}, "x", "both an input and a mechanism: 'x'"),
        (("a", "b", "a"), {"x": lambda a: a}, "x", "duplicate inputs: 'a'"),
        (("a",), {"x": lambda a: a}, "same", "output 'same' is no variable; known are 'a', 'x'"),
        (("a",), {"x": lambda *a: a}, "x", r"'x' must name its parents.*\*a"),
        (("a",), {"x": lambda **a: a}, "x", r"'x' must name its parents.*\*\*a"),
        (("a",), {"x": lambda a, /: a}, "x", "'x' must name its parents.*'a'"),
        (("a",), {"x": dict}, "x", "'x' has no readable signature"),
    ],
)
def test_construction_refuses(inputs, mechanisms, output, message):
    with pytest.raises(ValueError, match=message):
        CausalModel(inputs, mechanisms, output)


@pytest.mark.parametrize(
    ("change", "do", "message"),
    [
        ({}, {"middle": 1}, "unknown names in do: 'middle'; known are 'a', 'b', 'c', 'd', 'left'"),
        ({"e": [1]}, {}, "unknown names in inputs: 'e'; known are 'a', 'b', 'c', 'd'"),
        ({"c": [1, 2]}, {}, "unequal lengths: a has 1, b has 1, c has 2, d has 1"),
        ({}, {"left": [True, False]}, "unequal lengths: .*left has 2"),
        ({"c": 1}, {}, "these are scalars: 'c'"),
    ],
)
def test_run_refuses(change, do, message):
    with pytest.raises(ValueError, match=message):
        EQUALITY.run(batch([(0, 1, 2, 3)]) | change, do)


def test_missing_inputs_are_named():
    with pytest.raises(ValueError, match=re.escape("missing inputs: 'b', 'd'; needed are 'a', 'b', 'c', 'd'")):
        EQUALITY.run({"a": [1], "c": [1]})


def test_interchange_refuses_an_unknown_variable():
    base = batch([(0, 1, 2, 3)])
    with pytest.raises(ValueError, match="unknown names in sources: 'middle'; known are"):
        EQUALITY.interchange(base, {"middle": base})


def test_a_failing_mechanism_is_named():
    model = CausalModel(("x",), {"y": lambda x: x.nothing}, "y")
    with pytest.raises(ValueError, match="mechanism of 'y' failed: AttributeError") as caught:
        model.run({"x": [1]})
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_mechanism_of_another_length_is_named():
    model = CausalModel(("x",), {"y": lambda x: x[:1]}, "y")
    with pytest.raises(ValueError, match=re.escape("mechanism of 'y' returned shape (1,); one value for each of 2")):
        model.run({"x": [1, 2]})


def test_ancestors_are_found_in_a_graph_of_very_many_ways():
    mechanisms: dict[str, Any] = {"p0": lambda x, y: x, "q0": lambda x, y: y}
    for step in range(1, 40):
        made: dict[str, Any] = {}
        before = f"lambda p{step - 1}, q{step - 1}:"
        exec(f"p = {before} p{step - 1}\nq = {before} q{step - 1}", made)
        mechanisms |= {f"p{step}": made["p"], f"q{step}": made["q"]}
    model = CausalModel(("x", "y"), mechanisms, "p39")
    assert ancestors(model, "p39") == {"x", "y", *(f"{side}{step}" for side in "pq" for step in range(39))}
    assert ancestors(model, "p0") == {"x", "y"} and ancestors(model, "x") == set()
