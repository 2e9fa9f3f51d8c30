"""What a unit does through another one: edges between any units, features of dictionaries among them.

Removing unit ``u`` moves a later unit ``v`` by ``dv = (dv/du) (c[u] - u)``, and ``v`` moves the answer. With the probes
``xi_k`` of the divergence, for one example,

    a_k[u, v] = sum over t of (d(xi_k . z)/dv)[t] . dv[t],

and ``1/2 E[sum_k a_k[u, v]^2]`` is the risk of removing ``u`` from what ``v`` hears and from nothing else, to second
order. Where the receivers hold all of a cut through the network (all features of a dictionary on the stream, and its
error) their ``a`` sum to the sender's own: what it does, it does through them.

As the edges of sparse feature circuits (Marks et al., arXiv 2403.19647, section 3.2), with risk in place of a metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify.core.circuit import FirstToken, Values
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, check_call, frozen, shared_batches
from tl_sparsify.core.intervene import Recording, recorded
from tl_sparsify.core.metrics import Metric, by_example, measured_by, most_answers, output_probes
from tl_sparsify.core.moments import Moments
from tl_sparsify.core.probes import pulled, step_to
from tl_sparsify.core.units import Model, Units
from tl_sparsify.search.constants import mean


@dataclass(frozen=True, eq=False)
class Connections:
    """What senders do through receivers.

    Attributes:
        risk: of removing the sender from what the receiver hears, nats (half squared units of a metric).
        stderr: over examples.
        effect: the drop of the ``metric``, to first order; NaN where there is none.

    Example:
        >>> first, second, last = (tls.Units((layer,)) for layer in units.sites)
        >>> found = tls.connections(model, train, first, last)
        >>> found.frame().columns.tolist()
        ['sender', 'receiver', 'risk', 'stderr', 'effect']
    """

    senders: Units
    receivers: Units
    risk: Float[Tensor, "senders receivers"]
    stderr: Float[Tensor, "senders receivers"]
    effect: Float[Tensor, "senders receivers"]

    def frame(self, count: int | None = None) -> pd.DataFrame:
        """One row a connection, the strongest first; ``count`` of them where given."""
        order = self.risk.flatten().argsort(descending=True, stable=True)[:count]
        senders, receivers = self.senders.names, self.receivers.names
        return pd.DataFrame(
            {
                "sender": [senders[i] for i in (order // len(receivers)).tolist()],
                "receiver": [receivers[i] for i in (order % len(receivers)).tolist()],
                "risk": self.risk.flatten()[order].numpy(),
                "stderr": self.stderr.flatten()[order].numpy(),
                "effect": self.effect.flatten()[order].numpy(),
            }
        )

    def __repr__(self) -> str:
        top = self.frame(3)
        found = ", ".join(f"{s}->{r}" for s, r in zip(top["sender"], top["receiver"], strict=True))
        return f"Connections({len(self.senders)} senders, {len(self.receivers)} receivers; strongest {found})"


@checked
def connections(
    model: Model,
    examples: Examples,
    senders: Units,
    receivers: Units,
    *,
    values: Values | None = None,
    probes: int = 4,
    temperature: float = 1.0,
    metric: Metric | None = None,
    first_token: FirstToken = "bos",
    seed: int = 0,
    batch_size: int | None = None,
) -> Connections:
    """What each sender does through each receiver: the second-order risk of an edge between any two units, heads,
    neurons, features or directions, whatever lies between them (arXiv 2403.19647, section 3.2, for risk).

    A receiver's paths may lead through other receivers that come later: only those of one hook point add up. Edges that
    name a reader, and exclude what lies between, are :func:`edges`.

    Args:
        senders, receivers: units of the same model; a receiver that no sender comes before hears nothing.
        values: what senders are set to; their means over ``examples`` where not given, one forward pass more.
        metric: half the square of an example's drop instead of the divergence; ``effect`` is its mean, which over the
            receivers of a cut sums to :func:`score.gradient`.
        first_token: at which first tokens senders stay what they are.

    Cost: one forward and ``probes`` backward passes, and ``probes`` for each receiver between it and the first sender.

    Raises:
        ValueError: a model in training mode, a sender and a receiver at one hook point, units of kind edge.

    Example:
        >>> first, second, last = (tls.Units((layer,)) for layer in units.sites)
        >>> tls.connections(model, train, first, last)
        Connections(4 senders, 4 receivers; strongest ...)
    """
    check_call(model, examples, senders, receivers, seed=seed, batch_size=batch_size)
    check_count("probes", probes, most=MOST)
    check_temperature(temperature)
    for name, units in (("senders", senders), ("receivers", receivers)):
        if any(site.kind == "edge" for site in units.sites):
            raise ValueError(f"{name} holds edges, which have a receiver already: give heads, neurons or features")
    both = {h for s in senders.sites for h in s.hook_names} & {h for s in receivers.sites for h in s.hook_names}
    if both:
        raise ValueError(f"senders and receivers both lie at {min(both)}: a connection goes from one hook point on")
    values = mean(model, examples, senders, batch_size=batch_size) if values is None else values
    if values.units != senders or values.paired:
        raise ValueError(f"values are of {values.units!r}; constants for the senders, {senders!r}, are needed")
    most = most_answers(examples)
    settings: dict[str, Any] = {"probes": probes, "temperature": temperature, "seed": seed}

    def parts() -> Iterator[Moments]:
        for index, batch in shared_batches(model, examples, batch_size, senders + receivers):
            there = [units.for_examples(index, examples.spans) for units in (senders, receivers)]
            with frozen(model), torch.enable_grad():
                with (
                    recorded(model, there[0], gradients=True) as sent,
                    recorded(model, there[1], gradients=True) as heard,
                ):
                    logits = answer_logits(model, batch)
                if metric is None:
                    vectors = output_probes(logits.detach(), batch, index, most=most, metric=None, **settings)
                else:
                    vectors = [_gradient(logits.detach(), batch, metric)]
                spared = first_tokens(model, batch.tokens, batch.attention_mask, first_token)
                rows = _rows(sent, heard, values, logits, vectors, spared)
            risk = rows.square().sum(0) / 2
            effect = torch.full_like(risk, float("nan")) if metric is None else -rows[0]
            yield Moments.of(torch.stack([risk, effect], 1))

    total = Moments.over(parts(), len(examples))
    return Connections(senders, receivers, total.mean[0], total.stderr[0], total.mean[1])


def _gradient(logits: Float[Tensor, "rows choices"], batch: Examples, metric: Metric) -> Float[Tensor, "rows choices"]:
    """Of each example's metric."""
    z = logits.requires_grad_()
    (found,) = torch.autograd.grad(by_example(measured_by(metric, z, batch), batch).sum(), z)
    return found


