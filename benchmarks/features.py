"""Features of a dictionary as units: a circuit beside other units, and taking out what is spurious by name.

The dictionary is the one of the shipped small language model (``tasks/language_model/train_dictionary.py``).

*Circuits.* On ``subject_verb_agreement`` ``sparsify`` keeps so many features of the stream after layer 2, and as many
of the other units that hold the same stream (its axes, its principal directions), or of all neurons of the model with
every head kept. Removed units are at their means over the training examples; everything outside the units stays. For
features the error of the dictionary is kept, or at its mean too. Risk is on test examples.

*Removal* (after SHIFT: Marks et al., arXiv 2403.19647). A linear probe on the mean of the stream over positions learns
whether a sentence is about women or men from sentences in which women are always in the past tense. It is judged, with
names it has not seen, on sentences in which tense says nothing. Features are ranked on other sentences whose tense is
known (and whose names' gender is not used) by how much the tense moves the probe through them; the first so many are
removed. Beside it: as many random features that fire, as many axes of the stream by the same ranking.

Writes ``benchmarks/results/features.csv``, ``features_removal.csv`` and, of ``features_page.md``, the page
``docs/features.md``.

    python benchmarks/features.py [--seeds 3] [--page]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from shared import RESULTS, ROOT, nats, parser
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import tl_sparsify as tls
from tasks.gendered_pronoun.task import TEMPLATES, WORDS
from tasks.language_model.train_dictionary import DICTIONARY
from tl_sparsify._internal.files import write_text
from tl_sparsify.core.forward import valid_positions

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
EXAMPLES = 256
KEPT, GONE = "features, error kept", "features, error removed"
GOAL = 0.05  # nats
DROPS = (2, 5, 10, 20, 40, 80)
SENTENCES, DRAWS, KNOWN = 512, 5, 35  # names of each gender that the probe learns with; the other 15 judge it
PAGE = ROOT / "docs" / "features.md"


# Circuits


@dataclass(frozen=True)
class FeatureCircuit:
    """A circuit of so many units of one kind."""

    units: str
    seed: int
    of: int
    kept: int
    risk: float
    stderr: float
    accuracy: float


def families(model: Any, dictionary: tls.Dictionary, train: tls.Examples) -> dict[str, tls.Units]:
    """The units that are compared."""
    hook = str(dictionary.hook)
    width = dictionary.W_dec.shape[1]
    return {
        KEPT: tls.features(model, dictionary, examples=train),
        "axes of the stream": tls.directions(model, hook, torch.eye(width)),
        "principal directions of the stream": tls.directions(model, hook, tls.basis.pca(model, train, hook, width)),
        "neurons, heads kept": tls.neurons(model),
    }


def with_error(model: Any, dictionary: tls.Dictionary, train: tls.Examples, reduction: tls.Reduction) -> tls.Reduction:
    """The same circuit of features with the error at its mean."""
    units = tls.features(model, dictionary, examples=train, error=True)
    mask = torch.cat([reduction.circuit.mask, torch.tensor([False])])
    return tls.constants.reduced(model, tls.Circuit(units, mask), tls.constants.mean(model, train, units))


def circuits(model: Any, dictionary: tls.Dictionary, seed: int) -> Iterator[FeatureCircuit]:
    """Every family at every size, for one seed."""
    train, _, test = (split[:EXAMPLES] for split in tls.load_task("subject_verb_agreement").examples(seed))
    for name, units in families(model, dictionary, train).items():
        n = len(units)
        sizes = sorted({*(c / n for c in COUNTS if c < n), *(s for s in (0.75, 0.5, 0.35, 0.25) if s * n > 128)})[::-1]
        path = tls.sparsify(model, train, units, sizes=sizes, seed=seed, progress=False)
        none = tls.constants.reduced(model, tls.Circuit.empty(units), path.at(1 / n).values)
        whole = tls.constants.reduced(model, tls.Circuit.full(units), path.at(1 / n).values)
        found = [none, *(path.at(c / n) for c in COUNTS if c < n), whole]
        kinds = {name: found}
        if name == KEPT:
            kinds[GONE] = [with_error(model, dictionary, train, part) for part in found]
        for kind, reductions in kinds.items():
            for reduction in reductions:
                judged = tls.evaluate(model, reduction, test)
                kept = len(reduction.circuit)
                yield FeatureCircuit(kind, seed, n, kept, judged.risk.mean, judged.risk.stderr, judged.accuracy)
        print(f"seed {seed}: {name}", flush=True)


# Removal


@dataclass(frozen=True)
class Removal:
    """What a probe says with some units removed; ``refitted``: learnt again without them, on the same sentences."""

    what: str
    seed: int
    removed: int
    refitted: bool
    accuracy: float
    says_tense: float


@dataclass(frozen=True)
class Sentences:
    """Sentences with what they are about; women are 1, the past is 1."""

    examples: tls.Examples
    women: np.ndarray
    past: np.ndarray


def sentences(model: Any, rng: np.random.Generator, known: bool, together: bool) -> Sentences:
    """About two people of one gender, of known names or of new ones; ``together``: women are always in the past."""
    women = rng.integers(2, size=SENTENCES)
    past = women if together else rng.integers(2, size=SENTENCES)
    names = {part: WORDS[part][:KNOWN] if known else WORDS[part][KNOWN:] for part in ("men", "women")}
    texts: list[str] = []
    for woman, gone in zip(women, past, strict=True):
        one, other = rng.choice(names["women" if woman else "men"], 2, replace=False)
        template = TEMPLATES[rng.integers(2) + 2 * gone]  # the last two are in the past
        texts.append(template.format(name=one, other=other, adjective=rng.choice(WORDS["adjectives"])))
    return Sentences(tls.Examples.from_prompts(model, texts, [" he"] * len(texts)), women, past)


def means(model: Any, units: tls.Units, examples: tls.Examples, *interventions: tls.Intervention) -> Tensor:
    """Every unit's mean over the positions of each sentence, ``[n, units * width]``."""
    mask = examples.attention_mask
    with torch.no_grad(), tls.intervened(model, *interventions), tls.recorded(model, units) as recording:
        model(examples.tokens, attention_mask=None if mask is None else mask.long())
    [values] = recording.read()
    where = valid_positions(model, examples)[..., None]
    return (values.flatten(2) * where).sum(1) / where.sum(1)


