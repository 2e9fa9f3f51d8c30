"""Train the transformer of multi_task and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.multi_task.train [--out FOLDER] [--layers 3 ...]

Only inputs of the train part are seen, as many of each task and, within a task, of each answer.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tasks.multi_task.task import LENGTH, MODEL, SHAPE, SPACE, TASKS, VOCABULARY, encode
from tasks.training import answer_loss, arguments, measured, train, transformer, write


def main() -> None:
    settings = {**SHAPE, "steps": 4000, "batch": 288, "seed": 0}
    args = arguments(__doc__, MODEL, **settings, learning_rate=1e-3, weight_decay=1.0)
    rng = np.random.default_rng(args.seed)
    _, validation, test = SPACE.examples(0)

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        return answer_loss(model, encode(SPACE.drawn(rng, 0, args.batch, replace=True)))

    sizes = {name: getattr(args, name) for name in SHAPE}
    config = transformer(**sizes, vocabulary=VOCABULARY, length=1 + LENGTH, seed=args.seed)
    model, trained = train(
        config,
        loss,
        lambda model: measured(model, validation)["accuracy"],
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
    )
    each = SPACE.cells // len(TASKS)
    cells = {name: range(each * k, each * (k + 1)) for k, name in enumerate(TASKS)}
    tables = {
        "test_split": measured(model, test),
        "test_space": {name: measured(model, SPACE.of_cells(2, *some)) for name, some in cells.items()},
    }
    write(model, config, {"kind": "trained", **sizes, "batch": args.batch, **trained, **tables}, args.out)


if __name__ == "__main__":
    main()
