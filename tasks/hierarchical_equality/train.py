"""Train the transformer of hierarchical equality and write ``model/``: config.json, model.safetensors, metrics.json.

    python tasks/hierarchical_equality/train.py [--out FOLDER] [--layers 3 ...]

Only inputs of the train part of the input space are seen, a quarter of every batch from each cell. The latest
weights of the best validation accuracy are kept. Same machine, same arguments: the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int
from safetensors.torch import save as to_bytes
from task import ANSWER_POSITION, INPUTS, MODEL, SYMBOLS, VOCABULARY, dataset, encode, load_model, pools, symbols
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native

LAYERS, HEADS, D_MODEL, D_MLP = 3, 4, 64, 256
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 5000, 512, 1e-3, 1.0, 300
EVALUATE_EVERY, PATIENCE = 250, 6  # steps; evaluations below the best validation accuracy, in a row
SEED = 0


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    config = {
        "n_layers": args.layers,
        "n_heads": args.heads,
        "d_model": args.width,
        "d_head": args.width // args.heads,
        "d_mlp": args.mlp,
        "d_vocab": VOCABULARY,
        "d_vocab_out": VOCABULARY,
        "n_ctx": ANSWER_POSITION + 1,
        "act_fn": "relu",
        "normalization_type": "LN",
        "attention_dir": "causal",
        "default_prepend_bos": False,
        "seed": args.seed,
    }
    started = time.perf_counter()
    model, steps = train(boot_native(TransformerBridgeConfig(**config)), args)
    seconds = time.perf_counter() - started
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, config, args.out)
    metrics = {
        **{key: value for key, value in vars(args).items() if key != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_run": steps,
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "test_split": accuracy(model, _indices(dataset(0)["test"])),
        "test_space": accuracy_by_cell(model, pools()[2]),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


def train(model: TransformerBridge, args: argparse.Namespace) -> tuple[TransformerBridge, int]:
    """The model with the latest weights of the best validation accuracy, in evaluation mode, and the steps made."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, args.steps))
    validation = _indices(dataset(0)["validation"])
    best, best_accuracy, stale, step = model.state_dict(), 0.0, 0, 0
    for step, (tokens, labels) in enumerate(batches(args), start=1):
        model.train()
        optimiser.zero_grad()
        loss = answer_loss(model, tokens, labels)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            held_out = accuracy(model.eval(), validation)
            print(f"step {step}  train {loss.item():.5f} nats  validation {held_out}", flush=True)
            stale = stale + 1
            if held_out["accuracy"] >= best_accuracy:
                best = {name: value.clone() for name, value in model.state_dict().items()}
                best_accuracy, stale = held_out["accuracy"], 0
            if stale == PATIENCE:
                break
    model.load_state_dict(best)
    return model.eval(), step


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero; a factor of the peak."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def batches(args: argparse.Namespace) -> Iterator[tuple[Int[Tensor, "n pos"], Int[Tensor, "n pos"]]]:
    """Fresh inputs of the train part of the input space, a quarter of them from each cell."""
    rng = np.random.default_rng(args.seed)
    for _ in range(args.steps):
        drawn = [rng.choice(inputs, args.batch // 4) for inputs in pools()[0]]
        yield encode(symbols(np.concatenate(drawn)))


def answer_loss(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], labels: Int[Tensor, "n pos"]
) -> Float[Tensor, ""]:
    logits = model(tokens)[:, ANSWER_POSITION]
    return torch.nn.functional.cross_entropy(logits, labels[:, ANSWER_POSITION])


@torch.no_grad()
def accuracy(model: TransformerBridge, index: Int[np.ndarray, "n"]) -> dict[str, float]:
    """Accuracy over the whole vocabulary and mean cross-entropy in nats."""
    right, loss = 0, 0.0
    for part in np.array_split(index, math.ceil(len(index) / 4096)):
        tokens, labels = encode(symbols(part))
        logits = model(tokens)[:, ANSWER_POSITION]
        right += int((logits.argmax(-1) == labels[:, ANSWER_POSITION]).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels[:, ANSWER_POSITION], reduction="sum"))
    return {"n": len(index), "accuracy": round(right / len(index), 6), "nats": round(loss / len(index), 6)}


def accuracy_by_cell(model: TransformerBridge, cells: tuple[Int[np.ndarray, "n"], ...]) -> dict[str, dict[str, float]]:
    names = ("neither", "right_only", "left_only", "both")
    return {name: accuracy(model, inputs) for name, inputs in zip(names, cells, strict=True)}


def save(model: TransformerBridge, config: dict[str, object], folder: Path) -> None:
    """Write config.json and model.safetensors, and refuse weights that do not come back bit for bit."""
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(to_bytes(tensors))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens, _ = encode(symbols(pools()[2][3]))
    if not torch.equal(load_model(folder)(tokens), model(tokens)):
        raise RuntimeError(f"the model in {folder} does not give the logits of the trained one")


def _indices(rows: Dataset) -> Int[np.ndarray, "n"]:
    columns = rows.with_format("numpy")
    return np.ravel_multi_index(tuple(np.asarray(columns[name]) for name in INPUTS), (SYMBOLS,) * len(INPUTS))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL)
    for name, default in {
        "layers": LAYERS, "heads": HEADS, "width": D_MODEL, "mlp": D_MLP,
        "steps": STEPS, "batch": BATCH, "seed": SEED, "threads": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY)
    return parser.parse_args()


if __name__ == "__main__":
    main()
