"""A script that is run by one process or by several together, and what it finds: ``python -m helpers.several FOLDER
GROUP ...`` writes the numbers of each process to ``FOLDER/RANK.json``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tl_sparsify as tls
from helpers import equality, verification
from helpers.dictionaries import dictionary
from helpers.models import bridge, examples, reduction_of, units_of
from tl_sparsify.comparison.cost import counted

TRAIN, HELD_OUT = examples(41, answers=2), examples(22, seed=1, answers=2)
SWAPPED = tls.InterventionDistribution.interchange(0.3)
QUIET = {"progress": False}


def numbers(value: Any) -> Any:
    """Plain numbers and names of a result."""
    if isinstance(value, Tensor):
        return value.double().tolist()
    if isinstance(value, tls.Scores):
        return numbers([value.scores, value.stderr])
    if isinstance(value, tls.Values):
        return numbers(value.tensors)
    if isinstance(value, tls.Estimate):
        return [value.mean, value.stderr, value.n]
    if isinstance(value, tls.Circuit):
        return list(value.names)
    if isinstance(value, tls.Reduction):
        return [list(value.circuit.names), numbers(value.values)] + [
            numbers(m.weights) for m in value.mixing or () if m
        ]
    if isinstance(value, tls.CircuitPath):
        rounds = [numbers([r.reduction, r.predicted, r.measured, r.additivity]) for r in value.rounds]
        return [value.order.tolist(), rounds]
    if isinstance(value, list | tuple):
        return [numbers(part) for part in value]
    return value


def scores(seen: Callable[..., Any]) -> dict[str, Any]:
    model, units = bridge(), units_of(bridge())
    means = tls.constants.mean(model, TRAIN, units)
    reduction = reduction_of(model)
    score = tls.score
    features = tls.features(model, dictionary(), error=True)
    return {
        "firing": seen(tls.dictionaries.firing, model, dictionary("topk", k=1), TRAIN),
        "risk of features": seen(score.risk, model, TRAIN, features),
        "risk": seen(score.risk, model, TRAIN, units),
        "risk of given values": seen(score.risk, model, TRAIN, units, values=means, batch_size=7),
        "risk under interventions": seen(score.risk, model, TRAIN, units, interventions=SWAPPED),
        "variance": seen(score.variance, model, TRAIN, units),
        "scaled variance": seen(score.scaled_variance, model, TRAIN, units, batch_size=5),
        "gradient": seen(score.gradient, model, TRAIN, units),
        "integrated": seen(score.integrated, model, TRAIN, units, source="shuffled", steps=2),
        "exact": seen(score.exact, model, TRAIN, units, **QUIET),
        "additivity": seen(score.additivity, model, TRAIN, reduction),
        "norms": seen(tls.baselines.activation_norm, model, TRAIN, units),
        "patching": seen(tls.baselines.activation_patching, model, HELD_OUT, units, **QUIET),
        "pca": seen(tls.basis.pca, model, TRAIN, "blocks.0.hook_resid_post", rank=2),
    }


def constants(seen: Callable[..., Any]) -> dict[str, Any]:
    model, units = bridge(), units_of(bridge())
    reduction, fit = reduction_of(model), {"steps": 12, "per_step": 15, **QUIET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newton = seen(tls.constants.newton, model, TRAIN, units)
    return {
        "mean": seen(tls.constants.mean, model, TRAIN, units),
        "curvature weighted": seen(tls.constants.curvature_weighted, model, TRAIN, units),
        "newton": newton,
        "neighbours": seen(tls.constants.neighbours, model, reduction, TRAIN),
        "refit": seen(tls.constants.refit, model, reduction, TRAIN, HELD_OUT, **fit),
        "refit under interventions": seen(
            tls.constants.refit, model, reduction, TRAIN, HELD_OUT, interventions=SWAPPED, **fit
        ),
    }


def searches(seen: Callable[..., Any]) -> dict[str, Any]:
    model, units = bridge(), units_of(bridge())
    how: dict[str, Any] = {"rounds": 4, "smallest": 0.2, **QUIET}
    many = examples(300, seed=2, answers=2)
    settings = tls.Refitting(steps=4, per_step=16)
    return {
        "path": seen(tls.sparsify, model, TRAIN, units, **how),
        "held out": seen(tls.sparsify, model, TRAIN, units, held_out=HELD_OUT, refitting=settings, **how),
        "some": seen(tls.sparsify, model, TRAIN, units, probing=tls.Probing(examples=9), **how),
        "projected": seen(tls.sparsify, model, many, units, predict=True, **how),
        "affine": seen(tls.sparsify_affine, model, TRAIN, tls.neurons(model), sizes=(0.6, 0.3), **QUIET),
        "polished": seen(tls.polish, model, reduction_of(model), TRAIN, passes=40),
    }


def evidence(seen: Callable[..., Any]) -> dict[str, Any]:
    model, reduction = bridge(), reduction_of(bridge())
    native, pairs = verification.native(), verification.native_pairs(40)
    mine = verification.answered_by(native, pairs)
    network, drawn = equality.Network(), equality.pairs_of(*equality.drawn(120))
    gone = verification.reduction_of_native(["L0H1", "L1N3"])
    how: dict[str, Any] = {"reduced": gone, "draws": 2, "batch_size": 7}
    verified = tls.verify(native, verification.PARITY, verification.NATIVE, mine, **how)
    found = seen(tls.align, network, equality.EQUALITY, drawn, drawn, units=equality.UNITS)
    measured = seen(tls.evaluate, model, reduction, HELD_OUT, bootstrap=50, minimality=True)
    return {
        "risk": seen(tls.risk, model, reduction, HELD_OUT, batch_size=4),
        "risk under interventions": seen(tls.risk, model, reduction, HELD_OUT, interventions=SWAPPED),
        "evaluation": measured.to_dict(),
        "verified": json.loads(verified.to_frame().to_json(double_precision=15)),
        "aligned": {name: sorted(unit.name for unit in units) for name, units in found.alignment.units.items()},
        "accuracies": [dict(found.held_out), dict(found.searched)],
    }


GROUPS = {"scores": scores, "constants": constants, "searches": searches, "evidence": evidence}


def found_by(groups: Sequence[str]) -> dict[str, Any]:
    """What the groups find, and how many examples the models ran on in each call, forward and backward."""
    passes: dict[str, Any] = {}

    def seen(call: Callable[..., Any], model: Any, *rest: Any, **settings: Any) -> Any:
        with counted(model) as counts:
            found = call(model, *rest, **settings)
        passes[f"{len(passes)} {call.__name__}"] = [counts["forward"], counts["backward"]]
        return found

    results = {group: {k: numbers(v) for k, v in GROUPS[group](seen).items()} for group in groups}
    return {"results": results, "passes": passes}


def together(size: int, folder: Path, *groups: str) -> list[Any]:
    """What each of ``size`` processes finds that are launched as torchrun does."""
    done = launched(size, [sys.executable, "-m", "helpers.several", str(folder), *groups])
    for rank, (code, out) in enumerate(done):
        assert code == 0, f"process {rank}: {out}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def launched(size: int, command: Sequence[str]) -> list[tuple[int, str]]:
    """Exit status and output of each of ``size`` processes of one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = str(Path(__file__).parent.parent)
    given = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    given |= {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    processes = [
        subprocess.Popen(
            command,
            env=given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    folder, groups = Path(sys.argv[1]), sys.argv[2:]
    content = json.dumps(found_by(groups))
    (folder / f"{os.environ.get('RANK', 0)}.json").write_text(content)


if __name__ == "__main__":
    main()
