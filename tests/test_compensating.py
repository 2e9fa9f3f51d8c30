"""Compensating search, against a slow computation of what each removal costs."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.models import TwoLayers, bridge, examples, fresh, inputs, seeded, unchanged, units_of
from torch import Tensor

from tl_sparsify import constants
from tl_sparsify.comparison.cost import counted
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.distributions import NONE, InterventionDistribution
from tl_sparsify.core.edges import edges
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import output
from tl_sparsify.core.measure import risk
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.units import heads, neurons
from tl_sparsify.search import score
from tl_sparsify.search.compensating import sparsify_affine


def network(units: int = 7, seed: int = 0) -> TwoLayers:
    generator = seeded(seed)
    w_in = torch.randn(4, units, generator=generator, dtype=torch.float64)
    return TwoLayers(w_in, torch.randn(units, 3, generator=generator, dtype=torch.float64), relu=True)


def first_logit(logits: Tensor, batch: Examples) -> Tensor:
    return logits[:, 0]


def unexplained(model: TwoLayers, batch: Examples, removed: list[int]) -> float:
    """Half the mean square of what least squares on the kept units leaves of the removed ones' part in a logit."""
    hidden = (batch.tokens @ model.w_in).relu().detach()
    kept = [unit for unit in range(hidden.shape[1]) if unit not in removed]
    design = torch.cat([hidden[:, kept], torch.ones(len(hidden), 1)], 1)
    target = hidden[:, removed] @ model.w_out[removed, 0].detach()
    solution = torch.linalg.lstsq(design, target).solution
    return float((target - design @ solution).square().mean() / 2)


METRIC: Metric = first_logit


def test_the_order_is_that_of_removing_what_costs_least_at_the_best_compensation():
    model, batch = network(), inputs(n=60)
    sizes = [i / 7 for i in range(6, 0, -1)]
    path = sparsify_affine(model, batch, model.units, sizes=sizes, metric=METRIC, ridge=1e-9, progress=False)
    removed: list[int] = []
    for _ in range(6):
        left = [unit for unit in range(7) if unit not in removed]
        removed.append(min(left, key=lambda unit: unexplained(model, batch, [*removed, unit])))
    assert path.order[:6].tolist() == removed


def test_many_at_once_cost_what_they_are_predicted_to():
    model, batch = network(), inputs(n=60)
    path = sparsify_affine(model, batch, model.units, sizes=[3 / 7], metric=METRIC, ridge=1e-9, progress=False)
    [only] = path.rounds
    assert only.predicted.mean == pytest.approx(unexplained(model, batch, path.order[:4].tolist()), rel=1e-5)
    assert only.measured.mean == pytest.approx(only.predicted.mean, rel=1e-5)


def test_of_two_copies_one_is_kept():
    model, batch = network(), inputs(n=60)
    with torch.no_grad():
        model.w_in[:, 5] = 2 * model.w_in[:, 2]
    path = sparsify_affine(model, batch, model.units, sizes=[6 / 7], ridge=1e-9, probes=2, progress=False)
    assert path.order[0] in (2, 5)
    assert path.rounds[0].measured.mean < 1e-9


