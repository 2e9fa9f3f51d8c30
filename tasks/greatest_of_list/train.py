"""Train the transformer of greatest_of_list and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.greatest_of_list.train [--out FOLDER] [--layers 1 ...]

Only inputs of the train part of the input space are seen, every answer equally often.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tasks.greatest_of_list.task import INPUTS, LEAST_ANSWER, MODEL, VOCABULARY, encode, examples, numbers, pools
from tasks.training import answer_loss, arguments, measured, train, transformer, write


def main() -> None:
    settings = {"layers": 1, "heads": 4, "width": 64, "mlp": 16, "steps": 4000, "batch": 256, "seed": 0}
    args = arguments(__doc__, MODEL, **settings, learning_rate=3e-3, weight_decay=0.02)
    rng = np.random.default_rng(args.seed)
    answers = [pool for pool in pools()[0] if len(pool)]
    _, validation, test = examples(0)

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        which = rng.permutation(np.arange(args.batch) % len(answers))
        index = np.concatenate([rng.choice(pool, int((which == k).sum())) for k, pool in enumerate(answers)])
        return answer_loss(model, encode(numbers(index)))

    sizes = {name: getattr(args, name) for name in ("layers", "heads", "width", "mlp")}
    config = transformer(**sizes, vocabulary=VOCABULARY, length=len(INPUTS) + 1, seed=args.seed)
    model, trained = train(
        config,
        loss,
        lambda model: measured(model, validation)["accuracy"],
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )
    parts = {"least_answers": pools()[2][:LEAST_ANSWER], "other_answers": pools()[2][LEAST_ANSWER:]}
    tables = {
        "test_split": measured(model, test),
        "test_space": {name: measured(model, encode(numbers(np.concatenate(part)))) for name, part in parts.items()},
    }
    write(model, config, {"kind": "trained", **sizes, "batch": args.batch, **trained, **tables}, args.out)


if __name__ == "__main__":
    main()
