"""Train the transformer of hierarchical equality and write ``model/``: config.json, model.safetensors, metrics.json.

    python -m tasks.hierarchical_equality.train [--out FOLDER] [--layers 3 ...]

Only inputs of the train part of the input space are seen, a quarter of every batch from each cell. The latest
weights of the best validation accuracy are kept. Same machine, same arguments: the same weights.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tl_sparsify as tls
from tasks.hierarchical_equality.task import ANSWER_POSITION, MODEL, VOCABULARY, encode, examples, pools, symbols
from tasks.training import answer_loss, arguments, measured, train, transformer, write

SIZES = {"layers": 3, "heads": 4, "width": 64, "mlp": 256}
SETTINGS = {"steps": 5000, "batch": 512, "seed": 0, "threads": 1, "lr": 1e-3, "weight_decay": 1.0}
CELLS = ("neither", "right_only", "left_only", "both")


def main() -> None:
    args = arguments(__doc__, MODEL, **SIZES, **SETTINGS)
    sizes = {name: getattr(args, name) for name in SIZES}
    config = transformer(**sizes, vocabulary=VOCABULARY, length=ANSWER_POSITION + 1, seed=args.seed)
    rng = np.random.default_rng(args.seed)
    _, validation, test = examples(0)

    def loss(model: TransformerBridge, step: int) -> Float[Tensor, ""]:
        return answer_loss(model, encoded(np.concatenate([rng.choice(pool, args.batch // 4) for pool in pools()[0]])))

    model, trained = train(
        config,
        loss,
        lambda model: measured(model, validation)["accuracy"],
        steps=args.steps,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        threads=args.threads,
    )
    metrics = {
        "kind": "trained",
        **{name: value for name, value in vars(args).items() if name != "out"},
        **{name: trained[name] for name in ("parameters", "steps_run", "seconds", "machine")},
        "test_split": measured(model, test),
        "test_space": {name: measured(model, encoded(pool)) for name, pool in zip(CELLS, pools()[2], strict=True)},
    }
    write(model, config, metrics, args.out)


def encoded(index: Int[np.ndarray, "n"]) -> tls.Examples:
    """The examples with these numbers."""
    return tls.Examples(*encode(symbols(index)))


if __name__ == "__main__":
    main()
