"""What there is to know of a circuit's units, measured for a page: what each does, where, what it writes, what it looks
at, and how its absence changes the others.

The effect of a unit is how much the risk rises when it too is set to its constant. An edge from one unit to another is
how far the other's value then moves, as a share of how far it is from its own constant: total effects, along whatever
way. Where a unit matters is the first-order effect of its constant at each position, by gradient; nothing where no
constant goes: outside of a site's positions, and at a first token that is left alone.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.tools.analysis import logit_readout

from tl_sparsify._internal.first_tokens import first_tokens
from tl_sparsify._internal.progress import progress as bar
from tl_sparsify.abstraction.evidence import Alignment, Evidence
from tl_sparsify.core.circuit import Values
from tl_sparsify.core.distributions import removal
from tl_sparsify.core.examples import Examples, sampled
from tl_sparsify.core.forward import answer_logits, check_model, frozen, output, unit_positions
from tl_sparsify.core.intervene import Intervention, intervened, recorded
from tl_sparsify.core.metrics import by_example, kl, log_odds
from tl_sparsify.core.prompts import NO_LABEL, token_text
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.site import Site
from tl_sparsify.core.units import Units
from tl_sparsify.search.path import CircuitPath
from tl_sparsify.search.scores import Scores

_PATTERNS = 900_000  # bytes of attention patterns
_EDGES = 4  # for each unit, the strongest that come in
_LEAST = 0.02  # of an edge
_TOP = 8  # tokens


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        scores, path: what orders the units; the effect where neither is given.
        alignment, evidence: of a causal model's variables.
        shown: how many examples are shown.
        effects: on how many examples effects are measured.
        limit: the most units.
        progress: whether a bar is shown.
    """

    scores: Scores | None = None
    path: CircuitPath | None = None
    alignment: Alignment | None = None
    evidence: Evidence | None = None
    shown: int = 3
    effects: int = 16
    limit: int = 300
    progress: bool = True


def gathered(model: Any, reduction: Reduction, examples: Examples, request: Request) -> dict[str, Any]:
    """Everything as plain values: ``units, links, prompts, variables, facts``.

    One forward pass over ``effects`` examples for each kept unit and three more, one forward and backward pass over the
    examples that are shown.

    Raises:
        ValueError: a reduction without kept units or of another model; scores or a path of other units.
    """
    check_model(model)
    check_fingerprint(model, reduction)
    if not len(reduction.circuit):
        raise ValueError("reduction keeps no unit: there is nothing to show")
    units = reduction.units
    kept = reduction.circuit.mask.nonzero().flatten().tolist()
    rank = _rank(reduction, request)
    kept = sorted(sorted(kept, key=lambda i: rank[i], reverse=True)[: request.limit])
    index = sampled(len(examples), request.effects)
    few, shown = examples[index], examples[: request.shown]
    with torch.no_grad():
        risks, moved = _effects(model, reduction, examples, index, kept, request.progress)
        acts = _values(model, units, few)
        seen = _values(model, units, shown)
    places = _places(model, reduction, shown)
    writes = _writes(model, units, kept, seen, places)
    prompts = [_prompt(model, shown, i) for i in range(len(shown))]
    patterns = _patterns(model, units, kept, shown, prompts)
    texts = [_prompt(model, few, i) for i in range(len(few))]
    here = units.for_examples(index, examples.spans)
    ordering = rank if request.scores or request.path else risks
    order = {i: n for n, i in enumerate(sorted(kept, key=lambda i: ordering[i], reverse=True))}
    rows = []
    for number, i in enumerate(kept):
        unit = units[i]
        span = [slice(p["start"], p["stop"]) for p in prompts]
        row = {
            "name": unit.name,
            "kind": unit.site.kind,
            "layer": unit.site.layer,
            "index": unit.index,
            "order": order[i],
            "effect": _rounded(risks[i]),
            "places": [[_rounded(v) for v in places[n, i, part].tolist()] for n, part in enumerate(span)],
        }
        if request.scores is not None and unit.name in request.scores.units.names:
            row["score"] = _rounded(float(request.scores.scores[request.scores.units.index(unit.name)]))
        row |= {"writes": writes[number]} if writes else {}
        row |= {"patterns": patterns[i]} if i in patterns else {}
        if unit.site.kind == "neuron":
            which = units.sites.index(unit.site)
            row["texts"] = _strongest(acts[which], here.sites[which], unit.index, texts)
        rows.append(row)
    place = {i: n for n, i in enumerate(kept)}
    return {
        "units": rows,
        "links": [[place[a], place[b], _rounded(w)] for a, b, w in _links(moved, kept)],
        "prompts": prompts,
        "texts": [text["tokens"] for text in texts],
        "variables": _variables(request, {unit["name"]: n for n, unit in enumerate(rows)}),
        "layers": 1 + max(site.layer for site in units.sites),
        "facts": {
            "kept": len(reduction.circuit),
            "all": len(units),
            "described": units.describe(reduction.circuit.mask),
            "replacements": reduction.kind,
            "fingerprint": reduction.fingerprint,
            "measured": len(few),
            "scored_by": None if request.scores is None else request.scores.name,
            "ordered_by": "the path" if request.path else "scores" if request.scores else "effect",
        },
    }


