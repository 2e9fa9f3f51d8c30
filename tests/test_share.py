"""Sharing: the card says what is known, and what is pushed comes back equal, from a folder and by the hub's client."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
from helpers.native import native, removed

import tl_sparsify as tls
from tl_sparsify.core.moments import Estimate
from tl_sparsify.core.units import heads


@pytest.fixture
def reduction() -> tls.Reduction:
    model = native()
    return removed(heads(model), 4)


def test_the_card_says_what_is_known(reduction: tls.Reduction):
    risk = Estimate(0.25, 0.01, 100, "nats")
    text = tls.card(reduction, model="a|b", task="ioi", risk=risk, controls={"random circuit": 1.5}, repo="me/ioi")
    for said in (str(reduction.fingerprint), "0.25 nats, 0.23 to 0.27 (n = 100)", 'tls.pull("me/ioi")', "a\\|b",
                 f"{len(reduction.circuit)} of {len(reduction.units)} units", "| random circuit | 1.5 |"):  # fmt: skip
        assert said in text, said
    assert text.startswith("---\n") and "license: mit" in tls.card(reduction, model="a", task="b", licence="mit")
    table = pd.DataFrame({"control": ["random"], "risk": [0.5]})
    assert "| control | risk |\n|---|---|\n| random | 0.5 |" in tls.card(reduction, model="a", task="b", controls=table)
    assert "0.1 to 0.4" in tls.card(reduction, model="a", task="b", risk=risk, interval=(0.1, 0.4))
    with pytest.raises(ValueError, match="two ends"):
        tls.card(reduction, model="a", task="b", interval=(0.1, 0.4))


EVIL = "<script>alert(1)</script> [/INST] a|b\n# head"


def test_tags_in_what_a_card_is_given_are_text(reduction: tls.Reduction):
    controls = pd.DataFrame({EVIL: [EVIL], "risk": [0.5]})
    text = tls.card(reduction, model=EVIL, task=EVIL, controls=controls)
    assert "<script" not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt; [/INST] a\\|b # head") == 5
    assert [line for line in text.splitlines() if line.startswith("# ")][1:] == []
    assert tls.card(reduction, model="a", task="b", controls={EVIL: 0.5}).count("<script") == 0
    of_a_kind = replace(reduction, values=replace(reduction.values, kind=EVIL))
    assert "<script" not in tls.card(of_a_kind, model="a", task="b")
    for wrong in ({"repo": 'me/x")\nimport os'}, {"licence": "mit\ntags: [x]"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            tls.card(reduction, model="a", task="b", **wrong)


def test_a_folder_stands_for_a_hub(reduction: tls.Reduction, tmp_path: Path):
    where = tls.push(reduction, "me/ioi", card="# A circuit", endpoint=tmp_path)
    assert where == str(tmp_path / "me" / "ioi")
    assert sorted(path.name for path in Path(where).iterdir()) == ["README.md", "circuit.reduction"]
    assert tls.pull("me/ioi", endpoint=tmp_path) == reduction
    tls.push(reduction, "me/ioi", card="# Again", endpoint=tmp_path)
    assert (Path(where) / "README.md").read_text() == "# Again\n"
    with pytest.raises(FileNotFoundError):
        tls.pull("me/other", endpoint=tmp_path)
    for wrong in ("ioi", "me/", "../x", "a/b/c"):
        with pytest.raises(ValueError, match="it is owner/name"):
            tls.push(reduction, wrong, card="", endpoint=tmp_path)


def test_through_the_client_of_the_hub(reduction: tls.Reduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The client's calls, led to a folder."""
    said: list[Any] = []

    class Api:
        def __init__(self, endpoint: str | None, token: str | None) -> None:
            self.endpoint = endpoint or "https://huggingface.co"
            said.append(token)

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            (tmp_path / repo).mkdir(parents=True, exist_ok=exist_ok)
            said.append(private)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo: str, name: str, **settings: Any) -> str:
        said.append(settings)
        return str(tmp_path / repo / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert tls.push(reduction, "me/ioi", card="", private=False, token="t") == "https://huggingface.co/me/ioi"
    assert tls.pull("me/ioi", revision="main") == reduction
    assert said == ["t", False, {"revision": "main", "token": None, "endpoint": None}]
    assert tls.push(reduction, "me/ioi", card="", endpoint="http://localhost:1") == "http://localhost:1/me/ioi"
