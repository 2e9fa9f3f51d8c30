"""How well a language model does the text tasks: accuracy among the answers and over the whole vocabulary.

    python -m tasks.language_model.measure [--model NAME] [--write]

``--write`` puts the figures of the package's own model into its ``metrics.json``.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import tl_sparsify as tls
from tl_sparsify.core.prompts import NO_LABEL

MODEL = Path(__file__).parent / "model"
TASKS = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement", "docstring")


@torch.no_grad()
def measured(task: tls.Task, model: Any) -> dict[str, float]:
    """On the test examples of seed 0: the share of right answers among the choices and over the vocabulary, the share
    for which the right answer is above the one that it is held against, and the cross-entropy in nats."""
    _, _, test = task.examples(0)
    right, anything, above, nats = 0, 0, 0, 0.0
    for _, batch in test.batches(128):
        assert batch.choices is not None and batch.counterfactual_labels is not None  # noqa: S101
        logits = model(
            batch.tokens, attention_mask=None if batch.attention_mask is None else batch.attention_mask.long()
        )
        where = batch.labels != NO_LABEL
        rows, labels, wrong = logits[where], batch.labels[where], batch.counterfactual_labels[where]
        right += int((batch.choices[rows[:, batch.choices].argmax(1)] == labels).sum())
        anything += int((rows.argmax(1) == labels).sum())
        above += int((rows.gather(1, labels[:, None]) > rows.gather(1, wrong[:, None])).sum())
        nats += float(torch.nn.functional.cross_entropy(rows.double(), labels, reduction="sum"))
    n = len(test)
    shares = {"accuracy": right / n, "accuracy_vocabulary": anything / n, "above_the_other": above / n}
    return {"n": n} | {name: round(share, 6) for name, share in shares.items()} | {"nats": round(nats / n, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name in TASKS:
        task = tls.load_task(name, model=arguments.model)
        found[name] = measured(task, task.model())
        print(name, found[name], flush=True)
    if arguments.write:
        path = MODEL / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