def _rank(reduction: Reduction, request: Request) -> list[float]:
    units = reduction.units
    for source in (request.path, request.scores):
        if source is not None:
            if source.units != units:
                raise ValueError(f"{type(source).__name__} is of {source.units!r}, the reduction of {units!r}")
            return source.scores.double().tolist()
    return [0.0] * len(units)


def _one(removed: Intervention, i: int) -> Intervention:
    """Unit ``i`` set to its replacement."""
    units = removed.units
    number = next(n for n, part in enumerate(units.slices) if i < part.stop)
    site = Units((units.sites[number],))
    keep = torch.ones(len(site))
    keep[i - units.slices[number].start] = 0
    values = Values(site, (removed.values.tensors[number],))
    return Intervention(site, keep, values, first_token=removed.first_token)


def _effects(
    model: Any,
    reduction: Reduction,
    examples: Examples,
    index: Int[Tensor, "few"],
    kept: Sequence[int],
    progress: bool,
) -> tuple[dict[int, float], dict[int, Float[Tensor, "units"]]]:
    """How much the risk rises without each kept unit, and how far every unit's value then moves."""
    few = examples[index]
    removed = removal(model, reduction, examples, index)
    here = removed.units
    original = answer_logits(model, few)

    def run(*interventions: Intervention) -> tuple[float, tuple[Tensor, ...]]:
        with intervened(model, *interventions, removed), recorded(model, here) as recording:
            logits = answer_logits(model, few)
        return float(by_example(kl(original, logits), few).mean()), recording.read()

    risk, base = run()
    where = [unit_positions(model, few, site, v) for site, v in zip(here.sites, base, strict=True)]
    constants = removed.values.tensors
    scale = torch.cat([_size(v - c.to(v), mask) for v, c, mask in zip(base, constants, where, strict=True)])
    risks: dict[int, float] = {}
    moved: dict[int, Float[Tensor, "units"]] = {}
    for i in bar(kept, "measuring the effect of each unit", progress):
        without, values = run(_one(removed, i))
        risks[i] = without - risk
        change = torch.cat([_size(a - b, mask) for a, b, mask in zip(values, base, where, strict=True)])
        change[i] = 0
        moved[i] = torch.where(scale > 0, change / scale, 0.0).cpu()
    return risks, moved


def _size(v: Float[Tensor, "batch pos some width"], where: Bool[Tensor, "batch pos"]) -> Float[Tensor, "some"]:
    """The root mean square of each unit's value over the positions that count."""
    return v[where].double().square().sum(-1).mean(0).sqrt()


