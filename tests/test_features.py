"""Features of a dictionary as units: interventions, scores and searches against slow references in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dictionaries import FEATURES, NAMES, OUT, STREAM, by_hand, dictionary, encoded
from helpers.kinds import close
from helpers.models import LENGTH, bridge, examples, fisher, fresh, seeded, unchanged
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import kl, log_odds

ALL = pytest.mark.parametrize("name", NAMES)
WHOLE = torch.ones(FEATURES, dtype=torch.bool)


def units_of(name: str = "relu", model: Any = None, *, error: bool = True, **others: Any) -> tls.Units:
    return tls.features(model or bridge(), dictionary(name), error=error, **others)


def random_values(units: tls.Units, seed: int = 7) -> tls.Values:
    sizes = [(site.size, 1 if site.kind == "feature" else 8) for site in units.sites]
    return tls.Values(units, tuple(torch.randn(s, generator=seeded(seed), dtype=torch.float64) for s in sizes))


def reference(model: Any, batch: Examples, name: str, values: tls.Values, keep: Tensor) -> Tensor:
    features, error = (part for part in values.tensors)
    return by_hand(model, batch, dictionary(name), features[:, 0], keep[..., :-1], (error[0], keep[..., -1:]))


# Interventions


@ALL
def test_keeping_everything_changes_nothing_bit_for_bit(name: str):
    model, batch = bridge(), examples()
    units = units_of(name)
    assert (len(units), units.names[-1], units[3].name) == (
        FEATURES + 1,
        *{"transcoder": ("L1ERR", "L1F3")}.get(name, ("L0ERR", "L0F3")),
    )
    with torch.no_grad():
        plain = model(batch.tokens)
        with (
            unchanged(model),
            tls.intervened(model, tls.Intervention(units, torch.ones(len(units)), random_values(units))),
        ):
            assert torch.equal(model(batch.tokens), plain)
        # also where each value is written back: the gradient of keep needs the hook
        kept = torch.ones(len(units), dtype=torch.float64, requires_grad=True)
        with tls.intervened(model, tls.Intervention(units, kept, random_values(units))):
            torch.testing.assert_close(model(batch.tokens), plain, rtol=1e-12, atol=1e-12)


@ALL
@given(seed=st.integers(0, 10**6), hard=st.booleans())
def test_features_and_error_go_to_their_constants_by_the_formula(name: str, seed: int, hard: bool):
    model, batch = bridge(), examples(3, seed)
    units = units_of(name)
    values, keep = random_values(units, seed), torch.rand(len(units), generator=seeded(seed), dtype=torch.float64)
    keep = keep.round() if hard else keep
    with torch.no_grad(), tls.intervened(model, tls.Intervention(units, keep, values)):
        found = answer_logits(model, batch)
    torch.testing.assert_close(found, reference(model, batch, name, values, keep), rtol=1e-10, atol=1e-10)


@ALL
def test_values_are_what_the_encoder_makes_and_what_it_leaves_over(name: str):
    model, batch, d = bridge(), examples(4), dictionary(name)
    features, error = tls.run_values(model, batch, units_of(name)).tensors
    places = tls.Units(
        tuple(tls.Site("residual", layer, str(hook), 1) for layer, hook in enumerate((d.source or d.hook, d.hook)))[
            : 2 if d.source else 1
        ]
    )
    with torch.no_grad(), tls.recorded(model, places) as recording:
        model(batch.tokens)
    x, y = recording.activations[d.source or str(d.hook)], recording.activations[str(d.hook)]
    a = encoded(d, x)
    torch.testing.assert_close(features[..., 0], a)
    torch.testing.assert_close(error[:, :, 0], y - d.b_dec - torch.einsum("bpf,fd->bpd", a, d.W_dec))
    assert 0.2 < float((a > 0).double().mean()) < 0.8


def test_removing_all_features_and_the_error_leaves_a_constant():
    model, batch = bridge(), examples(4)
    units = units_of()
    values, none = random_values(units), torch.zeros(FEATURES + 1)
    whole = tls.Units((tls.Site("residual", 0, STREAM, 1),))
    with (
        torch.no_grad(),
        tls.intervened(model, tls.Intervention(units, none, values)),
        tls.recorded(model, whole) as found,
    ):
        model(batch.tokens)
    d = dictionary()
    expected = d.decode(values.tensors[0][:, 0]) + values.tensors[1][0]
    torch.testing.assert_close(found.activations[STREAM], expected.expand(4, LENGTH, 8))


@ALL
def test_features_at_a_position_are_changed_there_only(name: str):
    model, batch = bridge(), examples(4)
    units = units_of(name).at(2)
    values = random_values(units)
    hook = str(dictionary(name).hook)
    whole = tls.Units((tls.Site("residual", 0, hook, 1),))

    def run(*interventions: tls.Intervention) -> Tensor:
        with torch.no_grad(), tls.intervened(model, *interventions), tls.recorded(model, whole) as found:
            model(batch.tokens)
        return found.activations[hook]

    changed = (run(tls.Intervention(units, torch.zeros(len(units)), values)) != run()).any(2)
    assert changed.tolist() == [[False, False, True, False, False]] * 4
    assert units.names[0].endswith("F0@2") and units.names[-1].endswith("ERR@2")


@ALL
def test_interchanging_with_oneself_changes_nothing_and_with_another_run_takes_its_features(name: str):
    model, batch = bridge(), examples(6)
    units = units_of(name)
    some = tls.Circuit(units, torch.rand(len(units), generator=seeded(2)) < 0.5)
    source, own = tls.run_values(model, batch.counterfactuals, units), tls.run_values(model, batch, units)
    with torch.no_grad():
        plain = answer_logits(model, batch)
        with tls.intervened(model, tls.interchange(some, own)):
            torch.testing.assert_close(answer_logits(model, batch), plain, rtol=1e-12, atol=1e-12)
        with tls.intervened(model, tls.interchange(tls.Circuit.full(units), source)):
            taken = answer_logits(model, batch)
    expected = answer_logits(model, batch.counterfactuals)
    if name != "transcoder":  # the whole stream is the other run's
        torch.testing.assert_close(taken[:, :], expected, rtol=1e-10, atol=1e-10)


def test_the_model_comes_back_after_an_exception():
    model, units = bridge(), units_of("transcoder")
    with unchanged(model), pytest.raises(RuntimeError, match="stop"):
        with tls.intervened(model, tls.Intervention(units, torch.zeros(len(units)), random_values(units))):
            raise RuntimeError("stop")


def test_a_source_that_comes_later_is_refused():
    model = bridge()
    late = dictionary("transcoder", hook=STREAM, source="blocks.1.hook_resid_mid")
    units = tls.features(model, late)
    with pytest.raises(ValueError, match=r"came before blocks\.1\.hook_resid_mid"):
        with tls.intervened(model, tls.Intervention(units, torch.zeros(len(units)), random_values(units))):
            model(examples().tokens)


# Scores


def effects_of(model: Any, batch: Examples, name: str, values: tls.Values) -> Tensor:
    """The Jacobian of each example's logits with respect to ``keep`` at 1: ``[example, choice, unit]``."""
    parts = []
    for i in range(len(batch)):

        def logits(keep: Tensor, one: Examples = batch[i : i + 1]) -> Tensor:
            return reference(model, one, name, values, keep)[0]

        parts.append(torch.autograd.functional.jacobian(logits, torch.ones(FEATURES + 1, dtype=torch.float64)))
    return torch.stack(parts)


