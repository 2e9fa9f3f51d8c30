"""tl_sparsify: find out which algorithm a transformer runs.

Heads and neurons are the variables of a structural causal model; a sparse circuit is found by interventional risk,
folded into a smaller model and checked against a high-level causal model (arXiv 2602.24266, and past it). One
primitive carries every method: under an intervention a unit's value ``v`` becomes ``value + keep * (v - value)``.

===================================================  ====================================  ======================
method                                               keep                                  value
===================================================  ====================================  ======================
zero, mean or refitted ablation                      0 or 1                                a constant
exact effect of one unit                             0 for that unit, 1 elsewhere          a constant
gradient score (attribution patching)                d metric / d keep at 1                a constant or a source run
second-order risk                                    half the square of d probe / d keep   a constant
interchange, counterfactual (resample) ablation      0 on the units, at named positions    the source run
physical fold                                        0 or 1, put into the weights          what folds
===================================================  ====================================  ======================
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tl_sparsify._internal.after_import import import_after

__version__ = "0.1.0"

# Where each public name is defined; __init__.pyi says the same to type checkers. Imported on first use: TransformerLens
# takes seconds to import, and the command line's --help does not need it.
_PUBLIC = {
    "tl_sparsify": ("dictionaries",),
    "tl_sparsify.abstraction": ("certificates",),
    "tl_sparsify.abstraction.align": ("AlignmentResult", "align"),
    "tl_sparsify.abstraction.boundless": ("BoundlessResult", "LearntRow", "boundless_das"),
    "tl_sparsify.abstraction.causal_model": ("CausalModel",),
    "tl_sparsify.abstraction.evidence": ("Alignment", "Evidence", "Pairs"),
    "tl_sparsify.abstraction.rivals": ("contrast",),
    "tl_sparsify.abstraction.scrubbing": ("ScrubbedRow", "Scrubbing", "scrub"),
    "tl_sparsify.abstraction.subspaces": ("SubspacePart", "SubspaceSplit", "split_subspace"),
    "tl_sparsify.abstraction.verify": ("verify",),
    "tl_sparsify.comparison": ("baselines",),
    "tl_sparsify.comparison.benchmark": ("compare",),
    "tl_sparsify.comparison.convergence": ("refit_until_converged",),
    "tl_sparsify.comparison.curves": ("Curve",),
    "tl_sparsify.comparison.evaluate": ("Evaluation", "evaluate"),
    "tl_sparsify.comparison.methods": ("Method",),
    "tl_sparsify.comparison.path_patching": ("PathEffects", "patch_paths"),
    "tl_sparsify.comparison.resampling": ("Stability", "stability"),
    "tl_sparsify.core": ("basis", "metrics"),
    "tl_sparsify.core.basis": ("directions", "stream_directions"),
    "tl_sparsify.core.circuit": ("Circuit", "Values"),
    "tl_sparsify.core.distributions": ("InterventionDistribution",),
    "tl_sparsify.core.edges": ("LooseEnds", "edges", "loose_ends", "prune"),
    "tl_sparsify.core.examples": ("Examples",),
    "tl_sparsify.core.forward": ("run_values",),
    "tl_sparsify.core.intervene": ("Intervention", "ablate", "interchange", "intervened", "recorded"),
    "tl_sparsify.core.measure": ("risk",),
    "tl_sparsify.core.moments": ("Estimate", "Moments"),
    "tl_sparsify.core.reduction": ("Reduction", "fingerprint"),
    "tl_sparsify.core.site": ("Site",),
    "tl_sparsify.core.units": (
        "Unit",
        "Units",
        "attentions",
        "experts",
        "heads",
        "mlps",
        "neurons",
        "residuals",
    ),
    "tl_sparsify.dictionaries.dictionary": ("Dictionary",),
    "tl_sparsify.dictionaries.units": ("features",),
    "tl_sparsify.discovery.behaviours": ("behaviours",),
    "tl_sparsify.discovery.contexts": ("contexts",),
    "tl_sparsify.discovery.found": ("Behaviour", "Behaviours", "Ranged"),
    "tl_sparsify.folding.bridge": ("load_folded", "save_folded"),
    "tl_sparsify.folding.export": ("export_hf",),
    "tl_sparsify.folding.fold": ("fold",),
    "tl_sparsify.formats": ("importers", "mib"),
    "tl_sparsify.formats.records": ("LoadedExamples", "load_examples"),
    "tl_sparsify.formats.share": ("card", "pull", "push"),
    "tl_sparsify.gradients": ("backward",),
    "tl_sparsify.masking.sharpening": ("sharpen",),
    "tl_sparsify.patching.connections": ("Connections", "connections"),
    "tl_sparsify.presentation": ("plot", "report"),
    "tl_sparsify.presentation.neuronpedia": ("to_neuronpedia",),
    "tl_sparsify.presentation.page": ("page",),
    "tl_sparsify.search": ("constants", "curvature", "score"),
    "tl_sparsify.search.compensating": ("sparsify_affine",),
    "tl_sparsify.search.exchanges": ("polish",),
    "tl_sparsify.search.joint": ("sparsify",),
    "tl_sparsify.search.settings": ("Constraints", "Probing", "Refitting"),
    "tl_sparsify.search.path": ("CircuitPath",),
    "tl_sparsify.expansion.selection": ("Shrinkage",),
    "tl_sparsify.search.scores": ("Scores",),
    "tl_sparsify.stressing.battery": ("stress",),
    "tl_sparsify.stressing.table": ("Stress", "StressRow"),
    "tl_sparsify.tasks": ("pairing", "task", "text"),
    "tl_sparsify.tasks.input_space": ("InputSpace",),
    "tl_sparsify.tasks.task": ("Task", "list_tasks", "load_task"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tl_sparsify' has no attribute {name!r}")
    module = import_module(_MODULE_OF[name])
    value = vars(module)[name] if name in vars(module) else import_module(f"{_MODULE_OF[name]}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# The auto classes of transformers load what export_hf wrote, whichever of the two packages is imported first.
import_after("transformers.models.auto.modeling_auto", "tl_sparsify.folding.checkpoint")
