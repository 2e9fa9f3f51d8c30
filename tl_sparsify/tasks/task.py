"""Task: a model, its examples and the algorithm that it is supposed to run, reached by name or by folder.

A task folder holds ``task.py`` with ``def task() -> Task``, a card ``README.md``, and whatever these load. Loading a
task runs its ``task.py``: load only folders that you trust.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pandas as pd

from tl_sparsify._internal.arguments import checked
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.core.examples import Examples
from tl_sparsify.tasks.native import load_native, save_native
from tl_sparsify.tasks.real_models import located

# Readers of published files, imported on use: they make the Task that is defined here.
_READERS = {"causalgym": "tl_sparsify.tasks.causalgym", "ravel": "tl_sparsify.tasks.ravel"}

_PUBLISHED = {
    "causalgym": "say which of its tasks and where its files are, load_task('causalgym/agr_gender', path='causalgym')",
    "ravel": "say which entity and attribute and where its files are, load_task('ravel/city/Country', path='ravel')",
}

__all__ = ["Task", "list_tasks", "load_native", "load_task", "load_truth", "own_language_model", "save_native"]


@dataclass(frozen=True)
class Task:
    """A task made of pure functions.

    Attributes:
        name, description: for people.
        model: loads the trained model, in evaluation mode.
        dataset: the raw data of a seed, as a ``datasets.DatasetDict``.
        examples: train, validation and test examples of a seed.
        causal_model: the algorithm, as a hypothesis.
        alignment: which units carry its variables, as a hypothesis.
        pairs: ``pairs(n, seed)``: base and source inputs for interchange, from the test split.
        chance: the accuracy of a constant answer.
        causal_models: competing hypotheses by name, right and wrong ones.
        wrong: the names of those that the network should *not* be found to implement.
        truth: for models whose circuit is known, the names of the true units by what makes them true (``"weights"``:
            their weights do work; ``"removal"``: removing one of them matters under ``ablation``).
        ablation: what kind of ablation the model calls for: ``zero`` for compiled ones, else ``mean``.
        dropped: for tasks of published files the rows that cannot be used: ``split, file, row, reason, detail``.

    Example:
        >>> task
        Task(hierarchical_equality: ...)
        >>> task.causal_model.variables, task.chance
        (('left', 'right', 'same'), 0.5)
    """

    name: str
    description: str
    model: Callable[[], Any]
    dataset: Callable[[int], Any]
    examples: Callable[[int], tuple[Examples, Examples, Examples]]
    causal_model: CausalModel
    alignment: Alignment
    pairs: Callable[[int, int], Pairs]
    chance: float
    causal_models: Mapping[str, CausalModel] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    truth: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ablation: Literal["zero", "mean"] = "mean"
    dropped: Callable[[], pd.DataFrame] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w[\w .+-]*", self.name):
            raise ValueError(
                f"name is {self.name!r}; letters, digits and . + - may be in it: results go to a folder of it"
            )

    def __repr__(self) -> str:
        return f"Task({self.name}: {self.description})"


def _folders() -> list[Path]:
    """Where tasks live: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    return [folder for folder in (package / "_tasks", package.parent / "tasks") if folder.is_dir()]


@checked
def list_tasks() -> tuple[str, ...]:
    """The names of the tasks that ship with the package.

    Example:
        >>> "hierarchical_equality" in tls.list_tasks()
        True
    """
    return tuple(sorted({path.parent.name for folder in _folders() for path in folder.glob("*/task.py")}))


