"""Neuronpedia: a circuit as the graph JSON that it shows, schema 1.0.0. Supernodes are a causal model's variables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import check_count
from tl_sparsify._internal.files import check_folder, write_text
from tl_sparsify.abstraction.evidence import Alignment
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.core.units import Model
from tl_sparsify.presentation.circuit_data import Request, gathered
from tl_sparsify.search.scores import Scores

_SCHEMA = "1.0.0"
_SLUG = re.compile(r"[a-zA-Z0-9_-]+")


@checked
def to_neuronpedia(
    file: str | Path,
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    slug: str,
    scan: str,
    alignment: Alignment | None = None,
    scores: Scores | None = None,
    effects: int = 16,
    progress: bool = True,
) -> Path:
    """Write the circuit, on the first example's prompt, as a graph that Neuronpedia can show, and return the file.

    A node for each token of the prompt, each kept unit (at the position where it matters most) and the answer; links
    are those of :func:`page`, from each token to the units there, and from each unit to the answer by its effect. Of
    more than 300 kept units those with the largest scores are nodes (without ``scores`` the first ones), and the
    graph's ``metadata.info`` says of how many.

    Args:
        slug: the graph's name there, of letters, digits, ``-`` and ``_``.
        scan: Neuronpedia's name of the model, such as ``gpt2-small``.
        alignment: of a causal model's variables, each a supernode.

    One forward pass over ``effects`` examples for each kept unit, and a few more.

    Raises:
        FileNotFoundError: ``file`` is in a folder that is not there.
        ValueError: another ``slug``, examples that are not tokens, a reduction of another model or without kept units.

    Example:
        >>> settings = {"slug": "equality", "scan": "own", "effects": 4, "progress": False}
        >>> tls.to_neuronpedia("graph.json", model, reduction, test, **settings).name
        'graph.json'
    """
    check_count("effects", effects)
    if not _SLUG.fullmatch(slug):
        raise ValueError(f"slug is {slug!r}; it is made of letters, digits, - and _")
    check_folder(Path(file))
    request = Request(scores=scores, alignment=alignment, shown=1, effects=effects, progress=progress)
    found = gathered(model, reduction, examples, request)
    prompt, layers = found["prompts"][0], found["layers"]
    if "ids" not in prompt:
        raise ValueError(f"examples are of shape {tuple(examples.tokens.shape)}: a graph needs tokens")
    last = len(prompt["tokens"]) - 1
    nodes = [
        _node(f"E_{token}_{place}", "embedding", "E", place, place, f'Emb: "{name}"')
        for place, (token, name) in enumerate(zip(prompt["ids"], prompt["tokens"], strict=True))
    ]
    here: list[dict[str, Any]] = []
    for unit in found["units"]:
        place = int(np.abs(np.array(unit["places"][0], dtype=float)).argmax())
        label = unit["name"] + (f" -> {' '.join(unit['writes']['up'][:3])}" if "writes" in unit else "")
        number = _paired(unit["layer"], unit["index"])
        node = _node(f"{unit['name']}_{place}", unit["kind"], str(unit["layer"]), place, number, label)
        here.append(node | {"influence": unit["effect"], "activation": unit["places"][0][place]})
    answer = prompt["answers"][-1]
    out = _node(f"{layers}_{answer}_{last}", "logit", str(layers), last, answer, f'Output "{prompt["answer"]}"')
    out |= {"is_target_logit": True}
    names = [node["node_id"] for node in here]
    links = [{"source": names[a], "target": names[b], "weight": w} for a, b, w in found["links"]]
    tokens = [node["node_id"] for node in nodes]
    links += [{"source": tokens[node["ctx_idx"]], "target": node["node_id"], "weight": 1.0} for node in here]
    links += [{"source": n["node_id"], "target": out["node_id"], "weight": n["influence"] or 0.0} for n in here]
    supernodes = [
        [variable["name"], *(names[unit["unit"]] for unit in variable["units"] if unit["unit"] is not None)]
        for variable in found["variables"]
    ]
    content = {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "prompt_tokens": prompt["tokens"],
            "prompt": "".join(prompt["tokens"]),
            "schema_version": _SCHEMA,
            "info": {
                "generator": {"name": "tl_sparsify"},
                "units": f"{len(here)} of {found['facts']['kept']} kept units",
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [some for some in supernodes if len(some) > 1],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [*nodes, *here, out],
        "links": links,
    }
    write_text(Path(file), json.dumps(content, ensure_ascii=False))
    return Path(file)


def _node(name: str, kind: str, layer: str, place: int, feature: int, label: str) -> dict[str, Any]:
    return {
        "node_id": name,
        "jsNodeId": f"{name}-0",
        "feature": feature,
        "layer": layer,
        "ctx_idx": place,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": label,
    }


def _paired(a: int, b: int) -> int:
    """One number for two."""
    return (a + b) * (a + b + 1) // 2 + b