def _rows(
    sent: Recording,
    heard: Recording,
    values: Values,
    logits: Float[Tensor, "rows choices"],
    vectors: list[Float[Tensor, "rows choices"]],
    spared: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "probes batch senders receivers"]:
    """For each vector on the logits what each sender's removal does to it through each receiver."""
    before = [
        step_to(site, v, c, spared) for site, v, c in zip(sent.units.sites, sent.read(), values.tensors, strict=True)
    ]
    after = heard.read()
    found: list[Tensor] = []
    for gradients in pulled(heard, logits, vectors, again=True):
        columns: list[Tensor] = []
        for site, value, gradient in zip(heard.units.sites, after, gradients, strict=True):
            where = site.position_mask(value.shape[0], value.shape[1])
            gradient = gradient if where is None else gradient * where.to(gradient)[..., None, None]
            for unit in range(site.size):
                columns.append(_told(sent, before, value[:, :, unit], gradient[:, :, unit]))
        found.append(torch.stack(columns, -1))
    return torch.stack(found)


def _told(
    sent: Recording,
    steps: list[Float[Tensor, "batch pos _ _"]],
    value: Float[Tensor, "batch pos width"],
    gradient: Float[Tensor, "batch pos width"],
) -> Float[Tensor, "batch senders"]:
    """How far each sender's step moves one receiver along its gradient. One backward pass between them."""
    [gradients] = pulled(sent, value, [gradient], again=True)  # of a receiver that comes before them: 0
    sites = zip(sent.units.sites, gradients, steps, strict=True)
    return torch.cat([site.along(g.to(step), step).to(steps[0].device) for site, g, step in sites], 1)