@checked
def load_task(
    name: str | Path,
    *,
    model: Any = None,
    prepend_bos: bool | None = None,
    path: str | Path | None = None,
    unusable: Literal["refuse", "drop"] = "refuse",
) -> Task:
    """Load a task by name, from a folder of your own (which runs its ``task.py``), or from the files of a published
    data set: ``causalgym/agr_gender``, or ``ravel/city/Country`` (one kind of entity and one of its attributes).

    The tasks of published files have the published splits, examples that are held against their counterfactual's
    answer, and named spans: CausalGym's regions as ``region0``, ``region1``, ... by their published numbers, and what
    differs in a pair as ``changed``; RAVEL's ``entity`` and its last token, ``entity_end``. Half of their pairs change
    the answer: for CausalGym the published ones, beside pairs of one type; for RAVEL those that ask for the attribute,
    whose value comes from the source (cause), beside those that ask for another one, whose value stays (isolate). An
    answer is a word of one token (CausalGym), or the first token of an attribute's value (RAVEL).

    Args:
        model: for tasks of text the language model to ask: a Hugging Face name or folder, the name of one that
            ``tl-sparsify fetch`` has fetched (``smollm2``), or a bridge. It is loaded when ``task.model()`` is called.
            Where not given, the one that comes with the package.
        prepend_bos: for tasks of text whether the beginning-of-sequence token goes before each prompt; where not given
            as the model's tokenizer has it by itself (:class:`tl_sparsify.text.TextTask`).
        path: the folder with the files of a published data set (CausalGym: ``train.json``, ``dev.json`` and
            ``test.json``, or one file; RAVEL: ``ravel_city_entity_attributes.json`` and those beside it).
        unusable: what is done with its rows that cannot be used: ``refuse`` them all in one error, or ``drop`` them, so
            that ``task.dropped()`` lists them. The tokenizer reads them when data are first asked for.

    Raises:
        FileNotFoundError: a file of a published data set that is not there.
        ValueError: an unknown name (with the near ones), a folder without its parts, a ``model`` for a task that has
            its own, ``prepend_bos`` for a task that is none of text, a model that has not been fetched (with the
            command that does).

    Example:
        >>> tls.load_task("hierarchical_equality").examples(seed=0)[2]
        Examples(768 of shape (5,), 768 answers, with counterfactuals)
    """
    family, _, part = str(name).partition("/")
    if family in _READERS and (path is not None or not Path(name).is_dir()):
        if path is None or not part:
            raise ValueError(f"name is {str(name)!r}: {_PUBLISHED[family]}")
        read = import_module(_READERS[family]).read_task
        source = own_language_model() if model is None else located(model)
        return read(part, Path(path), source, prepend_bos=prepend_bos, unusable=unusable)
    if path is not None:
        raise ValueError(f"path is given, but {str(name)!r} is no published data set: those are {', '.join(_READERS)}")
    folder, function = _found(name)
    if not callable(function):
        raise ValueError(f"{folder / 'task.py'} has no function task() that returns a tl_sparsify.Task")
    taken = inspect.signature(function).parameters
    if model is not None and "model" not in taken:
        raise ValueError(f"model is given, but the task {folder.name} has a model of its own: leave it out")
    if prepend_bos is not None and "prepend_bos" not in taken:
        raise ValueError(f"prepend_bos is given, but the task {folder.name} knows of no beginning token: leave it out")
    given = {"model": located(model), "prepend_bos": prepend_bos}
    made = function(**{name: value for name, value in given.items() if value is not None})
    if not isinstance(made, Task):
        raise ValueError(f"{folder / 'task.py'} has no function task() that returns a tl_sparsify.Task")
    return made


def takes(name: str | Path, argument: str) -> bool:
    """Whether the task has a choice of this name (``model``, ``prepend_bos``).

    Raises:
        ValueError: as :func:`load_task`.
    """
    _, function = _found(name)
    return callable(function) and argument in inspect.signature(function).parameters


def _found(name: str | Path) -> tuple[Path, Any]:
    """The folder of a task and its function ``task``."""
    here = [folder / str(name) for folder in _folders() if (folder / str(name) / "task.py").is_file()]
    path = here[0] if here and Path(name).name == str(name) else Path(name)
    if not path.is_dir():
        near = difflib.get_close_matches(str(name), list_tasks(), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `tl-sparsify tasks`."
        raise ValueError(f"unknown task {str(name)!r}: {hint} The tasks are: {', '.join(list_tasks())}")
    for part in ("task.py", "README.md"):
        if not (path / part).is_file():
            raise ValueError(f"task folder {path} has no {part}")
    return path, getattr(_module(path / "task.py"), "task", None)


@checked
def own_language_model() -> Path:
    """The folder of the small language model that comes with the package, in Hugging Face format.

    Example:
        >>> tls.task.own_language_model().name
        'model'
    """
    here = [folder / "language_model" / "model" for folder in _folders()]
    return next((folder for folder in here if folder.is_dir()), here[-1])


@checked
def load_truth(folder: Path) -> dict[str, tuple[str, ...]]:
    """The true units of a model whose circuit is known, by what makes them true, from ``truth.json`` in its folder;
    none where there is no such file.

    Example:
        >>> folder = tls.task.own_language_model().parents[1] / "planted_backup" / "model"
        >>> tls.task.load_truth(folder)
        {'weights': ('L0H1', 'L1H2')}
    """
    path = folder / "truth.json"
    return {kind: tuple(names) for kind, names in json.loads(path.read_text()).items()} if path.is_file() else {}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tl_sparsify_task_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the module of their class
    spec.loader.exec_module(module)
    return module
