"""The documentation: every code block of every page runs, and the site builds without a warning and fetches nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.code_blocks import blocks, few_examples

import tl_sparsify as tls

ROOT = Path(__file__).parent.parent
PAGES = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
CODE = {name for name, page in PAGES.items() if blocks(page.read_text(), "python")}
ELSEWHERE = {"write_your_own_task", "your_own_data"}  # followed in tests of their own
FETCHED = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)|<link[^>]* href=\"?(https?:[^\" >]+)")


def test_code_is_in_blocks_that_are_run():
    for name, page in PAGES.items():
        opened = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(opened) <= {"python", "text"} or name in ELSEWHERE, f"{name}: {set(opened)}"
    assert ELSEWHERE < CODE and len(CODE) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CODE - ELSEWHERE))
def test_the_pages_code_runs_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if name == "tour":  # its searches take minutes on all of them
        few_examples(monkeypatch, 128)
    namespace: dict[str, Any] = {"__name__": name}
    with torch.random.fork_rng():
        for line, code in blocks(PAGES[name].read_text(), "python"):
            exec(compile("\n" * (line - 1) + code, str(PAGES[name]), "exec"), namespace)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_fetches_nothing(site: Path):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert not FETCHED.findall(page.read_text()), page
    assert not re.findall(r"@import|url\(https?:", (site / "site.css").read_text())


@pytest.mark.slow
def test_the_site_has_a_place_for_every_public_name(site: Path):
    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    for name in tls.__all__:
        assert re.search(rf'id="tl_sparsify\.[\w.]*\b{name}"', reference), name
    for family, name in (("score", "risk"), ("constants", "refit"), ("baselines", "random"), ("plot", "frontier")):
        assert f"tls.{family}.{name}" in reference, f"tls.{family}.{name}"
    assert ":func:" not in reference and "=====" not in reference, "markup that a browser shows as it is"


@pytest.mark.slow
def test_the_site_shows_formulas_and_notebooks(site: Path):
    method = (site / "method.html").read_text()
    assert method.count("<math") > 20 and "\\(" not in method and "\\[" not in method and "$$" not in method
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "tutorial" / f"{notebook.stem}.html").read_text()
        assert "<img" in page and "tl_sparsify" in page, notebook.stem
