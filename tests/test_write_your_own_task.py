"""docs/write_your_own_task.md, followed to the letter, and the template folder that it has one copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.code_blocks import blocks

import tl_sparsify as tls
from tl_sparsify.tasks.pairing import split_of
from tl_sparsify.tasks.task import own_language_model

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "write_your_own_task.md"
TEMPLATE = ROOT / "docs" / "template_task"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


@pytest.fixture(scope="module")
def template() -> tls.Task:
    return tls.load_task(TEMPLATE)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, with something in Hugging Face format that is called gpt2."""
    shutil.copytree(TEMPLATE, tmp_path / "docs" / "template_task", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(own_language_model(), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(commands: str) -> str:
    """Run a block as a user would who has activated the environment."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_page_can_be_followed_to_the_letter(page: str, checkout: Path):
    """All blocks in their order; one that begins with the name of a file is saved there."""
    steps = [(line, code, "sh") for line, code in blocks(page, "sh")]
    steps += [(line, code, "python") for line, code in blocks(page, "python")]
    assert len(steps) == page.count("\n```sh\n") + page.count("\n```python\n") == page.count("\n```") / 2
    printed, namespace = "", {"__name__": "page"}
    with torch.random.fork_rng():
        for line, code, language in sorted(steps):
            file = re.match(r"# (\S+\.py)\n", code)
            if file:
                Path(file[1]).parent.mkdir()
                Path(file[1]).write_text(code)
            elif language == "sh":
                printed += shell(code)
            else:
                exec(compile("\n" * (line - 1) + code, str(PAGE), "exec"), namespace)
    assert "my_task: which of several foods is cut first" in printed
    assert {"run.json", "evidence.csv", "report.html", "circuit.reduction", "folded"} <= {
        path.name for path in (checkout / "results" / "my_task").iterdir()
    }
    _check(namespace)


def _check(found: dict[str, Any]) -> None:
    """What the page says of the numbers is so."""
    assert found["found"].accuracy > 0.95 and found["found"].accuracy == found["other"].accuracy
    assert abs(found["constant"] - 1 / 12) < 0.01 and found["changed"] == 1
    assert all(abs(half - 0.5) < 0.01 for half in found["nothing"].values()) and found["agreement"]["last"] < 0.5
    results, evidence = found["results"], found["evidence"]
    assert results["first"].held_out["wanted"] > 0.95 and results["last"].held_out["wanted"] < 0.6
    assert evidence.accuracy("wanted") > 0.95 and evidence.accuracy("wanted", intervention="random units") < 0.6
    assert found["parity"].accuracy > 0.9
    assert torch.equal(found["same"].tokens, found["examples"].tokens)
    assert float(found["scores"].scores.max()) > 0


def test_every_line_to_change_is_marked_and_told_of(page: str):
    code = (TEMPLATE / "task.py").read_text()
    table = page[page.index("| line |") :].split("\n\n")[0]
    names = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) > 8 and all(re.search(rf"\b{name}\b", code) for name in names)
    assert code.count("EDIT") >= len(table.splitlines()) - 2
    assert len(code.splitlines()) <= 120, "read in two minutes"


def test_the_template_is_a_task_and_not_a_shipped_one(template: tls.Task):
    assert template.name == "my_task" not in tls.list_tasks() and "template_task" not in tls.list_tasks()
    assert template.wrong == ("last",) and template.alignment.units == {}
    card = (TEMPLATE / "README.md").read_text()
    for heading in ("Data", "Model", "Where the variables live", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card
    for line in template.causal_model.graph().splitlines():
        assert "-->" not in line or line.strip() in card
    assert all(f"`{wrong}`" in card for wrong in template.wrong)
    assert " / ".join(str(len(examples)) for examples in template.examples(0)) in card


def test_the_templates_data_are_sound(template: tls.Task):
    data: Any = template.dataset(0)
    prompts = {split: set(data[split]["prompt"]) for split in data}
    assert sum(map(len, prompts.values())) == sum(len(data[split]) for split in data)
    assert not prompts["train"] & set(template.dataset(1)["test"]["prompt"])
    for row in data["test"]:
        foods = re.findall(r"\w+", row["prompt"].removeprefix("Take ").split(".")[0].replace(" and ", ", "))
        assert row["answer"] == f" {foods[0]}" and row["counterfactual_answer"] == f" {foods[-1]}"
        other = re.findall(r"\w+", row["counterfactual_prompt"].removeprefix("Take ").replace(" and ", ", "))
        assert other[0] == foods[-1] and other[len(foods) - 1] == foods[0] and len(set(foods)) == len(foods)
    for split, examples in zip(data, template.examples(0), strict=True):
        labels = examples.labels[examples.labels != -100]
        assert float(labels.bincount().max()) / len(labels) == pytest.approx(template.chance, abs=0.02), split


def test_the_templates_pairs_are_balanced(template: tls.Task):
    pairs = template.pairs(128, 0)
    right = pairs.expected(template.causal_model, ())
    for variable in template.causal_model.variables:
        same = int((pairs.expected(template.causal_model, (variable,)) == right).sum())
        assert abs(same - 64) <= 1
    key = template.dataset.__self__.sentences.key  # type: ignore[attr-defined]
    slots = {"first": pairs.base_inputs["first"], "third": pairs.base_inputs["third"]}
    slots["second"] = np.array(
        [re.split(", | and ", s.removeprefix("Take "))[1] for s in pairs.base_inputs["sentence"]]
    )
    assert (split_of(key(slots)) == 2).all()


def test_the_template_takes_another_model(template: tls.Task):
    model = template.model()
    other = tls.load_task(TEMPLATE, model=model)
    assert other.model() is model
    for one, two in zip(other.examples(0), template.examples(0), strict=True):
        assert torch.equal(one.tokens, two.tokens)
