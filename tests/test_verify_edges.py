"""Verification of a circuit of edges: what is interchanged travels through kept edges only."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.edges import constants_of, run_by_hand
from helpers.models import NoCasts, unchanged
from helpers.verification import PARITY, native, native_pairs, row
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.abstraction import align as search
from tl_sparsify.abstraction.interchange import TestedModel, logits

HEAD, EDGES = "L0H1", ("L0H1->L1H2.v", "L0H1->L1MLP", "L0H3->L1H0.q", "L0MLP->logits")


@cache
def setting() -> tuple[Any, tls.Reduction, dict[str, Tensor]]:
    """A model, a circuit of most edges, without some from the head, and its constants by writer."""
    model = native()
    units = tls.edges(model)
    values = constants_of(model, units)
    mask = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.8
    circuit = tls.Circuit(units, mask) - tls.Circuit.of(units, ["L0H1->logits", "L0H1->L1H0.k"])
    circuit = circuit | tls.Circuit.of(units, EDGES)
    named = dict(zip(units.sites[-1].writers, values.tensors[-1], strict=True))
    return model, tls.Reduction(circuit, values, fingerprint=tls.fingerprint(model)), named


def of_head(at: Any = None) -> list[tls.Unit]:
    return [tls.heads(setting()[0])[HEAD].at(at)]


def of_edges(at: Any = None) -> list[tls.Unit]:
    return [tls.edges(setting()[0])[name].at(at) for name in EDGES]


def interchanged_by_hand(pairs: tls.Pairs, which: str, at: int | None) -> Tensor:
    """The logits of the circuit on the bases with a head or four edges from its run on the sources."""
    model, reduction, constants = setting()
    kept = set(reduction.circuit.names)
    _, own = run_by_hand(model, pairs.base.tokens, kept, constants)
    _, theirs = run_by_hand(model, pairs.source.tokens, kept, constants)
    if which == "head":
        mixed = placed(own[HEAD], theirs[HEAD], at)
        return run_by_hand(model, pairs.base.tokens, kept, constants, writes={HEAD: mixed})[0]
    given: dict[str, Tensor] = {}
    for name in EDGES:  # one after the other: what a writer writes depends on the edges before it
        _, now = run_by_hand(model, pairs.base.tokens, kept, constants, gives=given)
        writer = name.partition("->")[0]
        given[name] = placed(now[writer], theirs[writer], at)
    return run_by_hand(model, pairs.base.tokens, kept, constants, gives=given)[0]


def placed(own: Tensor, theirs: Tensor, at: int | None) -> Tensor:
    """The other's at a position, or everywhere."""
    mixed = theirs.clone() if at is None else own.clone()
    if at is not None:
        mixed[:, at] = theirs[:, at]
    return mixed


@pytest.mark.parametrize("at", [None, 1])
@pytest.mark.parametrize("which", ["head", "edges"])
def test_an_interchange_in_a_circuit_of_edges_is_a_forward_pass_by_hand(which: str, at: int | None):
    model, reduction, _ = setting()
    pairs = native_pairs(12)
    chosen = of_head(at) if which == "head" else of_edges(at)
    sites = tls.Units(tuple(dict.fromkeys(unit.site for unit in chosen)))
    circuit = tls.Circuit.of(sites, [unit.name for unit in chosen])
    with torch.no_grad(), NoCasts(), unchanged(model):
        with tls.intervened(model, tls.ablate(reduction)):
            source = tls.run_values(model, pairs.source, sites)
        with tls.intervened(model, tls.interchange(circuit, source), tls.ablate(reduction)):
            found = model(pairs.base.tokens)
        with tls.intervened(model, tls.ablate(reduction)):
            before = model(pairs.base.tokens)
    torch.testing.assert_close(found, interchanged_by_hand(pairs, which, at), rtol=1e-9, atol=1e-10)
    assert float((found - before).abs().max()) > 1e-4