@ALL
def test_risk_is_half_the_jacobian_under_the_fisher_matrix(name: str):
    model, batch = fresh(act_fn="gelu"), examples(5)
    units = units_of(name, model)
    values = random_values(units)
    found = tls.score.risk(model, batch, units, values=values, probes=10)
    change = effects_of(model, batch, name, values)
    with torch.no_grad():
        f = torch.stack([fisher(z) for z in answer_logits(model, batch)])
    expected = torch.einsum("nau,nab,nbu->nu", change, f, change) / 2
    assert close(found.scores, expected.mean(0), 1e-8)
    alone = tls.score.risk(model, batch, units, probes=10)  # means come from the same pass
    assert close(
        alone.scores,
        tls.score.risk(model, batch, units, values=tls.constants.mean(model, batch, units), probes=10).scores,
    )


@ALL
def test_the_gradient_is_the_derivative_by_keep_and_its_finite_difference(name: str):
    model, batch = fresh(act_fn="gelu"), examples(5)
    units = units_of(name, model)
    values = random_values(units)
    with unchanged(model):
        found = tls.score.gradient(model, batch, units, values=values).scores
    keep = torch.ones(FEATURES + 1, dtype=torch.float64, requires_grad=True)
    metric = log_odds(reference(model, batch, name, values, keep), batch).mean()
    assert close(found, torch.autograd.grad(metric, keep)[0], 1e-9)
    for u in range(FEATURES + 1):
        step = 1e-5 * torch.eye(FEATURES + 1, dtype=torch.float64)[u]
        with torch.no_grad():
            up, down = (log_odds(reference(model, batch, name, values, 1 + s), batch).mean() for s in (step, -step))
        assert float(found[u]) == pytest.approx(float(up - down) / 2e-5, rel=1e-4, abs=1e-8)


