"""The curvature diagnostic, where curvature is known: a linear network with one number as metric has the square of a
unit's reading weight as its curvature."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from helpers.kinds import data
from helpers.models import TwoLayers, bridge, fresh, inputs, seeded, unchanged, units_of
from torch import Tensor

from tl_sparsify import score
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.units import neurons
from tl_sparsify.search.curvature import QUANTILES, Uniformity, uniformity
from tl_sparsify.search.scores import Scores

N = 40


def first(logits: Tensor, batch: Examples) -> Tensor:
    return logits[:, 0]


def network(readers: list[float], scales: list[float] | None = None) -> TwoLayers:
    """Linear; its output's first number reads the units with these weights, the second one reads nothing."""
    w_in = torch.randn(4, len(readers), generator=seeded(0), dtype=torch.float64)
    w_in = w_in * torch.tensor(scales or [1.0] * len(readers), dtype=torch.float64)
    weights = torch.tensor(readers, dtype=torch.float64)
    return TwoLayers(w_in, torch.stack([weights, torch.zeros_like(weights)], 1))


def diagnosed(model: TwoLayers) -> Uniformity:
    return uniformity(model, inputs(N, choices=2), model.units, metric=first)


def test_uniform_curvature_is_found_uniform():
    found = diagnosed(network([2.0, -2.0, 2.0, 2.0, -2.0], [1.0, 3.0, 0.1, 10.0, 0.5]))
    assert torch.allclose(found.curvature, torch.full((5,), 4.0, dtype=torch.float64), rtol=1e-12)
    assert found.spread == pytest.approx(1, rel=1e-12) and found.variation == pytest.approx(0, abs=1e-12)
    assert found.rank_correlation == pytest.approx(1) and found.unread == 0
    assert found.overrated() == () and found.underrated() == ()
    assert "overrates" not in repr(found) and "factor 1 from" in repr(found)


def test_curvature_is_the_square_of_what_reads_a_unit():
    readers = [0.01, -3.0, 1.0, 0.5, 20.0, 7.0]
    found = diagnosed(network(readers))
    expected = torch.tensor(readers, dtype=torch.float64).square()
    assert torch.allclose(found.curvature, expected, rtol=1e-12)
    assert found.variation == pytest.approx(float(expected.std(correction=0) / expected.mean()))
    assert tuple(found.quantiles) == QUANTILES
    log = expected.log()
    assert found.quantiles[0.5] == pytest.approx(float((log.sort().values[2:4].mean()).exp()))
    assert found.spread == pytest.approx(float((log.quantile(0.95) - log.quantile(0.05)).exp()))


def test_units_that_variance_ranks_wrongly_are_named():
    """Unit 0 is loud and hardly read, unit 3 quiet and read with a large weight; the others are in order."""
    found = diagnosed(network([1e-4, 1.0, 1.0, 1e4, 1.0], [100.0, 30.0, 10.0, 0.01, 3.0]))
    assert found.overrated() == ("L0N0",) and found.underrated() == ("L0N3",)
    assert found.to_frame().overrated.tolist() == [4, 0, 0, -4, 0]
    assert "overrates L0N0" in repr(found) and "underrates L0N3" in repr(found)
    assert found.rank_correlation < 0.5


def test_the_worst_come_first_and_no_more_than_asked_for():
    found = diagnosed(network([1e-6, 1e-3, 1.0, 1e3, 1e6], [16.0, 8.0, 4.0, 2.0, 1.0]))  # risk has the reverse order
    assert found.overrated(1) == ("L0N0",) and found.overrated() == ("L0N0", "L0N1")
    assert found.underrated(1) == ("L0N4",) and found.underrated() == ("L0N4", "L0N3")
    assert found.rank_correlation == pytest.approx(-1)


