"""What ships of the tasks is whole: a ``task.py`` imports nothing that an installed wheel lacks."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "tasks").glob("*/task.py"))


def declared() -> set[str]:
    """The packages that the wheel asks for, by the names they are imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_a_task_imports_only_what_is_installed_with_it(path: Path):
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: it is loaded by its path, not as part of a package"
            found.add((node.module or "").partition(".")[0])
    lacking = found - declared() - {"tl_sparsify"} - sys.stdlib_module_names
    assert not lacking, f"{path.relative_to(ROOT)} imports {sorted(lacking)}, which a wheel lacks"


def test_there_are_tasks_to_look_at():
    assert len(SHIPPED) >= 19 and {"torch", "transformer_lens"} <= declared()
