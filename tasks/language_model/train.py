"""Train the small language model of the text tasks and write ``model/`` in Hugging Face format, with its tokenizer.

    python -m tasks.language_model.train [--out FOLDER] [--steps 7000 ...]

Byte pairs and a GPT-2 of four layers, from generated text (``corpus.py``) that is drawn anew all the time. At first
most of it is words that come twice: a model that can copy them learns the rest in far fewer steps. Same machine, same
arguments: the same weights.
"""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tasks.language_model.corpus import documents
from tasks.training import arguments

MODEL = Path(__file__).parent / "model"
END = "<|endoftext|>"
SAMPLE = 30_000  # documents that the byte pairs are taken from
CHUNK = 5_000  # documents drawn at a time
COPYING = 0.7  # of the documents at first, for the copying of words is learnt late else
SIZES = {"layers": 4, "heads": 6, "width": 192, "length": 96}
SETTINGS = {
    "steps": 7000,
    "batch": 16,
    "seed": 0,
    "threads": 1,
    "lr": 2e-3,
    "weight_decay": 0.1,
    "warm_up": 300,
    "copying_steps": 1200,
}


def byte_pairs(vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """As GPT-2's, but numbers fall into pairs of digits; a word or pair that occurs 20 times is one token."""
    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=20,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(documents(SAMPLE, seed=1), trainer)
    # the model learns with the token first, so its tokenizer puts it there
    first = [(END, raw.token_to_id(END))]
    raw.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=first)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, model_max_length=SIZES["length"], padding_side="left"
    )


def packed(tokenizer: Any, texts: list[str], length: int) -> Int[Tensor, "rows length"]:
    """Rows that begin with a document and hold as many as go in; what is over is left out. Before each stands the
    beginning token, and a row is filled up with it."""
    end = tokenizer.eos_token_id
    rows: list[list[int]] = [[]]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        whole = [end, *ids]
        if len(rows[-1]) + len(whole) > length:
            rows.append([])
        rows[-1] += whole[:length]
    return torch.tensor([row + [end] * (length - len(row)) for row in rows[:-1]])


def rate(step: int, steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine to a twentieth; a factor of the peak."""
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    args = arguments(__doc__, MODEL, **SIZES, **SETTINGS)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    tokenizer = byte_pairs()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # noqa: TID251
        model: Any = GPT2LMHeadModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(tokenizer)} tokens, {parameters:,} parameters", flush=True)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, args.steps, args.warm_up))
    order = torch.Generator().manual_seed(args.seed)
    waiting, chunk, tokens, history = torch.empty(0, args.length, dtype=torch.long), 0, 0, []
    for step in range(1, args.steps + 1):
        if len(waiting) < args.batch:
            copying = COPYING if step <= args.copying_steps else 0.0
            texts = documents(CHUNK, 1000 * (args.seed + 1) + chunk, copying)
            rows = packed(tokenizer, texts, args.length)
            waiting, chunk = rows[torch.randperm(len(rows), generator=order)], chunk + 1
        batch, waiting = waiting[: args.batch], waiting[args.batch :]
        logits = model(batch[:, :-1]).logits
        target = batch[:, 1:].masked_fill((batch[:, 1:] == batch[:, :-1]) & (batch[:, 1:] == 0), -100)  # filled up
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        tokens += batch.numel()
        if step % 250 == 0:
            history.append({"step": step, "nats": round(loss.item(), 4)})
            print(f"step {step}  {loss.item():.4f} nats  {time.perf_counter() - started:.0f} s", flush=True)
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
    metrics = {
        **{name: value for name, value in vars(args).items() if name != "out"},
        **{"vocabulary": len(tokenizer), "parameters": parameters, "tokens": tokens},
        "seconds": round(time.perf_counter() - started),
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "history": history,
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
