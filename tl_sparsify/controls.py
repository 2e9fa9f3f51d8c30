"""Controls: what is put in the place of aligned units, models or answers, and need not be good.

Where TransformerLens has a control it is called.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.tools.analysis.interchange import (
    NormMatchedPlacebo,
    SubspaceInterchange,
    arbitrary_targets,
    collect_activations,
    intervened_logits,
    random_basis,
    reinitialized,
)
from transformer_lens.tools.analysis.projection_kernel import orthonormal_subspace

from tl_sparsify import _random
from tl_sparsify.evidence import Alignment, Pairs
from tl_sparsify.examples import Examples
from tl_sparsify.intervene import ablate, answer_logits, intervened
from tl_sparsify.subjects import Subject, bare, tokens
from tl_sparsify.units import Site, Unit, Units, heads, neurons, residuals, select


def random_weights(model: Any, seed: int) -> Any:
    """The same architecture, untrained: by TransformerLens, or as Hugging Face initialises it."""
    original: Any = getattr(model, "original_model", None)
    config = getattr(original, "config", None)
    if hasattr(config, "architectures") and hasattr(type(original), "_from_config"):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh = cast(Any, type(original))._from_config(config)
        return build_bridge_from_module(fresh.eval(), type(original).__name__, hf_config=config)
    with redirect_stdout(io.StringIO()):  # it says on which device it puts the copy
        return reinitialized(cast(Any, model), seed)


def random_units(chosen: Sequence[Unit], seed: int, draw: int) -> list[Unit]:
    """As many units of the same sites (and positions), outside ``chosen`` while there are any."""
    sites, mask = select(chosen)
    picked: list[Unit] = []
    for number, (site, taken) in enumerate(zip(sites.sites, sites.split(mask), strict=True)):
        order = _random.permutation(site.size, seed, 53, draw, number)
        outside = torch.cat([order[~taken[order]], order[taken[order]]])
        picked += [Unit(site, int(i)) for i in outside[: int(taken.sum())]]
    return picked


def everything(model: Any, alignment: Alignment) -> list[Unit]:
    """All heads and neurons; of a model without blocks all units of the alignment's hook points."""
    if hasattr(model, "blocks"):
        families = [heads(model), neurons(model)]
    else:
        families = [
            Units((replace(unit.site, positions=None),)) for units in alignment.units.values() for unit in units
        ]
    return list(dict.fromkeys(unit for units in families for unit in units))


def outside(model: Any, alignment: Alignment) -> list[Unit]:
    """Those of :func:`everything` that no variable is aligned with, at any position."""
    aligned = {bare(unit) for units in alignment.units.values() for unit in units}
    return [unit for unit in everything(model, alignment) if bare(unit) not in aligned]


def streams(model: Any) -> tuple[Site, ...]:
    """The residual stream after each layer; none for a model without blocks."""
    return residuals(model).sites if hasattr(model, "blocks") else ()


def placebo(subject: Subject, pairs: Pairs, own: Sequence[Unit], *, draws: int, seed: int) -> list[Int[Tensor, "n"]]:
    """Answers when the activation moves as far as by the aligned directions, in random ones; for directions of one hook
    point at one position; none for other units. One forward pass over the sources, one over the bases for each draw."""
    sites = {unit.site for unit in own}
    site = next(iter(sites), None)
    if len(sites) != 1 or site is None or site.kind != "direction" or site.basis is None:
        return []
    places = _one_position(site, pairs.base)
    if places is None:
        return []
    base = pairs.base
    mask = select(own)[1]
    basis = orthonormal_subspace(site.basis[:, mask].float(), rank=int(mask.sum())).basis

    def at(batch: Tensor) -> Tensor:  # of one position each
        return answer_logits(subject.model, replace(base[: len(batch)], tokens=batch))

    found: list[Tensor] = []
    removed = () if subject.removal is None else (ablate(subject.removal),)
    with intervened(subject.model, *removed):
        values = collect_activations(subject.model, site.hook, pairs.source.tokens, at, positions=places)
        for draw in range(draws):
            other = random_basis(basis.shape[0], basis.shape[1], seed + draw)
            move = NormMatchedPlacebo(SubspaceInterchange(basis), other)
            rows = intervened_logits(subject.model, site.hook, move, base.tokens, values, at, positions=places)
            found.append(tokens(rows, base))
    return found


def _one_position(site: Site, base: Examples) -> Int[Tensor, "n"] | None:
    where = site.positions
    if isinstance(where, Tensor) and where.ndim == 1:
        return where
    if isinstance(where, tuple) and len(where) == 1:
        return torch.full((len(base),), int(where[0]) % base.tokens.shape[1])
    return None


def made_up(pairs: Pairs, seed: int) -> Int[Tensor, "n"]:
    """For each source a made-up answer, always the same for the same source (TransformerLens)."""
    keys = list(zip(*(map(str, values) for values in pairs.source_inputs.values()), strict=True))
    known = torch.tensor(sorted(set(pairs.answers.values())))
    return known[arbitrary_targets(keys, len(known), seed)]
