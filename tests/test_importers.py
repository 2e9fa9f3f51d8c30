"""What other packages found: worked out by hand on two layers of two heads, and never a pickle."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import bridge

import tl_sparsify as tls


@pytest.fixture
def small() -> Any:
    return bridge()


def prune_scores() -> dict[str, torch.Tensor]:
    """Every score another number: module by module, heads before writers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, writers in ((0, 1), (1, 4)):
        shapes |= {f"blocks.{layer}.hook_{part}_input": (2, writers) for part in "qkv"}
        shapes[f"blocks.{layer}.hook_mlp_in"] = (writers + 2,)
    shapes["blocks.1.hook_resid_post"] = (7,)
    found: dict[str, torch.Tensor] = {}
    start = 0
    for name, shape in shapes.items():
        n = int(torch.tensor(shape).prod())
        found[name] = torch.arange(start, start + n).double().reshape(shape)
        start += n
    return found


def test_prune_scores(small: Any, tmp_path: Path):
    content = prune_scores()
    graph = tls.importers.auto_circuit(small, content)
    scores = dict(zip(graph.sizes.edges, graph.edge_scores.tolist(), strict=True))
    assert scores["input->a0.h1<k>"] == float(content["blocks.0.hook_k_input"][1, 0])
    assert scores["a0.h1->m0"] == float(content["blocks.0.hook_mlp_in"][2])
    assert scores["m0->a1.h0<v>"] == float(content["blocks.1.hook_v_input"][0, 3])
    assert scores["a1.h0->logits"] == float(content["blocks.1.hook_resid_post"][4])
    assert sorted(scores.values()) == list(range(46)) and bool(graph.kept_edges.all())
    torch.save({"ioi": {"EAP": content}}, tmp_path / "scores.pkl")
    assert tls.importers.auto_circuit(small, tmp_path / "scores.pkl", key=("ioi", "EAP")) == graph
    with pytest.raises(ValueError, match=r"no tensor for ioi: name what is meant by key="):
        tls.importers.auto_circuit(small, tmp_path / "scores.pkl")
    with pytest.raises(ValueError, match="there is no 'ACDC' among EAP"):
        tls.importers.auto_circuit(small, tmp_path / "scores.pkl", key=("ioi", "ACDC"))


def test_prune_scores_of_a_head_s_whole_input(small: Any):
    content = {name: value for name, value in prune_scores().items() if "_input" not in name}
    content |= {"blocks.0.hook_attn_in": torch.tensor([[1.0], [2.0]]), "blocks.1.hook_attn_in": torch.ones(2, 4)}
    graph = tls.importers.auto_circuit(small, content)
    scores = dict(zip(graph.sizes.edges, graph.edge_scores.tolist(), strict=True))
    assert scores["input->a0.h1<q>"] == scores["input->a0.h1<v>"] == 2.0


def test_prune_scores_of_another_model(small: Any):
    with pytest.raises(ValueError, match=r"shape \(2, 5\), the model needs \(2, 4\)"):
        tls.importers.auto_circuit(small, {"blocks.1.hook_q_input": torch.ones(2, 5)})
    with pytest.raises(ValueError, match="reads no residual stream"):
        tls.importers.auto_circuit(small, {"blocks.1.hook_z": torch.ones(2, 5)})


EVERYWHERE, HEAD = (None,), (None, None, 1)
EDGES = {
    ("blocks.1.hook_resid_post", EVERYWHERE, "blocks.1.attn.hook_result", HEAD): True,
    ("blocks.1.hook_resid_post", EVERYWHERE, "blocks.1.hook_mlp_out", EVERYWHERE): False,
    ("blocks.1.hook_k_input", HEAD, "blocks.0.hook_mlp_out", EVERYWHERE): True,
    ("blocks.0.hook_mlp_in", EVERYWHERE, "hook_embed", EVERYWHERE): True,
    ("blocks.0.hook_mlp_in", EVERYWHERE, "hook_pos_embed", EVERYWHERE): False,
    ("blocks.1.attn.hook_result", HEAD, "blocks.1.attn.hook_k", HEAD): True,
}
KEPT = {"a1.h1->logits", "m0->a1.h1<k>", "input->m0"}


