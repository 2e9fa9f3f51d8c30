"""A task of one's own with a model of 28 units, and the files that a run of it writes."""

from __future__ import annotations

from pathlib import Path

from helpers.commands import Outcome

TASK = """
import numpy as np
import torch
from transformer_lens import TransformerBridge, TransformerBridgeConfig
import tl_sparsify as tls

PARITY = tls.CausalModel(("x", "y"), {"odd": lambda x: x % 2, "answer": lambda odd, y: odd + 2 * (y > 2)}, "answer")

def model():
    config = dict(d_model=8, d_head=4, n_heads=2, n_layers=2, n_ctx=4, d_vocab=6, d_mlp=12, act_fn="relu",
                  normalization_type="LN", seed=0)
    with torch.random.fork_rng():
        made = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return made.eval()

def side(n, rng):
    tokens = rng.integers(6, size=(n, 4))
    inputs = {"x": tokens[:, 1], "y": tokens[:, 2]}
    labels = np.full_like(tokens, -100)
    labels[:, 3] = PARITY.run(inputs)["answer"]
    return inputs, tls.Examples(torch.tensor(tokens), torch.tensor(labels), choices=torch.arange(4))

def examples(seed):
    rng = np.random.default_rng(seed)
    return tuple(side(n, rng)[1] for n in (48, 24, 32))

def pairs(n, seed):
    rng = np.random.default_rng(seed)
    (base_inputs, base), (source_inputs, source) = side(n // 8, rng), side(n // 8, rng)
    return tls.Pairs(base_inputs, source_inputs, base, source, {i: i for i in range(4)})

def task():
    head = tls.Site(kind="head", layer=0, hook="blocks.0.attn.hook_z", size=2, positions=3)
    return tls.Task(
        name="tiny", description="a random model", model=model, dataset=lambda seed: {}, examples=examples,
        causal_model=PARITY, alignment=tls.Alignment({"odd": [tls.Unit(head, 0)]}), pairs=pairs, chance=0.25,
    )
"""
FILES = (
    "baselines.csv", "causal.png", "circuit.reduction", "evaluation.csv", "evidence.csv", "fold.csv",
    "folded/folded.safetensors", "map.png", "path.csv", "risk.png", "run.json", "scores.csv",
)  # fmt: skip


def task_folder(parent: Path, code: str = TASK) -> Path:
    folder = parent / "tiny"
    folder.mkdir()
    (folder / "task.py").write_text(code)
    (folder / "README.md").write_text("# Tiny\n")
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def results_in(folder: Path) -> dict[str, bytes]:
    """The same without the rounds of a search that was interrupted."""
    return {name: content for name, content in files_in(folder).items() if not name.startswith("search/")}


def sentence(outcome: Outcome) -> str:
    """The one sentence of a wrong argument."""
    assert outcome.code == 2 and outcome.out == ""
    [line] = outcome.err.splitlines()
    assert line.startswith("tl-sparsify: ")
    return line
