"""Edge attribution, against TransformerLens's edge by edge, and EAP-IG against a transformer of the test's own in plain
torch, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import batch as prompts
from helpers.architectures import bridge as architecture
from helpers.architectures import fresh as fresh_architecture
from helpers.architectures import padded
from helpers.kinds import close
from helpers.models import NoCasts, bridge, examples, fresh, linear, reduction_of, unchanged, unchecked, units_of
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch

from tl_sparsify import baselines, score
from tl_sparsify.comparison.edge_attribution import Edges, eap, eap_ig, edge_attribution
from tl_sparsify.core.basis import directions
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.intervene import ablate, intervened
from tl_sparsify.core.metrics import log_odds
from tl_sparsify.core.units import Units, attentions, heads, mlps, neurons, residuals


def paired(n: int = 3) -> Examples:
    """Prompts for the architectures of Hugging Face configs, each with another one as its counterfactual."""
    return prompts(n).with_partners(torch.arange(n).roll(1))


def everything(model: Any) -> Units:
    return heads(model) + neurons(model) + mlps(model) + attentions(model)


def swapped(batch: Examples) -> Examples:
    """The counterfactuals as the examples, with the examples' right answers."""
    assert batch.counterfactual_tokens is not None
    return replace(batch, tokens=batch.counterfactual_tokens, counterfactual_tokens=batch.tokens)


def theirs(model: Any, clean: Tensor, corrupt: Tensor, batch: Examples) -> dict[tuple[str, str], float]:
    """TransformerLens's edges, summed over positions, by the names of unit and reader."""
    calls = iter([i for i in range(len(batch)) for _ in range(2)])  # each pair: the clean run, then the corrupt one

    def metric(logits: Tensor) -> Tensor:
        one = next(calls)
        rows = logits[:, -1] if batch.choices is None else logits[:, -1][:, batch.choices]
        return log_odds(rows, batch[one : one + 1])[0]

    def writer(node: Node) -> str:
        return {"attn_head_out": f"L{node.layer}H{node.head}", "mlp_out": f"L{node.layer}MLP"}.get(node.kind, node.kind)

    def reader(node: Node) -> str:
        names = {"mlp_in": f"L{node.layer}MLP", "logits": "logits"}
        return names.get(node.kind, f"L{node.layer}H{node.head}.{node.kind[0]}")

    found: dict[tuple[str, str], float] = {}
    edges = attribution_patch(model, clean, corrupt, metric, EdgeAttributionConfig(granularity="edge")).edge_scores
    for (u, r), value in edges.items():
        found[writer(u), reader(r)] = found.get((writer(u), reader(r)), 0.0) + value
    return found


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "GPT-NeoX, sequential"])
def test_every_edge_is_transformer_lens_s(name: str, direction: Any):
    model, batch = fresh_architecture(name), paired()
    with NoCasts():
        ours = edge_attribution(model, batch, heads(model) + mlps(model), direction=direction)
        other = batch.counterfactual_tokens
        clean, corrupt, sign = (other, batch.tokens, -1) if direction == "noising" else (batch.tokens, other, 1)
        expected = theirs(model, clean, corrupt, batch)
    shown = 0
    for u, unit in enumerate(ours.units.names):
        for r, reader in enumerate(ours.readers):
            assert float(ours.scores[u, r]) == pytest.approx(sign * expected.get((unit, reader), 0.0), rel=1e-8)
            shown += (unit, reader) in expected
    assert shown == sum(name[0] != "embed" for name in expected) > 300  # and there are no others


NORMS = {"no norms": None, "LayerNorm": "LN", "RMS": "RMS"}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_signed_sum_of_a_unit_s_edges_is_attribution_patching_again(norm: str, direction: Any):
    model, batch = bridge(normalization_type=NORMS[norm]), examples(5, answers=2)
    with NoCasts():
        for units in (
            everything(model),
            everything(model).at((1, 4)),
            neurons(model).at(torch.tensor([4, 0, 3, 1, 2])),
        ):
            found = edge_attribution(model, batch, units, direction=direction)
            if direction == "noising":
                expected = score.gradient(model, batch, units, source="counterfactual").scores
            else:
                expected = -score.gradient(model, swapped(batch), units, source="counterfactual").scores
            assert expected.abs().max() > 1e-2 and close(found.scores.sum(1), expected)


@pytest.mark.parametrize("name", ["GPT-2", "Pythia", "GPT-NeoX, sequential"])
def test_the_signed_sum_is_attribution_patching_in_other_architectures(name: str):
    model, batch = architecture(name), paired()
    with NoCasts():
        found = edge_attribution(model, batch, everything(model))
        expected = baselines.attribution_patching(model, batch, everything(model)).scores
    assert close(found.scores.sum(1), expected, 1e-9)


