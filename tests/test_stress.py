"""Stress tests on planted circuits: what is true holds, what is not fails, and on a null nothing follows."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_sparsify as tls
from tl_sparsify.stressing.alternatives import alternatives
from tl_sparsify.stressing.hypotheses import equivalence, hypotheses, independence, minimal
from tl_sparsify.stressing.measuring import Setting
from tl_sparsify.stressing.minimality import cheapest, minimality
from tl_sparsify.stressing.worst_case import worst_case

EQUALITY = ["L0H1", "L0H2", "L1H0", "L1H3", "L1N3", "L1N18", "L1N26"]
SUM = ["L0H0", "L0H2", "L1N1", "L1N5", "L1N9", "L1N13", "L1N17", "L1N21", "L1N25", "L1N29"]
FEW = Setting(draws=6, bootstrap=100)


@cache
def planted(name: str) -> tuple[Any, tls.Examples, tls.Examples, tls.Values]:
    """A task's model, train and test examples, and means."""
    task = tls.load_task(name)
    model = task.model()
    train, _, test = task.examples(0)
    return model, train[:128], test[:128], tls.constants.mean(model, train, tls.heads(model) + tls.neurons(model))


def reduction(name: str, kept: list[str]) -> tls.Reduction:
    model, _, _, values = planted(name)
    return tls.constants.reduced(model, tls.Circuit.of(values.units, kept), values)


def stands(lines: tuple[tls.StressRow, ...]) -> list[str]:
    return [str(line.stand) for line in lines]


@pytest.mark.parametrize(
    ("name", "kept", "shared", "each"),
    [
        ("planted_equality", EQUALITY, "holds", "holds"),
        ("planted_sum", [name for name in SUM if name not in ("L0H0", "L1N5", "L1N21", "L1N25")], "fails", "fails"),
        ("planted_backup", ["L0H0"], "cannot tell", "cannot tell"),  # nothing makes it worse
    ],
)
def test_the_worst_case_of_the_truth_is_its_risk_and_that_of_too_small_a_circuit_is_far_above(
    name: str, kept: list[str], shared: str, each: str
):
    model, train, test, _ = planted(name)
    lines = worst_case(model, reduction(name, kept), test[:32], FEW, train=train[:48], starts=4, steps=4)
    assert stands(lines) == [shared, each]
    assert lines[1].value >= tls.risk(model, reduction(name, kept), test[:32]).mean - 1e-12


@pytest.mark.slow
def test_ascent_finds_what_every_corner_is_tried_for():
    """Of five removed heads, two of which count."""
    model, _, test, values = planted("planted_equality")
    units = tls.heads(model)
    both = zip(values.units.sites, values.tensors, strict=True)
    means = tls.Values(units, tuple(tensor for site, tensor in both if site.kind == "head"))
    mine = tls.constants.reduced(model, tls.Circuit.of(units, ["L0H2", "L1H0", "L1H1"]), means)
    gone = (~mine.circuit.mask).nonzero().flatten()
    risks: list[float] = []
    for corner in itertools.product([False, True], repeat=len(gone)):
        mask = mine.circuit.mask.clone()
        mask[gone] = torch.tensor(corner)
        risks.append(tls.risk(model, mine.with_circuit(tls.Circuit(units, mask)), test[:48]).mean)
    line, own = worst_case(model, mine, test[:48], FEW, train=test[:48])
    assert line.value >= max(risks) * (1 - 1e-5)
    assert own.value >= line.value * (1 - 1e-5)  # a mask of its own is worse for each example than a shared one


def test_a_backup_is_an_alternative():
    model, train, test, _ = planted("planted_backup")
    for kept, other in (("L0H1", "L1H2"), ("L1H2", "L0H1")):
        [line] = alternatives(model, reduction("planted_backup", [kept]), test, FEW, train=train, rounds=6)
        assert line.stand == "fails" and other in line.because
    [line] = alternatives(model, reduction("planted_backup", ["L0H0"]), test, FEW, train=train, rounds=6)
    assert line.stand == "fails" and line.value < -1  # an idle head: far better ones are found