@ALL
def test_exact_is_the_divergence_when_a_feature_alone_is_removed(name: str):
    model, batch = bridge(), examples(5)
    units = units_of(name)
    values = random_values(units)
    found = tls.score.exact(model, batch, units, values=values, progress=False)
    with torch.no_grad():
        plain = answer_logits(model, batch)
        one = 1 - torch.eye(FEATURES + 1, dtype=torch.float64)
        expected = torch.stack([kl(plain, reference(model, batch, name, values, keep)).mean() for keep in one])
    assert close(found.scores, expected, 1e-9)
    gone = tls.Reduction(tls.Circuit(units, one[2].bool()), values)
    assert tls.risk(model, gone, batch).mean == pytest.approx(float(expected[2]), rel=1e-9)


def test_scaled_variance_takes_the_length_of_what_a_feature_writes():
    model, batch, units = bridge(), examples(5), units_of()
    features, error = tls.run_values(model, batch, units).tensors
    written = features[..., 0].flatten(0, 1).var(0, correction=0) * dictionary().W_dec.square().sum(1)
    left = error.flatten(0, 2).var(0, correction=0).sum()
    assert close(tls.score.scaled_variance(model, batch, units).scores, torch.cat([written, left[None]]))


# Laws


def padded(side: str, filler: int, width: int) -> Examples:
    """Twelve prompts of three to five tokens, padded."""
    tokens, labels = torch.full((12, width), filler), torch.full((12, width), -100)
    mask = torch.zeros(12, width, dtype=torch.bool)
    for i in range(12):
        length = 3 + i % 3
        words = torch.randint(11, (length + 1,), generator=seeded(i))
        place = slice(width - length, width) if side == "left" else slice(0, length)
        tokens[i, place], mask[i, place] = words[:-1], True
        labels[i, range(width)[place][-1]] = words[-1]
    return Examples(tokens, labels, mask)


def numbers(model: Any, batch: Examples, name: str, batch_size: int | None = None) -> list[Tensor]:
    """Of everything that takes units."""
    d = dictionary(name)
    fire = tls.dictionaries.firing(model, d, batch, batch_size=batch_size)
    units = tls.features(model, d, which=fire, error=True)
    shared: dict[str, Any] = {"batch_size": batch_size}
    values = tls.constants.mean(model, batch, units, **shared)
    scores = [
        tls.score.risk(model, batch, units, **shared),
        tls.score.gradient(model, batch, units, **shared),
        tls.score.exact(model, batch, units, progress=False, **shared),
        tls.score.variance(model, batch, units, **shared),
    ]
    reduction = tls.constants.reduced(model, scores[0].top(0.4), values)
    risk = tls.risk(model, reduction, batch, batch_size=batch_size)
    return [fire.double(), *values.tensors, *(part.scores for part in scores), torch.tensor([risk.mean, risk.stderr])]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@ALL
def test_batches_never_matter(name: str):
    model, batch = bridge(), padded("left", 0, 5)
    same(numbers(model, batch, name, 5), numbers(model, batch, name, 12))


@ALL
@pytest.mark.parametrize(("side", "filler", "width"), [("right", 0, 5), ("left", 9, 6), ("right", 9, 7)])
def test_padding_never_matters(name: str, side: str, filler: int, width: int):
    model = bridge()
    same(numbers(model, padded(side, filler, width), name), numbers(model, padded("left", 0, 5), name))


# Searches, files, and what else takes units


def searched(name: str = "relu", **others: Any) -> tuple[tls.Units, tls.CircuitPath, Examples]:
    model, batch = bridge(), examples(24)
    units = units_of(name)
    kept = tls.Constraints(always_keep=tls.Circuit.of(units, [units.names[-1]]))
    return units, tls.sparsify(model, batch, units, rounds=4, constraints=kept, progress=False, **others), batch


