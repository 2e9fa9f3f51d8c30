"""Several processes on one machine: how much faster two of one thread each are than one of one thread.

    python benchmarks/processes.py                 # prints seconds and ratios; writes nothing
    python benchmarks/processes.py --prompts 64    # fewer, of GPT-2 small's shape, random weights

Each call runs in processes of its own, launched as torchrun does; the seconds are those of the slowest process, without
loading: of the clock, and of the processor, which do not grow where other programs keep the processors busy. The passes
over the data are the share of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch

import tl_sparsify as tls
from tl_sparsify.comparison.cost import counted


def model_of(layers: int) -> Any:
    """A transformer of GPT-2 small's widths, with random weights."""
    from transformer_lens import TransformerBridge, TransformerBridgeConfig

    config: dict[str, Any] = {"d_model": 768, "d_head": 64, "n_heads": 12, "n_layers": layers, "n_ctx": 64}
    config |= {"d_vocab": 50257, "d_mlp": 3072, "act_fn": "gelu", "normalization_type": "LN", "seed": 0}
    return TransformerBridge.boot_native(TransformerBridgeConfig(**config)).eval()


def measured(prompts: int, layers: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of the clock and of the processor, and passes over the data, of each call in this process."""
    torch.set_num_threads(1)
    model = model_of(layers)
    tokens = torch.randint(50257, (prompts, 20), generator=torch.Generator().manual_seed(0))
    examples = tls.Examples(tokens, tokens.where(torch.arange(20) == 19, -100))
    units = tls.heads(model) + tls.neurons(model)
    reduction = tls.constants.reduced(
        model, tls.score.variance(model, examples[:8], units).top(0.5), tls.constants.mean(model, examples[:8], units)
    )
    calls = {
        "score.risk": lambda: tls.score.risk(model, examples, units),
        "risk": lambda: tls.risk(model, reduction, examples),
        "sparsify": lambda: tls.sparsify(model, examples, units, progress=False),
        "refit, 5 steps": lambda: tls.constants.refit(model, reduction, examples, examples, steps=5, progress=False),
    }
    calls["score.risk"]()  # the first passes of a process wait for memory
    found: dict[str, tuple[float, float, float]] = {}
    for name, call in calls.items():
        tls.risk(model, reduction, examples[:8])  # all processes begin together
        start, busy = time.perf_counter(), time.process_time()
        with counted(model) as passes:
            call()
        share = (passes["forward"] + passes["backward"]) / prompts
        found[name] = (time.perf_counter() - start, time.process_time() - busy, share)
    return found


def launched(size: int, arguments: list[str]) -> list[dict[str, tuple[float, float, float]]]:
    """What each of ``size`` processes measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "ACCELERATE_USE_CPU": "true"}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--one", *arguments]
    started = [
        subprocess.Popen(command, env=given | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    outputs = [process.communicate()[0] for process in started]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prompts", type=int, default=128)
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--one", action="store_true", help="measure here, and print json")
    given = options.parse_args()
    if given.one:
        print(json.dumps(measured(given.prompts, given.layers)))
        return
    one, two = (launched(size, [f"--prompts={given.prompts}", f"--layers={given.layers}"]) for size in (1, 2))
    print(f"{'':20} {'clock: one':>10} {'two':>6} {'ratio':>6} {'processor: one':>15} {'two':>6} {'ratio':>6}  passes")
    for name, (clock, busy, passes) in one[0].items():
        both, each = (max(part[name][i] for part in two) for i in range(2))
        shares = " + ".join(f"{part[name][2]:.1f}" for part in two)
        print(f"{name:20} {clock:10.1f} {both:6.1f} {clock / both:6.2f}", end=" ")
        print(f"{busy:15.1f} {each:6.1f} {busy / each:6.2f}  {passes:.1f} = {shares}")


if __name__ == "__main__":
    main()
