"""Every shipped task: what its card says of the model and of the places of its variables is true."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.cards import FOLDER, card, single
from helpers.places import carried, loaded, model_of, places
from helpers.shipped import every_task, metrics, splits
from safetensors import safe_open

from tl_sparsify import (
    heads,
    neurons,
    residuals,
    verify,
)


@every_task
def test_the_shipped_model_is_in_evaluation_mode_and_the_same_each_time(name: str):
    one, two = loaded(name).model(), loaded(name).model()
    assert not any(module.training for module in one.modules())
    tokens = splits(name)["test"].tokens[:8]
    with torch.no_grad():
        assert torch.equal(one(tokens), two(tokens))


@every_task
def test_the_shipped_model_is_as_good_as_its_metrics_say(name: str):
    examples, found = splits(name)["test"], metrics(name)["test_split"]
    where = examples.labels != -100
    with torch.no_grad():
        logits = model_of(name)(examples.tokens)[where]
    labels, needed = examples.labels[where], 1 if metrics(name)["kind"] == "compiled" else 0.99
    assert found["n"] == len(labels)
    assert round(float((logits.argmax(1) == labels).double().mean()), 6) == found["accuracy"] >= needed
    loss = float(torch.nn.functional.cross_entropy(logits.double(), labels))
    assert loss == pytest.approx(found["nats"], rel=1e-3, abs=1e-6)  # written with six decimals
    assert sum(parameter.numel() for parameter in model_of(name).parameters()) == metrics(name)["parameters"]


@every_task
def test_the_weights_are_one_small_safetensors_file(name: str):
    [weights] = (FOLDER / name / "model").glob("*.safetensors")
    with safe_open(str(weights), framework="pt") as file:
        sizes = [int(np.prod(file.get_slice(key).get_shape())) for key in file.keys()]
    assert sum(sizes) >= metrics(name)["parameters"]
    files = [file for file in (FOLDER / name).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {file.suffix for file in files} <= {".py", ".md", ".json", ".safetensors", ".sha256"}
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20


@every_task
def test_the_cards_figures_are_those_of_the_metrics(name: str):
    text, found = card(name), metrics(name)
    assert f"{found['parameters']:,} parameters" in text
    if found["kind"] == "compiled":  # nothing was trained
        assert not {"seconds", "steps_run"} & set(found)
    else:
        assert f"{found['seconds']:,} seconds" in text
        assert f"{found['steps_run']:,} steps" in text
    if found["kind"] == "planted":
        assert any(f"{found['worst_outside']:.{digits}f}" in text for digits in (3, 4))
    tables = [found["test_split"], *found.get("test_space", {}).values()]
    for table in tables:
        assert f"| {table['n']:,} | {table['accuracy']:.4f} | {table['nats']:g}".replace("e-0", "e-") in text
    lines = re.findall(r"^\|[^|]*\| [\d,]+ \| [01]\.\d{4} \|", text, flags=re.MULTILINE)
    assert len(lines) == len(tables), "the card has an accuracy that is not in metrics.json"


@every_task
def test_the_alignments_variables_and_units_exist(name: str):
    task, model = loaded(name), model_of(name)
    assert set(task.alignment.variables) <= set(task.causal_model.variables)
    sites = {site.hook: site for site in (heads(model) + neurons(model) + residuals(model)).sites}
    length, width = splits(name)["test"].tokens.shape[1], model.cfg.d_model
    for variable, units in task.alignment.units.items():
        assert len({unit.name for unit in units}) == len(units), variable
        for site in {unit.site for unit in units}:
            assert site.hook in model.hook_dict
            if site.basis is None:  # a head may also be meant at its queries, keys or values
                there = sites[re.sub(r"attn\.hook_[qkv]$", "attn.hook_z", site.hook)]
                assert (site.kind, site.layer, site.size) == (there.kind, there.layer, there.size)
            else:
                assert site.kind == "direction" and site.basis.shape[0] == width and 2 * site.size <= width
            assert site.positions is not None, "an alignment says where"
            mask = site.position_mask(1, length)
            assert mask is not None and bool(mask.any())
        assert all(0 <= unit.index < unit.site.size for unit in units)


@every_task
def test_competing_models_have_the_same_inputs_and_one_of_them_is_the_tasks_own(name: str):
    task = loaded(name)
    assert task.causal_model in task.causal_models.values() and len(task.causal_models) > 1
    assert all(rival.inputs == task.causal_model.inputs for rival in task.causal_models.values())
    assert set(task.wrong) <= {rival for rival, model in task.causal_models.items() if model != task.causal_model}
    assert task.wrong, "a task has a wrong rival"
    base = task.pairs(64, 0).base_inputs
    right = task.causal_model.run(base)[task.causal_model.output]
    for rival, model in task.causal_models.items():
        found = model.run(base)[model.output]
        assert found.shape == right.shape and set(found.tolist()) <= set(task.pairs(16, 0).answers)
        assert rival in task.wrong or (found == right).all(), f"{rival} answers otherwise: it is wrong"


@every_task
def test_the_network_does_not_implement_the_wrong_models(name: str):
    """A wrong model gives other answers; or one of its variables is not where the alignment says, or, where that does
    not speak of it, at no place of one position."""
    task, pairs = loaded(name), loaded(name).pairs(256, 1)
    pairs = replace(pairs, base=replace(pairs.base, choices=None))  # any token may be the answer
    for wrong in task.wrong:
        rival = task.causal_models[wrong]
        found = [float((pairs.expected(rival, ()) == torch.tensor(single(pairs.base.labels))).double().mean())]
        inner = set(rival.variables) - {rival.output}
        for variable in inner & set(task.alignment.variables):
            found.append(carried(name, rival, variable, task.alignment.units[variable], pairs))
        for variable in inner - set(task.alignment.variables):
            everywhere = places(model_of(name), pairs.base.tokens.shape[1])
            found.append(max(carried(name, rival, variable, units, pairs) for units in everywhere))
        assert min(found) < 0.9, wrong


@pytest.mark.slow
def test_the_card_of_hierarchical_equality_has_the_alignments_accuracies():
    task = loaded("hierarchical_equality")
    evidence = verify(model_of(task.name), task.causal_model, task.alignment, task.pairs(2048, 0), draws=0)
    frame = evidence.to_frame()
    lines = card(task.name).splitlines()
    for variable, start in (("left", "**L1H0 at"), ("right", "**L1H1 at"), ("same", "**48 neurons of layer 2 at")):
        [line] = [line for line in lines if line.startswith(f"| {start}")]
        [found] = frame[
            (frame.model == "original") & (frame.intervention == "aligned units") & (frame.variable == variable)
        ].itertuples()
        assert f"**{found.accuracy:.3f}** ({found.accuracy_changed:.3f})" in line