def test_the_signed_sum_is_attribution_patching_in_compatibility_mode():
    model, batch = fresh(normalization_type="LN", dtype=torch.float32), examples(5)
    model.enable_compatibility_mode()  # folds norms and centres weights: other edges, with the same property
    model.eval()
    found = edge_attribution(model, batch, units_of(model)).scores
    expected = score.gradient(model, batch, units_of(model), source="counterfactual").scores
    assert close(found.sum(1).float(), expected.float(), 1e-4)


def test_edges_lead_to_later_readers_only():
    model = bridge(act_fn="gelu")  # no neuron is silent
    found = edge_attribution(model, examples(5, answers=5), heads(model) + neurons(model))
    attention = [[f"L{layer}H{head}.{part}" for part in "qkv" for head in range(2)] for layer in range(2)]
    assert found.readers == (*attention[0], "L0MLP", *attention[1], "L1MLP", "logits")
    for name, row in zip(found.units.names, found.scores, strict=True):
        first = {"L0H": 6, "L0N": 7, "L1H": 13, "L1N": 14}[name[:3]]
        assert bool((row[:first] == 0).all()) and bool((row[first:] != 0).all())


# Nodes


def test_nodes_are_sums_and_maxima_of_the_absolute_means():
    model, batch = bridge(), examples(6)
    units = units_of(model)
    edges = edge_attribution(model, batch, units)
    alone = [edge_attribution(model, batch[i : i + 1], units).scores for i in range(6)]
    assert close(edges.scores, torch.stack(alone).mean(0))  # each edge's mean comes first
    total, greatest = eap(model, batch, units), eap(model, batch, units, reduce="max")
    assert close(total.scores, edges.scores.abs().sum(1)) and close(greatest.scores, edges.scores.abs().amax(1))
    late = torch.stack(alone).abs().sum(2).mean(0)
    assert bool((late > 1.01 * total.scores).any())  # which is another number
    assert bool((total.scores >= greatest.scores).all()) and bool(total.stderr.isnan().all())
    assert (total.name, greatest.name) == ("EAP (sum)", "EAP (max)")
    assert repr(edges).startswith("Edges(14 units, 15 readers, largest L")


def test_batches_do_not_matter():
    model, batch = bridge(), examples(9, answers=2)
    for source in ("counterfactual", "shuffled"):
        found = [
            edge_attribution(model, batch, everything(model), steps=2, source=source, batch_size=size).scores
            for size in (1, 7, 9, None)
        ]
        assert all(close(one, found[0]) for one in found)


