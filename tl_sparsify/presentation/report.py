"""Report: one self-contained HTML file about what a run found, what a benchmark measured, or both.

Text comes from :mod:`tl_sparsify.presentation.sentences`, pictures from :mod:`tl_sparsify.presentation.plot`; here they
are escaped, put into a page and written. Pictures are inside the file, styles too: it loads nothing, in light and in
dark.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.directory import settle
from tl_sparsify._internal.files import write_text
from tl_sparsify.abstraction.evidence import RANDOM_UNITS
from tl_sparsify.abstraction.verdicts import verdicts
from tl_sparsify.presentation import plot, sentences
from tl_sparsify.presentation.results import (
    RUN_ENTRIES,
    RUN_FILES,
    SETTINGS,
    TABLE,
    Frame,
    RunResults,
    missing,
    read_table,
)
from tl_sparsify.search.scores import Scores

_DPI = 150
_FEW = 12  # layers with a sentence each among the others
_COLUMNS = ("task", "method", "seed", "ablation", "size", "kept", "risk", "accuracy", "faithfulness", "ours")
_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b2129; --soft: #5b6672; --line: #d8dee5; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e4e8ec; --soft: #a0abb6; --line: #353d46; --tint: #1d232a; }
  figure img { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); }
.lead { font-size: 1.1rem; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
dl.facts div { background: var(--tint); border-radius: 6px; padding: .6rem .8rem; }
dl.facts dt { color: var(--soft); font-size: .85rem; }
dl.facts dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
figure img { max-width: max(100%, 44rem); height: auto; display: block; background: #ffffff;
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem; }
figcaption { font-size: .9rem; margin-top: .35rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .75rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--tint); font-weight: 600; }
th.number, td.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; margin: .75rem 0; }
code { background: var(--tint); border-radius: 4px; padding: .1em .3em; font-size: .92em; overflow-wrap: anywhere; }
"""


