"""Evaluation against a slow direct computation: one example at a time, hooks and sums written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.by_hand import Fill, average, constant, measures, run, table
from helpers.models import bridge, examples, fresh, unchanged, unchecked
from helpers.models import random_values as other_values
from helpers.models import reduction_of as bridged_reduction
from helpers.models import units_of as units_on
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from tl_sparsify import Circuit, Examples, Reduction, Site, Units, Values, evaluate, fingerprint, heads, neurons, risk
from tl_sparsify.comparison.evaluate import auroc, average_precision
from tl_sparsify.comparison.resampling import weights
from tl_sparsify.core.metrics import log_probability
from tl_sparsify.search.affine import neighbours
from tl_sparsify.search.constants import mean, reduced, refit, zero

VOCABULARY, POSITIONS, N = 9, 6, 12


@cache
def native() -> Any:
    """A small transformer in float64 with all parameters random."""
    config = {"d_model": 16, "d_head": 4, "n_heads": 2, "n_layers": 2, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"d_mlp": 10, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.eval()


def data(choices: bool = True) -> Examples:
    """Sequences with one to three answers each, among five choices or all tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (N, POSITIONS), generator=generator)
    labels = torch.randint(1, 6, (N, POSITIONS), generator=generator)
    read = torch.rand(N, POSITIONS, generator=generator).argsort(1) < torch.randint(1, 4, (N, 1), generator=generator)
    labels[~read] = -100
    return Examples(tokens, labels, choices=torch.tensor([3, 1, 2, 5, 4]) if choices else None)


def units_of(model: Any) -> Units:
    return heads(model) + neurons(model)


def random_values(seed: int) -> Values:
    generator = torch.Generator().manual_seed(seed)
    units = units_of(native())
    widths = {"head": 4, "neuron": 1}
    shapes = [(site.size, widths[site.kind]) for site in units.sites]
    return Values(units, tuple(torch.randn(shape, generator=generator).double() * 0.5 for shape in shapes))


def reduction_of(kept: Sequence[str], seed: int = 0, kind: str = "given", **more: Any) -> Reduction:
    circuit = Circuit.of(units_of(native()), kept)
    return Reduction(circuit, replace(random_values(seed), kind=kind), fingerprint=fingerprint(native()), **more)


KEPT = ["L0H0", "L1H1", "L0N1", "L0N2", "L0N7", "L1N0", "L1N4"]


def logits_of(kept: Sequence[str] | None, values: Values, tokens: Tensor, source: Tensor | None = None) -> Tensor:
    """The logits of one input with everything outside ``kept`` set to its value, unit by unit.

    With ``source`` the units of ``KEPT`` take their values from its run, under the same ablation.
    """
    seen: dict[str, Tensor] = {}

    def run(tokens: Tensor, write: bool) -> Tensor:
        hooks = []
        for site, constants in zip(values.units.sites, values.tensors, strict=True):
            gone = [i for i in range(site.size) if kept is not None and site.name(i) not in kept]
            taken = [i for i in range(site.size) if site.name(i) in KEPT and write]

            def change(
                activation: Tensor,
                hook: Any,
                name: str = site.hook,
                gone: list[int] = gone,
                taken: list[int] = taken,
                constants: Tensor = constants,
            ) -> Tensor:
                activation = activation.clone()
                for i in gone:
                    activation[:, :, i] = constants[i] if activation.ndim == 4 else constants[i, 0]
                for i in taken:
                    activation[:, :, i] = seen[name][:, :, i]
                if not write:
                    seen[name] = activation
                return activation

            hooks.append((site.hook, change))
        with torch.no_grad(), native().hooks(fwd_hooks=hooks):
            return native()(tokens[None])[0]

    if source is not None:
        run(source, write=False)
    return run(tokens, write=source is not None)


