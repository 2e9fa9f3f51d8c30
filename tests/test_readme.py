"""README.md: its examples run, its two commands stand at the top, its tables are those of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TABLE = re.compile(rb"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """Number of the first line, and content, of each fenced block in one of the languages."""
    fenced = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in fenced.finditer(text)]


def test_the_examples_run_in_order(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    examples = blocks(readme, "python")
    assert examples, "README.md has no ```python block"
    namespace: dict[str, Any] = {"__name__": "readme"}
    for line, code in examples:
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), namespace)


def test_the_two_commands_stand_at_the_top(readme: str):
    shell = blocks(readme, "sh", "bash", "shell", "console")
    lines = {
        command.removeprefix("$ ").split("#")[0].strip(): line + offset
        for line, code in reversed(shell)
        for offset, command in enumerate(code.splitlines())
    }
    for command in ("make demo", "make test"):
        assert lines.get(command, 40) < 40, f"README.md: `{command}` stands in no shell block before line 40"


def test_the_tables_are_the_ones_that_the_benchmarks_wrote():
    content = (ROOT / "README.md").read_bytes()
    tables = TABLE.findall(content)
    assert tables, "README.md has no <!-- table: NAME --> ... <!-- end -->"
    assert len(tables) == content.count(b"<!-- table:") == content.count(b"<!-- end -->"), "a marker stands alone"
    for name, table in tables:
        written = ROOT / "benchmarks" / "results" / f"{name.decode()}.md"
        assert table == written.read_bytes(), f"the table {name.decode()} of README.md is not {written.name}"