@checked
def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report about a folder of results as one HTML file, and return its path.

    Args:
        folder: where ``tl-sparsify run`` or ``tl-sparsify bench`` wrote, or both; or a folder of such folders of runs,
            which come one after the other.
        out: the file; ``report.html`` in the folder where not given.

    The same results give the same bytes. No model is loaded and no model pass is made; up to a minute for a large
    benchmark's figures.

    Raises:
        ValueError: the folder has no results, or not all of a run's (the message names what is missing and the command
            that makes it), a file is damaged, or ``out`` cannot be a file.

    Example:
        >>> table.to_csv("table.csv", index=False)  # what `tl-sparsify bench --out .` writes
        >>> tls.report.write(".").name
        'report.html'
    """
    folder = Path(folder)
    target = folder / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise ValueError(f"out is {target}, a folder: name a file in it")
    settle(folder, RUN_ENTRIES, RUN_FILES[0])
    runs = _runs(folder)
    measured = (folder / TABLE).is_file()
    if not runs and not measured:
        raise ValueError(
            f"{folder} holds no results: neither {RUN_FILES[0]} with its tables (`tl-sparsify run TASK --out {folder}` "
            f"makes them) nor {TABLE} (`tl-sparsify bench --out {folder}` does)"
        )
    for place in runs:
        if gone := missing(place):
            raise ValueError(
                f"{place} holds an unfinished run, without {', '.join(gone)}: `tl-sparsify run TASK --out {place}` "
                "makes them"
            )
    if not target.parent.is_dir():
        raise ValueError(f"out is {target}; there is no folder {target.parent}: make it first")
    found = {place: RunResults.load(place) for place in runs}
    table = _benchmark_table(folder / TABLE) if measured else None
    body = [part for place, run in found.items() for part in _of_run(run, place)]
    body += _of_benchmark(table) if table is not None else []
    names = {place: "run" if place == folder else f"run in {place.name}" for place in runs}
    about = {names[place]: run.about for place, run in found.items()}
    if measured and (folder / SETTINGS).is_file():
        about["benchmark"] = _json(folder / SETTINGS)
    body += _made(about)
    title = next((str(run.about["task"]) for run in found.values()), "Benchmark of circuit methods")
    write_text(target, _page(title, body))
    return target


def _runs(folder: Path) -> list[Path]:
    """The folders of runs: the folder itself where it has files of one, else those in it that hold a complete one."""
    if len(missing(folder)) < len(RUN_FILES):
        return [folder]
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [place for place in inside if (place / RUN_FILES[0]).is_file()]


def _of_run(run: RunResults, folder: Path) -> list[str]:
    """Everything about one run."""
    reduction, units = run.reduction, run.reduction.units
    scores = _scores(run)
    kinds = {site.kind for site in units.sites}
    layers = sentences.by_layer(run)
    body = [
        f"<h1>{escape(str(run.about['task']))}</h1>",
        f'<p class="soft">{escape(str(run.about["description"]))}</p>',
        f'<p class="lead">{escape(sentences.headline(run))}</p>',
        _facts(run),
        _heading("What was found"),
        _sentences([*sentences.discovered(run), *(layers if len(layers) <= _FEW else ())]),
        _figure(
            plot.circuit(reduction),
            "The circuit. Units read the residual stream and write to it; what replaces removed ones is marked.",
        ),
        _figure(
            plot.unit_map(reduction, scores),
            "Every unit: kept ones in the strongest colour, removed ones shaded by rank of score; of wide layers the "
            "share of each part that is kept.",
        ),
    ]
    if len(layers) > _FEW:
        body.append(_details("What each layer keeps", _sentences(layers)))
    if "neuron" in kinds:
        body.append(_figure(plot.neuron_density(reduction), "Where in the layers the kept neurons are."))
    body += [
        *([] if run.fold is None else [_table(_before_and_after(run.fold))]),
        _heading("How good it is"),
        _sentences(sentences.quality(run)),
        _picture(
            (folder / "risk.png").read_bytes(),
            "Risk along the path of circuits, on validation examples: as predicted before each round's removals and as "
            "measured after them.",
        ),
    ]
    if run.baselines is not None:
        body += [
            _heading("Beside other circuits of the same size"),
            _sentences(sentences.compared(run)),
            _table(run.baselines),
        ]
    body += [
        _heading("Is it the algorithm?"),
        _picture((folder / "causal.png").read_bytes(), "The causal model that the network is held against."),
        _sentences(sentences.algorithm(run)),
    ]
    if run.evidence is not None:
        body += [
            _table(_verdicts(run.evidence)),
            _figure(
                plot.evidence(run.evidence),
                "Interchange accuracy of the aligned units, beside controls. The whole residual stream takes "
                "all that is at the aligned positions along: no control that should fail, and no ceiling for one "
                "variable of several.",
            ),
        ]
    body += [
        _heading("Limits"),
        _sentences(sentences.limits(run)),
        _heading("Scores of single units"),
    ]
    if "head" in kinds:
        body.append(_figure(plot.head_map(scores), "What removing each head alone is predicted to cost."))
    best = run.scores.nlargest(12, "score")
    return [*body, _details("The twelve highest scores", _table(best)), _details("The path", _table(run.path))]


def _of_benchmark(table: Frame) -> list[str]:
    """Everything about a benchmark."""
    body = [_heading("Benchmark"), _sentences(sentences.summary(table))]
    for ablation in dict.fromkeys(table.ablation):
        part, kind = table[table.ablation == ablation], sentences.kind(ablation)
        body.append(f"<h3>{escape(kind.capitalize())}</h3>")
        for measure in ("risk", "accuracy", "faithfulness"):
            if part[measure].notna().any():
                words = f"{measure.capitalize()} against units kept, with {kind}."
                body.append(_figure(plot.frontier(part, measure), words))
        for task, rows in part.groupby("task", sort=False):
            body.append(_details(f"{task}, {kind}: risk (accuracy) by size", _table(sentences.methods(rows))))
    return [*body, _details("The lowest risks", _table(sentences.leading(table)))]


def _facts(run: RunResults) -> str:
    facts = {"units kept": f"{len(run.reduction.circuit):,} of {len(run.reduction.units):,}"}
    if run.fold is not None:
        whole = run.fold[run.fold.part == "whole model"].iloc[0]
        facts |= {"parameters": sentences.share(whole.parameters_kept / whole.parameters)}
    facts |= {
        "risk": sentences.nats(run.evaluation["risk"]),
        "accuracy": sentences.share(run.evaluation["accuracy"]),
        "agreement with the whole model": sentences.share(run.evaluation["agreement"]),
    }
    if run.evidence is not None:
        aligned = verdicts(run.evidence)
        original = aligned[aligned.model == "original"]
        facts |= {"variables accepted": f"{original.accepted.sum()} of {len(original)}"}
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def _before_and_after(fold: Frame) -> pd.DataFrame:
    names = [name for name in fold if f"{name}_kept" in fold]
    columns = {name: zip(fold[name], fold[f"{name}_kept"], strict=True) for name in names}
    return pd.DataFrame({"part": fold.part} | {name: [f"{a:,} → {b:,}" for a, b in c] for name, c in columns.items()})


def _verdicts(evidence: Frame) -> pd.DataFrame:
    table = verdicts(evidence)
    return pd.DataFrame(
        {
            "variable": table.variable,
            "model": table.model,
            "accuracy": _decimals(table.accuracy),
            "where it should change": _decimals(table.changed),
            "lower bound": _decimals(table.lower),
            "pairs that tell it from the answer": [
                sentences.told_apart(*cells) for cells in zip(table.tells_apart, table.is_answer, strict=True)
            ],
            "best control": [
                f"{row.control_accuracy:.3f} ({row.control}{_number(row)})" if row.control else ""
                for row in table.itertuples()
            ],
            "verdict": table.verdict,
        }
    )


def _number(row: Any) -> str:
    return f": {row.control_units:g}" if row.control == RANDOM_UNITS else ""


def _decimals(column: Frame) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.3f}" for value in column]


def _scores(run: RunResults) -> Scores:
    """The scores of ``scores.csv``, in the order of the circuit's units."""
    frame = run.scores.set_index("unit")
    units = run.reduction.units
    if set(frame.index) != set(units.names):
        raise ValueError("scores.csv and circuit.reduction are of different units: run the task again")
    values, errors = (torch.tensor(frame.loc[list(units.names), name].to_numpy()) for name in ("score", "stderr"))
    return Scores(units, values, errors, str(run.about["score"]["name"]), str(run.about["score"]["measured_in"]), 0, 0)


