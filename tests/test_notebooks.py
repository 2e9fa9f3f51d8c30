"""Every notebook runs from beginning to end, and none is stored with big outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes of outputs


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ is empty"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path):
    notebook = nbformat.read(shutil.copy(path, tmp_path), as_version=4)
    where = {"metadata": {"path": tmp_path}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    size = sum(len(json.dumps(cell.outputs)) for cell in cells if cell.cell_type == "code")
    assert size <= LARGEST, f"{path.name}: {size:,} bytes of outputs; at most {LARGEST:,}"
