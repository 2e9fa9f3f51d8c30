"""What holds for every test: no window, no network, one thread; and what many files need and takes long to make.

Nothing of tl_sparsify is imported here but in fixtures: shapes are checked only in what is imported after pytest has
started.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"  # read when datasets is imported

import jaxtyping
import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)  # tiny models: threads that wait for each other on a busy machine take far longer
settings.register_profile("tl_sparsify", deadline=None, max_examples=30, derandomize=bool(os.environ.get("CI")))
settings.load_profile("tl_sparsify")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--every-shape``: shapes are checked in all tests."""
    parser.addoption("--every-shape", action="store_true", help="check shapes in every test, at three times the time")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Shapes are checked in one fast test of eight, always the same ones; the others run as a user's process does."""
    before = jaxtyping.config.jaxtyping_disable
    plain = item.get_closest_marker("slow") is not None or crc32(item.nodeid.encode()) % 8 != 0
    jaxtyping.config.update("jaxtyping_disable", before or (plain and not item.config.getoption("every_shape")))
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser without a window, where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no browser on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a task with a model of 28 units."""
    from helpers.tiny_task import task_folder

    return task_folder(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def quick(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with ``QUICK`` of that task, to hold others against."""
    from helpers.commands import QUICK, command

    out = tmp_path_factory.mktemp("quick")
    assert command("run", tiny, *QUICK, "--out", out).code == 0
    return out


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each architecture, with a tokenizer that knows every word of the shipped tasks."""
    from helpers.animals import ARCHITECTURES, all_words, checkpoint, tokenizer_of

    return {
        name: checkpoint(tmp_path_factory.mktemp(name), name, tokenizer_of(kind, all_words()))
        for name, kind in ARCHITECTURES.items()
    }
