"""Docstrings: every public name has an example, and every example gives what it says.

The examples share the names that docs/reference.md makes.
"""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.code_blocks import blocks

import tl_sparsify as tls

ROOT = Path(__file__).parent.parent
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> dict[str, Any]:
    """Every public function and class by the name under which it is reached; one that has several names, once."""
    found: dict[str, Any] = {}
    for name in tls.__all__:
        value = getattr(tls, name)
        if not isinstance(value, ModuleType):
            found[name] = value
            continue
        own = [
            key
            for key, part in vars(value).items()
            if (inspect.isfunction(part) or inspect.isclass(part))
            and not key.startswith("_")
            and part.__module__ == value.__name__
        ]
        parts = {key: getattr(value, key) for key in getattr(value, "__all__", own)}
        found |= {
            f"{name}.{key}": part for key, part in parts.items() if inspect.isfunction(part) or inspect.isclass(part)
        }
    once: dict[int, str] = {}
    for name, value in found.items():
        once.setdefault(id(value), name)
    return {name: found[name] for name in once.values()}


PUBLIC = public()


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples may use."""
    made: dict[str, Any] = {"__name__": "reference"}
    with torch.random.fork_rng():
        for _, code in blocks((ROOT / "docs" / "reference.md").read_text(), "python"):
            exec(code, made)
    return made


def test_every_family_is_looked_at():
    assert len(PUBLIC) > 90
    assert {"heads", "Circuit", "score.risk", "constants.refit", "baselines.eap", "plot.frontier"} <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_the_example_gives_what_it_says(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, dict(names), f"tls.{name}", None, None)
    assert example.examples, f"tls.{name} has no example: add an `Example:` with `>>>` to its docstring"
    assert len(example.examples) <= 6, f"the example of tls.{name} is long: it shows one call"
    report: list[str] = []
    with torch.random.fork_rng():
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    assert not failed, "".join(report)
