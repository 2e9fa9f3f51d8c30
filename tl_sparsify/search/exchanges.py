"""Polish: exact exchanges on measured risk, for what a second-order search leaves undone.

With few, large units (heads and whole layers) an expansion says little, and measuring is cheap. An exchange drops a
kept unit and takes a removed one back, or two of each; the expansion around the current circuit ranks the exchanges,
and measured risk decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify._internal.checks import MOST, check_count, check_temperature
from tl_sparsify.core.circuit import Circuit
from tl_sparsify.core.examples import Examples
from tl_sparsify.core.forward import check_call
from tl_sparsify.core.measure import circuit_risks, remembering
from tl_sparsify.core.metrics import Metric
from tl_sparsify.core.probes import samples
from tl_sparsify.core.reduction import Reduction, check_fingerprint
from tl_sparsify.core.units import Model
from tl_sparsify.expansion.linearisation import linearise

_AT_ONCE = 8
_SHORTLIST = 512


@checked
def polish(
    model: Model,
    reduction: Reduction,
    examples: Examples,
    *,
    passes: int = 200,
    rivals: Sequence[Circuit] = (),
    probes: int = 4,
    temperature: float = 3.0,
    metric: Metric | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Reduction:
    """Improve a circuit of constants by exchanges on its measured risk on ``examples``, without changing its size.

    The result is never worse there than what was given, nor than the ``rivals`` (circuits of the same size that
    another method found); where there are few units for the budget, the circuit that removing one unit at a time would
    choose is one of them.

    Args:
        passes: at most about this many forward and backward passes over the data.

    Raises:
        ValueError: a model in training mode, a reduction of another model, fewer than 20 passes, a rival of another
            size, affine replacements (fit them after polishing).

    Example:
        >>> better = tls.polish(model, reduction, train, passes=40)
        >>> len(better.circuit), tls.risk(model, better, train).mean <= tls.risk(model, reduction, train).mean
        (6, True)
    """
    check_call(model, examples, reduction.units, seed=seed, batch_size=batch_size)
    check_count("passes", passes, least=None)
    check_count("probes", probes, most=MOST)
    check_temperature(temperature)
    check_fingerprint(model, reduction)
    if passes < 20:
        raise ValueError(f"passes is {passes}; polishing needs at least 20")
    for rival in rivals:
        if len(rival) != len(reduction.circuit):
            raise ValueError(f"a rival keeps {len(rival)} units, the reduction {len(reduction.circuit)}")

    shared: dict[str, Any] = {"metric": metric, "batch_size": batch_size}
    recall = remembering()

    def measured(circuits: Sequence[Circuit]) -> Float[Tensor, "circuits"]:
        found = circuit_risks(model, reduction, circuits, examples, recall=recall, **shared)
        return torch.tensor([one.mean for one in found], dtype=torch.float64)

    n = len(reduction.units)
    candidates = [reduction.circuit, *rivals]
    spent = 0
    if n <= passes // 3:
        alone = torch.eye(n, dtype=torch.bool)
        effects = measured([Circuit(reduction.units, ~row) for row in alone])
        keep = torch.zeros(n, dtype=torch.bool)
        keep[effects.argsort(stable=True)[n - len(reduction.circuit) :]] = True
        candidates.append(Circuit(reduction.units, keep))
        spent += n + 1
    found = measured(candidates)
    spent += 1 + len(candidates)
    best, lowest = candidates[int(found.argmin())], float(found.min())
    if not 0 < len(best) < n:
        return reduction.with_circuit(best)
    tried = set(candidates)
    while spent + probes + 4 + _AT_ONCE < passes:
        expanding = shared | {"probes": probes, "temperature": temperature, "seed": seed, "recall": recall}
        proposals = _exchanges(model, reduction.with_circuit(best), examples, expanding)
        spent += probes + 4
        improved = False
        while spent + _AT_ONCE < passes and not improved:
            chunk: list[Circuit] = []
            for proposal in proposals:
                if proposal not in tried:
                    chunk.append(proposal)
                if len(chunk) == _AT_ONCE:
                    break
            if not chunk:
                return reduction.with_circuit(best)
            tried.update(chunk)
            found = measured(chunk)
            spent += 1 + len(chunk)
            if float(found.min()) < lowest:
                best, lowest, improved = chunk[int(found.argmin())], float(found.min()), True
    return reduction.with_circuit(best)


def _exchanges(model: Model, here: Reduction, examples: Examples, expanding: dict[str, Any]) -> list[Circuit]:
    """Circuits one exchange away, then two exchanges away, in order of predicted risk."""
    batches = samples(model, examples, here, current=here, restorable=True, **expanding)
    found = linearise(batches, len(examples), seed=expanding["seed"])
    matrix, linear = found.matrix.double().cpu(), found.linear.double().cpu()
    mask = here.circuit.mask
    out, back = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    # The expansion runs along removals; to restore a unit is the same step backwards, so its slope changes sign.
    dropped = linear + matrix.square().sum(0) / 2
    restored = -linear + matrix.square().sum(0) / 2
    out = out[dropped[out].argsort(stable=True)[:_SHORTLIST]]
    back = back[restored[back].argsort(stable=True)[:_SHORTLIST]]
    predicted = dropped[out][:, None] + restored[back] - matrix[:, out].T @ matrix[:, back]
    ranked = predicted.flatten().argsort(stable=True)[:_SHORTLIST]
    pairs = [(int(out[i // len(back)]), int(back[i % len(back)])) for i in ranked.tolist()]
    single = [with_exchanged(here.circuit, [pair]) for pair in pairs]
    few = pairs[: 2 * _AT_ONCE]
    steps = torch.stack([matrix[:, i] - matrix[:, j] for i, j in few])
    values = torch.stack([linear[i] - linear[j] for i, j in few])
    interaction = steps @ steps.T
    both = values[:, None] + values + interaction + (interaction.diagonal()[:, None] + interaction.diagonal()) / 2
    double: list[tuple[float, Circuit]] = []
    for a in range(len(few)):
        for b in range(a + 1, len(few)):
            if few[a][0] != few[b][0] and few[a][1] != few[b][1]:
                double.append((float(both[a, b]), with_exchanged(here.circuit, [few[a], few[b]])))
    return [*single[: 8 * _AT_ONCE], *(circuit for _, circuit in sorted(double, key=lambda pair: pair[0]))]


def with_exchanged(circuit: Circuit, pairs: Sequence[tuple[int, int]]) -> Circuit:
    """The circuit without the first unit of each pair, and with the second."""
    mask = circuit.mask.clone()
    for out, back in pairs:
        mask[out], mask[back] = False, True
    return Circuit(circuit.units, mask)
