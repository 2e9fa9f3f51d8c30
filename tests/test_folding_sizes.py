"""Sizes of a folded model, layer by layer, counted by hand."""

from __future__ import annotations

import torch
from transformer_lens import TransformerBridge, TransformerBridgeConfig

from tl_sparsify import Circuit, Reduction, Values, fold, heads, neurons
from tl_sparsify.folding.sizes import sizes_by_layer


def test_a_layer_has_its_own_units_only_in_a_model_of_twelve():
    """Layer 1 is none of layers 10 and 11, whose units begin with the same letters."""
    config = {"d_model": 4, "d_head": 2, "n_heads": 2, "n_layers": 12, "n_ctx": 4, "d_vocab": 5, "d_mlp": 6}
    with torch.random.fork_rng():
        made = TransformerBridge.boot_native(TransformerBridgeConfig(**config, act_fn="relu", seed=0))
    model = made.eval()
    units = heads(model) + neurons(model)
    zeros = Values(units, tuple(torch.zeros(s.size, 2 if s.kind == "head" else 1) for s in units.sites))
    gone = Circuit.of(units, ["L10H0", "L11H1", "L11N0", "L11N5"])
    folded = fold(model, Reduction(~gone, zeros))
    frame = sizes_by_layer(model, folded).set_index("part")
    counted = frame[["heads", "heads_kept", "neurons", "neurons_kept"]]
    assert counted.loc["layer 1"].tolist() == [2, 2, 6, 6]
    assert counted.loc["layer 10"].tolist() == [2, 1, 6, 6]
    assert counted.loc["layer 11"].tolist() == [2, 1, 6, 4]
    assert counted.loc["whole model"].tolist() == [24, 22, 72, 70]
    # a head has three input maps and one output map of 2 x 4 numbers and three biases of 2; a neuron 2 x 4 and a bias
    lost = (frame.parameters - frame.parameters_kept)[["layer 1", "layer 10", "layer 11", "whole model"]]
    assert lost.tolist() == [0, 38, 38 + 2 * 9, 2 * 38 + 2 * 9]
