"""Damaged files: of every kind that is read none is taken, and each is refused by its name."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.architectures import bridge as architecture
from helpers.damage import accepted, damaged, rewritten
from helpers.native import native, reduction_of
from helpers.written import run_folder

import tl_sparsify as tls
from tl_sparsify import Circuit, importers, mib, report
from tl_sparsify.comparison import cells
from tl_sparsify.comparison.benchmark import gathered
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.folding.bridge import load_folded, save_folded
from tl_sparsify.folding.fold import fold
from tl_sparsify.presentation.results import RUN_FILES, RunResults
from tl_sparsify.presentation.sealed import sealed
from tl_sparsify.tasks.native import load_native, save_native

COUNT = 24  # cuts of a file, and as many flipped bits
LLAMA = "Llama"
Readers = list[tuple[Path, Callable[[], Any], tuple[str, ...], bool]]
CONFIG: dict[str, Any] = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 6, "d_vocab": 7}
CONFIG |= {"d_mlp": 5, "act_fn": "relu", "normalization_type": None, "seed": 0}


def ours(folder: Path) -> Readers:
    """Files with a checksum: every flipped bit is seen."""
    model = native()
    reduction = reduction_of(model, ["L0H1", "L1N2"])
    reduction.save(folder / "one.reduction")
    save_folded(fold(model, reduction), folder / "folded")
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import boot_native

    save_native(boot_native(TransformerBridgeConfig(**CONFIG)), CONFIG, folder / "native")
    run = run_folder(folder / "run")
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(sealed(about, run, RUN_FILES), indent=2) + "\n")
    cell = folder / "cells" / "random-0.csv"
    key = {"task": "t", "method": "random", "seed": 0}
    cells.write(cell, key, pd.DataFrame([key | {"risk": 0.25, "size": 0.1}, key | {"risk": 0.5, "size": 0.2}]))
    assert cells.read(cell, key) is not None and cells.read(cell, key | {"seed": 1}) is None
    found: Readers = [
        (folder / "one.reduction", lambda: Reduction.load(folder / "one.reduction"), ("one.reduction",), True),
        (folder / "folded" / "folded.safetensors", lambda: load_folded(folder / "folded"), ("folded.saf",), True),
        (cell, lambda: cells.checked_cell(cell), ("random-0.csv",), True),
    ]
    for name in ("config.json", "model.safetensors", "model.sha256"):
        found.append((folder / "native" / name, lambda: load_native(folder / "native"), ("native",), True))
    for name in RUN_FILES:
        found.append((run / name, lambda: RunResults.load(run), (name, "run.json"), True))
    return found


def others(folder: Path) -> Readers:
    """Files of other people's forms: with archives' own checksums, or none, where a flipped digit is another number."""
    model = native()
    units = tls.heads(model) + tls.mlps(model)
    graph = mib.graph(model, Circuit.of(units, ["L0H1", "L1MLP"]))
    graph = graph.__class__(*(getattr(graph, name) for name in ("sizes", "kept_nodes", "kept_edges", "node_scores")),
                            torch.arange(len(graph.edge_scores)).double())  # fmt: skip
    found: Readers = []
    for name in ("graph.json", "graph.pt"):
        graph.save(folder / name)
        found.append((folder / name, lambda name=name: mib.load(folder / name), (name,), name.endswith(".pt")))
    width = model.cfg.d_model
    rotation = folder / "intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin"
    torch.save({"rotate_layer.weight": torch.eye(width)[:, :2]}, rotation)
    found.append((rotation, lambda: importers.pyvene(model, rotation), (rotation.name,), True))
    edges = folder / "edges.pt"
    torch.save([("blocks.1.hook_resid_post", (None,), "blocks.0.attn.hook_result", (None, None, 1))], edges)
    found.append((edges, lambda: importers.acdc(model, edges), ("edges.pt",), True))
    rows = pd.DataFrame({"prompt": ["a b", "c d"] * 20, "answer": ["e", "f"] * 20})
    rows.to_parquet(folder / "rows.parquet")
    (folder / "rows.json").write_text(rows.to_json(orient="records"))
    for name in ("rows.parquet", "rows.json"):
        from tl_sparsify.formats.rows import read_rows

        found.append((folder / name, lambda name=name: read_rows(folder / name, None), (name,), False))
    return found


def harmless(path: Path, whole: bytes, content: bytes, read: Callable[[], Any], before: Any) -> bool:
    """Whether a changed byte says the same: the E of a number, white space at the end, a date within an archive."""
    if path.suffix == ".json":
        try:
            return json.loads(content) == json.loads(whole)
        except ValueError:
            return False
    if path.suffix == ".sha256":
        return content.strip() == whole.strip()
    if path.suffix in (".pt", ".bin"):
        try:
            return bool(read() == before)
        except (ValueError, FileNotFoundError):
            return False
    return False


@pytest.mark.parametrize("kind", [ours, others])
def test_no_damaged_file_is_taken_and_each_is_refused_by_name(kind: Callable[[Path], Readers], tmp_path: Path):
    tried, taken = 0, []
    for number, (path, read, names, flipped) in enumerate(kind(tmp_path)):
        before, whole = read(), path.read_bytes()
        for what, content in damaged(whole, COUNT, number, flipped=flipped):
            path.write_bytes(content)
            if content == whole or harmless(path, whole, content, read, before):
                continue
            tried += 1
            came = accepted(read, *names)
            taken += [] if came is None else [(path.name, what, came)]
        path.unlink()
        came = accepted(read, *names, path.parent.name)
        taken += [] if came is None or path.name == "model.sha256" else [(path.name, "gone", came)]
        path.write_bytes(whole)
        read()
    sys.stdout.write(f"{tried} damaged files, {len(taken)} taken\n")
    assert taken == [] and tried >= {ours: 600, others: 150}[kind]


def at(*path: Any, to: Any = None, gone: bool = False) -> Callable[[dict[str, Any], Any], None]:
    """A change of a header: what lies at ``path`` becomes ``to``, or is gone."""

    def change(header: dict[str, Any], tensors: Any) -> None:
        place: Any = header
        for name in path[:-1]:
            place = place[name]
        if gone:
            del place[path[-1]]
        else:
            place[path[-1]] = to

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any, dict[str, Any]], None]:
    """A change of the first tensor whose name begins like this."""

    def change(header: Any, tensors: dict[str, Any]) -> None:
        first = next(key for key in sorted(tensors) if key.startswith(name))
        made = make(tensors.pop(first))
        tensors |= {} if made is None else {first: made}

    return change


def nan(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[0] = float("nan")
    return value


SITES = {
    "a size of 10**15": at("sites", 0, "size", to=10**15),
    "a size of 10**10": at("sites", 0, "size", to=10**10),
    "a size less": at("sites", 0, "size", to=1),
    "a size of 1.5": at("sites", 0, "size", to=1.5),
    "a hook that is a number": at("sites", 0, "hook", to=3),
    "a kind that there is not": at("sites", 0, "kind", to="soul"),
    "another field": at("sites", 0, "__class__", to="x"),
    "positions of another kind": at("sites", 0, "positions", to={"a": 1}),
    "no sites": at("sites", gone=True),
    "sites that are a number": at("sites", to=3),
    "a rule that there is not": at("first_token", to="never"),
    "no kind": at("kind", gone=True),
    "NaN": tensor("values.0", nan),
    "infinity": tensor("values.0", lambda value: value / 0),
    "whole numbers": tensor("values.0", lambda value: value.long()),
    "a row more": tensor("values.0", lambda value: torch.cat([value, value[:1]])),
    "no values": tensor("values.0", lambda value: None),
    "a mask of numbers": tensor("mask", lambda value: value.long()),
    "no mask": tensor("mask", lambda value: None),
}


@pytest.mark.parametrize("what", SITES)
def test_a_reduction_that_an_enemy_wrote_is_refused_by_name(what: str, tmp_path: Path):
    file = tmp_path / "one.reduction"
    reduction_of(native(), ["L0H1", "L1N2"]).save(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with rewritten(file, "reduction", SITES[what]):
        assert accepted(lambda: Reduction.load(file), "one.reduction") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB
    Reduction.load(file)


BOTH = {
    "NaN": tensor("model.", nan),
    "a parameter of another shape": tensor("model.", lambda value: value[:-1]),
    "a parameter that is missing": tensor("model.", lambda value: None),
    "a unit too many": tensor("units.", lambda value: torch.cat([value, value.max()[None] + 1])),
    "a unit too few": tensor("units.", lambda value: value[:-1]),
    "a unit twice": tensor("units.L0N", lambda value: value * 0),
    "units of a layer that is not there": lambda header, tensors: tensors.update({"units.L9H": torch.arange(3)}),
    "a layer too few": lambda header, tensors: header["layers"].pop(),
    "too many neurons": at("layers", 0, "neurons", to=10**10),
    "neurons that are text": at("layers", 0, "neurons", to="many"),
    "heads that are not there": at("layers", 0, "kv_index", to=[0] * 50),
    "no layers": at("layers", gone=True),
    "a precision that is a function": at("model", "dtype", to="load"),
    "an architecture that there is not": at("model", "architecture", to="AutoModel"),
    "another architecture's name": at("model", "architecture", to="GPT2LMHeadModel"),
    "an attention implementation to fetch": at("model", "attention", to="kernels-community/flash-attn"),
    "a hook point that is not there": at("points", to={"blocks.9.hook_out": None}),
    "a way out": at("tokenizer", to={"../../secret": "0" * 64}),
    "a place elsewhere": at("tokenizer", to={"/etc/hostname": "0" * 64}),
    "a tokenizer that is missing": at("tokenizer", to={"tokenizer/tokenizer.json": "0" * 64}),
    "no model": at("model", gone=True),
    "a model that is text": at("model", to="gpt2"),
}
NATIVE = BOTH | {
    "a vocabulary of 10**10": at("model", "config", "d_vocab", to=10**10),
    "a million layers": at("model", "config", "n_layers", to=10**6),
    "a context of 10**10": at("model", "config", "n_ctx", to=10**10),
    "10**15 neurons": at("model", "config", "d_mlp", to=10**15),
}
HUGGING_FACE = BOTH | {
    "code to run": at("model", "config", "auto_map", to={"AutoModelForCausalLM": "me/it--model.Model"}),
    "code to fetch": at("model", "config", "attn_implementation", to="kernels-community/flash-attn"),
    "code to fetch further in": at("model", "config", "rope_parameters", to={"_attn_implementation": "a/b"}),
    "a type of another architecture": at("model", "config", "model_type", to="gpt2"),
    "a vocabulary of 10**10": at("model", "config", "vocab_size", to=10**10),
    "a million layers": at("model", "config", "num_hidden_layers", to=10**6),
    "a width of 10**10": at("model", "config", "hidden_size", to=10**10),
}


@pytest.mark.parametrize("which", [NATIVE, HUGGING_FACE], ids=["native", LLAMA])
def test_a_folded_model_that_an_enemy_wrote_is_refused_by_name(which: dict[str, Any], tmp_path: Path):
    model = native() if which is NATIVE else architecture(LLAMA)
    folder = tmp_path / "small"
    units = tls.heads(model) + tls.neurons(model)
    kept = torch.ones(len(units), dtype=torch.bool)
    kept[[0, -1]] = False
    save_folded(fold(model, reduction_of(model, kept)), folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for what, change in which.items():
        with rewritten(folder / "folded.safetensors", "folded model", change):
            came = accepted(lambda: load_folded(folder), "folded.safetensors", "tokenizer.json")
        taken += [] if came is None else [(what, came)]
    assert taken == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20  # KiB
    load_folded(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("d_vocab", 10**10), ("n_layers", 10**6), ("n_ctx", 10**10), ("d_mlp", 10**15), ("n_layers", "x"), ("odd", 1)],
)
def test_a_model_whose_settings_promise_too_much_is_refused_by_name(name: str, value: Any, tmp_path: Path):
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources import boot_native

    save_native(boot_native(TransformerBridgeConfig(**CONFIG)), CONFIG, tmp_path / "native")
    (tmp_path / "native" / "model.sha256").unlink()
    (tmp_path / "native" / "config.json").write_text(json.dumps(CONFIG | {name: value}))
    assert accepted(lambda: load_native(tmp_path / "native"), "native") is None


EDITS = {
    "run.json": [
        "[]", "3", "null", '"x"', "{}", *(
            {"examples": examples} for examples in (3, {}, {"test": "x"}, {"test": None}, [1])
        ),
        {"task": 3}, {"score": None}, {"score": {"name": 3}}, {"chance": "half"}, {"seed": "x"}, {"ablation": None},
        {"baseline_refit": None}, {"sha256": 3}, {"sha256": {"run.json": "0"}}, {"left_out": 3},
    ],
    "scores.csv": ["unit\nL0H0\n"], "path.csv": ["a\n1\n"], "evaluation.csv": ["a\n1\n"], "fold.csv": ["part\nx\n"],
    "baselines.csv": ["method\nx\n"], "evidence.csv": ["model\nx\n"], "risk.png": ["x"], "causal.png": [""],
    "circuit.reduction": [""],
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_file_of_a_run_of_another_shape_is_refused_by_name(name: str, tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    about = json.loads((folder / "run.json").read_text())
    taken = []
    for edit in EDITS[name]:
        (folder / name).write_text(edit if isinstance(edit, str) else json.dumps(about | edit))
        came = accepted(lambda: report.write(folder), name)
        taken += [] if came is None else [(edit, came)]
    assert taken == []


@pytest.mark.parametrize("name", ["risk.png", "causal.png", "scores.csv", "run.json", "circuit.reduction"])
def test_a_link_that_leads_out_of_a_run_is_not_read(name: str, tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    shutil.move(folder / name, tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=rf"{name} leads out of"):
        report.write(folder)


def test_the_settings_of_a_comparison_are_refused_by_name(tmp_path: Path):
    file = tmp_path / "settings.json"
    random = [tls.baselines.random]
    task = tls.load_task("planted_backup")
    given: dict[str, Any] = {"sizes": (0.5,), "seeds": 1, "refit_patience": 0, "examples": 16, "bootstrap": 0}
    given |= {"out": tmp_path, "progress": False}
    model = task.model()
    first = tls.compare(model, task, random, **given)
    taken = []
    for content in ("", "[]", "3", "null", "\x00\x01", "{", "[[1, 2, 3]]"):
        whole = file.read_text()
        file.write_text(content)
        came = accepted(lambda: tls.compare(model, task, random, **given), "settings.json")
        taken += [] if came is None else [(content, came)]
        file.write_text(whole)
    assert taken == []
    [cell] = tmp_path.glob("cells/*/*.csv")
    whole = cell.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole.replace(b"0.5", b"0.6", 1), whole.partition(b"\n")[2]):
        cell.write_bytes(broken)
        with pytest.raises(ValueError, match=r"random-0\.csv"):
            gathered(tmp_path)
        again = tls.compare(model, task, random, **given)  # a bad one is made again
        columns = [name for name in first if name not in ("seconds", "peak_mb")]
        pd.testing.assert_frame_equal(again[columns], first[columns])
        assert cells.checked_cell(cell)["task"].tolist() == first["task"].tolist()
