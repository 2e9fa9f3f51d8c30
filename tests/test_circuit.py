"""Circuits as sets, reductions as files, and models that are told apart."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import (
    bridge,
    examples,
    fresh,
    linear,
    random_mask,
    random_values,
    reduction_of,
    seeded,
    unchecked,
    units_of,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tl_sparsify import constants
from tl_sparsify.core.circuit import Circuit, NeighbourMap, Values
from tl_sparsify.core.forward import run_values
from tl_sparsify.core.measure import risk
from tl_sparsify.core.reduction import Reduction, check_fingerprint, fingerprint
from tl_sparsify.core.units import heads, neurons
from tl_sparsify.search.joint import sparsify

SEEDS = st.integers(0, 2**31)


def circuit(seed: int) -> Circuit:
    units = units_of(bridge())
    return Circuit(units, random_mask(units, seed))


# Set algebra


@given(SEEDS, SEEDS, SEEDS)
def test_circuits_are_sets(one: int, two: int, three: int):
    a, b, c = circuit(one), circuit(two), circuit(three)
    x, y = set(a.names), set(b.names)
    assert set((a & b).names) == x & y and set((a | b).names) == x | y
    assert set((a - b).names) == x - y and set((a ^ b).names) == x ^ y
    assert set((~a).names) == set(a.units.names) - x
    assert (a <= b) == (x <= y) and (a & b) <= a <= (a | b)
    assert len(a) == len(x) and a.fraction == len(x) / len(a.units)
    assert a & (b | c) == (a & b) | (a & c) and (a - b) - c == a - (b | c)
    assert (a == b) == (x == y) and (hash(a) == hash(b) or a != b)


@given(SEEDS)
def test_names_make_the_circuit(seed: int):
    a = circuit(seed)
    assert Circuit.of(a.units, a.names) == a == Circuit.of(a.units, [a.units[name] for name in reversed(a.names)])
    assert all((name in a) == (name in set(a.names)) for name in a.units.names)


def test_full_and_empty_are_complements():
    units = units_of(bridge())
    assert ~Circuit.full(units) == Circuit.empty(units) and len(Circuit.full(units)) == 14
    assert Circuit.empty(units).names == ()


def test_the_repr_is_one_line_with_the_numbers():
    a = Circuit.of(units_of(bridge()), ["L0H1", "L1N0", "L1N3"])
    assert repr(a) == "Circuit(3 of 14 units: 1 head, 2 neurons)"
    assert repr(Reduction(a, random_values(a.units))) == f"Reduction({a!r}, given values)"


def test_circuits_over_other_units_are_refused():
    one, two = Circuit.full(heads(bridge())), Circuit.full(neurons(bridge()))
    for combine in (one.__and__, one.__or__, one.__sub__, one.__xor__, one.__le__):
        with pytest.raises(ValueError, match=r"different units: Units\(4: 4 heads\) and Units\(10: 10 neurons\)"):
            combine(two)
    assert one != two


def test_masks_and_values_of_another_shape_are_refused():
    units = heads(bridge())
    with unchecked(), pytest.raises(ValueError, match=r"mask has shape \(3,\).*\(4,\)"):
        Circuit(units, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="1 tensors for the 2 sites"):
        Values(units, (torch.zeros(2, 4),))
    with pytest.raises(ValueError, match=r"value of blocks\.1\.attn\.hook_z has shape \(3, 4\)"):
        Values(units, (torch.zeros(2, 4), torch.zeros(3, 4)))


# Values and reductions


def test_values_are_taken_by_unit():
    units = units_of(bridge())
    one, two, mask = random_values(units, 1), random_values(units, 2), random_mask(units)
    both = one.where(mask, two)
    for a, b, found, where in zip(one.tensors, two.tensors, both.tensors, units.split(mask), strict=True):
        assert torch.equal(found[where], a[where]) and torch.equal(found[~where], b[~where])
    assert one == random_values(units, 1) != two and one.constant


def test_reductions_need_constants_of_their_own_units():
    model = bridge()
    units = units_of(model)
    with pytest.raises(ValueError, match="values vary by example or position"):
        Reduction(Circuit.full(units), run_values(model, examples(2), units))
    with pytest.raises(ValueError, match="values are for"):
        Reduction(Circuit.full(units), random_values(units.at(1)))


def test_the_baseline_is_the_reference_or_the_values():
    units = units_of(bridge())
    one, two = random_values(units, 1), random_values(units, 2)
    assert Reduction(Circuit.full(units), one).baseline == one
    assert Reduction(Circuit.full(units), one, two).baseline == two
    assert Reduction(Circuit.full(units), one, two).with_circuit(Circuit.empty(units)).baseline == two


# Files


@given(SEEDS, st.sampled_from([None, 3, (0, 2)]), st.booleans(), st.booleans())
def test_what_is_saved_is_loaded(tmp_path_factory: Any, seed: int, where: Any, referenced: bool, known: bool):
    units = units_of(bridge()).at(where)
    reference = random_values(units, seed + 1) if referenced else None
    name = fingerprint(bridge()) if known else None
    one = Reduction(
        Circuit(units, random_mask(units, seed)), replace(random_values(units, seed), kind="mine"), reference, name
    )
    folder = tmp_path_factory.mktemp("file")
    one.save(folder / "one")
    one.save(str(folder / "two"))
    loaded = Reduction.load(folder / "one")
    assert loaded == one == Reduction.load(str(folder / "two")) and hash(loaded) == hash(one)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


def test_reductions_differ_in_every_part():
    one = reduction_of(bridge())
    units = one.units
    others = [
        Reduction(~one.circuit, one.values, fingerprint=one.fingerprint),
        Reduction(one.circuit, random_values(units, 9), fingerprint=one.fingerprint),
        Reduction(~one.circuit, replace(one.values, kind="zero"), fingerprint=one.fingerprint),
        Reduction(one.circuit, one.values, reference=one.values, fingerprint=one.fingerprint),
        Reduction(one.circuit, one.values),
    ]
    assert all(other != one for other in others) and reduction_of(bridge()) == one


def test_positions_that_a_file_cannot_hold_are_refused(tmp_path: Path):
    units = heads(bridge()).at(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="vary by example"):
        reduction_of(bridge(), random_mask(units), units=units).save(tmp_path / "one")
    assert not list(tmp_path.iterdir())


def small() -> Reduction:
    """A reduction of few units."""
    return reduction_of(linear(), units=linear().units)


@cache
def content() -> bytes:
    """The bytes of a small saved reduction."""
    with tempfile.TemporaryDirectory() as folder:
        small().save(Path(folder) / "one")
        return (Path(folder) / "one").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path: Path, share: float):
    path = tmp_path / "cut.reduction"
    path.write_bytes(content()[: int(len(content()) * share)])
    with pytest.raises(ValueError, match=r"cut\.reduction is damaged or truncated"):
        Reduction.load(path)


def test_a_file_with_any_byte_changed_is_refused_or_the_same(tmp_path: Path):
    path, expected = tmp_path / "bad.reduction", small()
    same = 0
    for place in range(len(content())):
        changed = bytearray(content())
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        try:
            assert Reduction.load(path) == expected, f"byte {place} changed the content"
            same += 1
        except ValueError as error:
            assert "bad.reduction" in str(error)
    assert same < 100  # spaces that pad the header, no more


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no reduction file at .*none\.reduction"):
        Reduction.load(tmp_path / "none.reduction")
    save_file({"mask": torch.ones(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not written by tl_sparsify"):
        Reduction.load(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors at all, but a longer text than that")
    with pytest.raises(ValueError, match="text is damaged"):
        Reduction.load(tmp_path / "text")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, one = tmp_path / "one", reduction_of(bridge())
    one.save(path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reduction_of(bridge(), seed=1).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["one"] and Reduction.load(path) == one


# Models that are told apart


def test_a_fingerprint_is_that_of_the_parameters():
    model = fresh()
    name = fingerprint(model)
    assert name == fingerprint(bridge()) == fingerprint(model.train()) != fingerprint(fresh(seed=2))
    assert fingerprint(fresh(dtype=torch.float32).double()) == fingerprint(fresh(dtype=torch.float32))
    with torch.no_grad():
        model.unembed.original_component.weight[3, 2] += 1e-3
    assert fingerprint(model) != name


def test_a_reduction_of_another_model_is_refused():
    data, mine, other = examples(3), reduction_of(bridge()), fresh(seed=2)
    says = f"made for the model {fingerprint(bridge())}, this one is {fingerprint(other)}"
    path = sparsify(bridge(), data, mine.units, rounds=1, progress=False)
    for call in [
        lambda: check_fingerprint(other, mine),
        lambda: risk(other, mine, data),
        lambda: constants.refit(other, mine, data, data, steps=1, progress=False),
        lambda: path.within(other, data, 1.0),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    assert risk(other, Reduction(mine.circuit, mine.values), data).mean > 0  # of no model in particular


def test_a_mixture_of_nothing_is_none(tmp_path: Path):
    model = bridge()
    reduction = replace(reduction_of(model), mixing=(None,) * 4)
    reduction.save(tmp_path / "one.reduction")
    assert reduction.mixing is None and Reduction.load(tmp_path / "one.reduction") == reduction


def test_weights_of_one_row_and_column_add_up():
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    twice = NeighbourMap(5, torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2]), weights)
    v = torch.randn(3, 4, 5, 1, generator=seeded(0), dtype=torch.float64)
    assert torch.allclose(twice.of(v)[..., 0], v[..., 0] @ twice.matrix(v).to_dense().T)
    assert torch.allclose(twice.of(v)[:, :, 0, 0], 5 * v[:, :, 2, 0])
