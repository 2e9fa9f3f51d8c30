"""Baselines: the signature of the scores, and a control that knows nothing of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from tl_sparsify import Examples, Site, Units, baselines, score
from tl_sparsify.score import Scores

UNITS = Units((Site("neuron", 0, "hook_neurons", 60), Site("head", 1, "hook_heads", 40)))
EXAMPLES = Examples(torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long))


def public(module: Any) -> list[Callable[..., Any]]:
    """The functions that a module defines for others."""
    found = inspect.getmembers(module, inspect.isfunction)
    return [function for name, function in found if function.__module__ == module.__name__ and name[0] != "_"]


class Unusable(HookedRootModule):
    """A model that counts how often it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.hook_neurons, self.hook_heads = HookPoint(), HookPoint()
        self.runs = 0
        self.setup()
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return self.weight * tokens


def random(seed: int = 0) -> Scores:
    return baselines.random(Unusable(), EXAMPLES, UNITS, seed=seed)


@pytest.mark.parametrize("method", [*public(baselines), score.risk, score.variance], ids=lambda f: f.__name__)
def test_methods_have_one_signature(method: Callable[..., Any]):
    parameters = inspect.signature(method).parameters
    assert list(parameters)[:3] == ["model", "examples", "units"]
    further = [parameter for name, parameter in parameters.items() if name not in ("model", "examples", "units")]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in further)
    assert "seed" in parameters
    assert inspect.getdoc(method)


def test_random_is_a_score_for_every_unit():
    found = random()
    assert found.units == UNITS and found.scores.shape == (100,)
    assert bool(((found.scores >= 0) & (found.scores < 1)).all())
    assert len(set(found.scores.tolist())) == 100
    assert bool(found.stderr.isnan().all())
    assert (found.name, found.forward_passes, found.backward_passes) == ("random", 0, 0)


def test_random_is_a_function_of_the_seed():
    assert torch.equal(random(3).scores, random(3).scores)
    assert not torch.equal(random(3).order, random(4).order)


def test_random_uses_neither_the_model_nor_the_global_random_state():
    model, state = Unusable(), torch.get_rng_state()
    baselines.random(model, EXAMPLES, UNITS)
    assert model.runs == 0 and torch.equal(torch.get_rng_state(), state)


def test_random_prefers_no_unit():
    chosen = torch.stack([random(seed).top(0.2).mask for seed in range(500)])
    assert bool((chosen.sum(1) == 20).all())
    often = chosen.double().mean(0)
    assert bool(((often - 0.2).abs() < 5 * (0.2 * 0.8 / 500) ** 0.5).all())
    first, second = UNITS.split(often)
    assert float(first.mean()) == pytest.approx(float(second.mean()), abs=0.02)


def test_the_table_of_random_scores_names_every_unit():
    frame = random().to_frame()
    assert list(frame.columns) == ["unit", "kind", "layer", "index", "score", "stderr"]
    assert tuple(frame.unit) == UNITS.names and frame.score.tolist() == random().scores.tolist()
