"""Where do a causal model's variables live in a shipped model? Interchange accuracies of sets of units, by brute force.

A set of units is given the values that it takes on a source input. For a variable V the network should then give the
causal model's answer on the base input under do(V = V(source)). The scripts ``tasks/NAME/find_alignment.py`` use it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis.interchange import fit_das

import tl_sparsify as tls
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.units import select

Sets = Mapping[str, Sequence[tls.Unit]]
# A change at hook_resid_mid reaches the MLP, but not the stream that goes past it.
STREAM = (("hook_resid_mid", "what the MLP reads in layer"), ("hook_resid_post", "residual stream after layer"))


def swapped(
    model: Any, pairs: tls.Pairs, units: Sequence[tls.Unit], keep: Float[Tensor, "units"] | None = None
) -> Float[Tensor, "n choices"]:
    """Logits of the possible answers on the bases, the units taken from the sources; with ``keep`` only partly."""
    if not units:
        return answer_logits(model, pairs.base)
    sites, mask = select(units)
    swap = tls.interchange(tls.Circuit(sites, mask), tls.run_values(model, pairs.source, sites))
    if keep is not None:
        swap = tls.Intervention(sites, keep, swap.values)
    with tls.intervened(model, swap):
        return answer_logits(model, pairs.base)


def columns(pairs: tls.Pairs, labels: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The column of each label among the possible answers."""
    assert pairs.base.choices is not None  # noqa: S101
    return (labels[:, None] == pairs.base.choices).int().argmax(1)


@torch.no_grad()
def table(model: Any, causal_model: tls.CausalModel, pairs: tls.Pairs, sets: Sets, above: float = 0.0) -> pd.DataFrame:
    """A row for each set: its interchange accuracy for every variable and, with a star, on the pairs whose right
    answer changes. Only rows with an accuracy ``above`` for some variable."""
    own = pairs.expected(causal_model, ())
    expected = {variable: pairs.expected(causal_model, (variable,)) for variable in causal_model.variables}
    rows: dict[str, dict[str, float]] = {}
    for name, units in sets.items():
        answer = swapped(model, pairs, units).argmax(1)
        row: dict[str, float] = {}
        for variable, right in expected.items():
            hit: Bool[Tensor, "n"] = answer == columns(pairs, right)
            row |= {variable: float(hit.double().mean()), f"{variable}*": float(hit[right != own].double().mean())}
        if max(row[variable] for variable in expected) >= above:
            rows[name] = row
    return pd.DataFrame(rows).T.round(3)


def among(pairs: tls.Pairs, chosen: Bool[np.ndarray, "n"]) -> tls.Pairs:
    """The pairs that are chosen."""
    base, source = ({name: x[chosen] for name, x in side.items()} for side in (pairs.base_inputs, pairs.source_inputs))
    mask = torch.from_numpy(chosen)
    return tls.Pairs(base, source, pairs.base[mask], pairs.source[mask], pairs.answers)


def layers(model: Any, position: int | slice, where: str) -> dict[str, list[tls.Unit]]:
    """All heads, all neurons and the residual stream of each layer at a position."""
    found: dict[str, list[tls.Unit]] = {}
    for layer in range(model.cfg.n_layers):
        for kind, units in (("heads", tls.heads(model)), ("neurons", tls.neurons(model))):
            found[f"all {kind} of layer {layer} at {where}"] = [u for u in units.at(position) if u.site.layer == layer]
        for hook, name in STREAM:
            site = tls.Site(kind="residual", layer=layer, hook=f"blocks.{layer}.{hook}", size=1, positions=position)
            found[f"{name} {layer} at {where}"] = [tls.Unit(site, 0)]
    return found


def heads(model: Any, position: int | slice, where: str, most: int) -> dict[str, list[tls.Unit]]:
    """Every set of at most so many heads of one layer at a position."""
    found: dict[str, list[tls.Unit]] = {}
    for site in tls.heads(model).at(position).sites:
        every = [tls.Unit(site, i) for i in range(site.size)]
        for chosen in itertools.chain.from_iterable(itertools.combinations(every, k + 1) for k in range(most)):
            names = ", ".join(unit.at(None).name for unit in chosen)
            found[f"{names} at {where}"] = list(chosen)
    return found


def grown(
    model: Any,
    causal_model: tls.CausalModel,
    pairs: tls.Pairs,
    site: tls.Site,
    variable: str,
    sizes: Sequence[int],
    step: int = 4,
) -> Iterator[list[tls.Unit]]:
    """The neurons of a site that serve the variable best, at each size: those come next by whose change the loss falls
    most steeply."""
    right = columns(pairs, pairs.expected(causal_model, (variable,)))
    units = [tls.Unit(site, i) for i in range(site.size)]
    keep = torch.ones(site.size)
    for size in sizes:
        while int((keep == 0).sum()) < size:
            keep = keep.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(swapped(model, pairs, units, keep), right)
            (slope,) = torch.autograd.grad(loss, keep)
            worth = slope.masked_fill(keep.detach() == 0, -torch.inf)  # a fall of keep lets the source in
            room = min(step, size - int((keep == 0).sum()))
            keep = keep.detach().index_fill(0, worth.argsort(stable=True, descending=True)[:room], 0.0)
        yield [units[i] for i in (keep == 0).nonzero().flatten().tolist()]


def any_units(site: tls.Site, size: int, seed: int) -> list[tls.Unit]:
    """Random units of a site."""
    drawn = np.random.default_rng(seed).choice(site.size, size, replace=False)
    return [tls.Unit(site, int(i)) for i in np.sort(drawn)]


def any_directions(model: Any, hook: str, position: int, rank: int, seed: int) -> list[tls.Unit]:
    """Random orthonormal directions of an activation at a position."""
    drawn = torch.randn(model.cfg.d_model, rank, generator=torch.Generator().manual_seed(seed))
    return list(tls.directions(model, hook, torch.linalg.qr(drawn).Q).at(position))


def learned_directions(
    model: Any,
    causal_model: tls.CausalModel,
    pairs: tls.Pairs,
    hook: str,
    position: int,
    variable: str,
    rank: int,
    epochs: int = 20,
) -> list[tls.Unit]:
    """Directions of an activation at a position, learnt for the variable on the pairs (TransformerLens's DAS)."""
    where = torch.full((len(pairs),), position)
    with redirect_stderr(io.StringIO()):
        result = fit_das(
            model,
            hook,
            pairs.base.tokens,
            pairs.source.tokens,
            columns(pairs, pairs.expected(causal_model, (variable,))),
            lambda tokens: model(tokens)[:, -1][:, pairs.base.choices],
            rank=rank,
            base_positions=where,
            source_positions=where,
            epochs=epochs,
        )
    return list(tls.directions(model, hook, result).at(position))