def _links(moved: Mapping[int, Float[Tensor, "units"]], kept: Sequence[int]) -> list[tuple[int, int, float]]:
    """For each unit the strongest edges that come in."""
    found: list[tuple[int, int, float]] = []
    for b in kept:
        into = sorted(((float(moved[a][b]), a) for a in kept if a != b), reverse=True)[:_EDGES]
        found += [(a, b, weight) for weight, a in into if weight >= _LEAST]
    return found


def _values(model: Any, units: Units, examples: Examples) -> tuple[Tensor, ...]:
    with torch.no_grad(), recorded(model, units) as recording:
        output(model, examples)
    return recording.read()


def _places(model: Any, reduction: Reduction, shown: Examples) -> Float[np.ndarray, "shown units pos"]:
    """The first-order effect of each unit's constant on the log-odds of the right answer, at each position."""
    with torch.no_grad():
        removed = removal(model, reduction, shown, torch.arange(len(shown)))
    with frozen(model), torch.enable_grad(), intervened(model, removed):
        with recorded(model, removed.units, gradients=True) as recording:
            total = log_odds(answer_logits(model, shown), shown).sum()
        activations = list(recording.activations.values())
        gradients = torch.autograd.grad(total, activations, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, activations, strict=True)]
    slopes = recording.pull(dict(zip(recording.activations, filled, strict=True)))
    spared = first_tokens(model, shown.tokens, shown.attention_mask, removed.first_token)
    parts = zip(removed.units.sites, slopes, recording.read(), removed.values.tensors, strict=True)
    found = [
        (((v.detach() - c.to(v)) * g).sum(-1) * _changed(site, v, spared)[..., None]).transpose(1, 2)
        for site, g, v, c in parts
    ]
    width = shown.tokens.shape[1]
    return torch.cat([p if p.shape[2] == width else p.expand(-1, -1, width) for p in found], 1).double().cpu().numpy()


def _changed(
    site: Site, v: Float[Tensor, "batch pos some width"], spared: Bool[Tensor, "batch pos"] | None
) -> Bool[Tensor, "#batch pos"]:
    """Where an intervention changes the site's units."""
    where = site.position_mask(*v.shape[:2])
    changed = torch.ones(1, v.shape[1], dtype=torch.bool, device=v.device) if where is None else where.to(v.device)
    return changed if spared is None else changed & ~spared.to(v.device)


def _writes(
    model: Any,
    units: Units,
    kept: Sequence[int],
    seen: tuple[Tensor, ...],
    places: Float[np.ndarray, "shown units pos"],
) -> list[dict[str, Any]]:
    """The tokens that each unit promotes and suppresses: what it writes into the residual stream where it matters most
    in the first example, read by TransformerLens's logit readout. Nothing where the model has no such readout."""
    vectors: list[Tensor] = []
    for i in kept:
        unit = units[i]
        number = units.sites.index(unit.site)
        at = int(np.abs(places[0, i]).argmax())
        value = seen[number][0, min(at, seen[number].shape[1] - 1), unit.index]
        block = model.blocks[unit.site.layer] if hasattr(model, "blocks") else None
        if block is None or unit.site.kind not in ("head", "neuron", "mlp", "attention", "residual"):
            return []
        if unit.site.kind == "head":
            value = value @ block.attn.W_O[unit.index].to(value)
        elif unit.site.kind == "neuron":
            value = block.mlp.W_out[unit.index].to(value) * (1.0 if float(value) >= 0 else -1.0)
        vectors.append(value.detach())
    stacked = torch.stack(vectors)
    try:
        both = [logit_readout(model, sign * stacked, top_k=_TOP).top_ids for sign in (1, -1)]
    except (ValueError, TypeError, NotImplementedError, AttributeError):  # no readout of this model's
        return []
    up, down = ([_names(model, row) for row in some.tolist()] for some in both if some is not None)
    return [{"up": a, "down": b} for a, b in zip(up, down, strict=True)]


