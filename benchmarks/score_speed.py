"""How fast the risk engine is: ratios at the shape of GPT-2 small, random weights, 32 prompts of 20 tokens.

``bare`` is what nothing can be faster than: one forward pass of the model and ``k`` backward passes to the embeddings
only (no parameter's gradient). Each step runs in a process of its own, so that peak memory is its own; times are the
median of the repeats, and only ratios of one run are compared. Writes ``benchmarks/results/score_speed.csv`` and
``score_speed.md``.

    python benchmarks/score_speed.py [--repeats 3] [--prompts 32] [--pos 20]
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pandas as pd
import torch
from shared import in_processes, write
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

import tl_sparsify as tls
from tl_sparsify.comparison.tables import table_of

EDGES, RISK, SEARCH = "score.risk, edges, 4 probes", "score.risk, 4 probes", "sparsify, 20 rounds"


def gpt2_small() -> Any:
    """A bridge of GPT-2 small's shape with random weights, the same in every process."""
    config = GPT2Config()
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)  # noqa: TID251
        return build_bridge_from_module(GPT2LMHeadModel(config).eval(), "GPT2LMHeadModel", hf_config=config)


def prompts(n: int, pos: int) -> tls.Examples:
    tokens = torch.randint(50_000, (n, pos), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, 0]
    return tls.Examples(tokens, labels)


def bare(model: Any, examples: tls.Examples, probes: int) -> None:
    """One forward and ``probes`` activation-only backward passes of the model itself."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    inner = model.original_model
    embedded = inner.transformer.wte(examples.tokens).detach().requires_grad_()
    logits = inner(inputs_embeds=embedded, use_cache=False).logits[:, -1]
    for probe in range(probes):
        torch.autograd.grad(logits[:, probe].sum(), embedded, retain_graph=probe < probes - 1)
    for parameter in wanted:
        parameter.requires_grad_(True)


def steps(model: Any, examples: tls.Examples) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    units = tls.heads(model) + tls.neurons(model)
    values = tls.constants.mean(model, examples, units)
    edges = tls.edges(model)
    doubled = prompts(2 * len(examples), examples.tokens.shape[1])
    size = len(examples)

    @cache  # of the first repeat, which is not counted
    def edge_values() -> tls.Values:
        return tls.constants.mean(model, examples, edges)

    def risk(data: tls.Examples, probes: int) -> tls.Scores:
        return tls.score.risk(model, data, units, values=values, probes=probes, batch_size=size)

    return {
        "bare, 1 probe": lambda: bare(model, examples, 1),
        "bare, 4 probes": lambda: bare(model, examples, 4),
        "score.risk, 1 probe": lambda: risk(examples, 1),
        RISK: lambda: risk(examples, 4),
        "score.risk, 4 probes, twice the prompts": lambda: risk(doubled, 4),
        EDGES: lambda: tls.score.risk(model, examples, edges, values=edge_values(), probes=4, batch_size=size),
        "one head at a time (144)": lambda: [one_head(model, examples, values, i) for i in range(144)],
        SEARCH: lambda: tls.sparsify(model, examples, units, values=values, batch_size=size, progress=False),
    }


def one_head(model: Any, examples: tls.Examples, values: tls.Values, head: int) -> None:
    """The forward pass that removing one head takes."""
    units = values.units
    circuit = ~tls.Circuit.of(units, [units.names[units.offsets[head // 12] + head % 12]])
    with torch.no_grad(), tls.intervened(model, tls.ablate(tls.Reduction(circuit, values))):
        model(examples.tokens)


def measured(name: str, repeats: int, n: int, pos: int) -> dict[str, float]:
    """Median seconds and peak memory of one step, in this process; of what takes minutes the seconds of one. Edges and
    the search are compared with a score in their own process, so that both meet the same machine."""
    model, examples = gpt2_small(), prompts(n, pos)
    run = steps(model, examples)[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def median(run: Callable[[], Any]) -> float:
        times: list[float] = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return float(pd.Series(times[1:]).median())  # the first passes of a process take longer

    beside = median(steps(model, examples)[RISK]) if name in (EDGES, SEARCH) else float("nan")
    if name.startswith("one head") or name == SEARCH:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    else:
        seconds = median(run)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"peak_mb": after / 1024, "above_mb": (after - before) / 1024}
    return {"seconds": seconds, "beside_seconds": beside, **memory}


def markdown(frame: pd.DataFrame) -> str:
    seconds, peak = frame.set_index("step").seconds, frame.set_index("step").peak_mb
    turns, twice = "one head at a time (144)", "score.risk, 4 probes, twice the prompts"
    rows: list[tuple[str, float, str]] = []
    for probes in ("4 probes", "1 probe"):
        mine, bound = f"score.risk, {probes}", f"bare, {probes}"
        rows.append((f"{mine} / bare, time", seconds[mine] / seconds[bound], "at most 1.1"))
        rows.append((f"{mine} / bare, peak memory", peak[mine] / peak[bound], "at most 1.3"))
        goal = "at least 20" if probes == "4 probes" else "at least 40"
        rows.append((f"144 heads in turn / {mine}, time", seconds[turns] / seconds[mine], goal))
    beside = seconds / frame.set_index("step").beside_seconds
    rows.append((f"{EDGES} / heads and neurons, time", beside[EDGES], "at most 1.3"))
    rows.append((f"{SEARCH} / {RISK}, time", beside[SEARCH], "at most 25"))
    rows.append(("twice the prompts, time", seconds[twice] / seconds[RISK], "at most 2.1"))
    rows.append(("twice the prompts, peak memory", peak[twice] / peak[RISK], "at most 1.05"))
    return table_of(["ratio", "measured", "goal"], [[name, f"{ratio:.2f}", goal] for name, ratio, goal in rows])


def main() -> None:
    frame = in_processes(__doc__, __file__, NAMES, measured)
    if frame is not None:
        write("score_speed", frame, {"score_speed": markdown})


NAMES = (
    "bare, 1 probe",
    "bare, 4 probes",
    "score.risk, 1 probe",
    "score.risk, 4 probes",
    "score.risk, 4 probes, twice the prompts",
    EDGES,
    "one head at a time (144)",
    "sparsify, 20 rounds",
)


if __name__ == "__main__":
    main()
