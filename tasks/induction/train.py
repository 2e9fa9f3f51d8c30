"""Train the transformer of induction and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.induction.train [--out FOLDER] [--layers 2 ...]

Only inputs of the train part are seen. Every position whose symbol occurred before is answered, not only the last.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls
from tasks.induction.task import LENGTH, MODEL, MOST, SHAPE, SPACE, SYMBOLS, rows
from tasks.training import answer_loss, arguments, measured, train, transformer, write
from tl_sparsify.core.prompts import NO_LABEL

CELLS = ("occurs_once", "twice", "more_often")


def main() -> None:
    settings = {**SHAPE, "steps": 3000, "batch": 192, "seed": 0}
    args = arguments(__doc__, MODEL, **settings, learning_rate=2e-3, weight_decay=0.3)
    rng = np.random.default_rng(args.seed)
    seen = torch.from_numpy(rows()[np.concatenate(SPACE.numbers[0])])
    labels = everywhere(seen)
    _, validation, test = SPACE.examples(0)

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        some = torch.from_numpy(rng.integers(len(seen), size=args.batch))
        return answer_loss(model, tls.Examples(seen[some], labels[some]))

    sizes = {name: getattr(args, name) for name in SHAPE}
    config = transformer(**sizes, vocabulary=SYMBOLS, length=LENGTH, seed=args.seed)
    model, trained = train(
        config,
        loss,
        lambda model: measured(model, validation)["accuracy"],
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )
    cells = {name: range(k, SPACE.cells, MOST) for k, name in enumerate(CELLS)}
    tables = {
        "test_split": measured(model, test),
        "test_space": {name: measured(model, SPACE.of_cells(2, *some)) for name, some in cells.items()},
    }
    write(model, config, {"kind": "trained", **sizes, "batch": args.batch, **trained, **tables}, args.out)


def everywhere(tokens: Int[Tensor, "n length"]) -> Int[Tensor, "n length"]:
    """At every position what followed the last occurrence of its symbol; -100 where there is none."""
    labels = torch.full_like(tokens, NO_LABEL)
    for position in range(1, tokens.shape[1]):
        for earlier in range(position):
            same = tokens[:, earlier] == tokens[:, position]
            labels[:, position] = torch.where(same, tokens[:, earlier + 1], labels[:, position])
    return labels


if __name__ == "__main__":
    main()