def test_removed_edges_take_what_each_input_s_own_counterfactual_gives():
    model, reduction, _ = setting()
    pairs = native_pairs(12)
    pairs = replace(
        pairs,
        base=replace(pairs.base, counterfactual_tokens=pairs.base.tokens.roll(1, 0)),
        source=replace(pairs.source, counterfactual_tokens=pairs.source.tokens.roll(5, 0)),
    )
    every, kept = set(reduction.units.names), set(reduction.circuit.names)
    base, source = (
        run_by_hand(model, side.counterfactuals.tokens, every, {})[1] for side in (pairs.base, pairs.source)
    )
    theirs = run_by_hand(model, pairs.source.tokens, kept, source)[1][HEAD]
    expected = run_by_hand(model, pairs.base.tokens, kept, base, writes={HEAD: theirs})[0]
    paired = replace(reduction, values=tls.constants.counterfactual(model, pairs.base, reduction.units))
    subject = TestedModel("reduced", model, removal=paired)
    for size in (None, 5):
        with NoCasts():
            [found] = logits(subject, pairs.base, [[(of_head(), pairs.source)]], batch_size=size)
        torch.testing.assert_close(found, expected[:, -1, :4], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="examples have no counterfactual_tokens"):
        tls.verify(model, PARITY, tls.Alignment({"odd": of_head()}), native_pairs(4), reduced=paired)


@pytest.mark.parametrize("which", ["head", "edges"])
def test_the_evidence_is_what_the_forward_pass_by_hand_answers(which: str):
    model, reduction, constants = setting()
    pairs = native_pairs(40)
    kept = set(reduction.circuit.names)

    def answers(rows: Tensor) -> Tensor:
        return rows[:, -1, :4].argmax(1)

    expected = pairs.expected(PARITY, ("odd",))
    right = torch.ones(len(pairs), dtype=torch.bool)
    for side in (pairs.base, pairs.source):
        right &= answers(run_by_hand(model, side.tokens, kept, constants)[0]) == side.labels[:, -1]
    hits = (answers(interchanged_by_hand(pairs, which, None)) == expected)[right]
    alignment = tls.Alignment({"odd": of_head() if which == "head" else of_edges()})
    evidence = tls.verify(model, PARITY, alignment, pairs, reduced=reduction, draws=0)
    found = row(evidence, "odd", "reduced")
    assert found.pairs == int(right.sum()) > 0
    assert found.accuracy == pytest.approx(float(hits.double().mean()))
    assert (found.units, found.removed) == (len(alignment.units["odd"]), 0)


def test_what_no_variable_is_aligned_with_are_the_other_edges():
    model, reduction, _ = setting()
    pairs = native_pairs(6)
    alignment = tls.Alignment({"odd": of_edges(), "more": [tls.neurons(model)["L0N3"]]})
    evidence = tls.verify(model, PARITY, alignment, pairs, reduced=reduction, draws=0)
    every = tls.edges(model).names
    free = [name for name in every if name not in EDGES and not name.startswith("L0MLP->")]
    assert row(evidence, "(none)", "original", "all unaligned units").units == len(free)
    there = len(set(free) & set(reduction.circuit.names))
    assert row(evidence, "(none)", "reduced", "all unaligned units").units == there < len(free)


def test_the_search_for_an_alignment_sees_what_each_kept_edge_does(monkeypatch: pytest.MonkeyPatch):
    """Its first-order effects at the base against small steps, edge by edge and position by position."""
    monkeypatch.setattr(search, "LEVELS", (1.0,))
    model, reduction, _ = setting()
    pairs, units, wanted = native_pairs(3), tls.edges(model), "odd"
    subject = TestedModel("reduced", model, removal=reduction)
    expected = pairs.expected(PARITY, (wanted,))
    with torch.no_grad(), NoCasts(), tls.intervened(model, tls.ablate(reduction)):
        source = tls.run_values(model, pairs.source, units)
    with NoCasts():
        found = search.effects(subject, PARITY, pairs, units, (wanted,), None)[wanted]

    def odds(name: str, position: int, share: float) -> float:
        keep = torch.ones(len(units), dtype=torch.float64)
        keep[units.index(name)] -= share
        step = tls.Intervention(units.at(position), keep, tls.Values(units.at(position), source.tensors))
        with torch.no_grad(), NoCasts(), tls.intervened(model, step, tls.ablate(reduction)):
            rows = model(pairs.base.tokens)[:, -1, :4]
        others = rows.scatter(1, expected[:, None], float("-inf")).logsumexp(1)
        return float((rows.gather(1, expected[:, None])[:, 0] - others).mean())

    for name, position in (("L0H1->L1H2.v", 1), ("L0H1->L1MLP", 3), ("L0MLP->logits", 3)):
        site = next(i for i, part in enumerate(units.slices) if part.start <= units.index(name) < part.stop)
        slope = (odds(name, position, 1e-4) - odds(name, position, -1e-4)) / 2e-4
        mine = float(found[site][position, units.index(name) - units.offsets[site]])
        assert mine == pytest.approx(slope, rel=1e-5)
