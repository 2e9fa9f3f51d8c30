"""Results in a folder are of one run: old ones stay whole until new ones are complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from tl_sparsify._internal.directory import results

NAMES = ("run.json", "a.csv", "b.csv", "folded")


def written(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def there(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_in_an_empty_folder_files_are_there_at_once(tmp_path: Path):
    written(tmp_path, notes_txt="mine")
    with results(tmp_path, NAMES, "run.json") as into:
        written(into, a_csv="new")
        assert there(tmp_path) == {"a.csv": "new", "notes.txt": "mine"}
    assert there(tmp_path) == {"a.csv": "new", "notes.txt": "mine"}


def test_older_results_are_replaced_as_a_whole(tmp_path: Path):
    old = {"a_csv": "old", "b_csv": "old", "folded__weights": "old", "run_json": "old"}
    written(tmp_path, notes_txt="mine", **old)
    before = there(tmp_path)
    with results(tmp_path, NAMES, "run.json") as into:
        written(into, a_csv="new", folded__other="new", run_json="new")
        assert {name: text for name, text in there(tmp_path).items() if not name.startswith(".")} == before
    # b.csv, which the new run does not have, is gone too
    assert there(tmp_path) == {"a.csv": "new", "folded/other": "new", "notes.txt": "mine", "run.json": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "folded", "notes.txt", "run.json"]


def test_an_exception_leaves_older_results_and_nothing_else(tmp_path: Path):
    written(tmp_path, a_csv="old", notes_txt="mine")  # an unfinished run counts too
    before = there(tmp_path)
    with pytest.raises(KeyboardInterrupt), results(tmp_path, NAMES, "run.json") as into:
        written(into, a_csv="new", b_csv="new")
        raise KeyboardInterrupt
    assert there(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("stop", range(7))
def test_a_stop_in_the_middle_of_the_exchange_brings_the_older_ones_back(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(tmp_path, a_csv="old", b_csv="old", folded__weights="old", run_json="old")
    before, moves, whole = there(tmp_path), 0, Path.replace

    def replace(path: Path, target: Path) -> Path:
        nonlocal moves
        moves += 1
        if moves == stop + 1:
            raise KeyboardInterrupt
        mixed = {text for name, text in there(tmp_path).items() if not name.startswith(".")}
        assert moves > stop or "run.json" not in there(tmp_path) or len(mixed) <= 1
        return whole(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), results(tmp_path, NAMES, "run.json") as into:
        written(into, a_csv="new", folded__other="new", run_json="new")
    monkeypatch.undo()
    assert there(tmp_path) == before and len(list(tmp_path.iterdir())) == 4