def means(
    kept: Sequence[str] | None, values: Values, examples: Examples, sources: Tensor | None = None
) -> dict[str, float]:
    """Every measure, by sums over examples and over each one's answers."""
    choices = list(range(VOCABULARY)) if examples.choices is None else examples.choices.tolist()
    sums = {"risk": 0.0, "accuracy": 0.0, "agreement": 0.0, "log odds": 0.0}
    for i, (tokens, labels) in enumerate(zip(examples.tokens, examples.labels, strict=True)):
        source = None if sources is None else sources[i]
        full, reduced = (logits_of(circuit, values, tokens, source) for circuit in (None, kept))
        answered = [position for position in range(POSITIONS) if labels[position] != -100]
        for position in answered:
            z, w = ([float(logits[position, c]) for c in choices] for logits in (full, reduced))
            p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (z, w))
            right = choices.index(int(labels[position]))
            share = 1 / len(answered) / len(examples)
            sums["risk"] += share * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            sums["accuracy"] += share * (max(range(len(w)), key=w.__getitem__) == right)
            sums["agreement"] += share * (z.index(max(z)) == w.index(max(w)))
            sums["log odds"] += share * math.log(q[right] / (1 - q[right]))
    return sums


@pytest.mark.parametrize("choices", [True, False])
def test_every_measure_is_that_of_the_slow_computation(choices: bool):
    examples, reduction = data(choices), reduction_of(KEPT)
    found = evaluate(native(), reduction, examples)
    here = means(KEPT, reduction.values, examples)
    assert here["risk"] > 0.01
    assert found.risk.mean == pytest.approx(here["risk"], rel=1e-6)
    assert found.risk.n == N and found.risk.unit == "nats"
    assert found.accuracy == pytest.approx(here["accuracy"])
    assert found.agreement == pytest.approx(here["agreement"])
    assert found.original_accuracy == pytest.approx(means(None, reduction.values, examples)["accuracy"])
    assert (found.kept, found.fraction, found.kind) == (7, 7 / 24, "given")


def test_faithfulness_and_completeness_are_those_of_the_slow_computation():
    examples, reduction = data(), reduction_of(KEPT)
    complement = [name for name in reduction.units.names if name not in KEPT]
    full, empty, here, there = (
        means(kept, reduction.values, examples)["log odds"] for kept in (None, [], KEPT, complement)
    )
    found = evaluate(native(), reduction, examples)
    assert found.faithfulness == pytest.approx((here - empty) / (full - empty), rel=1e-6)
    assert found.completeness == pytest.approx((there - empty) / (full - empty), rel=1e-6)


def test_empty_circuit_and_complement_have_the_baselines_constants():
    examples, baseline = data(), random_values(5)
    reduction = reduction_of(KEPT, kind="refit", reference=baseline)
    complement = [name for name in reduction.units.names if name not in KEPT]
    full, empty = (means(kept, baseline, examples)["log odds"] for kept in (None, []))
    found = evaluate(native(), reduction, examples)
    here = means(KEPT, reduction.values, examples)
    assert found.risk.mean == pytest.approx(here["risk"], rel=1e-6) and found.kind == "refit"
    assert found.faithfulness == pytest.approx((here["log odds"] - empty) / (full - empty), rel=1e-6)
    there = means(complement, baseline, examples)["log odds"]
    assert found.completeness == pytest.approx((there - empty) / (full - empty), rel=1e-6)


def test_minimality_is_the_least_drop_from_removing_one_unit_more():
    examples, reduction = data(), reduction_of(KEPT)
    whole = evaluate(native(), reduction, examples, minimality=True)
    drops = []
    for unit in KEPT:
        less = reduction_of([name for name in KEPT if name != unit])
        drops.append(whole.faithfulness - evaluate(native(), less, examples).faithfulness)
    assert whole.minimality == min(drops) < max(drops)
    assert evaluate(native(), reduction, examples).minimality is None


def test_the_full_circuit_has_exact_values():
    full = reduction_of(units_of(native()).names)
    found = evaluate(native(), full, data(), probability=1.0)
    assert (found.risk.mean, found.risk.stderr, found.faithfulness, found.completeness) == (0, 0, 1, 0)
    assert (found.agreement, found.accuracy, found.fraction) == (1, found.original_accuracy, 1)
    assert (found.interchange_risk.mean, found.interchange_agreement) == (0, 1)


def test_the_empty_circuit_has_exact_values():
    found = evaluate(native(), reduction_of([]), data(), minimality=True)
    assert (found.kept, found.faithfulness, found.completeness) == (0, 0, 1)
    assert found.risk.mean > 0 and found.minimality is not None and math.isnan(found.minimality)
    assert found.interchange_risk == found.risk