def test_a_single_mechanism_has_no_alternative():
    model, train, test, _ = planted("planted_equality")
    lines = alternatives(model, reduction("planted_equality", EQUALITY), test, FEW, train=train, rounds=6)
    assert [line.case for line in lines] == [f"at most {share} % shared" for share in (0, 25, 50)]
    assert stands(lines) == ["holds"] * 3


def test_where_any_circuit_does_as_well_alternatives_say_nothing():
    """Without both heads of the backup task all circuits of idle units are the same."""
    model, train, test, values = planted("planted_backup")
    units = values.units
    idle = tls.constants.reduced(model, tls.Circuit.of(units, ["L0H0", "L1N3"]), values)
    copies = tls.Circuit.of(units, ["L0H1", "L1H2"])
    dead = tls.Intervention(units, (~copies.mask).float(), values)
    with tls.intervened(model, dead):
        lines = alternatives(model, idle, test, FEW, train=train, rounds=4)
    assert stands(lines) == ["cannot tell"] * len(lines)


def test_a_unit_added_on_purpose_is_found_and_the_truth_is_minimal():
    model, train, test, _ = planted("planted_equality")
    assert stands(minimality(model, reduction("planted_equality", EQUALITY), test, FEW, train=train)) == ["holds"] * 2
    one, pair = minimality(model, reduction("planted_equality", [*EQUALITY, "L0H0"]), test, FEW, train=train)
    assert one.stand == "fails" and "L0H0 can leave" in one.because and pair.stand == "holds"
    two = reduction("planted_equality", [*EQUALITY, "L0H0", "L1N5"])
    _, pair = minimality(model, two, test, FEW, train=train)
    assert pair.stand == "fails" and {"L0H0", "L1N5"} <= set(pair.because.split())
    model, train, test, _ = planted("planted_backup")
    one, pair = minimality(model, reduction("planted_backup", ["L0H1", "L1H2"]), test, FEW, train=train)
    assert one.stand == "fails" and "L1H2" in one.because  # each alone suffices
    assert pair.stand == "holds"


@pytest.mark.parametrize("size", [1, 2])
def test_the_cheapest_is_that_of_trying_all(size: int):
    """Two neurons of this circuit make up for each other: no single one is as cheap as the pair."""
    model, train, _, _ = planted("planted_sum")
    whole = reduction("planted_sum", SUM)
    found = cheapest(model, whole, train, size, 24, FEW)
    kept = whole.circuit.mask.nonzero().flatten().tolist()

    def risk(gone: tuple[int, ...]) -> float:
        mask = whole.circuit.mask.clone()
        mask[list(gone)] = False
        return tls.risk(model, whole.with_circuit(tls.Circuit(whole.units, mask)), train).mean

    least = min(itertools.combinations(kept, size), key=risk)
    assert set(found) == set(least)


def test_hypotheses_pass_the_truth_and_refute_what_is_not():
    model, _, test, _ = planted("planted_equality")
    many = Setting(draws=20, bootstrap=0)  # of six random units an idle one can beat enough to pass
    found = {line.case: line for line in hypotheses(model, reduction("planted_equality", EQUALITY), test, many)}
    given = "independence, given the answer"
    assert found[given].stand == found["minimality"].stand == "holds"
    assert found["independence"].stand == "fails"  # both scores depend on the answer: refuted although it is the truth
    assert all(line.control_p_value < 0.05 for line in found.values())
    padded = [*EQUALITY, "L0H0"]
    found = {line.case: line for line in hypotheses(model, reduction("planted_equality", padded), test, many)}
    assert found["minimality"].stand == "fails" and "L0H0" in found["minimality"].because
    short = {line.case: line for line in hypotheses(model, reduction("planted_equality", EQUALITY[1:]), test, many)}
    assert short["equivalence"].stand == short["equivalence beyond the tolerance"].stand == "fails"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_equivalence_is_the_sum_over_more_uneven_counts(n: int, wins: int, ties: int):
    wins, ties = min(wins, n), min(ties, n - min(wins, n))
    difference = torch.tensor([1.0] * wins + [0.0] * ties + [-1.0] * (n - wins - ties), dtype=torch.float64)
    share, p = equivalence(difference, 1e-6)
    assert share == pytest.approx((wins + ties / 2) / n)
    more = [k for k in range(n + 1) if abs(k / n - 0.5) >= abs(share - 0.5) - 1e-12]
    assert p == pytest.approx(min(1, sum(math.comb(n, k) * 0.6**k * 0.4 ** (n - k) for k in more)), rel=1e-9)


