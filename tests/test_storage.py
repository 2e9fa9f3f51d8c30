"""How many numbers a model holds: as many as the model that its bridge wraps, whatever the bridge copies."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.architectures import CONFIGS, batch, bridge
from helpers.models import bridge as native

from tl_sparsify import Circuit, constants, fold, heads, neurons
from tl_sparsify._internal.storage import parameter_count
from tl_sparsify.core.units import parameters

JOINT = ["GPT-2", "Pythia"]  # queries, keys and values in one: shared with their parts, or beside copies of them


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bridge_counts_as_the_model_that_it_wraps(name: str):
    architecture, config = CONFIGS[name]
    model_class = getattr(transformers, architecture)
    with torch.random.fork_rng():
        plain = {id(p): p.numel() for p in model_class(model_class.config_class(**config)).parameters()}
    assert parameter_count(bridge(name)) == sum(plain.values())


def test_a_native_model_counts_what_it_has():
    assert parameter_count(native()) == sum(parameter.numel() for parameter in native().parameters())


@pytest.mark.parametrize("name", JOINT)
def test_what_a_head_and_a_neuron_take_along_is_what_a_unit_is_said_to_have(name: str):
    model = bridge(name)
    units = heads(model) + neurons(model)
    found = parameters(model, units)
    assert found[0] == 4 * (4 * 24) + 3 * 4 and found[-1] == 2 * 24 + 1  # 24 wide, heads of 4; with biases
    for unit in (0, len(units) - 1):
        kept = Circuit(units, torch.arange(len(units)) != unit)
        small = fold(model, constants.reduced(model, kept, constants.zero(model, batch(), units)))
        assert parameter_count(model) - parameter_count(small) == found[unit]
