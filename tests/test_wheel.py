"""The wheel carries the tasks: built from the tree or by way of the sdist, installed into an empty environment,
used from a folder outside the repository. No network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOT_SOURCE = ("__pycache__", ".git", ".venv", "results", "dist", ".*_cache", ".hypothesis")
USE = """
import json, tl_sparsify as tls
every = [tls.load_task(name).name for name in tls.list_tasks()]
task = tls.load_task("hierarchical_equality")
model = task.model()
weights = sum(p.numel() for p in model.parameters())
print(json.dumps({"file": tls.__file__, "tasks": every, "weights": weights}))
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no setting of this process's Python."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=environ, capture_output=True, text=True)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, straight from a copy of the source tree or by way of the sdist."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    cache = source / "tasks" / "hierarchical_equality" / "__pycache__"  # loading a task leaves one
    cache.mkdir()
    (cache / "task.cpython-311.pyc").write_bytes(b"stale")
    what = ["--wheel"] if request.param == "tree" else []
    succeed(sys.executable, "-m", "build", *what, "--no-isolation", "--outdir", folder, source, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel: Path) -> Path:
    """An environment with this one's packages, but for tl_sparsify: first without, then with the wheel."""
    folder = wheel.parent / "environment"
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():  # no .pth: the one of the editable install leads to the checkout
            if entry.suffix != ".pth" and "tl_sparsify" not in entry.name:
                (dependencies / entry.name).symlink_to(entry)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    before = run(python, "-I", "-c", "import tl_sparsify", cwd=wheel.parent)
    assert "No module named 'tl_sparsify'" in before.stderr
    succeed(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", "--no-compile", wheel),
        cwd=wheel.parent,
    )
    return folder


def test_the_wheel_holds_the_package_and_the_tasks_and_no_caches(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".part"))]
    top = {name.split("/")[0] for name in names}
    assert top == {"tl_sparsify", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    for folder, target in (("tl_sparsify", "tl_sparsify"), ("tasks", "tl_sparsify/_tasks")):
        files = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        scripts = {p for p in files if folder == "tasks" and p.suffix == ".py" and p.name != "task.py"}
        expected = {f"{target}/{p.as_posix()}" for p in files - scripts if "__pycache__" not in p.parts}
        assert expected <= set(names), f"not in the wheel: {sorted(expected - set(names))}"
        beyond = {f"{target}/{p.as_posix()}" for p in scripts} & set(names)
        assert not beyond, f"for the repository only: {sorted(beyond)}"


def test_the_installed_wheel_loads_a_task_by_name(environment: Path, tmp_path: Path):
    printed = succeed(environment / "bin" / "python", "-I", "-c", USE, cwd=tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(environment)
    assert "hierarchical_equality" in found["tasks"]
    assert found["weights"] > 0


def test_the_installed_command_lists_the_tasks(environment: Path, tmp_path: Path):
    assert "hierarchical_equality" in succeed(environment / "bin" / "tl-sparsify", "tasks", cwd=tmp_path)