def test_take_overs_of_earlier_rounds_are_counted_with():
    """Unit 0 copies unit 1, and leaves in the first of two rounds: unit 1 is then read with the weights of both."""
    w_in = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    one, other = torch.tensor([1.0, -1, 0]) / 2**0.5, torch.tensor([1.0, 1, -2]) / 6**0.5
    model = TwoLayers(w_in, 0.05 * torch.stack([one, 1.1 * one, 1.6 * other, 1.8 * other]).double())
    x = torch.randn(400, 3, generator=seeded(1), dtype=torch.float64)
    x = 20 * torch.linalg.qr(x - x.mean(0))[0]  # unit variances, and nothing of a unit in another one but its copy
    batch = Examples(x, torch.zeros(400, 1, dtype=torch.long))
    units = model.units
    means = constants.reduced(model, Circuit.full(units), constants.mean(model, batch, units))

    def with_maps(kept: tuple[str, ...]) -> float:
        reduction = means.with_circuit(Circuit.of(units, kept))
        return risk(model, constants.neighbours(model, reduction, batch, nearest=None), batch).mean

    lowest = min(map(with_maps, combinations(units.names, 2)))
    for sizes in ([0.75, 0.5], [0.5]):
        last = sparsify_affine(model, batch, units, sizes=sizes, temperature=1.0, progress=False).rounds[-1]
        assert last.reduction.circuit.names[1] == "L0N3" and last.measured.mean == pytest.approx(lowest, rel=1e-3)
        assert last.predicted.mean == pytest.approx(last.measured.mean, rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_many_rounds_choose_and_foretell_what_one_does_within_a_hook_point(seed: int):
    model, batch = network(seed=seed), inputs(n=60, seed=seed)
    shared = {"metric": METRIC, "ridge": 1e-9, "progress": False}
    one, many = (
        sparsify_affine(model, batch, model.units, sizes=sizes, **shared)
        for sizes in ([2 / 7], [i / 7 for i in (6, 5, 4, 3, 2)])
    )
    assert one.order[:5].tolist() == many.order[:5].tolist()
    assert many.rounds[-1].predicted.mean == pytest.approx(one.rounds[-1].predicted.mean, rel=1e-5)


@pytest.mark.parametrize("interchanged", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_each_pass_is_counted(separate: bool, interchanged: bool):
    """Two rounds; three of each on the training examples and two where risk is measured, as the docstring says."""
    model, train, probes = bridge(), examples(n=12), 2
    held_out = examples(n=7, seed=1) if separate else None
    n, v = len(train), len(train if held_out is None else held_out)
    interventions = InterventionDistribution.interchange(0.3) if interchanged else NONE
    given = {"held_out": held_out, "interventions": interventions, "sizes": [0.8, 0.5], "probes": probes}
    with counted(model) as passes:
        sparsify_affine(model, train, units_of(model), progress=False, **given)
    forward = n * (1 + 2 * 3 + 1) + v * (2 * 2 + 1)
    if interchanged:  # the source runs, and the original's answers once more
        forward += n * (2 * 2 + 1) + v * (2 * 3 + 1)
    assert passes == {"forward": forward, "backward": probes * (n * (2 * 2 + 1) + v * 2)}


def test_on_a_transformer_it_beats_constants_and_leaves_nothing_behind():
    model, batch = bridge(), examples(n=60)
    units = units_of(model)
    with unchanged(model):
        path = sparsify_affine(model, batch, units, sizes=[0.8, 0.6], probes=12, temperature=1.0, progress=False)
    again = sparsify_affine(
        model, batch, units, sizes=[0.8, 0.6], probes=12, temperature=1.0, batch_size=7, progress=False
    )
    assert torch.equal(path.order, again.order)
    for step in path.rounds:
        mean = constants.reduced(model, step.reduction.circuit, constants.mean(model, batch, units))
        assert step.measured.mean == pytest.approx(risk(model, step.reduction, batch).mean, rel=1e-9)
        assert step.measured.mean < risk(model, mean, batch).mean
    assert path.at(0.7).mixing is None
    assert sorted(path.order.tolist()) == list(range(len(units)))


def test_units_always_kept_stay_and_bad_sizes_are_refused():
    model, batch = bridge(), examples(n=10)
    units = units_of(model)
    always_keep = Circuit.of(units, ["L1N4", "L0H0"])
    path = sparsify_affine(model, batch, units, sizes=[0.3], always_keep=always_keep, progress=False)
    assert always_keep <= path.rounds[0].reduction.circuit
    many = Circuit(units, torch.arange(14) < 10)
    with pytest.raises(ValueError, match="always_keep comes to 10, the smallest size leaves 7: keep fewer"):
        sparsify_affine(model, batch, units, sizes=[0.8, 0.5], always_keep=many, progress=False)
    with pytest.raises(ValueError, match=r"always_keep is a circuit over Units\(4: 4 heads\), not over"):
        sparsify_affine(model, batch, units, sizes=[0.5], always_keep=Circuit.full(heads(model)), progress=False)
    with pytest.raises(ValueError, match=r"sizes is \[0\.1, 0\.5\]"):
        sparsify_affine(model, batch, units, sizes=[0.1, 0.5], progress=False)
    assert bool(torch.isfinite(output(model, batch)).all())


def test_edges_leave_by_their_own_risk_and_neurons_are_mapped_beside_them():
    model, batch = bridge(), examples(12, answers=2)
    found = edges(model)
    path = sparsify_affine(model, batch, found, sizes=(0.5,), progress=False)
    risks = score.risk(model, batch, found, probes=4, temperature=3.0, seed=0).scores
    gone = len(found) - len(path.at(0.5).circuit)
    assert path.order[:gone].tolist() == risks.argsort(stable=True)[:gone].tolist()
    assert path.rounds[0].reduction.mixing is None
    both = found + neurons(model)
    last = sparsify_affine(model, batch, both, sizes=(0.5,), progress=False).rounds[0]
    assert [part is None for part in last.reduction.mixing or ()] == [site.kind == "edge" for site in both.sites]
    means = constants.mean(model, batch, both)
    fitted = constants.neighbours(model, constants.reduced(model, last.reduction.circuit, means), batch, nearest=None)
    assert risk(model, fitted, batch).mean == pytest.approx(last.measured.mean, rel=1e-9)


def test_predictions_are_in_nats_and_on_the_examples_that_risk_is_measured_on():
    """The order is found at temperature 3; what stands beside the measured risk is at 1, on the same examples."""
    model, batch, other = network(), inputs(n=60), inputs(n=300, seed=1)
    with torch.no_grad():
        model.w_out *= 0.02  # so that the second order is all that there is
    shared = {"sizes": [3 / 7], "ridge": 1e-9, "probes": 3, "progress": False}
    for held_out in (None, other):
        [only] = sparsify_affine(model, batch, model.units, held_out=held_out, **shared).rounds
        assert only.predicted.n == only.measured.n == (60 if held_out is None else 300)
        assert only.predicted.unit == only.measured.unit == "nats"
        # the maps are fitted on the other examples, where those that are predicted would be fitted anew
        assert only.measured.mean == pytest.approx(only.predicted.mean, rel=0.05 if held_out is None else 0.3)


def test_covariances_that_would_not_fit_are_refused_before_a_pass():
    wide = fresh(d_mlp=20_000, n_layers=1, dtype=torch.float32)
    batch = Examples(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[-100, -100, 1]] * 2))
    units = heads(wide) + neurons(wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * 10**9))
        message = r"units has up to 20,000 .* take about 22\.4 GB, and this machine has 24\.0 GB: give fewer of them"
        with pytest.raises(ValueError, match=message), counted(wide) as passes:
            sparsify_affine(wide, batch, units, progress=False)
    assert passes["forward"] == 0
