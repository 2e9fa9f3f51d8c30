"""Every shipped task, of numbers or of text: the units of its alignment carry its variables, and others do not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.cards import crowded, section
from helpers.places import loaded, model_of

from tl_sparsify import Alignment, Site, Unit, list_tasks, verify


@pytest.mark.parametrize("name", list_tasks())
def test_the_alignment_carries_its_variables_and_random_units_do_not(name: str):
    """Where it carries a variable less well, the card says so among the limits, with the figure."""
    task = loaded(name)
    evidence = verify(model_of(name), task.causal_model, task.alignment, task.pairs(256, 1), draws=2)
    for variable, units in task.alignment.units.items():
        found = evidence.accuracy(variable)
        assert evidence.verdict(variable).verdict != "cannot tell"
        if found <= 0.9:
            [said] = re.findall(rf"`{variable}`[^`]*?([01]\.\d\d+)", section(name, "Limits"))[:1]
            assert found == pytest.approx(float(said), abs=0.05), variable
        assert evidence.accuracy(variable, intervention="do nothing") < 0.6
        random = np.nan if crowded(units) else evidence.accuracy(variable, intervention="random units")
        assert np.isnan(random) or (random < 0.6 and random < found - 0.1)


@pytest.mark.parametrize("name", list_tasks())
def test_pairs_tell_every_variable_of_a_right_model_from_the_answer(name: str):
    """Where the variable is not the answer itself."""
    task = loaded(name)
    pairs = task.pairs(256, 0)
    right = {known: model for known, model in task.causal_models.items() if known not in task.wrong}
    for known, model in {"own": task.causal_model, **right}.items():
        for variable in model.variables:
            told = float(pairs.tells_apart(model, (variable,)).double().mean())
            assert told == 0 if model.fixes_output((variable,)) else told > 0.3, (known, variable)


def test_in_ioi_heads_that_write_the_answer_do_not_pass_for_those_that_carry_the_name():
    """The residual stream at the end after the last layer is the answer, whatever the base."""
    task, model = loaded("ioi"), model_of("ioi")
    last = Site("residual", 3, "blocks.3.hook_resid_post", 1, positions=-1)
    answer = Alignment({"name": [Unit(last, 0)]})
    pairs = task.pairs(128, 0)
    told = pairs.tells_apart(task.causal_model, ("name",))
    assert verify(model, task.causal_model, task.alignment, pairs, draws=0).verdict("name").verdict == "accepted"
    found = verify(model, task.causal_model, answer, pairs, draws=0).verdict("name")
    assert found.verdict == "rejected" and found.changed < 0.1 and found.tells_apart == pytest.approx(0.5, abs=0.02)
    # among the pairs that share the names the two look alike, and the evidence says so
    alike = pairs[(~told).nonzero().flatten()]
    unclear = verify(model, task.causal_model, answer, alike, draws=0).verdict("name")
    assert unclear.verdict == "cannot tell" and unclear.tells_apart == 0
    assert unclear.reservation.startswith("0.0% of the pairs tell name from the answer")
