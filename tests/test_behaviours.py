"""Behaviours: two kinds of contexts that use two heads are found, each with its head; random groups gain nothing."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import command
from helpers.models import seeded, unchanged
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import tl_sparsify as tls

NUMBERS, KINDS = 5, (5, 6)  # ids of what is copied, and of the token that says from where


class Switch(HookedRootModule):
    """Contexts ``a b kind``: head 0 copies ``a`` after the one kind, head 1 copies ``b``, less surely, after the other;
    heads 2 and 3 write a little of both, always."""

    def __init__(self):
        super().__init__()
        self.copied = torch.nn.Parameter(torch.eye(NUMBERS + 2, NUMBERS, dtype=torch.float64))
        self.hook_z = HookPoint()
        self.setup()
        self.eval()

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        a, b = self.copied[tokens[:, -3]], self.copied[tokens[:, -2]]
        first = (tokens[:, -1:] == KINDS[0]).double()
        heads = torch.stack([6 * first * a, 4 * (1 - first) * b, 0.1 * a, 0.1 * b], 1)
        z = self.hook_z(heads[:, None].expand(-1, tokens.shape[1], -1, -1))
        return z.sum(2)


UNITS = tls.Units((tls.Site("head", 0, "hook_z", 4),))
SETTINGS: dict[str, Any] = {"count": 2, "size": 0.25, "rounds": 1, "least": 8, "bootstrap": 50}


@cache
def mixed(n: int = 64) -> tuple[Any, tls.Examples]:
    """The model, and contexts of both kinds."""
    tokens = torch.randint(NUMBERS, (n, 3), generator=seeded(1))
    second = torch.rand(n, generator=seeded(2)) < 0.45
    tokens[:, 2] = torch.where(second, KINDS[1], KINDS[0])
    labels = torch.full_like(tokens, -100)
    labels[:, 2] = torch.where(second, tokens[:, 1], tokens[:, 0])
    return Switch(), tls.Examples(tokens, labels)


@cache
def found(batch_size: int | None = None) -> tls.Behaviours:
    model, examples = mixed()
    with unchanged(model):
        return tls.behaviours(model, examples, UNITS, batch_size=batch_size, **SETTINGS)


def test_each_kind_is_a_behaviour_and_its_circuit_is_its_head():
    _, examples = mixed()
    kinds = examples.tokens[:, 2]
    assert adjusted_rand_score(kinds.numpy(), found().groups.numpy()) == 1
    by_kind = {int(kinds[one.train[0]]): one for one in found().found}
    assert [by_kind[kind].reduction.circuit.names for kind in KINDS] == [("L0H0",), ("L0H1",)]
    assert found().together.circuit.names == ("L0H0",)  # of the larger and surer kind
    for kind, one in by_kind.items():
        assert one.name.startswith(f"{kind} → ")
        assert len(one) == int((kinds == kind).sum()) and one.shown[0].endswith("]")
        assert bool((one.train % 2 == 0).all()) and bool((one.held_out % 2 == 1).all())
    assert by_kind[KINDS[1]].gain.low > 0.1 and by_kind[KINDS[0]].gain.value == 0
    assert found().gain.low > 0.1
    # a random group is of both kinds, and its circuit is the one of all
    assert found().random_gain.value == 0 == found().random_gain.high
    assert all(one.random.value == one.together.value for one in found().found)


def test_risks_are_those_measured_one_by_one():
    model, examples = mixed()
    for i, one in enumerate(found().found):
        held_out = examples[one.held_out]
        for j, other in enumerate(found().found):
            risk = tls.risk(model, other.reduction, held_out).mean
            assert float(found().cross[i, j]) == pytest.approx(risk, rel=1e-10, abs=1e-14)
        together = tls.risk(model, found().together, held_out).mean
        assert one.together.value == pytest.approx(together, rel=1e-10)
        assert one.gain.value == pytest.approx(together - one.risk.value, rel=1e-10, abs=1e-14)
        assert one.risk.low <= one.risk.value <= one.risk.high
    mean = sum(len(one.held_out) * one.gain.value for one in found().found)
    assert found().gain.value == pytest.approx(mean / sum(len(one.held_out) for one in found().found), rel=1e-10)


@pytest.mark.parametrize("batch_size", [7])
def test_batches_change_nothing(batch_size: int):
    whole, parts = found(), found(batch_size)
    assert torch.equal(whole.groups, parts.groups)
    assert [one.reduction.circuit for one in whole.found] == [one.reduction.circuit for one in parts.found]
    torch.testing.assert_close(whole.cross, parts.cross, rtol=1e-10, atol=1e-14)
    numbers = [frame.drop(columns=["behaviour", "units"]) for frame in (whole.to_frame(), parts.to_frame())]
    torch.testing.assert_close(*(torch.tensor(some.to_numpy()) for some in numbers), rtol=1e-10, atol=1e-14)


def test_padding_and_a_second_call_change_nothing():
    model, examples = mixed()
    before = torch.full((len(examples), 2), 3)
    padded = tls.Examples(
        torch.cat([before, examples.tokens], 1),
        torch.cat([torch.full_like(before, -100), examples.labels], 1),
        torch.cat([torch.zeros_like(before).bool(), torch.ones_like(examples.tokens).bool()], 1),
    )
    assert torch.equal(tls.behaviours(model, padded, UNITS, **SETTINGS).groups, found().groups)
    again = tls.behaviours(model, examples, UNITS, **SETTINGS)
    assert again.to_frame().equals(found().to_frame()) and again.markdown() == found().markdown()


def test_a_folder_holds_the_circuits_of_one_result(tmp_path: Path):
    found().save(tmp_path)
    circuits = sorted(path.name for path in (tmp_path / "circuits").iterdir())
    for name in (f"{len(found().found)}.reduction", "97.reduction", "mine.reduction"):
        found().together.save(tmp_path / "circuits" / name)
    found().save(tmp_path)
    assert sorted(path.name for path in (tmp_path / "circuits").iterdir()) == sorted([*circuits, "mine.reduction"])


def test_small_groups_are_left_over():
    model, examples = mixed()
    settings: dict[str, Any] = SETTINGS | {"least": 16}
    some = tls.behaviours(model, examples, UNITS, **settings)
    assert len(some.found) == 1 and set(some.groups.tolist()) == {-1, 0}
    left = int((some.groups < 0).sum())
    assert f"{left} of 64 contexts are in groups too small" in some.markdown()
    assert sum(len(one) for one in some.found) == 64 - left


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 1}, "count is 1; it must be at least 2"),
        ({"size": 1.0}, "size is 1.0, which keeps all 4 units"),
        ({"least": 50}, "examples holds 64 contexts; 2 groups of at least 50"),
        ({"level": 1.0}, "level is 1.0"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], said: str):
    model, examples = mixed()
    with unchanged(model), pytest.raises(ValueError, match=said):
        tls.behaviours(model, examples, UNITS, **SETTINGS | settings)


@pytest.fixture(scope="module")
def small() -> Any:
    return tls.text.load_language_model(tls.task.own_language_model())


TEXT = "\n\n".join(
    f"{name} went to the {place}. Where is {name}? {he} is at the {place}."
    for name, he in (("Ann", "She"), ("Tom", "He"), ("Mary", "She"), ("John", "He"))
    for place in ("farm", "garden", "school")
)


@pytest.mark.parametrize("length", [6, 40])
def test_contexts_are_prefixes_of_windows_that_the_model_continues(small: Any, length: int):
    documents = TEXT.split("\n\n")
    with unchanged(small):
        taken = tls.contexts(small, TEXT, n=9, length=length, probability=0.3)
        again = tls.contexts(small, documents, n=9, length=length, probability=0.3, batch_size=5)
    assert torch.equal(taken.tokens, again.tokens) and torch.equal(taken.labels, again.labels)
    assert len(taken) == 9
    windows = [
        row[i : i + length]
        for row in small.tokenizer(documents, add_special_tokens=False)["input_ids"]
        for i in range(0, len(row), length)
    ]
    start = [small.tokenizer.bos_token_id] if small.cfg.default_prepend_bos else []
    at = -1
    for i in range(len(taken)):
        mask = torch.ones_like(taken.tokens[i]).bool() if taken.attention_mask is None else taken.attention_mask[i]
        row, answer = taken.tokens[i][mask].tolist(), int(taken.labels[i, -1])
        with torch.no_grad():
            p = small(torch.tensor([row]))[0, -1].double().softmax(-1)
        assert float(p[answer]) >= 0.3 - 1e-6 and len(row) >= len(start) + 4
        wanted = [*row[len(start) :], answer]
        # in the order of the text, and of each window at most once
        at = next(j for j in range(at + 1, len(windows)) if windows[j][: len(wanted)] == wanted)
        assert row[: len(start)] == start


def test_lines_may_end_as_windows_ends_them(small: Any):
    unix, windows = (tls.contexts(small, text, length=40) for text in (TEXT, TEXT.replace("\n", "\r\n")))
    assert torch.equal(unix.tokens, windows.tokens) and torch.equal(unix.labels, windows.labels)


def test_what_is_no_text_for_contexts_is_said(small: Any):
    with pytest.raises(ValueError, match="no document of more than 4 tokens"):
        tls.contexts(small, "\n\n \n")
    with pytest.raises(ValueError, match=r"length is 97, .* is 96"):
        tls.contexts(small, TEXT, length=97)
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        tls.contexts(small, TEXT, probability=1.5)
    with pytest.raises(ValueError, match=r"none has a token to which the model gives 0\.999999"):
        tls.contexts(small, "zq vx zq kk rr ww qq", probability=0.999999)
    with pytest.raises(ValueError, match="has no tokenizer"):
        tls.contexts(mixed()[0], TEXT)


def test_the_command_writes_a_table_and_circuits(tmp_path: Path):
    folder, file, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(tls.task.own_language_model())
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file.write_text("\n\n".join([TEXT] * 4))
    wanted = ("--model", folder, "--count", "2", "--length", "8", "--probability", "0", "--rounds", "1", "--out", out)
    for seed in ("0", "1"):  # what is there is replaced
        outcome = command("behaviours", file, *wanted, "--seed", seed, "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
    about = json.loads((out / "behaviours.json").read_text())
    names = {f"{i}.reduction" for i in range(len(about["behaviours"]))} | {"together.reduction"}
    assert {path.name for path in (out / "circuits").iterdir()} == names
    assert {path.name for path in out.iterdir()} <= {"behaviours.json", "behaviours.md", "circuits"}
    first = about["behaviours"][0]
    assert tls.Reduction.load(out / "circuits" / "0.reduction").circuit.names == tuple(first["units"])
    assert len(first["units"]) == 2 and len(first["shown"]) == 3 and first["name"].count("→") == 1
    table = (out / "behaviours.md").read_text()
    assert table.count("\n| 0 |") == 3 and "circuit of 2 units" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.txt",), "TEXT_FILE nowhere.txt cannot be read: No such file"),
        ((Path(__file__), "--keep", "2"), "--keep is 2.0"),
        ((Path(__file__), "--model", "./nowhere"), "there is no folder nowhere"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(arguments: tuple[Any, ...], said: str, tmp_path: Path):
    outcome = command("behaviours", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and said in outcome.err