@ALL
def test_a_search_nests_and_predicts_and_keeps_the_error(name: str):
    model = bridge()
    units, path, batch = searched(name)
    small, large = path.at(0.3), path.at(0.7)
    assert small.circuit <= large.circuit and units.names[-1] in small.circuit
    # as plain features, with the error out of reach
    bare = tls.Units(units.sites[:1])
    same_features = tls.Reduction(tls.Circuit(bare, small.circuit.mask[:-1]), replace_values(bare, small.values))
    assert tls.risk(model, same_features, batch).mean == pytest.approx(tls.risk(model, small, batch).mean, rel=1e-12)
    evaluation = tls.evaluate(model, small, batch)
    assert evaluation.risk.mean == pytest.approx(tls.risk(model, small, batch).mean)


def replace_values(units: tls.Units, values: tls.Values) -> tls.Values:
    return replace(values, units=units, tensors=values.tensors[: len(units.sites)])


@ALL
def test_what_is_saved_is_loaded(name: str, tmp_path: Path):
    model = bridge()
    units, path, batch = searched(name)
    reduction = path.at(0.5)
    reduction.save(tmp_path / "features.reduction")
    again = tls.Reduction.load(tmp_path / "features.reduction")
    assert again == reduction and again.units == units and again.units.names == units.names
    assert tls.risk(model, again, batch).mean == tls.risk(model, reduction, batch).mean
    other = tls.features(model, dictionary(name, seed=6), error=True)
    assert other != units and hash(other) == hash(other)


def test_fold_refuses_features_by_name():
    model, units = bridge(), units_of()
    reduction = tls.dictionaries.remove(model, units, ["L0F3"])
    with pytest.raises(ValueError, match="'feature' do not fold"):
        tls.fold(model, reduction)


def test_refits_neighbours_and_masks_take_features():
    model, batch = bridge(), examples(24)
    _, path, _ = searched()
    reduction = path.at(0.3)
    fitted = tls.constants.refit(model, reduction, batch, batch, steps=10, progress=False)
    assert tls.risk(model, fitted, batch).mean < tls.risk(model, reduction, batch).mean
    mixture = tls.InterventionDistribution.interchange(0.5)
    assert tls.risk(model, reduction, batch, interventions=mixture).mean > 0


def test_only_features_that_fire_are_units_and_keep_their_numbers():
    model, batch = bridge(), examples()
    d = dictionary(b_enc=torch.where(torch.arange(FEATURES) % 3 == 0, -1e3, 1.0).double())
    units = tls.features(model, d, examples=batch)
    assert units.names == tuple(f"L0F{f}" for f in range(FEATURES) if f % 3)
    frame = tls.score.variance(model, batch, units).to_frame()
    assert frame["index"].tolist() == [f for f in range(FEATURES) if f % 3] and set(frame.kind) == {"feature"}
    assert units["L0F4"].index == 2 and tls.Circuit.of(units, ["L0F4"]).names == ("L0F4",)
    with pytest.raises(KeyError, match="L0F3"):
        units.index("L0F3")
    whole = tls.features(model, d)
    few, many = (tls.dictionaries.remove(model, part, ["L0F4", "L0F5"]) for part in (units, whole))
    assert tls.risk(model, few, batch).mean == pytest.approx(tls.risk(model, many, batch).mean, rel=1e-12)


def test_two_places_at_one_layer_need_names_of_their_own():
    model = bridge()
    first, second = units_of(error=False), tls.features(model, dictionary(), hook=OUT, layer=7)
    assert (first + second)["L7F3"].site.hook == OUT
    with pytest.raises(ValueError, match="give them different layers"):
        first + tls.features(model, dictionary(), hook="blocks.0.hook_resid_mid")


def test_removing_by_name_is_zero_ablation_of_these():
    model, batch, units = bridge(), examples(), units_of()
    reduction = tls.dictionaries.remove(model, units, ["L0F2", units["L0F9"]])
    keep = reduction.circuit.mask.double()
    assert len(~reduction.circuit) == 2
    zeros = tls.Values(units, (torch.zeros(FEATURES, 1).double(), torch.zeros(1, 8).double()))
    with torch.no_grad(), tls.intervened(model, tls.ablate(reduction)):
        found = answer_logits(model, batch)
    torch.testing.assert_close(found, reference(model, batch, "relu", zeros, keep), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="head units, not features"):
        tls.dictionaries.remove(model, tls.heads(model), ["L0H1"])
