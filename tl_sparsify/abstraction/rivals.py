"""Two hypotheses against each other: where they differ under interchange, which of them does the network follow?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from tl_sparsify._internal.arguments import checked
from tl_sparsify.abstraction.causal_model import CausalModel
from tl_sparsify.abstraction.certificates import confidence_sequence
from tl_sparsify.abstraction.evidence import Alignment, Pairs
from tl_sparsify.abstraction.interchange import TestedModel, answers, right_answers
from tl_sparsify.core.forward import check_model
from tl_sparsify.core.units import Model


@checked
def contrast(
    model: Model,
    one: CausalModel,
    other: CausalModel,
    alignment: Alignment,
    pairs: Pairs,
    *,
    level: float = 0.05,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """On the pairs on which two causal models expect different answers under interchange of a variable: which of them
    does the network give?

    A row for each aligned variable, and a last one ``(none)`` for the answers without intervention (over all pairs):
    ``variable``; ``pairs`` that count (both inputs answered as labelled); ``differ``, on how many of these the models
    do; there the shares ``one``, ``other`` and ``neither`` of the network's answers; ``lower, upper``, a confidence
    sequence for ``one``'s share; ``follows``: ``one`` or ``other`` where the bounds leave no doubt that the share of
    this one is above one half, else ``cannot tell``.

    Forward passes over the pairs: three, and one for each variable.

    Raises:
        ValueError: a model in training mode, a variable that a causal model lacks.

    Example:
        >>> rival = task.causal_models["crossed"]
        >>> table = tls.contrast(model, task.causal_model, rival, tls.Alignment({"left": [units["L1H0"].at(4)]}), pairs)
        >>> table.columns.tolist()[:6]
        ['variable', 'pairs', 'differ', 'one', 'other', 'neither']
    """
    check_model(model)
    for name, causal_model in (("one", one), ("other", other)):
        lost = [variable for variable in alignment.variables if variable not in causal_model.variables]
        if lost:
            raise ValueError(f"alignment names {lost[0]!r}; {name} has {', '.join(causal_model.variables)}")
    subject = TestedModel("compared", model)
    swaps = [[], *([(units, pairs.source)] for units in alignment.units.values())]
    plain, *given = answers(subject, pairs.base, swaps, batch_size=batch_size)
    [source] = answers(subject, pairs.source, batch_size=batch_size)
    right = (plain == right_answers(pairs.base)) & (source == right_answers(pairs.source))

    def row(name: str, variables: Sequence[str], answer: Int[Tensor, "n"]) -> dict[str, object]:
        counts = right if variables else right | True
        first, second = (pairs.expected(causal_model, variables) for causal_model in (one, other))
        apart = counts & (first != second)
        follows = [(answer == expected)[apart].double() for expected in (first, second)]
        (low, high), (low_other, _) = (confidence_sequence(hits, level=level) for hits in follows)
        some = len(low) > 0
        sure = [name for name, part in (("one", low), ("other", low_other)) if some and float(part[-1]) > 0.5]
        shares = [float(hits.mean()) for hits in follows]
        return {
            "variable": name,
            "pairs": int(counts.sum()),
            "differ": int(apart.sum()),
            "one": shares[0],
            "other": shares[1],
            "neither": 1 - sum(shares),
            "lower": float(low[-1]) if some else 0.0,
            "upper": float(high[-1]) if some else 1.0,
            "follows": sure[0] if sure else "cannot tell",
        }

    rows = [row(variable, (variable,), answer) for variable, answer in zip(alignment.variables, given, strict=True)]
    return pd.DataFrame([*rows, row("(none)", (), plain)])
