"""Train the transformer of modular_addition and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.modular_addition.train [--out FOLDER] [--layers 1 ...]

Only the train part of the input space is seen. ``metrics.json`` also says how accuracy went on it and on the validation
part.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tasks.modular_addition.task import ANSWER_POSITION, MODEL, SHAPE, SPACE, VOCABULARY, encode, inputs_of
from tasks.training import answer_loss, arguments, measured, train, transformer, write

EVERY = 250  # steps between two looks at the accuracy


def main() -> None:
    settings = {**SHAPE, "steps": 3000, "batch": 1024, "seed": 0}
    args = arguments(__doc__, MODEL, **settings, learning_rate=2e-3, weight_decay=0.3)
    rng = np.random.default_rng(args.seed)
    seen, held_out, never = (encode(inputs_of(np.concatenate(cells))) for cells in SPACE.numbers)
    _, _, test = SPACE.examples(0)
    history: list[dict[str, float]] = []

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        return answer_loss(model, seen[torch.from_numpy(rng.choice(len(seen), args.batch, replace=False))])

    def accuracy(model: TransformerBridge) -> float:
        found = [measured(model, part)["accuracy"] for part in (seen, held_out)]
        history.append({"train": found[0], "validation": found[1]})
        return found[1]

    sizes = {name: getattr(args, name) for name in SHAPE}
    config = transformer(
        **sizes,
        vocabulary=VOCABULARY,
        length=ANSWER_POSITION + 1,
        seed=args.seed,
        normalization_type=None,
    )
    model, trained = train(
        config,
        loss,
        accuracy,
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        evaluate_every=EVERY,
        patience=args.steps,
    )
    tables = {
        "test_split": measured(model, test),
        "test_space": {"all": measured(model, never)},
        "history": [{"step": EVERY * (i + 1), **row} for i, row in enumerate(history)],
    }
    write(model, config, {"kind": "trained", **sizes, "batch": args.batch, **trained, **tables}, args.out)


if __name__ == "__main__":
    main()