def test_the_table_holds_ranks_from_the_most_needed():
    found = diagnosed(network([3.0, 1.0, 2.0], [1.0, 10.0, 0.1]))
    frame = found.to_frame()
    assert list(frame.columns) == [
        *("unit", "kind", "layer", "index", "variance", "risk", "curvature"),
        *("variance_rank", "risk_rank", "overrated"),
    ]
    assert frame.unit.tolist() == ["L0N0", "L0N1", "L0N2"]
    assert frame.curvature.tolist() == pytest.approx([9, 1, 4])
    assert frame.variance.tolist() == found.variance.scores.tolist()
    assert (frame.risk * 2).tolist() == pytest.approx((frame.curvature * frame.variance).tolist())
    assert frame.variance_rank.tolist() == [2, 1, 3]
    assert frame.overrated.tolist() == (frame.risk_rank - frame.variance_rank).tolist()


def test_units_without_effect_and_units_that_never_vary_are_counted_apart():
    found = diagnosed(network([2.0, 0.0, 2.0, 5.0], [1.0, 1.0, 2.0, 0.0]))
    assert found.unread == 1 and found.curvature[1] == 0
    assert bool(found.curvature[3].isnan()) and found.to_frame().curvature.isna().tolist() == [False] * 3 + [True]
    assert found.spread == pytest.approx(1) and found.variation == pytest.approx(0, abs=1e-12)


def test_a_network_that_nothing_reads_has_no_curvature():
    found = diagnosed(network([0.0, 0.0]))
    assert found.unread == 2 and all(q != q for q in found.quantiles.values()) and found.spread != found.spread
    assert repr(found).startswith("Uniformity(") and "\n" not in repr(found)


def test_the_scaled_variance_of_such_a_network_is_fair():
    model, batch = network([0.01, -3.0, 1.0, 0.5, 20.0, 7.0]), inputs(N, choices=2)

    def scaled(model: TwoLayers, *args: object, **settings: object) -> Scores:
        return score.scaled_variance(model, *args, readers={"hook_hidden": model.w_out.detach()}, **settings)  # type: ignore[arg-type]

    found = uniformity(model, batch, model.units, metric=first, against=scaled)
    assert found.spread == pytest.approx(1) and found.rank_correlation == pytest.approx(1)
    assert "scaled variance and risk" in repr(found)


def test_rescaling_a_neuron_rescales_its_curvature():
    model, batch = fresh(), data(24)
    units = neurons(model)
    factors = torch.exp(torch.randn(2, 5, generator=seeded(0), dtype=torch.float64))
    before = uniformity(model, batch, units)
    with torch.no_grad():
        for block, factor in zip(model.blocks, factors, strict=True):
            getattr(block.mlp, "in").original_component.weight.mul_(factor[:, None])
            getattr(block.mlp, "in").original_component.bias.mul_(factor)
            block.mlp.out.original_component.weight.div_(factor)
    after = uniformity(model, batch, units)
    assert torch.allclose(after.curvature * factors.flatten().square(), before.curvature, rtol=1e-9, equal_nan=True)


def test_it_is_made_of_the_scores_it_holds():
    model, batch = bridge(), data(12)
    units = units_of(model)
    with unchanged(model):
        found = uniformity(model, batch, units, probes=3, temperature=2.0, seed=4, batch_size=5)
    risk = score.risk(model, batch, units, probes=3, temperature=2.0, seed=4, batch_size=5)
    assert torch.equal(found.risk.scores, risk.scores) and found.risk.measured_in == "2^2 nats"
    assert torch.equal(found.variance.scores, score.variance(model, batch, units, batch_size=5).scores)
    assert found.units is units and found.rank_correlation == found.variance.rank_correlation(risk)
    with pytest.raises(FrozenInstanceError):
        found.risk = risk  # type: ignore[misc]


def test_a_model_in_training_mode_is_refused():
    model = fresh().train()
    with pytest.raises(ValueError, match="training mode"):
        uniformity(model, data(), units_of(model))
