"""Edges of a circuit of features: which heads and MLPs write them, and which read them, predicted and measured.

The eight features that ``sparsify`` keeps on ``subject_verb_agreement`` (as in ``features.py``, one seed), the heads
and MLPs of the layers before them as senders, those of the layer behind them as receivers. A connection's risk is
predicted by ``tls.connections`` on training examples, and measured on test examples: the sender is removed, the
receiver takes the value that it then has, and nothing else hears of it. As a control each measured risk is also held
against the prediction for another receiver of the same sender.

Writes ``benchmarks/results/feature_connections.csv`` and ``.md``.

    python benchmarks/feature_connections.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import RESULTS, nats, parser, write

import tl_sparsify as tls
from tasks.language_model.train_dictionary import DICTIONARY
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import kl

EXAMPLES, KEPT, SHOWN = 128, 8, 8


def layers(units: tls.Units, first: int, last: int) -> tls.Units:
    """Those of some layers."""
    return tls.Units(tuple(site for site in units.sites if first <= site.layer <= last))


def measured(
    model: Any, examples: tls.Examples, senders: tls.Units, receivers: tls.Units, values: tls.Values
) -> list[list[float]]:
    """The KL divergence, sender by receiver, of the sender removed from what the receiver hears."""
    with torch.no_grad():
        clean = answer_logits(model, examples)
    found: list[list[float]] = []
    for sender in range(len(senders)):
        keep = torch.ones(len(senders))
        keep[sender] = 0
        with tls.intervened(model, tls.Intervention(senders, keep, values)):
            moved = tls.run_values(model, examples, receivers)
        row: list[float] = []
        for receiver in range(len(receivers)):
            only = torch.ones(len(receivers))
            only[receiver] = 0
            with torch.no_grad(), tls.intervened(model, tls.Intervention(receivers, only, moved)):
                row.append(float(kl(clean, answer_logits(model, examples)).mean()))
        found.append(row)
    return found


def connected(
    model: Any, train: tls.Examples, test: tls.Examples, senders: tls.Units, receivers: tls.Units, side: str
) -> pd.DataFrame:
    """Every connection of one side, predicted and measured."""
    values = tls.constants.mean(model, train, senders)
    found = tls.connections(model, train, senders, receivers, values=values)
    truth = torch.tensor(measured(model, test, senders, receivers, values))
    other = found.risk.roll(1, 1)
    return pd.DataFrame(
        [
            {
                "side": side,
                "sender": sender,
                "receiver": receiver,
                "predicted": float(found.risk[i, j]),
                "stderr": float(found.stderr[i, j]),
                "measured": float(truth[i, j]),
                "of another receiver": float(other[i, j]),
            }
            for i, sender in enumerate(senders.names)
            for j, receiver in enumerate(receivers.names)
        ]
    )


def markdown(frame: pd.DataFrame) -> str:
    """The strongest connections of each side, and how well all were predicted."""
    rows: list[list[str]] = []
    for side, part in frame.groupby("side", sort=False):
        for line in part.nlargest(SHOWN, "predicted").to_dict("records"):
            name = f"{line['sender']} → {line['receiver']}"
            rows.append([str(side), name, nats(float(line["predicted"])), nats(float(line["measured"]))])
    notes: list[str] = []
    for side, part in frame.groupby("side", sort=False):
        ranks = np.corrcoef(part[["measured", "predicted", "of another receiver"]].rank().to_numpy().T)[0]
        notes.append(
            f"- {side}: {len(part)} connections, rank correlation of predicted and measured {ranks[1]:.2f}; with the "
            f"prediction for another receiver {ranks[2]:.2f}\n"
        )
    table = table_of(["side", "connection", "predicted risk, nats", "measured, nats"], rows)
    return table + "\n" + "".join(notes)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--page", action="store_true", help="only make the table of the stored numbers again")
    if made.parse_args().page:
        write(
            "feature_connections", pd.read_csv(RESULTS / "feature_connections.csv"), {"feature_connections": markdown}
        )
        return
    model = tls.text.load_language_model(tls.task.own_language_model())
    dictionary = tls.dictionaries.load(DICTIONARY)
    train, _, test = (split[:EXAMPLES] for split in tls.load_task("subject_verb_agreement").examples(0))
    units = tls.features(model, dictionary, examples=train)
    path = tls.sparsify(model, train, units, sizes=(0.5, 0.25, 0.1, KEPT / len(units)), progress=False)
    which = torch.zeros(len(dictionary), dtype=torch.bool)
    which[[int(name.rpartition("F")[2]) for name in path.at(KEPT / len(units)).circuit.names]] = True
    features = tls.features(model, dictionary, which=which)
    parts = tls.heads(model) + tls.mlps(model)
    layer = features.sites[0].layer
    frames = [
        connected(model, train, test, layers(parts, 0, layer), features, "writing"),
        connected(model, train, test, features, layers(parts, layer + 1, layer + 9), "reading"),
    ]
    write("feature_connections", pd.concat(frames), {"feature_connections": markdown})


if __name__ == "__main__":
    main()
