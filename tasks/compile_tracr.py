"""Compile the RASP programs of the tasks ``tracr_*`` and measure what their cards say.

    python -m tasks.compile_tracr [NAME ...]

from the repository's root, with the extra ``tracr`` installed (it brings JAX, which nothing else here needs). Writes
each task's ``model`` folder: ``config.json`` and ``model.safetensors``, ``labels.json`` (what the numbers stand for),
``truth.json`` (which units do something) and ``metrics.json`` (every figure of the card).
"""

# ruff: noqa: T201
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from tracr.compiler import (
    basis_inference,
    craft_graph_to_model,
    craft_model_to_transformer,
    expr_to_craft_graph,
    lib,
    nodes,
    rasp_to_graph,
)
from tracr.craft import bases
from tracr.rasp import rasp
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native
from transformer_lens.utilities.tracr import (
    make_tracr_transformer_bridge_config,
    make_tracr_transformer_bridge_state_dict,
)

import tl_sparsify as tls
from tl_sparsify._internal.files import write_text
from tl_sparsify.core.forward import answer_logits
from tl_sparsify.core.units import select
from tl_sparsify.tasks.compiled import TOLERANCE, effects, redundant, working
from tl_sparsify.tasks.native import save_native

FOLDER = Path(__file__).parent
# Names that sort behind every letter and number, so that the tokens of a program are numbered from 0.
BOS, PAD = "~bos", "~pad"
NUMBER = re.compile(r"_\d+(?=:|_selector_width|$)")  # of an expression: it depends on what was compiled before
SETTINGS = (
    *("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx"),
    *("act_fn", "attention_dir", "normalization_type"),
)


@dataclass(frozen=True)
class Source:
    """A RASP program, its vocabulary and the length of its inputs."""

    program: Callable[[], Any]
    vocabulary: frozenset[Any]
    length: int


def reverse() -> Any:
    """The letters in reverse order. Blanks behind the string are no part of its length."""
    letters = rasp.Select(rasp.tokens, rasp.tokens, lambda key, query: key != "_")
    length = rasp.SelectorWidth(letters).named("length")
    difference = (length - rasp.indices).named("difference")
    opposite = (difference - 1).named("opposite")
    return rasp.Aggregate(rasp.Select(rasp.indices, opposite, rasp.Comparison.EQ), rasp.tokens).named("reverse")


def frac_prevs() -> Any:
    """The share of vowels up to each letter, as one of the shares that there can be (a category, not a number)."""
    vowel = rasp.Map(lambda letter: letter in "aei", rasp.tokens).named("vowel")
    return rasp.categorical(rasp.Map(lambda share: share, lib.make_frac_prevs(vowel))).named("share")


def sort() -> Any:
    """The numbers in order. Of equal ones the earlier is the smaller: a sixth of its index is added to each."""
    keys = rasp.SequenceMap(lambda number, index: number + index / 6, rasp.tokens, rasp.indices).named("keys")
    return lib.make_sort_unique(rasp.tokens, keys)


SOURCES = {
    "tracr_reverse": Source(reverse, frozenset("_abcdef"), 6),
    "tracr_frac_prevs": Source(frac_prevs, frozenset("abcdei"), 6),
    "tracr_sort": Source(sort, frozenset((1, 2, 3, 4, 5)), 6),
    "tracr_hist": Source(lib.make_hist, frozenset("abcde"), 6),
}


def compile_native(source: Source) -> tuple[TransformerBridge, dict[str, Any], dict[str, list[str]]]:
    """The program as a native model, the model's settings, and what its numbers stand for."""
    compiled = _compiled(source)
    found = make_tracr_transformer_bridge_config(compiled)
    config: dict[str, Any] = {name: getattr(found, name) for name in SETTINGS} | {"default_prepend_bos": False}
    model = boot_native(TransformerBridgeConfig(**config))
    weights = make_tracr_transformer_bridge_state_dict(compiled)
    weights["head.bias"] = torch.zeros(config["d_vocab_out"])  # which the converter leaves as it is
    model.load_state_dict(weights, strict=False)  # the names that are missing are aliases of those given
    _check_alike(model.eval(), compiled, source)
    return (
        model,
        config,
        {
            "residual": [
                _named(re.sub(r"_\d+(?=:|_selector_width|$)", "", label)) for label in compiled.residual_labels
            ],
            "tokens": [_named(value) for value in _ordered(compiled.input_encoder)],
            "outputs": [_named(value) for value in _ordered(compiled.output_encoder)],
        },
    )


