"""Training of the shipped native models: AdamW with warm-up and a cosine, the best validation accuracy kept.

Run the scripts that use it from the repository's root: ``python -m tasks.NAME.train``.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native

import tl_sparsify as tls
from tl_sparsify.core.prompts import NO_LABEL
from tl_sparsify.tasks.native import save_native

WARM_UP = 300


def transformer(
    *, layers: int, heads: int, width: int, mlp: int, vocabulary: int, length: int, seed: int, **others: Any
) -> dict[str, Any]:
    """The settings of a small native transformer: LayerNorm, learnt positions, causal attention, ReLU neurons."""
    return {
        "n_layers": layers,
        "n_heads": heads,
        "d_model": width,
        "d_head": width // heads,
        "d_mlp": mlp,
        "d_vocab": vocabulary,
        "d_vocab_out": vocabulary,
        "n_ctx": length,
        "act_fn": "relu",
        "normalization_type": "LN",
        "attention_dir": "causal",
        "default_prepend_bos": False,
        "seed": seed,
    } | others


def train(
    config: dict[str, Any],
    loss: Callable[[TransformerBridge, int], Float[Tensor, ""]],
    accuracy: Callable[[TransformerBridge], float],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 1.0,
    evaluate_every: int = 250,
    patience: int = 6,
    threads: int = 1,
) -> tuple[TransformerBridge, dict[str, Any]]:
    """Train a new model by ``loss(model, step)`` and keep the latest weights of the best ``accuracy(model)``.

    Stops when ``patience`` evaluations in a row are below the best. The same arguments on the same machine, with the
    same number of threads, give the same weights.

    Returns:
        The model in evaluation mode, and how it was trained (for ``metrics.json``).
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model = boot_native(TransformerBridgeConfig(**config))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    best, best_accuracy, stale, step = model.state_dict(), 0.0, 0, 0
    for step in range(1, steps + 1):
        model.train()
        optimiser.zero_grad()
        value = loss(model, step)
        value.backward()
        optimiser.step()
        schedule.step()
        if step % evaluate_every == 0:
            with torch.no_grad():
                found = accuracy(model.eval())
            print(f"step {step}  loss {value.item():.5f}  validation {found:.5f}", flush=True)
            stale = stale + 1
            if found >= best_accuracy:
                best = {name: value.clone() for name, value in model.state_dict().items()}
                best_accuracy, stale = found, 0
            if stale == patience:
                break
    model.load_state_dict(best)
    return model.eval(), {
        **{"seed": config["seed"], "steps": steps, "steps_run": step},
        **{"learning_rate": learning_rate, "weight_decay": weight_decay, "warm_up": WARM_UP},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - started),
        "machine": f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}",
    }


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero; a factor of the peak."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def answer_loss(model: TransformerBridge, examples: tls.Examples) -> Float[Tensor, ""]:
    """Mean cross-entropy of the labelled positions over the whole vocabulary, in nats."""
    where = examples.labels != NO_LABEL
    return torch.nn.functional.cross_entropy(model(examples.tokens)[where], examples.labels[where])


@torch.no_grad()
def measured(model: TransformerBridge, examples: tls.Examples, batch: int = 4096) -> dict[str, float]:
    """Accuracy over the whole vocabulary and mean cross-entropy in nats, as ``metrics.json`` has them."""
    right, nats, n = 0, 0.0, 0
    for _, part in examples.batches(batch):
        where = part.labels != NO_LABEL
        logits, labels = model(part.tokens)[where], part.labels[where]
        right += int((logits.argmax(-1) == labels).sum())
        nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        n += len(labels)
    return {"n": n, "accuracy": round(right / n, 6), "nats": round(nats / n, 6)}


def write(model: TransformerBridge, config: dict[str, Any], metrics: dict[str, Any], folder: Path) -> None:
    """Write config.json, model.safetensors and metrics.json, and print the last.

    Raises:
        RuntimeError: weights that do not come back bit for bit.
    """
    save_native(model, config, folder)
    back = tls.task.load_native(folder).state_dict()
    if not all(torch.equal(value, back[name]) for name, value in model.state_dict().items()):
        raise RuntimeError(f"the model in {folder} does not have the weights of the trained one")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


def arguments(doc: str | None, out: Path, **defaults: Any) -> argparse.Namespace:
    """The command line of a training script: ``--out`` and one option for each default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return parser.parse_args()
