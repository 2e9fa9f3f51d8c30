"""Behaviours found without being told, where the kinds of contexts are known, and in a text.

Mixed examples of the five text tasks (the shipped language model) and of the four tasks of ``multi_task``: how far the
groups are the tasks (adjusted Rand index), beside shuffled groups and groups by each head's signed effect on the right
answer's log odds; and what circuits of the groups gain, beside random groups. Then contexts of a text drawn by the
language model's own generator, with another seed than it was trained on. Heads only. Writes
``benchmarks/results/behaviours.csv`` and ``behaviours.md``, and ``behaviours_text.md``.

    python benchmarks/behaviours.py [--text]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import RESULTS, ROOT, write
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize, pad

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.probes import samples

TASKS = ("ioi", "gendered_pronoun", "subject_verb_agreement", "docstring", "greater_than")
OF_EACH = 48
SHUFFLES = 20


def five() -> tuple[Any, tls.Examples, np.ndarray]:
    """The language model, test examples of five tasks over the whole vocabulary, and the task of each."""
    parts = [tls.load_task(name).examples(0)[2].sample(OF_EACH) for name in TASKS]
    width = max(part.tokens.shape[1] for part in parts)
    columns: list[torch.Tensor] = []
    for fill, some in ((0, "tokens"), (-100, "labels"), (0, "attention_mask")):
        rows = [getattr(part, some) for part in parts]
        rows = [torch.ones_like(part.tokens) if row is None else row for row, part in zip(rows, parts, strict=True)]
        columns.append(torch.cat([pad(row.long(), (width - row.shape[1], 0), value=fill) for row in rows]))
    order = torch.from_numpy(np.random.default_rng(0).permutation(OF_EACH * len(TASKS)))
    examples = tls.Examples(columns[0], columns[1], columns[2].bool())[order]
    return tls.load_task("ioi").model(), examples, np.repeat(np.arange(len(TASKS)), OF_EACH)[order.numpy()]


def four() -> tuple[Any, tls.Examples, np.ndarray]:
    """The network with four tasks, test examples, and the task of each: its first token."""
    task = tls.load_task("multi_task")
    examples = task.examples(0)[2].sample(512)
    return task.model(), examples, examples.tokens[:, 0].numpy()


def by_rows(model: Any, examples: tls.Examples, units: tls.Units, count: int) -> np.ndarray:
    """Groups by every head's effect on the log odds of each example's right answer, signed, scaled to length 1."""
    plain = tls.constants.reduced(model, tls.Circuit.full(units), tls.constants.mean(model, examples, units))
    parts = samples(model, examples, plain, metric=tls.metrics.log_odds)
    rows = torch.cat([normalize(part.effects[0].double(), dim=1) for part in parts])
    return AgglomerativeClustering(count).fit_predict(rows.numpy())


def measured(name: str, made: Callable[[], tuple[Any, tls.Examples, np.ndarray]], size: float) -> dict[str, Any]:
    """One row of the table."""
    model, examples, kinds = made()
    units, count = tls.heads(model), len(np.unique(kinds))
    found = tls.behaviours(model, examples, units, count=count, size=size, rounds=6)
    groups = found.groups.numpy()
    rng = np.random.default_rng(0)
    shuffled = [adjusted_rand_score(kinds, rng.permutation(groups)) for _ in range(SHUFFLES)]
    print(found.markdown(), flush=True)
    circuits = [set(one.reduction.circuit.names) for one in found.found]
    shared = [len(a & b) / len(a | b) for i, a in enumerate(circuits) for b in circuits[:i]]
    own = found.cross.diag().mean()
    others = (found.cross.sum() - found.cross.diag().sum()) / (found.cross.numel() - len(found.cross))
    line: dict[str, Any] = {"contexts of": name, "n": len(examples), "kinds": count, "found": len(found.found)}
    line |= {"rand": adjusted_rand_score(kinds, groups), "shuffled": max(shuffled)}
    line |= {"rows": adjusted_rand_score(kinds, by_rows(model, examples, units, count))}
    line |= {"kept": len(found.together.circuit), "units": len(units), "own": float(own), "others": float(others)}
    line |= {"gain": repr(found.gain), "random_gain": repr(found.random_gain), "jaccard": float(np.mean(shared))}
    return line


def markdown(frame: pd.DataFrame) -> str:
    """One row a mixture."""
    heads = [
        "contexts of",
        "n",
        "groups",
        "adjusted Rand index",
        "shuffled groups, best of 20",
        "groups by signed rows",
    ]
    heads += [
        "heads kept",
        "own circuits, nats",
        "each other's, nats",
        "gain over one circuit for all",
        "gain of random groups",
    ]
    rows = [
        [
            str(line["contexts of"]),
            str(line["n"]),
            f"{line['found']} ({line['kinds']} kinds)",
            *(f"{line[name]:.3f}" for name in ("rand", "shuffled", "rows")),
            f"{line['kept']} of {line['units']}",
            *(f"{line[name]:.2g}" for name in ("own", "others")),
            str(line["gain"]),
            str(line["random_gain"]),
        ]
        for line in frame.to_dict("records")
    ]
    return table_of(heads, rows)


def of_text() -> str:
    """The tables of a text's behaviours."""
    sys.path.insert(0, str(ROOT))
    from tasks.language_model import corpus

    model = tls.text.load_language_model(tls.task.own_language_model())
    examples = tls.contexts(model, corpus.documents(700, seed=2026), n=512, length=32)
    return tls.behaviours(model, examples, tls.heads(model), count=8, size=0.5, rounds=6).markdown()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--text", action="store_true", help="only the text")
    if not options.parse_args().text:
        rows = [measured("five text tasks", five, 0.25), measured("`multi_task`", four, 6 / 18)]
        write("behaviours", pd.DataFrame(rows), {"behaviours": markdown})
    found = of_text()
    print(found, flush=True)
    write_text(Path(RESULTS) / "behaviours_text.md", found)


if __name__ == "__main__":
    main()
