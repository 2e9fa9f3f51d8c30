"""Edges and what else is done to the model around them: contexts within contexts, readers within readers, the runs that
values are from, and what is left when all is over."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import architectures
from helpers.edges import constants_of, run_by_hand
from helpers.models import NoCasts, unchanged
from helpers.native import fresh, native
from torch import Tensor

import tl_sparsify as tls
from tl_sparsify.core.metrics import log_odds

READERS: dict[str, dict[str, Any]] = {
    "parts": {},
    "heads": {"readers": "head"},
    "layers": {"readers": "layer"},
    "parts of each head": {"grouped": False},
    "each head": {"readers": "head", "grouped": False},
}


def model_of(name: str) -> Any:
    return native() if name == "native" else architectures.bridge(name)


def logits(model: Any, tokens: Tensor, *interventions: tls.Intervention) -> Tensor:
    with torch.no_grad(), NoCasts(), tls.intervened(model, *interventions):
        return model(tokens)


def into_attention(model: Any, readers: str) -> tls.Units:
    """Without the edges into MLPs and logits, which all kinds of readers have in common."""
    units = tls.edges(model, **READERS[readers])
    return tls.Units(tuple(site for site in units.sites if ".attn." in site.hook))


def without(names: list[str], values: tls.Values) -> tls.Intervention:
    return tls.Intervention(values.units, (~tls.Circuit.of(values.units, names)).mask.double(), values)


def some_edges(model: Any) -> tls.Intervention:
    units = tls.edges(model)
    late = "L2G1.v" if "L0H1->L2G1.v" in units.names else "L2H1.v"
    edges = ["embed->L1MLP", "L0H1->L1MLP", f"L0H1->{late}", f"L0MLP->{late}", "L0H0->logits", "L0MLP->logits"]
    return without(edges, constants_of(model, units))


def nodes_of(model: Any, kind: str) -> tls.Intervention:
    if kind == "stream":
        units = tls.Units((tls.Site("residual", 0, "blocks.0.hook_resid_pre", 1),))
    else:
        units = tls.heads(model) if kind == "heads" else tls.mlps(model)
    names = {"heads": ["L0H0", "L0H1", "L1H1"], "mlps": ["L0MLP"], "stream": list(units.names)}[kind]
    return without(names, tls.constants.mean(model, architectures.batch(), units))


@pytest.mark.parametrize("kind", ("heads", "mlps", "stream"))
@pytest.mark.parametrize("name", ("native", "Llama", "Pythia", "Gemma 2"))
def test_what_is_done_within_a_context_of_edges_reaches_what_they_read(name: str, kind: str):
    model, tokens = model_of(name), architectures.batch(n=3).tokens
    edges, nodes = some_edges(model), nodes_of(model, kind)
    together = logits(model, tokens, edges, nodes)
    with unchanged(model), tls.intervened(model, edges):
        for _ in range(2):
            assert float((logits(model, tokens, nodes) - together).abs().max()) < 1e-12
        assert float((logits(model, tokens) - together).abs().max()) > 1e-3
    with tls.intervened(model, nodes):
        assert float((logits(model, tokens, edges) - together).abs().max()) < 1e-12


def test_a_head_within_a_context_of_edges_is_what_a_sum_for_each_reader_gives():
    model, tokens = native(), architectures.batch(n=3).tokens
    edges, heads = some_edges(model), tls.heads(model)
    constants = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    head = without(["L0H1"], tls.Values(heads, (constants,) * 3))
    named = dict(zip(edges.units.sites[-1].writers, edges.values.tensors[-1], strict=True))
    kept = {edge for edge, there in zip(edges.units.names, edges.keep.tolist(), strict=True) if there}
    writes = {"L0H1": (constants[1] @ model.blocks[0].attn.W_O[1]).expand(*tokens.shape, -1)}
    with torch.no_grad():
        expected, _ = run_by_hand(model, tokens, kept, named, writes)
    with tls.intervened(model, edges):
        assert float((logits(model, tokens, head) - expected).abs().max()) < 1e-10


def test_scores_within_a_context_of_edges_are_differences_whatever_the_batches():
    model, examples = native(), architectures.batch(n=6)
    edges, heads = some_edges(model), tls.heads(model)
    units = tls.Units(edges.units.sites[-1:]) + heads
    values = tls.constants.mean(model, examples, heads)
    with NoCasts(), tls.intervened(model, edges):
        exact = [tls.score.exact(model, examples, units, batch_size=size, progress=False).scores for size in (6, 4)]
        found = tls.score.gradient(model, examples, heads, values=values).scores
    assert torch.allclose(*exact, rtol=1e-9, atol=1e-12)
    for number in range(len(heads)):
        ends: list[Tensor] = []
        for step in (1e-5, -1e-5):
            keep = torch.ones(len(heads), dtype=torch.float64)
            keep[number] += step
            rows = logits(model, examples.tokens, edges, tls.Intervention(heads, keep, values))[:, -1]
            ends.append(log_odds(rows[:, examples.choices], examples).mean())
        assert abs(abs(float(ends[0] - ends[1])) / 2e-5 - abs(float(found[number]))) < 1e-7


MIXED = [
    ("layers", "embed->L1ATTN", "parts", "L0H0->L1H0.q"),
    ("heads", "embed->L1G0", "parts", "L0H0->L1H1.q"),
    ("layers", "embed->L1ATTN", "heads", "L0H0->L1G0"),
    ("each head", "embed->L1H1", "parts", "L0H0->L1H1.q"),
    ("layers", "embed->L1ATTN", "parts of each head", "L0H0->L1H1.k"),
]


@pytest.mark.parametrize(("first", "one", "second", "other"), MIXED)
def test_readers_within_readers_are_refused_where_both_lose_edges(first: str, one: str, second: str, other: str):
    model, tokens = architectures.bridge("Llama"), architectures.batch(n=2).tokens
    units, more = into_attention(model, first), into_attention(model, second)
    a, b = without([one], constants_of(model, units)), without([other], constants_of(model, more))
    both = units + more
    joined = tls.Values(both, a.values.tensors + b.values.tensors)
    with unchanged(model):
        says = r"readers of block 1 of the kinds (head|layer) and (layer|qkv), .*tls\.edges\(model, readers=\.\.\.\)"
        for some in ((a, b), (b, a), (tls.Intervention(both, torch.cat([a.keep, b.keep]), joined),)):
            with pytest.raises(ValueError, match=says):
                logits(model, tokens, *some)
        for outer, inner in ((a, b), (b, a)):
            with pytest.raises(ValueError, match=says), tls.intervened(model, outer):
                logits(model, tokens, inner)
    for name, alone in ((one, a), (other, b)):  # units of both kinds are fine where one kind is left as it is
        assert torch.equal(logits(model, tokens, without([name], joined)), logits(model, tokens, alone))


@pytest.mark.parametrize("readers", ("heads", "layers"))
def test_readers_within_readers_are_refused_where_both_are_scored(readers: str):
    model, examples = native(), architectures.batch(n=2)
    units = into_attention(model, readers) + into_attention(model, "parts")
    with unchanged(model), pytest.raises(ValueError, match=r"readers of block 0 of the kinds .* remove or score those"):
        tls.score.gradient(model, examples, units, values=constants_of(model, units))


@pytest.mark.parametrize("shape", ((1, 5), (3, 1), (2, 5)))
def test_edges_take_no_values_of_a_run_of_another_shape(shape: tuple[int, int]):
    model, tokens = native(), architectures.batch(n=3).tokens
    base = tls.Examples(tokens[:, :5], tokens[:, :5])
    other = base.tokens[: shape[0], : shape[1]]
    units = tls.edges(model)
    source = tls.run_values(model, tls.Examples(other, other), units)
    with unchanged(model), pytest.raises(ValueError, match=rf"values of blocks\.1\.attn\.q\.edges.*\({shape[0]}, "):
        logits(model, base.tokens, tls.interchange(tls.Circuit.of(units, ["L0H1->L1H0.q"]), source))


PASSES: dict[str, Callable[[Any, tls.Examples, tls.Reduction], Any]] = {
    "gradient": lambda model, examples, reduction: tls.score.gradient(
        model, examples, reduction.units, values=reduction.values
    ),
    "risk of each": lambda model, examples, reduction: tls.score.risk(
        model, examples, reduction.units, values=reduction.values
    ),
    "risk": lambda model, examples, reduction: tls.risk(model, reduction, examples),
    "paths": lambda model, examples, reduction: tls.patch_paths(
        model, examples, ["L0H1->L1H2.v->logits"], source="shuffled", progress=False
    ),
}


def streams_of(model: Any, tokens: Tensor) -> list[Tensor]:
    """What is alive of the shape of this model's stream on these tokens."""
    gc.collect()
    there = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return [x for x in there if x.ndim > 2 and x.shape[:2] == tokens.shape and x.shape[-1] == model.cfg.d_model]


