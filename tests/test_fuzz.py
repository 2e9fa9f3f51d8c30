"""Bad calls, drawn at random over the public functions: every one is refused by a sentence that names the argument; and
calls in an odd setting give what they give elsewhere.

``TL_SPARSIFY_FUZZ=100000 pytest -s tests/test_fuzz.py`` makes all of them and prints the counts.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fuzz import Entry, combinations, entries, thrown
from helpers.fuzz_more import later, prepared
from helpers.models import bridge, examples, reduction_of, unchanged, unchecked, units_of

import tl_sparsify as tls
from tl_sparsify import score

MORE = int(os.environ.get("TL_SPARSIFY_FUZZ", "200"))
CALLS = int(os.environ.get("TL_SPARSIFY_FUZZ", "1000"))


def test_bad_calls_are_refused_by_a_sentence_and_change_nothing():
    refused(entries(), at_least=2000, calls=CALLS)


def test_so_are_those_that_verify_read_write_and_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path)
    refused(later(), at_least=1500, calls=MORE)


def refused(table: dict[str, Entry], at_least: int, calls: int) -> None:
    every = combinations(table)
    assert len(every) >= at_least
    drawn = np.random.default_rng(0).permutation(len(every))[:calls]
    with unchecked():
        found = [thrown(table, *every[i]) for i in drawn]
    sys.stdout.write(f"{len(drawn)} of {len(every)} bad calls: {Counter(outcome.kind for outcome in found)}\n")
    assert [outcome for outcome in found if outcome.kind != "refused"] == []


@pytest.mark.filterwarnings("ignore")
def test_those_take_what_they_are_given_beside_the_bad_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path)
    table = later()
    for name, entry in table.items():
        if name not in ("compare", "report.write"):  # they take long, and are tested elsewhere
            entry.call(**entry.good)


@pytest.mark.filterwarnings("ignore:Newton constants")
def test_what_is_thrown_is_bad_only_in_one_argument():
    """The functions take what they are given beside the bad argument: else they would refuse that."""
    for name, entry in entries().items():
        if name in ("sparsify", "sparsify_affine", "constants.refit", "polish", "baselines.in_rounds", "load_task"):
            continue  # they take long, and are tested elsewhere
        settings = {"progress": False} if "progress" in entry.kinds else {}
        if entry.kinds.get("steps") == "count":
            settings["steps"] = 2
        assert entry.call(**entry.good, **settings) is not None, name


def call() -> Any:
    return score.risk(bridge(), examples(6), units_of(bridge())).scores


def test_odd_settings_change_no_number():
    model, plain = bridge(), call()
    with unchanged(model):
        with torch.no_grad():
            assert torch.equal(call(), plain)
        with torch.enable_grad():
            assert torch.equal(call(), plain)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            assert torch.equal(call(), plain)
        finally:
            torch.set_default_dtype(before)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.allclose(call().double(), plain, rtol=0.2, atol=0.05)
        with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*outside of it"):
            call()


def test_a_call_within_a_users_hook_gives_what_it_gives_elsewhere():
    model, data, plain = bridge(), examples(6), call()
    seen: list[Any] = []

    def nested(activation: Any, hook: Any) -> None:
        if not seen:
            seen.append(None)
            seen[0] = call()

    with unchanged(model), model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", nested)]):
        model(data.tokens)
    assert torch.equal(seen[0], plain)


def test_an_error_of_the_users_own_comes_through_and_leaves_the_model():
    def raising(*_: Any) -> Any:
        raise RuntimeError("the user's own")

    model, data = bridge(), examples(6)
    with unchanged(model), pytest.raises(RuntimeError, match="the user's own"):
        score.risk(model, data, units_of(model), metric=raising)
    with unchanged(model), pytest.raises(RuntimeError, match="the user's own"):
        with tls.intervened(model, tls.ablate(reduction_of(model))):
            raising()


def test_cyclic_and_raising_causal_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"cycle|depends on itself"):
        tls.CausalModel(inputs=("x",), mechanisms={"a": lambda b: b, "b": lambda a: a}, output="a").run(
            {"x": np.arange(3)}
        )
    broken = tls.CausalModel(inputs=("x",), mechanisms={"y": lambda x: 1 // (x - x)}, output="y")
    given = np.arange(3)
    with pytest.raises((ValueError, ZeroDivisionError)), np.errstate(all="raise"):
        broken.run({"x": given.astype(object)})
    assert given.tolist() == [0, 1, 2]


def test_a_mechanism_that_works_in_place_does_not_spoil_the_callers_inputs():
    def worse(x: Any) -> Any:
        x += 1
        return x

    model = tls.CausalModel(inputs=("x",), mechanisms={"y": worse}, output="y")
    given = {"x": np.arange(3)}
    assert model.run(given)["y"].tolist() == [1, 2, 3]
    assert given["x"].tolist() == [0, 1, 2]
