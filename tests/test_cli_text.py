"""The command line on tasks of text: any language model in Hugging Face format, with the alignment searched for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.commands import QUICK, command
from helpers.tiny_task import files_in
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tl_sparsify import heads, load_folded, load_task, neurons
from tl_sparsify import run as running

SHIPPED = Path(__file__).parent.parent / "tasks" / "language_model" / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_run_takes_a_checkpoint_and_looks_for_the_variables(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    short = ("--effort", "quick", "--steps", "1")  # 128 pairs
    outcome = command("run", "gendered_pronoun", "--model", checkpoint, *QUICK, *short, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    about = json.loads((out / "run.json").read_text())
    assert about["task"] == "gendered_pronoun" and about["model"] == str(checkpoint)
    assert list(about["alignment"]) == ["gender"] and about["alignment"]["gender"]
    task = load_task("gendered_pronoun", model=checkpoint)
    model, (_, _, test) = task.model(), task.examples(0)
    units = heads(model) + neurons(model)
    assert set(pd.read_csv(out / "scores.csv").unit) == set(units.names) and len(units) == 4 + 128
    evidence = pd.read_csv(out / "evidence.csv", keep_default_na=False)
    assert set(evidence.variable) >= {"gender"} and set(evidence.model) >= {"original", "reduced"}
    sizes = pd.read_csv(out / "fold.csv").set_index("part")
    own = sum(parameter.numel() for parameter in GPT2LMHeadModel.from_pretrained(checkpoint).parameters())
    assert (sizes.loc["whole model", ["parameters", "parameters_kept"]] == own).all()  # nothing was removed
    small = load_folded(out / "folded")
    with torch.no_grad():
        logits = [m(test.tokens, attention_mask=test.attention_mask.long())[:, -1] for m in (model, small)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_do_the_task_is_said_before_the_search(checkpoint: Path, tmp_path: Path):
    outcome = command("run", "ioi", "--model", checkpoint, "--out", tmp_path)
    assert outcome.code == 2 and not outcome.out.count("Path")
    assert outcome.err.count("\n") == 1 and "pairs right on both inputs: nothing to align" in outcome.err
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("task", "model", "said"),
    [
        ("hierarchical_equality", "gpt2", "model is given, but the task hierarchical_equality has a model of its own"),
        ("ioi", "./nowhere", "there is no folder nowhere"),
    ],
)
def test_a_model_that_is_none_gets_one_sentence(task: str, model: str, said: str, tmp_path: Path):
    outcome = command("run", task, "--model", model, "--out", tmp_path)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err


def test_steps_of_refits_are_positive(tmp_path: Path):
    outcome = command("run", "hierarchical_equality", "--steps", "0", "--out", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and "--steps is 0; at least one is needed" in outcome.err


def test_prompts_that_begin_otherwise_are_another_search(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ("run", "gendered_pronoun", "--model", checkpoint, "--effort", "quick", "--rounds", "1", "--steps", "1")
    arguments += ("--units", "heads", "--examples", "16", "--no-baselines", "--no-align", "--out", tmp_path)

    def stopped(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "sharpen", stopped)
        assert command(*arguments, "--prepend-bos").code == 130
    other = command(*arguments, "--no-prepend-bos")
    assert (other.code, other.err) == (0, "") and "going on with" not in other.out
    assert any(name.endswith("state.search") for name in files_in(tmp_path))
    again = command(*arguments, "--prepend-bos")
    assert (again.code, again.err) == (0, "") and "going on with the search that was interrupted" in again.out
    assert "afresh" not in again.out and not (tmp_path / "search").exists()
