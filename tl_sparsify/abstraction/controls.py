"""Controls: what is put in the place of aligned units, models or answers, and need not be good.

Where TransformerLens has a control it is called.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.tools.analysis.interchange import (
    NormMatchedPlacebo,
    arbitrary_targets,
    collect_activations,
    intervened_logits,
    random_basis,
    reinitialized,
)

from tl_sparsify._internal import random as _random
from tl_sparsify._internal.ranks import gathered
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, ablation, families, selected_apart, tokens
from tl_sparsify.core.edges import edges
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import answer_logits, shared_batches
from tl_sparsify.core.intervene import intervened
from tl_sparsify.core.memory import device_of, dtype_of
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Unit, Units, residuals, select

_LAYERS = 12  # whose whole stream is interchanged


def random_weights(model: Any, seed: int) -> Any:
    """The same architecture, untrained: by TransformerLens, or as Hugging Face initialises it; where neither knows how
    (a folded model, weights that no layer of torch's owns), with the entries of each weight in random order."""
    original: Any = getattr(model, "original_model", None)
    config = getattr(original, "config", None)
    folded = isinstance(getattr(model, "units", None), Mapping)
    if hasattr(config, "architectures") and hasattr(type(original), "_from_config") and not folded:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh = cast(Any, type(original))._from_config(config).to(device_of(model), dtype_of(model))
            return build_bridge_from_module(fresh.eval(), type(original).__name__, hf_config=config)
    with redirect_stdout(io.StringIO()):  # it says on which device it puts the copy
        try:
            return reinitialized(cast(Any, model), seed)
        except ValueError:
            return _shuffled(model, seed)


def _shuffled(model: Any, seed: int) -> Any:
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for number, parameter in enumerate(clone.parameters()):
            order = _random.permutation(parameter.numel(), seed, 67, number).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return clone.eval()


def random_units(chosen: Sequence[Unit], candidates: Mapping[Site, Sequence[int]], seed: int, draw: int) -> list[Unit]:
    """As many units of the same sites (and positions) among the ``candidates``, or all where these are fewer."""
    picked: list[Unit] = []
    parts = [
        part for sites, mask in selected_apart(chosen) for part in zip(sites.sites, sites.split(mask), strict=True)
    ]
    for number, (site, taken) in enumerate(parts):
        among = set(candidates.get(site, ()))
        order = [i for i in _random.permutation(site.size, seed, 53, draw, number).tolist() if i in among]
        picked += [Unit(site, i) for i in order[: int(taken.sum())]]
    return picked


def others(
    subject: TestedModel,
    alignment: Alignment,
    chosen: Sequence[Unit],
    shape: tuple[int, int],
    spans: Mapping[str, Int[Tensor, "n 2"]] | None = None,
) -> dict[Site, list[int]]:
    """For each site of ``chosen`` its units that this model has and no variable is aligned with at these positions, for
    inputs of a shape, with these spans; none for a site without any."""
    aligned: dict[Unit, list[Site]] = {}
    for unit in (unit for units in alignment.units.values() for unit in units):
        aligned.setdefault(unit.at(None), []).append(unit.site)

    def free(unit: Unit) -> bool:
        return not any(_meet(unit.site, site, shape, spans) for site in aligned.get(unit.at(None), ()))

    every = {site: [Unit(site, i) for i in range(site.size)] for site in dict.fromkeys(unit.site for unit in chosen)}
    found = {site: [unit.index for unit in units if subject.has(unit) and free(unit)] for site, units in every.items()}
    return {site: numbers for site, numbers in found.items() if numbers}


def _meet(one: Site, two: Site, shape: tuple[int, int], spans: Mapping[str, Int[Tensor, "n 2"]] | None) -> bool:
    """Whether two sites name a position in common, for some example."""
    if one == two or one.positions is None or two.positions is None:
        return True
    every = torch.arange(shape[0])
    masks = [site.for_examples(every, spans).position_mask(*shape) for site in (one, two)]
    return any(mask is None for mask in masks) or bool((masks[0] & masks[1]).any())  # type: ignore[operator]


def everything(model: Any, alignment: Alignment) -> list[Unit]:
    """All heads and neurons; where edges are aligned all edges, with readers as these have them; of a model without
    blocks all units of the alignment's hook points."""
    of_edges = {site for site in _sites(alignment) if site.kind == "edge"}
    if of_edges:
        return list(_edges_like(model, of_edges))
    if hasattr(model, "blocks"):
        return list(families(model))
    return [Unit(site, i) for site in _sites(alignment) for i in range(site.size)]


def _sites(alignment: Alignment) -> dict[Site, None]:
    """The alignment's sites, each once, without positions."""
    return dict.fromkeys(unit.at(None).site for units in alignment.units.values() for unit in units)


def _edges_like(model: Any, sites: set[Site]) -> Units:
    """All edges of a model, of the kind that has these sites; these alone where none has."""
    for readers in ("qkv", "head", "layer"):
        for grouped in (True, False):
            with suppress(ValueError):  # where heads cannot be given keys and values of their own
                found = edges(model, readers, grouped=grouped)
                if sites <= set(found.sites):
                    return found
    return Units(tuple(sites))


def outside(model: Any, alignment: Alignment) -> list[Unit]:
    """Those of :func:`everything` that no variable is aligned with, at any position; of edges those whose writer is not
    aligned either."""
    aligned = {unit.at(None) for units in alignment.units.values() for unit in units}
    writers = {f"L{unit.site.layer}MLP" if unit.site.kind == "neuron" else unit.name for unit in aligned}

    def free(unit: Unit) -> bool:
        return unit not in aligned and not (unit.site.kind == "edge" and unit.name.partition("->")[0] in writers)

    return [unit for unit in everything(model, alignment) if free(unit)]


def streams(model: Any) -> tuple[Site, ...]:
    """The residual stream after each layer, or after twelve evenly spaced ones of a deeper model; none for a model
    without blocks."""
    if not hasattr(model, "blocks"):
        return ()
    sites = residuals(model).sites
    some = torch.linspace(0, len(sites) - 1, min(_LAYERS, len(sites))).round().long().tolist()
    return tuple(sites[layer] for layer in some)


def placebo(
    subject: TestedModel, pairs: Pairs, own: Sequence[Unit], *, draws: int, seed: int, batch_size: int | None = None
) -> list[Int[Tensor, "n"]]:
    """Answers when the activation moves as far as by the aligned directions, in random ones; for directions of one hook
    point at one position; none for other units. One forward pass over the sources, one over the bases for each draw."""
    sites = {unit.site for unit in own}
    site = next(iter(sites), None)
    if not draws or len(sites) != 1 or site is None or site.kind != "direction" or site.basis is None:
        return []
    places = _one_position(site, pairs.base)
    if places is None:
        return []
    mask = select(own)[1]

    def aligned(base: Float[Tensor, "n width"], source: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        old, new = site.read(base), site.read(source)
        return site.write(base, old, torch.where(mask[:, None].to(old.device), new, old))

    moves = [  # it measures how far the reference moves, and asks no more of it
        NormMatchedPlacebo(cast(Any, aligned), random_basis(len(site.basis), int(mask.sum()), seed + draw))
        for draw in range(draws)
    ]
    model = subject.model

    def parts() -> Iterator[list[Tensor]]:
        for index, base in shared_batches(model, pairs.base, batch_size):
            source = pairs.source[index]
            settings: dict[str, Any] = {"positions": places[index], "batch_size": len(index)}
            with intervened(model, *ablation(subject, pairs.source, index, pairs.base)):
                values = collect_activations(model, site.hook, source.tokens, _task(model, source), **settings)
            with intervened(model, *ablation(subject, pairs.base, index, pairs.base)):
                task = _task(model, base)
                yield [
                    intervened_logits(model, site.hook, move, base.tokens, values, task, **settings) for move in moves
                ]

    return [tokens(torch.cat(rows), pairs.base) for rows in zip(*gathered(parts(), len(pairs)), strict=True)]


def _task(model: Any, batch: Examples) -> Callable[[Tensor], Float[Tensor, "n choices"]]:
    """What TransformerLens calls to run the model: always on the whole batch, whose tokens it gives."""
    return lambda given: answer_logits(model, replace(batch, tokens=given))


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
    possible = set(pairs.answers.values())
    if pairs.base.choices is not None:
        possible &= set(pairs.base.choices.tolist())
    known = torch.tensor(sorted(possible))
    return known[arbitrary_targets(keys, len(known), seed)]
