"""Sentences: what the files of a run and a benchmark's table say, as plain sentences made from their numbers.

Nothing is escaped here, and nothing is drawn: :mod:`tl_sparsify.presentation.report` does both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tl_sparsify.abstraction.verdicts import GOAL, GOAL_CHANGED, TOLD_APART, Role, verdicts
from tl_sparsify.core.reduction import Reduction
from tl_sparsify.presentation.results import Frame, RunResults

_LEAST = 1e-6  # nats; lower risks are told apart by rounding only
_FITTED = {"refitted": "refitted constants", "maps": "affine maps", "as found": "the search's own replacements"}
_COSTS = ("cmd", "cpr", "auroc", "average_precision", "all_forward", "all_backward", "seconds", "peak_mb")


def share(value: float) -> str:
    """``99.7%``."""
    return f"{100 * value:.1f}%"


def nats(value: float) -> str:
    """``0.0158 nats``, without digits that say nothing."""
    return f"less than {_LEAST:g} nats" if 0 < value < _LEAST else f"{value:.3g} nats"


def rounded(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def counted(number: int, name: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def told_apart(part: float, is_answer: bool) -> str:
    """Which share of pairs tells a variable from the answer: ``50.0%``, or that the variable is the answer."""
    return "is the answer" if is_answer else "" if np.isnan(part) else share(part)


def listed(names: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


def headline(run: RunResults) -> str:
    """The whole run in a sentence or two."""
    found, kept = run.evaluation, len(run.reduction.circuit)
    if run.evidence is None:
        verdict = "not been put to the test"
    else:
        verdict = _together(set(verdicts(run.evidence).verdict))
    return (
        f"{kept:,} of {len(run.reduction.units):,} units ({share(kept / len(run.reduction.units))}) answer "
        f"{share(found['accuracy'])} of the test examples right, where the whole model answers "
        f"{share(found['original_accuracy'])}. The hypothesised algorithm "
        + (f"has {verdict}." if run.evidence is None else f"is {verdict} on this evidence.")
    )


def _together(found: set[str]) -> str:
    """The verdict on all variables at once: the worst of them."""
    if "rejected" in found:
        return "not accepted"
    return "neither accepted nor rejected" if "cannot tell" in found else "accepted"


def discovered(run: RunResults) -> list[str]:
    """What was found: the circuit's size and the folded model's."""
    circuit, units = run.reduction.circuit, run.reduction.units
    removed = len(units) - len(circuit)
    said = [
        f"The model has {units.describe()}. The search kept {units.describe(circuit.mask)}"
        + (f"; the other {removed:,} are replaced by {_replacement(run.reduction)}." if removed else ": all of them.")
    ]
    if run.fold is None:
        return [*said, "Circuits of these units of this model are no smaller models: the circuit does not fold."]
    whole = run.fold[run.fold.part == "whole model"].iloc[0]
    before, after = int(whole.parameters), int(whole.parameters_kept)
    text = f"Folded, it is a model of {after:,} parameters instead of {before:,} ({share(after / before)})"
    if "folded_difference" in run.evaluation:
        text += f", whose logits differ from the ablated model's by at most {run.evaluation['folded_difference']:.1e}"
    return [*said, f"{text}."]


def by_layer(run: RunResults) -> list[str]:
    """What each layer keeps, a sentence each."""
    circuit, units = run.reduction.circuit, run.reduction.units
    said: list[str] = []
    for layer in sorted({site.layer for site in units.sites}):
        parts: list[str] = []
        for site, part in zip(units.sites, units.slices, strict=True):
            if site.layer != layer:
                continue
            kept = circuit.mask[part].nonzero().flatten().tolist()
            few = f" ({listed([str(i) for i in kept])})" if site.kind == "head" and 0 < len(kept) < site.size else ""
            parts.append(f"{len(kept):,} of {site.size:,} {site.kind}{'s' if site.size != 1 else ''}{few}")
        said.append(f"Layer {layer} keeps {listed(parts)}.")
    return said


def quality(run: RunResults) -> list[str]:
    """How good the circuit is on the test examples."""
    found, about = run.evaluation, run.about
    risk = _interval(found, "risk")
    swapped = _interval(found, "interchange_risk")
    return [
        f"On {about['examples']['test']:,} test examples, which neither the search nor the refit saw, the circuit "
        f"answers {share(found['accuracy'])} right (the whole model {share(found['original_accuracy'])}, a constant "
        f"answer {share(about['chance'])}), and {share(found['agreement'])} of its answers are the whole model's.",
        f"Its risk, the mean KL divergence of its answers from the whole model's, is {risk}.",
        f"Faithfulness is {rounded(found['faithfulness'])} (1: the metric is the whole model's; 0: that of no units) "
        f"and completeness {rounded(found['completeness'])} (the same for the removed units alone; near 0 nothing of "
        "the behaviour is left in them).",
        f"When each kept unit takes its value on another input with probability {found['probability']:g}, in both "
        f"models alike, {share(found['interchange_agreement'])} of the answers agree and the risk is {swapped}.",
    ]


def compared(run: RunResults) -> list[str]:
    """The found circuit compared with circuits of the same size in other orders."""
    said: list[str] = []
    for kind, part in run.baselines.groupby("replacements", sort=False):
        ours, others = part[part.found & ~part.as_saved], part[~part.found]
        if ours.empty or others.empty:
            continue
        mine, best = ours.iloc[0], others.loc[others.risk.idxmin()]
        how = "With the same refit for all" if mine.refitted else f"With {kind} constants for all"
        text = (
            f"{how}, the found circuit's risk is {nats(mine.risk)} (accuracy {share(mine.accuracy)}); the best of the "
            f"other orders, {best.method}, has {nats(best.risk)} (accuracy {share(best.accuracy)})"
        )
        if max(mine.risk, best.risk) < _LEAST:
            text += ": the same, up to rounding."
        elif mine.risk < best.risk:
            text += f", {best.risk / mine.risk:.3g} times as much." if mine.risk > _LEAST else "."
        else:
            text += ": the search is not ahead of it here." if mine.risk > best.risk else ": the same."
        said.append(text)
    return said


def algorithm(run: RunResults) -> list[str]:
    """The verdict on the causal model, for each network."""
    if run.evidence is None:
        return ["Nobody looked for the units that carry its variables (`--no-align`), so nothing is said of it."]
    said = [
        f"A variable counts as accepted when at least {share(GOAL)} of the interchanged runs answer what the causal "
        f"model answers, and at least {share(GOAL_CHANGED)} of those whose answer should change; where fewer than "
        f"{share(TOLD_APART)} of the pairs tell the variable from the answer, this is no evidence for it: cannot tell."
    ]
    for model, part in verdicts(run.evidence).groupby("model", sort=False):
        sides = ("accepted", "rejected", "cannot tell")
        fine, wrong, unclear = (", ".join(part.variable[part.verdict == side]) for side in sides)
        text = f"On the {model} model, accepted: {fine or 'none'}. Rejected: {wrong or 'none'}."
        text += f" Cannot tell: {unclear}." if unclear else ""
        beside = part.dropna(subset="control_accuracy")
        if len(beside):
            worst, best = beside.accuracy.min(), beside.loc[beside.control_accuracy.idxmax()]
            text += (
                f" The lowest accuracy of aligned units is {worst:.3f}, the highest of a control beside them "
                f"{best.control_accuracy:.3f} ({best.control}, for {best.variable})."
            )
        said.append(text)
    return said


def limits(run: RunResults) -> list[str]:
    """What these numbers do not show."""
    found, about = run.evaluation, run.about
    said = [
        f"The kind of replacement is part of every number: here {_replacement(run.reduction)}, chosen among "
        f"{about['ablation']}-ablated circuits. Numbers under another kind are not comparable.",
        "Risk, accuracy and faithfulness are taken on the task's own inputs without interventions: a circuit that is "
        "right there can be wrong under interventions, which the interchange figures measure.",
        f"All of it is one seed ({about['seed']}) of the data's split, the probes and the random orders.",
    ]
    if run.baselines is not None:
        refit = about["baseline_refit"]
        how = {True: "in every round of its search and once more", False: "once, after its search"}
        searched = how.get(about.get("refitted_in_rounds", "unknown"), "otherwise")
        said.append(
            f"In the comparison every circuit is refitted from {about['ablation']} constants until "
            f"{refit['patience']:,} steps have not lowered the validation risk by two percent (for at most "
            f"{refit['most']:,} steps). The saved circuit was refitted {searched}: "
            "what it has beyond that is its constants and not the choice of units. `tl-sparsify bench` compares "
            "methods alike, over seeds."
        )
    if run.evidence is not None:
        said.append(
            "An accepted causal model is not proven: another that agrees on these interchanges is accepted as well, "
            "and nothing is said about inputs outside the task."
        )
    if found["completeness"] > 0.2:
        said.append(
            f"Completeness is {found['completeness']:.3f}: what was removed carries part of the behaviour on its own."
        )
    return said + ([] if run.evidence is None else _evidence_limits(run.evidence))


def _evidence_limits(evidence: Frame) -> list[str]:
    table = verdicts(evidence)
    said: list[str] = [text[0].upper() + text[1:] for text in dict.fromkeys(table.reservation) if text]
    for row in table[table.passing.map(bool)].itertuples():
        said.append(
            f"For {row.variable} ({row.model}) {listed(row.passing)} would be accepted too: its accuracy shows nothing."
        )
    for row in table[table.removed > 0].drop_duplicates(["model", "variable"]).itertuples():
        said.append(
            f"Of the units aligned with {row.variable}, the {row.model} model lacks {row.removed:.0f} of "
            f"{row.units + row.removed:.0f}; they are not interchanged."
        )
    for model, retained in table.groupby("model", sort=False).retained.min().items():
        if retained < 1:
            said.append(
                f"On the {model} model {share(1 - retained)} of the pairs do not count, because it is wrong on one of "
                "their inputs."
            )
    outside = evidence[evidence.role == Role.UNALIGNED]
    for row in outside[outside.accuracy < GOAL].itertuples():
        said.append(
            f"Interchanging every unit that no variable is aligned with changes {share(1 - float(row.accuracy))} of "
            f"the {row.model} model's answers: the alignment does not name all that the answer depends on."
        )
    return said


def sizes(table: Frame) -> list[float]:
    """The sizes that a benchmark is judged at, falling: those with refitted constants, else all below the whole model
    (its areas are over further ones)."""
    refitted = table[table.ablation == "refitted"]
    given = refitted["size"] if len(refitted) else table["size"][table["size"] < 1]
    return sorted(given.unique(), reverse=True)


def leading(table: Frame) -> Frame:
    """For each task, kind of ablation and size the lowest mean risk of this package's methods and of the others."""
    some = table[table["size"].isin(sizes(table))]
    keys = ["task", "ablation", "size", "method", "ours"]
    means = some.groupby(keys, sort=False)[["risk", "accuracy"]].mean().reset_index()
    rows: list[dict[str, Any]] = []
    for (task, ablation, size), part in means.dropna(subset="risk").groupby(["task", "ablation", "size"], sort=False):
        mine = part[part.ours]
        row: dict[str, Any] = {"task": task, "ablation": ablation, "size": size}
        for side, methods in (("ours", mine), ("other", part.drop(mine.index))):
            best = methods.loc[methods.risk.idxmin()] if len(methods) else None
            row |= {side: "" if best is None else best.method}
            row |= {f"{side}_{name}": float("nan") if best is None else best[name] for name in ("risk", "accuracy")}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(table: Frame) -> list[str]:
    """Who is ahead in a benchmark, by kind of ablation and size; risks below a millionth of a nat count as equal."""
    best = leading(table)
    ours = list(dict.fromkeys(table.method[table.ours]))
    said = [
        f"{counted(table.method.nunique(), 'method')} on {counted(table.task.nunique(), 'task')}, "
        f"{counted(table.seed.nunique(), 'seed')}; risks are means over seeds. This package's "
        f"methods: {'; '.join(ours) or 'none'}."
    ]
    both = best.dropna(subset=["ours_risk", "other_risk"])
    for ablation, part in both.groupby("ablation", sort=False):
        behind = part[part.ours_risk.clip(lower=_LEAST) > part.other_risk.clip(lower=_LEAST)]
        counts = [
            f"{len(some) - len(some.index.intersection(behind.index))} of {len(some)} at {100 * size:g}%"
            for size, some in sorted(part.groupby("size"), reverse=True)
        ]
        said.append(f"Tasks on which no other method has a lower risk, with {kind(ablation)}: {listed(counts)} kept.")
        where = [f"{row.task} at {100 * row.size:g}% ({row.other})" for row in behind.itertuples()]
        if where:
            said.append(f"With {kind(ablation)} another method is ahead on {listed(where)}.")
    return said


