"""Verification on transformers: positions, directions, bases, architectures."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from helpers.architectures import bridge as hugging_face
from helpers.equality import (
    EQUALITY,
    FIRST,
    Network,
    drawn,
    pairs_of,
    removal,
)
from helpers.models import unchanged
from helpers.verification import (
    AGREEMENT,
    NATIVE,
    PARITY,
    POSITIONS,
    VOCABULARY,
    answered_by,
    basis_of,
    native,
    native_pairs,
    row,
    stream_units,
    swapped,
)
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from tl_sparsify import (
    Alignment,
    Site,
    Unit,
    directions,
    heads,
    neurons,
    verify,
)


def test_the_ceiling_is_the_best_layer_at_the_alignments_positions():
    evidence = verify(native(), PARITY, NATIVE, native_pairs())
    odd = row(evidence, "odd", intervention="whole residual stream")
    assert odd.units == 1 and odd.pairs == row(evidence, "odd").pairs
    ceiling = Alignment({"answer": [Unit(Site("residual", 1, "blocks.1.hook_resid_post", 1), 0)]})
    assert verify(native(), PARITY, ceiling, native_pairs()).accuracy("answer") == 1
    assert row(evidence, "answer", intervention="whole residual stream").accuracy == 1


def test_positions_for_each_pair_are_the_same_as_one_position_for_all():
    where = torch.full((50,), 3)
    frames = []
    for positions, size in ((3, None), (where, None), (where, 20)):
        stream = Site("residual", 0, "blocks.0.hook_resid_post", 1, positions)
        alignment = Alignment({"answer": [Unit(stream, 0)]})
        frames.append(verify(native(), PARITY, alignment, native_pairs(50), draws=1, batch_size=size).to_frame())
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    pd.testing.assert_frame_equal(frames[0], frames[2], check_exact=True)


def test_positions_for_each_pair_have_one_source_for_all_variables():
    where = torch.full((50,), 3)
    alignment = Alignment({"odd": stream_units(1, 0, where), "more": stream_units(1, 1, where)})
    frame = verify(native(), PARITY, alignment, native_pairs(50), draws=0).to_frame()
    assert "odd & more" in set(frame.variable)
    assert "aligned units, a source each" not in set(frame.intervention)


def test_variables_may_lie_in_two_bases_at_one_hook_point():
    model, pairs = native(), answered_by(native(), native_pairs())
    odd, more = stream_units(3, 0, 3), stream_units(3, 1, 3)
    assert odd[0].name == more[0].name and odd[0] != more[0]
    evidence = verify(model, PARITY, Alignment({"odd": odd, "more": more}), pairs, draws=1)
    for variable, units in (("odd", odd), ("more", more)):
        alone = verify(model, PARITY, Alignment({variable: units}), pairs, draws=1)
        assert evidence.accuracy(variable) == alone.accuracy(variable)
    values: dict[str, Tensor] = {}

    def keep(activation: Tensor, hook: Any) -> None:
        values["source"] = activation

    def swap(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        for seed in (0, 1):
            basis = basis_of(3, seed)
            activation[:, 3] += (values["source"][:, 3] - activation[:, 3]) @ basis @ basis.T
        return activation

    with torch.no_grad():
        model.run_with_hooks(pairs.source.tokens, fwd_hooks=[("blocks.0.hook_resid_post", keep)])
        given = model.run_with_hooks(pairs.base.tokens, fwd_hooks=[("blocks.0.hook_resid_post", swap)])
    hits = given[:, 3, :4].argmax(1) == pairs.expected(PARITY, ("odd", "more"))
    assert evidence.accuracy("odd & more") == float(hits.double().mean())
    assert evidence.accuracy("odd & more") != evidence.accuracy("odd")


def test_a_variable_may_lie_in_two_bases_of_a_model_without_blocks():
    model = Network()
    one, two = (directions(model, "hook_first", basis_of(8, seed, FIRST.size)) for seed in (0, 1))
    base, source = drawn()
    both = Alignment({"left": [*one, *two], "right": [*two][:1]})  # each basis is the whole first layer
    evidence = verify(model, EQUALITY, both, pairs_of(base, source), draws=2, reduced=removal(model, []))
    wanted, given = swapped(base, source, "left"), swapped(base, source, "left", "right")
    assert evidence.accuracy("left") == (wanted == given).mean()
    assert row(evidence, "(none)", "reduced", AGREEMENT).accuracy == 1


def test_a_range_of_positions_is_the_positions_in_it():
    pairs = answered_by(native(), native_pairs(60))
    frames = [
        verify(native(), PARITY, Alignment({"answer": stream_units(2, 0, where)}), pairs, draws=1).to_frame()
        for where in (slice(1, 3), (1, 2))
    ]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_a_transformer_without_neurons_is_verified():
    config = {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": POSITIONS, "d_vocab": VOCABULARY}
    config |= {"attn_only": True, "normalization_type": None, "seed": 0}
    model: Any = TransformerBridge.boot_native(TransformerBridgeConfig(**config)).eval()
    alignment = Alignment({"odd": [heads(model)["L0H0"]]})
    evidence = verify(model, PARITY, alignment, answered_by(model, native_pairs(30)))
    assert row(evidence, "(none)", intervention="all unaligned units").units == 1


def test_a_hugging_face_model_is_held_against_random_weights_of_its_architecture():
    model = hugging_face("Llama")
    alignment = Alignment({"odd": [heads(model)["L0H1"].at(1)], "more": [neurons(model)["L1N3"]]})
    pairs = answered_by(model, native_pairs(40))
    with unchanged(model):
        frames = [verify(model, PARITY, alignment, pairs, seed=seed).to_frame() for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    random = [frame[frame.model == "random weights"] for frame in frames]
    assert [*random[0].pairs] == [40 // (1 + ("each" in name)) for name in random[0].intervention]
    assert (random[0].retained < 1).all()
    assert not random[0].accuracy.equals(random[2].accuracy)
    assert (frames[0][frames[0].model == "original"].retained == 1).all()
