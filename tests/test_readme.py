"""README.md: short, its example runs, its two commands stand at the top. The tables of all pages are the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.code_blocks import blocks, few_examples

ROOT = Path(__file__).parent.parent
TABLE = re.compile(rb"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_examples_run_in_order(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    few_examples(monkeypatch, 128)  # the same with all of them: tests/test_cli_demo.py
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


def test_it_is_read_to_its_end(readme: str):
    assert len(readme.split()) <= 1200
    assert readme.count("<!-- table:") <= 1, "results go to docs/results.md"
    [(_, example)] = blocks(readme, "python")
    assert len([line for line in example.splitlines() if line]) == 12
    for verb in ("sparsify", "fold", "verify"):
        assert f"tls.{verb}(" in example


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/measurements.md"])
def test_the_tables_are_the_ones_that_the_benchmarks_wrote(page: str):
    content = (ROOT / page).read_bytes()
    tables = TABLE.findall(content)
    assert tables, f"{page} has no <!-- table: NAME --> ... <!-- end -->"
    assert len(tables) == content.count(b"<!-- table:") == content.count(b"<!-- end -->"), "a marker stands alone"
    for name, table in tables:
        written = ROOT / "benchmarks" / "results" / f"{name.decode()}.md"
        assert table == written.read_bytes(), f"the table {name.decode()} of {page} is not {written.name}"


def test_every_table_of_the_benchmarks_is_on_a_page():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name.decode() for page in pages for name, _ in TABLE.findall(page.read_bytes())}
    assert shown == {written.stem for written in (ROOT / "benchmarks" / "results").glob("*.md")}
