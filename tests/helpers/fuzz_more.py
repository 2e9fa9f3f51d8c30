"""Bad calls, continued: verification, data, files, figures and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import tl_sparsify as tls
from helpers import verification as made
from helpers import written
from helpers.fuzz import INF, NAN, Entry, elsewhere, foreign
from helpers.models import bridge, examples, random_values, reduction_of, units_of
from helpers.tokenized import ANSWERS, PROMPTS, byte_pairs
from helpers.tokenized import bridge as tokenized
from tl_sparsify import mib, plot, text
from tl_sparsify.core.units import Unit

NO_TEXT: list[Any] = [3, 1.5, [1], {"a": 1}, b"x", object(), torch.ones(2)]
WRONG: list[Any] = ["text", [1, 2], {"a": 1}, 1.5, torch.ones(3), pd.DataFrame({"a": [1]}), SimpleNamespace(), b"x"]
NO_WORDS: list[Any] = ["word", 3, [1, 2], [None], {"a": 1}, b"x", object()]
NO_FOLDER: list[Any] = [3, 1.5, None, [1], {}, b"x", object(), "nowhere"]
NO_NUMBER: list[Any] = [0, -1, 1.5, "8", NAN, True, [4]]


def later() -> dict[str, Entry]:
    """The other public functions by name, each with arguments that it takes."""
    return _verification() | _files() | _figures() | _words() | _benchmark() | _comparison()


def prepared(folder: Path) -> None:
    """The files that these calls read."""
    (folder / "data").mkdir()
    other = {"prompt": "the capital of", "label": " Paris"}
    row = {"prompt": "the river of", "label": " Rome", "operator": "+", "random_counterfactual": other}
    (folder / "data" / "train.json").write_text(json.dumps([row]))


def _verification() -> dict[str, Entry]:
    model = made.shared_native()
    pairs = made.answered_by(model, made.native_pairs(12))
    units = tls.heads(model)
    other = tls.Alignment({"nobody": made.NATIVE.units["odd"]})
    lost = tls.Alignment({"odd": [Unit(elsewhere().sites[0], 3)]})
    no_pairs = [*WRONG, None, (pairs.base, pairs.source), pairs.base]
    no_model = [*WRONG, None, lambda x: x, made.PARITY.mechanisms]
    no_alignment = [*WRONG, None, {"odd": made.NATIVE.units["odd"]}, other, lost]
    verifying: dict[str, Any] = {
        "model": "model", "causal_model": no_model, "alignment": no_alignment, "pairs": no_pairs, "seed": "seed",
        "draws": "draws", "goal": [-0.5, 0, 1.5, NAN, INF, "half", [0.5], True, {}], "batch_size": "size",
        "level": "fraction", "reduced": [*WRONG, nn.Linear(2, 2), foreign()],
    }  # fmt: skip
    searching: dict[str, Any] = {
        "model": "model", "causal_model": no_model, "pairs": no_pairs, "held_out": no_pairs, "units": "units?",
        "variables": ["odd", 3, [], ["nobody"], [1], {}, b"x"], "reduction": "reduction?", "seed": "seed",
        "trials": [0, 1, -1, 10**20, NAN, 1.5, True, [4], "8"], "tolerance": "distance",
        "subspace": [0, -1, 99, 1.5, NAN, True, [2], "2"], "batch_size": "size",
    }  # fmt: skip
    inputs = [*WRONG, None, {"x": 3}, {"x": np.arange(3)}, [np.arange(12)]]
    several = examples(12, answers=2)
    in_pairs = {"base": [*WRONG, None, several, pairs.base[:3]], "source": [*WRONG, None, several, pairs.base[:3]]}
    return {
        "verify": Entry(
            tls.verify,
            {"model": model, "causal_model": made.PARITY, "alignment": made.NATIVE, "pairs": pairs, "draws": 1},
            verifying,
            made.shared_native,
        ),
        "align": Entry(
            tls.align,
            {"model": model, "causal_model": made.PARITY, "pairs": pairs, "held_out": pairs, "units": units.at(3)}
            | {"variables": ["odd"], "trials": 2},
            searching,
            made.shared_native,
        ),
        "Pairs": Entry(
            tls.Pairs,
            {name: getattr(pairs, name) for name in ("base_inputs", "source_inputs", "base", "source", "answers")},
            in_pairs | {"base_inputs": inputs, "source_inputs": inputs, "answers": [*WRONG[:2], 3, None, {1: "a"}]},
        ),
        "Alignment": Entry(
            tls.Alignment, {"units": made.NATIVE.units}, {"units": [*WRONG, None, {"odd": []}, {"odd": ["L0H0"]}]}
        ),
        "CausalModel": Entry(
            tls.CausalModel,
            {"inputs": ("x",), "mechanisms": {"y": lambda x: x}, "output": "y"},
            {"inputs": [3, [1], None, {"a": 1}, object(), ("x", "x"), ("y",)], "output": ["z", 3, None, [1]]}
            | {"mechanisms": [3, None, "y", [1], {"y": 3}, {"y": lambda z: z}, {1: lambda x: x}]},
        ),
        "CausalModel.run": Entry(
            made.PARITY.run,
            {"inputs": {"x": [1], "y": [2]}},
            {"inputs": [3, None, "x", [1], {}, {"x": [1]}, {"x": 1, "y": 2}, {"x": [1], "y": [1, 2]}]},
        ),
    }


def _files() -> dict[str, Entry]:
    model, data = bridge(), examples(4)
    units, reduction = units_of(model), reduction_of(model)
    scores = tls.score.variance(model, data, units)
    folded = tls.fold(tokenized("GPT-2"), _of_heads(tokenized("GPT-2")))
    three: dict[str, Any] = {"model": model, "reduction": reduction, "examples": data, "progress": False, "effects": 2}
    kinds: dict[str, Any] = {
        "model": "model", "reduction": "reduction", "examples": "examples", "effects": NO_NUMBER,
        "scores": _no_scores(), "alignment": [*WRONG, {"odd": made.NATIVE.units["odd"]}], "progress": "flag",
    }  # fmt: skip
    shown = {"title": [*NO_TEXT, None], "shown": NO_NUMBER, "limit": NO_NUMBER, "out": [*NO_TEXT, None]}
    shown |= {"path": WRONG, "evidence": WRONG}
    described: dict[str, Any] = {name: [*NO_TEXT, None] for name in ("model", "task")} | {"reduction": [*WRONG, None]}
    described |= {"interval": [3, "ab", [1], (2.0, 1.0), {}, (0.0, NAN), ("a", "b")], "risk": WRONG, "repo": NO_TEXT}
    described |= {"licence": NO_TEXT, "controls": [3, "ab", [1], b"x", object()]}
    estimate = tls.Estimate(0.1, 0.01, 9, "nats")
    no_repo = [*NO_TEXT, None, "name", "a/b/c", "/b", "../b"]
    return {
        "page": Entry(tls.page, three | {"out": "circuit.html"}, kinds | shown),
        "to_neuronpedia": Entry(
            tls.to_neuronpedia,
            three | {"file": "graph.json", "slug": "a", "scan": "b"},
            kinds | {"file": [*NO_TEXT, None], "slug": [*NO_TEXT, None, "a b", ""], "scan": [*NO_TEXT, None]},
        ),
        "card": Entry(tls.card, {"reduction": reduction, "model": "own", "task": "t", "risk": estimate}, described),
        "push": Entry(
            tls.push,
            {"reduction": reduction, "repo": "me/mine", "card": "a card", "endpoint": "hub"},
            {"reduction": [*WRONG, None], "repo": no_repo, "card": [*NO_TEXT, None], "endpoint": NO_TEXT},
        ),
        "pull": Entry(tls.pull, {"repo": "me/mine", "endpoint": "hub"}, {"repo": no_repo, "endpoint": NO_TEXT}),
        "export_hf": Entry(
            tls.export_hf,
            {"model": folded, "path": "checkpoint"},
            {"model": [*WRONG, None, model, nn.Linear(2, 2)], "path": [*NO_TEXT, None]},
        ),
        "load_examples": Entry(
            tls.load_examples,
            {"tokenizer_or_model": byte_pairs(), "source": list(zip(PROMPTS, ANSWERS, strict=True))},
            {
                "tokenizer_or_model": [*WRONG, None, model],
                "source": [3, None, 1.5, b"x", [], {}, [3], [("a",)], "nowhere.csv", torch.ones(3), object()],
                "prompt": NO_TEXT, "answer": NO_TEXT, "wrong_answer": NO_TEXT, "counterfactual_prompt": NO_TEXT,
                "choices": [3, 1.5, b"x", [1, 2], [""], object(), "nobody"], "answers_as": "choice",
                "answer_prefix": NO_TEXT, "answer_tokens": "choice", "spans": [3, 1.5, b"x", [1], object(), "nobody"],
                "pairs": "choice", "left_out": NO_TEXT, "unusable": "choice", "prepend_bos": "flag",
                "padding_side": "choice", "max_length": NO_NUMBER, "limit": NO_NUMBER,
            },
        ),
        "report.write": Entry(tls.report.write, {"folder": "run"}, {"folder": NO_FOLDER, "out": NO_TEXT}),
        "Scores.rank_correlation": Entry(
            scores.rank_correlation, {"other": scores}, {"other": [*WRONG, None, _no_scores()[-1]]}
        ),
    }  # fmt: skip


def _of_heads(model: Any) -> tls.Reduction:
    units = tls.heads(model)
    circuit = tls.Circuit(units, torch.arange(len(units)) > 0)
    values = random_values(units, width=model.cfg.d_head)
    return tls.Reduction(circuit, values, fingerprint=tls.fingerprint(model), first_token="none")


def _no_scores() -> list[Any]:
    return [*WRONG, units_of(bridge()), written.scores()]


def _figures() -> dict[str, Entry]:
    path, scores, table = written.path(), written.scores(), written.table()
    reduction = written.reduction_of(tls.Circuit.of(written.UNITS, written.KEPT))
    evidence, others = written.evidence(), tls.score.variance(bridge(), examples(4), units_of(bridge()))
    no_circuit = [*WRONG, None, written.UNITS]
    figure = plot.head_map(scores)
    no_table = [*WRONG, None, pd.DataFrame(), table.iloc[:0], table.drop(columns="risk")]
    return {
        "plot.risk_curve": Entry(
            plot.risk_curve, {"path": path}, {"path": [*WRONG, None], "points": [3, "a", [1], {"a": 1}]}
        ),
        "plot.frontier": Entry(
            plot.frontier,
            {"table": table},
            {"table": no_table, "measure": "choice", "tasks": ["a", 3, ["nobody"], [1]], "ablation": "choice"}
            | {"methods": ["a", 3, ["nobody"], [1], {}]},
        ),
        "plot.against": Entry(
            plot.against,
            {"one": scores, "other": scores},
            {"one": [*WRONG, None], "other": [*WRONG, None, others], "labels": [-1, 1.5, "8", NAN, True, None]},
        ),
        "plot.evidence": Entry(plot.evidence, {"found": evidence}, {"found": [*WRONG, None, pd.DataFrame()]}),
        "plot.png": Entry(
            plot.png, {"figure": figure}, {"figure": [*WRONG, None], "dpi": [0, -1, NAN, "9", None, True, 1.5, 10**9]}
        ),
        "plot.save": Entry(
            plot.save, {"figure": figure, "path": "a.png"}, {"figure": WRONG, "path": [*NO_TEXT, None]}
        ),
        "plot.unit_map": Entry(
            plot.unit_map, {"reduction": reduction}, {"reduction": no_circuit, "scores": [*WRONG, others]}
        ),
        "plot.head_map": Entry(plot.head_map, {"of": reduction}, {"of": no_circuit}),
        "plot.neuron_density": Entry(
            plot.neuron_density, {"reduction": reduction}, {"reduction": no_circuit, "bins": "size"}
        ),
        "plot.circuit": Entry(plot.circuit, {"reduction": reduction}, {"reduction": [*no_circuit, reduction.circuit]}),
        "plot.causal_graph": Entry(plot.causal_graph, {"model": written.EQUALITY}, {"model": [*WRONG, None, bridge()]}),
    }  # fmt: skip


def _words() -> dict[str, Entry]:
    tokenizer, rows = byte_pairs(), {"name": np.array(["Ann", "Tom"])}
    known = {"source": tokenized("GPT-2")}
    no_rows = [*WRONG[:2], None, {}, {"name": ["Ann"]}, {"name": 3}, b"x"]
    no_tokenizer = [*WRONG, None, bridge()]
    no_model = [3, 1.5, None, [1], {}, b"x", object(), nn.Linear(2, 2), "", "no such model", Path("/nowhere")]
    return {
        "text.draw_rows": Entry(
            text.draw_rows,
            {"fields": {"name": ["Ann"]}, "n": 3},
            {"fields": [*WRONG[:2], None, {"name": 3}, {"name": "Ann"}, {"name": []}, {"name": [None]}, b"x"]}
            | {"n": [-1, 1.5, "8", NAN, None, True, [4], 10**20], "seed": "seed"},
        ),
        "text.row_keys": Entry(
            text.row_keys,
            {"inputs": rows, "fields": {"name": ["Ann", "Tom"]}},
            {"inputs": [*no_rows, {"other": np.array(["Ann"])}, {"name": np.array(["Zoe"])}]}
            | {"fields": [*WRONG[:2], None, {"name": 3}, {"other": ["Ann"]}, {"name": []}, b"x"]},
        ),
        "text.filled": Entry(
            text.filled,
            {"templates": ["{name}", "{name}"], "inputs": rows},
            {"templates": [*NO_WORDS, None, ["{other}", "a"], ["{", "}"], ["one"]], "inputs": no_rows},
        ),
        "text.prompts": Entry(
            text.prompts, {"rows": {"template": np.array(["{a}"]), "a": np.array(["b"])}}, {"rows": [*no_rows, rows]}
        ),
        "text.single_token_words": Entry(
            text.single_token_words,
            {"tokenizer": tokenizer, "words": ["a"]},
            {"tokenizer": no_tokenizer, "words": [*NO_WORDS, None]},
        ),
        "text.two_token_numbers": Entry(
            text.two_token_numbers,
            {"tokenizer": tokenizer, "heads": ["1"], "tails": ["2"]},
            {"tokenizer": no_tokenizer, "heads": [*NO_WORDS, None], "tails": [*NO_WORDS, None]},
        ),
        "text.digit_by_digit": Entry(
            text.digit_by_digit,
            {"tokenizer": tokenizer, "numbers": ["12"]},
            {"tokenizer": no_tokenizer, "numbers": [*NO_WORDS, None, [""]]},
        ),
        "text.load_language_model": Entry(text.load_language_model, known, {"source": no_model}),
        "text.load_tokenizer": Entry(text.load_tokenizer, known, {"source": no_model}),
        "basis.pca": Entry(
            tls.basis.pca,
            {"model": bridge(), "examples": examples(4), "hook": "blocks.0.hook_resid_post", "rank": 2},
            {"model": "model", "examples": "examples", "hook": [*NO_TEXT, None, "nowhere"], "batch_size": "size"}
            | {"rank": [0, -1, 99, 1.5, "2", NAN, None, True, [2]]},
        ),
    }  # fmt: skip


def _benchmark() -> dict[str, Entry]:
    model, data = bridge(), examples(8, choices=(1, 2, 3))
    units = tls.heads(model) + tls.mlps(model)
    scores = tls.score.variance(model, data, units)
    circuit = scores.top(0.5)
    graph = mib.graph(model, circuit, scores)
    no_model = [*WRONG, None, nn.Linear(2, 2), object()]
    no_scores = [*WRONG, tls.score.variance(model, data, units_of(model)), written.scores()]
    no_circuit = [*WRONG, None, circuit.mask, tls.Circuit.full(units_of(model)), tls.Circuit.full(elsewhere())]
    no_sizes = ["half", 0.5, [NAN], [2.0], [-0.1], [0.0], [True], ["a"], {}, None]
    asking: dict[str, Any] = {
        "tokenizer_or_model": [*WRONG, None, model], "folder": NO_FOLDER, "split": [*NO_TEXT, None, "validation"],
        "limit": NO_NUMBER,
    }  # fmt: skip
    return {
        "mib.sizes": Entry(mib.sizes, {"model": model}, {"model": no_model}),
        "mib.graph": Entry(
            mib.graph,
            {"model": model, "circuit": circuit},
            {"model": no_model, "circuit": no_circuit, "scores": no_scores},
        ),
        "mib.Graph.circuit": Entry(graph.circuit, {"model": model}, {"model": [*no_model, made.shared_native()]}),
        "mib.Graph.top": Entry(
            graph.top, {"n": 3}, {"n": [-1, 10**6, 1.5, "3", NAN, None, True], "of": "choice", "absolute": "flag"}
        ),
        "mib.Graph.save": Entry(graph.save, {"path": "graph.json"}, {"path": [*NO_TEXT, None]}),
        "mib.load": Entry(mib.load, {"path": "graph.json"}, {"path": [*NO_TEXT, None, "nowhere", "."]}),
        "mib.areas": Entry(
            mib.areas,
            {"edges": [5, 10], "faithfulness": [0.5, 1.0]},
            {"edges": [3, None, "ab", [], [5], [10, 5], ["a", "b"], [NAN, 3.0], [0, 0], {}, [5, 10, 20]]}
            | {"faithfulness": [3, None, "ab", [], [1.0], ["a", "b"], {}, [NAN, 1.0], [INF, 1.0]]},
        ),
        "mib.circuits": Entry(
            mib.circuits,
            {"model": model, "source": scores},
            {"model": no_model, "source": [*no_scores, None], "sizes": no_sizes},
        ),
        "mib.submission": Entry(
            mib.submission,
            {"folder": "circuits", "model": model, "source": scores, "task": "ioi", "name": "gpt2"},
            {"folder": [*NO_TEXT, None], "model": no_model, "source": [*no_scores, None]}
            | {"task": "choice", "name": "choice", "suffix": "choice"},
        ),
        "mib.standing": Entry(
            mib.standing,
            {"model": model, "source": scores, "examples": data},
            {"model": "model", "source": [*no_scores, None], "examples": "examples", "metric": "metric"}
            | {"batch_size": "size"},
        ),
        "mib.circuit_task": Entry(
            mib.circuit_task,
            {"tokenizer_or_model": byte_pairs(), "name": "arithmetic_addition", "folder": "data"},
            asking | {"name": [*NO_TEXT, None, "nobody"], "counterfactual": [*NO_TEXT, "nobody"], "pairs": "choice"},
        ),
        "mib.causal_pairs": Entry(
            mib.causal_pairs,
            {"tokenizer_or_model": byte_pairs(), "folder": "data"},
            asking | {"answer": ["a", 3, [1], {}]},
        ),
    }  # fmt: skip


def _comparison() -> dict[str, Entry]:
    task = tls.load_task("planted_backup")
    model = task.model()
    small: dict[str, Any] = {"methods": [tls.score.variance], "sizes": (0.5,), "seeds": 1, "refit_patience": 0}
    small |= {"examples": 16, "bootstrap": 0, "progress": False}
    kinds: dict[str, Any] = {
        "model": [*WRONG, None, nn.Linear(2, 2), object()], "task": [*WRONG, None, "planted_backup", task.causal_model],
        "methods": [3, None, "risk", [], [3], ["risk"], {}, tls.score.variance, [tls.score.variance] * 2],
        "units": "units?", "sizes": ["half", 0.5, (), [NAN], [2.0], [-0.1], ["a"], {}],
        "seeds": [1.5, "0", NAN, None, [], ["0"], [1.5], 0, -1, {}, True],
        "refit_patience": [-1, 1.5, "8", NAN, None, True, [4], 10**20], "maps": "flag", "examples": NO_NUMBER,
        "bootstrap": "draws", "out": NO_TEXT, "progress": "flag",
    }  # fmt: skip
    plain, data, reduction = bridge(), examples(4), reduction_of(bridge())
    return {
        "compare": Entry(tls.compare, {"model": model, "task": task} | small, kinds),
        "refit_until_converged": Entry(
            tls.refit_until_converged,
            {"model": plain, "reduction": reduction, "train": data, "validation": data, "patience": 1, "most": 2},
            {"model": "model", "reduction": "reduction", "train": "examples", "validation": "examples", "seed": "seed"}
            | {"patience": "count", "most": "count", "per_step": [0, -1, 1.5, "8", NAN, True], "batch_size": "size"},
        ),
        "Probing": Entry(
            tls.Probing,
            {},
            {"probes": "count", "temperature": [*_no_positive(), 1e300, 1e-300], "examples": [1, *NO_NUMBER]},
        ),
        "Refitting": Entry(
            tls.Refitting, {}, {"steps": [-1, 1.5, "8", NAN, True, 10**20], "per_step": [0, -1, 1.5, "8", NAN, True]}
        ),
        "Constraints": Entry(
            tls.Constraints, {}, {"always_keep": [*WRONG, units_of(plain)], "costs": ["a", 3, {}, [1]]}
        ),
    }  # fmt: skip


def _no_positive() -> list[Any]:
    return ["a", 0, -1.0, NAN, INF, True, [0.5], None, 1j]
