"""Train the transformer of balanced_brackets and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.balanced_brackets.train [--out FOLDER] [--layers 2 ...]

Only inputs of the train part of the input space are seen. A quarter of every batch is balanced; the rest is drawn in
equal parts from the three unbalanced cells and from the near misses of each of them.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tasks.balanced_brackets.task import LENGTH, MODEL, VOCABULARY, brackets, encode, examples, near_misses, pools
from tasks.training import answer_loss, arguments, measured, train, transformer, write

CELLS = ("neither", "never_below_only", "total_zero_only", "balanced")


def main() -> None:
    settings = {"layers": 2, "heads": 4, "width": 64, "mlp": 128, "steps": 5000, "batch": 240, "seed": 0}
    args = arguments(__doc__, MODEL, **settings, learning_rate=5e-4, weight_decay=1.0)
    rng = np.random.default_rng(args.seed)
    cells, near = pools("train"), [edges[:, 1] for edges in near_misses("train")]
    kinds = [*cells[:3], *near, cells[3], cells[3]]
    _, validation, test = examples(0)

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        index = np.concatenate([rng.choice(inputs, args.batch // len(kinds)) for inputs in kinds])
        return answer_loss(model, encode({"brackets": brackets(index)}))

    sizes = {name: getattr(args, name) for name in ("layers", "heads", "width", "mlp")}
    config = transformer(**sizes, vocabulary=VOCABULARY, length=LENGTH + 1, seed=args.seed)
    model, trained = train(
        config,
        loss,
        lambda model: measured(model, validation)["accuracy"],
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )
    space = zip(CELLS, pools("test"), strict=True)
    tables = {
        "test_split": measured(model, test),
        "test_space": {name: measured(model, encode({"brackets": brackets(index)})) for name, index in space},
    }
    write(model, config, {"kind": "trained", **sizes, "batch": args.batch, **trained, **tables}, args.out)


if __name__ == "__main__":
    main()
