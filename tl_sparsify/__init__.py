"""tl_sparsify: find out which algorithm a transformer runs.

Heads and neurons are the variables of a structural causal model; a sparse circuit is found by interventional risk,
folded into a smaller model and checked against a high-level causal model (arXiv 2602.24266, and past it). One
primitive carries every method: under an intervention a unit's value ``v`` becomes ``value + keep * (v - value)``.

===================================================  ====================================  ======================
method                                               keep                                  value
===================================================  ====================================  ======================
zero, mean or refitted ablation                      0 or 1                                a constant
exact effect of one unit                             1 except there                        a constant
gradient score (attribution patching)                d metric / d keep at 1                a constant or a source run
second-order risk                                    half the square of d probe / d keep   a constant
interchange, counterfactual (resample) ablation      0 on the units, at named positions    the source run
physical fold                                        0 or 1, put into the weights          what folds
===================================================  ====================================  ======================
"""

from tl_sparsify import baselines, basis, certificates, constants, curvature, pairing, plot, report, score, task, text
from tl_sparsify.alignment import Found, align
from tl_sparsify.benchmark import compare
from tl_sparsify.causal import CausalModel
from tl_sparsify.circuit import Circuit, Reduction, Values, fingerprint
from tl_sparsify.compensating import compensating
from tl_sparsify.curves import Curve
from tl_sparsify.evaluation import Evaluation, evaluate
from tl_sparsify.examples import Examples
from tl_sparsify.folding import export_hf, fold, load_folded, save_folded
from tl_sparsify.intervene import Intervention, ablate, interchange, intervened, recorded, run_values
from tl_sparsify.measure import InterventionDistribution, risk
from tl_sparsify.methods import Method
from tl_sparsify.moments import Estimate, Moments
from tl_sparsify.polish import polish
from tl_sparsify.resampling import Stability, stability
from tl_sparsify.score import Scores
from tl_sparsify.search import Path, sparsify
from tl_sparsify.space import Space
from tl_sparsify.task import Task, list_tasks, load_task
from tl_sparsify.units import (
    Site,
    Unit,
    Units,
    attentions,
    directions,
    heads,
    mlps,
    neurons,
    residuals,
    stream_directions,
)
from tl_sparsify.verification import Alignment, Evidence, Pairs, verify

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "CausalModel",
    "Circuit",
    "Curve",
    "Estimate",
    "Evaluation",
    "Evidence",
    "Examples",
    "Found",
    "Intervention",
    "InterventionDistribution",
    "Method",
    "Moments",
    "Pairs",
    "Path",
    "Reduction",
    "Scores",
    "Site",
    "Space",
    "Stability",
    "Task",
    "Unit",
    "Units",
    "Values",
    "ablate",
    "align",
    "attentions",
    "baselines",
    "basis",
    "certificates",
    "compare",
    "compensating",
    "constants",
    "curvature",
    "directions",
    "evaluate",
    "export_hf",
    "fingerprint",
    "fold",
    "heads",
    "interchange",
    "intervened",
    "list_tasks",
    "load_folded",
    "load_task",
    "mlps",
    "neurons",
    "pairing",
    "plot",
    "polish",
    "recorded",
    "report",
    "residuals",
    "risk",
    "run_values",
    "save_folded",
    "score",
    "sparsify",
    "stability",
    "stream_directions",
    "task",
    "text",
    "verify",
]
