"""Train a sparse dictionary of the small language model's stream and write ``dictionary/`` in SAELens's layout.

    python -m tasks.language_model.train_dictionary [--out FOLDER] [--steps 1000 ...]

A top-k autoencoder (Gao et al., *Scaling and evaluating sparse autoencoders*, arXiv 2406.04093) with the auxiliary loss
that lets features that do not fire fit what is left over, on the corpus the model was trained on (``corpus.py``), drawn
anew. Same machine, same arguments: the same weights. Beside the weights: what they reconstruct, in ``metrics.json``.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import tl_sparsify as tls
from tasks.language_model.corpus import documents
from tasks.language_model.train import CHUNK, packed
from tasks.training import arguments

DICTIONARY = Path(__file__).parent / "dictionary"
LAYER = 2  # whose stream goes into the last layer, where heads bring an answer to the end
SETTINGS = {
    "layer": LAYER,
    "features": 1536,
    "k": 16,
    "steps": 1000,
    "batch": 16,
    "length": 96,
    "seed": 0,
    "threads": 1,
    "lr": 1e-3,
    "dead_after": 100,
    "auxiliary": 1 / 32,
}
FIRST = 900_000  # of the corpus's seeds: texts that neither the model nor its tests have seen


def activations(model: Any, hook: str, rows: int, length: int, seed: int) -> Iterator[Float[Tensor, "some width"]]:
    """What a hook point holds in rows of the corpus, at all positions but those of the beginning token."""
    units, chunk = tls.Units((tls.Site(kind="residual", layer=0, hook=hook, size=1),)), 0
    waiting = torch.empty(0, length, dtype=torch.long)
    order = torch.Generator().manual_seed(seed)
    while True:
        if len(waiting) < rows:
            found = packed(model.tokenizer, documents(CHUNK, FIRST + 1000 * seed + chunk), length)
            waiting, chunk = found[torch.randperm(len(found), generator=order)], chunk + 1
        batch, waiting = waiting[:rows], waiting[rows:]
        with torch.no_grad(), tls.recorded(model, units) as recording:
            model(batch)
        yield recording.activations[hook][batch != model.tokenizer.bos_token_id]


def top(before: Float[Tensor, "rows features"], k: int) -> Float[Tensor, "rows features"]:
    """The ``k`` largest of each row, where they are positive."""
    found = before.topk(k, dim=1)
    return torch.zeros_like(before).scatter(1, found.indices, found.values.relu())


def trained(model: Any, hook: str, args: Any) -> tls.Dictionary:
    """The dictionary, in the activations' own scale."""
    stream = activations(model, hook, args.batch, args.length, args.seed)
    sample = torch.cat([next(stream) for _ in range(8)])
    mean, width = sample.mean(0), sample.shape[1]
    scale = float((sample - mean).norm(dim=1).mean()) / width**0.5  # so that entries are about 1
    generator = torch.Generator().manual_seed(args.seed)
    decoder = torch.nn.functional.normalize(torch.randn(args.features, width, generator=generator), dim=1)
    parameters = [decoder.T.clone(), decoder, torch.zeros(args.features), mean / scale]
    w_enc, w_dec, b_enc, b_dec = (parameter.requires_grad_() for parameter in parameters)
    optimiser = torch.optim.Adam([w_enc, w_dec, b_enc, b_dec], lr=args.lr, betas=(0.9, 0.99))
    silent = torch.zeros(args.features)  # steps since a feature fired
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min(1.0, step / 50, 5 * (1 - (step - 1) / args.steps))
        x = next(stream) / scale
        before = (x - b_dec) @ w_enc + b_enc
        a = top(before, args.k)
        left = x - a @ w_dec - b_dec
        loss = left.square().mean()
        silent = torch.where((a > 0).any(0), 0.0, silent + 1)
        dead = silent >= args.dead_after
        if int(dead.sum()) > args.k:
            more = top(before.masked_fill(~dead, float("-inf")), min(2 * args.k, int(dead.sum())))
            loss = loss + args.auxiliary * (left.detach() - more @ w_dec).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))
        if step % 100 == 0:
            share = float(left.detach().square().sum() / (x - x.mean(0)).square().sum())
            seconds = time.perf_counter() - started
            print(f"step {step}  unexplained {share:.4f}  silent {int(dead.sum())}  {seconds:.0f} s", flush=True)
    with torch.no_grad():
        tensors = (w_enc.clone(), w_dec.clone(), b_enc * scale, b_dec * scale)
    return tls.Dictionary(*tensors, activation="topk", k=args.k, centred=True, hook=hook)


def measured(model: Any, dictionary: tls.Dictionary, args: Any) -> dict[str, float]:
    """The share of new text's variance that is left over, active features a position, and how many features fire."""
    hook = str(dictionary.hook)
    stream = activations(model, hook, args.batch, args.length, args.seed + 1)
    x = torch.cat([next(stream) for _ in range(16)])
    a = dictionary.encode(x)
    left = float((x - dictionary.decode(a)).square().sum() / (x - x.mean(0)).square().sum())
    fire = int((a > 0).any(0).sum())
    return {"unexplained": round(left, 5), "active": round(float((a > 0).sum(1).float().mean()), 2), "firing": fire}


def main() -> None:
    args = arguments(__doc__, DICTIONARY, **SETTINGS)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    model = tls.text.load_language_model(tls.task.own_language_model())
    dictionary = trained(model, f"blocks.{args.layer}.hook_resid_post", args)
    tls.dictionaries.save(dictionary, args.out, dtype=torch.float16)
    seconds = round(time.perf_counter() - started)
    metrics = {name: value for name, value in vars(args).items() if name != "out"}
    metrics |= {"seconds": seconds, **measured(model, tls.dictionaries.load(args.out), args)}
    metrics["machine"] = f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}"
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(metrics)


if __name__ == "__main__":
    main()
