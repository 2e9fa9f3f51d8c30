"""What is no model, no examples, no seed or no number is refused by one sentence, everywhere; what may be meant is
taken."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import bridge, examples, fresh, inputs, linear, reduction_of, unchanged, unchecked, units_of
from torch import nn

import tl_sparsify as tls
from tl_sparsify import Circuit, Examples, baselines, constants, curvature, fold, score
from tl_sparsify._internal import random as _random
from tl_sparsify.core.distributions import check_pairs
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import log_odds

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 3, 4, 5]])
LABELS = torch.tensor([[-100, -100, -100, 1]] * 3)
Call = Callable[..., Any]


def entries(model: Any, data: Any, units: Any, reduction: Any) -> dict[str, Call]:
    """Everything that runs a model on examples; further settings go to it."""

    def of(method: Call, *fixed: Any) -> Call:
        return lambda **settings: method(*fixed, **settings)

    found = {
        f"score.{name}": of(getattr(score, name), model, data, units)
        for name in ("risk", "variance", "scaled_variance", "gradient", "integrated", "exact")
    }
    found |= {
        f"baselines.{name}": of(getattr(baselines, name), model, data, units)
        for name in ("activation_norm", "activation_patching", "attribution_patching", "eap", "eap_ig")
    }
    found |= {f"baselines.{n}": of(getattr(baselines, n), model, data, units) for n in ("exact_zero", "exact_mean")}
    return found | {
        "constants.newton": of(constants.newton, model, data, units),
        "constants.curvature_weighted": of(constants.curvature_weighted, model, data, units),
        "constants.neighbours": of(constants.neighbours, model, reduction, data),
        "constants.refit": of(constants.refit, model, reduction, data, data),
        "curvature.uniformity": of(curvature.uniformity, model, data, units),
        "score.additivity": of(score.additivity, model, data, reduction),
        "risk": of(tls.risk, model, reduction, data),
        "evaluate": of(tls.evaluate, model, reduction, data),
        "sparsify_affine": of(tls.sparsify_affine, model, data, units),
        "polish": of(tls.polish, model, reduction, data),
        "in_rounds": of(baselines.in_rounds, score.variance, model, data, units),
    }


NAMES = sorted(entries(None, None, None, None))
SEEDLESS = {"constants.mean": constants.mean, "run_values": tls.run_values}


@pytest.fixture(autouse=True)
def as_for_a_user():
    with unchecked():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_model_or_no_examples_is_named(name: str):
    model, data, units, reduction = bridge(), examples(4), units_of(bridge()), reduction_of(bridge())
    for bad, says in (
        (None, "model is a NoneType, which has no hook points: give a TransformerLens model, TransformerBridge"),
        ("gpt2", "model is the text 'gpt2', which has no hook points"),
        (nn.Linear(2, 2), r"model is a Linear, which has no hook points: .* a bridge around it"),
    ):
        with pytest.raises(ValueError, match=says):
            entries(bad, data, units, reduction)[name]()
    for bad, what in (
        (data.tokens, "Tensor"),
        ({"tokens": 1}, "dict"),
        ([1], "list"),
        ("text", "str"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=f"is a {what}, not Examples: make them of tensors"):
            entries(model, bad, units, reduction)[name]()
    for bad in (1.5, "0", float("nan"), None, [0], torch.Generator(), True, 2**70):
        with pytest.raises(ValueError, match=r"seed is .*; it must be a whole number"):
            entries(model, data, units, reduction)[name](seed=bad)
    if name != "in_rounds":
        for bad in (1.5, "8", [4], True):
            with pytest.raises(ValueError, match=r"batch_size is .*; it must be a whole number"):
                entries(model, data, units, reduction)[name](batch_size=bad)


@pytest.mark.parametrize("method", [tls.heads, tls.neurons, tls.mlps, tls.attentions, tls.residuals])
def test_units_of_what_is_no_model(method: Any):
    with pytest.raises(ValueError, match="model is the text 'gpt2', which has no hook points"):
        method("gpt2")
    with pytest.raises(ValueError, match=r"which has no hook points: .* task\.model\(\)"):
        method(tls.load_task("hierarchical_equality"))


def test_a_model_in_training_mode_is_refused_where_it_only_runs():
    model = fresh().train()
    for call in (
        lambda: tls.run_values(model, examples(3), units_of(model)),
        lambda: constants.mean(model, examples(3), units_of(model)),
        lambda: tls.intervened(model, tls.ablate(reduction_of(model))).__enter__(),
    ):
        with pytest.raises(ValueError, match="model is in training mode"):
            call()


NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    ("score.risk", {"probes": float("inf")}, "probes is inf; it must be a whole number"),
    ("score.risk", {"probes": 10**20}, "probes is 100000000000000000000; more than"),
    ("score.additivity", {"probes": 2.5}, "probes is 2.5; it must be a whole number"),
    *(
        (name, {"temperature": bad}, f"temperature is {re.escape(str(bad))}; it must")
        for name in ("score.risk", "sparsify_affine", "polish", "constants.curvature_weighted", "constants.neighbours")
        for bad in (0, -1.0, float("nan"), float("inf"), 1e-300, 1e300)
    ),
    ("curvature.uniformity", {"temperature": float("nan")}, "temperature is nan"),
    ("constants.refit", {"steps": 10**20}, "steps is 100000000000000000000; more than 1,000,000 would never end"),
    ("constants.refit", {"learning_rate": float("nan")}, "learning_rate is nan"),
    ("constants.newton", {"damping": float("nan")}, "damping is nan"),
    ("score.integrated", {"steps": 1e20}, r"steps is 1e\+20; it must be a whole number"),
    ("baselines.eap_ig", {"steps": 10**20}, "more than 1,000,000 would never end"),
    ("in_rounds", {"rounds": 10**20}, "rounds is 100000000000000000000; more than 1,000,000 would never end"),
    ("constants.neighbours", {"draws": 10**20}, "draws is 100000000000000000000; more than"),
    ("constants.neighbours", {"ridge": float("inf")}, "ridge is inf"),
    ("sparsify_affine", {"ridge": float("nan")}, "ridge is nan"),
]


@pytest.mark.parametrize(("name", "settings", "says"), NUMBERS)
def test_numbers_that_are_none_or_never_end_are_refused(name: str, settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        entries(bridge(), examples(4), units_of(bridge()), reduction_of(bridge()))[name](**settings)


@pytest.mark.parametrize("bad", [1.5, "0", None, float("nan"), True, 2**63, torch.Generator()])
def test_a_draw_needs_a_whole_seed(bad: Any):
    with pytest.raises(ValueError, match=r"seed is .*; it must be a whole number of at most 63 bits"):
        _random.uniform(bad, 1)


# Examples


def test_a_mask_of_whole_numbers_is_the_mask_of_bools():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = Examples(TOKENS, LABELS, mask.to(dtype))
        assert found.attention_mask is not None and found.attention_mask.dtype == torch.bool
        assert torch.equal(found.attention_mask, mask.bool())
    model = bridge()
    one, two = Examples(TOKENS, LABELS, mask), Examples(TOKENS, LABELS, mask.bool())
    for method in (constants.mean, constants.curvature_weighted):
        assert method(model, one, units_of(model)) == method(model, two, units_of(model))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 2]] * 3)}, "attention_mask is of torch.int64; it must be bool"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask is of torch.float32; it must be bool"),
        (
            {"attention_mask": torch.tensor([[True] * 4, [False] * 4, [True] * 4])},
            r"attention_mask is false everywhere in 1 of 3 examples \(first: 1\)",
        ),
        (
            {"attention_mask": torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])},
            r"attention_mask hides the labelled position of 1 of 3 examples \(first: 2\)",
        ),
        ({"labels": LABELS.double()}, r"labels is of torch.float64; token ids are whole numbers: give labels.long\(\)"),
        ({"labels": LABELS > 0}, "labels is of torch.bool"),
        ({"labels": LABELS.tolist()}, r"labels is a list; it must be a tensor: give torch.tensor\(labels\)"),
        ({"labels": LABELS.numpy()}, "labels is a ndarray; it must be a tensor"),
        ({"tokens": TOKENS.numpy()}, "tokens is a ndarray; it must be a tensor"),
        ({"tokens": TOKENS.bool()}, "tokens is of torch.bool; token ids are int64"),
        ({"tokens": TOKENS.to(torch.complex64)}, "tokens is of torch.complex64"),
        ({"tokens": torch.tensor(3)}, "tokens has no example"),
        ({"choices": torch.tensor([1.0, 2.0])}, "choices is of torch.float32"),
        ({"choices": torch.tensor([[1, 2]])}, r"choices has shape \(1, 2\); it must be \[k\]"),
        ({"choices": torch.zeros(0, dtype=torch.long)}, r"choices has shape \(0,\)"),
        ({"counterfactual_labels": LABELS.float()}, "counterfactual_labels is of torch.float32"),
    ],
)
def test_parts_of_other_types_are_refused(changes: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Examples(**{"tokens": TOKENS, "labels": LABELS} | changes)


def test_labels_of_another_whole_type_are_taken():
    assert Examples(TOKENS, LABELS.int()).labels.dtype == torch.int64


def test_partners_of_other_length_are_refused():
    data = Examples(TOKENS, LABELS, torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]))
    check_pairs(data.with_partners(torch.tensor([0, 2, 1])))
    with pytest.raises(ValueError, match=r"counterfactual_tokens of 2 examples have another length.*rows 0, 1"):
        check_pairs(data.with_partners(torch.tensor([1, 0, 2])))


@pytest.mark.parametrize("mask", [torch.ones(14, dtype=torch.long), torch.ones(14), [True] * 14])
def test_a_circuit_has_a_mask_of_bools(mask: Any):
    with pytest.raises(ValueError, match=r"mask is a .*; it must be a bool tensor"):
        Circuit(units_of(bridge()), mask)


# Metrics


def test_a_metric_that_is_not_finite_is_refused():
    model, data = bridge(), examples(4)
    one = replace(data, labels=data.labels.where(data.labels < 0, 3), choices=torch.tensor([3]))
    reduction = reduction_of(model)
    for call in (
        lambda: tls.risk(model, reduction, one, metric=log_odds),
        lambda: score.gradient(model, one, units_of(model)),
        lambda: score.exact(model, one, units_of(model), metric=log_odds, progress=False),
        lambda: tls.evaluate(model, reduction, one),
    ):
        with pytest.raises(ValueError, match=r"metric gave NaN or infinite numbers for .* rows .*one answer"):
            call()


@pytest.mark.parametrize("wrong", [lambda z, b: z.mean(), lambda z, b: z[:, :2], lambda z, b: 1.0])
def test_a_metric_gives_one_number_for_each_row(wrong: Any):
    model, data = bridge(), examples(4)
    for call in (
        lambda: tls.risk(model, reduction_of(model), data, metric=wrong),
        lambda: score.gradient(model, data, units_of(model), metric=wrong),
        lambda: tls.evaluate(model, reduction_of(model), data, metric=wrong),
    ):
        with pytest.raises(ValueError, match=r"metric gave shape .* one number for each labelled position"):
            call()


# A short list


def test_exact_scores_a_short_list_of_units_and_no_others():
    model, data = bridge(), examples(6)
    units = units_of(model)
    whole = score.exact(model, data, units, progress=False)
    names = ("L1H1", "L0N3", "L0N0", "L1N4")
    for size in (None, 1, 7):
        found = score.exact(model, data, [units[name] for name in names], batch_size=size, progress=False)
        scored = {name: s for name, s in zip(found.units.names, found.scores.tolist(), strict=True) if s == s}
        assert scored.keys() == set(names) and found.forward_passes == 4 + 2
        for name, number in scored.items():
            assert number == pytest.approx(float(whole.scores[units.index(name)]), rel=1e-9)
        assert "largest" in repr(found)
    for bad in ([], ["L0H0"]):
        with pytest.raises(ValueError, match=r"units is .*give (a )?Units"):
            score.exact(model, data, bad, progress=False)  # type: ignore[arg-type]


# Modes


def test_under_inference_mode_what_needs_no_gradient_works_and_the_rest_says_why_not():
    model, data = fresh(), examples(6)
    units = units_of(model)
    with torch.inference_mode():
        reduction = constants.reduced(model, reduction_of(model).circuit, constants.mean(model, data, units))
        inside, small = tls.risk(model, reduction, data).mean, fold(model, reduction)
        with pytest.raises(ValueError, match=r"torch.inference_mode\(\) is on, .* call this outside of it"):
            score.risk(model, data, units)
    assert inside == tls.risk(model, reduction, data).mean
    assert bool(torch.isfinite(score.risk(small, data, tls.neurons(small)).scores).all())
    assert bool(torch.isfinite(score.risk(model, data, units, values=reduction.values).scores).all())


# Threads


def test_threads_on_one_model_give_what_each_gives_alone():
    model, data = bridge(), examples(20)
    units = units_of(model)
    reductions = [reduction_of(model, seed=seed) for seed in range(3)]
    alone = [score.risk(model, data, units).scores.tolist(), *(tls.risk(model, r, data).mean for r in reductions)]
    with torch.no_grad():
        alone.append(answer_logits(model, data).tolist())
        alone.append(model(data.tokens).tolist())
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    found = (
                        lambda: score.risk(model, data, units).scores.tolist(),
                        *(lambda r=r: tls.risk(model, r, data).mean for r in reductions),
                        lambda: answer_logits(model, data).tolist(),
                        lambda: model(data.tokens).tolist(),
                    )[number]()
                if found != alone[number]:
                    wrong.append(number)
        except Exception as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(alone))]
    with unchanged(model):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_linear_model_without_positions_is_taken_as_ever():
    assert tls.risk(linear(), reduction_of_linear(), inputs(4)).mean >= 0


def reduction_of_linear() -> Any:
    model = linear()
    return constants.reduced(model, Circuit.empty(model.units), constants.mean(model, inputs(4), model.units))


@pytest.mark.parametrize("others", (3, 7))
@pytest.mark.parametrize(
    "name", sorted({*NAMES, "stability", "connections", "atp_star", "second_order", "evaluate scores"})
)
def test_positions_of_other_examples_are_refused(name: str, others: int):
    model, data = bridge(), examples(5, answers=2)
    units = units_of(model).at(torch.arange(others) % 4)
    first, second = (tls.Units(units.sites[part]) for part in (slice(1), slice(2, 3)))
    more: dict[str, Call] = {
        "evaluate scores": lambda: tls.evaluate(
            model, baselines.random(model, data, units), data, ablation="counterfactual", bootstrap=0
        ),
        "stability": lambda: tls.stability(baselines.activation_norm, model, data, units, fraction=0.5, draws=2),
        "connections": lambda: tls.connections(model, data, first, second),
        "atp_star": lambda: baselines.atp_star(model, data, units),
        "second_order": lambda: baselines.second_order(model, data, units, source="counterfactual"),
    }
    reduction = reduction_of(model, units=units_of(model))
    reduction = replace(
        reduction, circuit=Circuit(units, reduction.circuit.mask), values=replace(reduction.values, units=units)
    )
    says = rf"are places of {others} examples, and there are 5: take those of a part"
    with pytest.raises(ValueError, match=says):
        (entries(model, data, units, reduction) | more)[name]()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_a_number_of_numpy_s_is_a_number(kind: Any):
    model, batch = bridge(), examples(4)
    found = score.risk(model, batch, units_of(model), probes=1, temperature=kind(3))
    assert torch.equal(found.scores, score.risk(model, batch, units_of(model), probes=1, temperature=3.0).scores)
