"""Tasks by name and by folder: what loads, and what is refused with a sentence that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_sparsify import Task, list_tasks, load_task

MINIMAL = """
from __future__ import annotations
from dataclasses import dataclass
import tl_sparsify as tls

@dataclass(frozen=True)
class Settings:
    size: int = 3

MODEL = tls.CausalModel(("x",), {"y": lambda x: x}, "y")

def task() -> tls.Task:
    site = tls.Site(kind="head", layer=0, hook="blocks.0.attn.hook_z", size=Settings().size)
    return tls.Task(
        name="mine",
        description="copy x",
        model=lambda: None,
        dataset=lambda seed: {"seed": seed},
        examples=lambda seed: None,
        causal_model=MODEL,
        alignment=tls.Alignment({"y": [tls.Unit(site, 0)]}),
        pairs=lambda n, seed: None,
        chance=0.5,
    )
"""


def folder_of(parent: Path, code: str | None = MINIMAL, card: str | None = "# Mine\n", name: str = "mine") -> Path:
    folder = parent / name
    folder.mkdir()
    for file, content in (("task.py", code), ("README.md", card)):
        if content is not None:
            (folder / file).write_text(content)
    return folder


def test_the_shipped_tasks_are_listed_in_order():
    names = list_tasks()
    assert "hierarchical_equality" in names and list(names) == sorted(set(names))


@pytest.mark.parametrize("name", list_tasks())
def test_every_listed_task_loads_under_its_name(name: str):
    task = load_task(name)
    assert isinstance(task, Task) and task.name == name and task.description
    assert repr(task) == f"Task({name}: {task.description})"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_of_ones_own_loads(kind: type, tmp_path: Path):
    task = load_task(kind(folder_of(tmp_path)))
    assert (task.name, task.alignment.variables, task.dataset(4)) == ("mine", ("y",), {"seed": 4})
    assert task.alignment.units["y"][0].site.size == 3
    assert dict(task.causal_models) == {}


def test_a_relative_folder_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_task("mine").name == load_task("./mine").name == "mine"


def test_a_shipped_name_is_the_shipped_task_and_a_path_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of(tmp_path, name="hierarchical_equality")
    monkeypatch.chdir(tmp_path)
    assert load_task("hierarchical_equality").name == "hierarchical_equality"
    assert load_task("./hierarchical_equality").name == "mine"


def test_a_folder_is_read_anew_each_time(tmp_path: Path):
    folder = folder_of(tmp_path)
    assert load_task(folder).description == "copy x"
    (folder / "task.py").write_text(MINIMAL.replace("copy x", "copies the input"))
    assert load_task(folder).description == "copies the input"


@pytest.mark.parametrize("wrong", ["hierarchical_equalty", "hierarchical-equality", "heirarchical_equality"])
def test_an_unknown_name_gets_the_near_ones(wrong: str):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}': did you mean hierarchical_equality"):
        load_task(wrong)


@pytest.mark.parametrize("wrong", ["zzzz", "nowhere/at/all", "/no/such/folder"])
def test_a_name_that_is_near_none_gets_all_of_them(wrong: str):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}'.*The tasks are: .*hierarchical_equality"):
        load_task(wrong)


def test_a_file_is_no_task(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown task"):
        load_task(folder_of(tmp_path) / "task.py")


@pytest.mark.parametrize(("missing", "part"), [("code", "task.py"), ("card", "README.md")])
def test_a_folder_without_a_part_is_refused_by_its_name(missing: str, part: str, tmp_path: Path):
    folder = folder_of(tmp_path, **{missing: None})
    with pytest.raises(ValueError, match=f"task folder .*mine has no {part}"):
        load_task(folder)


@pytest.mark.parametrize("code", ["x = 1\n", "def task():\n    return 'mine'\n", "task = 3\n"])
def test_a_file_that_makes_no_task_is_refused(code: str, tmp_path: Path):
    folder = folder_of(tmp_path, code)
    with pytest.raises(ValueError, match=r"task\.py has no function task\(\) that returns a tl_sparsify\.Task"):
        load_task(folder)


def test_an_error_inside_a_task_is_shown_as_it_is(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        load_task(folder_of(tmp_path, "1 / 0\n"))


def test_a_task_cannot_be_changed(tmp_path: Path):
    task = load_task(folder_of(tmp_path))
    with pytest.raises(AttributeError):
        task.name = "other"  # type: ignore[misc]