def test_many_readers_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model, batch = bridge(), examples(6)
    whole = edge_attribution(model, batch, units_of(model)).scores
    monkeypatch.setattr("tl_sparsify.comparison.edge_attribution._ENTRIES", 1)
    assert close(edge_attribution(model, batch, units_of(model)).scores, whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_effect(side: str):
    model, plain = architecture("GPT-2"), paired()
    assert plain.counterfactual_tokens is not None
    other = padded(plain, side)
    more = (3, 0) if side == "left" else (0, 3)
    other = replace(other, counterfactual_tokens=torch.nn.functional.pad(plain.counterfactual_tokens, more))
    with NoCasts():
        for steps in (1, 3):
            before = edge_attribution(model, plain, units_of(model), steps=steps).scores
            assert close(edge_attribution(model, other, units_of(model), steps=steps).scores, before, 1e-6)


# EAP-IG


class Plain:
    """The transformer of :func:`models.fresh` in plain torch, in which every reader has a copy of the stream."""

    def __init__(self, model: Any) -> None:
        self.blocks = model.blocks
        self.embed = lambda tokens: model.W_E[tokens] + model.W_pos[: tokens.shape[1]]
        self.unembed = lambda x: x @ model.W_U + model.b_U

    def run(self, stream: Tensor, added: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and what each unit writes; ``added`` goes into what a reader takes in."""
        written: dict[str, Tensor] = {}
        late = torch.ones(stream.shape[1], stream.shape[1]).triu(1).bool()
        for layer, block in enumerate(self.blocks):
            attn, mlp = block.attn, block.mlp
            before = stream
            for h in range(2):
                q, k, v = (
                    (before + added.get(f"L{layer}H{h}.{part}", 0)) @ weight[h] + bias[h]
                    for part, weight, bias in (
                        ("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K), ("v", attn.W_V, attn.b_V),
                    )
                )  # fmt: skip
                pattern = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(late, float("-inf")).softmax(-1)
                written[f"L{layer}H{h}"] = pattern @ v @ attn.W_O[h]
                stream = stream + written[f"L{layer}H{h}"]
            stream = stream + attn.b_O
            hidden = ((stream + added.get(f"L{layer}MLP", 0)) @ mlp.W_in + mlp.b_in).relu()
            for n in range(5):
                written[f"L{layer}N{n}"] = hidden[..., n, None] * mlp.W_out[n]
                stream = stream + written[f"L{layer}N{n}"]
            stream = stream + mlp.b_out
        return self.unembed(stream + added.get("logits", 0)), written


def by_hand(model: Any, batch: Examples, readers: tuple[str, ...], steps: int, metric: Any, swap: bool) -> Tensor:
    """EAP-IG, one example, point and edge at a time."""
    plain, names = Plain(model), units_of(model).names
    assert batch.counterfactual_tokens is not None
    total = torch.zeros(len(names), len(readers), dtype=torch.float64)
    for i in range(len(batch)):
        one = batch[i : i + 1]
        near, far = plain.embed(one.tokens), plain.embed(batch.counterfactual_tokens[i : i + 1])
        near, far = (far, near) if swap else (near, far)
        at_near, at_far = plain.run(near, {})[1], plain.run(far, {})[1]
        for k in range(1, steps + 1):
            added = {reader: torch.zeros_like(near).requires_grad_() for reader in readers}
            logits = plain.run(far + k / steps * (near - far), added)[0]
            value = metric(logits[one.labels != -100], one).mean()
            slopes = torch.autograd.grad(value, list(added.values()))
            for u, name in enumerate(names):
                step = (at_near[name] - at_far[name]) * (-1 if swap else 1)
                total[u] += torch.stack([(step * slope).sum() for slope in slopes]) / steps / len(batch)
    return total.detach()


def test_the_plain_transformer_is_the_model():
    model, tokens = bridge(), examples().tokens
    plain = Plain(model)
    assert torch.allclose(plain.run(plain.embed(tokens), {})[0], model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("steps", [1, 5])
def test_eap_ig_is_a_loop_over_edges_and_points(steps: int, direction: Any):
    model, batch = bridge(), examples(3, answers=2)
    found = edge_attribution(model, batch, units_of(model), steps=steps, direction=direction)
    expected = by_hand(model, batch, found.readers, steps, log_odds, direction == "denoising")
    later = found.scores != 0  # by hand an earlier reader gets an edge, too
    assert close(found.scores, expected * later) and int(later.sum()) > 50
    nodes = eap_ig(model, batch, units_of(model), steps=steps, direction=direction)
    assert close(nodes.scores, found.scores.abs().sum(1))


def test_one_step_is_eap_and_more_are_not():
    model, batch = bridge(), examples(6)
    one, five = (eap_ig(model, batch, units_of(model), steps=steps) for steps in (1, 5))
    assert torch.equal(one.scores, eap(model, batch, units_of(model)).scores)
    assert not close(five.scores, one.scores, 0.05)
    assert five.name == "EAP-IG (sum, 5 steps)" and (five.forward_passes, five.backward_passes) == (6, 5)


@pytest.mark.parametrize("steps", [1, 4])
def test_edges_into_the_logits_are_complete_for_a_linear_metric(steps: int):
    """Without norms the logits are linear in the stream, which is the sum of what is written: with the embedding's own
    edge those into the logits add up to the difference between the runs."""
    model, batch = bridge(), examples(6)
    assert batch.counterfactual_tokens is not None

    def difference(logits: Tensor, here: Examples) -> Tensor:
        return logits[:, 1] - logits[:, 2]

    found = edge_attribution(model, batch, units_of(model), steps=steps, metric=difference)
    with torch.no_grad():
        runs = [difference(answer_logits(model, b), b).mean() for b in (batch, swapped(batch))]
        plain = Plain(model)
        embedded = (plain.embed(batch.tokens) - plain.embed(batch.counterfactual_tokens))[:, -1].mean(0)
        direct = embedded @ (model.W_U[:, 1] - model.W_U[:, 2])
    assert float(found.scores[:, -1].sum() + direct) == pytest.approx(float(runs[0] - runs[1]), rel=1e-10)


# Passes, and the model


def counted(model: Any, run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What ``run`` returns, and how many rows of tokens went forward and backward."""
    rows = {"fwd": 0, "bwd": 0}

    def count(tensor: Tensor, hook: Any, direction: str) -> None:
        rows[direction] += len(tensor)

    for direction in rows:
        model.add_hook(
            "blocks.1.hook_resid_post",
            lambda tensor, hook, direction=direction: count(tensor, hook, direction),
            dir=direction,
        )
    return run(), rows["fwd"], rows["bwd"]


@pytest.mark.parametrize("steps", [1, 5])
def test_passes_are_counted_as_they_were_made(steps: int):
    model, batch = fresh(), examples(9)
    found, forward, backward = counted(model, lambda: eap_ig(model, batch, units_of(model), steps=steps, batch_size=4))
    assert forward == found.forward_passes * 9 == (1 + steps) * 9
    assert backward == found.backward_passes * 9 == steps * 9


def test_the_model_is_left_as_it_came_in():
    model, batch = fresh(), examples(5)
    model.blocks[0].mlp.out.original_component.weight.requires_grad_(False)
    state = torch.get_rng_state()
    with unchanged(model):
        edge_attribution(model, batch, units_of(model), steps=2)
    with unchanged(model), pytest.raises(ValueError, match="metric gave shape"), unchecked():
        edge_attribution(model, batch, units_of(model), metric=lambda logits, batch: logits.sum())
    assert torch.equal(torch.get_rng_state(), state)


def test_units_that_are_ablated_have_no_edges():
    model, batch = bridge(), examples(5)
    reduction = reduction_of(model)
    with intervened(model, ablate(reduction)):
        found = edge_attribution(model, batch, units_of(model))
    gone = ~reduction.circuit.mask
    assert bool((found.scores[gone] == 0).all()) and bool((found.scores[~gone].abs().sum(1) > 0).any())


# What the corrupted run is


def test_without_counterfactuals_another_example_is_the_corrupted_run():
    model, batch = bridge(), examples(6)
    alone = replace(batch, counterfactual_tokens=None)
    shuffled = eap(model, batch, units_of(model), source="shuffled", seed=3)
    assert torch.equal(eap(model, alone, units_of(model), seed=3).scores, shuffled.scores)
    assert not close(shuffled.scores, eap(model, batch, units_of(model)).scores, 0.1)
    assert not close(shuffled.scores, eap(model, alone, units_of(model), seed=4).scores, 0.01)


def test_architectures_without_edges_are_refused_by_name():
    grouped, post = architecture("Llama"), fresh_architecture("Gemma 2", num_key_value_heads=6)
    with pytest.raises(ValueError, match=r"block 0 has 3 key and value heads for 6 heads \(grouped-query attention\)"):
        eap(grouped, paired(), heads(grouped))
    for units in (heads(post), neurons(post)):
        with pytest.raises(ValueError, match="the stream is not the sum of what heads and MLPs write"):
            eap(post, paired(), units)
    for model in (grouped, post):  # and by TransformerLens
        batch = paired()
        with pytest.raises(ValueError, match="edge granularity and faithfulness are unsupported here"):
            theirs(model, batch.tokens, batch.tokens, batch)
    whole = edge_attribution(post, paired(), mlps(post))  # what a whole layer writes is behind its norm
    assert float(whole.scores.abs().sum()) > 0


def test_what_makes_no_edges_is_refused_by_name():
    model, batch = bridge(), examples(6, answers=2)
    units = units_of(model)
    with pytest.raises(ValueError, match=r"residual units of blocks\.0\.hook_resid_post write no edges"):
        eap(model, batch, residuals(model))
    with pytest.raises(ValueError, match="direction units of"):
        eap(model, batch, directions(model, "blocks.0.hook_resid_mid", torch.eye(8, dtype=torch.float64)))
    network = linear()
    with pytest.raises(ValueError, match="neuron units of hook_hidden write no edges"):
        eap(network, batch, network.units)
    for settings, message in [
        ({"steps": 0}, "steps is 0; at least one is needed"),
        ({"reduce": "mean"}, "reduce is 'mean'; it is sum or max"),
        ({"direction": "back"}, "direction is 'back'; it is noising or denoising"),
        ({"source": "corrupt"}, "source is 'corrupt'; it is counterfactual or shuffled"),
        ({"batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message), unchecked():
            eap_ig(model, batch, units, **settings)
    with pytest.raises(ValueError, match="no counterfactual_tokens"):
        eap(model, replace(batch, counterfactual_tokens=None), units, source="counterfactual")
    apart = replace(batch, labels=batch.labels.clone())
    apart.labels[0, 3] = -100
    with pytest.raises(ValueError, match="direction is 'denoising', and shuffled partners are answered at other"):
        eap(model, apart, units, source="shuffled", direction="denoising")
    training = fresh().train()
    with pytest.raises(ValueError, match="training mode"):
        eap(training, batch, units)


def test_the_names_are_reached_from_baselines():
    assert (baselines.eap, baselines.eap_ig, baselines.edge_attribution) == (eap, eap_ig, edge_attribution)
    assert baselines.Edges is Edges