def test_risk_is_the_measured_risk():
    reduction = reduction_of(KEPT)
    found, direct = evaluate(native(), reduction, data()).risk, risk(native(), reduction, data())
    assert (found.mean, found.stderr) == pytest.approx((direct.mean, direct.stderr), rel=1e-10)
    assert (found.n, found.unit) == (direct.n, direct.unit)


def test_without_interchange_the_interchange_measures_are_the_plain_ones():
    found = evaluate(native(), reduction_of(KEPT), data(), probability=0.0)
    assert (found.interchange_risk, found.interchange_agreement) == (found.risk, found.agreement)
    assert found.probability == 0


def test_interchange_depends_on_the_seed_and_nothing_else_does():
    runs = [evaluate(native(), reduction_of(KEPT), data(), probability=0.5, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].interchange_risk != runs[2].interchange_risk
    assert runs[0].intervals != runs[2].intervals
    same = replace(
        runs[2],
        interchange_risk=runs[0].interchange_risk,
        interchange_agreement=runs[0].interchange_agreement,
        intervals=runs[0].intervals,
    )
    assert same == runs[0]


def test_interchange_measures_are_those_of_the_slow_computation():
    two, reduction = data()[:2], reduction_of(KEPT)  # each one's only partner is the other
    found = evaluate(native(), reduction, two, probability=1.0)
    slow = means(KEPT, reduction.values, two, sources=two.tokens.flip(0))
    assert slow["risk"] != pytest.approx(means(KEPT, reduction.values, two)["risk"], rel=0.01)
    assert found.interchange_risk.mean == pytest.approx(slow["risk"], rel=1e-6)
    assert found.interchange_agreement == pytest.approx(slow["agreement"])


@pytest.mark.parametrize("size", [1, 5])
def test_batches_do_not_matter(size: int):
    whole, parts = (
        evaluate(native(), reduction_of(KEPT), data(), probability=0.4, batch_size=batch, seed=3).to_dict()
        for batch in (None, size)
    )
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert parts[name] == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-10, abs=1e-12))


def test_another_metric_changes_the_shares_and_not_the_risk():
    examples, reduction = data(), reduction_of(KEPT)
    odds, probability = (
        evaluate(native(), reduction, examples, **settings) for settings in ({}, {"metric": log_probability})
    )
    assert odds.risk == probability.risk and odds.accuracy == probability.accuracy
    assert odds.faithfulness != probability.faithfulness
    full = evaluate(native(), reduction_of(reduction.units.names), examples, metric=log_probability)
    assert full.faithfulness == 1


def test_units_that_do_nothing_have_no_faithfulness():
    before = Units((Site("neuron", 0, "blocks.0.mlp.hook_post", 10),))
    values = Values(before, (torch.zeros(10, 1, dtype=torch.float64),))
    model = native()
    weight = model.blocks[0].mlp.out.original_component.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        found = evaluate(model, Reduction(Circuit.of(before, ["L0N3"]), values), data())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert math.isnan(found.faithfulness) and math.isnan(found.completeness)
    assert (found.risk.mean, found.agreement) == (0, 1)


def test_to_dict_is_flat_numbers():
    found = evaluate(native(), reduction_of(KEPT), data())
    flat = found.to_dict()
    assert list(flat) == [
        "kept", "fraction", "kind", "risk", "risk_stderr", "accuracy", "original_accuracy", "agreement",
        "faithfulness", "completeness", "minimality", "interchange_risk", "interchange_risk_stderr",
        "interchange_agreement", "probability", "risk_low", "risk_high", "accuracy_low", "accuracy_high",
        "agreement_low", "agreement_high", "faithfulness_low", "faithfulness_high", "completeness_low",
        "completeness_high",
    ]  # fmt: skip
    assert (flat["faithfulness_low"], flat["faithfulness_high"]) == found.intervals["faithfulness"]
    assert (flat["risk"], flat["risk_stderr"]) == (found.risk.mean, found.risk.stderr)
    assert all(isinstance(value, float | int | str | None) for value in flat.values())


def test_the_repr_is_one_line():
    text = repr(evaluate(native(), reduction_of(KEPT), data()))
    assert text.startswith("Evaluation(7 units, given: risk ") and "\n" not in text


def test_a_model_in_training_mode_is_refused():
    model = native()
    try:
        model.train()
        with pytest.raises(ValueError, match="training mode"):
            evaluate(model, reduction_of(KEPT), data())
    finally:
        model.eval()


