"""Every shipped task: what its card says of the data, the labels, the pairs and the model is true.

A task of this repository has a dataset whose columns are the causal model's inputs, in the order of its examples, and
a folder ``model`` with weights and ``metrics.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tl_sparsify import Examples, Pairs, Task, heads, list_tasks, load_task, neurons, residuals, verify

FOLDER = Path(__file__).parent.parent / "tasks"
NAMES = list_tasks()
SPLITS = ("train", "validation", "test")
HEADINGS = ("Data", "Model", "Where the variables live", "Limits", "Licence")

every_task = pytest.mark.parametrize("name", NAMES)


@cache
def loaded(name: str) -> Task:
    return load_task(name)


@cache
def splits(name: str, seed: int = 0) -> dict[str, Examples]:
    return dict(zip(SPLITS, loaded(name).examples(seed), strict=True))


@cache
def model_of(name: str) -> Any:
    return loaded(name).model()


def columns(name: str, split: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The causal model's inputs, from the raw data."""
    data = loaded(name).dataset(seed)[split].with_format("numpy")
    return {column: np.asarray(data[column]) for column in loaded(name).causal_model.inputs}


def answers(name: str, inputs: dict[str, np.ndarray]) -> list[int]:
    """The causal model's output as a token, for each input."""
    model, tokens = loaded(name).causal_model, loaded(name).pairs(16, 0).answers
    return [tokens[value] for value in model.run(inputs)[model.output].tolist()]


def single(labels: torch.Tensor) -> list[int]:
    """The one label of each row."""
    assert bool(((labels != -100).sum(1) == 1).all())
    return labels[labels != -100].tolist()


def rows(tokens: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in tokens.tolist()]


def card(name: str) -> str:
    return (FOLDER / name / "README.md").read_text()


def metrics(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name / "model" / "metrics.json").read_text())


def test_there_are_tasks():
    assert {path.parent.name for path in FOLDER.glob("*/task.py")} == set(NAMES) != set()


@every_task
def test_the_card_has_its_parts(name: str):
    text = card(name)
    assert text.startswith("# ") and len(text.splitlines()[0]) > 2
    found = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS)
    for heading in HEADINGS:
        body = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert len(body.split()) >= 5, f"{heading} is empty"
    assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b", text)
    assert not re.search(r"\b[A-Z]{5,}\b (seconds|minutes|%)", text), "a figure was never filled in"


@every_task
def test_the_card_draws_the_causal_model_and_names_its_rivals(name: str):
    text, task = card(name), loaded(name)
    for line in task.causal_model.graph().splitlines():
        if "-->" in line:
            assert line.strip() in text
    assert all(f"`{rival}`" in text for rival in task.causal_models if task.causal_models[rival] != task.causal_model)


@every_task
def test_no_example_occurs_twice_and_the_splits_are_disjoint(name: str):
    found = [row for examples in splits(name).values() for row in rows(examples.tokens)]
    assert len(set(found)) == len(found)


@every_task
def test_no_seed_moves_an_example_to_another_split(name: str):
    trained = {row for seed in (0, 1) for row in rows(splits(name, seed)["train"].tokens)}
    held_out = {row for seed in (0, 2) for split in SPLITS[1:] for row in rows(splits(name, seed)[split].tokens)}
    assert not trained & held_out