def _compiled(source: Source) -> Any:
    """Tracr's compilation (``compile_rasp_to_model``, step by step), with every value that a mean can have."""
    extracted = rasp_to_graph.extract_rasp_graph(source.program())
    graph, sink = extracted.graph, extracted.sink
    basis_inference.infer_bases(graph, sink, set(source.vocabulary), source.length)
    _complete_means(graph, source.length)
    marked = bases.BasisDirection(rasp.tokens.label, BOS)
    expr_to_craft_graph.add_craft_components_to_rasp_graph(graph, bos_dir=marked, mlp_exactness=100)
    return craft_model_to_transformer.craft_model_to_transformer(
        craft_model=craft_graph_to_model.craft_graph_to_model(graph, extracted.sources),
        graph=graph,
        sink=sink,
        max_seq_len=source.length,
        compiler_bos=BOS,
        compiler_pad=PAD,
    )


def _complete_means(graph: Any, length: int) -> None:
    """Tell Tracr which values the mean of booleans has: it reckons with 0 and 1 / n only, so that a map of a mean would
    take 3/4 for 1. The maps of such a mean get their values anew."""
    shares = {part / whole for whole in range(1, length + 1) for part in range(whole + 1)}
    for node in graph.nodes.values():
        mean = node[nodes.EXPR]
        if not (isinstance(mean, rasp.Aggregate) and rasp.is_numerical(mean)):
            continue
        node[nodes.VALUE_SET] = shares
        for name in graph.successors(mean.label):
            reader = graph.nodes[name]
            function = reader[nodes.EXPR]
            if not (isinstance(function, rasp.Map) and rasp.is_categorical(function)):
                raise ValueError(f"{name} reads a mean and is no map to categories: its values are not known")
            reader[nodes.VALUE_SET] = {function.f(share) for share in shares}
            space = bases.VectorSpaceWithBasis.from_values(function.label, reader[nodes.VALUE_SET])
            reader[nodes.OUTPUT_BASIS] = space.basis


def _ordered(encoder: Any) -> list[Any]:
    ids: Mapping[Any, int] = encoder.encoding_map
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError(f"ids are not numbered from 0: {dict(ids)}")
    return sorted(ids, key=lambda name: ids[name])


def _named(value: Any) -> str:
    """``3``, ``a``, ``1/4``, ``BOS``."""
    text = str(Fraction(value).limit_denominator(100)) if isinstance(value, float) else str(value)
    return text.replace(BOS, "BOS").replace(PAD, "PAD")


def _check_alike(model: TransformerBridge, compiled: Any, source: Source, *, inputs: int = 20) -> None:
    """Refuse a conversion whose answers are not those of the compiled model.

    Raises:
        ValueError: an input on which they differ.
    """
    names = _ordered(compiled.output_encoder)
    symbols = sorted(source.vocabulary)
    generator = torch.Generator().manual_seed(0)
    for _ in range(inputs):
        drawn = [symbols[i] for i in torch.randint(len(symbols), (source.length,), generator=generator).tolist()]
        tokens = torch.tensor([compiled.input_encoder.encode([BOS, *drawn])])
        with torch.no_grad():
            logits = model(tokens)[0, 1:]
        wanted = compiled.apply([BOS, *drawn]).decoded[1:]
        answers = [names[i] for i in logits.argmax(1).tolist()]
        sure = logits.max(1).values > 0.5  # where nothing is selected there is no answer
        wrong = [(a, w) for a, w, s in zip(answers, wanted, sure.tolist(), strict=True) if s and a != w]
        if wrong:
            raise ValueError(f"on {drawn} the native model answers {answers}, the compiled one {wanted}")