def test_a_reduction_of_another_model_is_refused():
    with pytest.raises(ValueError, match="reduction was made for the model 0123"):
        evaluate(native(), replace(reduction_of(KEPT), fingerprint="0123"), data())


def test_a_probability_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        evaluate(native(), reduction_of(KEPT), data(), probability=1.5)


def test_constants_that_are_not_finite_are_named():
    values = random_values(0)
    values.tensors[-1][3] = float("nan")
    with pytest.raises(ValueError, match=r"values of removed units at blocks\.1\.mlp\.hook_post are NaN or infinite"):
        evaluate(native(), Reduction(Circuit.of(values.units, KEPT), values), data())


def test_the_model_is_left_as_it_was():
    model = native()
    state, before = torch.get_rng_state(), fingerprint(model)
    evaluate(model, reduction_of(KEPT), data())
    with pytest.raises(ValueError, match="labels or choices hold id 50"):
        evaluate(model, reduction_of(KEPT), replace(data(), choices=torch.tensor([*range(8), 50])))
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state)
    assert not [name for name, hook in model.hook_dict.items() if hook.has_hooks()]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# Intervals


def test_intervals_are_those_of_a_loop_over_replicates():
    examples, reduction = data(), reduction_of(KEPT)
    found = evaluate(native(), reduction, examples, bootstrap=20, level=0.9, seed=6)
    complement = [name for name in reduction.units.names if name not in KEPT]
    each = [
        [means(kept, reduction.values, examples[i : i + 1]) for kept in (None, [], KEPT, complement)] for i in range(N)
    ]
    replicates: dict[str, list[float]] = {name: [] for name in found.intervals}
    for row in weights(torch.arange(N), 20, 6).T.tolist():
        full, empty, here, there = (
            {name: sum(w * each[i][k][name] for i, w in enumerate(row)) / sum(row) for name in each[0][k]}
            for k in range(4)
        )
        for name in ("risk", "accuracy", "agreement"):
            replicates[name].append(here[name])
        for name, part in (("faithfulness", here), ("completeness", there)):
            share = (part["log odds"] - empty["log odds"]) / (full["log odds"] - empty["log odds"])
            replicates[name].append(share)
    for name, drawn in replicates.items():
        assert found.intervals[name] == pytest.approx(tuple(np.percentile(drawn, [5, 95])), rel=1e-6, abs=1e-12)
    assert found.intervals["risk"][0] < found.risk.mean < found.intervals["risk"][1]


def test_without_replicates_intervals_are_nan_and_the_rest_is_the_same():
    some, none = (evaluate(native(), reduction_of(KEPT), data(), bootstrap=n) for n in (10, 0))
    assert all(math.isnan(end) for ends in none.intervals.values() for end in ends)
    assert replace(none, intervals=some.intervals) == some


# Ablations


def slow(batch: Examples, reduction: Reduction, fills: list[Fill]) -> tuple[dict[str, float], float, float]:
    """The measures of the circuit, its faithfulness and completeness, by hand-written hooks."""
    kept = list(reduction.circuit.names)
    others = [name for name in reduction.units.names if name not in kept]
    rows = table(bridge(), reduction.units, batch, [None, [], kept, others], fills.__getitem__)
    even = [1.0] * len(batch)
    full, empty, here, there = (average(rows, k, "metric", even) for k in range(4))
    found = {name: average(rows, 2, name, even) for name in ("risk", "accuracy", "agreement")}
    return found, (here - empty) / (full - empty), (there - empty) / (full - empty)


@pytest.mark.parametrize("kind", ["zero", "mean", "counterfactual"])
def test_ablations_replace_what_the_reduction_brings(kind: Any):
    model, batch = bridge(), examples(8, answers=2)
    reduction = bridged_reduction(model)
    given = other_values(reduction.units, 7)
    fills = [constant(given)] * 8
    if kind == "zero":
        fills = [{hook: torch.zeros_like(v) for hook, v in fills[0].items()}] * 8
    if kind == "counterfactual":
        assert batch.counterfactual_tokens is not None
        fills = [run(model, reduction.units, tokens)[1] for tokens in batch.counterfactual_tokens]
    with unchanged(model):
        found = evaluate(model, reduction, batch, ablation=kind, values=given if kind == "mean" else None)
    expected, faithfulness, completeness = slow(batch, reduction, fills)
    assert found.kind == kind and (found.kept, found.fraction) == (len(reduction.circuit), reduction.circuit.fraction)
    assert found.risk.mean == pytest.approx(expected["risk"], rel=1e-10) and found.risk.mean > 0.01
    assert (found.accuracy, found.agreement) == pytest.approx((expected["accuracy"], expected["agreement"]))
    assert (found.faithfulness, found.completeness) == pytest.approx((faithfulness, completeness), rel=1e-10)
    assert found.risk.mean != pytest.approx(evaluate(model, reduction, batch).risk.mean, rel=0.01)


