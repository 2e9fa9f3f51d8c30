"""Places name the units that a loaded model has, and a space makes the task of its inputs."""

from __future__ import annotations

from tl_sparsify import heads, load_task, neurons
from tl_sparsify.tasks.places import Places


def test_places_are_the_units_of_the_model_they_are_for():
    task = load_task("planted_equality")
    model = task.model()
    places = Places(heads=4, neurons=32)
    assert places.head(1, 3, position=4) == heads(model)["L1H3"].at(4)
    assert places.neuron(0, 31, position=1) == neurons(model)["L0N31"].at(1)
    assert task.alignment.units["right"] == [heads(model)["L1H3"].at(4)]


def test_the_task_of_a_space_has_its_causal_model_and_the_true_units_of_its_folder():
    task = load_task("planted_backup")
    assert task.causal_model is task.causal_models["copy"] and task.truth == {"weights": ("L0H1", "L1H2")}
    assert load_task("induction").truth == {}
