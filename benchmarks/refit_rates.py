"""How fast constants of a real model may move: refits of SmolLM2 at other learning rates.

A tenth of its heads and neurons, by one-shot risk on ``greater_than``, which no table of refits has. All removed units'
constants are fitted from the means, in 40 steps of 32 examples at a constant rate; the best of ten looks at 64
validation examples is judged on 64 others. ``default`` is the rate that :func:`constants.refit` takes by itself. What
was done before is kept. Writes ``benchmarks/results/refit_rates.csv`` and ``refit_rates.md``.

    tl-sparsify fetch smollm2
    python benchmarks/refit_rates.py
"""

from __future__ import annotations

import pandas as pd
from shared import RESULTS, parser, write

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core.measure import known_of

RATES = ("none", "0.05", "0.015", "default", "0.0015")
TRAIN, JUDGED, KEPT = 256, 64, 0.1
STEPS, PER_STEP = 40, 32


def markdown(frame: pd.DataFrame) -> str:
    """One row a rate: the divergence in nats on the examples that chose the best step, and on others."""
    rows = [
        [str(row.rate), f"{row.chosen_on:.3g}", f"{row.risk:.3g} ± {row.risk_stderr:.2g}"] for row in frame.itertuples()
    ]
    return table_of(["learning rate", "risk where the step was chosen", "risk on other examples"], rows)


def main() -> None:
    parser(__doc__).parse_args()
    file = RESULTS / "refit_rates.csv"
    done = (
        pd.read_csv(file, dtype={"rate": str}, keep_default_na=False) if file.is_file() else pd.DataFrame({"rate": []})
    )
    missing = [rate for rate in RATES if rate not in set(done.rate)]
    if missing:
        task = tls.load_task("greater_than", model="smollm2")
        model = task.model()
        train, validation, _ = task.examples(0)
        train, validation = train.sample(TRAIN, seed=0), validation.sample(2 * JUDGED, seed=0)
        choosing, judging = validation[:JUDGED], validation[JUDGED:]
        units = tls.heads(model) + tls.neurons(model)
        values = tls.constants.mean(model, train, units, batch_size=PER_STEP)
        order = tls.score.risk(model, train, units, values=values, temperature=3.0, batch_size=PER_STEP)
        start = tls.constants.reduced(model, order.top(KEPT), values)
        known = known_of(model, train, units, clean=True, many=True, batch_size=PER_STEP)
        for rate in missing:
            found = start
            if rate != "none":
                told = {} if rate == "default" else {"learning_rate": float(rate)}
                given = {"steps": STEPS, "patience": STEPS, "per_step": PER_STEP, "batch_size": PER_STEP}
                found = tls.constants.refit(model, start, train, choosing, known=known, progress=False, **given, **told)
            chosen, other = (tls.risk(model, found, some, batch_size=PER_STEP) for some in (choosing, judging))
            row = {"rate": rate, "chosen_on": chosen.mean, "risk": other.mean, "risk_stderr": other.stderr}
            done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
            done = done.sort_values("rate", key=lambda rates: rates.map(RATES.index), ignore_index=True)
            write("refit_rates", done, {}, show=False)
            print(f"{rate}: {chosen.mean:.3g}, on others {other.mean:.3g}", flush=True)
    write("refit_rates", done, {"refit_rates": markdown})


if __name__ == "__main__":
    main()
