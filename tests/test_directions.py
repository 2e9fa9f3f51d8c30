"""Directions as units: of one activation, of every write to the residual stream, orthonormal or overlapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import (
    TwoLayers,
    bridge,
    examples,
    fisher,
    inputs,
    linear,
    reduction_of,
    seeded,
    softened,
    unchanged,
)
from torch import Tensor

from tl_sparsify import basis, constants, score
from tl_sparsify.core.basis import directions, stream_directions
from tl_sparsify.core.circuit import Circuit, Values
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import ablate, intervened, recorded
from tl_sparsify.core.measure import risk
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units, heads
from tl_sparsify.search.joint import sparsify

HOOK = "blocks.0.hook_resid_post"


def random_basis(r: int, seed: int = 0, *, orthonormal: bool = True, width: int = 8) -> Tensor:
    columns = torch.randn(width, r, generator=seeded(seed), dtype=torch.float64)
    return torch.linalg.qr(columns)[0] if orthonormal else columns


def random_constants(units: Units, writes: int = 1, seed: int = 0) -> Values:
    sizes = [(site.size, writes) for site in units.sites]
    return Values(units, tuple(torch.randn(size, generator=seeded(seed), dtype=torch.float64) for size in sizes))


def families(model: Any) -> list[tuple[Units, Values]]:
    """Orthonormal, overlapping, too many for their space, and in every write (five of them in two layers)."""
    found = [directions(model, HOOK, random_basis(3))]
    found.append(directions(model, HOOK, random_basis(4, orthonormal=False)))
    found.append(directions(model, HOOK, random_basis(11, orthonormal=False)))
    constant = [(units, random_constants(units)) for units in found]
    stream = stream_directions(model, random_basis(3))
    return [*constant, (stream, random_constants(stream, 5))]


FAMILIES = range(4)


def test_names_say_where_a_direction_lies_and_parse():
    model = bridge()
    units = directions(model, HOOK, random_basis(2)) + directions(model, "blocks.1.hook_resid_pre", random_basis(1))
    assert units.names == ("L0POST0", "L0POST1", "L1PRE0")
    assert units["L0POST1"].at(3).name == "L0POST1@3"
    assert stream_directions(model, random_basis(2)).names == ("S0", "S1")
    with pytest.raises(KeyError, match="L0POST7"):
        units["L0POST7"]


def test_removing_every_direction_of_a_full_basis_sets_the_activation():
    model, batch = bridge(), examples()
    units = directions(model, HOOK, random_basis(8))
    values = random_constants(units)
    with intervened(model, ablate(Reduction(Circuit.empty(units), values))):
        with recorded(model, Units((Site("residual", 0, HOOK, 1),))) as recording:
            answer_logits(model, batch)
    expected = random_basis(8) @ values.tensors[0][:, 0]
    assert torch.allclose(recording.activations[HOOK], expected.expand(12, 5, 8), atol=1e-12)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_a_removed_direction_has_its_constant_and_the_others_keep_their_coordinates(orthonormal: bool):
    model, batch = bridge(), examples()
    units = directions(model, HOOK, random_basis(4, orthonormal=orthonormal))
    values = random_constants(units)
    circuit = Circuit.of(units, ["L0POST0", "L0POST2"])
    with recorded(model, units) as before:
        answer_logits(model, batch)
    with intervened(model, ablate(Reduction(circuit, values))), recorded(model, units) as after:
        answer_logits(model, batch)
    [old], [new] = before.read(), after.read()
    kept = circuit.mask
    assert torch.allclose(new[:, :, kept], old[:, :, kept], atol=1e-10)
    assert torch.allclose(new[:, :, ~kept], values.tensors[0][~kept].expand(12, 5, 2, 1), atol=1e-10)


def test_a_removed_stream_direction_is_constant_wherever_the_stream_is_read():
    model, batch = bridge(), examples()
    columns = random_basis(2)
    units = stream_directions(model, columns)
    values = random_constants(units, 5)
    places = [f"blocks.{layer}.hook_resid_{place}" for layer in range(2) for place in ("pre", "mid", "post")]
    watched = Units(tuple(Site("residual", i, name, 1) for i, name in enumerate(places)))
    with intervened(model, ablate(Reduction(Circuit.of(units, ["S1"]), values))), recorded(model, watched) as seen:
        answer_logits(model, batch)
    for number, name in enumerate(places):
        writes = 1 + number - (number >= 3)  # the second layer's input is the first one's output
        expected = values.tensors[0][0, :writes].sum()
        found = seen.activations[name] @ columns[:, 0]
        assert torch.allclose(found, expected.expand_as(found), atol=1e-10)
        assert (seen.activations[name] @ columns[:, 1]).std() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablated", [False, True])
def test_effects_are_the_derivatives_of_the_logits(family: int, ablated: bool):
    model, batch = bridge(), examples(n=3, choices=(1, 4, 6))
    units, values = families(model)[family]
    mask = torch.ones(len(units), dtype=torch.bool)
    mask[1] = not ablated
    removal = Reduction(Circuit(units, mask), values)
    current = removal if ablated else None
    [found] = samples(model, batch, removal, current=current, probes=2, batch_size=3)
    for i in range(3):
        one = batch[i : i + 1]
        keep = mask.double()
        change = -torch.autograd.functional.jacobian(lambda k, one=one: softened(model, one, removal, k, None)[0], keep)
        change = change * mask
        logits = softened(model, one, removal, keep, None)[0]
        expected = torch.einsum("cu,cd,dw->uw", change, fisher(logits), change)
        effects = found.effects[:, i]
        assert torch.allclose(effects.T @ effects, expected, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_risk_of_a_direction_is_that_of_a_model_with_a_hook(family: int):
    model, batch = bridge(), examples()
    units, values = families(model)[family]
    reduction = Reduction(Circuit(units, torch.arange(len(units)) % 2 == 0), values)
    site = units.sites[0]
    columns = site.basis
    assert columns is not None
    reader = torch.linalg.pinv(columns)
    gone = ~reduction.circuit.mask
    original = answer_logits(model, batch)

    def hook(x: Tensor, hook: Any, column: int) -> Tensor:
        return x + (values.tensors[0][gone, column] - x @ reader[gone].T) @ columns[:, gone].T

    added = [(name, lambda x, hook, c=c, f=hook: f(x, hook, c)) for c, name in enumerate(site.hook_names)]
    with model.hooks(fwd_hooks=added):
        changed = answer_logits(model, batch)
    p, q = original.log_softmax(1), changed.log_softmax(1)
    expected = (p.exp() * (p - q)).sum(1).mean().item()
    assert risk(model, reduction, batch).mean == pytest.approx(expected, rel=1e-9)


def test_the_model_leaves_as_it_came_in():
    model, batch = bridge(), examples()
    units = stream_directions(model, random_basis(2)) + directions(model, HOOK, random_basis(2, seed=3))
    with unchanged(model):
        path = sparsify(model, batch, units, rounds=2, smallest=0.25, progress=False)
    assert len(path.at(0.25).circuit) == 1


def test_directions_in_a_network_without_positions():
    model, batch = linear(), inputs()
    units = directions(model, "hook_hidden", random_basis(3, width=6))
    scores = score.risk(model, batch, units, probes=2)
    values = constants.mean(model, batch, units)
    alone = [
        risk(
            model, Reduction(~Circuit.of(units, [name]), values), batch, metric=lambda logits, batch: logits[:, 0]
        ).mean
        for name in units.names
    ]
    metric = score.risk(model, batch, units, metric=lambda logits, batch: logits[:, 0])
    assert bool((scores.scores > 0).all())
    assert metric.scores.tolist() == pytest.approx(alone, rel=1e-9)


def test_directions_are_saved_with_their_reduction(tmp_path: Path):
    model = bridge()
    units = heads(model) + directions(model, HOOK, random_basis(4, orthonormal=False))
    values = Values(units, (*reduction_of(model).values.tensors[:2], random_constants(units).tensors[-1][:4]))
    reduction = Reduction(Circuit(units, torch.arange(len(units)) % 3 == 0), values)
    reduction.save(tmp_path / "directions.reduction")
    assert Reduction.load(tmp_path / "directions.reduction") == reduction
    moved = directions(model, HOOK, random_basis(4, seed=5, orthonormal=False))
    assert moved != directions(model, HOOK, random_basis(4, orthonormal=False))


def test_what_transformer_lens_returns_is_a_basis():
    from transformer_lens.tools.analysis.interchange import DASResult, LearnedSubspace, mean_difference_basis

    model = bridge()
    means = mean_difference_basis(torch.randn(6, 8, generator=seeded(0)), [0, 1, 2, 0, 1, 2])
    assert len(directions(model, HOOK, means)) == 2
    with torch.random.fork_rng():
        learnt = LearnedSubspace(8, 3)
    found = DASResult(subspace=learnt, losses=(0.0,), hook_name=HOOK, rank=3)
    units = directions(model, HOOK, found)
    assert units == directions(model, HOOK, learnt)
    assert torch.equal(units.sites[0].basis, learnt.basis.detach())  # type: ignore[arg-type]


def test_bad_bases_and_hook_points_are_refused():
    model = bridge()
    with pytest.raises(ValueError, match=r"blocks\.7\.hook_resid_mid"):
        directions(model, "blocks.7.hook_resid_mid", random_basis(2))
    with pytest.raises(ValueError, match="basis holds NaN"):
        directions(model, HOOK, torch.full((8, 2), float("nan")))
    with pytest.raises(ValueError, match="matrix"):
        directions(model, HOOK, torch.ones(8))
    with pytest.raises(ValueError, match="no blocks"):
        stream_directions(TwoLayers(torch.eye(2), torch.eye(2)), torch.eye(2))
    with pytest.raises(ValueError, match="basis has 5 rows, and the model's residual stream 8"):
        directions(model, HOOK, torch.ones(5, 1))
    wrong = Units((Site("direction", 1, HOOK, 1, basis=torch.ones(5, 1)),))
    with pytest.raises(ValueError, match=r"hook_resid_post yields .*\[batch, pos, 5\]"):
        score.risk(model, examples(), wrong)


def test_pca_finds_the_directions_of_largest_variance():
    model, batch = bridge(), examples()
    with recorded(model, Units((Site("residual", 0, HOOK, 1),))) as seen:
        answer_logits(model, batch)
    rows = seen.activations[HOOK].reshape(-1, 8)
    _, _, right = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = basis.pca(model, batch, HOOK, 3, batch_size=5)
    assert torch.allclose((found.T @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-8)
    with pytest.raises(ValueError, match="rank is 9"):
        basis.pca(model, batch, HOOK, 9)