@every_task
def test_the_data_are_a_function_of_the_seed(name: str):
    task = loaded(name)
    first, again, other = (task.dataset(seed) for seed in (3, 3, 4))
    assert tuple(first) == SPLITS
    assert all(first[split].to_dict() == again[split].to_dict() for split in SPLITS)
    assert all(first[split].to_dict() != other[split].to_dict() for split in SPLITS)
    for one, two in zip(task.examples(3), task.examples(3), strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
        assert one.counterfactual_tokens is not None and two.counterfactual_tokens is not None
        assert torch.equal(one.counterfactual_tokens, two.counterfactual_tokens)


@every_task
def test_making_data_leaves_the_random_state_alone(name: str):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    loaded(name).examples(5)
    loaded(name).pairs(16, 5)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_causal_models_answers(name: str, split: str):
    examples, inputs = splits(name)[split], columns(name, split)
    assert single(examples.labels) == answers(name, inputs)
    assert len(set(single(examples.labels))) > 1
    words = set(zip(loaded(name).dataset(0)[split]["answer"], single(examples.labels), strict=True))
    assert len(words) == len({word for word, _ in words}) == len({label for _, label in words})


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_counterfactual_labels_are_the_causal_models_answers(name: str, split: str):
    examples = splits(name)[split]
    assert examples.counterfactual_tokens is not None and examples.counterfactual_labels is not None
    right = dict(zip(rows(examples.tokens), answers(name, columns(name, split)), strict=True))
    sources = rows(examples.counterfactual_tokens)
    assert single(examples.counterfactual_labels) == [right[row] for row in sources]
    assert all(source != base for source, base in zip(sources, rows(examples.tokens), strict=True))
    where = (examples.labels != -100).nonzero()
    assert torch.equal(where, (examples.counterfactual_labels != -100).nonzero())


@every_task
def test_a_constant_answer_has_the_accuracy_of_chance(name: str):
    for examples in splits(name).values():
        labels = single(examples.labels)
        assert max(labels.count(label) for label in set(labels)) / len(labels) == loaded(name).chance


@every_task
def test_counterfactuals_change_the_answer_of_half_of_the_examples(name: str):
    for examples in splits(name).values():
        assert examples.counterfactual_labels is not None
        assert float((examples.labels != examples.counterfactual_labels).any(1).double().mean()) == 0.5


@every_task
@pytest.mark.parametrize(("n", "seed"), [(512, 0), (64, 7)])
def test_doing_nothing_is_right_for_half_of_the_pairs(name: str, n: int, seed: int):
    task = loaded(name)
    pairs = task.pairs(n, seed)
    own = torch.tensor(single(pairs.base.labels))
    for variable in task.causal_model.variables:
        expected = pairs.expected(task.causal_model, (variable,))
        assert float((expected == own).double().mean()) == 0.5, variable


@every_task
def test_pairs_are_right_and_distinct_and_were_never_trained_on(name: str):
    task = loaded(name)
    trained = set(rows(splits(name)["train"].tokens)) | set(rows(splits(name)["validation"].tokens))
    pairs = task.pairs(512, 0)
    assert len(pairs) == 512
    for inputs, examples in ((pairs.base_inputs, pairs.base), (pairs.source_inputs, pairs.source)):
        assert set(inputs) == set(task.causal_model.inputs)
        assert single(examples.labels) == answers(name, dict(inputs))
        assert not trained & set(rows(examples.tokens))
    assert all(base != source for base, source in zip(rows(pairs.base.tokens), rows(pairs.source.tokens), strict=True))


@every_task
def test_pairs_and_examples_are_encoded_alike(name: str):
    pairs, examples, inputs = loaded(name).pairs(64, 0), splits(name)["test"], columns(name, "test")
    assert pairs.base.tokens.shape[1] == examples.tokens.shape[1]
    for column, values in inputs.items():  # the token that stands for a value is the same in both
        places = [p for p in range(examples.tokens.shape[1]) if (examples.tokens[:, p].numpy() == values).all()]
        assert any((pairs.base.tokens[:, p].numpy() == pairs.base_inputs[column]).all() for p in places)


def tensors(pairs: Pairs) -> Iterator[torch.Tensor]:
    for examples in (pairs.base, pairs.source):
        yield from (examples.tokens, examples.labels)


@every_task
def test_pairs_are_a_function_of_number_and_seed(name: str):
    task = loaded(name)
    same = zip(tensors(task.pairs(40, 3)), tensors(task.pairs(40, 3)), strict=True)
    assert all(torch.equal(one, two) for one, two in same)
    assert not torch.equal(task.pairs(40, 3).base.tokens, task.pairs(40, 4).base.tokens)
    assert [len(task.pairs(n, 0)) for n in (1, 5, 16)] == [1, 5, 16]


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
    labels = examples.labels[where]
    assert found["n"] == len(labels)
    assert round(float((logits.argmax(1) == labels).double().mean()), 6) == found["accuracy"] >= 0.99
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
    assert {file.suffix for file in files} <= {".py", ".md", ".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 3 * 2**20


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for inner, below in value.items():
            yield from leaves(below, inner)
    else:
        yield key, value


@every_task
def test_the_cards_figures_are_those_of_the_metrics(name: str):
    text, found = card(name), metrics(name)
    assert f"{found['parameters']:,} parameters" in text
    assert f"{found['seconds']:,} seconds" in text
    assert f"{found['steps_run']:,} steps" in text
    tables = [found["test_split"], *found["test_space"].values()]
    for table in tables:
        assert f"| {table['n']:,} | {table['accuracy']:.4f} | {table['nats']:g}".replace("e-0", "e-") in text
    lines = re.findall(r"^\|[^|]*\| [\d,]+ \| [01]\.\d{4} \|", text, flags=re.MULTILINE)
    assert len(lines) == len(tables), "the card has an accuracy that is not in metrics.json"


@every_task
def test_the_cards_sizes_are_those_of_the_data_and_the_model(name: str):
    text = card(name)
    assert " / ".join(f"{len(examples):,}" for examples in splits(name).values()) in text
    units = heads(model_of(name)) + neurons(model_of(name))
    assert f"{len(units):,} units ({units.describe()})" in text


@every_task
def test_the_alignments_variables_and_units_exist(name: str):
    task, model = loaded(name), model_of(name)
    assert set(task.alignment.variables) <= set(task.causal_model.variables)
    sites = {site.hook: site for site in (heads(model) + neurons(model) + residuals(model)).sites}
    length = splits(name)["test"].tokens.shape[1]
    for variable, units in task.alignment.units.items():
        assert len({unit.name for unit in units}) == len(units), variable
        for unit in units:
            there = sites[unit.site.hook]
            assert (unit.site.kind, unit.site.layer, unit.site.size) == (there.kind, there.layer, there.size)
            assert 0 <= unit.index < unit.site.size
            mask = unit.site.position_mask(1, length)
            assert mask is None or bool(mask.any())


@every_task
def test_competing_models_have_the_same_inputs_and_one_of_them_is_the_tasks_own(name: str):
    task = loaded(name)
    assert task.causal_model in task.causal_models.values() and len(task.causal_models) > 1
    assert all(rival.inputs == task.causal_model.inputs for rival in task.causal_models.values())
    base = task.pairs(64, 0).base_inputs
    right = task.causal_model.run(base)[task.causal_model.output]
    assert all(rival.run(base)[rival.output].shape == right.shape for rival in task.causal_models.values())


@every_task
def test_the_alignment_carries_its_variables_and_random_units_do_not(name: str):
    task = loaded(name)
    evidence = verify(model_of(name), task.causal_model, task.alignment, task.pairs(256, 1), draws=2)
    for variable in task.alignment.variables:
        assert evidence.accuracy(variable) > 0.9
        for control in ("do nothing", "random units"):
            assert evidence.accuracy(variable, intervention=control) < 0.6


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