def removals(model: Any, dictionary: tls.Dictionary, seed: int) -> Iterator[Removal]:
    """The probe as learnt, and with units removed, for one seed."""
    rng = np.random.default_rng([seed, 17])
    hook = str(dictionary.hook)
    stream = tls.Units((tls.Site(kind="residual", layer=0, hook=hook, size=1),))
    learnt, told = sentences(model, rng, True, True), sentences(model, rng, True, False)
    judging = sentences(model, rng, False, False)
    x = means(model, stream, learnt.examples)
    middle, scale = x.mean(0), x.std(0) + 1e-6

    def probe(x: Tensor, y: np.ndarray) -> LogisticRegression:
        return LogisticRegression(max_iter=2000).fit(((x - middle) / scale).numpy(), y)

    def row(what: str, removed: int, refitted: bool, fitted: LogisticRegression, x: Tensor) -> Removal:
        said = fitted.predict(((x - middle) / scale).numpy())
        right, tense = (float(np.mean(said == about)) for about in (judging.women, judging.past))
        return Removal(what, seed, removed, refitted, right, tense)

    first = probe(x, learnt.women)
    plain = means(model, stream, judging.examples)
    yield row("nothing", 0, False, first, plain)
    fair = probe(means(model, stream, told.examples), told.women)
    yield row("nothing, probe learnt where tense says nothing", 0, False, fair, plain)
    weight = torch.tensor(first.coef_[0]).float() / scale
    firing = tls.dictionaries.firing(model, dictionary, learnt.examples)
    features = tls.features(model, dictionary, which=firing)
    axes = tls.directions(model, hook, torch.eye(len(weight)))
    zeros = tls.constants.mean(model, learnt.examples, axes)  # an axis has no natural zero: its mean
    for what, units, values in (("features", features, None), ("axes of the stream", axes, zeros)):
        found = means(model, units, told.examples)
        gap = found[told.past == 1].mean(0) - found[told.past == 0].mean(0)
        basis = units.sites[0].basis
        if basis is None:
            raise ValueError(f"{units!r} have no directions")
        order = (gap * (weight @ basis)).abs().argsort(descending=True).tolist()
        for drop in DROPS:
            drawn = [rng.choice(len(units), drop, replace=False).tolist() for _ in range(DRAWS)]
            chosen = [(what, order[:drop]), *((f"random {what}", some) for some in drawn if what == "features")]
            for name, some in chosen:
                gone = [units.names[i] for i in some]
                removal = tls.ablate(tls.dictionaries.remove(model, units, gone, values=values))
                changed = means(model, stream, judging.examples, removal)
                yield row(name, drop, False, first, changed)
                again = probe(means(model, stream, learnt.examples, removal), learnt.women)
                yield row(name, drop, True, again, changed)
        print(f"seed {seed}: removal of {what}, first {', '.join(units.names[i] for i in order[:5])}", flush=True)