def test_edges_of_acdc(small: Any, tmp_path: Path):
    graph = tls.importers.acdc(small, EDGES)
    found = {name for name, kept in zip(graph.sizes.edges, graph.kept_edges.tolist(), strict=True) if kept}
    assert found == KEPT
    assert graph.circuit(small).names == ("L1H1", "L0MLP")
    torch.save(OrderedDict(EDGES), tmp_path / "subgraph.pth")
    assert tls.importers.acdc(small, tmp_path / "subgraph.pth") == graph
    there = [(edge, -0.5) for edge, kept in EDGES.items() if kept]
    listed = tls.importers.acdc(small, there)
    assert torch.equal(listed.kept_edges, graph.kept_edges)
    assert set(listed.edge_scores[listed.kept_edges].tolist()) == {-0.5}
    assert tls.importers.acdc(small, [edge for edge, kept in EDGES.items() if kept]) == graph
    wrong = {("blocks.0.hook_mlp_in", EVERYWHERE, "blocks.1.hook_mlp_out", EVERYWHERE): True}
    with pytest.raises(ValueError, match="has the edge m1->m0"):
        tls.importers.acdc(small, wrong)


@pytest.mark.parametrize("index", [(None, None, 7), (None, None, -1), (None,), (), None, (None, None, "1")])
def test_heads_of_acdc_that_the_model_does_not_have(small: Any, index: Any):
    into = ("blocks.1.hook_k_input", index, "blocks.0.hook_mlp_out", EVERYWHERE)
    out = ("blocks.1.hook_resid_post", EVERYWHERE, "blocks.1.attn.hook_result", index)
    for edge, hook in [(into, r"blocks\.1\.hook_k_input"), (out, r"blocks\.1\.attn\.hook_result")]:
        with pytest.raises(ValueError, match=rf"has the index .* at {hook}, and a model of .* has heads 0 to 1: name"):
            tls.importers.acdc(small, [edge])


@pytest.mark.parametrize("entry", [3, "edge", ("blocks.1.hook_k_input", HEAD), (3, 0.5)])
def test_what_is_no_edge_of_acdc(small: Any, entry: Any):
    with pytest.raises(ValueError, match=r"it must be \(reader, index, writer, index\)"):
        tls.importers.acdc(small, [entry])


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("this must never be printed",)


