"""Models as folders: a damaged one is refused by name, and loading one moves no global random state."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tl_sparsify import list_tasks, load_task
from tl_sparsify.tasks.native import load_native, save_native

CONFIG: dict[str, Any] = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 6, "d_vocab": 7}
CONFIG |= {"d_mlp": 5, "act_fn": "relu", "normalization_type": None, "seed": 0}
TASKS = Path(__file__).parent.parent / "tasks"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import boot_native

    folder = tmp_path_factory.mktemp("native") / "model"
    save_native(boot_native(TransformerBridgeConfig(**CONFIG)), CONFIG, folder)
    return folder


def copied(saved: Path, to: Path) -> Path:
    shutil.copytree(saved, to)
    return to


def test_a_folder_is_read_as_it_was_written(saved: Path, tmp_path: Path):
    tokens = torch.tensor([[1, 2, 3]])
    loaded = load_native(saved)
    save_native(loaded, CONFIG, tmp_path / "again")
    assert torch.equal(load_native(tmp_path / "again")(tokens), loaded(tokens))
    names = {path.name for path in saved.iterdir()}
    assert names == {"config.json", "model.safetensors", "model.sha256"}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_every_flipped_bit_and_every_truncation_is_refused(saved: Path, tmp_path: Path):
    folder, draw = copied(saved, tmp_path / "model"), random.Random(0)
    for name in ("config.json", "model.safetensors"):
        whole = (saved / name).read_bytes()
        for number in range(100):
            broken = bytearray(whole)
            place = draw.randrange(len(whole))
            if number % 4:
                broken[place] ^= 1 << draw.randrange(8)
            else:
                broken = broken[:place]
            (folder / name).write_bytes(bytes(broken))
            with pytest.raises(ValueError, match=r"model is damaged: its checksum does not match .* Save it again"):
                load_native(folder)
        (folder / name).write_bytes(whole)
    load_native(folder)


def test_a_folder_of_an_older_version_is_loaded_and_refused_where_it_cannot_be_read(saved: Path, tmp_path: Path):
    folder = copied(saved, tmp_path / "old")
    (folder / "model.sha256").unlink()
    load_native(folder)
    for name, content in (
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", (saved / "config.json").read_bytes().replace(b'"d_mlp": 5', b'"d_mlp": 6')),
        ("model.safetensors", (saved / "model.safetensors").read_bytes()[:-3]),
        ("model.safetensors", b""),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="old is damaged, or is no model whose parts fit together"):
            load_native(folder)
        (folder / name).write_bytes(before)


def test_every_model_that_ships_has_its_checksum():
    folders = [path.parent for path in TASKS.rglob("config.json") if path.parent.parent.name != "language_model"]
    assert len(folders) >= 15
    for folder in folders:
        assert (folder / "model.sha256").is_file(), folder
        load_native(folder)


@pytest.mark.parametrize("name", ["ioi", "hierarchical_equality", "tracr_hist"])
def test_loading_a_task_and_its_model_moves_no_random_state(name: str):
    assert name in list_tasks()
    before = torch.random.get_rng_state()
    load_task(name).model()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["model.sha256", "model.safetensors", "config.json"])
@pytest.mark.parametrize("older", [True, False])
def test_half_of_a_model_over_an_older_one_is_refused(
    name: str, older: bool, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same weights' shapes under other settings: every part alone would be loaded with the older one's others."""
    folder, model = copied(saved, tmp_path / "model"), load_native(saved)
    if older:
        (folder / "model.sha256").unlink()  # as older versions wrote them
    with torch.no_grad():
        model.unembed.weight.add_(1.0)
    whole, parts = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        moved = whole(path, target)
        parts.append(Path(target).name)
        if parts[-1] == name and len(parts) < 3:
            raise KeyboardInterrupt
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:
            save_native(model, CONFIG | {"act_fn": "gelu"}, folder)
        except KeyboardInterrupt:
            with pytest.raises(ValueError, match="model is damaged: its checksum does not match"):
                load_native(folder)
        else:
            assert len(parts) == 3 and load_native(folder).cfg.act_fn == "gelu"
    save_native(model, CONFIG | {"act_fn": "gelu"}, folder)
    assert load_native(folder).cfg.act_fn == "gelu"
