"""What units do through others: against the chain rule written out, and sums over a cut through the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.dictionaries import dictionary
from helpers.models import bridge, examples, unchanged

import tl_sparsify as tls
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.metrics import log_odds

CUT = "blocks.0.hook_resid_post"


def layer(units: tls.Units, number: int) -> tls.Units:
    return tls.Units(tuple(site for site in units.sites if site.layer == number))


def everything(model: Any, batch: tls.Examples) -> tuple[tls.Units, tls.Values]:
    units = tls.heads(model) + tls.mlps(model)
    return layer(units, 0), tls.constants.mean(model, batch, layer(units, 0))


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_over_features_and_error_a_senders_connections_sum_to_its_score(name: str):
    model, batch = bridge(), examples(9)
    senders, values = everything(model, batch)
    receivers = tls.features(model, dictionary(name), error=True)
    with unchanged(model):
        found = tls.connections(model, batch, senders, receivers, values=values, metric=log_odds)
    whole = tls.score.gradient(model, batch, senders, values=values)
    torch.testing.assert_close(found.effect.sum(1), whole.scores, rtol=1e-9, atol=1e-12)
    top = found.frame(2)
    assert top["risk"].tolist()[0] == float(found.risk.max()) and len(found.frame()) == len(senders) * len(receivers)


def test_a_cut_of_one_unit_hears_all_of_the_risk():
    """Through the whole stream a sender does what it does."""
    model, batch = bridge(), examples(9, choices=(1, 4, 6, 2))
    senders, values = everything(model, batch)
    stream = tls.Units((tls.Site("residual", 0, CUT, 1),))
    settings = {"values": values, "probes": 3, "seed": 4}
    found = tls.connections(model, batch, senders, stream, **settings)
    alone = tls.score.risk(model, batch, senders, **settings)
    torch.testing.assert_close(found.risk[:, 0], alone.scores, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found.stderr[:, 0], alone.stderr, rtol=1e-9, atol=1e-14)
    assert bool(found.effect.isnan().all())


def test_each_connection_is_a_step_of_the_sender_heard_by_one_receiver_only():
    """Both derivatives as finite differences, a sender and a receiver at a time."""
    model, batch = bridge(), examples(4)
    senders, values = everything(model, batch)
    receivers = layer(tls.heads(model), 1) + layer(tls.neurons(model), 1).at(2)
    found = tls.connections(model, batch, senders, receivers, values=values, metric=log_odds)
    clean, size = tls.run_values(model, batch, receivers), 1e-5
    for sender in range(len(senders)):
        keep = torch.ones(len(senders), dtype=torch.float64)
        keep[sender] = 1 - size
        with tls.intervened(model, tls.Intervention(senders, keep, values)):
            moved = tls.run_values(model, batch, receivers)
        for receiver in range(len(receivers)):
            only = torch.ones(len(receivers), dtype=torch.float64)
            only[receiver] = 0
            outputs = []
            for source in (moved, clean):
                with torch.no_grad(), tls.intervened(model, tls.Intervention(receivers, only, source)):
                    outputs.append(log_odds(answer_logits(model, batch), batch))
            drop = float((outputs[1] - outputs[0]).mean()) / size
            assert float(found.effect[sender, receiver]) == pytest.approx(drop, rel=1e-3, abs=1e-8)


def test_what_comes_later_is_not_heard():
    model, batch = bridge(), examples(5)
    later, first = layer(tls.heads(model), 1), layer(tls.heads(model), 0)
    found = tls.connections(model, batch, later, first)
    assert float(found.risk.abs().max()) == 0


def test_batches_change_no_number():
    model, batch = bridge(), examples(7, choices=(1, 4, 6, 2))
    senders, values = everything(model, batch)
    receivers = layer(tls.heads(model), 1)
    one, other = (
        tls.connections(model, batch, senders, receivers, values=values, batch_size=size) for size in (None, 3)
    )
    torch.testing.assert_close(one.risk, other.risk, rtol=1e-9, atol=1e-14)


def test_what_makes_no_sense_is_refused():
    model, batch = bridge(), examples(3)
    units = tls.heads(model)
    with pytest.raises(ValueError, match="senders and receivers both lie at"):
        tls.connections(model, batch, units, units)
    with pytest.raises(ValueError, match="senders holds edges"):
        tls.connections(model, batch, tls.edges(model), layer(units, 1))
    with pytest.raises(ValueError, match="constants for the senders"):
        wrong = tls.constants.mean(model, batch, units)
        tls.connections(model, batch, layer(units, 0), layer(units, 1), values=wrong)
