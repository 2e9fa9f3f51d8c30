"""Every notebook runs from beginning to end, and none is stored with big outputs.

Those on the real language model run on fewer examples than they are stored with (their cell of settings is replaced),
and only where the model is.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tl_sparsify.tasks.real_models import fetched

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
REAL = [path for path in NOTEBOOKS if "smollm2" in path.read_text()]
LARGEST = 200_000  # bytes of outputs
SHORT = "EXAMPLES, ROUNDS, KEPT, PROBING = 4, 1, 0.05, tls.Probing(probes=1, examples=2)"
SECONDS = 2 * 10 * 60  # of processor time: ten minutes of two cores, whatever else the machine did meanwhile


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ is empty"


def executed(path: Path, folder: Path, settings: str | None = None) -> nbformat.NotebookNode:
    """The notebook after a run in a folder; ``settings`` stand in the place of the cell of its own."""
    notebook = nbformat.read(shutil.copy(path, folder), as_version=4)
    if settings is not None:
        [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        cell.source = settings
    where = {"metadata": {"path": folder}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path not in REAL], ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path):
    executed(path, tmp_path)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not fetched("smollm2"), reason="`tl-sparsify fetch smollm2` fetches the model")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_notebook_on_the_real_model_runs(path: Path, tmp_path: Path):
    executed(path, tmp_path, SHORT)
    for page in tmp_path.glob("*.html"):
        assert 10_000 < page.stat().st_size < 2_000_000


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_notebook_on_the_real_model_installs_first_and_took_less_than_ten_minutes_of_two_cores(path: Path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert "pip install" in cells[0].source and 'fetch("smollm2")' in cells[0].source
    [said] = [output.text for output in cells[-1].outputs]
    found = re.fullmatch(r"(\d+) s on the clock, (\d+) s of processor time, (\d+) threads\n", said)
    assert found is not None and 0 < int(found[2]) < SECONDS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    size = sum(len(json.dumps(cell.outputs)) for cell in cells if cell.cell_type == "code")
    assert size <= LARGEST, f"{path.name}: {size:,} bytes of outputs; at most {LARGEST:,}"