# The page


def _kept_table(frame: pd.DataFrame) -> str:
    """Mean risk over seeds by units and number kept."""
    order = list(dict.fromkeys(frame.units))
    lines = ["| kept | " + " | ".join(f"{name} (of {_range(frame, name)})" for name in order) + " |"]
    lines.append("|---|" + "---|" * len(order))
    for kept in (0, *COUNTS):
        at = frame[frame.kept == kept].groupby("units").risk.mean()
        lines.append(f"| {kept} | " + " | ".join(nats(at[name]) if name in at else "-" for name in order) + " |")
    every = frame[frame.kept == frame.of].groupby("units").risk.mean()
    lines.append(
        "| all | " + " | ".join("0" if abs(every[name]) < 1e-9 else nats(every[name]) for name in order) + " |"
    )
    return "\n".join(lines)


def _range(frame: pd.DataFrame, name: str) -> str:
    low, high = frame[frame.units == name].of.agg(["min", "max"])
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _removal_table(frame: pd.DataFrame) -> str:
    """Mean accuracy over seeds (and draws)."""
    means = frame.groupby(["what", "removed", "refitted"]).accuracy.mean()
    kinds = ("features", "random features", "axes of the stream")
    heads = [f"{kind}, {probe}" for probe in ("same probe", "learnt again") for kind in kinds]
    lines = ["| removed | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for drop in DROPS:
        cells = [means[kind, drop, refitted] for refitted in (False, True) for kind in kinds]
        lines.append(f"| {drop} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _fewest(frame: pd.DataFrame, name: str) -> str:
    """The smallest number kept whose mean risk is below the goal."""
    at = frame[frame.units == name].groupby("kept").risk.mean()
    return str(next((kept for kept in COUNTS if at.get(kept, GOAL) < GOAL), f"more than {COUNTS[-1]}"))


def page(circuit: pd.DataFrame, removal: pd.DataFrame) -> str:
    """The page of both tables."""
    plain = removal[removal.what == "nothing"]
    fair = removal[removal.what.str.startswith("nothing,")]
    fewest = {name: _fewest(circuit, name) for name in circuit.units.unique()}
    whole = circuit[(circuit.units == GONE) & (circuit.kept == circuit.of)].risk.mean()
    gone = removal.groupby(["what", "removed", "refitted"]).accuracy.mean()
    metrics = json.loads((DICTIONARY / "metrics.json").read_text())
    few, best, most = DROPS[0], 40, DROPS[-1]
    return (
        (Path(__file__).parent / "features_page.md")
        .read_text()
        .format(
            **{name: metrics[name] for name in ("unexplained", "firing", "seconds")},
            goal=GOAL,
            need_features=fewest[KEPT],
            need_axes=fewest["axes of the stream"],
            need_directions=fewest["principal directions of the stream"],
            need_neurons=fewest["neurons, heads kept"],
            whole=nats(whole),
            few=few,
            best=best,
            most=most,
            few_same=f"{gone['features', few, False]:.3f}",
            few_axes=f"{gone['axes of the stream', few, False]:.3f}",
            best_again=f"{gone['features', best, True]:.3f}",
            best_random=f"{gone['random features', best, True]:.3f}",
            best_axes=f"{gone['axes of the stream', best, True]:.3f}",
            most_axes=f"{gone['axes of the stream', most, True]:.3f}",
            most_again=f"{gone['features', most, True]:.3f}",
            connections=(RESULTS / "feature_connections.md").read_text(),
            kept=_kept_table(circuit),
            removed=_removal_table(removal),
            seeds=circuit.seed.nunique(),
            examples=EXAMPLES,
            sentences=SENTENCES,
            draws=DRAWS,
            before=f"{plain.accuracy.mean():.3f}",
            tense=f"{plain.says_tense.mean():.3f}",
            fair=f"{fair.accuracy.mean():.3f}",
        )
    )


def main() -> None:
    made = parser(__doc__, seeds=3)
    made.add_argument("--page", action="store_true", help="only write the page of the stored tables again")
    options = made.parse_args()
    if not options.page:
        model = tls.text.load_language_model(tls.task.own_language_model())
        dictionary = tls.dictionaries.load(DICTIONARY)
        for stem, measured in (("features_removal", removals), ("features", circuits)):
            frame = pd.DataFrame([row for seed in range(options.seeds) for row in measured(model, dictionary, seed)])
            write_text(RESULTS / f"{stem}.csv", frame.to_csv(index=False))
    write_text(PAGE, page(*(pd.read_csv(RESULTS / f"{stem}.csv") for stem in ("features", "features_removal"))))


if __name__ == "__main__":
    main()