@pytest.mark.parametrize("kind", PASSES)
def test_nothing_of_a_pass_stays_when_the_call_is_over(kind: str):
    model, examples = fresh(), architectures.batch(n=3)
    units = tls.edges(model)
    kept = tls.Circuit(units, torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.7)
    reduction = tls.constants.reduced(model, kept, constants_of(model, units))
    before = streams_of(model, examples.tokens)
    PASSES[kind](model, examples, reduction)
    assert len(streams_of(model, examples.tokens)) == len(before)


def test_nothing_of_a_pass_stays_when_it_fails():
    model, examples = fresh(), architectures.batch(n=2)
    before = streams_of(model, examples.tokens)

    def fail(out: Tensor, hook: Any) -> None:
        raise RuntimeError("stopped")

    with unchanged(model), tls.intervened(model, some_edges(model)):
        with pytest.raises(RuntimeError, match="stopped"), model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]):
            model(examples.tokens)
    assert len(streams_of(model, examples.tokens)) == len(before)


def one_after_the_other(first: tls.Intervention, second: tls.Intervention) -> tls.Intervention:
    """What ``second`` does to what ``first`` made of each edge, as one intervention."""
    keep = first.keep * second.keep
    values: list[Tensor] = []
    for site, k, m, v, w in zip(
        first.units.sites,
        first.units.split(first.keep),
        first.units.split(second.keep),
        first.values.tensors,
        second.values.tensors,
        strict=True,
    ):
        k, m = (part.view(len(site.readers), site.rows)[0, :, None] for part in (k, m))  # of all readers alike
        values.append(((m * (1 - k) * v + (1 - m) * w) / (1 - k * m).clamp_min(1e-12)).to(v))
    return tls.Intervention(first.units, keep, tls.Values(first.units, tuple(values)))