def _benchmark_table(path: Path) -> Frame:
    table = read_table(path)
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}: is it the table of `tl-sparsify bench`?")
    for name in ("size", "kept", "risk", "accuracy", "faithfulness"):
        if table[name].dtype.kind not in "iuf":
            raise ValueError(f"{path} has something else than numbers in column {name}: make it again")
    return table


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run the benchmark again") from error


def _made(about: Mapping[str, Any]) -> list[str]:
    """Settings and versions, from whatever was written of them."""
    body = [_heading("How it was made")] if about else []
    for name, settings in about.items():
        rows = pd.DataFrame(list(_flat(settings)), columns=["setting", "value"])
        body.append(_details(f"Settings and versions of the {name}", _table(rows)))
    return body


def _flat(settings: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{prefix}, {name}" if prefix else str(name))
    elif isinstance(settings, list):
        yield prefix, ", ".join(map(str, settings))
    else:
        yield prefix, str(settings)


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _sentences(said: Sequence[str]) -> str:
    """A list of sentences; what stands between backticks is code."""
    items: list[str] = []
    for sentence in said:
        parts = escape(sentence).split("`")
        items.append("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _table(frame: Frame) -> str:
    """A table; numbers to the right, NaN as nothing."""
    numeric = [frame[name].dtype.kind in "iuf" for name in frame.columns]
    kinds = [' class="number"' if number else "" for number in numeric]
    heads = [f"<th{kind}>{escape(str(name).replace('_', ' '))}</th>" for name, kind in zip(frame, kinds, strict=True)]
    lines: list[str] = []
    for row in frame.itertuples(index=False):
        cells = [f"<td{kind}>{escape(_text(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{"".join(heads)}</tr>{"".join(lines)}</table></div>'


def _text(cell: Any) -> str:
    if isinstance(cell, float | np.floating):
        return "" if np.isnan(cell) else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int | np.integer) else str(cell)


def _figure(figure: Figure, words: str) -> str:
    return _picture(plot.png(figure, _DPI), words)


def _picture(content: bytes, words: str) -> str:
    """A PNG file in the page, at its size in print."""
    width, height = (round(int.from_bytes(content[at : at + 4], "big") * 96 / _DPI) for at in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{escape(words)}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def _page(title: str, body: Sequence[str]) -> str:
    heading = [] if any(part.startswith("<h1>") for part in body) else [f"<h1>{escape(title)}</h1>"]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}: tl_sparsify report</title>",
            f"<style>{_STYLE}</style>\n</head>\n<body>",
            *heading,
            *body,
            "</body>\n</html>\n",
        ]
    )
