"""Every shipped task, of numbers or of text: the units of its alignment carry its variables, and others do not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers.cards import crowded, section
from helpers.places import loaded, model_of

from tl_sparsify import list_tasks, verify


@pytest.mark.parametrize("name", list_tasks())
def test_the_alignment_carries_its_variables_and_random_units_do_not(name: str):
    """Where it carries a variable less well, the card says so among the limits, with the figure."""
    task = loaded(name)
    evidence = verify(model_of(name), task.causal_model, task.alignment, task.pairs(256, 1), draws=2)
    for variable, units in task.alignment.units.items():
        found = evidence.accuracy(variable)
        if found <= 0.9:
            [said] = re.findall(rf"`{variable}`[^`]*?([01]\.\d\d+)", section(name, "Limits"))[:1]
            assert found == pytest.approx(float(said), abs=0.05), variable
        assert evidence.accuracy(variable, intervention="do nothing") < 0.6
        random = np.nan if crowded(units) else evidence.accuracy(variable, intervention="random units")
        assert np.isnan(random) or (random < 0.6 and random < found - 0.1)
