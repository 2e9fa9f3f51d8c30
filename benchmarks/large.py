"""Scores at the size of real models: time and memory against the bare passes, with everything at its default.

``bare`` is one forward pass of GPT-2 small's shape with all its logits and ``k`` backward passes to the embeddings
(:mod:`score_speed`); ``score.risk`` takes the means as well. Memory is what a step adds to the process at its peak,
when it is made for the first time. One long prompt of SmolLM2 (``tl-sparsify fetch smollm2``) is scored with all that
its blocks compute kept for the backward pass, and with blocks run again there. A search over SmolLM2's heads and
neurons is profiled for the time in which it chooses units, beside that of its model passes. Each step runs in a process
of its own, a score in turn with its bare passes; times are the median of the repeats (one of the long prompt and of the
search), and only ratios of one run are compared. Writes ``benchmarks/results/large.csv`` and ``large.md``.

    python benchmarks/large.py [--repeats 3] [--prompts 32] [--pos 20]
"""

from __future__ import annotations

import pstats
from collections.abc import Callable
from cProfile import Profile
from typing import Any

import pandas as pd
import torch
from score_speed import bare, gpt2_small, prompts
from shared import in_processes, write

import tl_sparsify as tls
from tl_sparsify.comparison.cost import Cost, cost_of
from tl_sparsify.comparison.tables import table_of
from tl_sparsify.core import memory
from tl_sparsify.expansion.selection import exchange, greedy

MANY = 6  # times the prompts: 192
LONG = 2048  # tokens
CHOOSING = "choosing"
CHOOSERS = (greedy.__name__, exchange.__name__)
BESIDE = {f"score.risk, {probes}": f"bare, {probes}" for probes in ("1 probe", "4 probes")}


def steps(model: Any, n: int, pos: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    units = tls.heads(model) + tls.neurons(model)
    score = tls.score.risk  # imported before memory is measured, as what the bare passes need is

    def risk(count: int, probes: int) -> Callable[[], Any]:
        return lambda: score(model, prompts(count, pos), units, probes=probes)

    return {
        "bare, 1 probe": lambda: bare(model, prompts(n, pos), 1),
        "bare, 4 probes": lambda: bare(model, prompts(n, pos), 4),
        "score.risk, 1 probe": risk(n, 1),
        "score.risk, 4 probes": risk(n, 4),
        "score.risk, many prompts": risk(MANY * n, 4),
        "score.risk, twice as many": risk(2 * MANY * n, 4),
    }


NAMES = (
    "bare, 1 probe",
    "bare, 4 probes",
    "score.risk, 1 probe",
    "score.risk, 4 probes",
    "score.risk, many prompts",
    "score.risk, twice as many",
    "long prompt, kept",
    "long prompt, again",
    CHOOSING,
)


def long(*, again: bool) -> Cost:
    """Single-unit risk of all heads and neurons of SmolLM2 on one prompt of random tokens."""
    model = tls.load_task("ioi", model="smollm2").model()
    tokens = torch.randint(1000, 40_000, (1, LONG), generator=torch.Generator().manual_seed(0))
    prompt = tls.Examples(tokens, tokens.where(torch.arange(LONG) == LONG - 1, -100))
    units, score = tls.heads(model) + tls.neurons(model), tls.score.risk
    memory.SHARE_OF_ONE = 0.0 if again else float("inf")
    return cost_of(model, 1, lambda: score(model, prompt, units, probes=1))[1]


def choosing() -> dict[str, float]:
    """Seconds in which four rounds choose among all heads and neurons of SmolLM2, by 64 examples and one probe, and
    those of all their passes."""
    task = tls.load_task("ioi", model="smollm2")
    model = task.model()
    train, _, _ = task.examples(0)
    train = train.sample(64, seed=0)
    units = tls.heads(model) + tls.neurons(model)
    with Profile() as profile:
        tls.sparsify(model, train, units, rounds=4, smallest=0.3, probing=tls.Probing(1), progress=False)
    found = pstats.Stats(profile).get_stats_profile().func_profiles
    return {"seconds": sum(found[name].cumtime for name in CHOOSERS), "bare_seconds": found["in_batches"].cumtime}


def measured(name: str, repeats: int, n: int, pos: int) -> dict[str, float]:
    """What one step adds to the memory of this process when it is first made, and its seconds; of a score the medians
    of its own and of the bare passes' in turn, so that both meet the same machine."""
    if name == CHOOSING:
        return choosing()
    if name.startswith("long"):
        cost = long(again=name.endswith("again"))
        return {"seconds": cost.seconds, "added_mb": cost.peak_mb}
    model = gpt2_small()
    runs = steps(model, n, pos)
    first = cost_of(model, 1, runs[name])[1]
    if name not in BESIDE:
        return {"seconds": first.seconds, "added_mb": first.peak_mb}
    pair = (runs[name], runs[BESIDE[name]])
    times = [[cost_of(model, 1, run)[1].seconds for run in pair] for _ in range(repeats + 1)]
    mine, bare = pd.DataFrame(times[1:]).median()  # the first bare passes of a process take longer
    return {"seconds": float(mine), "bare_seconds": float(bare), "added_mb": first.peak_mb}


def markdown(frame: pd.DataFrame) -> str:
    by_step = frame.set_index("step")
    ratio, added = by_step.seconds / by_step.bare_seconds, by_step.added_mb
    rows: list[tuple[str, float, str]] = []
    for mine, bound in BESIDE.items():
        rows.append((f"{mine}, means included / {bound}, time", ratio[mine], "at most .85"))
        rows.append((f"{mine}, means included / {bound}, added memory", added[mine] / added[bound], "at most 1.0"))
    many, twice = added["score.risk, many prompts"], added["score.risk, twice as many"]
    rows.append(("GiB beyond the model, many prompts", many / 1024, "at most 2"))
    rows.append(("twice as many / many prompts, added memory", twice / many, "at most 1.05"))
    kept, again = by_step.loc["long prompt, kept"], by_step.loc["long prompt, again"]
    what = f"{LONG:,} tokens of SmolLM2, blocks run again / kept"
    rows.append((f"{what}, added memory", again.added_mb / kept.added_mb, "below 1"))
    rows.append((f"{what}, time", again.seconds / kept.seconds, ""))
    by_choice = ratio[CHOOSING]
    rows.append(("46,350 units of SmolLM2, 64 examples: choosing / model passes, time", by_choice, "at most .2"))
    return table_of(["ratio", "measured", "goal"], [[name, f"{value:.2f}", goal] for name, value, goal in rows])


def main() -> None:
    frame = in_processes(__doc__, __file__, NAMES, measured)
    if frame is not None:
        write("large", frame, {"large": markdown})


if __name__ == "__main__":
    main()