def of_each_writer(model: Any, readers: str, seed: int) -> tls.Intervention:
    """Of each edge a share that is its writer's: none, some or all of it; whoever reads."""
    units = tls.edges(model, **READERS[readers])
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(max(site.rows for site in units.sites), generator=generator, dtype=torch.float64)
    share = (2 * share - 0.5).clamp(0, 1)
    keep = torch.cat([share[: site.rows].repeat(len(site.readers)) for site in units.sites])
    return tls.Intervention(units, keep, constants_of(model, units, seed))


@pytest.mark.parametrize("readers", ("parts", "heads", "layers", "parts of each head"))
@pytest.mark.parametrize("name", ("native", "Llama", "Pythia", "Gemma 2"))
def test_what_is_removed_twice_is_gone_once(name: str, readers: str):
    model, tokens = model_of(name), architectures.batch(n=3).tokens
    a, b, c = (of_each_writer(model, readers, seed) for seed in (1, 2, 3))
    expected = logits(model, tokens, one_after_the_other(one_after_the_other(a, b), c))
    assert float((logits(model, tokens, a, b, c) - expected).abs().max()) < 1e-10
    with unchanged(model), tls.intervened(model, a), tls.intervened(model, b):
        assert float((logits(model, tokens, c) - expected).abs().max()) < 1e-10


def test_what_is_removed_at_a_place_and_everywhere_is_gone_once_there():
    model, tokens = native(), architectures.batch(n=3).tokens
    everywhere = some_edges(model)
    units = everywhere.units.at(2)
    there = tls.Intervention(units, everywhere.keep, tls.Values(units, constants_of(model, units, 5).tensors))
    late = tls.Intervention(everywhere.units, everywhere.keep, tls.Values(everywhere.units, there.values.tensors))
    found, before, after = (
        logits(model, tokens, *some) for some in ((everywhere, there), (everywhere,), (everywhere, late))
    )
    assert torch.equal(found[:, :2], before[:, :2]) and not torch.allclose(found[:, 2], before[:, 2])
    assert float((logits(model, tokens, late) - after).abs().max()) < 1e-10
    assert float((logits(model, tokens, there, everywhere) - before).abs().max()) < 1e-10


def test_slopes_of_what_is_removed_twice_are_differences():
    model, examples = native(), architectures.batch(n=3)
    first, second = of_each_writer(model, "parts", 1), of_each_writer(model, "parts", 2)
    keep = torch.rand(len(second.units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gap(keep: Tensor) -> Tensor:
        with tls.intervened(model, first, tls.Intervention(second.units, keep, second.values)):
            return log_odds(model(examples.tokens)[:, -1][:, examples.choices], examples).mean()

    wanted = keep.clone().requires_grad_()
    (slope,) = torch.autograd.grad(gap(wanted), wanted)
    with torch.no_grad():
        for number in (0, 7, 30, 101, len(keep) - 2):
            step = torch.zeros_like(keep).index_fill_(0, torch.tensor([number]), 1e-5)
            assert abs(float(gap(keep + step) - gap(keep - step)) / 2e-5 - float(slope[number])) < 1e-7