def test_mean_ablation_without_values_is_to_the_baseline():
    model, batch = bridge(), examples(8)
    reduction, baseline = bridged_reduction(model), other_values(units_on(model), 8)
    refitted = replace(reduction, values=replace(reduction.values, kind="refit"), reference=baseline)
    found = evaluate(model, refitted, batch, ablation="mean")
    means = replace(baseline, kind="mean")
    assert found == evaluate(model, replace(reduction, values=means), batch) and found.kind == "mean"
    assert found == evaluate(model, reduction, batch, ablation="mean", values=baseline)
    own = evaluate(model, refitted, batch)
    assert own.risk == evaluate(model, reduction, batch).risk != found.risk and own.completeness == found.completeness


def test_zeros_are_not_taken_for_means(tmp_path: Path):
    model, batch = bridge(), examples(8)
    reduction = reduced(model, bridged_reduction(model).circuit, zero(model, batch, units_on(model)))
    refitted = refit(model, reduction, batch, batch, steps=1, progress=False)
    refitted.save(tmp_path / "refitted")
    for zeros in (reduction, refitted, Reduction.load(tmp_path / "refitted")):
        with pytest.raises(ValueError, match="ablation='mean' needs values"):
            evaluate(model, zeros, batch, ablation="mean")
    assert evaluate(model, reduction, batch).kind == "zero"


def test_zero_ablation_is_a_reduction_to_zeros():
    model, batch = bridge(), examples(8)
    reduction = bridged_reduction(model)
    zeros = reduced(model, reduction.circuit, zero(model, batch, reduction.units), "zero")
    assert evaluate(model, reduction, batch, ablation="zero") == evaluate(model, zeros, batch)


def test_affine_replacements_are_left_out_under_another_ablation():
    model, batch = bridge(), examples(24)
    plain = Reduction(Circuit(units_on(model), torch.arange(14) % 3 > 0), mean(model, batch, units_on(model)))
    affine = neighbours(model, plain, batch, nearest=None)
    assert evaluate(model, affine, batch).risk != evaluate(model, plain, batch).risk
    for kind in ("zero", "counterfactual"):
        assert evaluate(model, affine, batch, ablation=kind) == evaluate(model, plain, batch, ablation=kind)


def test_interchange_under_counterfactual_ablation_is_that_of_the_slow_computation():
    """The partner's run is ablated too, to the values of the partner's counterfactual."""
    model, two = bridge(), examples(2, answers=2)  # each one's only partner is the other
    reduction = bridged_reduction(model)
    units, kept = reduction.units, list(reduction.circuit.names)
    found = evaluate(model, reduction, two, ablation="counterfactual", probability=1.0)
    assert two.counterfactual_tokens is not None
    fills = [run(model, units, tokens)[1] for tokens in two.counterfactual_tokens]
    risks, agreements = [], []
    for i, j in ((0, 1), (1, 0)):
        clean = run(model, units, two.tokens[j])[1]
        ablated = run(model, units, two.tokens[j], kept, fills[j])[1]
        full = run(model, units, two.tokens[i], taken=kept, other=clean)[0]
        reduced = run(model, units, two.tokens[i], kept, fills[i], taken=kept, other=ablated)[0]
        here = measures(full, reduced, two.labels[i], list(range(11)))
        risks.append(here["risk"])
        agreements.append(here["agreement"])
    assert found.interchange_risk.mean == pytest.approx(sum(risks) / 2, rel=1e-10)
    assert found.interchange_agreement == pytest.approx(sum(agreements) / 2)
    assert found.interchange_risk.mean != pytest.approx(found.risk.mean, rel=0.01)