def _patterns(
    model: Any, units: Units, kept: Sequence[int], shown: Examples, prompts: Sequence[Mapping[str, Any]]
) -> dict[int, list[str]]:
    """Each kept head's attention on each example that is shown, a byte for each pair of positions; of as many examples
    as there is room for."""
    heads = [i for i in kept if units[i].site.kind == "head"]
    names = {i: f"blocks.{units[i].site.layer}.attn.hook_pattern" for i in heads}
    if not heads or any(name not in model.hook_dict for name in names.values()):
        return {}
    sites = Units(
        tuple(Site("neuron", units[i].site.layer, names[i], 1) for i in {names[i]: i for i in heads}.values())
    )
    with torch.no_grad(), recorded(model, sites) as recording:
        output(model, shown)
    found: dict[int, list[str]] = {i: [] for i in heads}
    room = _PATTERNS
    for n, prompt in enumerate(prompts):
        part = slice(prompt["start"], prompt["stop"])
        room -= len(heads) * (part.stop - part.start) ** 2
        if room < 0:
            break
        for i in heads:
            pattern = recording.activations[names[i]][n, units[i].index, part, part]
            content = (pattern.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()
            found[i].append(base64.b64encode(content).decode())
    return {i: some for i, some in found.items() if some}


def _strongest(
    acts: Float[Tensor, "few pos some one"], site: Site, index: int, texts: Sequence[Mapping[str, Any]]
) -> list[tuple[int, int, float]]:
    """The examples in which a neuron is largest: which, at which of its positions, and its value there."""
    v = acts[..., index, 0]
    size = v.abs().masked_fill(~_changed(site, acts, None), -1.0)
    best: list[tuple[int, int, float]] = []
    for n, text in enumerate(texts):
        part = slice(text["start"], text["stop"]) if v.shape[1] > 1 else slice(None)
        at = int(size[n, part].argmax())
        best.append((n, at, _rounded(float(v[n, part][at]))))
    return sorted(best, key=lambda entry: -abs(entry[2]))[:3]


def _prompt(model: Any, examples: Examples, i: int) -> dict[str, Any]:
    """An example's tokens without padding, where they stand, and its answer."""
    tokens = examples.tokens[i]
    if tokens.is_floating_point() or tokens.ndim != 1:
        width = examples.labels.shape[1]
        return {"tokens": [str(n) for n in range(width)], "start": 0, "stop": width, "answer": ""}
    mask = torch.ones_like(tokens) if examples.attention_mask is None else examples.attention_mask[i]
    where = mask.nonzero().flatten().tolist()
    start, stop = where[0], where[-1] + 1
    labels = examples.labels[i][examples.labels[i] != NO_LABEL].tolist()
    return {
        "tokens": _names(model, tokens[start:stop].tolist()),
        "ids": tokens[start:stop].tolist(),
        "start": start,
        "stop": stop,
        "answer": "".join(_names(model, labels)),
        "answers": labels,
    }


def _names(model: Any, ids: Sequence[int]) -> list[str]:
    tokenizer = getattr(model, "tokenizer", None)
    return [str(i) for i in ids] if tokenizer is None else [token_text(tokenizer, i) for i in ids]


def _variables(request: Request, number: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each variable with its units (those that are kept by their numbers) and its lines of evidence."""
    if request.alignment is None:
        return []
    bare = {name.split("@")[0]: n for name, n in number.items()}
    lines = [] if request.evidence is None else request.evidence.to_frame().to_dict("records")
    found: list[dict[str, Any]] = []
    for variable, units in request.alignment.units.items():
        named = [{"name": u.name, "unit": number.get(u.name, bare.get(u.at(None).name))} for u in units]
        mine = [line for line in lines if line.get("variable") == variable]
        said = [{str(k): _rounded(v) if isinstance(v, float) else v for k, v in line.items()} for line in mine]
        found.append({"name": variable, "units": named, "evidence": said})
    return found


def _rounded(value: float) -> Any:
    """Four digits; ``None`` for what is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