def measure(name: str) -> None:
    """Write ``truth.json`` and ``metrics.json`` of a compiled task."""
    program = _program(name)
    model = program.task().model()
    units = tls.heads(model) + tls.neurons(model)
    pool = program.pool()
    alone = effects(model, pool, units)
    found = alone > TOLERANCE
    truth = {"weights": working(model), "removal": tls.Circuit(units, found).names}
    write_text(program.folder / "truth.json", json.dumps(truth, indent=1) + "\n")
    task = _program(name).task()
    pairs, test = task.pairs(2048, 0), task.examples(0)[2]
    others = redundant(model, pool, units, truth["removal"])
    metrics = {
        "kind": "compiled",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "compiler": f"tracr-pypi {version('tracr-pypi')}",
        "test_split": _scored(model, test),
        "test_space": {"every input": _scored(model, pool)},
        "truth": {name: len(names) for name, names in truth.items()},
        "least_nats_of_needed": round(float(alone[found].min()), 4),
        "most_nats_of_others": float(alone[~found].max()) if bool((~found).any()) else 0.0,
        "redundant": others,
        "kept": {
            "weights": _kept(model, test, units, truth["weights"]),
            "removal": _kept(model, test, units, truth["removal"]),
            "removal, and redundant units": _kept(model, test, units, (*truth["removal"], *others)),
        },
        "first_head": _first_head(model, test, truth["removal"]),
        "interchange": interchanged(program, model, pairs),
        "rivals": {
            rival: _interchange(model, causal_model, pairs, program.alignment)
            for rival, causal_model in program.causal_models.items()
        },
    }
    write_text(program.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


def _program(name: str) -> Any:
    """The task's program: its file is loaded as the package loads it."""
    task = tls.load_task(FOLDER / name)
    return sys.modules[f"tl_sparsify_task_{task.name}"].program()


def _scored(model: Any, examples: tls.Examples) -> dict[str, Any]:
    where = examples.labels != -100
    with torch.no_grad():
        logits = torch.cat([model(batch.tokens)[batch.labels != -100] for _, batch in examples.batches(4096)])
    labels = examples.labels[where]
    return {
        "n": len(labels),
        "accuracy": round(float((logits.argmax(1) == labels).double().mean()), 6),
        "nats": round(float(torch.nn.functional.cross_entropy(logits.double(), labels)), 6),
    }


def _kept(model: Any, test: tls.Examples, units: tls.Units, names: Collection[str]) -> dict[str, Any]:
    """How good the circuit of the named units is, all others set to zero."""
    zero = tls.constants.zero(model, test, units)
    found = tls.evaluate(model, tls.constants.reduced(model, tls.Circuit.of(units, names), zero, "zero"), test)
    return {"units": len(names), "nats": round(found.risk.mean, 6), "accuracy": round(found.accuracy, 4)}


def _first_head(model: Any, test: tls.Examples, names: Collection[str]) -> dict[str, Any]:
    """What an expansion says of the first head that is needed, and what removing it costs (nats, on average)."""
    units = tls.heads(model)
    number = next(i for i, name in enumerate(units.names) if name in names)
    zero = tls.constants.zero(model, test, units)
    predicted = tls.score.risk(model, test, units, values=zero, seed=0).scores[number]
    measured = tls.score.exact(model, test, units, values=zero, progress=False).scores[number]
    return {"unit": units.names[number], "risk": float(predicted), "exact": round(float(measured), 4)}


def interchanged(program: Any, model: Any, pairs: tls.Pairs, *, draws: int = 5) -> dict[str, dict[str, list[float]]]:
    """Interchange accuracies over all pairs, and over those whose answer changes: a row for each set of units, a column
    for each variable.

    The sets are each variable's units; as many random other neurons of the layer (the mean over ``draws``, where there
    are so many); the coordinates labelled with the variable, and as many random other ones.
    """
    rows = {"nothing": _accuracies(model, program.causal_model, pairs, [])}
    for alignment in (program.alignment, program.directions):
        for units in alignment.units.values():
            rows[_place(units)] = _accuracies(model, program.causal_model, pairs, units)
            site, own = units[0].site, {unit.index for unit in units}
            others = [tls.Unit(site, i) for i in range(site.size) if i not in own]
            if len(others) < len(units):
                continue
            generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
            drawn = [torch.randperm(len(others), generator=generator)[: len(units)] for generator in generators]
            chosen = [[others[int(i)] for i in index] for index in drawn]
            found = [_accuracies(model, program.causal_model, pairs, some) for some in chosen]
            mean = {v: [round(sum(row[v][i] for row in found) / draws, 4) for i in range(2)] for v in found[0]}
            rows[f"{_place(units)}, but random others"] = mean
    return rows


def _interchange(
    model: Any, causal_model: tls.CausalModel, pairs: tls.Pairs, alignment: tls.Alignment
) -> dict[str, float]:
    """How often a causal model gives the model's answer, without an interchange (``answers``) and with one of each
    variable that it has, where the model's own changes."""
    plain, own = _answers(model, pairs, []), _labels(pairs.base)
    found = {"answers": float((plain == pairs.expected(causal_model, ())).double().mean())}
    for variable in set(alignment.variables) & set(causal_model.variables):
        answer = _answers(model, pairs, alignment.units[variable])
        hits = (answer == pairs.expected(causal_model, (variable,)))[answer != own]
        found[variable] = float(hits.double().mean())
    return {name: round(found[name], 4) for name in ("answers", *alignment.variables) if name in found}


def _place(units: Sequence[tls.Unit]) -> str:
    """``L0H0 at 1``, ``25 neurons of layer 1 at 4``, ``7 directions of layer 0 (resid_mid) at 1, 2``."""
    site = units[0].site
    first, *rest = cast(tuple[int, ...], site.positions)
    where = f"at {first} to {rest[-1]}" if rest else f"at {first}"  # none of the alignments leaves one out
    if site.kind == "head" and len(units) == 1:
        return f"L{site.layer}H{units[0].index} {where}"
    place = f" ({site.hook.rpartition('hook_')[2]})" if site.kind == "direction" else ""
    plural = "s" if len(units) > 1 else ""
    return f"{len(units)} {site.kind}{plural} of layer {site.layer}{place} {where}"


def _accuracies(
    model: Any, causal_model: tls.CausalModel, pairs: tls.Pairs, units: Sequence[tls.Unit]
) -> dict[str, list[float]]:
    answer, own = _answers(model, pairs, units), _labels(pairs.base)
    rows: dict[str, list[float]] = {}
    for variable in causal_model.variables:
        expected = pairs.expected(causal_model, (variable,))
        hits, changed = (answer == expected).double(), expected != own
        rows[variable] = [round(float(hits.mean()), 4), round(float(hits[changed].mean()), 4)]
    return rows


def _answers(model: Any, pairs: tls.Pairs, units: Sequence[tls.Unit]) -> Int[Tensor, "n"]:
    """The model's answers on the bases with ``units`` taken from the sources."""
    swap: tuple[tls.Intervention, ...] = ()
    if units:
        sites, mask = select(units)
        swap = (tls.interchange(tls.Circuit(sites, mask), tls.run_values(model, pairs.source, sites)),)
    with torch.no_grad(), tls.intervened(model, *swap):
        return answer_logits(model, pairs.base).argmax(1)


def _labels(examples: tls.Examples) -> Int[Tensor, "n"]:
    return examples.labels[examples.labels != -100]


def main() -> None:
    """Compile and measure the named tasks, or all."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SOURCES:
        folder = FOLDER / name / "model"
        model, config, labels = compile_native(SOURCES[name])
        save_native(model, config, folder)
        write_text(folder / "labels.json", json.dumps(labels, indent=1) + "\n")
        print(name, config)
        measure(name)


if __name__ == "__main__":
    main()