@pytest.mark.parametrize("kind", ["zero", "counterfactual", "shuffled"])
def test_batches_do_not_matter_under_any_ablation(kind: str):
    model, batch = bridge(), examples(11, answers=2)
    if kind == "shuffled":
        batch = replace(batch, counterfactual_tokens=None, counterfactual_labels=None)
    name: Any = "counterfactual" if kind == "shuffled" else kind
    settings: dict[str, Any] = {"ablation": name, "probability": 0.5, "minimality": True, "bootstrap": 30}
    whole, parts = (evaluate(model, bridged_reduction(model), batch, batch_size=b, **settings) for b in (None, 3))
    assert whole.kind == parts.kind == kind
    for key, value in whole.to_dict().items():
        found = parts.to_dict()[key]
        assert found == (value if isinstance(value, str | None) else pytest.approx(value, rel=1e-10, abs=1e-12))


@pytest.mark.parametrize("kind", ["zero", "counterfactual"])
def test_minimality_under_another_ablation(kind: Any):
    model, batch = bridge(), examples(6)
    whole = bridged_reduction(model)
    found = evaluate(model, whole, batch, ablation=kind, minimality=True, bootstrap=0)
    drops = []
    for unit in whole.circuit.names:
        less = replace(whole, circuit=whole.circuit - Circuit.of(whole.units, [unit]))
        drops.append(found.faithfulness - evaluate(model, less, batch, ablation=kind, bootstrap=0).faithfulness)
    assert len(drops) > 2 and found.minimality == pytest.approx(min(drops), rel=1e-10) and min(drops) < max(drops)


@pytest.mark.parametrize(("kind", "passes"), [(None, 8), ("mean", 8), ("counterfactual", 11)])
def test_each_pass_is_counted(kind: Any, passes: int):
    model, batch = fresh(), examples(6)
    reduction, calls = bridged_reduction(model), []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return forward(*args, **kwargs)

    model.forward = counted
    evaluate(model, reduction, batch, ablation=kind, batch_size=4)
    assert sum(calls) == passes * len(batch)


def refused(reduction: Reduction, match: str, **settings: Any) -> None:
    model = bridge()
    with unchanged(model), unchecked(), pytest.raises(ValueError, match=match):
        evaluate(model, reduction, examples(), **settings)


def test_arguments_that_do_not_belong_are_refused():
    reduction = bridged_reduction(bridge())
    values = other_values(reduction.units, 1)
    refused(reduction, "values are given, and no ablation", values=values)
    refused(reduction, "values are given, and ablation is 'counterfactual'", values=values, ablation="counterfactual")
    refused(reduction, "ablation is 'refit'; it is mean, zero or counterfactual", ablation="refit")
    refused(reduction, r"sizes is \[0\.1\]; a reduction has one size", sizes=(0.1,))
    refused(
        replace(reduction, values=replace(reduction.values, kind="zero")),
        "ablation='mean' needs values",
        ablation="mean",
    )
    refused(reduction, "bootstrap is -2", bootstrap=-2)
    refused(reduction, "level is 0; it lies between", level=0)
    refused(reduction, "metric gave shape", metric=lambda logits, batch: logits)
    alone = examples(1)
    alone = replace(alone, counterfactual_tokens=None, counterfactual_labels=None)
    with pytest.raises(ValueError, match="examples holds one, and no counterfactual_tokens"):
        evaluate(bridge(), reduction, alone, ablation="counterfactual")


# Against known truth


@given(st.lists(st.integers(0, 4), min_size=12, max_size=12), st.integers(1, 2**12 - 2))
@settings(max_examples=50)
def test_areas_are_those_of_scikit_learn(numbers: list[int], bits: int):
    units = Units((Site("neuron", 0, "hook_hidden", 12),))
    truth = Circuit(units, torch.tensor([bool(bits >> i & 1) for i in range(12)]))
    scores = torch.tensor(numbers, dtype=torch.float64)
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth.mask, scores), abs=1e-12)
    assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth.mask, scores), abs=1e-12)


def test_without_true_or_without_other_units_there_is_no_area():
    units = Units((Site("neuron", 0, "hook_hidden", 3),))
    assert math.isnan(auroc(torch.ones(3), Circuit.empty(units)))
    assert math.isnan(auroc(torch.ones(3), Circuit.full(units)))
    assert math.isnan(average_precision(torch.ones(3), Circuit.empty(units)))
    with pytest.raises(ValueError, match="4 numbers for 3 units"):
        auroc(torch.ones(4), Circuit.full(units))