def test_the_criterion_is_that_of_the_dense_kernels_and_its_p_values_are_even_where_nothing_depends():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    kernels: list[torch.Tensor] = []
    for score in (one, two):
        apart = (score[:, None] - score).abs()
        kernels.append((-apart.square() / (2 * float(apart[apart > 0].median()) ** 2)).exp())
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    dense = float((centre @ kernels[0] @ centre * kernels[1]).sum()) / 39**2
    assert independence(one, two, 0)[0] == pytest.approx(dense, rel=1e-4)
    pairs = torch.randn(60, 2, 40, generator=generator, dtype=torch.float64)
    nulls = [independence(pair[0], pair[1], seed)[1] for seed, pair in enumerate(pairs)]
    assert sum(p < 0.05 for p in nulls) <= 8  # three are expected; nine or more come in one of two hundred tests
    assert 0.35 < sum(nulls) / 60 < 0.65
    assert independence(one, one.square() + 0.1 * two, 0)[1] < 0.01  # uncorrelated, but dependent


def test_a_common_cause_is_dependence_until_it_is_given():
    generator = torch.Generator().manual_seed(1)
    cause = torch.arange(80) % 4
    noise = torch.randn(2, 80, generator=generator, dtype=torch.float64)
    one, two = cause + 0.3 * noise[0], cause + 0.3 * noise[1]
    assert independence(one, two, 0)[1] < 0.01 < 0.05 < independence(one, two, 0, cause)[1]
    assert independence(one, one + 0.1 * noise[1], 0, cause)[1] < 0.01


def test_minimality_by_hand():
    at_random = torch.arange(10, dtype=torch.float64)
    p, which = minimal(torch.tensor([20.0, 0.5], dtype=torch.float64), at_random)  # beats ten, beats one
    assert which == 1 and p == pytest.approx(2 * (0.1**10 + 10 * 0.9 * 0.1**9))
    assert minimal(torch.tensor([20.0], dtype=torch.float64), at_random) == (1.0, 0)


def test_the_table_names_what_is_left_out_and_does_not_depend_on_batches():
    model, train, test, values = planted("planted_equality")
    whole = tls.Reduction(tls.Circuit.full(values.units), values)
    table = tls.stress(model, whole, test, rows=("worst case", "alternatives", "hypotheses"))
    assert not table.rows and set(table.left_out) == {"worst case", "alternatives", "hypotheses"}
    mine = reduction("planted_equality", EQUALITY)
    shared: dict[str, Any] = {"rows": ("minimality",), "train": train[:16], "draws": 2, "bootstrap": 20}
    one, two = (tls.stress(model, mine, test[:16], **shared, batch_size=size) for size in (None, 7))
    few: dict[str, Any] = {"train": train[:16], "starts": 2, "steps": 2}
    worst = [
        worst_case(model, mine, test[:16], Setting(draws=2, bootstrap=20, batch_size=size), **few) for size in (None, 7)
    ]
    for first, second in zip((*one.rows, *worst[0]), (*two.rows, *worst[1]), strict=True):
        assert (first.stand, first.because.split(";")[0]) == (second.stand, second.because.split(";")[0])
        assert first.value == pytest.approx(second.value, rel=1e-4, abs=1e-9)
    assert len(one["minimality"]) == 2


def test_what_is_no_test_is_refused_and_the_model_stays_what_it_was():
    model, _, test, _ = planted("planted_equality")
    mine = reduction("planted_equality", EQUALITY)
    before = model(test.tokens)
    wrong: list[tuple[dict[str, Any], str]] = [({"rows": ("worst",)}, "worst case"), ({"tolerance": 0.0}, "is 0")]
    for changed, said in [*wrong, ({"draws": 0}, "draws")]:
        with pytest.raises(ValueError, match=said):
            tls.stress(model, mine, test, **changed)
    with pytest.raises(ValueError, match="examples holds 3"):
        tls.stress(model, mine, test[:3], rows=("minimality",))

    def broken(logits: Any, batch: Any) -> Any:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        tls.stress(model, mine, test, rows=("worst case",), metric=broken)
    assert torch.equal(model(test.tokens), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
