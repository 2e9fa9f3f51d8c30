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

Writes ``benchmarks/results/features.csv``, ``features_removal.csv`` and the page ``docs/features.md``.

    python benchmarks/features.py [--seeds 3] [--page]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
        right, tense = float((said == judging.women).mean()), float((said == judging.past).mean())
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


def page(circuit: pd.DataFrame, removal: pd.DataFrame) -> str:
    """The page of both tables."""
    plain = removal[removal.what == "nothing"]
    fair = removal[removal.what.str.startswith("nothing,")]
    at = circuit.groupby(["units", "kept"]).risk.mean()
    needed = {name: _needed(at[name]) for name in circuit.units.unique()}
    gone = removal.groupby(["what", "removed", "refitted"]).accuracy.mean()
    metrics = json.loads((DICTIONARY / "metrics.json").read_text())
    return TEXT.format(
        **{name: metrics[name] for name in ("unexplained", "firing", "seconds")},
        needed=needed,
        goal=GOAL,
        features=KEPT,
        whole=nats(at[GONE][circuit[circuit.units == GONE].of.max()]),
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


TEXT = """# Features of dictionaries

A sparse autoencoder writes an activation as a sum of few features out of many and an error. `tls.features` makes the features
units, so that whatever takes heads and neurons takes them: scores, searches, `risk`, `evaluate`, ablation, interchange, files.

```python
import tl_sparsify as tls

model = tls.text.load_language_model(tls.task.own_language_model())
dictionary = tls.dictionaries.load(tls.task.own_language_model().parent / "dictionary")  # or any folder of SAELens's
train, _, test = (split[:32] for split in tls.load_task("subject_verb_agreement").examples(0))

units = tls.features(model, dictionary, examples=train)  # those that fire there
scores = tls.score.risk(model, train, units)
reduction = tls.constants.reduced(model, scores.top(0.1), tls.constants.mean(model, train, units))
print(tls.risk(model, reduction, test), reduction.circuit.names[:3])  # L2F362, ...
assert units.names[0].startswith("L2F") and tls.risk(model, reduction, test).mean < 0.5

without = tls.dictionaries.remove(model, units, reduction.circuit.names[:3])  # by name, set to 0
with tls.intervened(model, tls.ablate(without)):
    logits = model(test.tokens)
```

With `a = encode(x)` an intervention adds `sum_f (1 - keep_f) (c_f - a_f) W_dec[f]` to the activation `x`. The error
`x - decode(a)` stays what it was, so that keeping every feature changes nothing, bit for bit. With `error=True` it is one unit
more, `L2ERR`, which can be removed too. Features are encoded in the activation as it arrives, before any of them is changed.

`tls.dictionaries.load` reads SAELens's layout (`sae_weights.safetensors` and `cfg.json`) without that package: ReLU, JumpReLU
and top-k autoencoders, and transcoders, which encode at one hook point and decode at another. Gated ones, skip connections and
activations that are normalised at run time are refused by name. Any object with `encode(x)` and an affine `decode(features)`
will do as well, but cannot be saved with a reduction. Only features that fire on `examples` are held. They are no part of the
weights: `fold` refuses them.

The dictionary that comes with the package is a top-k autoencoder (1,536 features, 16 at a time) of the small language model's
stream after layer 2 of 0 to 3; on new text it leaves {unexplained:.1%} of the variance over, and {firing:,} features fire.
`tasks/language_model/train_dictionary.py` trains it, in seven minutes on one core.

## A circuit of features

Subject-verb agreement; {examples} training and as many test examples; mean over {seeds} seeds. Risk in nats, when so many units
are kept and the others are at their means:

{kept}

The last column is another question: neurons of all layers, with every head kept. The others cut the same activation. In short:

- {features_verdict}
- {directions_verdict}
- {error_verdict}

{means_verdict}

## Taking out what is spurious

After SHIFT (Marks et al., [arXiv 2403.19647](https://arxiv.org/abs/2403.19647)). A linear probe on the stream's mean over
positions learns whether a sentence is about women or men, from {sentences} sentences in which women are always in the past
tense. With new names, and tense that says nothing, it is right {before} of the time, and agrees with the tense {tense} of it; a
probe that learnt from sentences in which tense says nothing is right {fair}. Features are ranked by how much tense moves the
probe through them, on sentences of which the tense is known and the gender is not used. That stands in for a reader who looks
at what features fire on. The first so many are removed, by name. Accuracy, mean over {seeds} seeds:

{removed}

*Same probe*: as learnt before anything was removed. *Learnt again*: from the same sentences, without these features. Random
features are drawn from those that fire, {draws} times. Axes are those of the stream, ranked the same way and set to their means.

{removal_verdict}

`python benchmarks/features.py` writes this page.
"""


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