def kind(ablation: str) -> str:
    """``mean ablation``, or ``refitted constants``."""
    return _FITTED.get(ablation, f"{ablation} ablation")


def methods(table: Frame) -> Frame:
    """One row a method: mean risk and accuracy over seeds at each size, then what its curve and its run cost, and the
    setting that was chosen most often."""
    order = list(dict.fromkeys(table.method))
    found: Frame = pd.DataFrame(index=pd.Index(order, name="method"))
    for size in sizes(table):
        part = table[table["size"] == size].groupby("method")[["risk", "accuracy"]].mean().reindex(order)
        cells = zip(part.risk, part.accuracy, strict=True)
        found[f"{100 * size:g}% kept"] = ["" if np.isnan(r) else f"{r:.3g} ({a:.3f})" for r, a in cells]
    extra = [name for name in _COSTS if name in table]
    costs = table[["method", *extra]].groupby("method").mean().reindex(order)
    found = found.join(costs.dropna(axis=1, how="all"))
    if "setting" in table:
        chosen = zip(table.method, table.setting, strict=True)
        often = Counter((method, setting) for method, setting in chosen if isinstance(setting, str))
        first = {method: setting for (method, setting), _ in reversed(often.most_common())}
        found["setting"] = [first.get(method, "") for method in order]
    return found.reset_index()


def _replacement(reduction: Reduction) -> str:
    kinds = {"mean": "their means", "zero": "zero", "refit": "refitted constants"}
    if reduction.mixing is not None:
        return "affine maps of kept units" + (", refitted" if reduction.refitted else "")
    return kinds.get(reduction.kind, f"constants ({reduction.kind})")


def _interval(found: Mapping[str, Any], name: str) -> str:
    """An estimate with its interval: the one of resampled examples where there is one, else by its standard error."""
    mean, error = found[name], 1.96 * found[f"{name}_stderr"]
    low, high = found.get(f"{name}_low", max(0.0, mean - error)), found.get(f"{name}_high", mean + error)
    return nats(mean) if high < _LEAST else f"{nats(mean)} (95% interval {low:.3g} to {high:.3g})"