def test_what_could_run_code_is_not_read(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save([Harmful()], tmp_path / "intkey_x.bin")
    reads = (tls.importers.acdc, tls.importers.auto_circuit, tls.importers.pyvene)
    for read in reads:
        with pytest.raises(ValueError, match="not read because it could run code"):
            read(small, tmp_path / "intkey_x.bin")
        with pytest.raises(FileNotFoundError):
            read(small, tmp_path / "none.bin")
    assert "never be printed" not in capsys.readouterr().out


class Rotation(torch.nn.Module):
    """As pyvene keeps one."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.rotate_layer: Any = torch.nn.Module()
        weight = torch.randn(width, rank, generator=torch.Generator().manual_seed(width + rank))
        self.rotate_layer.weight = torch.nn.Parameter(weight)
        torch.nn.utils.parametrizations.orthogonal(self.rotate_layer)
        self.register_buffer("embed_dim", torch.tensor(width))
        self.register_buffer("interchange_dim", torch.tensor(rank if rank < width else 3))


@pytest.mark.parametrize("rank", [2, 8])
def test_rotations_of_pyvene(small: Any, tmp_path: Path, rank: int):
    made = Rotation(8, rank)
    with torch.no_grad():  # as after training
        made.rotate_layer.parametrizations.weight.original.add_(0.1 * torch.eye(8, rank))
    torch.save(made.state_dict(), tmp_path / "intkey_layer.1.comp.mlp_output.unit.pos.nunit.1#0.bin")
    units = tls.importers.pyvene(small, tmp_path)
    expected = made.rotate_layer.weight.detach()[:, : min(rank, 3)]
    [site] = units.sites
    assert site.hook == "blocks.1.hook_mlp_out" and site.basis is not None
    assert torch.allclose(site.basis, expected, atol=1e-6)
    assert tls.importers.pyvene(small, tmp_path, hook="blocks.0.hook_resid_post", rank=1).names == ("L0POST0",)


@pytest.mark.parametrize("rank", [-1, 0, 3, 5])
def test_a_rank_that_a_rotation_does_not_have(small: Any, tmp_path: Path, rank: int):
    torch.save({"rotate_layer.weight": torch.eye(8)[:, :2]}, tmp_path / "intkey_layer.1.comp.mlp_output.unit.bin")
    assert len(tls.importers.pyvene(small, tmp_path, rank=2)) == 2
    with pytest.raises(ValueError, match=rf"rank is {rank}; .* has 2 directions: give 1 to 2"):
        tls.importers.pyvene(small, tmp_path, rank=rank)


def test_a_rotation_without_a_part_of_it(small: Any, tmp_path: Path):
    file = tmp_path / "intkey_layer.1.comp.mlp_output.unit.bin"
    whole = Rotation(8, 8).state_dict()
    torch.save({name: value for name, value in whole.items() if not name.endswith("base")}, file)
    with pytest.raises(ValueError, match=r"intkey.* lacks parts of its parametrised rotation .*base.*: save the whole"):
        tls.importers.pyvene(small, file)
    torch.save(whole | {"rotate_layer.parametrizations.weight.0.base": torch.eye(3)}, file)
    with pytest.raises(ValueError, match="lacks parts of its parametrised rotation"):
        tls.importers.pyvene(small, file)


@pytest.mark.parametrize("weight", [torch.ones(8), torch.eye(8).long(), "eye"])
@pytest.mark.parametrize("name", ["rotate_layer.weight", "rotate_layer.parametrizations.weight.original"])
def test_a_rotation_that_is_no_matrix(small: Any, tmp_path: Path, weight: Any, name: str):
    torch.save({name: weight}, tmp_path / "intkey_a.bin")
    with pytest.raises(ValueError, match=rf"holds no rotation: {name} is .*; it must be a matrix of floating-point"):
        tls.importers.pyvene(small, tmp_path, rank=1)


def test_a_file_without_a_rotation_or_a_place(small: Any, tmp_path: Path):
    torch.save({"weight": torch.eye(8)}, tmp_path / "intkey_a.bin")
    with pytest.raises(ValueError, match="holds no rotation"):
        tls.importers.pyvene(small, tmp_path)
    torch.save({"rotate_layer.weight": torch.eye(8)}, tmp_path / "intkey_a.bin")
    with pytest.raises(ValueError, match="rotates all 8 directions: say how many"):
        tls.importers.pyvene(small, tmp_path)
    with pytest.raises(ValueError, match="name the hook point by hook="):
        tls.importers.pyvene(small, tmp_path, rank=2)
    torch.save({}, tmp_path / "intkey_b.bin")
    with pytest.raises(FileNotFoundError, match="has 2 files"):
        tls.importers.pyvene(small, tmp_path)


@pytest.mark.parametrize("gone", [0, 0.0, False, np.False_])
def test_edges_of_acdc_that_a_mapping_says_are_gone(small: Any, gone: Any):
    edges = {edge: np.bool_(kept) if isinstance(gone, np.bool_) else kept or gone for edge, kept in EDGES.items()}
    graph = tls.importers.acdc(small, edges)
    assert {name for name, kept in zip(graph.sizes.edges, graph.kept_edges.tolist(), strict=True) if kept} == KEPT


@pytest.mark.parametrize(
    ("reader", "writer"),
    [
        ("blocks.1.hook_resid_posst", "blocks.0.attn.hook_result"),
        ("blocks.1.hook_resid_post", "blocks.0.hook_mlp_outt"),
        ("blocks.1.attn.hook_result", "blocks.0.nothing"),
    ],
)
def test_hook_points_that_acdc_does_not_have(small: Any, reader: str, writer: str):
    with pytest.raises(ValueError, match=re.escape(f"the edge from {writer} to {reader}, which ACDC does not have")):
        tls.importers.acdc(small, [(reader, EVERYWHERE, writer, HEAD)])


@pytest.mark.parametrize("content", [3, "text", [1, 2], torch.tensor(1.0)])
def test_files_of_another_kind(small: Any, content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"source (holds a|has the edge)"):
        tls.importers.acdc(small, tmp_path / "other.pt")
    for key in ((), ("ioi",)):
        with pytest.raises(ValueError, match=r"source holds a \w+; it must be a mapping"):
            tls.importers.auto_circuit(small, tmp_path / "other.pt", key=key)
