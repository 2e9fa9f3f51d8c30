"""docs/your_own_data.md: from a CSV and a model to a circuit, a page and the benchmark's files in at most 15 lines; and
published data sets from their files."""

from __future__ import annotations

import csv
from itertools import permutations
from pathlib import Path

import pytest
from helpers.code_blocks import blocks
from helpers.published import write_causalgym, write_ravel

import tl_sparsify as tls

PAGE = Path(__file__).parent.parent / "docs" / "your_own_data.md"


def write_pairs(path: Path, tokenizer: object) -> int:
    """As the page says, with a row whose pair is of another length."""
    names = tls.text.single_token_words(tokenizer, ["David", "Alan", "Mary", "Tom", "Anna", "Peter"])[:4]
    ids = {name: tokenizer(f" {name}", add_special_tokens=False)["input_ids"][-1] for name in names}  # type: ignore
    rows = [
        (f"{a} and {b} met. {b} gave a ring to", f"{a} and {b} met. {a} gave a ring to", ids[a], ids[b])
        for a, b in permutations(names, 2)
    ]
    rows.append((rows[0][0], "a ring to", *rows[0][2:]))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("clean", "corrupted", "correct_idx", "incorrect_idx"))
        writer.writerows(rows)
    return len(rows) - 1


def test_from_a_file_to_a_circuit_a_page_and_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (_, code), _ = blocks(PAGE.read_text(), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    own = tls.task.own_language_model()
    usable = write_pairs(Path("pairs.csv"), tls.text.load_tokenizer(own))
    made: dict[str, object] = {}
    exec(code.replace('"gpt2")  ', f'"{own}")  ', 1), made)
    reduction = made["reduction"]
    assert isinstance(reduction, tls.Reduction)
    assert (
        f"LoadedExamples({usable} of {usable + 1} rows; dropped: 1 a pair of other length)" in capsys.readouterr().out
    )
    assert len(Path("circuit.html").read_text()) < 2_000_000
    assert tls.mib.load("circuit.json").circuit(made["model"]) == reduction.circuit
    assert len(list(Path("submission/ioi_gpt2").iterdir())) == 9


def test_published_data_sets_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _, (_, code) = blocks(PAGE.read_text(), "python")
    monkeypatch.chdir(tmp_path)
    write_causalgym(Path("causalgym"))
    write_ravel(Path("ravel"))
    made: dict[str, object] = {}
    exec(code.replace('"gpt2"', f'"{tls.task.own_language_model()}"', 1), made)
    said = capsys.readouterr().out
    assert "Evidence(type " in said and "('Country', 'Continent', 'answer')" in said
    assert "Examples(8 of shape" in said
