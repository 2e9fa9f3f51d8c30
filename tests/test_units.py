"""Units: one flat index, names that print and parse, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import bridge, examples, linear, reduction_of, units_of
from hypothesis import given
from hypothesis import strategies as st

from tl_sparsify.core.intervene import recorded
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Model, Unit, Units, attentions, heads, mlps, neurons, parameters, residuals, select
from tl_sparsify.folding.fold import fold

POST = "blocks.1.mlp.hook_post"
SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def made_up(sizes: list[int]) -> Units:
    """A site for each size, heads and neurons in turn."""
    kinds = ["head", "neuron"] * len(sizes)
    return Units(tuple(Site(kinds[i], i // 2, f"hook_{i}", size) for i, size in enumerate(sizes)))


# The flat index


@given(SIZES)
def test_every_unit_has_one_number_and_one_name(sizes: list[int]):
    units = made_up(sizes)
    assert len(units) == sum(sizes) == len(set(units.names)) == len(list(units))
    for number, unit in enumerate(units):
        assert units[number] == unit == units[unit.name]
        assert units.index(unit) == units.index(unit.name) == number
        assert units.kinds[number] == unit.site.kind and units.layers[number] == unit.site.layer
    assert units[-1] == units[len(units) - 1]


@given(SIZES)
def test_a_flat_tensor_splits_into_its_sites(sizes: list[int]):
    units = made_up(sizes)
    flat = torch.arange(2 * len(units)).reshape(2, -1)
    parts = units.split(flat)
    assert [part.shape[-1] for part in parts] == sizes
    assert torch.equal(torch.cat(parts, -1), flat)
    assert [flat[0, part].tolist() for part in units.slices] == [part[0].tolist() for part in parts]


def test_units_add_up_in_order():
    model = bridge()
    both = heads(model) + neurons(model)
    assert both.names == heads(model).names + neurons(model).names
    assert both.names[:5] == ("L0H0", "L0H1", "L1H0", "L1H1", "L0N0")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_z.* twice"):
        both + heads(model)


def test_chosen_units_become_sites_and_a_mask():
    units = units_of(bridge())
    chosen = [units["L1N3"], units["L0H1"], units["L1N3"], units["L1N0"].at(2)]
    found, mask = select(chosen)
    assert tuple(name for name, on in zip(found.names, mask.tolist(), strict=True) if on) == (
        "L1N3",
        "L0H1",
        "L1N0@2",
    )


# Names


@given(st.sampled_from([None, 3, -1, (0, 2), [1, 4], slice(1, 3), slice(None, 2), slice(2, None)]))
def test_positions_print_and_parse(where: Any):
    units = units_of(bridge())
    unit = units["L1N3"].at(where)
    assert units[unit.name] == unit and repr(unit) == unit.name
    assert units.at(where)[unit.name] == unit


def test_positions_have_short_names():
    unit = units_of(bridge())["L0H1"]
    assert (
        unit.at(4).name == "L0H1@4" and unit.at((1, 3)).name == "L0H1@1,3" and unit.at(slice(0, 4)).name == "L0H1@0:4"
    )
    assert unit.at(torch.tensor([1, 2])).name == "L0H1@each"
    assert unit.at(torch.tensor([1, 2])) == unit.at(torch.tensor([1, 2])) != unit.at(torch.tensor([1, 3]))
    assert len({unit.at(4), unit.at([4]), unit.at(5)}) == 2


def test_whole_layers_have_no_index():
    model = bridge()
    assert mlps(model).names == ("L0MLP", "L1MLP") and attentions(model).names == ("L0ATTN", "L1ATTN")
    assert residuals(model).names == ("L0RESID", "L1RESID")


def test_reprs_are_one_line_with_the_numbers():
    units = units_of(bridge())
    assert repr(units) == "Units(14: 4 heads, 10 neurons)"
    mask = torch.zeros(14, dtype=torch.bool)
    mask[[0, 5, 6]] = True
    assert units.describe(mask) == "1 head, 2 neurons"
    assert mlps(bridge()).describe() == "2 MLPs"


# Finding units in models


def test_sizes_are_read_from_the_weights():
    model = bridge()
    small: Any = fold(model, reduction_of(model, torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0]).bool()))
    assert [site.size for site in heads(small).sites] == [1, 2]
    assert [site.size for site in neurons(small).sites] == [2, 1]
    assert small.cfg.n_heads == model.cfg.n_heads  # which is why


def test_a_layer_without_units_has_no_site():
    model = bridge()
    small = fold(model, reduction_of(model, torch.tensor([0] * 4 + [0] * 5 + [1] * 5).bool()))
    assert neurons(small).names == ("L1N0", "L1N1", "L1N2", "L1N3", "L1N4")
    with pytest.raises(ValueError, match=r"no hook point blocks\.\*\.attn\.hook_z: it has no head units"):
        heads(small)


def test_models_without_blocks_are_asked_for_their_hook_points():
    with pytest.raises(ValueError, match=r"TwoLayers has no blocks; name its hook points yourself: .*Site\("):
        heads(linear())
    with pytest.raises(ValueError, match="it has no neuron units"):
        neurons(bridge(attn_only=True))


def test_models_have_what_is_asked_of_them():
    assert isinstance(bridge(), Model) and isinstance(linear(), Model)
    assert not isinstance(SimpleNamespace(training=False), Model)


def test_a_site_reads_its_units_in_an_activation():
    model, data = bridge(), examples(3)
    units = units_of(model) + mlps(model)
    with torch.no_grad(), recorded(model, units) as recording:
        model(data.tokens)
    shapes = [tuple(values.shape) for values in recording.read()]
    assert shapes == [(3, 5, 2, 4)] * 2 + [(3, 5, 5, 1)] * 2 + [(3, 5, 1, 8)] * 2
    assert Site("neuron", 0, "h", 4).read(torch.zeros(7, 4)).shape == (7, 1, 4, 1)


def test_per_example_positions_are_taken_for_examples():
    units = heads(bridge()).at(torch.tensor([[3], [1], [2]]))
    taken = units.for_examples(torch.tensor([2, 0]))
    assert taken == heads(bridge()).at(torch.tensor([[2], [3]]))
    assert taken.sites[0].position_mask(2, 4).tolist() == [[False, False, True, False], [False, False, False, True]]
    assert heads(bridge()).for_examples(torch.tensor([0])) == heads(bridge())


def test_parameters_are_the_weights_that_leave_with_a_unit():
    model = bridge()
    found = parameters(model, units_of(model))
    small: Any = fold(model, reduction_of(model, torch.arange(14) != 1))
    assert model.n_params_total - small.n_params_total == found[1] == 4 * (4 * 8) + 3 * 4
    small = fold(model, reduction_of(model, torch.arange(14) != 7))
    assert model.n_params_total - small.n_params_total == found[7] == 2 * 8 + 1
    with pytest.raises(ValueError, match=r"residual units of .* have no parameters"):
        parameters(model, residuals(model))


# What is refused


@pytest.mark.parametrize(
    "name, says",
    [
        ("L9H0", "unknown unit 'L9H0': layer 9 has 0 of kind head"),
        ("L0N5", "unknown unit 'L0N5': layer 0 has 5 of kind neuron"),
        ("L0MLP", "unknown unit 'L0MLP': layer 0 has 0 of kind mlp"),
        ("the third", "'the third' is no unit name; names look like L0H0 or L1N4"),
        ("L0H0@1,x", "positions '1,x' do not parse"),
    ],
)
def test_unknown_names_are_refused(name: str, says: str):
    with pytest.raises(KeyError, match=says):
        units_of(bridge())[name]


def test_numbers_outside_the_index_are_refused():
    with pytest.raises(IndexError):
        units_of(bridge())[14]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"kind": "axon"}, "kind is 'axon'; the known kinds are head, neuron"),
        ({"size": 0}, r"size of blocks\.1\.mlp\.hook_post is 0"),
    ],
)
def test_impossible_sites_are_refused(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Site(**{"kind": "neuron", "layer": 1, "hook": POST, "size": 5} | settings)


def test_no_sites_are_refused():
    with pytest.raises(ValueError, match="sites is empty"):
        Units(())


def test_two_units_of_one_name_are_refused():
    with pytest.raises(ValueError, match="hook_a and hook_b both have a unit L0N0"):
        Units((Site("neuron", 0, "hook_a", 3), Site("neuron", 0, "hook_b", 3)))


@pytest.mark.parametrize(
    "kind, size, shape",
    [
        ("head", 2, (3, 5, 8)),
        ("head", 2, (3, 5, 3, 4)),
        ("neuron", 5, (3, 5, 6)),
        ("mlp", 1, (3, 8)),
        ("mlp", 2, (3, 5, 8)),
    ],
)
def test_activations_of_another_shape_are_refused(kind: str, size: int, shape: tuple[int, ...]):
    with pytest.raises(
        ValueError, match=rf"hook_x yields \({', '.join(map(str, shape))}\); a site of {size} {kind} units"
    ):
        Site(kind, 0, "hook_x", size).read(torch.zeros(shape))


def test_units_are_values():
    one, two = units_of(bridge()), units_of(bridge())
    assert one == two and hash(one) == hash(two) and one != one.at(1)
    assert Unit(one.sites[0], 1) == two["L0H1"]
